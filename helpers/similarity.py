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
from scipy.stats import beta
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import at_positions, every_token, progress
from helpers.config import CFG
from helpers.directions import unit
from helpers.features import encoded, on_passages, top
from helpers.geometry import square
from helpers.prompts import word_positions
from helpers.saes import checked_features, decoder_rows, load_sae
from helpers.specificity import difference_interval
from helpers.stats import share_interval, spearman

LARGEST_ASSIGNMENT = 4096  # features per side; the time grows with the cube


def top_by_depth(
    model: TransformerBridge, table: pd.DataFrame, count: int, minus: pd.DataFrame | None = None
) -> pd.DataFrame:
    """The features of every depth with the highest mean activation at the rows' `word`: depth, then as `features.top`.

    With `minus`, the mean over the rows of that table is taken off first. One pass reads all depths at these positions;
    each SAE is loaded in turn and encodes nothing else.
    """
    both = table if minus is None else pd.concat([table, minus])
    texts = both["sentence"].tolist()
    acts = at_positions(model, texts, word_positions(model, texts, both["word"].tolist()))
    found = []
    with progress(acts.shape[1], "depth", "encoding") as bar:
        for depth in range(acts.shape[1]):
            here = encoded(load_sae(model, depth), acts[:, depth])
            best = top(here[: len(table)], count, None if minus is None else here[len(table) :])
            found.append(best.assign(depth=depth))
            bar.update()
    return pd.concat(found, ignore_index=True)[["depth", "rank", "feature", "activation", "fires"]]


def frequencies(
    model: TransformerBridge, texts: Sequence[str], depths: Sequence[int]
) -> dict[int, Float[Tensor, "d_sae"]]:
    """Share of the texts' tokens on which every feature fires, by depth; one pass reads all depths."""
    read = zip(depths, every_token(model, texts, depths).unbind(1))
    return {depth: on_passages(model, load_sae(model, depth), texts, [], here).frequency for depth, here in read}


def rows_of(model: TransformerBridge, table: pd.DataFrame) -> Float[Tensor, "feature d_model"]:
    """The decoder rows of a table of features, in its order."""
    found = torch.empty(len(table), model.cfg.d_model)
    for depth, part in table.reset_index(drop=True).groupby("depth"):
        found[part.index.tolist()] = decoder_rows(model, int(depth), part["feature"].tolist())
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
        here = there if depth == to else decoder_rows(model, int(depth))
        features = checked_features(part["feature"].tolist(), len(here), int(depth))
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
            if len(others := table[table["depth"] != to]):
                found.append(nearest(model, others, to))
            bar.update()
    return pd.concat(found, ignore_index=True)


def onward(
    model: TransformerBridge, table: pd.DataFrame, frequency: dict[int, Float[Tensor, "d_sae"]], others: int = 100
) -> pd.DataFrame:
    """`nearest` of each feature at the next depth, and whether it is above chance; the last depth's are left out.

    Chance is `random`, the 95th percentile of the best of as many random directions as the next SAE has features, and
    `like frequency`, the 95th percentile of the match's cosine with `others` features of the feature's own depth that
    fire about as often. `above chance` means above both.
    """
    found = []
    for depth, part in table[table["depth"] < model.cfg.n_layers].groupby("depth"):
        matched = nearest(model, part, depth + 1)
        targets = decoder_rows(model, depth + 1, matched["match"].tolist())
        like = []
        for feature, target in zip(matched["feature"], targets):
            theirs = decoder_rows(model, depth, like_frequency(frequency[depth], feature, others))
            like.append(cosines(theirs, target[None]).quantile(0.95).item())
        random = best_of_random(len(frequency[depth + 1]), model.cfg.d_model, 0.95)
        found.append(matched.assign(random=random, **{"like frequency": like}))
    table = pd.concat(found, ignore_index=True)
    return table.assign(**{"above chance": table["cosine"] > table[["random", "like frequency"]].max(axis=1)})


def followed(
    model: TransformerBridge, table: pd.DataFrame, frequency: dict[int, Float[Tensor, "d_sae"]]
) -> pd.DataFrame:
    """`onward` of each feature, of its match, of that one's match, ... to the last depth or as long as above chance.

    One row per link above chance.
    """
    links, reached = [], table[["depth", "feature"]]
    for depth in range(model.cfg.n_layers):
        here = reached[reached["depth"] == depth].drop_duplicates()
        if len(here):
            steps = onward(model, here, frequency)
            links.append(steps[steps["above chance"]])
            reached = pd.concat([reached, links[-1][["to", "match"]].set_axis(["depth", "feature"], axis=1)])
    return pd.concat(links, ignore_index=True)


