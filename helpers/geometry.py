"""Vectors of many emotions at one depth, and the shape that they make.

Activations are topic x emotion x d_model, one text (or the mean of a few) in each place. A draw gives every emotion a
weight on every text: its own texts (`own`), its own texts of resampled topics (`resampled`), or texts that belong to
random emotions of the same topic (`shuffled`). What a draw yields is fitted anew from these weights.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform
from torch import Generator, Tensor

from helpers.config import CFG
from helpers.stats import bootstrap_picks, correlation, counts, pearson, permutation_p, standardised

Texts = Float[Tensor, "topic emotion d_model"]
Draws = Float[Tensor, "draw emotion text"]
Vectors = Float[Tensor, "*draw emotion d_model"]
AllDepths = Float[Tensor, "topic emotion depth d_model"]


def own(topics: int, emotions: int) -> Draws:
    """One draw: every emotion's own texts, each topic counting the same."""
    return _of_topics(torch.full((1, topics), 1 / topics), emotions)


def resampled(topics: int, emotions: int, generator: Generator, draws: int) -> Draws:
    """Bootstrap draws of topics, the same topics for every emotion."""
    return _of_topics(counts(bootstrap_picks(draws, topics, generator), topics), emotions)


def shuffled(topics: int, emotions: int, generator: Generator, draws: int) -> Draws:
    """The texts of each topic dealt out to the emotions at random: the null in which labels mean nothing."""
    dealt = torch.rand(draws, topics, emotions, generator=generator).argsort(-1)
    hot = torch.nn.functional.one_hot(dealt, emotions).transpose(1, 2)  # draw, emotion, topic, text of the topic
    return hot.flatten(2).float() / topics


def means(acts: Texts, draws: Draws) -> Vectors:
    """Mean activation of every emotion: the "raw" vectors."""
    return draws @ acts.flatten(0, 1)


def centred(means: Vectors) -> Vectors:
    """Mean minus mean over emotions (Anthropic 2026): what sets an emotion apart from the others.

    K such vectors add up to zero, so their mean pairwise cosine is near -1/(K-1) whatever the model does.
    """
    return away(means, means.mean(-2, keepdim=True))


def away(means: Vectors, base: Float[Tensor, "*base d_model"]) -> Vectors:
    """The means minus a base, exactly zero where only rounding is left: where all texts read alike, nothing differs."""
    left = means - base
    return left * (left.norm(dim=-1, keepdim=True) > 1e-5 * means.norm(dim=-1, keepdim=True))


def without(vectors: Vectors, components: Float[Tensor, "component d_model"]) -> Vectors:
    """The vectors with their part along these orthonormal components taken out."""
    return vectors - (vectors @ components.T) @ components


