"""Figures of conversations and of patching, one function each: a tidy table in, a Figure out."""

import re
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from helpers.plots import EMOTIONS, FEAR, GREY, LINES, MARKERS, visible

SCENARIOS = {"argument": "#8B0000", "bad_news": "#56B4E9", "joyful": "#E69F00", "neutral": "0.55"}
ACROSS = 60  # tokens in one line of a token map


def token_map(table: pd.DataFrame, label: str) -> Figure:
    """Depth by token, the words below; a line of at most 60 tokens after the other, turns apart by white lines.

    Columns pos, turn, token, depth, value.
    """
    positions = sorted(table["pos"].unique())
    lines = [positions[start : start + ACROSS] for start in range(0, len(positions), ACROSS)]
    reach = table["value"].abs().quantile(0.99) or 1.0
    widest, depths = max(len(line) for line in lines), table["depth"].nunique()
    size = (max(5.0, 0.235 * widest + 1.6), (0.17 * depths + 1.05) * len(lines))
    figure, axes = plt.subplots(len(lines), 1, figsize=size, squeeze=False, layout="constrained")
    for ax, line in zip(axes[:, 0], lines):
        part = table[table["pos"].isin(line)]
        grid = part.pivot(index="depth", columns="pos", values="value").loc[:, line]
        mesh = ax.pcolormesh(np.arange(len(line) + 1), np.arange(depths + 1), grid, cmap="PuOr_r",
                             vmin=-reach, vmax=reach)  # fmt: skip
        words = part.drop_duplicates("pos").set_index("pos").loc[line]
        ax.set_xticks(np.arange(len(line)) + 0.5, [visible(token) for token in words["token"]], rotation=90, fontsize=9)
        ax.set_yticks(np.arange(0, depths, 2) + 0.5, sorted(table["depth"].unique())[::2], fontsize=8)
        turns = words["turn"].to_numpy()
        for at in np.flatnonzero(turns[1:] != turns[:-1]) + 1:
            ax.axvline(at, color="white", lw=3)
        ax.set(ylabel="depth", xlim=(0, widest))
        ax.tick_params(length=0)
        sns.despine(ax=ax, left=True, bottom=True)
    figure.colorbar(mesh, ax=axes, label=label, shrink=min(1.0, 0.9 / len(lines) + 0.2), aspect=15, pad=0.01)
    return figure


