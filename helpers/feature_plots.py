"""Figures about SAE features, one function each: a tidy table in, a Figure (or a table to read) out.

`plots.save` writes them. An emotion has its colour from `plots.EMOTIONS` everywhere.
"""

from collections.abc import Sequence
from html import escape

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.features import OnPassages
from helpers.plots import EMOTIONS, GREY, LINES, MARKERS, visible
from helpers.prompts import token_strings

FAMILIES = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B5BA6", "#5A8F29"]


def top_features(table: pd.DataFrame) -> Figure:
    """The strongest features of each emotion as bars, a dot per sentence; hatched where another emotion shares it.

    Columns emotion, rank, feature, sentence, activation: one row per feature and sentence.
    """
    emotions = list(table["emotion"].unique())
    shared = table.groupby("feature")["emotion"].nunique() > 1
    figure, axes = plt.subplots(1, len(emotions), figsize=(3.6 * len(emotions) + 0.5, 3.6), sharey=True, squeeze=False)
    for ax, emotion in zip(axes[0], emotions):
        here = table[table["emotion"] == emotion]
        mean = here.groupby(["rank", "feature"])["activation"].mean().reset_index()
        hatch = ["///" if shared[feature] else "" for feature in mean["feature"]]
        ax.bar(mean["rank"], mean["activation"], color=EMOTIONS.get(emotion, GREY), alpha=0.55, hatch=hatch, ec="white")
        ax.scatter(here["rank"], here["activation"], color="black", s=9, zorder=3)
        ax.set_xticks(mean["rank"], mean["feature"], rotation=60, ha="right", fontsize=9)
        ax.set(title=emotion, xlabel="feature")
    axes[0, 0].set_ylabel("activation at the key word")
    figure.tight_layout()
    return figure


def activation_map(table: pd.DataFrame, columns: str, label: str) -> Figure:
    """Features as rows, what they were read on as columns, each row in units of its own emotion's key word.

    Columns emotion, feature, `columns`, relative. A cell whose column is the row's emotion is framed.
    """
    rows = list(table[["emotion", "feature"]].drop_duplicates().itertuples(index=False, name=None))
    names = list(table[columns].unique())
    grid = table.pivot(index=["emotion", "feature"], columns=columns, values="relative").loc[rows, names]
    figure, ax = plt.subplots(figsize=(0.62 * len(names) + 3.2, 0.26 * len(rows) + 1.6))
    sns.heatmap(
        grid, vmin=0, vmax=1.5, cmap="cividis", ax=ax, cbar_kws={"label": label, "shrink": 0.6},
        annot=len(names) < 10, fmt=".1f", annot_kws={"size": 8},
        yticklabels=[f"{emotion}  {feature}" for emotion, feature in rows],
    )  # fmt: skip
    for i, (emotion, _) in enumerate(rows):
        if emotion in names:
            ax.add_patch(plt.Rectangle((names.index(emotion), i), 1, 1, fill=False, ec="white", lw=1.5))
        ax.get_yticklabels()[i].set_color(EMOTIONS.get(emotion, "black"))
    ax.set(xlabel="", ylabel="")
    ax.tick_params(axis="x", rotation=45)
    plt.setp(ax.get_xticklabels(), ha="right", rotation_mode="anchor")
    ax.tick_params(axis="both", labelsize=9)
    return figure


def around_word(table: pd.DataFrame) -> Figure:
    """Mean activation over tokens around the key word, one panel per emotion.

    Columns emotion, offset, feature, activation.
    """
    emotions = list(table["emotion"].unique())
    figure, axes = plt.subplots(1, len(emotions), figsize=(3.6 * len(emotions) + 0.5, 3.2), sharey=True, squeeze=False)
    for ax, emotion in zip(axes[0], emotions):
        here = table[table["emotion"] == emotion]
        for number, (feature, part) in enumerate(here.groupby("feature", sort=False)):
            by = part.groupby("offset")["activation"]
            look = {"ls": LINES[number % len(LINES)], "marker": MARKERS[number % 8], "ms": 5}
            ax.plot(by.mean().index, by.mean(), color=EMOTIONS.get(emotion, GREY), label=str(feature), **look)
            error = by.std() / by.size() ** 0.5
            ends = by.mean() - error, by.mean() + error
            ax.fill_between(by.mean().index, *ends, color=EMOTIONS.get(emotion, GREY), alpha=0.15, lw=0)
        ax.axvline(0, color="black", lw=0.8, ls=":")
        ax.set(title=emotion, xlabel="tokens after the key word")
        ax.legend(fontsize=8, title="feature", title_fontsize=8)
    axes[0, 0].set_ylabel("activation (mean, ± 1 SE)")
    figure.tight_layout()
    return figure


