"""Figures of the steering notebook: a tidy table in, a Figure out."""

from collections.abc import Sequence
from textwrap import wrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from helpers.plots import EMOTIONS, FEAR, GREY, LINES, MARKERS
from helpers.regimes import REGIMES

COLOURS = dict(zip(REGIMES, ("#F2F2F2", "#9BC4E2", "#F0B27A", "#8E5572")))


def phase_map(table: pd.DataFrame, xlabel: str) -> Figure:
    """The commonest regime of every depth and strength, one panel per `panel`, with its share of the texts in per cent.

    Columns panel, depth, strength, commonest and one per regime, as `regimes.shares` gives them.
    """
    panels = list(table["panel"].unique())
    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 4), sharey=True, squeeze=False)
    for ax, panel in zip(axes[0], panels):
        here = table[table["panel"] == panel]
        share = [row[row["commonest"]] for _, row in here.iterrows()]
        grid = here.assign(share=share, code=here["commonest"].map(list(REGIMES).index))
        code, shown = (grid.pivot(index="depth", columns="strength", values=value) for value in ("code", "share"))
        sns.heatmap(
            code.astype(float), annot=100 * shown, fmt=".0f", cmap=ListedColormap(list(COLOURS.values())), vmin=-0.5,
            vmax=len(REGIMES) - 0.5, cbar=False, ax=ax, annot_kws={"size": 8, "color": "black"}, linewidths=0.5,
        )  # fmt: skip
        ax.set(title=panel, xlabel=xlabel, ylabel="depth" if panel == panels[0] else "")
        ax.invert_yaxis()
        ax.tick_params(axis="y", rotation=0)
    handles = [plt.Rectangle((0, 0), 1, 1, fc=COLOURS[regime], ec="0.5") for regime in REGIMES]
    figure.legend(handles, REGIMES, loc="lower center", ncols=len(REGIMES), bbox_to_anchor=(0.5, -0.06), fontsize=9)
    figure.tight_layout()
    return figure


