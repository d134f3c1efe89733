"""Vectors of many emotions at one depth, and the shape that they make.

Activations are topic x emotion x d_model, one text (or the mean of a few) in each place. A draw gives every emotion a
weight on every text: its own texts (`own`), its own texts of resampled topics (`resampled`), or texts that belong to
random emotions of the same topic (`shuffled`). What a draw yields is fitted anew from these weights.
"""

import torch
from jaxtyping import Bool, Float
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform
from torch import Generator, Tensor

from helpers.stats import bootstrap_picks, counts

Texts = Float[Tensor, "topic emotion d_model"]
Draws = Float[Tensor, "draw emotion text"]
Vectors = Float[Tensor, "*draw emotion d_model"]


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
    return means - means.mean(-2, keepdim=True)


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
    return scores.float(), (values / values.sum(-1, keepdim=True)).float()


def towards(
    scores: Float[Tensor, "*draw emotion component"], human: Float[Tensor, "emotion component"]
) -> Float[Tensor, "*draw emotion component"]:
    """The first components turned so that each goes up with the human rating in the same column."""
    first = scores[..., : human.shape[-1]]
    sign = (first * (human - human.mean(0))).sum(-2, keepdim=True).sign()
    return first * sign.where(sign != 0, 1)


def pearson(x: Float[Tensor, "*any row"], y: Float[Tensor, "*other row"]) -> Float[Tensor, "*both"]:
    """Pearson's r over the last axis; 0 where one side does not vary."""
    x, y = (each.double() - each.double().mean(-1, keepdim=True) for each in (x, y))
    size = x.norm(dim=-1) * y.norm(dim=-1)
    return ((x * y).sum(-1) / size.where(size > 0, 1)).float()


def similarity_of_geometries(
    a: Float[Tensor, "*draw depth pair"], b: Float[Tensor, "*draw depth pair"]
) -> Float[Tensor, "*draw depth depth"]:
    """Correlation of the cosine matrices (above the diagonal) of every depth of `a` with every depth of `b`.

    Representational similarity analysis (Kriegeskorte, Mur & Bandettini 2008).
    """
    return pearson(a[..., :, None, :], b[..., None, :, :])


def off_diagonal_mean(matrix: Float[Tensor, "*draw depth depth"]) -> Float[Tensor, "*draw"]:
    """Mean over pairs of different depths."""
    return matrix[..., ~torch.eye(matrix.shape[-1], dtype=torch.bool)].mean(-1)


def quadratic(
    depth: Float[Tensor, "depth"], curve: Float[Tensor, "*draw depth"]
) -> tuple[Float[Tensor, "*draw"], Float[Tensor, "*draw"]]:
    """Curvature (the coefficient of depth^2) of a least-squares parabola, and where in the depths' range it is lowest.

    A parabola that opens downwards is lowest at one of the ends.
    """
    design = torch.stack([depth**2, depth, torch.ones_like(depth)], -1).double()
    fit = torch.linalg.lstsq(design, curve.double().mT if curve.ndim > 1 else curve.double()[:, None]).solution
    low, high = depth.min().item(), depth.max().item()
    ends = torch.stack([_parabola(fit, low), _parabola(fit, high)])
    end = torch.where(ends[0] <= ends[1], low, high)
    vertex = (-fit[1] / (2 * fit[0])).clamp(low, high)
    lowest = torch.where(fit[0] > 0, vertex, end)
    return (fit[0].float(), lowest.float()) if curve.ndim > 1 else (fit[0, 0].float(), lowest[0].float())


def clustered(matrix: Float[Tensor, "emotion emotion"]) -> list[int]:
    """The order in which similar emotions stand together: average linkage on 1 - cosine, leaves ordered optimally."""
    distance = squareform((1 - matrix).clamp(min=0).fill_diagonal_(0).double().numpy(), checks=False)
    return leaves_list(optimal_leaf_ordering(linkage(distance, "average"), distance)).tolist()


def _of_topics(weights: Float[Tensor, "draw topic"], emotions: int) -> Draws:
    return torch.einsum("nt,ek->netk", weights, torch.eye(emotions)).flatten(2)


def _upper(size: int) -> Bool[Tensor, "row column"]:
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def _parabola(fit: Float[Tensor, "coefficient draw"], x: float) -> Float[Tensor, "draw"]:
    return fit[0] * x**2 + fit[1] * x + fit[2]
