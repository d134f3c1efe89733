"""One function per figure: a tidy table in, a Figure out. `save` alone writes to disk.

Fear is vermilion and calm is blue in every figure; controls are grey and told apart by line style or marker.
"""

from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
from IPython.display import Image, display
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from helpers.config import CFG, FIGURES
from helpers.files import replacing
from helpers.stats import from_cohens_d

FEAR, CALM, GREY = "#D55E00", "#0072B2", "0.45"
EMOTIONS = {
    "happy": "#E69F00", "sad": "#56B4E9", "excited": "#CC79A7", "afraid": FEAR, "angry": "#8B0000", "calm": CALM,
    "proud": "#7B5BA6", "disgusted": "#5A8F29", "surprised": "#D4B106", "lonely": "#6C757D", "hopeful": "#009E73",
    "guilty": "#4B3621",
}  # fmt: skip
SIDES = {"emotional": FEAR, "neutral": CALM}
LINES = ["-", "--", ":", "-.", (0, (5, 1)), (0, (1, 3)), (0, (3, 1, 1, 1))]
MARKERS = "os^DvPX*"
WIDEST = 900  # pixels of a figure in a notebook


def style() -> None:
    """The look of every figure: readable at the width of a README."""
    sns.set_theme(
        context="notebook",
        style="ticks",
        rc={
            "figure.figsize": (8, 4),
            "figure.dpi": 100,
            "savefig.dpi": 150,
            "savefig.bbox": "tight",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "axes.titlesize": 12,
            "axes.titlelocation": "left",
        },
    )


def save(figure: Figure, table: pd.DataFrame, name: str, model: str, made_by: str | None = None) -> Figure:
    """Show the figure, marked with the model's name, and write figures/<model>/<name>.png and its numbers as .csv.

    `made_by` is what the mark says, and the column `model` of a table that has none, where that is not the model of
    the folder.
    """
    stem = FIGURES / model / name
    written(figure, table, stem, made_by or model)
    _display(figure, _small(figure, stem.with_suffix(".png")))  # not drawn anew
    return figure


def written(figure: Figure, table: pd.DataFrame, stem: Path, model: str) -> None:
    """Mark the figure with the model's name and write it to `stem`.png and its numbers to `stem`.csv."""
    mark = ", ".join(filter(None, (f"model: {model}", CFG.label)))
    figure.text(1, 0, mark, ha="right", va="top", fontsize=8, color="0.4", in_layout=True)
    with replacing(stem.with_suffix(".png")) as file, replacing(stem.with_suffix(".csv")) as numbers:
        figure.savefig(file)
        named = table if "model" in table else table.assign(model=model)  # rows of several models say whose they are
        named.to_csv(numbers, index=False, float_format="%.5g")


def shown(figure: Figure) -> None:
    """The figure, displayed once, as `picture` makes it."""
    _display(figure, picture(figure))


def picture(figure: Figure) -> bytes:
    """The figure as a PNG of 256 colours that is no wider than a notebook shows it.

    Executed notebooks are committed, and this takes less than half of a full picture's bytes.
    """
    full = BytesIO()
    figure.savefig(full, format="png", facecolor="white")
    return _small(figure, full)


def _small(figure: Figure, full: Path | BytesIO) -> bytes:
    """The figure's saved PNG at the size that it has on a screen, in 256 colours."""
    drawn_at = plt.rcParams["savefig.dpi"]
    drawn_at = figure.dpi if drawn_at == "figure" else drawn_at
    with PIL.Image.open(full) as image:
        width = min(WIDEST, round(image.width * figure.dpi / drawn_at))
        image = image.convert("RGB").resize((width, round(image.height * width / image.width)), PIL.Image.LANCZOS)
    small = BytesIO()
    image.quantize(256).save(small, "png", optimize=True)
    return small.getvalue()


def _display(figure: Figure, png: bytes) -> None:
    display(Image(png))
    plt.close(figure)


