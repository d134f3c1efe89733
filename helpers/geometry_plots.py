"""The figures about many emotions: depth curves, settings, matrices, components, maps. `plots.save` writes them.

Results are vermilion, nulls grey; on maps the colour is human valence.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from adjustText import adjust_text
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from torch import Tensor

from helpers.geometry import neighbours, placed
from helpers.plots import CALM, FEAR, GREY, LINES, MARKERS, readable, shown

VALENCE = "PuOr_r"  # orange is pleasant


def depth_panels(table: pd.DataFrame, ylabel: str) -> Figure:
    """One panel per `panel`, one line per condition over depth, bands where low and high are given.

    Columns panel, condition, depth, value, low, high; the first condition is in colour. A horizontal line marks 0.
    """
    panels, conditions = list(table["panel"].unique()), list(table["condition"].unique())
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 4.2), squeeze=False)
    for ax, panel in zip(axes[0], panels):
        for condition, part in table[table["panel"] == panel].groupby("condition", sort=False):
            number = conditions.index(condition)
            colour = FEAR if number == 0 else str(0.1 + 0.55 * (number - 1) / len(conditions))
            ax.plot(
                part["depth"], part["value"], color=colour, ls=LINES[number % len(LINES)], marker=MARKERS[number % 8],
                ms=5, lw=2.5 if number == 0 else 1.5, label=condition, zorder=5 if number == 0 else 3,
            )  # fmt: skip
            ax.fill_between(part["depth"], part["low"], part["high"], color=colour, alpha=0.2, lw=0)
        ax.axhline(0, color="black", lw=0.8, ls=":")
        ax.set(xlabel="depth", title=panel)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel(ylabel)
    lines = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels())}
    figure.tight_layout()
    figure.legend(
        [lines[name] for name in conditions], conditions, loc="upper center", bbox_to_anchor=(0.5, 0),
        ncols=min(4, len(conditions)), fontsize=9,
    )  # fmt: skip
    return figure


def parabolas(table: pd.DataFrame, fits: pd.DataFrame) -> Figure:
    """Curves over relative depth with the parabola fitted to each, and where the best point lies with its interval.

    The tables are those of `curves.parabolas`. The first condition is in colour; the others, its nulls, in grey.
    """
    measures, conditions = list(table["measure"].unique()), list(table["condition"].unique())
    figure, axes = plt.subplots(1, len(measures), figsize=(4.6 * len(measures), 4), squeeze=False)
    x = np.linspace(0, 1, 100)
    for ax, measure in zip(axes[0], measures):
        for number, condition in enumerate(conditions):
            colour = FEAR if number == 0 else str(0.2 + 0.4 * (number - 1) / len(conditions))
            part = table[(table["measure"] == measure) & (table["condition"] == condition)]
            marker, line = MARKERS[number % len(MARKERS)], LINES[number % len(LINES)]
            ax.plot(part["relative depth"], part["value"], marker, color=colour, ms=6, label=condition)
            for fit in fits[(fits["measure"] == measure) & (fits["condition"] == condition)].itertuples():
                ax.plot(x, fit.square * x**2 + fit.linear * x + fit.constant, color=colour, ls=line, lw=1.5)
                if number == 0:
                    ax.axvspan(fit.best_low, fit.best_high, color=FEAR, alpha=0.12, lw=0)
                    ax.axvline(fit.best, color=FEAR, lw=1, ls=":")
        ax.axvspan(0.35, 0.65, ymax=0.03, color="black", alpha=0.5, lw=0)
        ax.set(xlabel="relative depth (black bar: 0.35 to 0.65)", ylabel=measure)
    axes[0, 0].legend(fontsize=9)
    figure.tight_layout()
    return figure


def settings(table: pd.DataFrame, null: tuple[float, float]) -> Figure:
    """Both ways of extraction under every setting, and the gap between them, with intervals.

    Columns setting, statistic ("comprehension", "generation" or "gap"), value, low, high. `null` is the range of the
    AUROC with shuffled labels, shaded.
    """
    names = list(table["setting"].unique())
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.38 * len(names) + 1.3), sharey=True)
    looks = {
        "comprehension": (left, CALM, "s", -0.14),
        "generation": (left, FEAR, "o", 0.14),
        "gap": (right, "black", "D", 0),
    }
    for part in table.itertuples():
        ax, colour, marker, shift = looks[part.statistic]
        row = names.index(part.setting) + shift
        ax.plot([part.low, part.high], [row, row], color=colour, lw=2)
        ax.plot(part.value, row, marker, color=colour, ms=6, label=part.statistic if part.setting == names[0] else None)
    left.axvspan(*null, color="0.85", lw=0, zorder=0, label="shuffled labels (95 %)")
    left.axvline(0.5, color="black", lw=0.8, ls="--")
    right.axvline(0, color="black", lw=0.8, ls="--")
    left.set(xlabel="held-out AUROC, one against the rest", yticks=range(len(names)), yticklabels=names)
    right.set(xlabel="gap: generation minus comprehension")
    left.invert_yaxis()
    left.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    figure.tight_layout()
    return figure


def matrices(
    table: pd.DataFrame, row: str, column: str, value: str, numbers: bool = False, cmap: str = "RdBu_r"
) -> Figure:
    """Squares on one colour scale, one per `panel`, up to three in a line; each has its own order of rows and columns.

    A diverging colour map is centred on 0, the diagonal left out of its range; `numbers` are written into the cells
    of squares of up to 14.
    """
    panels = list(table["panel"].unique())
    across, side = min(3, len(panels)), table[row].nunique()
    down = -(-len(panels) // across)
    size = (0.42 if numbers else 0.22) * side + 1
    figure, axes = plt.subplots(
        down, across, figsize=(size * across + 1.2, (size - 0.2) * down), squeeze=False, layout="constrained"
    )
    reach = table.loc[table[row].astype(str) != table[column].astype(str), value].abs().max()
    limits = {"vmin": -reach, "vmax": reach} if cmap == "RdBu_r" else {"vmin": 0, "vmax": table[value].max()}
    for ax, panel in zip(axes.flat, panels):
        part = table[table["panel"] == panel]
        grid = part.pivot(index=row, columns=column, values=value).loc[part[row].unique(), part[column].unique()]
        sns.heatmap(
            grid, ax=ax, cmap=cmap, square=True, annot=numbers and side <= 14, fmt=".2f", annot_kws={"size": 7},
            xticklabels=True, yticklabels=True, cbar=False, **limits,
        )  # fmt: skip
        ax.set(title=panel, ylabel=row, xlabel=column)
        ax.tick_params(labelsize=8)
        ax.tick_params(axis="y", rotation=0)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    figure.colorbar(axes.flat[0].collections[0], ax=axes, label=value, shrink=0.7 / down)
    return figure


def components(table: pd.DataFrame) -> Figure:
    """How much each principal component goes with human valence and arousal, against permuted ratings.

    Columns panel, component, share, rating, r (absolute), null (the 95th percentile of permutations).
    """
    panels = list(table["panel"].unique())
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), sharey=True, squeeze=False)
    for ax, panel in zip(axes[0], panels):
        part = table[table["panel"] == panel]
        sns.barplot(
            part,
            x="component",
            y="r",
            hue="rating",
            palette=[FEAR, "0.55"],
            ax=ax,
            legend=panel == panels[0],
            width=0.7,
        )
        shares = part.drop_duplicates("component").sort_values("component")
        null = part.set_index(["rating", "component"])["null"]
        for bars, rating in zip(ax.containers, part["rating"].unique()):
            for bar, component in zip(bars, shares["component"]):
                ends, height = [bar.get_x(), bar.get_x() + bar.get_width()], null[rating, component]
                ax.plot(ends, [height, height], color="black", lw=1.5)
        ax.set_xticks(range(len(shares)), [f"PC{c}\n{s:.0%}" for c, s in zip(shares["component"], shares["share"])])
        ax.set(title=panel, xlabel="component and its share of variance", ylabel="|r| with human rating", ylim=(0, 1))
    sns.move_legend(axes[0, 0], "upper right", title="bars; black: 95 % of permutations", fontsize=9, title_fontsize=9)
    figure.tight_layout()
    return figure


def emotion_map(table: pd.DataFrame) -> Figure:
    """Emotions on two axes, labelled without collisions, one panel per `panel`; colour is human valence.

    Columns panel, emotion, x, y, valence (not a number for one that has no rating: drawn as a star), xlabel, ylabel.
    """
    panels = list(table["panel"].unique())
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 5.4), squeeze=False)
    drawn = {}
    for ax, panel in zip(axes[0], panels):
        drawn[panel] = _map(ax, table[table["panel"] == panel])
        ax.set_title(panel, parse_math=False)
    figure.tight_layout()
    for ax, panel in zip(axes[0], panels):
        _labels(ax, table[table["panel"] == panel], drawn[panel])
    return figure


def landed(
    vectors: Float[Tensor, "emotion d_model"], human: pd.DataFrame, name: str, own: Float[Tensor, "d_model"]
) -> Styler:
    """A map of the emotions with a vector of one's own as a star, shown; and its five nearest emotions by cosine."""
    shown(emotion_map(placed(vectors, human, {name: own}).assign(panel=name)))
    return readable(neighbours(vectors, own, human["emotion"].tolist()).head(5))


