"""Features of different depths compared: by their decoder rows, and by whether they fire together.

A table of features has the columns depth and feature. Decoder rows are read by slice, so nothing of size
depth x d_sae x d_model ever exists; `nearest` holds the rows of one depth at a time.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import beta, binomtest
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import at_positions, progress
from helpers.directions import unit
from helpers.features import encoded, top
from helpers.prompts import word_positions
from helpers.saes import decoder_rows, load_sae
from helpers.stats import bootstrap_picks, interval

LARGEST_ASSIGNMENT = 4096  # features per side; the time grows with the cube


def top_by_depth(model: TransformerBridge, table: pd.DataFrame, count: int) -> pd.DataFrame:
    """The features of every depth with the highest mean activation at the rows' `word`: depth, then as `features.top`.

    One pass reads all depths at these positions; each SAE is loaded in turn and encodes nothing else.
    """
    texts = table["sentence"].tolist()
    acts = at_positions(model, texts, word_positions(model, texts, table["word"].tolist()))
    found = []
    with progress(acts.shape[1], "depth", "encoding") as bar:
        for depth in range(acts.shape[1]):
            found.append(top(encoded(load_sae(model, depth), acts[:, depth]), count).assign(depth=depth))
            bar.update()
    return pd.concat(found, ignore_index=True)[["depth", "rank", "feature", "activation", "fires"]]


def rows_of(model: TransformerBridge, table: pd.DataFrame) -> Float[Tensor, "feature d_model"]:
    """The decoder rows of a table of features, in its order."""
    found = torch.empty(len(table), model.cfg.d_model)
    for depth, part in table.reset_index(drop=True).groupby("depth"):
        found[part.index.to_numpy()] = decoder_rows(model, int(depth), part["feature"].tolist())
    return found


def cosines(a: Float[Tensor, "a d_model"], b: Float[Tensor, "b d_model"]) -> Float[Tensor, "a b"]:
    """Cosine of every row of `a` with every row of `b`; 0 with a zero row."""
    return unit(a) @ unit(b).T


def best_of_random(count: int, d_model: int, quantile: float) -> float:
    """A quantile of the largest cosine of a fixed vector with `count` independent random directions.

    (1 + cosine) / 2 of two random directions follows Beta((d - 1) / 2, (d - 1) / 2) (Cai, Fan & Jiang 2013), and the
    largest of n draws has the n-th power of that distribution function.
    """
    half = (d_model - 1) / 2
    return 2 * beta.ppf(quantile ** (1 / count), half, half) - 1


def nearest(model: TransformerBridge, table: pd.DataFrame, to: int) -> pd.DataFrame:
    """Each feature's best match among all features of depth `to`: depth, feature, to, match, cosine, mutual.

    `mutual` says whether the match, in turn, has this feature as its best at the feature's own depth. A feature's match
    at its own depth is the best other one.
    """
    there = decoder_rows(model, to)
    found = []
    for depth, part in table.groupby("depth", sort=True):
        features = part["feature"].tolist()
        here = there if depth == to else decoder_rows(model, int(depth))
        alike = cosines(here[features], there)
        if depth == to:
            alike[range(len(features)), features] = -2
        best = alike.max(-1)
        back = cosines(there[best.indices], here)
        if depth == to:
            back[range(len(features)), best.indices] = -2
        returned = back.argmax(-1).tolist()
        rows = zip(features, best.indices.tolist(), best.values.tolist(), returned)
        found += [(depth, f, to, match, cosine, origin == f) for f, match, cosine, origin in rows]
    return pd.DataFrame(found, columns=["depth", "feature", "to", "match", "cosine", "mutual"])


def all_nearest(model: TransformerBridge, table: pd.DataFrame, depths: Sequence[int]) -> pd.DataFrame:
    """`nearest` of a table of features at every one of these depths but a feature's own."""
    found = []
    with progress(len(depths), "depth", "matching") as bar:
        for to in depths:
            found.append(nearest(model, table[table["depth"] != to], to))
            bar.update()
    return pd.concat(found, ignore_index=True)


def like_frequency(
    frequency: Float[Tensor, "d_sae"], feature: int, count: int, without: Sequence[int] = ()
) -> list[int]:
    """The `count` other features whose firing frequency is nearest on a log scale; those that never fire left out."""
    log = frequency.log()
    distance = (log - log[feature]).abs()
    distance[~distance.isfinite()] = torch.inf
    distance[[feature, *without]] = torch.inf
    order = distance.argsort(stable=True)[:count]
    return order[distance[order].isfinite()].tolist()


def one_to_one(a: Float[Tensor, "feature d_model"], b: Float[Tensor, "feature d_model"]) -> list[int]:
    """The feature of `b` that each of `a` gets when all are paired so that the cosines add up to most.

    (Linear assignment, Kuhn 1955.) Raises ValueError above LARGEST_ASSIGNMENT features.
    """
    if max(len(a), len(b)) > LARGEST_ASSIGNMENT:
        raise ValueError(f"one-to-one assignment of {len(a)} features takes too long: at most {LARGEST_ASSIGNMENT}")
    return linear_sum_assignment(cosines(a, b).numpy(), maximize=True)[1].tolist()


def families(edges: pd.DataFrame) -> pd.DataFrame:
    """Features that edges connect, each family with a number: depth, feature, family (0 is the largest).

    `edges` has the columns depth, feature, to, match.
    """
    ends = [edges[["depth", "feature"]], edges[["to", "match"]].set_axis(["depth", "feature"], axis=1)]
    nodes = pd.concat(ends).drop_duplicates().reset_index(drop=True)
    number = {tuple(node): i for i, node in enumerate(nodes.itertuples(index=False))}
    a, b = ([number[tuple(end)] for end in part.itertuples(index=False)] for part in ends)
    labels = connected_components(coo_array(([1] * len(a), (a, b)), shape=(len(nodes),) * 2), directed=False)[1]
    sizes = pd.Series(labels).value_counts()
    order = {label: rank for rank, label in enumerate(sizes.index)}
    return nodes.assign(family=[order[label] for label in labels])


def spearman(table: pd.DataFrame, x: str, y: str, by: str, generator: Generator, draws: int, confidence: float):
    """Spearman's rank correlation of two columns and its bootstrap interval over the groups in the column `by`."""
    groups = [part[[x, y]] for _, part in table.groupby(by)]
    picks = bootstrap_picks(draws, len(groups), generator)
    drawn = [pd.concat([groups[i] for i in pick]).corr("spearman").loc[x, y] for pick in picks.tolist()]
    low, high = interval(torch.tensor(drawn, dtype=torch.double), confidence)
    return table[[x, y]].corr("spearman").loc[x, y], low.item(), high.item()


def share_interval(hits: int, of: int, confidence: float) -> tuple[float, float, float]:
    """A share and its exact binomial interval (Clopper & Pearson 1934)."""
    exact = binomtest(hits, of).proportion_ci(confidence)
    return hits / of, exact.low, exact.high