def among(model: TransformerBridge, table: pd.DataFrame) -> pd.DataFrame:
    """Each feature's best cosine with the table's features of every other depth: depth, feature, to, cosine."""
    table = table.reset_index(drop=True)
    rows = rows_of(model, table)
    every, found = cosines(rows, rows), []
    for one in table.itertuples():
        for to, part in table[table["depth"] != one.depth].groupby("depth"):
            found.append((one.depth, one.feature, to, every[one.Index, part.index.tolist()].max().item()))
    return pd.DataFrame(found, columns=["depth", "feature", "to", "cosine"])


def like_frequency(
    frequency: Float[Tensor, "d_sae"], feature: int, count: int, without: Sequence[int] = ()
) -> list[int]:
    """The `count` other features whose firing frequency is nearest on a log scale; those that never fire left out.

    For a feature that never fires itself, the rarest of those that do.
    """
    log = frequency.clamp(min=1e-12).log()
    distance = (log - log[feature]).abs()
    distance[frequency == 0] = torch.inf
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


def families(table: pd.DataFrame, edges: pd.DataFrame) -> pd.DataFrame:
    """Features that edges connect: depth, feature, chosen (whether it is in `table`), family (0 is the largest).

    All features of the table and all that edges lead to; one without an edge is a family of its own. `edges` has the
    columns depth, feature, to, match.
    """
    ends = [edges[["depth", "feature"]], edges[["to", "match"]].set_axis(["depth", "feature"], axis=1)]
    nodes = pd.concat([table[["depth", "feature"]], *ends]).drop_duplicates().reset_index(drop=True)
    number = {tuple(node): i for i, node in enumerate(nodes.itertuples(index=False))}
    a, b = ([number[tuple(end)] for end in part.itertuples(index=False)] for part in ends)
    labels = connected_components(coo_array(([1] * len(a), (a, b)), shape=(len(nodes),) * 2), directed=False)[1]
    order = {label: rank for rank, label in enumerate(pd.Series(labels).value_counts().index)}
    filled = set(zip(table["depth"], table["feature"]))
    chosen = [node in filled for node in zip(nodes["depth"], nodes["feature"])]
    return nodes.assign(chosen=chosen, family=[order[label] for label in labels])


def fire_together(model: TransformerBridge, pairs: pd.DataFrame, texts: Sequence[str]) -> Float[Tensor, "pair"]:
    """Pearson correlation of both features' activations over all tokens of the texts; NaN where one never fires.

    `pairs` has the columns depth, feature, to, match.
    """
    ends = [pairs[["depth", "feature"]], pairs[["to", "match"]].set_axis(["depth", "feature"], axis=1)]
    parts = dict(list(pd.concat(ends).drop_duplicates().groupby("depth")))
    acts = {}
    for (depth, part), stream in zip(parts.items(), every_token(model, texts, list(parts)).unbind(1)):
        on = on_passages(model, load_sae(model, int(depth)), texts, part["feature"].tolist(), stream)
        acts |= {(depth, feature): on.acts[:, i] for i, feature in enumerate(on.features)}
    found = [torch.stack([acts[r.depth, r.feature], acts[r.to, r.match]]) for r in pairs.itertuples()]
    return torch.stack([torch.corrcoef(both)[0, 1] for both in found])


def continuity(
    model: TransformerBridge, table: pd.DataFrame, frequency: dict[int, Float[Tensor, "d_sae"]], generator: Generator
) -> pd.DataFrame:
    """How far a table of features hangs together over depth, in three numbers: quantity, value, low, high.

    The share of features that continue at the next depth above chance (`onward`); Spearman's rho of their best cosine
    with each other (`among`) against the distance in depth; and the mean best cosine of the features of later depths
    minus that of depth 0, both with the features of later depths.
    """
    steps, cross = onward(model, table, frequency), among(model, table)
    cross["distance"] = (cross["depth"] - cross["to"]).abs()
    cross["name"] = cross["depth"].astype(str) + ":" + cross["feature"].astype(str)
    best = cross[cross["to"] > 0].groupby(["depth", "feature"])["cosine"].max().reset_index()
    later, first = (torch.tensor(best.loc[best["depth"].gt(0) == after, "cosine"].tolist()) for after in (True, False))
    numbers = {
        "share above chance at the next depth": share_interval(
            int(steps["above chance"].sum()), len(steps), CFG.confidence
        ),
        "Spearman's rho with distance": spearman(
            cross, "distance", "cosine", "name", generator, CFG.bootstrap_draws, CFG.confidence
        ),
        "later depths minus depth 0": (
            (later.mean() - first.mean()).item(),
            *difference_interval(later, first, generator),
        ),
    }
    return pd.DataFrame(
        [(name, *found) for name, found in numbers.items()], columns=["quantity", "value", "low", "high"]
    )


def cosine_table(cosines: Float[Tensor, "a a"], labels: Sequence) -> pd.DataFrame:
    """A square of cosines as rows: feature, other, cosine."""
    return square(labels, cosines, ("feature", "other", "cosine"))
