"""Activation patching: put what one text left at a place into the run of another, and see what that changes.

Also called causal tracing or interchange intervention (Vig et al. 2020; Meng et al. 2022; Heimersheim & Nanda 2024 on
its use). Two texts are alike token by token but for one word; a run is one of them. What a swap cannot change is not
computed again: the blocks below it are skipped, the tokens before it stand in the KV cache.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformers import DynamicCache

from helpers.activations import batches, check_finite, checked_site, progress, site, tokens_at_once
from helpers.passes import skipped
from helpers.prompts import Tokens, tokens

Component = Literal["residual stream", "attention", "MLP", "heads"]
COMPONENTS = get_args(Component)
OUTPUTS: Mapping[Component, str] = {"attention": "hook_attn_out", "MLP": "hook_mlp_out", "heads": "attn.hook_z"}
Measure = Callable[[Float[Tensor, "row d_model"]], Float[Tensor, "row measure"]]


@dataclass(frozen=True)
class Runs:
    """Texts as they ran: their tokens, and what each component held at every token and layer (or depth)."""

    read: Tokens
    stream: Float[Tensor, "run pos depth d_model"]
    outputs: Mapping[Component, Float[Tensor, "run pos layer *width"]]
    attended: Sequence[tuple[Tensor, Tensor]]  # keys and values of every layer: run, head, pos, d_head

    @property
    def last(self) -> Float[Tensor, "run d_model"]:
        """What leaves the last block at the last token of every run."""
        rows = torch.arange(len(self.stream))
        return self.stream[rows, self.read.length.cpu() - 1, -1]

    def held(self, component: Component, layer: int) -> Float[Tensor, "run pos *width"]:
        """What a component held at every token; of the residual stream a layer is a depth."""
        return self.stream[:, :, layer] if component == "residual stream" else self.outputs[component][:, :, layer]

    def before(self, pos: int, runs: Int[Tensor, "row"]) -> DynamicCache:
        """The KV cache of these runs up to a position; a sliding window is left to the attention mask."""
        there = [(keys, values, runs.to(keys.device)) for keys, values in self.attended]
        return DynamicCache([(keys[rows, :, :pos], values[rows, :, :pos]) for keys, values, rows in there])


@dataclass(frozen=True)
class Swap:
    """Runs to change, one per row: which one, whose activations it gets, at which tokens, and where the giver has them.

    `heads` says of each row which heads are swapped (component "heads" only; all without it).
    """

    base: Int[Tensor, "row"]
    donor: Int[Tensor, "row"]
    places: Bool[Tensor, "row pos"]
    source: Int[Tensor, "row pos"]
    heads: Bool[Tensor, "row head"] | None = None


def ran(model: TransformerBridge, texts: Sequence[str], components: Sequence[Component] = COMPONENTS) -> Runs:
    """The texts run once, with everything kept that patching with these components needs.

    Raises ValueError for activations that are not finite.
    """
    read = tokens(model, texts)
    layers = range(model.cfg.n_layers)
    names = {depth: site(model, depth) for depth in range(model.cfg.n_layers + 1)}
    others = [each for each in components if each != "residual stream"]
    names |= {(each, layer): _site(model, each, layer) for each in others for layer in layers}
    found = {}

    def keep(key):
        def at_site(acts: Tensor, hook) -> None:
            found[key] = acts.float().cpu()
            if key == model.cfg.n_layers:
                raise StopAtLayerException(acts)

        return at_site

    hooks, cache = [(name, keep(key)) for key, name in names.items()], DynamicCache()
    with torch.no_grad(), model.hooks(fwd_hooks=hooks), suppress(StopAtLayerException):
        model.original_model(input_ids=read.ids, past_key_values=cache, use_cache=True)
    stream = torch.stack([found[depth] for depth in range(model.cfg.n_layers + 1)], 2)
    check_finite((stream.isfinite().all(-1) | ~read.real.cpu()[..., None]).all(1), texts)
    outputs = {each: torch.stack([found[each, layer] for layer in layers], 2) for each in others}
    return Runs(read, stream, outputs, [(layer.keys, layer.values) for layer in cache.layers])


def swapped(
    model: TransformerBridge,
    runs: Runs,
    swap: Swap,
    component: Component,
    layers: Sequence[int],
    measure: Measure,
) -> Float[Tensor, "layer row measure"]:
    """What `measure` reads off the last token when each row's swap is made at each of these layers (or depths).

    `measure` gets what leaves the last block. Raises ValueError for a place outside of a run's text, or of its giver's.
    """
    real = runs.read.real.cpu()
    inside = real[swap.base] & real[swap.donor].gather(1, swap.source)
    if (swap.places & ~inside).any():
        raise ValueError("a place to swap lies outside of its text")
    found = []
    with torch.no_grad(), progress(len(layers) * len(swap.base), "run", f"patching, {component}") as bar:
        for layer in layers:
            found.append(measure(_last(model, runs, swap, component, layer, bar.update)))
    return torch.stack(found)


def _site(model: TransformerBridge, component: Component, layer: int) -> str:
    if component == "residual stream":
        return site(model, layer)
    if component not in OUTPUTS:
        raise ValueError(f"unknown component {component!r}: choose from {', '.join(COMPONENTS)}")
    return checked_site(model, f"blocks.{layer}.{OUTPUTS[component]}")


def _last(
    model: TransformerBridge, runs: Runs, swap: Swap, component: Component, layer: int, done: Callable[[int], object]
) -> Float[Tensor, "row d_model"]:
    """What leaves the last block at the last token of every changed run."""
    n_layers, device, name = model.cfg.n_layers, model.cfg.device, _site(model, component, layer)
    new = _given(runs, swap, component, layer)
    length = runs.read.length.cpu()[swap.base]
    if component == "residual stream" and layer == n_layers:
        done(len(new))
        return new[torch.arange(len(new)), length - 1]
    found, entry = torch.empty(len(swap.base), model.cfg.d_model), min(layer, n_layers - 1)
    first = torch.where(swap.places.any(-1), swap.places.float().argmax(-1), length - 1)
    rows, read = torch.empty(0), slice(0)

    def enter(resid: Tensor, hook) -> Tensor:
        return runs.stream[swap.base[rows], read, entry].to(resid)

    def change(acts: Tensor, hook) -> Tensor:
        return new[rows, read].to(acts)

    def keep(resid: Tensor, hook) -> None:
        found[rows] = resid[torch.arange(len(rows)), length[rows].to(resid.device) - 1 - read.start].float().cpu()
        raise StopAtLayerException(resid)

    hooks = [(site(model, entry), enter), (name, change), (site(model, n_layers), keep)]
    with model.hooks(fwd_hooks=hooks), skipped(model, entry):
        for rows in batches(first, tokens_at_once(model)):
            read = slice(int(first[rows].min()), int(length[rows].max()))
            base = swap.base[rows].to(device)
            cache = runs.before(read.start, base)
            with suppress(StopAtLayerException):
                model.original_model(input_ids=runs.read.ids[base, read], past_key_values=cache, use_cache=True)
            done(len(rows))
    return found


def _given(runs: Runs, swap: Swap, component: Component, layer: int) -> Float[Tensor, "row pos *width"]:
    """What the component holds in each changed run: its own activations, the donor's at the places to swap."""
    held = runs.held(component, layer)
    own, other = held[swap.base], held[swap.donor[:, None], swap.source]
    where = swap.places.view(*swap.places.shape, *[1] * (held.ndim - 2))
    if swap.heads is not None:
        where = where & swap.heads[:, None, :, None]
    return torch.where(where, other, own)
