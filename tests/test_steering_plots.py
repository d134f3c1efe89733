"""Figures of steering: each from the smallest table that it can be drawn from, with all that this holds."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from drawing import draw_and_nothing_else, public_functions, rendered, seen, titles
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from helpers import steering_plots
from helpers.plots import CALM, FEAR, GREY
from helpers.regimes import REGIMES
from helpers.steering_plots import COLOURS

NAN = float("nan")
SHARES = pd.DataFrame(
    [
        ("fear", 1, 0.5, 0.75, 0.25, 0.0, 0.0, "unchanged"),
        ("fear", 1, 2.0, 0.0, 0.6, 0.4, 0.0, "surgical"),
        ("fear", 3, 0.5, 0.0, 0.0, 0.9, 0.1, "repetitive"),
        ("fear", 3, 2.0, 0.0, 0.0, 0.0, 1.0, "explosive"),
        *[("random", depth, strength, 0.8, 0.2, 0.0, 0.0, "unchanged") for depth in (1, 3) for strength in (0.5, 2.0)],
    ],
    columns=["panel", "depth", "strength", *REGIMES, "commonest"],
)
EQUAL = pd.DataFrame(
    [
        (measure, method, dose, value * dose, low * dose, high * dose)
        for measure in ("log-odds (nats)", "words")
        for method, value, low, high in (
            ("mean difference", 4.0, 3.0, 5.0), ("SAE clamp", 2.0, NAN, NAN), ("random, alike", 0.0, -1.0, 1.0),
            ("random, isotropic", 0.1, -2.0, 2.0),
        )
        for dose in (0.1, 0.5)
    ],
    columns=["measure", "method", "dose", "value", "low", "high"],
)  # fmt: skip
CURVES = pd.DataFrame(
    [(e, s, i * s * (2 - s)) for i, e in enumerate(("dreamy", "calm", "afraid"), 1) for s in (0.0, 1.0, 2.0)],
    columns=["emotion", "strength", "value"],
)
TESTS = pd.DataFrame(
    [("dreamy", True, 0.9, 0.4, 0.2), ("calm", False, 0.5, 0.3, 0.04), ("afraid", True, 0.1, 0.6, 1.0)],
    columns=["emotion", "peak", "back", "visible", "p_holm"],
)
SCORES = pd.DataFrame(
    [("fires at happy", 7, 3.0, 0.01, 0.5), ("fires at happy", 8, 1.0, 0.9, 2.0), ("fires at happy", 9, 2.0, 0.2, 0.1)]
    + [("random feature", 100 + i, i / 10, i / 100, -i / 10) for i in range(3)],
    columns=["kind", "feature", "input_score", "output_score", "effect"],
)
READING = pd.DataFrame(
    [(-1.0, "a calm walk\nhome", "surgical"), (0.0, "a walk", "unchanged"), (2.0, "no no no " * 40, "repetitive"),
     (4.0, "", "explosive")],
    columns=["strength", "text", "regime"],
)  # fmt: skip
COSTS = pd.DataFrame(
    [("methods", 1, 2.0), ("methods", 4, 5.0), ("tokens", 10, 3.0), ("tokens", 20, 7.0)],
    columns=["what", "count", "seconds"],
)
SMALLEST = {
    "phase_map": (SHARES, "strength (residual norms)"),
    "at_equal_dose": (EQUAL, "dose (nats)"),
    "turns": (CURVES, TESTS, "change of log-odds (nats)", ["afraid", "calm"]),
    "scores_and_effects": (SCORES, ["input_score", "output_score"], "effect", "nats"),
    "reading": (READING, "She went for"),
    "costs": (COSTS,),
}

pytestmark = pytest.mark.usefixtures("nothing_left_open")


def drawn(name: str, *arguments: object) -> Figure:
    """A figure from its smallest table, or from this one."""
    return rendered(getattr(steering_plots, name), *(arguments or SMALLEST[name]))


def in_legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def points(ax: Axes) -> dict[str, list[list[float]]]:
    """The points of every line of `ax.errorbar` by its label."""
    return {each.get_label(): each.lines[0].get_xydata().tolist() for each in ax.containers}


# All of them


def test_every_figure_has_its_smallest_table():
    assert public_functions(steering_plots) == set(SMALLEST)


@pytest.mark.parametrize("name", SMALLEST)
def test_it_draws_leaves_its_tables_alone_and_opens_nothing_else(name: str):
    draw_and_nothing_else(lambda: drawn(name), SMALLEST[name])


@pytest.mark.parametrize("name", SMALLEST)
def test_the_same_table_gives_the_same_picture(name: str):
    first, second = (np.asarray(drawn(name).canvas.buffer_rgba()) for _ in range(2))
    assert np.array_equal(first, second) and len(np.unique(first)) > 2


@pytest.mark.parametrize("name", SMALLEST)
def test_rows_may_have_any_index(name: str):
    tables = [a.set_index(np.zeros(len(a))) if isinstance(a, pd.DataFrame) else a for a in SMALLEST[name]]
    first, second = (np.asarray(figure.canvas.buffer_rgba()) for figure in (drawn(name), drawn(name, *tables)))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("name", ["phase_map", "at_equal_dose", "turns", "scores_and_effects", "costs"])
def test_axes_are_named(name: str):
    axes = drawn(name).axes
    assert all(ax.get_xlabel() for ax in axes)
    assert axes[0].get_ylabel() or name == "at_equal_dose"  # whose titles name the measures


@pytest.mark.parametrize("name", ["at_equal_dose", "turns", "scores_and_effects"])
def test_a_line_at_nothing_is_drawn_on_every_axis(name: str):
    for ax in drawn(name).axes:
        dashed = [line for line in ax.lines if (line.get_linestyle(), line.get_color()) == ("--", "black")]
        ends = [{tuple(line.get_xdata()), tuple(line.get_ydata())} for line in dashed]
        assert ends == [{(0, 1), (0, 0)}]


def test_where_no_dose_is_reached_the_figure_says_so():
    figure = drawn("at_equal_dose", EQUAL.iloc[:0], "dose (nats)")
    assert titles(figure) == ["no method reached any dose"]
    assert figure.axes[0].get_legend() is None


# Regimes


def test_a_phase_map_has_the_colour_of_each_commonest_regime_and_its_share():
    figure = drawn("phase_map")
    assert titles(figure) == ["fear", "random"]
    assert [ax.get_ylabel() for ax in figure.axes] == ["depth", ""]
    left, right = figure.axes
    colours = [to_hex(colour) for colour in left.collections[0].get_facecolors()]
    assert colours == [COLOURS[regime].lower() for regime in ("unchanged", "surgical", "repetitive", "explosive")]
    assert {to_hex(colour) for colour in right.collections[0].get_facecolors()} == {COLOURS["unchanged"].lower()}
    assert [text.get_text() for text in left.texts] == ["75", "60", "90", "100"]
    assert [text.get_text() for text in right.texts] == ["80"] * 4
    assert [label.get_text() for label in left.get_yticklabels()] == ["1", "3"]
    assert [label.get_text() for label in left.get_xticklabels()] == ["0.5", "2.0"]
    assert left.get_ylim()[0] < left.get_ylim()[1]  # the deepest on top


def test_the_legend_of_a_phase_map_has_all_regimes_in_their_colours():
    (legend,) = drawn("phase_map", SHARES[:1], "strength").legends
    assert [text.get_text() for text in legend.get_texts()] == list(REGIMES)
    assert [to_hex(patch.get_facecolor()) for patch in legend.get_patches()] == [COLOURS[r].lower() for r in REGIMES]
    assert len(set(COLOURS.values())) == 4


def test_a_phase_map_may_have_one_panel_and_depths_of_a_sweep():
    figure = drawn("phase_map", SHARES[:4].astype({"depth": "Int64"}), "strength")
    assert titles(figure) == ["fear"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["1", "3"]


@pytest.mark.parametrize("lost", [0, 3])
def test_a_phase_map_leaves_a_cell_without_runs_empty(lost: int):
    """As where a depth does not reach a dose."""
    ax = drawn("phase_map", SHARES[:4].drop(lost), "strength").axes[0]
    numbers = ["75", "60", "90", "100"]
    assert [text.get_text() for text in ax.texts] == numbers[:lost] + numbers[lost + 1 :]


# Equal doses


def test_methods_are_lines_with_their_intervals_and_random_directions_grey_bands():
    figure = drawn("at_equal_dose")
    assert titles(figure) == ["log-odds (nats)", "words"]
    for ax in figure.axes:
        assert ax.get_xscale() == "log" and ax.get_xlabel() == "dose (nats)"
        assert list(points(ax)) == ["mean difference", "SAE clamp"]
        for name, factor in (("mean difference", 4), ("SAE clamp", 2)):
            doses, values = zip(*points(ax)[name])
            assert doses == pytest.approx((0.1, 0.5), rel=0.05) and values == pytest.approx(
                (0.1 * factor, 0.5 * factor)
            )
        bands = [band for band in ax.collections if isinstance(band, PolyCollection)]
        spans = [(band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()) for band in bands]
        assert spans == [(-0.5, 0.5), (-1, 1)]
        shades = [band.get_facecolor()[0, :3] for band in bands]
        assert all(shade.max() == shade.min() for shade in shades) and not np.array_equal(*shades)
    legend = in_legend(figure.axes[-1])
    assert set(legend) == set(EQUAL["method"]) and len(legend) == 4


def test_intervals_reach_from_low_to_high_beside_each_other():
    ax = drawn("at_equal_dose").axes[0]
    first, second = ax.containers
    segments = first.lines[2][0].get_segments()
    assert [segment[:, 1].tolist() for segment in segments] == [pytest.approx([0.3, 0.5]), pytest.approx([1.5, 2.5])]
    assert all(np.isnan(segment).any() for segment in second.lines[2][0].get_segments() if len(segment))  # none
    assert first.lines[0].get_xdata()[0] != second.lines[0].get_xdata()[0]


def test_methods_differ_in_colour_marker_and_line():
    lines = [each.lines[0] for each in drawn("at_equal_dose").axes[0].containers]
    for look in ("get_color", "get_marker", "get_linestyle"):
        assert len({str(getattr(line, look)()) for line in lines}) == 2


@pytest.mark.parametrize("only", ["mean difference", "SAE clamp", "random, alike"])
def test_one_method_and_one_measure_are_enough(only: str):
    (ax,) = drawn("at_equal_dose", EQUAL[EQUAL["method"].eq(only) & EQUAL["measure"].eq("words")], "dose").axes
    assert in_legend(ax) == [only]


def test_there_may_be_more_methods_than_looks_and_a_measure_may_lack_one():
    table = pd.concat([EQUAL[:2].assign(method=f"method {number}") for number in range(12)])
    figure = drawn("at_equal_dose", pd.concat([table, table[:4].assign(measure="other")]), "dose")
    assert [len(points(ax)) for ax in figure.axes] == [12, 2]
    looks = [(c.lines[0].get_color(), c.lines[0].get_marker()) for c in figure.axes[0].containers[:2]]
    assert looks == [(c.lines[0].get_color(), c.lines[0].get_marker()) for c in figure.axes[1].containers]


def test_a_mean_outside_its_interval_does_not_fail():
    table = EQUAL[:2].assign(low=EQUAL["value"] + 1, high=EQUAL["value"] + 2)
    assert list(points(drawn("at_equal_dose", table, "dose").axes[0])) == ["mean difference"]


# Turns


def test_shown_curves_have_their_colour_and_the_others_are_grey():
    left = drawn("turns").axes[0]
    curves = left.lines[:3]
    for line, (_, part) in zip(curves, CURVES.groupby("emotion", sort=False)):
        assert line.get_xydata().tolist() == part[["strength", "value"]].to_numpy().tolist()
    assert [to_hex(line.get_color()) for line in curves] == [to_hex("0.75"), CALM.lower(), FEAR.lower()]
    assert set(in_legend(left)) == {"calm", "afraid"}
    assert (left.get_xlabel(), left.get_ylabel()) == ("strength (residual norms)", "change of log-odds (nats)")


def test_every_turn_stands_beside_its_name_with_what_would_be_visible():
    right = drawn("turns").axes[1]
    order = ["afraid", "calm", "dreamy"]  # by the way back
    assert [label.get_text() for label in right.get_yticklabels()] == order
    assert right.get_yticks().tolist() == [0, 1, 2]
    by_name = TESTS.set_index("emotion").loc[order]
    assert [bar.get_width() for bar in right.patches] == by_name["visible"].tolist()
    marks = right.lines[:3]
    assert [mark.get_xydata()[0].tolist() for mark in marks] == [[back, i] for i, back in enumerate(by_name["back"])]
    assert [mark.get_marker() for mark in marks] == ["v", "^", "v"]  # a peak points down
    assert [to_hex(mark.get_color()) for mark in marks] == [FEAR.lower(), CALM.lower(), to_hex("0.3")]
    assert [(t.get_text().strip(), *t.get_position()) for t in right.texts] == [("*", 0.5, 1)]  # p below .05


def test_one_curve_and_emotions_of_an_own_kind_are_drawn():
    figure = drawn("turns", CURVES[:3], TESTS[:1], "nats", ["dreamy"])
    assert in_legend(figure.axes[0]) == ["dreamy"]
    assert to_hex(figure.axes[0].lines[0].get_color()) == "#000000"


# Scores


def test_scores_are_points_of_both_kinds_on_every_axis():
    figure = drawn("scores_and_effects")
    assert [ax.get_xlabel() for ax in figure.axes] == ["input score", "output score"]
    assert [ax.get_ylabel() for ax in figure.axes] == ["nats", ""]
    for ax, score in zip(figure.axes, ("input_score", "output_score")):
        for dots, (_, part) in zip(ax.collections, SCORES.groupby("kind", sort=False)):
            np.testing.assert_allclose(dots.get_offsets(), part[[score, "effect"]])
        assert [to_hex(dots.get_facecolor()[0][:3]) for dots in ax.collections] == [FEAR.lower(), to_hex(GREY)]
    assert in_legend(figure.axes[-1]) == ["fires at happy", "random feature"]


def test_the_two_features_with_the_highest_score_are_named():
    left, right = drawn("scores_and_effects").axes
    assert [(text.get_text(), text.xy) for text in left.texts] == [("7", (3, 0.5)), ("9", (2, 0.1))]
    assert [(text.get_text(), text.xy) for text in right.texts] == [("8", (0.9, 2)), ("9", (0.2, 0.1))]


def test_a_score_of_which_a_few_are_far_larger_has_an_axis_to_match():
    table = SCORES.assign(output_score=[0.01, 5.0, 0.02, 0.01, 0.0, 0.03])
    assert [ax.get_xscale() for ax in drawn("scores_and_effects", table, *SMALLEST["scores_and_effects"][1:]).axes] == [
        "linear", "symlog",
    ]  # fmt: skip


@pytest.mark.parametrize("lowest", [0.0, -0.5])
def test_every_point_lies_within_its_axis(lowest: float):
    """A random feature may fire less at the word than without it."""
    table = SCORES.assign(output_score=[0.01, 5.0, 0.02, 0.01, lowest, 0.03])
    for ax in drawn("scores_and_effects", table, *SMALLEST["scores_and_effects"][1:]).axes:
        for dots in ax.collections:
            x, y = dots.get_offsets().T
            assert ax.get_xlim()[0] <= x.min() and x.max() <= ax.get_xlim()[1]
            assert ax.get_ylim()[0] <= y.min() and y.max() <= ax.get_ylim()[1]


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_one_score_of_one_kind_that_does_not_vary_is_drawn(value: float):
    table = SCORES[:3].assign(output_score=value)
    (ax,) = drawn("scores_and_effects", table, ["output_score"], "effect", "nats").axes
    assert in_legend(ax) == ["fires at happy"] and ax.get_xscale() == "linear"


# Reading


def test_every_strength_has_its_text_its_regime_and_the_regimes_colour():
    figure = drawn("reading")
    (ax,) = figure.axes
    assert titles(figure) == ["She went for ..."]
    shown = [text.get_text() for text in ax.texts]
    assert shown[0::3] == ["-1", "+0", "+2", "+4"] and shown[1::3] == READING["regime"].tolist()
    assert shown[2] == "a calm walk⏎home" and shown[5] == "a walk"
    assert [to_hex(patch.get_facecolor()) for patch in ax.patches] == [COLOURS[r].lower() for r in READING["regime"]]
    heights = [ax.texts[number].get_position()[1] for number in (0, 3, 6, 9)]
    assert heights == sorted(set(heights))


def test_a_long_text_takes_three_lines_and_none_covers_the_next():
    (ax,) = drawn("reading").axes
    long = ax.texts[8]
    assert long.get_text().count("\n") == 2 and max(map(len, long.get_text().split("\n"))) <= 96
    boxes = [text.get_window_extent() for text in ax.texts[2::3]]
    assert all(above.y0 > below.y1 for above, below in pairwise(boxes))


def test_a_text_of_nothing_is_told_from_a_missing_one():
    (ax,) = drawn("reading", READING[3:], "She went for").axes
    assert ax.texts[2].get_text() in ("␣", "(nothing)")


def test_dollar_signs_are_money_and_not_mathematics():
    said = "it cost $5, then $6_a^b^c"
    (ax,) = drawn("reading", READING[:1].assign(text=said), "He had $20 and spent $3_x^y^z").axes
    assert seen(ax.texts[2]) == said
    assert seen(ax.title if ax.get_title() else ax._left_title) == "He had $20 and spent $3_x^y^z ..."


# Costs


@pytest.mark.parametrize("table", [COSTS, COSTS[:2]], ids=["two panels", "one"])
def test_costs_stand_beside_a_line_through_the_last_that_is_proportional(table: pd.DataFrame):
    axes = drawn("costs", table).axes
    assert [ax.get_xlabel() for ax in axes] == table["what"].unique().tolist()
    for ax, (_, part) in zip(axes, table.groupby("what")):
        measured, proportional = ax.lines
        assert measured.get_xydata().tolist() == part[["count", "seconds"]].to_numpy().tolist()
        assert proportional.get_linestyle() == ":" and ax.get_ylim()[0] == 0
        (x, y), (last, seconds) = proportional.get_xydata()
        assert y / x == pytest.approx(seconds / last) and (last, seconds) == tuple(measured.get_xydata()[-1])
        assert ax.get_xticks().tolist() == part["count"].tolist()
