"""Forward passes of many runs at once, sharing what they have in common.

Prompts are padded on the left with an explicit attention mask, so continuations are aligned and logits are computed
at their positions only. The blocks below the steered depth read every different prompt once, whatever the number of
strengths; from there on every run has a row of its own, and a KV cache that later tokens continue.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from helpers.prompts import first_token
from helpers.steering import Steer, Steering, entry_depth, steering_mask


@dataclass(frozen=True)
class Batch:
    """Left-padded prompts, then columns that wait for a continuation."""

    ids: Int[Tensor, "row pos"]
    real: Bool[Tensor, "row pos"]  # False at padding; True at the columns to come
    width: int  # of the prompts

    @property
    def positions(self) -> Int[Tensor, "row pos"]:
        return (self.real.cumsum(-1) - 1).clamp(min=0)

    @property
    def prompt(self) -> Bool[Tensor, "row pos"]:
        """True at the prompts' tokens, position 0 included."""
        return self.real & (torch.arange(self.ids.shape[1], device=self.real.device) < self.width)

    def rows(self, rows: Int[Tensor, "row"]) -> "Batch":
        return Batch(self.ids[rows], self.real[rows], self.width)


def left_padded(model: TransformerBridge, rows: Sequence[list[int]], room: int) -> Batch:
    """Prompts given as token ids, with `room` columns behind them, on the model's device."""
    width = max(len(ids) for ids in rows)
    ids = torch.full((len(rows), width + room), first_token(model))
    real = torch.zeros(len(rows), width + room, dtype=torch.bool)
    for row, row_ids in enumerate(rows):
        ids[row, width - len(row_ids) : width] = torch.tensor(row_ids)
        real[row, width - len(row_ids) :] = True
    return Batch(ids.to(model.cfg.device), real.to(model.cfg.device), width)


def forward(
    model: TransformerBridge, batch: Batch, start: int, end: int, cache: DynamicCache | None = None, logits: int = 1
):
    """The model's output for columns `start` to `end`, those before `start` standing in the cache."""
    return model.original_model(
        input_ids=batch.ids[:, start:end],
        attention_mask=batch.real[:, :end].long(),
        position_ids=batch.positions[:, start:end].clamp(max=model.cfg.n_ctx - 1),  # columns no row of which is read
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=logits,
    )


def pointed(model: TransformerBridge, steering: Steering, steer: Steer | None, runs: Tensor, batch: Batch) -> None:
    """Point the hooks at these runs, which are the rows of the batch."""
    steering.start = 0
    if steer is None:
        return
    continuation = batch.real & ~batch.prompt
    steering.mask = steering_mask(batch.prompt, continuation, steer.which)
    steering.draw = steer.draw[runs].to(batch.real.device)
    steering.strength = steer.strength[runs].to(batch.real.device)


def prefilled(
    model: TransformerBridge, batch: Batch, steering: Steering, steer: Steer | None, logits: int = 1
) -> tuple[DynamicCache, Float[Tensor, "row kept vocab"]]:
    """The cache of the batch's prompts, and the logits of their last columns.

    Runs inside `steering.steered`, pointed at the batch. Rows of the same prompt share all blocks below the first
    steered depth, and the whole pass where the prompt is not steered.
    """
    keys = [(tuple(ids), length) for ids, length in zip(batch.ids.tolist(), batch.real.sum(-1).tolist())]
    place = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    same = torch.tensor([place[key] for key in keys], device=batch.ids.device)
    rows = torch.tensor([keys.index(key) for key in place], device=batch.ids.device)  # the first of each prompt
    whole = steer is None or steer.which == "generated"
    once, cache = batch.rows(rows), _cache(model, batch.ids.shape[1])
    mask, reading = steering.mask, steering.reading
    steering.mask = torch.zeros_like(once.real)
    try:
        if whole:
            steering.reading = reading and (lambda depth, resid: reading(depth, resid[same.to(resid.device)]))
            out = forward(model, once, 0, batch.width, cache, logits)
            _select(cache, same)
            cache.activate_past_recording()  # so that a sliding window can be cropped after a continuation
            return cache, out.logits[same]
        stream = _entering(model, once, steering, cache)
    finally:
        steering.mask, steering.reading = mask, reading
    start, above = entry_depth(model, steer), _cache(model, batch.ids.shape[1])
    try:
        steering.entry = stream[same.to(stream.device)]
        with skipped(model, start):
            out = forward(model, batch, 0, batch.width, above, logits)
    finally:
        steering.entry = None
    _select(cache, same)
    above.layers[:start] = cache.layers[:start]
    above.activate_past_recording()
    return above, out.logits


def _select(cache: DynamicCache, rows: Int[Tensor, "row"]) -> None:
    """These rows of the cache, whose layers may lie on several devices."""
    for layer in cache.layers:
        if layer.is_initialized:
            layer.batch_select_indices(rows.to(layer.keys.device))


def _entering(model: TransformerBridge, batch: Batch, steering: Steering, cache: DynamicCache) -> Tensor:
    """What enters the first steered block; the pass stops there."""
    found = []

    def keep(resid: Tensor) -> None:
        found.append(resid)
        raise StopAtLayerException(resid)

    steering.entering = keep
    try:
        with suppress(StopAtLayerException):
            forward(model, batch, 0, batch.width, cache)
    finally:
        steering.entering = None
    return found[0]


@contextmanager
def skipped(model: TransformerBridge, count: int) -> Iterator[None]:
    """The first blocks pass on what they get, for the duration."""
    blocks = list(model.blocks)[:count]
    try:
        for block in blocks:
            object.__setattr__(block, "forward", lambda hidden_states, *_, **__: hidden_states)  # not of what it wraps
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


class _Roomy(DynamicLayer):
    """A cache layer with room for all tokens to come: a new one is written, where its parent copies all it holds."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._hold(key_states[:, :, :0], value_states[:, :, :0])
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        self.all_keys[:, :, start:end], self.all_values[:, :, start:end] = key_states, value_states
        self.keys, self.values = self.all_keys[:, :, :end], self.all_values[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._hold(self.keys[indices], self.values[indices])

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        """These states, in tensors with room behind them."""
        rows, heads, held = keys.shape[:3]
        self.all_keys = keys.new_empty(rows, heads, self.room, keys.shape[-1])
        self.all_values = values.new_empty(rows, heads, self.room, values.shape[-1])
        self.all_keys[:, :, :held], self.all_values[:, :, :held] = keys, values
        self.keys, self.values = self.all_keys[:, :, :held], self.all_values[:, :, :held]


def _cache(model: TransformerBridge, room: int) -> DynamicCache:
    cache = DynamicCache(config=model.original_model.config)
    cache.layers = [_Roomy(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
