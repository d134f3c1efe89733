"""Figures about many emotions: each from the smallest table that it can be drawn from, with all that this holds."""

import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from helpers import curves, geometry_plots
from helpers.emotions import norms
from helpers.plots import CALM, FEAR

NAN = float("nan")
BY_DEPTH = pd.DataFrame(
    [
        (panel, condition, depth, depth / 4, low, high)
        for panel in ("raw", "centred")
        for condition, low, high in (("the model", 0.1, 0.4), ("shuffled labels", -0.3, -0.2), ("a twin", NAN, NAN))
        for depth in (0, 1)
    ],
    columns=["panel", "condition", "depth", "value", "low", "high"],
)
DEPTH = torch.linspace(0, 1, 5)
BENT = torch.stack([(DEPTH - turn) ** 2 for turn in (0.55, 0.3, 0.8)])
MEASURES = {"cosine": {"the model": BENT, "null": 1 - BENT[:1]}, "highest AUROC": {"the model": 1 - BENT}}
SETTINGS = pd.DataFrame(
    [
        (setting, statistic, value + shift, value + shift - 0.1, value + shift + 0.2)
        for setting, shift in (("as published", 0.0), ("8-bit weights", 0.05))
        for statistic, value in (("comprehension", 0.6), ("generation", 0.7), ("gap", 0.1))
    ],
    columns=["setting", "statistic", "value", "low", "high"],
)
COMPONENTS = pd.DataFrame(
    [
        (panel, component, 0.5 / component, rating, 0.8 / component, 0.3 + component / 10)
        for panel in ("the model", "a twin")
        for rating in ("valence", "arousal")
        for component in (1, 2)
    ],
    columns=["panel", "component", "share", "rating", "r", "null"],
)
MAP = pd.DataFrame(
    [("the model", "happy", 1.0, 0.5, 8.0), ("the model", "sad", -1.0, -0.5, 2.0), ("the model", "own", 0.2, 0.9, NAN)],
    columns=["panel", "emotion", "x", "y", "valence"],
).assign(xlabel="PC1 (60% of variance)", ylabel="PC2 (20% of variance)")
READ_WRITE = pd.DataFrame(
    [("happy", "emotion", 0.8, -1.2), ("sad", "emotion", -0.7, 1.0), ("0", "random", 0.1, 0.0)],
    columns=["vector", "kind", "reads", "writes"],
)


def grid(panel: str, rows: str, columns: str, values: list[float]) -> pd.DataFrame:
    """A matrix as rows: panel, emotion, other, cosine."""
    cells = [(panel, row, column) for row in rows for column in columns]
    return pd.DataFrame(cells, columns=["panel", "emotion", "other"]).assign(cosine=values)


SQUARES = pd.concat([grid("a", "xy", "xy", [1.0, 0.2, 0.3, 1.0]), grid("b", "yx", "yx", [1.0, -0.4, -0.5, 1.0])])
SMALLEST = {
    "depth_panels": (BY_DEPTH, "mean pairwise cosine"),
    "parabolas": curves.parabolas(MEASURES),
    "settings": (SETTINGS, (0.45, 0.55)),
    "matrices": (SQUARES, "emotion", "other", "cosine"),
    "components": (COMPONENTS,),
    "emotion_map": (MAP,),
    "read_write": (READ_WRITE, "r of read-out and behaviour", "nats"),
}


pytestmark = pytest.mark.usefixtures("nothing_left_open")


def drawn(name: str, *arguments: object) -> Figure:
    """A figure, rendered, from its smallest table or from this one."""
    figure = getattr(geometry_plots, name)(*(arguments or SMALLEST[name]))
    figure.canvas.draw()
    return figure


def labelled(ax: Axes) -> dict[str, Line2D]:
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def names_in(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts if text.get_text()]


# All of them


def test_every_figure_has_its_smallest_table():
    functions = [f for _, f in inspect.getmembers(geometry_plots, inspect.isfunction)]
    own = [f for f in functions if f.__module__ == geometry_plots.__name__ and not f.__name__.startswith("_")]
    assert {f.__name__ for f in own if f.__annotations__["return"] is Figure} == set(SMALLEST)
    assert {f.__name__ for f in own} - set(SMALLEST) == {"landed"}  # shows a map


@pytest.mark.parametrize("name", SMALLEST)
def test_it_draws_and_leaves_its_tables_alone(name):
    tables = [argument for argument in SMALLEST[name] if isinstance(argument, pd.DataFrame)]
    before = [table.copy() for table in tables]
    figure = drawn(name)
    assert isinstance(figure, Figure)
    assert all(ax.has_data() for ax in figure.axes if ax.axison)
    for table, was in zip(tables, before):
        pd.testing.assert_frame_equal(table, was)