def at_equal_dose(table: pd.DataFrame, xlabel: str) -> Figure:
    """A measure over dose, one panel per `measure`; random directions are bands, methods lines with their intervals.

    Columns measure, method, dose, value, low, high; methods whose names begin with "random" are drawn in grey. Where
    no method reached a dose, a panel without lines says so.
    """
    measures, names = list(table["measure"].unique()), list(table["method"].unique())
    measures = measures or ["no method reached any dose"]
    methods = [name for name in names if not name.startswith("random")]
    figure, axes = plt.subplots(1, len(measures), figsize=(4.8 * len(measures), 4.2), squeeze=False)
    for ax, measure in zip(axes[0], measures):
        for name, part in table[table["measure"] == measure].groupby("method", sort=False):
            if name in methods:
                number = methods.index(name)
                spread = part["dose"] * 1.03 ** (number - len(methods) / 2)  # so that intervals do not hide each other
                colour = plt.get_cmap("plasma")(0.05 + 0.8 * number / max(1, len(methods) - 1))
                ends = [(part["value"] - part["low"]).clip(0), (part["high"] - part["value"]).clip(0)]
                look = {"marker": MARKERS[number % 8], "ls": LINES[number % len(LINES)], "ms": 6, "capsize": 2}
                ax.errorbar(spread, part["value"], ends, color=colour, label=name, **look)
            else:
                shade = str(0.35 + 0.3 * (names.index(name) % 2))
                ax.fill_between(part["dose"], part["low"], part["high"], color=shade, alpha=0.3, lw=0, label=name)
        ax.axhline(0, color="black", lw=0.8, ls="--")
        ax.set(xscale="log", xlabel=xlabel, title=measure)
        ax.title.set_fontsize(10)
    if names:
        axes[0, -1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def turns(curves: pd.DataFrame, tests: pd.DataFrame, ylabel: str, shown: Sequence[str]) -> Figure:
    """Mean effect over strength of every curve, `shown` in colour; beside it each turn's way back and what is visible.

    `curves` has emotion, strength, value; `tests` is the table of `shapes.turns` with a column emotion.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.19 * len(tests) + 2.2), width_ratios=(1.25, 1))
    for emotion, part in curves.groupby("emotion", sort=False):
        look = {"color": "0.75", "lw": 1, "zorder": 1}
        if emotion in shown:
            number = list(shown).index(emotion)
            look = {"color": EMOTIONS.get(emotion, "black"), "lw": 2.5, "marker": MARKERS[number % 8], "label": emotion}
        left.plot(part["strength"], part["value"], **look)
    left.axhline(0, color="black", lw=0.8, ls="--")
    left.set(xlabel="strength (residual norms)", ylabel=ylabel)
    left.legend(fontsize=9, title="grey: all others", title_fontsize=9)
    tests = tests.sort_values("back").reset_index(drop=True)
    right.barh(tests.index, tests["visible"], color="0.88", label="smallest fall this test would find (80 %)")
    for row in tests.itertuples():
        colour = EMOTIONS.get(row.emotion, "0.3") if row.emotion in shown else "0.3"
        right.plot(row.back, row.Index, "v" if row.peak else "^", color=colour, ms=6)
        if row.p_holm < 0.05:
            right.text(row.back, row.Index, "  *", va="center", fontsize=11)
    right.axvline(0, color="black", lw=0.8, ls="--")
    right.set_yticks(tests.index, tests["emotion"], fontsize=8)
    right.set(xlabel="way back from the turn (nats)", ylim=(-0.8, len(tests) - 0.2))
    right.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def scores_and_effects(table: pd.DataFrame, scores: Sequence[str], effect: str, ylabel: str) -> Figure:
    """Every feature's effect against each of its scores; random features are grey. Columns feature, kind, scores."""
    figure, axes = plt.subplots(1, len(scores), figsize=(4.6 * len(scores), 4), sharey=True, squeeze=False)
    for ax, score in zip(axes[0], scores):
        for number, (kind, part) in enumerate(table.groupby("kind", sort=False)):
            colour = FEAR if number == 0 else GREY
            ax.scatter(part[score], part[effect], color=colour, marker=MARKERS[number], s=32, alpha=0.8, label=kind)
        best = table[table["kind"] == table["kind"].iloc[0]].nlargest(2, score)
        for row in best.itertuples():
            ax.annotate(str(row.feature), (getattr(row, score), getattr(row, effect)), (4, 4),
                        textcoords="offset points", fontsize=8)  # fmt: skip
        ax.axhline(0, color="black", lw=0.8, ls="--")
        ax.set(xlabel=score.replace("_", " "))
        if table[score].max() > 30 * max(table[score].median(), 1e-9) > 0:
            ax.set_xscale("symlog", linthresh=max(float(table[score].median()), 1e-6))
            ax.set_xlim(min(0, 3 * table[score].min()), 3 * table[score].max())
    axes[0, 0].set_ylabel(ylabel)
    axes[0, -1].legend(fontsize=9)
    figure.tight_layout()
    return figure


def reading(table: pd.DataFrame, prompt: str, width: int = 96) -> Figure:
    """One prompt continued at every strength, the regime marked at the left: columns strength, text, regime."""
    lines = [wrap(row.text.replace("\n", "⏎").strip(), width)[:3] or ["(nothing)"] for row in table.itertuples()]
    tops = np.cumsum([0, *[len(each) + 0.5 for each in lines]])
    figure, ax = plt.subplots(figsize=(10.5, 0.18 * tops[-1] + 0.5))
    for row, each, top in zip(table.itertuples(), lines, tops):
        ax.add_patch(plt.Rectangle((0, top - 0.25), 0.012, len(each), color=COLOURS[row.regime], ec="0.5", lw=0.5))
        ax.text(0.02, top, f"{row.strength:+g}", va="top", fontsize=9, weight="bold")
        ax.text(0.075, top, row.regime, va="top", fontsize=8, color="0.35", style="italic")
        ax.text(0.17, top, "\n".join(each), va="top", fontsize=8.5, family="monospace", parse_math=False)
    ax.set(xlim=(0, 1), ylim=(tops[-1], -0.6))
    ax.set_title(f"{prompt} ...", fontsize=10, parse_math=False)
    ax.axis("off")
    return figure


def costs(table: pd.DataFrame) -> Figure:
    """Seconds of a sweep as one thing grows, one panel each; dotted is proportional. Columns what, count, seconds."""
    names = list(table["what"].unique())
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3), squeeze=False)
    for ax, name in zip(axes[0], names):
        part = table[table["what"] == name]
        ax.plot(part["count"], part["seconds"], color=FEAR, marker="o")
        last = part.iloc[-1]
        ax.plot(part["count"], part["count"] * last["seconds"] / last["count"], color=GREY, ls=":")
        ax.set(xlabel=name, ylabel="seconds" if name == names[0] else "", ylim=(0, None), xticks=part["count"])
    figure.tight_layout()
    return figure
