"""Figures of conversations and of patching: each from the smallest table that it can be drawn from."""

from itertools import chain, pairwise

import numpy as np
import pandas as pd
import pytest
from drawing import draw_and_nothing_else, public_functions, rendered, seen, titles
from matplotlib.axes import Axes
from matplotlib.collections import FillBetweenPolyCollection, LineCollection, PathCollection, QuadMesh
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from helpers import scan_plots
from helpers.plots import EMOTIONS, FEAR, GREY

NAN = float("nan")
TOKENS = pd.DataFrame(
    [
        (pos, turn, token, depth, value + depth)
        for pos, (turn, token, value) in enumerate(
            [(1, "\n", 0.0), (1, "Anna", -3.0), (1, " $5", 1.0), (2, " ", 2.0), (2, "a_{b", -1.0)], 1
        )
        for depth in (0, 1, 2)
    ],
    columns=["pos", "turn", "token", "depth", "value"],
)
TURNS = pd.DataFrame(
    [
        (scenario, turn, emotion, value + turn, value + turn - 0.5, value + turn + 0.7)
        for scenario in ("bad_news", "my $5 and $6")
        for turn in (1, 2, 3)
        for emotion, value in (("sad", 1.0), ("calm", -2.0), ("unheard-of", 0.5))
    ],
    columns=["scenario", "turn", "emotion", "value", "low", "high"],
)
RAW = pd.DataFrame(
    [
        (e, depth, value + depth / 10)
        for e, value in (("happy", 0.8), ("sad", 0.6), ("neutral", 0.9))
        for depth in (0, 1)
    ],
    columns=["emotion", "depth", "cosine"],
)
MEMORY = pd.DataFrame(
    [
        (readout, condition, turn, value / turn, value / turn - 0.1, value / turn + 0.1)
        for readout in ("raw", "beyond neutral")
        for condition, value in (("as it was", 0.9), ("turns exchanged", 0.6))
        for turn in (2, 3, 4)
    ],
    columns=["readout", "condition", "turn", "value", "low", "high"],
)
PATH = pd.DataFrame(
    [
        ("bad_news", 0.0, -0.5, 0.5, 1.0, 0.5, 1.5),
        ("bad_news", 1.0, 0.5, 1.5, 2.0, 1.0, 3.0),
        ("my $own$", -1.0, -1.5, 0.0, 0.0, -0.5, 0.5),
    ],
    columns=["scenario", "x", "x_low", "x_high", "y", "y_low", "y_high"],
)
MEANS = pd.DataFrame({"emotion": ["sad", "unheard-of"], "x": [2.0, -2.0], "y": [1.0, -1.0]})
PATCHED = pd.DataFrame(
    [
        (panel, place, depth, share, share - 0.3)
        for panel in ("residual stream", "attention", "MLP", "heads")
        for place, low in (("word", 0.9), ("end", 0.1))
        for depth, share in ((0, low), (1, -low))
    ],
    columns=["panel", "place", "depth", "value", "low"],
)
LENS = pd.DataFrame(
    [
        (turn, speaker, depth, token, probability)
        for turn, speaker, tokens in ((1, "Anna", (" and", "\n")), (2, "T$o$m", ("$5", " ")), (3, "Anna", ("", "he")))
        for depth, token, probability in zip((0, 1), tokens, (0.25, 1.0))
    ],
    columns=["turn", "speaker", "depth", "token", "probability"],
)
SMALLEST = {
    "token_map": (TOKENS, "angry, beyond neutral (SD)"),
    "by_turn": (TURNS, "beyond neutral (SD)", ["sad", "calm", "unheard-of"]),
    "raw_and_neutral": (RAW, (0.83, 0.88)),
    "memory": (MEMORY,),
    "path": (PATH, MEANS, ("valence", "arousal")),
    "patching_map": (PATCHED, "share that moves"),
    "lens_table": (LENS,),
}

pytestmark = pytest.mark.usefixtures("nothing_left_open")


def drawn(name: str, *arguments: object) -> Figure:
    """A figure from its smallest table, or from this one."""
    return rendered(getattr(scan_plots, name), *(arguments or SMALLEST[name]))


def pixels(figure: Figure) -> np.ndarray:
    return np.asarray(figure.canvas.buffer_rgba())