def by_turn(table: pd.DataFrame, label: str, emotions: Sequence[str]) -> Figure:
    """Read-outs over turns, one panel per scenario, one line per emotion with its interval over conversations.

    Columns scenario, turn, emotion, value, low, high.
    """
    scenarios = list(table["scenario"].unique())
    figure, axes = plt.subplots(
        1, len(scenarios), figsize=(3.5 * len(scenarios) + 1, 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, scenario in zip(axes[0], scenarios):
        for number, emotion in enumerate(emotions):
            part = table[(table["scenario"] == scenario) & (table["emotion"] == emotion)]
            colour = EMOTIONS.get(emotion, GREY)
            ax.fill_between(part["turn"], part["low"], part["high"], color=colour, alpha=0.15, lw=0)
            look = {"color": colour, "ls": LINES[number % len(LINES)], "marker": MARKERS[number % 8], "ms": 4}
            ax.plot(part["turn"], part["value"], label=emotion, **look)
        ax.axhline(0, color="black", lw=0.8, ls="--")
        ax.set(title=visible(scenario.replace("_", " ")), xlabel="turn")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set_ylabel(label)
    axes[0, -1].legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def raw_and_neutral(table: pd.DataFrame, published: tuple[float, float]) -> Figure:
    """Raw cosine to every reference over depth, to the neutral one in black, and their spread in a second panel.

    Columns emotion ("neutral" among them), depth, cosine. `published` is the range that was reported.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for emotion, part in table.groupby("emotion", sort=False):
        neutral = emotion == "neutral"
        look = (
            {"color": "black", "lw": 2.5, "ls": "--"} if neutral else {"color": EMOTIONS.get(emotion, GREY), "lw": 1.2}
        )
        left.plot(part["depth"], part["cosine"], label=emotion, zorder=3 if neutral else 2, **look)
        mean = table[table["emotion"] != "neutral"].groupby("depth")["cosine"].mean()
        right.plot(part["depth"], part["cosine"].to_numpy() - mean.loc[part["depth"]].to_numpy(), **look)
    left.axhspan(*published, color="0.85", lw=0, zorder=0, label="published range")
    left.set(xlabel="depth", ylabel="raw cosine of turn ends", title="Every reference is near, the neutral one too")
    right.axhline(0, color="black", lw=0.8)
    right.set(xlabel="depth", ylabel="less the mean of the emotions", title="What is left to tell them apart")
    left.legend(fontsize=8, ncols=2)
    return figure


def memory(table: pd.DataFrame) -> Figure:
    """Similarity to the opening over turns, the conversations as they are and spliced, one panel per `readout`.

    Columns readout, condition, turn, value, low, high.
    """
    panels = list(table["readout"].unique())
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False, layout="constrained")
    for ax, panel in zip(axes[0], panels):
        for number, (condition, part) in enumerate(table[table["readout"] == panel].groupby("condition", sort=False)):
            colour = FEAR if number == 0 else GREY
            ax.fill_between(part["turn"], part["low"], part["high"], color=colour, alpha=0.2, lw=0)
            ax.plot(
                part["turn"],
                part["value"],
                color=colour,
                ls=LINES[number],
                marker=MARKERS[number],
                ms=5,
                label=condition,
            )
        ax.set(title=panel, xlabel="turn", ylabel="cosine with the opening turn")
    axes[0, 0].legend(fontsize=9)
    return figure


def path(table: pd.DataFrame, means: pd.DataFrame, labels: tuple[str, str]) -> Figure:
    """Path of every scenario through two dimensions, a panel each: crosses for stretches of turns, with intervals.

    `table` has scenario, x, x_low, x_high, y, y_low, y_high, in the order of the turns; `means` has emotion, x, y:
    where the emotions' texts lie.
    """
    groups = list(table.groupby("scenario", sort=False))
    figure, axes = plt.subplots(
        1, len(groups), figsize=(3.2 * len(groups) + 0.6, 3.8), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax, (scenario, part) in zip(axes[0], groups):
        colour = SCENARIOS.get(scenario, "black")
        ax.plot(part["x"], part["y"], color=colour, lw=1.8)
        ax.hlines(part["y"], part["x_low"], part["x_high"], color=colour, lw=0.8, alpha=0.6)
        ax.vlines(part["x"], part["y_low"], part["y_high"], color=colour, lw=0.8, alpha=0.6)
        ax.scatter(part["x"], part["y"], s=[15 + 35 * i for i in range(len(part))], color=colour, ec="white", zorder=3)
        for row in means.itertuples():
            ax.plot(row.x, row.y, "*", ms=14, color=EMOTIONS.get(row.emotion, GREY), mec="black")
            ax.annotate(row.emotion, (row.x, row.y), (0, 9), textcoords="offset points", ha="center", fontsize=9)
        ax.axhline(0, color="black", lw=0.5, ls=":")
        ax.axvline(0, color="black", lw=0.5, ls=":")
        ax.margins(0.15)
        ax.set(title=visible(scenario.replace("_", " ")), xlabel=labels[0])
    axes[0, 0].set_ylabel(labels[1])
    figure.suptitle("From the smallest marker (first turns) to the largest (last turns)", fontsize=10)
    return figure


def patching_map(table: pd.DataFrame, label: str) -> Figure:
    """Depth by place (or head) of the share that a swap moves, panels by two; dots mark intervals above 0.

    Columns panel, place, depth, value, low.
    """
    panels = list(table["panel"].unique())
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    depths, places = table["depth"].nunique(), table["place"].nunique()
    size = ((0.4 * depths + 1.1) * across + 0.8, (0.36 * places + 0.9) * down)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    for ax, panel in zip(axes.flat, panels):
        part = table[table["panel"] == panel]
        order = part["place"].unique()
        grid, low = (part.pivot(index="place", columns="depth", values=name).loc[order] for name in ("value", "low"))
        notes = [[_share(*pair) for pair in zip(*row)] for row in zip(grid.to_numpy(), low.to_numpy())]
        sns.heatmap(
            grid, ax=ax, cmap="PuOr_r", vmin=-1, vmax=1, annot=notes, fmt="", annot_kws={"size": 8}, cbar=False,
            linewidths=0.3,
        )  # fmt: skip
        ax.set(ylabel="", xlabel="depth")
        ax.set_title(panel, fontsize=10)
        ax.tick_params(axis="y", rotation=0, labelsize=9)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    figure.colorbar(axes.flat[0].collections[0], ax=axes, label=label, shrink=0.8 if down > 1 else 1.0, aspect=30)
    return figure


def lens_table(table: pd.DataFrame) -> Figure:
    """The likeliest next token at the end of each turn (down) by depth (across), shaded by its probability.

    Columns turn, speaker, depth, token, probability.
    """
    grid = table.pivot(index="turn", columns="depth", values="probability")
    words = table.assign(token=table["token"].map(visible)).pivot(index="turn", columns="depth", values="token")
    speakers = [f"{row.turn} {visible(row.speaker)}" for row in table.drop_duplicates("turn").itertuples()]
    figure, ax = plt.subplots(figsize=(0.85 * grid.shape[1] + 2.4, 0.32 * len(grid) + 1.2), layout="constrained")
    sns.heatmap(
        grid, annot=words, fmt="", cmap="Greens", vmin=0, vmax=1, ax=ax, annot_kws={"size": 9}, linewidths=0.3,
        cbar_kws={"label": "probability", "shrink": 0.8}, yticklabels=speakers,
    )  # fmt: skip
    ax.set(ylabel="end of turn", xlabel="depth")
    ax.tick_params(axis="y", rotation=0)
    return figure


def _share(value: float, low: float) -> str:
    """A share in few characters, with a dot where its interval is above 0."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{round(value, 2) + 0.0:.2f}") + ("•" if low > 0 else "")