def principal_components(acts: Float[Tensor, "row d_model"], share: float) -> Float[Tensor, "component d_model"]:
    """The fewest first principal components that hold at least this share of the variance; none for 0.

    Raises ValueError for a share outside of 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share of variance lies between 0 and 1, got {share}")
    _, size, components = torch.linalg.svd(acts - acts.mean(0), full_matrices=False)
    if size[0] <= 1e-5 * acts.norm():
        return components[:0]
    held = size.double().pow(2).cumsum(0) / size.double().pow(2).sum()
    return components[: int((held < share - 1e-9).sum()) + (share > 0)]


def cosine_matrix(vectors: Vectors) -> Float[Tensor, "*draw emotion emotion"]:
    """Cosine of every emotion's vector with every other's; 0 with a zero vector."""
    length = vectors.norm(dim=-1, keepdim=True)
    one = vectors / length.where(length > 0, 1)
    return one @ one.mT


def pairs_of(matrix: Float[Tensor, "*draw emotion emotion"]) -> Float[Tensor, "*draw pair"]:
    """The entries above the diagonal, row after row."""
    return matrix[..., _upper(matrix.shape[-1])]


def mean_pairwise_cosine(vectors: Vectors) -> Float[Tensor, "*draw"]:
    """The published measure of separation: lower is taken for better separated."""
    return pairs_of(cosine_matrix(vectors)).mean(-1)


def anisotropy(acts: Texts) -> float:
    """Mean cosine of single texts of different topics and emotions (after Ethayarajh 2019).

    What two activations have in common although nothing they are about is the same.
    """
    topics, emotions = acts.shape[:2]
    alike = cosine_matrix(acts.flatten(0, 1))
    topic, emotion = torch.arange(topics).repeat_interleave(emotions), torch.arange(emotions).repeat(topics)
    other = (topic[:, None] != topic) & (emotion[:, None] != emotion)
    return alike[other].mean().item()


def components(vectors: Vectors) -> tuple[Float[Tensor, "*draw emotion component"], Float[Tensor, "*draw component"]]:
    """Where every emotion lies on the principal components of the vectors, and each component's share of variance.

    In the units of the residual stream; signs are arbitrary (`towards` turns them).
    """
    values, where = torch.linalg.eigh((centred(vectors) @ centred(vectors).mT).double())
    values, where = values.flip(-1).clamp(min=0), where.flip(-1)
    scores = where * values.sqrt()[..., None, :]
    total = values.sum(-1, keepdim=True)
    return scores.float(), (values / total.where(total > 0, 1)).float()


def towards(
    scores: Float[Tensor, "*draw emotion component"], human: Float[Tensor, "emotion rating"]
) -> Float[Tensor, "*draw emotion rating"]:
    """The first components turned so that each goes up with the human rating in the same column."""
    first = scores[..., : human.shape[-1]]
    sign = (first * (human - human.mean(0))).sum(-2, keepdim=True).sign()
    return first * sign.where(sign != 0, 1)


def placed(
    vectors: Float[Tensor, "emotion d_model"],
    human: pd.DataFrame,
    own: Mapping[str, Float[Tensor, "d_model"]] | None = None,
) -> pd.DataFrame:
    """Emotions on the first two components, turned towards valence and arousal, as `geometry_plots.emotion_map` wants.

    `human` is the table of `emotions.norms`. Vectors of one's `own`, from the mean that the others start at, lie where
    the same two components put them, without a valence. Columns emotion, x, y, valence, xlabel, ylabel.
    """
    vectors = centred(vectors)
    scores, shares = components(vectors)
    scores = towards(scores, torch.tensor(human[["valence", "arousal"]].to_numpy(), dtype=torch.float32))
    axes = vectors.T @ (scores / scores.pow(2).sum(0))
    table = pd.DataFrame(
        {"emotion": human["emotion"], "x": scores[:, 0].numpy(), "y": scores[:, 1].numpy(), "valence": human["valence"]}
    )
    added = [(name, *(vector @ axes).tolist(), float("nan")) for name, vector in (own or {}).items()]
    table = pd.concat([table, pd.DataFrame(added, columns=table.columns)], ignore_index=True) if added else table
    labels = {f"{axis}label": f"PC{i + 1} ({shares[i]:.0%} of variance)" for i, axis in enumerate("xy")}
    return table.assign(**labels)


def neighbours(
    vectors: Float[Tensor, "emotion d_model"], vector: Float[Tensor, "d_model"], names: Sequence[str]
) -> pd.DataFrame:
    """Every emotion's cosine with a vector, nearest first: emotion, cosine."""
    alike = cosine_matrix(torch.cat([vector[None], vectors]))[0, 1:]
    table = pd.DataFrame({"emotion": list(names), "cosine": alike.tolist()})
    return table.sort_values("cosine", ascending=False, ignore_index=True)


def rated(
    vectors: Float[Tensor, "emotion d_model"], human: pd.DataFrame, count: int, generator: Generator
) -> pd.DataFrame:
    """How each of the first components goes with human ratings: component, share, rating, r, low, high, null, p.

    `human` has one column per rating. r is without sign, its interval a bootstrap over emotions; `null` is the 95th
    percentile when ratings are dealt out to the emotions at random, and p the share of these at or above r.
    """
    scores, shares = components(vectors)
    order = torch.rand(CFG.permutation_draws, len(scores), generator=generator).argsort(-1)
    rows = []
    for rating in human:
        rated = torch.tensor(human[rating].to_numpy(), dtype=torch.float32)
        for component in range(count):
            along = scores[:, component]
            r, low, high = correlation(along, rated, generator, CFG.bootstrap_draws, CFG.confidence)
            r, low, high = (r, low, high) if r >= 0 else (-r, -high, -low)
            if not along.any():  # all vectors are zero
                r, low, high = 0.0, 0.0, 0.0
            null = pearson(along, rated[order]).abs()
            p = permutation_p(torch.tensor(r), null).item()
            limit = null.quantile(0.95).item()
            rows.append((component + 1, shares[component].item(), rating, r, low, high, limit, p))
    return pd.DataFrame(rows, columns=["component", "share", "rating", "r", "low", "high", "null", "p"])