def saturation(measured: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Gap over total SD against Cohen's d: the curve that any two equal groups follow, with its ceiling at 2.

    Both tables have the columns depth, cohens_d, gap_over_total_sd.
    """
    figure, ax = plt.subplots(figsize=(7, 4.2))
    largest = max(6.0, measured["cohens_d"].max(), published["cohens_d"].max())
    curve = np.linspace(min(0, measured["cohens_d"].min()), largest, 200)
    ax.plot(curve, [from_cohens_d(d) for d in curve], color=GREY, label=r"$d / \sqrt{1 + d^2/4}$")
    ax.plot(curve, curve, color=GREY, lw=1, ls=":", label="if it were Cohen's d")
    ax.axhline(2, color="black", lw=1, ls="--")
    ax.text(largest, 2.03, "ceiling for two equal groups", ha="right", fontsize=9)
    ax.scatter(
        published["cohens_d"], published["gap_over_total_sd"], marker="s", s=50, facecolor="white", edgecolor="black",
        label="GPT-2 small as published, layers 0-11", zorder=3,
    )  # fmt: skip
    ax.scatter(
        measured["cohens_d"], measured["gap_over_total_sd"], color=FEAR, s=45, zorder=4,
        label="measured here, one point per depth",
    )  # fmt: skip
    ax.set(
        xlabel="Cohen's d (gap / pooled within-group SD)", ylabel="gap / SD of all points", ylim=(None, 2.3),
        title="The published statistic flattens out where the real one keeps growing",
    )  # fmt: skip
    ax.legend(loc="lower right", fontsize=9)
    return figure


def projections_by_depth(table: pd.DataFrame) -> Figure:
    """Held-out projections as strips, with mean and 95 % interval of the mean: columns set, depth, side, projection."""
    sets = list(table["set"].unique())
    figure, axes = plt.subplots(len(sets), 1, figsize=(9, 3.2 * len(sets)), sharex=True, squeeze=False)
    for ax, name in zip(axes[:, 0], sets):
        part = table[table["set"] == name]
        shared = {"data": part, "x": "depth", "y": "projection", "hue": "side", "palette": SIDES, "ax": ax}
        np.random.seed(0)  # noqa: NPY002, seaborn draws its jitter from the global generator
        sns.stripplot(**shared, dodge=True, size=3, alpha=0.45, legend=name == sets[0])
        sns.pointplot(
            **shared, dodge=0.4, errorbar=("ci", 95), seed=0, linestyle="none", marker="_", markersize=14,
            err_kws={"linewidth": 2}, legend=False,
        )  # fmt: skip
        ax.axhline(0, color="black", lw=0.8, ls="--")
        ax.set(title=name, ylabel="projection\n(residual-stream units)")
    sns.move_legend(axes[0, 0], "upper left", title=None, ncols=2)
    return figure


def by_depth(table: pd.DataFrame, ylabel: str, chance: float, title: str) -> Figure:
    """One line per condition over depth; bands are intervals, for random directions quantiles.

    Columns condition, depth, value, low, high. The first condition is drawn in colour, the others in greys.
    """
    figure, ax = plt.subplots(figsize=(9, 4.4))
    for number, (condition, part) in enumerate(table.groupby("condition", sort=False)):
        colour = FEAR if number == 0 else str(0.1 + 0.5 * (number - 1) / table["condition"].nunique())
        ax.plot(
            part["depth"], part["value"], color=colour, ls=LINES[number % len(LINES)], marker=MARKERS[number % 8], ms=5,
            lw=2.5 if number == 0 else 1.5, label=condition, zorder=5 if number == 0 else 3,
        )  # fmt: skip
        if number == 0 or condition.startswith("random"):
            ax.fill_between(part["depth"], part["low"], part["high"], color=colour, alpha=0.2, lw=0)
    ax.axhline(chance, color="black", lw=0.8, ls="--")
    ax.text(1.01, chance, "chance", transform=ax.get_yaxis_transform(), va="center", fontsize=9)
    ax.set(xlabel="depth (0 = embeddings, then after each block)", ylabel=ylabel, title=title)
    ax.set_xticks(sorted(table["depth"].unique()))
    ax.legend(loc="upper left", bbox_to_anchor=(1.08, 1), fontsize=9)
    return figure


def depth_by_position(table: pd.DataFrame, statistic: str, chosen: tuple[int, str]) -> Figure:
    """Heatmap of one statistic over position and depth; the chosen cell is framed. Columns position, depth, value."""
    grid = table.pivot(index="position", columns="depth", values="value").loc[table["position"].unique()]
    figure, ax = plt.subplots(figsize=(9, 2.6))
    sns.heatmap(
        grid, annot=True, fmt=".2f", cmap="cividis", ax=ax, annot_kws={"size": 9}, cbar_kws={"label": statistic}
    )
    column, row = list(grid.columns).index(chosen[0]), list(grid.index).index(chosen[1])
    ax.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, ec=FEAR, lw=3, clip_on=False))
    ax.set(ylabel="", title=f"{statistic} on the validation pairs; framed: the choice")
    ax.tick_params(axis="y", rotation=0)
    return figure


def forest(table: pd.DataFrame, chance: float, title: str) -> Figure:
    """One row per condition with its interval, one panel per statistic.

    Columns condition, kind ("result", "control" or "decisive"), statistic, value, low, high.
    """
    conditions, statistics = list(table["condition"].unique()), list(table["statistic"].unique())
    size = (5 + 3.2 * len(statistics), 0.36 * len(conditions) + 1.2)
    figure, axes = plt.subplots(1, len(statistics), figsize=size, sharey=True, squeeze=False)
    look = {"result": (FEAR, "o"), "control": (GREY, "s"), "decisive": ("black", "D")}
    for ax, statistic in zip(axes[0], statistics):
        for part in table[table["statistic"] == statistic].itertuples():
            row, (colour, marker) = conditions.index(part.condition), look[part.kind]
            ax.plot([part.low, part.high], [row, row], color=colour, lw=2)
            ax.plot(part.value, row, marker, color=colour, ms=7)
            text = f"{part.value:.2f} [{part.low:.2f}, {part.high:.2f}]"
            ax.text(1.02, row, text, transform=ax.get_yaxis_transform(), va="center", fontsize=9)
        ax.axvline(chance, color="black", lw=0.8, ls="--")
        ax.set(xlabel=statistic)
    axes[0, 0].set_yticks(range(len(conditions)), conditions)
    axes[0, 0].invert_yaxis()
    axes[0, 0].set_title(title)
    figure.tight_layout(w_pad=7)
    return figure


def paired_differences(table: pd.DataFrame) -> Figure:
    """Within-pair differences, one strip per set, in units of each set's own SD; columns set, difference."""
    figure, ax = plt.subplots(figsize=(8, 0.8 * table["set"].nunique() + 1))
    np.random.seed(0)  # noqa: NPY002, seaborn draws its jitter from the global generator
    sns.stripplot(table, x="difference", y="set", color=GREY, size=5, alpha=0.6, ax=ax)
    sns.pointplot(
        table, x="difference", y="set", errorbar=("ci", 95), seed=0, linestyle="none", color=FEAR, marker="D", ax=ax
    )
    ax.axvline(0, color="black", lw=0.8, ls="--")
    ax.set(xlabel="emotional minus neutral, in SD of the set's differences", ylabel="")
    return figure


def logit_lens(table: pd.DataFrame, by: str = "depth") -> Figure:
    """The tokens that a direction raises and lowers most, one column per depth (or other column `by`).

    The table is that of `directions.logit_lens`.
    """
    depths = list(table[by].unique())
    figure, axes = plt.subplots(2, len(depths), figsize=(2.3 * len(depths), 5), squeeze=False)
    for column, depth in enumerate(depths):
        for ax, (side, colour) in zip(axes[:, column], (("raised", FEAR), ("lowered", CALM))):
            part = table[(table[by] == depth) & (table["side"] == side)]
            ax.barh(part["rank"], part["logit"].abs(), color=colour, alpha=0.45)
            for row in part.itertuples():
                ax.text(0, row.rank, f" {visible(row.token)}", va="center", fontsize=9)
            ax.invert_yaxis()
            ax.set(yticks=[], xlabel="|logit|" if side == "lowered" else "")
            if side == "raised":
                ax.set_title(f"{by} {depth}")
        axes[0, 0].set_ylabel("raised most")
        axes[1, 0].set_ylabel("lowered most")
    figure.tight_layout()
    return figure


def token_strips(table: pd.DataFrame, title: str) -> Figure:
    """Sentences coloured token by token by their projection; columns sentence, token, projection.

    With a column `side`, a bar at the left shows each sentence's side. Colours are centred on the median of all
    tokens shown; position 0 is left out by the caller.
    """
    sentences = list(table["sentence"].unique())
    widths = table["token"].map(visible).str.len() + 0.6  # in characters
    longest = widths.groupby(table["sentence"]).sum().max()
    figure, ax = plt.subplots(figsize=(max(6, 0.085 * longest + 1), 0.42 * len(sentences) + 0.9))
    centre = table["projection"].median()
    reach = (table["projection"] - centre).abs().quantile(0.98) + 1e-9
    norm = TwoSlopeNorm(centre, centre - reach, centre + reach)
    colours = plt.get_cmap("PuOr_r")
    for row, sentence in enumerate(sentences):
        x, here = 0.0, table[table["sentence"] == sentence]
        if "side" in here:
            ax.add_patch(plt.Rectangle((-1.6, row - 0.42), 0.9, 0.84, color=SIDES[here["side"].iloc[0]]))
        for part in here.itertuples():
            word = visible(part.token)
            width = len(word) + 0.6
            fill = colours(norm(part.projection))
            ax.add_patch(plt.Rectangle((x, row - 0.42), width, 0.84, color=fill))
            dark = 0.3 * fill[0] + 0.59 * fill[1] + 0.11 * fill[2] < 0.45
            ax.text(x + width / 2, row, word, ha="center", va="center", fontsize=8, family="monospace",
                    color="white" if dark else "black")  # fmt: skip
            x += width
    ax.set(xlim=(-2, longest), ylim=(len(sentences) - 0.4, -0.6), yticks=[], xticks=[], title=title)
    sns.despine(ax=ax, left=True, bottom=True)
    bar = figure.colorbar(plt.cm.ScalarMappable(norm, colours), ax=ax, fraction=0.03, pad=0.01)
    bar.set_label("projection")
    return figure


def dose_response(table: pd.DataFrame, ylabel: str, xlabel: str, title: str, baseline: float | None = 0) -> Figure:
    """A read-out over strength: fear with its interval over prompts, random directions as quantile bands.

    Columns method, strength, value, low, high; one panel per `measure` if there is such a column. The value at
    strength 0 stands under the direction "none" and belongs to every line.
    """
    table = table if "measure" in table else table.assign(measure=ylabel)
    measures = list(table["measure"].unique())
    figure, axes = plt.subplots(1, len(measures), figsize=(max(8, 4.2 * len(measures)), 4), squeeze=False)
    for ax, measure in zip(axes[0], measures):
        here = table[table["measure"] == measure]
        zero = here[here["method"] == "none"]
        steered = here[here["method"] != "none"]
        for number, (method, part) in enumerate(steered.groupby("method", sort=False)):
            part = pd.concat([part, zero]).sort_values("strength")
            colour = FEAR if number == 0 else str(0.35 + 0.4 * (number - 1) / steered["method"].nunique())
            ax.fill_between(part["strength"], part["low"], part["high"], color=colour, alpha=0.2, lw=0)
            look = {"color": colour, "ls": LINES[number % len(LINES)], "marker": MARKERS[number % 8]}
            ax.plot(part["strength"], part["value"], **look, label=method)
        if baseline is not None:
            ax.axhline(baseline, color="black", lw=0.8, ls="--")
        ax.axvline(0, color="black", lw=0.5, ls=":")
        ax.set(xlabel=xlabel, ylabel=measure)
        if measure == "perplexity":
            ax.set_yscale("log")
    axes[0, 0].set_title(title)
    axes[0, -1].legend(fontsize=9)
    figure.tight_layout()
    return figure


def word_counts(table: pd.DataFrame) -> Figure:
    """Words of each kind in one completion by magnitude, one panel per vector.

    Columns vector, strength, kind, words per 100.
    """
    vectors = list(table["vector"].unique())
    figure, axes = plt.subplots(1, len(vectors), figsize=(4.8 * len(vectors), 3.6), sharey=True, squeeze=False)
    for ax, vector in zip(axes[0], vectors):
        sns.lineplot(
            table[table["vector"] == vector], x="strength", y="words per 100", hue="kind", style="kind", markers=True,
            palette=["black", "0.4", "0.65"], ax=ax, legend=vector == vectors[0],
        )  # fmt: skip
        ax.set(xlabel=f"magnitude, multiples of the {vector}", title="one greedy completion per magnitude")
    figure.tight_layout()
    return figure


def agreement(table: pd.DataFrame, labels: dict[str, str]) -> Figure:
    """The scene's effect on the log-odds as asked against the same after a change; columns asked and every label."""
    figure, axes = plt.subplots(1, len(labels), figsize=(4.2 * len(labels), 4), sharex=True, sharey=True, squeeze=False)
    reach = [table[["asked", *labels]].min().min() - 0.3, table[["asked", *labels]].max().max() + 0.3]
    for ax, (column, label) in zip(axes[0], labels.items()):
        ax.plot(reach, reach, color="black", lw=0.8, ls="--")
        ax.scatter(table["asked"], table[column], color=FEAR, s=30)
        ax.set(xlabel="effect of the scene on the log-odds (nats)", ylabel=label, xlim=reach, ylim=reach)
    figure.tight_layout()
    return figure


def readable(table: pd.DataFrame, precision: int = 2) -> Styler:
    """The table without index, numbers rounded, texts whole and to the left; the same HTML in every run."""
    texts = [column for column in table if not pd.api.types.is_numeric_dtype(table[column])]
    styled = table.reset_index(drop=True).style.hide(axis="index").set_uuid("-".join(map(str, table)).replace(" ", "_"))
    styled = styled.format(precision=precision, na_rep="", escape="html")
    return styled.set_properties(subset=texts, **{"text-align": "left"})


def continuations(table: pd.DataFrame, width: int = 110) -> Styler:
    """A table of continuations to read, one row per strength; `distinct` below a half is marked as a loop."""
    shown = table[["strength", "distinct", "perplexity", "text"]].copy()
    shown["text"] = [visible(text)[:width] for text in shown["text"]]
    shown["loop"] = np.where(shown["distinct"] < 0.5, "loop", "")
    return readable(shown).format({"strength": "{:+g}", "perplexity": "{:,.0f}"}, precision=2, escape="html")


def visible(token: str) -> str:
    """A token as it can be drawn: spaces at its ends dropped, line breaks and dollar signs made visible."""
    return token.replace("\n", "⏎").replace("$", r"\$").strip() or "␣"
