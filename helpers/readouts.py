"""What a state of the residual stream reads as: its likeness to reference emotions, as published and corrected.

As published (Activation Lab 2026): raw cosine, mean absolute error, overlap of the largest coordinates. All states of a
stream share most of what they are, so raw numbers are high whatever is said. `centred_cosine` takes off what the
emotions share; `beyond_neutral` also what neutral text reads at the same place, and counts in the spread of that.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.preprocessing import SplineTransformer
from torch import Tensor
from torch.nn.functional import normalize
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import Position, residuals
from helpers.emotions import names as every_emotion
from helpers.emotions import neutral_situations, situations, synonyms
from helpers.geometry import away
from helpers.prompts import neutral_texts

States = Float[Tensor, "*state depth d_model"]
Readouts = Float[Tensor, "*state emotion depth"]


@dataclass(frozen=True)
class Background:
    """Neutral states, and how many tokens stood before each in its text."""

    states: Float[Tensor, "state depth d_model"]
    position: Int[Tensor, "state"]


@dataclass(frozen=True)
class References:
    """One centroid per emotion, and that of neutral texts, at every depth."""

    names: tuple[str, ...]
    centroids: Float[Tensor, "emotion depth d_model"]
    neutral: Float[Tensor, "depth d_model"]

    @property
    def axes(self) -> Float[Tensor, "emotion depth d_model"]:
        """Unit vectors from the mean of all centroids to each; zero at a depth where they are the same."""
        return normalize(away(self.centroids, self.centroids.mean(0)), dim=-1)


def from_texts(model: TransformerBridge, names: Sequence[str], position: Position) -> References:
    """Centroids of the training situations, which never name their emotion, read at a position.

    Raises ValueError for an emotion that data/emotions.csv lacks.
    """
    places = [_place(name) for name in names]
    told = situations("train")
    acts = residuals(model, told["text"][told["emotion"].isin(names)].tolist(), [position])[position]
    in_table = sorted(places)  # topics in turn, emotions in the order of `emotions.names`
    centroids = acts.unflatten(0, (-1, len(names))).mean(0)[[in_table.index(place) for place in places]]
    neutral = residuals(model, neutral_situations("train"), [position])[position].mean(0)
    return References(tuple(names), centroids, neutral)


def from_lexicon(model: TransformerBridge, names: Sequence[str]) -> References:
    """Centroids of the words that name each emotion, each word read by itself; neutral: the words of neutral texts."""
    for name in names:
        _place(name)
    lexicon = {name: sorted(synonyms()[name]) for name in names}
    banned = {word for words in synonyms().values() for word in words}
    ordinary = sorted(set(re.findall(r"[a-z]+", " ".join(neutral_texts()).lower())) - banned)
    groups = [*lexicon.values(), ordinary]
    acts = residuals(model, [f" {word}" for words in groups for word in words], ["last token"])["last token"]
    means = torch.stack([part.mean(0) for part in acts.split([len(words) for words in groups])])
    return References(tuple(names), means[:-1], means[-1])


def cosine(states: States, centroids: Float[Tensor, "emotion depth d_model"]) -> Readouts:
    """Raw cosine of every state with every centroid at its depth; 0 with a zero vector."""
    return torch.einsum("...ld,eld->...el", normalize(states, dim=-1), normalize(centroids, dim=-1))


def centred_cosine(states: States, references: References) -> Readouts:
    """Cosine of state and centroid after the mean of all centroids was taken from both; 0 with a zero vector."""
    centre = references.centroids.mean(0)
    return cosine(away(states, centre), away(references.centroids, centre))


def absolute_error(states: States, centroids: Float[Tensor, "emotion depth d_model"]) -> Readouts:
    """Mean over coordinates of the absolute difference, in units of the residual stream; lower is more alike."""
    found = [(states - centroid).abs().mean(-1) for centroid in centroids]
    return torch.stack(found, -2)


def overlap(states: States, centroids: Float[Tensor, "emotion depth d_model"], share: float = 0.01) -> Readouts:
    """Jaccard index of the largest coordinates (by size, this share of them, at least one) of state and centroid."""
    of_states, of_centroids = _largest(states, share), _largest(centroids, share)
    both = torch.einsum("...ld,eld->...el", of_states, of_centroids)
    return both / (2 * of_centroids[0, 0].sum() - both)


def beyond_neutral(
    states: States, position: Int[Tensor, "*state"], references: References, background: Background
) -> Readouts:
    """How much further each state lies along `References.axes` than neutral text does at that position, in its SDs.

    A stream changes along a text whatever the text says, so what neutral text reads depends on the position
    (`at_position`). The unit is the standard deviation of neutral states around it. Zero at a depth where nothing
    differs. Raises ValueError for fewer than ten neutral states.
    """
    if len(background.states) < 10:
        raise ValueError(f"a neutral background needs at least ten states, got {len(background.states)}")
    along, neutral = (torch.einsum("...ld,eld->...el", each, references.axes) for each in (states, background.states))
    expected = at_position(background, neutral, position)
    spread = (neutral - at_position(background, neutral, background.position)).std(0)
    floor = 1e-6 * background.states.norm(dim=-1).mean(0)  # below it only rounding is left
    return (along - expected) / spread.where(spread > floor, torch.inf)


def at_position(
    background: Background, values: Float[Tensor, "state *any"], position: Int[Tensor, "*other"]
) -> Float[Tensor, "..."]:
    """What the neutral states' values are expected to be at other positions: one of `values` for each position.

    A quadratic spline with three pieces in the logarithm of the position (fewer where many states share one), constant
    outside of the positions known. Raises ValueError for states that are all at one position.
    """
    where, wanted = (each.flatten().double().log1p()[:, None].numpy() for each in (background.position, position))
    knots = np.unique(np.quantile(where, np.linspace(0, 1, 4)))[:, None]
    if len(knots) < 2:
        raise ValueError(f"neutral states at two positions or more are needed, all are at {background.position[0]}")
    spline = SplineTransformer(knots=knots, degree=2, extrapolation="constant").fit(where)
    known, asked = (torch.from_numpy(spline.transform(each)).to(values) for each in (where, wanted))
    fitted = torch.linalg.lstsq(known, values.reshape(len(values), -1), driver="gelsd").solution
    return (asked @ fitted).view(*position.shape, *values.shape[1:])


@torch.no_grad()
def with_last_hidden(model: TransformerBridge, states: States) -> Float[Tensor, "*state more d_model"]:
    """The states with one more depth: the last one after the final norm, which libraries call the last hidden state."""
    rows = states[..., -1, :].to(next(model.original_model.parameters()))
    normed = model.ln_final(rows.reshape(1, -1, rows.shape[-1])).view_as(rows)
    return torch.cat([states, normed[..., None, :].to(states)], -2)


def _largest(states: States, share: float) -> Float[Tensor, "*state depth d_model"]:
    """1 at the largest coordinates, 0 elsewhere."""
    count = max(1, round(share * states.shape[-1]))
    return torch.zeros_like(states).scatter(-1, states.abs().topk(count, dim=-1).indices, 1.0)


def _place(name: str) -> int:
    if name not in every_emotion():
        raise ValueError(f"unknown emotion {name!r}: choose from {', '.join(every_emotion())}")
    return every_emotion().index(name)
