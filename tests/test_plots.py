"""Figures: each from the smallest table that it can be drawn from, and how `save` leaves a folder."""

import inspect
import re
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from IPython.display import Image
from matplotlib.figure import Figure

from helpers import plots

PNG = b"\x89PNG\r\n\x1a\n"
ENDS = {"value": 0.6, "low": 0.5, "high": 0.7}
DEPTHS = pd.DataFrame({"depth": [0, 1], "cohens_d": [1.0, 8.0], "gap_over_total_sd": [0.9, 1.9]})
BY_STRENGTH = pd.DataFrame(
    [("none", 0.0), ("fear", -1.0), ("fear", 1.0), ("random, isotropic", 1.0), ("random, covariance-matched", -1.0)],
    columns=["method", "strength"],
).assign(**ENDS)
SMALLEST = {
    "saturation": (DEPTHS, DEPTHS),
    "projections_by_depth": (
        pd.DataFrame(
            [(s, d, side, d + len(side)) for s in "ab" for d in (0, 1) for side in ("emotional", "neutral")],
            columns=["set", "depth", "side", "projection"],
        ),
    ),
    "by_depth": (
        pd.DataFrame(
            [(condition, depth) for condition in ("fear direction", "random, isotropic", "twin") for depth in (0, 1)],
            columns=["condition", "depth"],
        ).assign(**ENDS),
        "AUROC",
        0.5,
        "title",
    ),
    "depth_by_position": (
        pd.DataFrame(
            [(p, d, d / 2) for p in ("mean", "last token") for d in (0, 1)], columns=["position", "depth", "value"]
        ),
        "Cohen's d",
        (1, "last token"),
    ),
    "forest": (
        pd.DataFrame(
            [(c, k, s) for c, k in (("fear", "result"), ("twin", "control"), ("pairs", "decisive")) for s in "xy"],
            columns=["condition", "kind", "statistic"],
        ).assign(**ENDS),
        0.5,
        "title",
    ),
    "paired_differences": (pd.DataFrame({"set": list("aabb"), "difference": [1.0, 2.0, -1.0, 0.5]}),),
    "logit_lens": (
        pd.DataFrame(
            [(depth, side, 1, " $5\n", 0.3) for depth in (0, 2) for side in ("raised", "lowered")],
            columns=["depth", "side", "rank", "token", "logit"],
        ),
    ),
    "token_strips": (
        pd.DataFrame({"sentence": "He $fell", "token": [" He", " $", "fell"], "projection": [0.1, -1.0, 2.0]}),
        "title",
    ),
    "dose_response": (BY_STRENGTH, "nats", "strength", "title"),
    "word_counts": (
        pd.DataFrame(
            [(v, s, k, 5.0) for v in ("unit", "raw") for s in (-5, 5) for k in ("hedging", "negation", "other")],
            columns=["vector", "strength", "kind", "words per 100"],
        ),
    ),
    "agreement": (pd.DataFrame({"asked": [0.0, 1.0], "swapped": [1.0, 0.5]}), {"swapped": "in the other order"}),
}  # fmt: skip
TABLE = pd.DataFrame({"depth": [0, 1], "value": [0.123456789, 1e-9]})