def lines(ax: Axes) -> dict[str, Line2D]:
    """The lines with a name of their own."""
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def spans(band: FillBetweenPolyCollection) -> dict[float, tuple[float, float]]:
    """Lower and upper end of a band at each of its places."""
    points = band.get_paths()[0].vertices
    ys = {x: points[points[:, 0] == x, 1] for x in points[:, 0]}
    return {x: (min(y), max(y)) for x, y in ys.items()}


def bands(ax: Axes) -> list[FillBetweenPolyCollection]:
    return [band for band in ax.collections if isinstance(band, FillBetweenPolyCollection)]


# All of them


def test_every_figure_has_its_smallest_table():
    assert public_functions(scan_plots) == set(SMALLEST)


@pytest.mark.parametrize("name", SMALLEST)
def test_it_draws_leaves_its_tables_alone_and_opens_nothing_else(name: str):
    draw_and_nothing_else(lambda: drawn(name), SMALLEST[name])


@pytest.mark.parametrize("name", SMALLEST)
def test_the_same_table_gives_the_same_picture_whatever_its_index(name: str):
    tables = [a.set_index(np.zeros(len(a))) if isinstance(a, pd.DataFrame) else a for a in SMALLEST[name]]
    first, second, third = (pixels(figure) for figure in (drawn(name), drawn(name), drawn(name, *tables)))
    assert np.array_equal(first, second) and np.array_equal(first, third) and len(np.unique(first)) > 2


@pytest.mark.parametrize("name", SMALLEST)
def test_axes_are_named(name: str):
    figure = drawn(name)
    assert figure.axes[-1].get_xlabel() or figure.axes[-1].get_ylabel() or not figure.axes[-1].axison
    assert any(ax.get_xlabel() for ax in figure.axes) or name == "token_map"  # below it stand the words
    assert any(ax.get_ylabel() for ax in figure.axes)


# Token map


def meshes(figure: Figure) -> list[QuadMesh]:
    """The maps, without what belongs to the scale of colours."""
    return [next(each for each in ax.collections if isinstance(each, QuadMesh)) for ax in figure.axes[:-1]]


def test_a_token_map_has_depth_by_token():
    figure = drawn("token_map")
    [mesh] = meshes(figure)
    assert mesh.get_array().tolist() == [[0, -3, 1, 2, -1], [1, -2, 2, 3, 0], [2, -1, 3, 4, 1]]
    ax, colours = figure.axes
    assert [seen(label) for label in ax.get_xticklabels()] == ["⏎", "Anna", "$5", "␣", "a_{b"]
    assert ax.get_xticks().tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert dict(zip([seen(label) for label in ax.get_yticklabels()], ax.get_yticks())) == {"0": 0.5, "2": 2.5}
    assert (ax.get_ylabel(), colours.get_ylabel()) == ("depth", "angry, beyond neutral (SD)")


def test_colours_of_a_token_map_are_centred_on_zero():
    [mesh] = meshes(drawn("token_map"))
    low, high = mesh.get_clim()
    assert low == -high and high == pytest.approx(TOKENS["value"].abs().quantile(0.99))
    [mesh] = meshes(drawn("token_map", TOKENS.assign(value=0.0), "x"))
    assert mesh.get_clim() == (-1, 1)


def test_turns_of_a_token_map_stand_apart():
    ax = drawn("token_map").axes[0]
    [line] = ax.lines
    assert set(line.get_xdata()) == {3} and line.get_color() == "white"


