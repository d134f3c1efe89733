"""Directions in the residual stream, one unit vector per depth, and what they are compared with."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.prompts import vocabulary
from helpers.stats import finite


def mean_gap(
    emotional: Float[Tensor, "emotional *depth d_model"], neutral: Float[Tensor, "neutral *depth d_model"]
) -> Float[Tensor, "*depth d_model"]:
    """Mean emotional activation minus mean neutral one, in the units of the residual stream.

    The groups may differ in size. Raises ValueError when one is empty or holds a non-finite value.
    """
    if len(emotional) == 0 or len(neutral) == 0:
        raise ValueError("a difference in means needs at least one emotional and one neutral activation")
    origin = neutral[0]  # subtracted first, so that no rounding is left where all are the same
    gap = (emotional - origin).mean(0) - (neutral - origin).mean(0)
    if not gap.isfinite().all():
        raise ValueError("non-finite activations: the difference in means would be NaN")
    return gap


def mean_difference(
    emotional: Float[Tensor, "emotional *depth d_model"], neutral: Float[Tensor, "neutral *depth d_model"]
) -> Float[Tensor, "*depth d_model"]:
    """Unit vector from the mean neutral activation to the mean emotional one, at every depth.

    Zero at a depth where the two means are the same. Raises ValueError like `mean_gap`, and when that is every depth.
    """
    return unit(mean_gap(emotional, neutral))


def logistic_probe(
    emotional: Float[Tensor, "emotional depth d_model"], neutral: Float[Tensor, "neutral depth d_model"]
) -> Float[Tensor, "depth d_model"]:
    """Unit normal of the plane that logistic regression puts between the two groups, at every depth.

    L2-regularised (scikit-learn's C = 1) on activations scaled to a mean squared distance of 1 from their mean.
    Zero where the activations do not differ. Raises ValueError like `mean_gap`.
    """
    mean_gap(emotional, neutral)  # refuses what has no difference
    both = torch.cat([emotional, neutral]) - neutral[0]
    centred = both - both.mean(0)
    scale = centred.square().sum(-1).mean(0).sqrt()
    side = torch.arange(len(both)) < len(emotional)
    normals = torch.zeros(both.shape[1:])
    for depth in (scale > 0).nonzero()[:, 0].tolist():
        fitted = LogisticRegression(max_iter=1000).fit(centred[:, depth] / scale[depth], side)
        normals[depth] = torch.from_numpy(fitted.coef_[0]).float()
    return unit(normals)


def refitted(
    gaps: Float[Tensor, "pair depth d_model"], weights: Float[Tensor, "draw pair"]
) -> Float[Tensor, "draw depth d_model"]:
    """The difference-in-means direction of every draw, fitted anew with these weights on the pairs.

    Bootstrap counts give resampled pairs; signs of +1 and -1 swap emotional and neutral within pairs.
    """
    return unit(torch.einsum("np,pld->nld", weights, gaps))


def isotropic(draws: int, depths: int, d_model: int, generator: Generator) -> Float[Tensor, "draw depth d_model"]:
    """Random unit vectors, every direction equally likely."""
    return unit(torch.randn(draws, depths, d_model, generator=generator))


def covariance_matched(
    acts: Float[Tensor, "row depth d_model"], draws: int, generator: Generator
) -> Float[Tensor, "draw depth d_model"]:
    """Random unit vectors along draws from a Gaussian with the activations' own covariance at each depth.

    They favour the directions in which the stream varies most, as a fitted direction also does.
    """
    centred = acts - acts.mean(0)
    return unit(torch.einsum("nr,rld->nld", torch.randn(draws, len(acts), generator=generator), centred))


def random_directions(
    acts: Float[Tensor, "row depth d_model"], draws: int, generator: Generator
) -> dict[str, Float[Tensor, "draw depth d_model"]]:
    """Both kinds of random direction, by the name that figures give them."""
    return {
        "random, isotropic": isotropic(draws, *acts.shape[1:], generator),
        "random, covariance-matched": covariance_matched(acts, draws, generator),
    }


def projections(
    acts: Float[Tensor, "row depth d_model"], directions: Float[Tensor, "*draw depth d_model"]
) -> Float[Tensor, "*draw depth row"]:
    """Where each activation lies along each direction of its depth, in the units of the residual stream."""
    return torch.einsum("rld,...ld->...lr", acts, finite(directions, "the directions"))


def logit_lens(
    model: TransformerBridge, directions: Float[Tensor, "depth d_model"], depths: Sequence[int], top: int = 10
) -> pd.DataFrame:
    """The tokens that a direction raises most and least: the model's final norm and unembedding applied to it.

    Columns depth, side ("raised" or "lowered"), rank (1 is strongest), token, logit. What the final norm adds to a
    zero vector is taken off. (The logit lens: nostalgebraist 2020.) Raises ValueError for a depth without a direction
    and for directions that are not finite.
    """
    if odd := [depth for depth in depths if not 0 <= depth < len(directions)]:
        raise ValueError(f"depth {odd[0]} is out of range: there are directions for depths 0 to {len(directions) - 1}")
    logits = lens(model, directions[list(depths)])
    rows = []
    for depth, row in zip(depths, logits):
        for side, sign in (("raised", 1), ("lowered", -1)):
            best = (sign * row).topk(top).indices.tolist()
            rows += [(depth, side, rank, model.tokenizer.decode([i]), row[i].item()) for rank, i in enumerate(best, 1)]
    return pd.DataFrame(rows, columns=["depth", "side", "rank", "token", "logit"])


@torch.no_grad()
def lens(model: TransformerBridge, vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "vector vocab"]:
    """The logits of each vector under the final norm and unembedding, minus what the norm adds to a zero vector.

    Those of the tokens that the tokenizer has (`prompts.vocabulary`).
    """
    rows = finite(vectors, "the vectors to unembed").to(next(model.original_model.parameters()))
    through = model.unembed(model.ln_final(torch.cat([rows, torch.zeros_like(rows[:1])])[None]))[0].float()
    return (through[:-1] - through[-1])[:, : vocabulary(model)].cpu()


def logits(
    model: TransformerBridge, stream: Float[Tensor, "row d_model"], ids: Sequence[int] | None = None
) -> Float[Tensor, "row token"]:
    """The logits of some tokens (all without) that final norm and unembedding make of rows of the stream."""
    with torch.no_grad():
        rows = stream.to(next(model.original_model.parameters()))
        found = model.unembed(model.ln_final(rows[None]))[0]
        if (cap := model.cfg.output_logits_soft_cap) > 0:  # Gemma 2 bends its logits
            found = cap * (found / cap).tanh()
        return (found if ids is None else found[:, list(ids)]).float().cpu()


def unit(vectors: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
    """The vectors at length 1; a zero vector stays zero.

    One depth may have none: where every text ends in the same token, its embedding is the same on both sides.
    Raises ValueError when all vectors are zero or one is not finite.
    """
    norm = vectors.norm(dim=-1, keepdim=True)
    if not (norm.isfinite().all() and (norm > 0).any()):
        raise ValueError("a zero or non-finite vector has no direction: are the two groups of texts identical?")
    return vectors / norm.where(norm > 0, 1)
