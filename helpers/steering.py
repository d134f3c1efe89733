"""Changing the residual stream while the model runs: a vector added, a direction ablated, an SAE feature clamped.

A method says what is added to the stream, as a difference that a strength multiplies, so that a strength of 0 adds
exactly nothing. Which tokens are steered is always explicit, and position 0 is never among them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import site
from helpers.directions import unit
from helpers.stats import finite

Steered = Literal["prompt", "generated", "both"]


@runtime_checkable
class Method(Protocol):
    """A way to steer, in one or more draws: directions, features, random vectors."""

    def __len__(self) -> int:
        """How many draws there are."""

    def difference(
        self, resid: Float[Tensor, "row pos d_model"], draw: Int[Tensor, "row"]
    ) -> Float[Tensor, "row #pos d_model"]:
        """What a strength of 1 adds to the stream of each row, by the row's draw."""


@dataclass(frozen=True)
class Add:
    """Add a vector: the strength is a multiple of its length, so give it the length of what is to be one unit."""

    vectors: Float[Tensor, "draw d_model"]

    def __post_init__(self) -> None:
        finite(self.vectors, "the steering vectors")

    def __len__(self) -> int:
        return len(self.vectors)

    def difference(
        self, resid: Float[Tensor, "row pos d_model"], draw: Int[Tensor, "row"]
    ) -> Float[Tensor, "row 1 d_model"]:
        return self.vectors.to(resid)[draw][:, None]


@dataclass(frozen=True)
class Ablate:
    """Take out what lies along a direction (Arditi et al. 2024): all of it at strength 1, a share of it below.

    The vectors need not have length 1. With `centre`, where neutral text lies along the unit vectors, the stream is
    brought there instead of to 0.
    """

    vectors: Float[Tensor, "draw d_model"]
    centre: Float[Tensor, "draw"] | None = None

    def __post_init__(self) -> None:
        unit(self.vectors)  # refuses what is not finite
        if self.centre is not None:
            finite(self.centre, "the places to ablate to")
        if (self.vectors == 0).all(-1).any():
            raise ValueError("a zero vector has no direction to ablate")

    def __len__(self) -> int:
        return len(self.vectors)

    def difference(
        self, resid: Float[Tensor, "row pos d_model"], draw: Int[Tensor, "row"]
    ) -> Float[Tensor, "row pos d_model"]:
        along = unit(self.vectors).to(resid)[draw][:, None]
        target = 0 if self.centre is None else self.centre.to(resid)[draw][:, None, None]
        return (target - (resid * along).sum(-1, keepdim=True)) * along


@dataclass(frozen=True)
class Clamp:
    """Set a feature of an SAE to an activation `to`, the SAE's error term kept: only its decoder row is added.

    At strength w the feature has (1 - w) of its own activation and w of `to`; where it would not fire it may read as
    less. One draw per feature; `sae` comes from `saes.load_sae`. Raises ValueError for an SAE that rescales tokens.
    """

    sae: torch.nn.Module
    features: list[int]
    to: float

    def __post_init__(self) -> None:
        if (how := self.sae.cfg.normalize_activations) in ("layer_norm", "constant_norm_rescale"):
            raise ValueError(f"cannot clamp a feature of an SAE with activations in units of its own ({how})")
        if not math.isfinite(self.to):
            raise ValueError(f"cannot clamp a feature to {self.to}: give a number")
        if odd := [feature for feature in self.features if not 0 <= feature < self.sae.cfg.d_sae]:
            raise IndexError(f"feature {odd[0]} is out of range: the SAE has 0 to {self.sae.cfg.d_sae - 1}")

    def __len__(self) -> int:
        return len(self.features)

    def difference(
        self, resid: Float[Tensor, "row pos d_model"], draw: Int[Tensor, "row"]
    ) -> Float[Tensor, "row pos d_model"]:
        feature = torch.tensor(self.features, device=draw.device)[draw].to(self.sae.W_dec.device)
        acts = self.sae.encode(resid.to(self.sae.W_dec))  # of all features: some kinds of SAE let them compete
        own = acts.gather(-1, feature[:, None, None].expand(-1, acts.shape[1], 1))
        return ((self.to - own) * self.sae.W_dec[feature][:, None]).to(resid)