def test_a_long_token_map_goes_on_in_the_next_line():
    rows = [(pos, 1 + pos // 50, f"w{pos}", depth, pos + depth / 10) for pos in range(1, 131) for depth in (0, 1)]
    figure = drawn("token_map", pd.DataFrame(rows, columns=["pos", "turn", "token", "depth", "value"]), "x")
    grids = [mesh.get_array() for mesh in meshes(figure)]
    assert [grid.shape for grid in grids] == [(2, 60), (2, 60), (2, 10)]
    assert np.concatenate(grids, 1)[0].tolist() == list(range(1, 131))
    words = [label.get_text() for ax in figure.axes[:-1] for label in ax.get_xticklabels()]
    assert words == [f"w{pos}" for pos in range(1, 131)]
    assert {ax.get_xlim() for ax in figure.axes[:-1]} == {(0, 60)}  # so tokens are as wide in every line
    assert {mesh.get_clim() for mesh in meshes(figure)} == {meshes(figure)[0].get_clim()}
    assert [[int(line.get_xdata()[0]) for line in ax.lines] for ax in figure.axes[:-1]] == [[49], [39], []]


def test_a_depth_may_be_alone():
    figure = drawn("token_map", TOKENS[TOKENS["depth"] == 2], "x")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["2"]


# Turn by turn


def test_read_outs_of_every_emotion_go_over_turns_with_their_intervals():
    figure = drawn("by_turn")
    assert [seen(ax.title) or seen(ax._left_title) for ax in figure.axes] == ["bad news", "my $5 and $6"]
    for ax in figure.axes:
        assert list(lines(ax)) == ["sad", "calm", "unheard-of"]
        assert lines(ax)["calm"].get_xydata().tolist() == [[1, -1], [2, 0], [3, 1]]
        assert [line.get_color() for line in lines(ax).values()] == [EMOTIONS["sad"], EMOTIONS["calm"], GREY]
        ends = {turn: pytest.approx((turn - 2.5, turn - 1.3)) for turn in (1, 2, 3)}
        assert spans(bands(ax)[1]) == ends
        assert ax.get_xlabel() == "turn"
        dashed = [line for line in ax.lines if line.get_linestyle() == "--" and line.get_color() == "black"]
        assert [set(line.get_ydata()) for line in dashed] == [{0}]
        assert all(tick == int(tick) for tick in ax.get_xticks())
    assert figure.axes[0].get_ylabel() == "beyond neutral (SD)"
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == ["sad", "calm", "unheard-of"]


def test_only_the_emotions_asked_for_are_drawn():
    assert list(lines(drawn("by_turn", TURNS, "x", ["calm"]).axes[0])) == ["calm"]


def test_emotions_can_be_told_apart_without_colour():
    names = list(EMOTIONS)[:9]
    table = pd.concat([TURNS[TURNS["emotion"] == "sad"].assign(emotion=name) for name in names])
    found = lines(drawn("by_turn", table, "x", names).axes[0]).values()
    assert len({(str(line._unscaled_dash_pattern), line.get_marker()) for line in found}) == 9


def test_turns_without_intervals_are_drawn_as_well():
    ax = drawn("by_turn", TURNS.assign(low=NAN, high=NAN), "x", ["sad"]).axes[0]
    assert lines(ax)["sad"].get_ydata().tolist() == [2, 3, 4]


def test_a_single_turn_is_drawn():
    ax = drawn("by_turn", TURNS[TURNS["turn"] == 1], "x", ["sad"]).axes[0]
    assert lines(ax)["sad"].get_xydata().tolist() == [[1, 2]] and lines(ax)["sad"].get_marker() != "None"


# Raw cosines


def test_the_neutral_reference_is_the_black_one():
    left = drawn("raw_and_neutral").axes[0]
    assert list(lines(left)) == ["happy", "sad", "neutral"]
    assert [line.get_color() for line in lines(left).values()] == [EMOTIONS["happy"], EMOTIONS["sad"], "black"]
    assert lines(left)["neutral"].get_xydata().tolist() == [[0, 0.9], [1, 1.0]]
    band = left.patches[0].get_extents().transformed(left.transData.inverted())
    assert (band.ymin, band.ymax) == pytest.approx((0.83, 0.88))
    assert "published range" in [text.get_text() for text in left.get_legend().get_texts()]


def test_what_is_left_is_less_the_mean_of_the_emotions_alone():
    right = drawn("raw_and_neutral").axes[1]
    found = [list(line.get_ydata()) for line in right.lines]
    assert found[:3] == [pytest.approx([0.1, 0.1]), pytest.approx([-0.1, -0.1]), pytest.approx([0.2, 0.2])]


# Memory


def test_similarity_goes_over_turns_as_it_was_and_spliced():
    figure = drawn("memory")
    assert titles(figure) == ["raw", "beyond neutral"]
    for ax in figure.axes:
        assert list(lines(ax)) == ["as it was", "turns exchanged"]
        assert [line.get_color() for line in lines(ax).values()] == [FEAR, GREY]
        assert lines(ax)["turns exchanged"].get_xydata().tolist() == [[2, 0.6 / 2], [3, 0.6 / 3], [4, 0.6 / 4]]
        assert spans(bands(ax)[0])[2] == pytest.approx((0.35, 0.55))
        assert len({(line.get_linestyle(), line.get_marker()) for line in lines(ax).values()}) == 2
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["as it was", "turns exchanged"]


# Path


def test_a_path_goes_through_its_stretches_with_their_crosses():
    figure = drawn("path")
    assert titles(figure) == ["bad news", r"my \$own\$"]
    ax = figure.axes[0]
    [drawn_path] = [line for line in ax.lines if line.get_marker() == "None" and line.get_linestyle() == "-"]
    assert drawn_path.get_xydata().tolist() == [[0, 1], [1, 2]]
    crosses = [each.get_segments() for each in ax.collections if isinstance(each, LineCollection)]
    assert np.array(crosses[0]).tolist() == [[[-0.5, 1], [0.5, 1]], [[0.5, 2], [1.5, 2]]]
    assert np.array(crosses[1]).tolist() == [[[0, 0.5], [0, 1.5]], [[1, 1], [1, 3]]]
    [sizes] = [each.get_sizes() for each in ax.collections if isinstance(each, PathCollection)]
    assert all(small < large for small, large in pairwise(sizes))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("valence", "arousal")
    assert len({ax.get_xlim() for ax in figure.axes}) == len({ax.get_ylim() for ax in figure.axes}) == 1


def test_the_emotions_are_named_in_every_panel():
    for ax in drawn("path").axes:
        assert [seen(text) for text in ax.texts] == ["sad", "unheard-of"]
        stars = {tuple(*line.get_xydata()): to_hex(line.get_color()) for line in ax.lines if line.get_marker() == "*"}
        assert stars == {(2, 1): EMOTIONS["sad"].lower(), (-2, -1): to_hex(GREY)}


# Patching


def test_a_patching_map_has_the_share_of_every_place_and_depth_and_marks_those_above_zero():
    figure = drawn("patching_map")
    assert titles(figure)[:4] == ["residual stream", "attention", "MLP", "heads"]
    for ax in figure.axes[:4]:
        assert [text.get_text() for text in ax.texts] == [".90•", "-.90", ".10", "-.10"]
        assert [label.get_text() for label in ax.get_yticklabels()] == ["word", "end"]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1"]
        assert ax.collections[0].get_clim() == (-1, 1)
        assert ax.collections[0].get_array().tolist() == [[0.9, -0.9], [0.1, -0.1]]
    three = drawn("patching_map", PATCHED[PATCHED["panel"] != "heads"], "x").axes
    assert [ax.axison for ax in three] == [True] * 3 + [False] + [True]
    assert figure.axes[-1].get_ylabel() == "share that moves"


def test_an_interval_that_ends_at_zero_or_is_unknown_gets_no_mark():
    table = PATCHED[:4].assign(low=[0.0, NAN, 1e-6, -0.1], value=[0.9, -0.001, 1.0, 10.5])
    assert [text.get_text() for text in drawn("patching_map", table, "x").axes[0].texts] == [
        ".90", ".00", "1.00•", "10.50",
    ]  # fmt: skip


# Logit lens


def test_the_lens_shows_the_word_of_every_turn_and_depth_shaded_by_its_probability():
    ax, colours = drawn("lens_table").axes
    assert [seen(text) for text in ax.texts] == ["and", "⏎", "$5", "␣", "␣", "he"]
    assert ax.collections[0].get_array().tolist() == [[0.25, 1.0]] * 3
    assert ax.collections[0].get_clim() == (0, 1)
    assert [seen(label) for label in ax.get_yticklabels()] == ["1 Anna", "2 T$o$m", "3 Anna"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1"]
    assert (ax.get_xlabel(), ax.get_ylabel(), colours.get_ylabel()) == ("depth", "end of turn", "probability")
    shades = ax.collections[0].get_facecolors()
    assert sum(shades[0][:3]) > sum(shades[1][:3])  # what is likelier is darker


def test_the_lens_does_not_depend_on_the_order_of_its_rows():
    table = LENS.sort_values(["depth", "turn"], ascending=[False, True])
    assert np.array_equal(pixels(drawn("lens_table", table)), pixels(drawn("lens_table")))


def test_turns_from_ten_on_stand_behind_the_others():
    rows = [(turn, "Anna", depth, f"w{turn}", 0.5) for depth in (0, 1) for turn in range(1, 13)]
    ax = drawn("lens_table", pd.DataFrame(rows, columns=list(LENS))).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"{turn} Anna" for turn in range(1, 13)]
    assert [text.get_text() for text in ax.texts] == [*chain(*[[f"w{turn}"] * 2 for turn in range(1, 13)])]


def test_scenarios_have_colours_of_their_own():
    assert len({to_rgba(colour) for colour in scan_plots.SCENARIOS.values()}) == len(scan_plots.SCENARIOS) == 4