def similarity_of_geometries(
    a: Float[Tensor, "*draw depth pair"], b: Float[Tensor, "*draw depth pair"]
) -> Float[Tensor, "*draw depth depth"]:
    """Correlation of the cosine matrices (above the diagonal) of every depth of `a` with every depth of `b`.

    Representational similarity analysis (Kriegeskorte, Mur & Bandettini 2008).
    """
    return (standardised(a) @ standardised(b).mT).float()


def off_diagonal_mean(matrix: Float[Tensor, "*draw depth depth"]) -> Float[Tensor, "*draw"]:
    """Mean over pairs of different depths."""
    return matrix[..., ~torch.eye(matrix.shape[-1], dtype=torch.bool)].mean(-1)


def cosine_curves(
    acts: AllDepths, neutral: Float[Tensor, "neutral depth d_model"], draws: Draws
) -> dict[str, Float[Tensor, "draw depth"]]:
    """Mean pairwise cosine at every depth of "raw", "minus neutral" and "centred" vectors, in every draw."""
    found: dict[str, list[Tensor]] = {"raw": [], "minus neutral": [], "centred": []}
    for depth in range(acts.shape[2]):
        raw = means(acts[:, :, depth], draws)
        for name, vectors in (
            ("raw", raw),
            ("minus neutral", away(raw, neutral[:, depth].mean(0))),
            ("centred", centred(raw)),
        ):
            found[name].append(mean_pairwise_cosine(vectors))
    return {name: torch.stack(drawn, -1) for name, drawn in found.items()}


def geometries(acts: AllDepths, draws: Draws) -> Float[Tensor, "draw depth pair"]:
    """Cosines of all pairs of centred vectors at every depth, in every draw."""
    return torch.stack([pairs_of(cosine_matrix(centred(means(acts[:, :, d], draws)))) for d in range(acts.shape[2])], 1)


def quadratic(
    depth: Float[Tensor, "depth"], curves: Float[Tensor, "draw depth"]
) -> tuple[Float[Tensor, "draw coefficient"], Float[Tensor, "draw"]]:
    """Square, linear and constant coefficient of each curve's least-squares parabola, and where that is lowest.

    Within the range of the depths: a parabola that opens downwards is lowest at one of the ends.
    """
    design = torch.stack([depth**2, depth, torch.ones_like(depth)], -1).double()
    fit = torch.linalg.lstsq(design, curves.double().T).solution.T
    ends = torch.stack([depth.min(), depth.max()]).double()
    turn = (-fit[:, 1] / (2 * fit[:, 0])).nan_to_num(ends[0].item()).clamp(*ends.tolist())
    candidates = torch.cat([ends.expand(len(fit), 2), turn[:, None]], 1)
    height = fit[:, :1] * candidates**2 + fit[:, 1:2] * candidates + fit[:, 2:]
    lowest = candidates.gather(1, height.argmin(1, keepdim=True))[:, 0]
    return fit.float(), lowest.float()


def clustered(matrix: Float[Tensor, "emotion emotion"]) -> list[int]:
    """The order in which similar emotions stand together: average linkage on 1 - cosine, leaves ordered optimally."""
    distance = squareform((1 - matrix).clamp(min=0).fill_diagonal_(0).double().numpy(), checks=False)
    return leaves_list(optimal_leaf_ordering(linkage(distance, "average"), distance)).tolist()


def ordered(vectors: Float[Tensor, "emotion d_model"], names: Sequence[str]) -> pd.DataFrame:
    """Cosines of the vectors as rows, similar emotions together: emotion, other, cosine."""
    matrix = cosine_matrix(vectors)
    order = clustered(matrix)
    return square([names[i] for i in order], matrix[order][:, order], ("emotion", "other", "cosine"))


def square(labels: Sequence, values: Float[Tensor, "a a"], columns: tuple[str, str, str]) -> pd.DataFrame:
    """A square matrix as rows, with these names for its rows, columns and values."""
    wide = pd.DataFrame(values.tolist(), labels, labels).rename_axis(columns[0])
    return wide.melt(var_name=columns[1], value_name=columns[2], ignore_index=False).reset_index()


def _of_topics(weights: Float[Tensor, "draw topic"], emotions: int) -> Draws:
    return torch.einsum("nt,ek->netk", weights, torch.eye(emotions)).flatten(2)


def _upper(size: int) -> Bool[Tensor, "row column"]:
    return torch.ones(size, size, dtype=torch.bool).triu(1)
