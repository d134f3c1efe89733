"""Adding a vector to the residual stream while the model runs.

Which tokens are steered is always explicit, and position 0 is never among them. Strengths are multiples of the
median residual norm at the depth (`activations.residual_norms` on neutral text).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import site

Steered = Literal["prompt", "generated", "both"]


@dataclass
class Steering:
    """What is added where: `vectors` of the batch's rows, at the tokens where `mask` is True.

    `mask` spans all positions of the text; `start` is the one at which the present forward pass begins, which is 0
    unless earlier positions stand in a KV cache.
    """

    vectors: Float[Tensor, "row d_model"]
    mask: Bool[Tensor, "row pos"]
    start: int = 0

    def added_to(self, resid: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """The residual stream with the vectors added: a new tensor, equal bit for bit where a vector is zero."""
        mask = self.mask[:, self.start : self.start + resid.shape[1], None].to(resid)
        return resid + mask * self.vectors[:, None].to(resid)


@contextmanager
def steered(
    model: TransformerBridge,
    depth: int,
    vectors: Float[Tensor, "row d_model"],
    mask: Bool[Tensor, "row pos"],
) -> Iterator[Steering]:
    """Steer the model at a depth while the block runs; assign to the Steering between batches or decode steps.

    Raises ValueError for a depth that the model lacks, a non-finite vector, and a mask that includes
    position 0. The hook is gone afterwards, also after an error.
    """
    if not vectors.isfinite().all():
        raise ValueError("the steering vectors hold NaN or infinity")
    if mask[:, :1].any():
        raise ValueError("the mask steers position 0, which is never steered: see steering_mask")
    steering = Steering(vectors.to(model.cfg.device), mask.to(model.cfg.device))
    with model.hooks(fwd_hooks=[(site(model, depth), lambda resid, hook: steering.added_to(resid))]):
        yield steering


def steering_mask(
    prompt: Bool[Tensor, "row pos"], generated: Bool[Tensor, "row pos"], which: Steered
) -> Bool[Tensor, "row pos"]:
    """True at the tokens to steer: those of the prompt without its position 0, the generated ones, or both."""
    if which not in ("prompt", "generated", "both"):
        raise ValueError(f"unknown tokens to steer {which!r}: choose 'prompt', 'generated' or 'both'")
    begins = prompt & (prompt.cumsum(-1) == 1)
    mask = torch.zeros_like(prompt)
    if which != "generated":
        mask |= prompt & ~begins
    if which != "prompt":
        mask |= generated
    return mask
