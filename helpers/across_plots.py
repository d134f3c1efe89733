"""Figures that show several models side by side, each under its own name."""

from textwrap import fill, shorten

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from helpers.plots import FEAR, GREY, LINES, MARKERS
from helpers.steering_plots import COLOURS

COLOUR = {
    "holds": "#4C9F70", "partly": "#E9C46A", "does not hold": "#D98880", "not applicable": "0.88", "not run": "white"
}  # fmt: skip
SIGN = {"holds": "✓ ", "partly": "~ ", "does not hold": "✗ ", "not applicable": "", "not run": ""}  # without colour


def curves(table: pd.DataFrame, ylabel: str, chance: float | None = None) -> Figure:
    """One panel per model over relative depth, the other models behind it in grey, its controls as broken lines.

    Columns model, condition, relative depth, value, low, high; the first condition is the model's own curve and has a
    band. `chance` is marked where it is given.
    """
    models, conditions = list(table["model"].unique()), list(table["condition"].unique())
    figure, axes = plt.subplots(1, len(models), figsize=(2.7 * len(models) + 0.8, 3.4), sharey=True, squeeze=False)
    for ax, model in zip(axes[0], models):
        for other in models:
            line = table[(table["model"] == other) & (table["condition"] == conditions[0])]
            ax.plot(line["relative depth"], line["value"], color="0.8", lw=1, zorder=1)
        for number, condition in enumerate(conditions):
            part = table[(table["model"] == model) & (table["condition"] == condition)]
            x, colour = part["relative depth"], FEAR if number == 0 else GREY
            ax.plot(x, part["value"], color=colour, ls=LINES[number], marker=MARKERS[number], ms=4, label=condition)
            if number == 0:
                ax.fill_between(x, part["low"], part["high"], color=colour, alpha=0.2, lw=0)
        if chance is not None:
            ax.axhline(chance, color="black", lw=0.8, ls="--")
        ax.set(xlabel="relative depth", title=model)
    axes[0, 0].set_ylabel(ylabel)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=3, bbox_to_anchor=(0.5, 1))
    figure.tight_layout()
    return figure


def emergence(table: pd.DataFrame, ylabel: str, chance: float) -> Figure:
    """A measure over training, one line per depth, dark for deep. Columns tokens, depth, value, low, high.

    The untrained model stands at the left end of the logarithmic axis, apart from the others.
    """
    figure, ax = plt.subplots(figsize=(8, 4.2))
    depths = sorted(table["depth"].unique())
    first = table.loc[table["tokens"] > 0, "tokens"].min() / 4
    for depth in depths:
        part = table[table["depth"] == depth].sort_values("tokens")
        x, colour = part["tokens"].where(part["tokens"] > 0, first), plt.cm.viridis_r(depth / max(depths))
        ax.plot(x, part["value"], color=colour, marker=MARKERS[depth % 8], ms=5, label=f"depth {depth}")
    deepest = table[table["depth"] == depths[-1]].sort_values("tokens")
    x = deepest["tokens"].where(deepest["tokens"] > 0, first)
    ax.fill_between(x, deepest["low"], deepest["high"], color=plt.cm.viridis_r(1.0), alpha=0.12, lw=0)
    ax.axhline(chance, color="black", lw=0.8, ls="--")
    ax.set_xscale("log")
    seen = sorted(table["tokens"].unique())
    ax.set_xticks([max(first, tokens) for tokens in seen], [_short(tokens) for tokens in seen])
    ax.minorticks_off()
    ax.set(xlabel="tokens of training", ylabel=ylabel)
    ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=9)
    figure.tight_layout()
    return figure


def regimes(table: pd.DataFrame, xlabel: str) -> Figure:
    """Shares of the regimes as stacked bars over dose, one panel per model and line of panels per method.

    Columns model, method, dose and one per regime, as `regimes.shares` gives them.
    """
    models, methods = list(table["model"].unique()), list(table["method"].unique())
    size = (2.3 * len(models) + 0.8, 2.1 * len(methods) + 0.6)
    figure, axes = plt.subplots(len(methods), len(models), figsize=size, sharex=True, sharey=True, squeeze=False)
    for line, method in zip(axes, methods):
        for ax, model in zip(line, models):
            part = table[(table["model"] == model) & (table["method"] == method)].sort_values("dose")
            bottom, x = 0.0, range(len(part))
            for regime, colour in COLOURS.items():
                ax.bar(x, part[regime], bottom=bottom, color=colour, ec="0.5", lw=0.5, label=regime)
                bottom = bottom + part[regime].to_numpy()
            ax.set_xticks(x, [f"{dose:g}" for dose in part["dose"]])
            if method == methods[0]:
                ax.set_title(model)
            if method == methods[-1]:
                ax.set_xlabel(xlabel)
        line[0].set_ylabel(f"{method}\nshare of texts")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=4, bbox_to_anchor=(0.5, 1))
    figure.tight_layout()
    return figure


def likeness(table: pd.DataFrame) -> Figure:
    """Correlation of every model with every other, one square per `panel`. Columns panel, model, other, r."""
    panels = list(table["panel"].unique())
    side = 0.62 * table["model"].nunique() + 1.4
    figure, axes = plt.subplots(1, len(panels), figsize=(side * len(panels) + 0.6, side), squeeze=False)
    for ax, panel in zip(axes[0], panels):
        here = table[table["panel"] == panel]
        models = list(here["model"].unique())
        grid = here.pivot(index="model", columns="other", values="r").loc[models, models]
        labels = {"xticklabels": True, "yticklabels": True}
        sns.heatmap(
            grid, ax=ax, cmap="cividis", vmin=0, vmax=1, annot=True, fmt=".2f", square=True, cbar=False, **labels
        )
        ax.set(title=panel, xlabel="", ylabel="")
        ax.tick_params(axis="x", rotation=45)
    figure.tight_layout()
    return figure


def claims(table: pd.DataFrame) -> Figure:
    """Every model's verdict on every claim as a square with the value and its interval, or why it does not apply.

    Columns claim, model, verdict, value, low, high, note, as `compare.report_cards` gives them.
    """
    claims, models = list(table["claim"].unique()), list(table["model"].unique())
    figure, ax = plt.subplots(figsize=(1.35 * len(models) + 3.2, 0.34 * len(claims) + 1))
    for row in table.itertuples():
        x, y = models.index(row.model), claims.index(row.claim)
        ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fc=COLOUR[row.verdict], ec="white", lw=1.5))
        value = SIGN[row.verdict] + ("" if pd.isna(row.value) else f"{row.value:.2g}")
        between = "" if pd.isna(row.low) else f"\n[{row.low:.2g}, {row.high:.2g}]"
        not_here = row.verdict == "not applicable"
        said = fill(shorten(row.note, 50, placeholder=" ..."), 27) if not_here else value + between
        ax.text(x, y, said, ha="center", va="center", fontsize=5 if not_here else 6.5, linespacing=0.95)
    ax.set_xticks(range(len(models)), models, rotation=30, ha="left")
    ax.set_yticks(range(len(claims)), claims, fontsize=9)
    ax.xaxis.tick_top()
    ax.set(xlim=(-0.5, len(models) - 0.5), ylim=(len(claims) - 0.5, -0.5))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, fc=colour, ec="0.6") for colour in COLOUR.values()]
    names = [f"{SIGN[verdict]}{verdict}" for verdict in COLOUR]
    ax.legend(handles, names, loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=9)
    return figure


def _short(tokens: int) -> str:
    return f"{tokens / 1e6:.3g} M" if tokens >= 1e6 else f"{tokens / 1e3:.3g} k"