@pytest.mark.parametrize("name", SMALLEST)
def test_the_same_table_gives_the_same_picture(name):
    first, second = (np.asarray(drawn(name).canvas.buffer_rgba()) for _ in range(2))
    assert np.array_equal(first, second) and len(np.unique(first)) > 2


@pytest.mark.parametrize("name", SMALLEST)
def test_axes_are_named(name):
    axes = [ax for ax in drawn(name).axes if ax.get_label() != "<colorbar>"]
    assert all(ax.get_xlabel() for ax in axes)
    assert any(ax.get_ylabel() for ax in axes) or name == "settings"


@pytest.mark.parametrize("name", ["depth_panels", "settings", "emotion_map", "read_write"])
def test_a_line_of_reference_is_drawn_on_every_axis(name):
    for ax in drawn(name).axes:
        looks = [(line.get_linestyle(), line.get_color()) for line in ax.lines]
        assert ax.get_label() == "<colorbar>" or {(":", "black"), ("--", "black")} & set(looks)


# Depth


def test_depth_panels_draw_every_condition_where_it_is():
    figure = drawn("depth_panels")
    assert [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes] == ["raw", "centred"]
    assert figure.axes[0].get_ylabel() == "mean pairwise cosine"
    for ax in figure.axes:
        lines = labelled(ax)
        assert list(lines) == ["the model", "shuffled labels", "a twin"]
        assert all(line.get_xydata().tolist() == [[0, 0], [1, 0.25]] for line in lines.values())
        assert to_hex(lines["the model"].get_color()) == FEAR.lower()
        assert len({str(line._unscaled_dash_pattern) + line.get_marker() for line in lines.values()}) == 3
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["the model", "shuffled labels", "a twin"]


def test_depth_panels_draw_bands_where_low_and_high_are_given():
    for ax in drawn("depth_panels").axes:
        bands = [band.get_paths() for band in ax.collections if isinstance(band, PolyCollection)]
        spans = [(path.vertices[:, 1].min(), path.vertices[:, 1].max()) for paths in bands for path in paths]
        assert spans == [(0.1, 0.4), (-0.3, -0.2)]


def test_a_condition_of_the_second_panel_alone_is_in_the_legend_with_its_look():
    table = pd.concat([BY_DEPTH, BY_DEPTH[-2:].assign(condition="constant")])
    figure = drawn("depth_panels", table, "y")
    assert "constant" not in labelled(figure.axes[0]) and "constant" in labelled(figure.axes[1])
    for handle, text in zip(figure.legends[0].get_lines(), figure.legends[0].get_texts()):
        line = labelled(figure.axes[1])[text.get_text()]
        assert (handle.get_marker(), handle.get_color()) == (line.get_marker(), line.get_color())


# Parabolas


def test_parabolas_pass_where_the_fit_does_and_points_where_the_curve_does():
    first, second = drawn("parabolas").axes
    assert [first.get_ylabel(), second.get_ylabel()] == ["cosine", "highest AUROC"]
    assert labelled(first)["the model"].get_ydata().tolist() == pytest.approx(BENT[0].tolist())
    assert labelled(first)["null"].get_ydata().tolist() == pytest.approx((1 - BENT[0]).tolist())
    for ax, curve in ((first, BENT[0]), (first, 1 - BENT[0]), (second, 1 - BENT[0])):
        fitted = [line.get_xydata().T for line in ax.lines if len(line.get_xdata()) == 100]
        through = [np.interp(DEPTH, *line) for line in fitted]
        assert any(each == pytest.approx(curve.numpy(), abs=1e-3) for each in through)
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["the model", "null"]


def test_the_best_point_of_the_first_condition_is_marked_with_its_interval():
    ax = drawn("parabolas").axes[0]
    (best,) = (line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":" and len(line.get_xdata()) == 2)
    interval, middle = ([p.get_x(), p.get_x() + p.get_width()] for p in ax.patches)
    fit = SMALLEST["parabolas"][1].iloc[0]
    assert best == fit["best"] == 0.5 and middle == pytest.approx([0.35, 0.65])
    assert interval == pytest.approx([fit["best_low"], fit["best_high"]]) and 0.25 < interval[0] < 0.5 < interval[1]