def pursuit(table: pd.DataFrame) -> Figure:
    """Share of the squared norm that a sum of decoder rows explains, by number of rows.

    Columns target, kind ("direction" or the name of a random kind), step, explained; random kinds are drawn as bands.
    """
    figure, ax = plt.subplots(figsize=(7, 4.4))
    for number, (kind, part) in enumerate(table[table["kind"] != "direction"].groupby("kind", sort=False)):
        by, shade = part.groupby("step")["explained"], str(0.3 + 0.2 * number)
        ax.fill_between(by.mean().index, by.quantile(0.025), by.quantile(0.975), color=shade, alpha=0.25, lw=0)
        ax.plot(by.median(), color=shade, ls=LINES[1 + number], label=kind)
    for number, (target, part) in enumerate(table[table["kind"] == "direction"].groupby("target", sort=False)):
        look = {"marker": MARKERS[number % 8], "ms": 4, "lw": 1.3 if target in EMOTIONS else 3}
        ax.plot(part["step"], part["explained"], color=EMOTIONS.get(target, "black"), label=target, **look)
    ax.set(xlabel="number of decoder rows", ylabel="share of the squared norm", ylim=(0, 1))
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1.05))
    return figure


def passages(model: TransformerBridge, on: OnPassages, feature: int, count: int = 5, width: int = 14) -> HTML:
    """The passages where a feature fires most, `width` tokens on either side, each token shaded by its activation."""
    column, lines = on.acts[:, on.features.index(feature)], []
    peak = column.max().item() or 1.0
    for row in on.strongest(feature, count).itertuples():
        start, words = on.first[row.passage], token_strings(model, on.texts[row.passage])[1:]
        near = range(max(0, row.pos - 1 - width), min(len(words), row.pos + width))
        marked = "".join(_shaded(words[i], max(0, column[start + i].item()) / peak, i == row.pos - 1) for i in near)
        lines.append(f"<tr><td>{row.activation:.1f}</td><td style='text-align:left'>… {marked} …</td></tr>")
    body = "".join(lines) or "<tr><td>-</td><td>fires nowhere in these passages</td></tr>"
    caption = f"<caption style='text-align:left'>feature {feature}: strongest passages</caption>"
    return HTML(f"<table>{caption}{body}</table>")


def cosine_map(
    cosines: Float[Tensor, "feature feature"], labels: Sequence[str], boundaries: Sequence[int] = (), title: str = ""
) -> Figure:
    """Cosines between features as a heatmap; lines where a new group (a depth, say) begins."""
    size = min(9.0, 0.28 * len(labels) + 2.6)
    figure, ax = plt.subplots(figsize=(size + 1, size))
    sns.heatmap(
        cosines, vmin=-1, vmax=1, cmap="PuOr_r", square=True, ax=ax, xticklabels=labels, yticklabels=labels,
        annot=len(labels) <= 12, fmt=".2f", annot_kws={"size": 8}, cbar_kws={"label": "cosine", "shrink": 0.7},
    )  # fmt: skip
    for at in boundaries:
        ax.axhline(at, color="black", lw=1)
        ax.axvline(at, color="black", lw=1)
    ax.tick_params(labelsize=8 if len(labels) <= 12 else 6.5)
    ax.set_title(title)
    return figure


def matches(table: pd.DataFrame) -> Figure:
    """Cosine with the best match at the next depth: the emotion's features as dots, controls as bands and a line.

    Columns depth, kind, cosine. Kinds: "emotion's features", "features of like frequency", and, one value per depth,
    "best of as many random directions".
    """
    figure, ax = plt.subplots(figsize=(8, 4))
    like = table[table["kind"] == "features of like frequency"].groupby("depth")["cosine"]
    ax.fill_between(like.median().index, like.quantile(0.025), like.quantile(0.975), color="0.8", lw=0)
    ax.plot(like.median(), color=GREY, ls="--", label="features of like frequency (median, 95 %)")
    random = table[table["kind"] == "best of as many random directions"]
    ax.plot(
        random["depth"],
        random["cosine"],
        color="black",
        ls=":",
        label="best of as many random directions (95th percentile)",
    )
    ours = table[table["kind"] == "emotion's features"]
    ax.plot(ours["depth"], ours["cosine"], "o", color=EMOTIONS["happy"], mec="black", label="emotion's features")
    ax.set(xlabel="from this depth to the next", ylabel="cosine with the best match", ylim=(0, 1.03))
    ax.set_xticks(sorted(table["depth"].unique()))
    ax.legend(fontsize=9, loc="lower right")
    return figure


