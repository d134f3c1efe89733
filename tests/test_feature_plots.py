"""Figures of SAE features: each from the smallest table that it can be drawn from."""

import inspect
import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from helpers import feature_plots, plots
from helpers.features import OnPassages
from helpers.prompts import tokens

READ = pd.DataFrame(
    [(e, f, on, 1.0 if e == on else 0.2) for e, f in (("happy", 3), ("sad", 5)) for on in ("happy", "sad", "matched")],
    columns=["emotion", "feature", "read_on", "relative"],
)
EDGES = pd.DataFrame(
    [(0, 3, 1, 4, 0.9), (1, 4, 2, 5, 0.8), (1, 7, 2, 8, 0.5)], columns=["depth", "feature", "to", "match", "cosine"]
)
NODES = pd.DataFrame(
    [(0, 3, True, 0), (1, 4, True, 0), (2, 5, False, 0), (1, 7, True, 1), (2, 8, False, 1), (2, 9, True, 2)],
    columns=["depth", "feature", "chosen", "family"],
)
SMALLEST = {
    "top_features": (
        pd.DataFrame(
            [
                (e, r, f, s, r + 0.5)
                for e, f in (("happy", 3), ("sad", 3))
                for r, f in ((1, f), (2, len(e)))
                for s in "ab"
            ],
            columns=["emotion", "rank", "feature", "sentence", "activation"],
        ),
    ),
    "activation_map": (READ, "read_on", "activation"),
    "around_word": (
        pd.DataFrame(
            [(e, o, 3, o + i) for e in ("happy", "sad") for o in (-1, 0, 1) for i in (0, 1)],
            columns=["emotion", "offset", "feature", "activation"],
        ),
    ),
    "pursuit": (
        pd.DataFrame(
            [
                (t, k, s, s / 3)
                for t, k in (("happy", "direction"), ("r 0", "random"), ("r 1", "random"))
                for s in (1, 2)
            ],
            columns=["target", "kind", "step", "explained"],
        ),
    ),
    "cosine_map": (torch.eye(3), ["a", "b", "c"], [2], "title"),
    "matches": (
        pd.DataFrame(
            [
                (depth, kind, 0.5)
                for depth in (0, 1)
                for kind in ("emotion's features", "features of like frequency", "best of as many random directions")
            ],
            columns=["depth", "kind", "cosine"],
        ),
    ),
    "by_distance": (
        pd.DataFrame([(k, d, 1 / d) for k in "ab" for d in (1, 2)], columns=["kind", "distance", "cosine"]),
    ),
    "together": (pd.DataFrame([("a", 0.9, 0.8), ("b", 0.1, 0.0)], columns=["kind", "cosine", "correlation"]),),
    "flow": (NODES, EDGES),
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_every_figure_has_its_smallest_table():
    public = inspect.getmembers(
        feature_plots, lambda f: inspect.isfunction(f) and f.__module__ == feature_plots.__name__
    )
    assert {name for name, _ in public if not name.startswith("_")} == {*SMALLEST, "passages"}


@pytest.mark.parametrize("name", SMALLEST)
def test_it_draws_and_leaves_its_tables_alone(name: str):
    before = [argument.copy() for argument in SMALLEST[name] if isinstance(argument, pd.DataFrame)]
    figure = getattr(feature_plots, name)(*SMALLEST[name])
    figure.canvas.draw()
    assert isinstance(figure, Figure)
    assert any(ax.has_data() or ax.patches for ax in figure.axes)
    for table, was in zip([a for a in SMALLEST[name] if isinstance(a, pd.DataFrame)], before):
        pd.testing.assert_frame_equal(table, was)


def test_a_shared_feature_is_hatched_and_others_are_not():
    panels = feature_plots.top_features(*SMALLEST["top_features"]).axes
    assert [[bar.get_hatch() for bar in ax.patches] for ax in panels] == [["///", ""], ["///", "///"]]


def test_an_emotion_has_its_colour_everywhere():
    bar = feature_plots.top_features(*SMALLEST["top_features"]).axes[1].patches[0]
    line = feature_plots.around_word(*SMALLEST["around_word"]).axes[1].lines[0]
    label = feature_plots.activation_map(*SMALLEST["activation_map"]).axes[0].get_yticklabels()[1]
    found = {to_hex(bar.get_facecolor()), to_hex(line.get_color()), to_hex(label.get_color())}
    assert found == {plots.EMOTIONS["sad"].lower()}


def test_a_feature_read_on_its_own_emotion_is_framed():
    ax = feature_plots.activation_map(*SMALLEST["activation_map"]).axes[0]
    assert [patch.get_xy() for patch in ax.patches if not patch.get_fill()] == [(0, 0), (1, 1)]


def test_every_row_of_a_map_stands_beside_its_own_name():
    table = pd.DataFrame(
        [(e, f, on, value) for e, f, value in (("sad", 9, 0.3), ("happy", 7, 0.1), ("sad", 2, 0.2)) for on in "ab"],
        columns=["emotion", "feature", "read_on", "relative"],
    ).sample(frac=1, random_state=3)
    ax = feature_plots.activation_map(table, "read_on", "activation").axes[0]
    values = ax.collections[0].get_array().reshape(3, 2)[:, 0].tolist()
    drawn = dict(zip([label.get_text() for label in ax.get_yticklabels()], values))
    assert drawn == {"sad  9": 0.3, "happy  7": 0.1, "sad  2": 0.2}


def test_lines_mark_the_depths_of_a_map():
    ax = feature_plots.cosine_map(*SMALLEST["cosine_map"]).axes[0]
    assert [list(line.get_ydata()) for line in ax.lines if line.get_ydata()[0] == line.get_ydata()[1]] == [[2, 2]]


def test_families_of_three_have_a_colour_and_chosen_features_are_filled():
    ax = feature_plots.flow(NODES, EDGES).axes[0]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    by_name = {text.get_text(): dot for text, dot in zip(ax.texts, dots)}
    assert by_name["3"].get_color() == by_name["5"].get_color() != by_name["7"].get_color() == "0.6"
    assert by_name["5"].get_markerfacecolor() == "white" != by_name["3"].get_markerfacecolor()
    assert len({tuple(dot.get_xydata()[0]) for dot in dots}) == len(NODES)  # none on top of another


def test_passages_are_shaded_around_the_strongest_token_and_not_read_as_html(model):
    texts = ["The dog <b>ran</b> home.", "Nothing to see here at all."]
    first = [0, *(tokens(model, texts).length - 1).cumsum(0).tolist()]
    acts = torch.zeros(first[-1], 1)
    acts[1], acts[2] = 2.0, 1.0
    on = OnPassages(texts, [7], torch.zeros(9), acts, first)
    html = feature_plots.passages(model, on, 7).data
    assert "<b>" not in html and "&lt;" in html
    marked = re.findall(r"rgba\(230,159,0,([\d.]+)\);font-weight:(\w+)", html)
    assert marked[1] == ("1.00", "bold") and marked[2] == ("0.50", "normal")
    assert html.count("<tr>") == 1  # the passage in which it never fires is left out
    nowhere = OnPassages(texts, [7], torch.zeros(9), torch.zeros_like(acts), first)
    assert "fires nowhere" in feature_plots.passages(model, nowhere, 7).data