def test_a_parabola_may_have_more_conditions_than_there_are_looks():
    tables = curves.parabolas({"cosine": {f"condition {number}": BENT for number in range(9)}})
    assert len(labelled(drawn("parabolas", *tables).axes[0])) == 9


# Settings


def test_settings_have_their_values_intervals_and_null():
    left, right = drawn("settings").axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["as published", "8-bit weights"]
    for ax, statistic, colour in (
        (left, "comprehension", CALM),
        (left, "generation", FEAR),
        (right, "gap", "black"),
    ):
        part = SETTINGS[SETTINGS["statistic"] == statistic]
        lines = [line for line in ax.lines if line.get_color() == colour and line.get_linestyle() != "--"]
        spans = [list(line.get_xdata()) for line in lines if len(line.get_xdata()) == 2]
        assert spans == part[["low", "high"]].to_numpy().tolist()
        points = [(line.get_xdata()[0], round(line.get_ydata()[0])) for line in lines if len(line.get_xdata()) == 1]
        assert points == list(zip(part["value"], (0, 1)))
    (null,) = left.patches
    assert [null.get_x(), null.get_x() + null.get_width()] == pytest.approx([0.45, 0.55])
    assert [next(iter(ax.lines[-1].get_xdata())) for ax in (left, right)] == [0.5, 0]
    assert left.get_ylim()[0] > left.get_ylim()[1]  # the first setting on top
    legend = {text.get_text() for text in left.get_legend().get_texts()}
    assert legend == {"comprehension", "generation", "shuffled labels (95 %)"}


# Matrices


def cells(ax: Axes) -> dict[tuple[str, str], float]:
    """The value that is drawn beside every pair of labels."""
    rows, columns = ([label.get_text() for label in labels] for labels in (ax.get_yticklabels(), ax.get_xticklabels()))
    values = ax.collections[0].get_array().reshape(len(rows), len(columns))
    return {(row, column): float(values[i, j]) for i, row in enumerate(rows) for j, column in enumerate(columns)}


def test_every_panel_keeps_its_own_order_with_its_own_labels_beside_its_own_values():
    orders = {"a": ("zxy", "zxy"), "b": ("xyz", "xyz"), "c": ("yzx", "xzy")}
    table = pd.concat([grid(panel, *order, np.arange(9) + 10.0 * i) for i, (panel, order) in enumerate(orders.items())])
    figure = drawn("matrices", table, "emotion", "other", "cosine")
    for ax, (panel, (rows, columns)) in zip(figure.axes, orders.items()):
        assert ax.get_title(loc="left") == panel
        assert [label.get_text() for label in ax.get_yticklabels()] == list(rows)
        assert [label.get_text() for label in ax.get_xticklabels()] == list(columns)
        part = table[table["panel"] == panel]
        assert cells(ax) == dict(zip(zip(part["emotion"], part["other"]), part["cosine"]))


def test_panels_may_hold_other_rows_than_each_other():
    table = pd.concat([SQUARES, grid("c", "uvw", "uvw", [0.1] * 9)])
    first, _, third, *_ = drawn("matrices", table, "emotion", "other", "cosine").axes
    assert {row for row, _ in cells(first)} == set("xy") and {row for row, _ in cells(third)} == set("uvw")


def test_depths_label_the_rows_of_a_matrix_and_numbers_stand_in_its_cells():
    table = pd.DataFrame(
        [("a", depth, other, depth - other / 10) for other in (0, 1) for depth in (0, 1)],
        columns=["panel", "depth", "other", "r"],
    )
    ax = drawn("matrices", table, "depth", "other", "r", True).axes[0]
    assert names_in(ax) == ["0.00", "-0.10", "1.00", "0.90"]
    assert cells(ax) == {("0", "0"): 0, ("0", "1"): pytest.approx(-0.1), ("1", "0"): 1, ("1", "1"): pytest.approx(0.9)}


def test_all_matrices_share_one_scale_around_0_that_leaves_the_diagonal_out():
    *panels, bar = drawn("matrices").axes
    assert [ax.collections[0].get_clim() for ax in panels] == [(-0.5, 0.5)] * 2
    assert bar.get_ylabel() == "cosine" and bar.get_ylim() == (-0.5, 0.5)


def test_shares_are_on_a_scale_from_0_to_the_largest():
    shares = SQUARES.assign(cosine=SQUARES["cosine"].abs() * 0.7)
    figure = drawn("matrices", shares, "emotion", "other", "cosine", False, "cividis")
    assert {ax.collections[0].get_clim() for ax in figure.axes[:2]} == {(0, 0.7)}