def by_distance(table: pd.DataFrame) -> Figure:
    """Best cosine against distance in depth: dots, and their mean with a 95 % bootstrap interval, per kind.

    Columns kind, distance, cosine.
    """
    figure, ax = plt.subplots(figsize=(8, 4))
    for number, (kind, part) in enumerate(table.groupby("kind", sort=False)):
        shift = 0.16 * (number - (table["kind"].nunique() - 1) / 2)
        colour = [EMOTIONS["happy"], "0.35", "0.65"][number % 3]
        ax.plot(part["distance"] + shift, part["cosine"], MARKERS[number], color=colour, alpha=0.35, ms=4)
        look = {"color": colour, "ls": LINES[number], "lw": 2, "label": kind}
        sns.lineplot(part, x="distance", y="cosine", errorbar=("ci", 95), seed=0, ax=ax, **look)
    ax.set(xlabel="distance in depth", ylabel="best cosine")
    ax.legend(fontsize=9)
    return figure


def together(table: pd.DataFrame) -> Figure:
    """Correlation of activations on the same text against the cosine of decoder rows.

    Columns kind, cosine, correlation; the first kind is drawn large.
    """
    figure, ax = plt.subplots(figsize=(6.5, 4.2))
    for number, (kind, part) in enumerate(table.groupby("kind", sort=False)):
        look = {"color": "0.6", "s": 10} if number else {"color": EMOTIONS["happy"], "s": 26, "ec": "black", "lw": 0.6}
        ax.scatter(part["cosine"], part["correlation"], marker=MARKERS[number], label=kind, zorder=3 - number, **look)
    ax.axhline(0, color="black", lw=0.8, ls="--")
    ax.set(xlabel="cosine of the decoder rows", ylabel="correlation of activations")
    ax.legend(fontsize=9)
    return figure


def flow(nodes: pd.DataFrame, edges: pd.DataFrame) -> Figure:
    """Which feature continues as which: depth to the right, one line per family, link width by cosine.

    `nodes` has depth, feature, family, chosen (drawn filled); `edges` depth, feature, to, match, cosine.
    """
    place, total = {}, 0  # every family has its lanes, as many as it has features at one depth
    for _, part in nodes.groupby("family"):
        for _, column in part.groupby("depth"):
            place |= {(row.depth, row.feature): total + lane for lane, row in enumerate(column.itertuples())}
        total += part.groupby("depth").size().max()
    figure, ax = plt.subplots(figsize=(9.5, 0.34 * total + 1.2))
    size, colour = nodes.groupby("family").size(), {}
    for row in nodes.itertuples():
        colour[row.depth, row.feature] = FAMILIES[row.family % len(FAMILIES)] if size[row.family] > 2 else "0.6"
    for edge in edges.itertuples():
        ends = [place[edge.depth, edge.feature], place[edge.to, edge.match]]
        ax.plot(
            [edge.depth, edge.to], ends, color=colour[edge.depth, edge.feature], lw=0.5 + 4 * edge.cosine, alpha=0.5
        )
    for row in nodes.itertuples():
        here = colour[row.depth, row.feature]
        face = here if row.chosen else "white"
        ax.plot(row.depth, place[row.depth, row.feature], "o", color=here, mfc=face, ms=6, zorder=3)
        ax.annotate(row.feature, (row.depth, place[row.depth, row.feature]), (0, 5), textcoords="offset points",
                    ha="center", fontsize=6.5)  # fmt: skip
    ax.invert_yaxis()
    ax.set(xlabel="depth", yticks=[], xticks=sorted(nodes["depth"].unique()))
    sns.despine(ax=ax, left=True)
    return figure


def _shaded(token: str, share: float, strongest: bool) -> str:
    text = escape(visible(token)).replace(r"\$", "$")
    weight = "bold" if strongest else "normal"
    space = " " if token.startswith(" ") else ""
    return f"{space}<span style='background:rgba(230,159,0,{share:.2f});font-weight:{weight}'>{text}</span>"
