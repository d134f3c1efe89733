"""A subspace that tells a few emotions apart, fitted on labelled texts, and what it is worth on others.

Called "emotional backbone" where it was proposed (Activation Lab 2026). Activations are topic x emotion x d_model as in
`geometry`; a text belongs to the emotion whose mean is nearest within the subspace.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Generator, Tensor

from helpers.directions import covariance_matched, isotropic
from helpers.geometry import away
from helpers.stats import auroc

Way = Literal["means", "discriminants"]
WAYS = get_args(Way)
Texts = Float[Tensor, "topic emotion d_model"]


@dataclass(frozen=True)
class Subspace:
    """Orthonormal components, most separating first, the mean of the texts, and where each emotion's mean lies."""

    basis: Float[Tensor, "*draw component d_model"]
    centre: Float[Tensor, "d_model"]
    means: Float[Tensor, "*draw emotion component"]

    def places(self, acts: Float[Tensor, "topic emotion d_model"]) -> Float[Tensor, "*draw topic emotion component"]:
        """Where texts lie in the subspace, in units of the residual stream."""
        return torch.einsum("ted,...kd->...tek", away(acts, self.centre), self.basis)


def fitted(acts: Texts, way: Way, size: int) -> Subspace:
    """The subspace of `size` components that separates the emotions.

    "means": principal components of the emotions' means, the largest variance between emotions. "discriminants": the
    linear discriminants (Fisher 1936), which count it in the variance within emotions, with the shrinkage of Ledoit &
    Wolf (2004) since there are fewer texts than dimensions; where that has no inverse, as it has none at a depth where
    all texts read alike, they are the principal components. Raises ValueError for a size that K emotions do not have
    (1 to K - 1), and for an unknown way.
    """
    emotions = acts.shape[1]
    if not 1 <= size < emotions:
        raise ValueError(f"{emotions} emotions are told apart by 1 to {emotions - 1} components, not {size}")
    centre = acts.mean((0, 1))
    if way == "means":
        basis = _principal(acts)[:size]
    elif way == "discriminants":
        basis = _discriminants(acts, size)
    else:
        raise ValueError(f"unknown way {way!r}: choose from {', '.join(WAYS)}")
    return _with_means(acts, basis, centre)


def random(acts: Texts, size: int, draws: int, generator: Generator) -> dict[str, Subspace]:
    """Random subspaces of that size with the same emotions' means in them, one per draw: both kinds of directions.

    Where all texts read alike there is no covariance to match: both kinds are isotropic.
    """
    centre = acts.mean((0, 1))
    flat = away(acts, centre).flatten(0, 1)
    kinds = {"random, isotropic": isotropic(draws, size, acts.shape[-1], generator)}
    if flat.any():
        matched = covariance_matched(flat[:, None], draws * size, generator).view(draws, size, -1)
    else:
        matched = isotropic(draws, size, acts.shape[-1], generator)
    kinds["random, covariance-matched"] = matched
    bases = {name: torch.linalg.qr(vectors.mT).Q.mT for name, vectors in kinds.items()}
    return {name: _with_means(acts, basis, centre) for name, basis in bases.items()}


def distances(subspace: Subspace, acts: Texts) -> Float[Tensor, "*draw topic emotion mean"]:
    """How far each text lies from each emotion's mean within the subspace."""
    return (subspace.places(acts)[..., None, :] - subspace.means[..., None, None, :, :]).norm(dim=-1)


def accuracy(subspace: Subspace, acts: Texts, picks: Int[Tensor, "pick topic"] | None = None) -> Float[Tensor, "*any"]:
    """Share of texts nearest to their own emotion's mean: per draw of the subspace, or per pick of topics."""
    right = distances(subspace, acts).argmin(-1) == torch.arange(acts.shape[1])
    by_topic = right.float().mean(-1)
    return by_topic.mean(-1) if picks is None else by_topic[picks].mean(-1)


def separation(subspace: Subspace, acts: Texts) -> float:
    """Mean AUROC over emotions of nearness to the own mean, own texts against all others; finer than `accuracy`."""
    near, emotions = -distances(subspace, acts), acts.shape[1]
    found = []
    for emotion in range(emotions):
        others = [other for other in range(emotions) if other != emotion]
        along = near[..., emotion]
        found.append(auroc(along[:, emotion], along[:, others].flatten()))
    return torch.stack(found).mean().item()


def share_of_variance(subspace: Subspace, acts: Texts) -> Float[Tensor, "*draw"]:
    """Share of the texts' variance that lies within the subspace; 0 where all texts read alike."""
    spread = away(acts, acts.mean((0, 1)))
    within = torch.einsum("ted,...kd->...tek", spread, subspace.basis)
    return within.square().sum((-3, -2, -1)) / spread.square().sum().clamp(min=1e-12)


def chosen(
    train: Mapping[str, Float[Tensor, "topic emotion depth d_model"]],
    validation: Mapping[str, Float[Tensor, "other emotion depth d_model"]],
) -> pd.DataFrame:
    """Every position, way, size and depth with its separation of the validation texts, best first, small before large.

    Columns position, way, size, depth, separation.
    """
    rows = []
    for position, acts in train.items():
        for depth in range(acts.shape[2]):
            for way in WAYS:
                whole = fitted(acts[:, :, depth], way, acts.shape[1] - 1)
                for size in range(1, acts.shape[1]):
                    part = Subspace(whole.basis[:size], whole.centre, whole.means[:, :size])
                    rows.append((position, way, size, depth, separation(part, validation[position][:, :, depth])))
    table = pd.DataFrame(rows, columns=["position", "way", "size", "depth", "separation"])
    return table.sort_values(["separation", "size"], ascending=[False, True], kind="stable", ignore_index=True)


def _principal(acts: Texts) -> Float[Tensor, "component d_model"]:
    return torch.linalg.svd(away(acts.mean(0), acts.mean((0, 1))), full_matrices=False)[2]


def _discriminants(acts: Texts, size: int) -> Float[Tensor, "component d_model"]:
    spread = away(acts, acts.mean((0, 1)))
    scale = spread.square().sum(-1).mean().sqrt().clamp(min=1e-12)
    labels = list(range(acts.shape[1])) * len(acts)
    lda = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto")
    try:
        lda.fit((spread / scale).flatten(0, 1).double().numpy(), labels)
    except np.linalg.LinAlgError:  # no inverse
        return _principal(acts)[:size]
    return torch.linalg.qr(torch.from_numpy(lda.scalings_[:, :size]).float()).Q.T


def _with_means(acts: Texts, basis: Tensor, centre: Tensor) -> Subspace:
    return Subspace(basis, centre, torch.einsum("ed,...kd->...ek", away(acts.mean(0), centre), basis))