def test_a_fourth_matrix_stands_in_a_second_line_and_the_rest_of_it_is_empty():
    table = pd.concat([grid(panel, "xy", "xy", [1.0, 0.2, 0.3, 1.0]) for panel in "abcd"])
    axes = drawn("matrices", table, "emotion", "other", "cosine").axes
    assert [ax.get_title(loc="left") for ax in axes if ax.axison][:4] == list("abcd")
    assert sum(not ax.axison for ax in axes) == 2
    assert axes[3].get_position().y1 < axes[0].get_position().y0


# Components


def bars(ax: Axes, ratings: list[str]) -> dict[tuple[str, str], tuple[float, float]]:
    """Height of every bar and of the black line across it, by component as it is labelled, and rating."""
    nulls = [line.get_xydata() for line in ax.lines if line.get_color() == "black"]
    found = {}
    for rating, container in zip(ratings, ax.containers):
        for label, bar in zip(ax.get_xticklabels(), sorted(container, key=lambda bar: bar.get_x())):
            ends = [bar.get_x(), bar.get_x() + bar.get_width()]
            (null,) = (line[0, 1] for line in nulls if np.allclose(line[:, 0], ends))
            found[label.get_text(), rating] = (pytest.approx(bar.get_height()), pytest.approx(null))
    return found


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["in order", "the last row first"])
def test_components_have_bars_with_their_null_and_share(order):
    table = COMPONENTS[order]
    ratings, figure = list(table["rating"].unique()), drawn("components", table)
    assert [ax.get_title(loc="left") for ax in figure.axes] == list(table["panel"].unique())
    for ax in figure.axes:
        assert {label: found for (label, rating), found in bars(ax, ratings).items() if rating == "valence"} == {
            "PC1\n50%": (0.8, 0.4),
            "PC2\n25%": (0.4, 0.5),
        }
        assert {label for label, _ in bars(ax, ratings)} == {"PC1\n50%", "PC2\n25%"}
        assert ax.get_ylim() == (0, 1)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ratings


def test_each_panel_of_components_has_its_own_shares_and_nulls():
    other = COMPONENTS["panel"] == "a twin"
    table = COMPONENTS.assign(share=COMPONENTS["share"].mask(other, 0.1), null=COMPONENTS["null"].mask(other, 0.9))
    first, second = (bars(ax, ["valence", "arousal"]) for ax in drawn("components", table).axes)
    assert first["PC1\n50%", "valence"][1] == 0.4
    assert {label for label, _ in second} == {"PC1\n10%", "PC2\n10%"} and all(
        null == 0.9 for _, null in second.values()
    )


# Maps


def stars_and_points(ax: Axes) -> tuple[list, list]:
    points, stars = (ax.collections[i] for i in (0, 1))
    return stars.get_offsets().tolist(), points.get_offsets().tolist()


def test_a_map_labels_every_emotion_and_draws_a_star_for_one_without_valence():
    ax, bar = drawn("emotion_map").axes
    assert sorted(names_in(ax)) == ["happy", "own", "sad"]
    assert stars_and_points(ax) == ([[0.2, 0.9]], [[1, 0.5], [-1, -0.5]])
    star, point = (ax.collections[i].get_paths()[0].vertices for i in (1, 0))
    assert len(star) == 11 and len(point) > 11  # the corners of a star; a circle
    assert ax.get_xlabel() == "PC1 (60% of variance)" and ax.get_ylabel() == "PC2 (20% of variance)"
    assert "valence" in bar.get_ylabel()


def test_the_colour_of_an_emotion_is_its_valence_on_the_whole_scale():
    points = drawn("emotion_map").axes[0].collections[0]
    assert points.get_array().tolist() == [8, 2] and points.get_clim() == (1, 9)
    pleasant, unpleasant = points.get_facecolors()
    assert pleasant[0] > pleasant[2] and unpleasant[2] > unpleasant[0]  # orange and purple


def test_a_map_without_a_star_has_none():
    ax = drawn("emotion_map", MAP[:2]).axes[0]
    assert stars_and_points(ax) == ([], [[1, 0.5], [-1, -0.5]]) and sorted(names_in(ax)) == ["happy", "sad"]


def test_a_map_of_stars_alone_is_drawn():
    ax = drawn("emotion_map", MAP.assign(valence=NAN)).axes[0]
    assert len(stars_and_points(ax)[0]) == 3 and len(names_in(ax)) == 3