pytestmark = pytest.mark.usefixtures("nothing_left_open")


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that `save` writes to."""
    monkeypatch.setattr(plots, "FIGURES", tmp_path / "figures")
    return tmp_path / "figures"


def test_every_figure_is_drawn_below():
    functions = [f for _, f in inspect.getmembers(plots, inspect.isfunction) if f.__module__ == plots.__name__]
    assert {f.__name__ for f in functions if f.__annotations__["return"] is Figure} - {"save"} == set(SMALLEST)


@pytest.mark.parametrize("name", SMALLEST)
def test_a_figure_is_drawn_from_its_smallest_table_and_leaves_the_table_alone(name: str):
    arguments = SMALLEST[name]
    before = [argument.copy() for argument in arguments if isinstance(argument, pd.DataFrame)]
    figure = getattr(plots, name)(*arguments)
    figure.canvas.draw()
    assert isinstance(figure, Figure)
    assert any(ax.has_data() or ax.patches for ax in figure.axes)
    for table, was in zip([a for a in arguments if isinstance(a, pd.DataFrame)], before):
        pd.testing.assert_frame_equal(table, was)


@pytest.mark.parametrize("name", ["saturation", "by_depth", "forest", "dose_response", "agreement", "word_counts"])
def test_axes_are_named_and_a_line_of_reference_is_drawn(name: str):
    figure = getattr(plots, name)(*SMALLEST[name])
    assert all(ax.get_xlabel() for ax in figure.axes)
    assert any(ax.get_ylabel() for ax in figure.axes) or name == "forest"
    looks = [(line.get_linestyle(), line.get_color()) for ax in figure.axes for line in ax.lines]
    assert ("--", "black") in looks or name == "word_counts"


def test_the_value_at_strength_0_belongs_to_every_line():
    figure = plots.dose_response(BY_STRENGTH, "nats", "strength", "title")
    lines = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert lines["fear"] == [-1, 0, 1]
    assert lines["random, isotropic"] == [0, 1]
    assert lines["random, covariance-matched"] == [-1, 0]
    assert "none" not in lines


def test_each_measure_has_its_panel_and_perplexity_a_logarithmic_one():
    table = pd.concat([BY_STRENGTH.assign(measure=measure) for measure in ("distinct", "perplexity")])
    axes = plots.dose_response(table, "", "strength", "title", baseline=None).axes
    assert [(ax.get_ylabel(), ax.get_yscale()) for ax in axes] == [("distinct", "linear"), ("perplexity", "log")]


def test_conditions_can_be_told_apart_without_colour():
    conditions = [f"control {number}" for number in range(7)]
    table = pd.DataFrame([(c, d) for c in conditions for d in (0, 1)], columns=["condition", "depth"]).assign(**ENDS)
    lines = plots.by_depth(table, "AUROC", 0.5, "title").axes[0].lines[:7]
    assert len({(str(line._unscaled_dash_pattern), line.get_marker()) for line in lines}) == 7


def test_the_frame_marks_the_chosen_cell():
    figure = plots.depth_by_position(*SMALLEST["depth_by_position"])
    (frame,) = (patch for patch in figure.axes[0].patches if not patch.get_fill())
    assert frame.get_xy() == (1, 1)  # depth 1 is the second column, the last token the second row


def test_fear_is_one_colour_everywhere():
    dose = plots.dose_response(BY_STRENGTH, "nats", "strength", "title").axes[0]
    depth = plots.by_depth(*SMALLEST["by_depth"]).axes[0]
    assert next(line for line in dose.lines if line.get_label() == "fear").get_color() == plots.FEAR
    assert next(line for line in depth.lines if line.get_label() == "fear direction").get_color() == plots.FEAR


def test_save_writes_picture_and_numbers_together(figures: Path):
    figure, ax = plt.subplots()
    ax.plot([0, 1])
    assert plots.save(figure, TABLE, "01_d", "some model") is figure
    folder = figures / "some model"
    assert sorted(path.name for path in folder.iterdir()) == ["01_d.csv", "01_d.png"]
    assert (folder / "01_d.png").read_bytes().startswith(PNG)
    written = pd.read_csv(folder / "01_d.csv")
    assert list(written) == ["depth", "value", "model"]
    assert set(written["model"]) == {"some model"}
    np.testing.assert_allclose(written["value"], TABLE["value"], rtol=1e-4)
    assert "model: some model" in [text.get_text() for text in figure.texts]
    assert "model" not in TABLE


def test_a_saved_figure_is_shown_once_and_closed(figures: Path, monkeypatch: pytest.MonkeyPatch):
    shown = []
    monkeypatch.setattr(plots, "display", shown.append)
    figure = plt.figure()
    plots.save(figure, TABLE, "01_d", "bookworm")
    assert [type(picture) for picture in shown] == [Image]
    assert plt.get_fignums() == []


def test_a_figure_is_written_anywhere_without_being_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plots, "display", lambda shown: pytest.fail("shown"))
    figure = plt.figure()
    plots.written(figure, TABLE, tmp_path / "a" / "b" / "by_turn", "some model")
    folder = tmp_path / "a" / "b"
    assert sorted(path.name for path in folder.iterdir()) == ["by_turn.csv", "by_turn.png"]
    assert (folder / "by_turn.png").read_bytes().startswith(PNG)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "by_turn.csv"), TABLE.assign(model="some model"), rtol=1e-4)
    assert [text.get_text() for text in figure.texts] == ["model: some model"]
    assert [plt.figure(number) for number in plt.get_fignums()] == [figure]


@pytest.mark.parametrize("inches", [3, 30])
def test_a_picture_has_256_colours_on_white_and_the_width_of_a_page(inches: float):
    figure = plt.figure(figsize=(inches, 2), facecolor="none")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.imshow(np.random.default_rng(0).random((40, 40, 3)), aspect="auto")
    ax.set_axis_off()
    found = PIL.Image.open(BytesIO(plots.picture(figure)))
    assert found.format == "PNG" and len(found.convert("RGB").getcolors(10**6)) <= 256
    assert found.width == pytest.approx(min(100 * inches, plots.WIDEST), rel=0.12)  # and the margin
    assert found.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert plt.fignum_exists(figure.number)


@pytest.mark.parametrize("dpi", ["figure", 150, 300])
def test_a_picture_has_its_size_on_a_screen_however_finely_it_was_drawn(dpi: str | int):
    """ "figure" is what matplotlib starts with, before `style`."""
    figure = plt.figure(figsize=(4, 2), dpi=100)
    figure.add_axes((0, 0, 1, 1))
    with plt.rc_context({"savefig.dpi": dpi, "savefig.bbox": "standard"}):
        found = PIL.Image.open(BytesIO(plots.picture(figure)))
    assert found.size == (400, 200)


def test_saving_twice_writes_the_same_bytes(figures: Path):
    written = []
    for _ in range(2):
        plots.save(plots.by_depth(*SMALLEST["by_depth"]), TABLE, "01_d", "bookworm")
        written.append([path.read_bytes() for path in sorted((figures / "bookworm").iterdir())])
    assert written[0] == written[1]


@pytest.mark.parametrize("broken", ["png", "csv"])
def test_what_was_there_stays_whole_when_writing_fails(figures: Path, monkeypatch: pytest.MonkeyPatch, broken: str):
    plots.save(plt.figure(), TABLE, "01_d", "bookworm")
    before = {path.name: path.read_bytes() for path in (figures / "bookworm").iterdir()}

    def half(self, path, **options) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(*{"png": (Figure, "savefig"), "csv": (pd.DataFrame, "to_csv")}[broken], half)
    figure, ax = plt.subplots()
    ax.plot([3, 1])
    with pytest.raises(KeyboardInterrupt):
        plots.save(figure, TABLE.assign(value=7.0), "01_d", "bookworm")
    assert {path.name: path.read_bytes() for path in (figures / "bookworm").iterdir()} == before


def test_a_folder_that_cannot_be_written_is_named(figures: Path):
    figures.write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"cannot write 01_d\.png into .*bookworm"):
        plots.save(plt.figure(), TABLE, "01_d", "bookworm")
    assert figures.read_text() == "a file where the folder should be"


@pytest.mark.parametrize(
    ("token", "drawn"),
    [(" the", "the"), ("\n", "⏎"), ("a\n\nb", "a⏎⏎b"), (" ", "␣"), ("", "␣"), ("$5", r"\$5"), ("é ", "é")],
)
def test_tokens_are_made_visible(token: str, drawn: str):
    assert plots.visible(token) == drawn


def test_loops_are_marked_among_the_continuations():
    table = pd.DataFrame(
        {"strength": [0.0, 0.5], "distinct": [0.9, 0.2], "perplexity": [12.4, 3456.7], "text": [" a\nb", "x" * 200]}
    )
    shown = plots.continuations(table, width=20)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", shown.to_html(), re.DOTALL)
    assert cells == ["+0", "0.90", "12", "a⏎b", "", "+0.5", "0.20", "3,457", "x" * 20, "loop"]


def test_what_a_model_wrote_is_shown_and_not_read_as_html():
    table = pd.DataFrame({"strength": [0.0], "distinct": [0.9], "perplexity": [12.0], "text": ["<b>5 & 6</b>"]})
    assert "&lt;b&gt;5 &amp; 6&lt;/b&gt;" in plots.continuations(table).to_html()