@dataclass(frozen=True)
class Steer:
    """How each run of a list is steered: a method at these depths, one of its draws, a strength, and the tokens."""

    method: Method
    depths: tuple[int, ...]
    draw: Int[Tensor, "run"]
    strength: Float[Tensor, "run"]
    which: Steered = "both"

    def __post_init__(self) -> None:
        finite(self.strength, "the strengths of steering")
        if len(self.draw) and not 0 <= int(self.draw.min()) <= int(self.draw.max()) < len(self.method):
            asked = sorted(set(self.draw.tolist()))
            raise ValueError(f"draws {asked} are asked for, but the method has {len(self.method)}, from 0 on")

    def of(self, run: int) -> str:
        """How one run is steered, in words."""
        depths = f"depth {self.depths[0]}" if len(self.depths) == 1 else f"depths {min(self.depths)} on"
        return f"a strength of {self.strength[run]:g} at {depths}"


def added(depth: int, vectors: Float[Tensor, "run d_model"], which: Steered = "both") -> Steer:
    """A vector of its own for every run, added at one depth."""
    return Steer(Add(vectors), (depth,), torch.arange(len(vectors)), torch.ones(len(vectors)), which)


@dataclass
class Steering:
    """What the hooks do during the present forward pass; assign to it between batches and decode steps.

    `mask` spans all positions of the text; `start` is the one at which the pass begins, which is 0 unless earlier
    positions stand in a KV cache. `entering` is called with the stream at the first steered depth, and `entry` is put
    in its place; `reading` is called with the depths to read and the stream there.
    """

    method: Method | None
    draw: Int[Tensor, "row"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    strength: Float[Tensor, "row"] = field(default_factory=lambda: torch.zeros(0))
    mask: Bool[Tensor, "row pos"] = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    start: int = 0
    entry: Float[Tensor, "row pos d_model"] | None = None
    entering: Callable[[Tensor], None] | None = None
    reading: Callable[[int, Tensor], None] | None = None

    def changed(self, resid: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """The steered stream: a new tensor, equal bit for bit where the strength is 0 or the mask False."""
        mask = self.mask[:, self.start : self.start + resid.shape[1], None].to(resid.device)
        if self.method is None or not mask.any():
            return resid
        strength = self.strength[:, None, None].to(resid)
        return torch.where(mask, resid + strength * self.method.difference(resid, self.draw.to(resid.device)), resid)


@contextmanager
def steered(model: TransformerBridge, steer: Steer | None, read_at: tuple[int, ...] = ()) -> Iterator[Steering]:
    """Steer the model while the block runs, once the Steering has been pointed at a batch; read at these depths.

    Raises what `check_fits` raises. The hooks are gone afterwards, also after an error.
    """
    depths = steer.depths if steer else ()
    check_fits(model, steer.method if steer else None, depths, read_at)
    steering = Steering(steer.method if steer else None)

    def enter(resid: Tensor, hook) -> Tensor:
        if steering.entering:
            steering.entering(resid)
        return resid if steering.entry is None else steering.entry

    def change(resid: Tensor, hook) -> Tensor:
        return steering.changed(resid)

    def reader(depth: int) -> Callable:
        def read(resid: Tensor, hook) -> None:
            if steering.reading:
                steering.reading(depth, resid)

        return read

    one_product = ("unembed.hook_in", lambda columns, hook: columns.contiguous())  # a slice would be a batch of them
    hooks = [one_product, (site(model, entry_depth(model, steer)), enter)]
    hooks += [(site(model, depth), change) for depth in depths]
    hooks += [(site(model, depth), reader(depth)) for depth in read_at]
    with model.hooks(fwd_hooks=hooks):
        yield steering


def check_fits(
    model: TransformerBridge, method: Method | None, depths: tuple[int, ...], read_at: tuple[int, ...] = ()
) -> None:
    """Raises ValueError for what a model cannot be steered or read with, before it runs.

    That is a depth that it lacks, vectors of another width than its stream, and reading below the first steered depth,
    where nothing changes.
    """
    for depth in (*depths, *read_at):
        site(model, depth)
    if depths and read_at and min(read_at) < min(depths):
        raise ValueError(f"steering at depth {min(depths)} does not reach depth {min(read_at)}: read at or above it")
    vectors = method.vectors if isinstance(method, Add | Ablate) else None
    if vectors is not None and vectors.shape[1] != (width := model.cfg.d_model):
        raise ValueError(f"vectors of {vectors.shape[1]} numbers do not fit {model.cfg.model_name}, d_model {width}")


def entry_depth(model: TransformerBridge, steer: Steer | None) -> int:
    """The depth of the first block whose work depends on the steering (of the last block, where nothing does)."""
    return min(*steer.depths, model.cfg.n_layers - 1) if steer else model.cfg.n_layers - 1


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