def test_each_panel_of_a_map_has_its_own_emotions_and_axes():
    other = MAP[1:].assign(panel="null", x=[5.0, 6.0], xlabel="PC1 (9% of variance)")
    first, second, *_ = drawn("emotion_map", pd.concat([MAP, other])).axes
    assert [ax.get_title(loc="left") for ax in (first, second)] == ["the model", "null"]
    assert sorted(names_in(first)) == ["happy", "own", "sad"] and sorted(names_in(second)) == ["own", "sad"]
    assert stars_and_points(second) == ([[6, 0.9]], [[5, -0.5]])
    assert [ax.get_xlabel() for ax in (first, second)] == ["PC1 (60% of variance)", "PC1 (9% of variance)"]


def test_labels_of_all_emotions_are_near_their_points_and_on_no_other_label(generator):
    x, y = torch.randn(2, len(norms()), generator=generator).numpy()
    table = norms()[["emotion", "valence"]].assign(panel="the model", x=x, y=y, xlabel="PC1", ylabel="PC2")
    ax = drawn("emotion_map", table).axes[0]
    texts = {text.get_text(): text.get_window_extent() for text in ax.texts if text.get_text()}
    assert set(texts) == set(norms()["emotion"])
    boxes, axes = list(texts.values()), ax.get_window_extent()
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])
    for row in table.itertuples():
        box, point = texts[row.emotion], ax.transData.transform((row.x, row.y))
        away = np.hypot(*(np.clip(point, (box.x0, box.y0), (box.x1, box.y1)) - point))
        assert away < 0.15 * axes.width and axes.overlaps(box)


def test_emotions_at_the_same_place_have_their_labels_apart():
    ax = drawn("emotion_map", MAP.assign(x=0.0, y=0.0)).axes[0]
    boxes = [text.get_window_extent() for text in ax.texts if text.get_text()]
    assert len({(round(box.x0), round(box.y0)) for box in boxes}) == 3


@pytest.mark.parametrize("name", ["owing $5", "owing $5 or $6", "$x_{$"])
@pytest.mark.parametrize("column", ["emotion", "panel"])
def test_dollar_signs_in_a_name_are_drawn_and_not_read_as_formulas(name, column):
    """The name of an emotion of one's own is typed by a reader and stands at its star and above the map."""
    ax = drawn("emotion_map", MAP.replace({column: {"own": name, "the model": name}})).axes[0]
    text = ax.title if column == "panel" else next(text for text in ax.texts if "$" in text.get_text())
    plain = ax.text(0, 0, name, fontsize=text.get_fontsize(), parse_math=False)
    title = next(t for t in (ax._left_title, text) if "$" in t.get_text())
    assert title.get_window_extent().width == pytest.approx(plain.get_window_extent().width)


def test_an_emotion_of_ones_own_is_shown_on_the_map_with_its_five_nearest(generator, monkeypatch):
    vectors, figures = torch.randn(24, 16, generator=generator), []
    monkeypatch.setattr(geometry_plots, "shown", figures.append)
    own = vectors[3] - vectors.mean(0) + 0.01
    nearest = geometry_plots.landed(vectors, norms(), "annoyed", own).data
    (figure,) = figures
    ax = figure.axes[0]
    emotions = norms()["emotion"].tolist()
    assert sorted(names_in(ax)) == sorted([*emotions, "annoyed"])
    stars, points = stars_and_points(ax)
    assert stars == [pytest.approx(points[3], abs=0.2)] and len(points) == 24
    cosine = torch.nn.functional.cosine_similarity(vectors, own[None]).sort(descending=True)
    assert nearest["emotion"].tolist() == [emotions[i] for i in cosine.indices[:5]]
    assert nearest["cosine"].tolist() == pytest.approx(cosine.values[:5].tolist(), abs=1e-5)


def test_reading_against_writing_shows_every_vector_and_names_the_emotions():
    ax = drawn("read_write").axes[0]
    random, emotions = (points.get_offsets().tolist() for points in ax.collections[:2])
    assert random == [[0.1, 0]] and emotions == [[0.8, -1.2], [-0.7, 1]]
    places = {text.get_text(): text.get_position() for text in ax.texts if text.get_text()}
    assert places == {"happy": pytest.approx([0.8, -1.2], abs=0.4), "sad": pytest.approx([-0.7, 1], abs=0.4)}
    assert (ax.get_xlabel(), ax.get_ylabel()) == SMALLEST["read_write"][1:]
    assert [to_hex(points.get_facecolors()[0]) for points in ax.collections[:2]] == ["#b2b2b2", FEAR.lower()]
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"emotions", "random, covariance-matched"}
