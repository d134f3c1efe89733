"""Does steering with an emotion's vector move what reading with it measures?

What is measured is what the model says next: how much likelier pleasant emotions are than unpleasant ones after a text
and the words "I was so". A vector *reads* it if its read-out goes with it over texts, and *writes* it if adding the
vector moves it on texts about nothing.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.config import CFG
from helpers.continuations import log_probs
from helpers.stats import interval, pearson
from helpers.steering import Steer, added

STEM = "I was so"


def named_next(
    model: TransformerBridge, texts: Sequence[str], words: Sequence[str], steer: Steer | None = None
) -> Float[Tensor, "text word"]:
    """Log probability (nats) of each word after each text and STEM."""
    asked = [f"{text} {STEM}" for text in texts]
    scores = log_probs(model, asked, [[f" {word}"] * len(asked) for word in words], steer)
    return torch.stack([torch.stack([score.sum() for score in option]) for option in scores], -1)


def pleasantness(log_probs: Float[Tensor, "*text word"], pleasant: Bool[Tensor, "word"]) -> Float[Tensor, "*text"]:
    """Mean log probability of the pleasant words minus that of the others, in nats."""
    return log_probs[..., pleasant].mean(-1) - log_probs[..., ~pleasant].mean(-1)


def reads(readouts: Float[Tensor, "text vector"], measured: Float[Tensor, "text"]) -> Float[Tensor, "vector"]:
    """Correlation over texts of each vector's read-out with what is measured."""
    return pearson(readouts.T, measured[None])


def writes(
    model: TransformerBridge,
    texts: Sequence[str],
    words: Sequence[str],
    depth: int,
    vectors: Float[Tensor, "vector d_model"],
) -> Float[Tensor, "vector word"]:
    """How much adding each vector raises each word's log probability, mean over texts, in nats.

    Half the difference between adding and subtracting it, so what moves both ways alike cancels.
    """
    signs = torch.stack([vectors, -vectors], 1).flatten(0, 1).repeat_interleave(len(texts), 0)
    found = named_next(model, list(texts) * (2 * len(vectors)), words, added(depth, signs))
    up, down = found.view(len(vectors), 2, len(texts), len(words)).mean(2).unbind(1)
    return (up - down) / 2


def of_random_sets(
    read: Float[Tensor, "vector"], write: Float[Tensor, "vector"], size: int, generator: Generator
) -> tuple[float, float, float]:
    """Correlation of reading with writing in sets of `size` of these vectors: median and quantiles over draws.

    Raises ValueError for a size that there are not enough vectors for.
    """
    if not 2 <= size <= len(read):
        raise ValueError(f"cannot draw sets of {size} from {len(read)} vectors")
    picks = torch.rand(CFG.permutation_draws, len(read), generator=generator).argsort(-1)[:, :size]
    drawn = pearson(read[picks], write[picks])
    return drawn.median().item(), *(end.item() for end in interval(drawn, CFG.confidence))