def read_write(table: pd.DataFrame, xlabel: str, ylabel: str) -> Figure:
    """What each vector reads against what it writes; random directions in grey. Columns kind, vector, reads, writes."""
    figure, ax = plt.subplots(figsize=(7.5, 5.2))
    emotions, random = (table[table["kind"] == kind] for kind in ("emotion", "random"))
    ax.scatter(random["reads"], random["writes"], color="0.7", s=22, label="random, covariance-matched")
    points = ax.scatter(emotions["reads"], emotions["writes"], color=FEAR, s=34, label="emotions", zorder=3)
    ax.axhline(0, color="black", lw=0.8, ls=":")
    ax.axvline(0, color="black", lw=0.8, ls=":")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(fontsize=9, loc="lower right")
    figure.tight_layout()
    _labels(ax, emotions.rename(columns={"vector": "emotion", "reads": "x", "writes": "y"}), points)
    return figure


def _map(ax: Axes, part: pd.DataFrame) -> PathCollection:
    rated, own = part[part["valence"].notna()], part[part["valence"].isna()]
    points = ax.scatter(rated["x"], rated["y"], c=rated["valence"], cmap=VALENCE, vmin=1, vmax=9, s=55, edgecolor="0.3")
    ax.scatter(own["x"], own["y"], marker="*", s=260, color="white", edgecolor="black", zorder=4)
    ax.axhline(0, color="black", lw=0.8, ls=":")
    ax.axvline(0, color="black", lw=0.8, ls=":")
    ax.set(xlabel=part["xlabel"].iloc[0], ylabel=part["ylabel"].iloc[0])
    plt.colorbar(points, ax=ax, label="human valence (1 to 9)", shrink=0.7)
    return points


def _labels(ax: Axes, part: pd.DataFrame, points: PathCollection) -> None:
    """Names beside the points, moved apart by a number of steps, not of seconds: the same picture on every machine."""
    texts = [ax.text(row.x, row.y, row.emotion, fontsize=9, parse_math=False) for row in part.itertuples()]
    drawn = {"objects": points} if len(points.get_offsets()) else {}
    adjust_text(
        texts, x=part["x"].to_numpy(), y=part["y"].to_numpy(), ax=ax, iter_lim=300, **drawn,
        arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.6},
    )  # fmt: skip
