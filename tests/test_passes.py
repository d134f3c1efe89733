"""Prefills of many runs at once, against plain passes of one unpadded prompt each."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from helpers.activations import site
from helpers.passes import Batch, _cache, forward, left_padded, pointed, prefilled
from helpers.steering import Ablate, Add, Steer, Steering, steered

# Longer than the tiny models' sliding window of 16 tokens, short, a prompt that comes three times, a longer BOS.
LONG = [0, *range(300, 322)]
ROWS = [[0, 311, 52], LONG, [0, 8, 8, 1234, 77], [0, 311, 52], [0, 0, 311, 52], LONG, [0, 311, 52]]
AFTER = [[5, 900, 17, 4000], [6, 6, 6, 6], [7, 81, 9, 2], [5, 900, 17, 4000], [44, 1, 3, 3], [70, 71, 72, 73], [9] * 4]
DIFFERENT, WIDTH, ROOM = 4, len(LONG), 4
DRAW = torch.tensor([2, 0, 1, 0, 2, 2, 1])
STRENGTH = torch.tensor([1.0, 2.0, 0.0, -1.0, 0.5, -0.5, 1.5])
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
HOW = pytest.mark.parametrize("how", ["unsteered", "prompt", "generated", "both", "ablated"])
DEPTHS = pytest.mark.parametrize("depth", [0, 1, 3])  # 3: what leaves the last block
ERRORS = pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])


@HOW
@DEPTHS
def test_a_prefill_gives_the_logits_and_the_cache_of_a_plain_pass(any_model: TransformerBridge, how: str, depth: int):
    steer = _steer(any_model, how, depth)
    with batched(any_model, steer) as (batch, steering):
        cache, logits = prefilled(any_model, batch, steering, steer)
    assert logits.shape[:2] == (len(ROWS), 1)
    for row, ids in enumerate(ROWS):
        plain, expected = _plain(any_model, ids, steer, row)
        torch.testing.assert_close(logits[row], expected[-1:], **CLOSE)
        for found, wanted in zip(cache.layers, plain.layers, strict=True):
            here = min(len(ids), getattr(found, "sliding_window", 99) - 1)
            for kept, own in ((found.keys, wanted.keys), (found.values, wanted.values)):
                assert own.shape[-2] == here
                torch.testing.assert_close(kept[row, :, -here:], own[0], **CLOSE)


@HOW
@DEPTHS
def test_a_prefills_cache_is_continued_as_a_plain_pass(any_model: TransformerBridge, how: str, depth: int):
    """All tokens at once, then again one by one after they have been taken back."""
    steer = _steer(any_model, how, depth)
    with batched(any_model, steer) as (batch, steering):
        cache, _ = prefilled(any_model, batch, steering, steer)
        steering.start, end = WIDTH, WIDTH + ROOM
        written = Batch(torch.cat([batch.ids[:, :WIDTH], torch.tensor(AFTER)], 1), batch.real, WIDTH)
        together = forward(any_model, written, WIDTH, end, cache, ROOM).logits
        cache.crop(-ROOM)
        singly = []
        for steering.start in range(WIDTH, end):
            singly.append(forward(any_model, written, steering.start, steering.start + 1, cache).logits)
    for row, (ids, after) in enumerate(zip(ROWS, AFTER)):
        expected = _plain(any_model, ids, steer, row, after)[1][-ROOM:]
        torch.testing.assert_close(together[row], expected, **CLOSE)
        torch.testing.assert_close(torch.cat(singly, 1)[row], expected, **CLOSE)


def test_steering_moves_what_these_tests_compare(any_model: TransformerBridge):
    for how in ("prompt", "generated", "both", "ablated"):
        for row in (0, 1, 4):
            (bare, before), (cache, after) = (
                _plain(any_model, ROWS[row], s, row, AFTER[row]) for s in (None, _steer(any_model, how, 1))
            )
            moved = ((before - after).abs() > 1e-3).any(-1)
            prompt, written = moved[1 : len(ROWS[row])], moved[-ROOM:]
            assert not moved[0] and written.any()
            assert prompt.any() == (how != "generated")
            assert not torch.allclose(bare.layers[-1].keys, cache.layers[-1].keys, atol=1e-3)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_prefill_gives_as_many_logits_as_it_is_asked_for(model: TransformerBridge, kept: int):
    for steer in (None, _steer(model, "prompt", 1)):
        with batched(model, steer) as (batch, steering):
            logits = prefilled(model, batch, steering, steer, kept)[1]
        for row, ids in enumerate(ROWS):
            torch.testing.assert_close(logits[row], _plain(model, ids, steer, row)[1][-kept:], **CLOSE)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_blocks_below_the_steered_depth_read_every_different_prompt_once(any_model: TransformerBridge, depth: int):
    for how in ("prompt", "both", "ablated"):
        steer = _steer(any_model, how, depth)
        rows = [DIFFERENT if block < min(depth, 2) else len(ROWS) for block in range(3)]
        assert _rows_read(any_model, steer) == [[count] for count in rows]


@pytest.mark.parametrize("how", ["unsteered", "generated"])
def test_a_prompt_that_is_not_steered_is_read_once(any_model: TransformerBridge, how: str):
    assert _rows_read(any_model, _steer(any_model, how, 1)) == [[DIFFERENT]] * 3


def test_prompts_that_differ_by_a_leading_bos_are_told_apart(any_model: TransformerBridge):
    """Padding is BOS, so the ids of the two rows are equal."""
    rows = [[0, 311, 52], [0, 0, 311, 52], [0, 311, 52]]
    for steer in (None, _steer(any_model, "prompt", 1)):
        with batched(any_model, steer, rows) as (batch, steering):
            logits = prefilled(any_model, batch, steering, steer)[1]
        assert torch.equal(batch.ids[0], batch.ids[1])
        expected = torch.stack([_plain(any_model, ids, steer, row)[1][-1:] for row, ids in enumerate(rows)])
        torch.testing.assert_close(logits, expected, **CLOSE)
        assert not torch.allclose(logits[0], logits[1], atol=1e-3)
    assert _rows_read(any_model, None, rows) == [[2]] * 3


def test_what_is_read_during_a_prefill_has_a_row_per_run(any_model: TransformerBridge):
    for how in ("unsteered", "prompt", "generated", "both"):
        steer, seen = _steer(any_model, how, 1), []
        with batched(any_model, steer, read_at=(1, 3)) as (batch, steering):
            steering.reading = lambda depth, resid, seen=seen: seen.append((depth, resid))
            prefilled(any_model, batch, steering, steer)
        assert [depth for depth, _ in seen] == [1, 3]
        for row, ids in enumerate(ROWS):
            expected = _plain_streams(any_model, ids, steer, row)
            for depth, resid in seen:
                torch.testing.assert_close(resid[row, -len(ids) :], expected[depth], **CLOSE)


def test_a_prefill_leaves_the_steering_pointed_at_its_batch(model: TransformerBridge):
    for how in ("unsteered", "prompt", "generated", "both"):
        steer = _steer(model, how, 1)
        with batched(model, steer) as (batch, steering):
            before = copy.copy(steering)
            first = prefilled(model, batch, steering, steer)[1]
            assert all(getattr(steering, name) is value for name, value in vars(before).items())
            assert torch.equal(prefilled(model, batch, steering, steer)[1], first)


@ERRORS
@pytest.mark.parametrize("how", ["unsteered", "prompt"])
@pytest.mark.parametrize("block", [0, 1, 2], ids=["while sharing", "at the depth", "above it"])
def test_nothing_stays_replaced_after_an_error_in_a_prefill(
    any_model: TransformerBridge, error: type[BaseException], how: str, block: int
):
    def fail(resid: Tensor, hook) -> None:
        raise error

    steer = _steer(any_model, how, 1)
    logits = _plain(any_model, LONG, None, 0)[1]
    with batched(any_model, steer) as (batch, steering):
        before, first = copy.copy(steering), prefilled(any_model, batch, steering, steer)[1]
        with pytest.raises(error), any_model.hooks(fwd_hooks=[(f"blocks.{block}.attn.hook_out", fail)]):
            prefilled(any_model, batch, steering, steer)
        assert not _replaced(any_model)
        assert all(getattr(steering, name) is value for name, value in vars(before).items())
        assert torch.equal(prefilled(any_model, batch, steering, steer)[1], first)
    assert not [name for name, point in any_model.hook_dict.items() if point.fwd_hooks]
    assert torch.equal(_plain(any_model, LONG, None, 0)[1], logits)


def test_the_blocks_below_are_put_back_after_a_prefill(any_model: TransformerBridge):
    replaced, steer = [], _steer(any_model, "prompt", 2)
    logits = _plain(any_model, LONG, None, 0)[1]
    with batched(any_model, steer) as (batch, steering):
        watched = [("blocks.2.attn.hook_out", lambda resid, hook: replaced.append(_replaced(any_model)))]
        with any_model.hooks(fwd_hooks=watched):
            prefilled(any_model, batch, steering, steer)
    assert replaced == [[0, 1]] and not _replaced(any_model)
    assert torch.equal(_plain(any_model, LONG, None, 0)[1], logits)


def test_the_roomy_cache_holds_what_the_library_s_holds(any_model: TransformerBridge):
    """Through a prefill, a continuation taken back, rows chosen anew, and decode steps; without a copy per step."""
    batch = left_padded(any_model, ROWS, ROOM)
    ids = torch.cat([batch.ids[:, :WIDTH], torch.tensor(AFTER)], 1)
    chosen = torch.tensor([4, 1, 1, 6, 0, 2, 5])
    roomy, plain = _cache(any_model, WIDTH + ROOM), DynamicCache(config=any_model.original_model.config)
    assert DynamicLayer not in map(type, roomy.layers)  # the others keep a sliding window

    def step(rows: Tensor, start: int, end: int) -> None:
        now = Batch(ids[rows], batch.real[rows], WIDTH)
        with torch.no_grad():
            logits = [forward(any_model, now, start, end, cache).logits for cache in (roomy, plain)]
        assert torch.equal(*logits)
        same()

    def same() -> None:
        for ours, theirs in zip(roomy.layers, plain.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert roomy.get_seq_length() == plain.get_seq_length()

    step(torch.arange(7), 0, WIDTH)
    for cache in (roomy, plain):
        cache.activate_past_recording()
    step(torch.arange(7), WIDTH, WIDTH + 3)
    for cache in (roomy, plain):
        cache.crop(-3)
        cache.batch_select_indices(chosen)
    same()
    for start in range(WIDTH, WIDTH + ROOM):
        places = _places(roomy)
        step(chosen, start, start + 1)
        assert _places(roomy) == places


def test_chosen_rows_have_room_of_their_own(model: TransformerBridge, generator: Generator):
    """What is written to a row does not reach the others of the same prompt."""
    layer, states = _cache(model, 8).layers[0], torch.randn(2, 3, 4, 5, generator=generator)
    layer.update(states, 2 * states)
    layer.batch_select_indices(torch.tensor([1, 1, 0]))
    new = torch.randn(3, 3, 2, 5, generator=generator)
    keys, values = layer.update(new, 3 * new)
    assert torch.equal(keys, torch.cat([states[[1, 1, 0]], new], 2))
    assert torch.equal(values, torch.cat([2 * states[[1, 1, 0]], 3 * new], 2))
    assert layer.get_seq_length() == 6


def test_a_layer_that_was_skipped_has_no_rows_to_choose(model: TransformerBridge):
    layer = _cache(model, 8).layers[0]
    layer.batch_select_indices(torch.tensor([0, 0]))
    assert layer.get_seq_length() == 0


def test_prompts_are_padded_on_the_left_and_have_room_behind(model: TransformerBridge):
    batch = left_padded(model, [[0, 5], [0, 7, 8, 9]], room=2)
    assert batch.ids[:, :4].tolist() == [[0, 0, 0, 5], [0, 7, 8, 9]]
    assert batch.real.int().tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6]
    assert batch.prompt.int().tolist() == [[0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert batch.positions.tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert batch.width == 4
    turned = batch.rows(torch.tensor([1, 0, 1]))
    assert torch.equal(turned.ids, batch.ids[[1, 0, 1]]) and torch.equal(turned.real, batch.real[[1, 0, 1]])


def test_the_hooks_are_pointed_at_the_runs_of_the_batch(model: TransformerBridge):
    runs = torch.tensor([5, 0])
    steer = _steer(model, "both", 1)
    with steered(model, steer) as steering:
        steering.start = 7
        batch = left_padded(model, [ROWS[5], ROWS[0]], ROOM)
        pointed(model, steering, steer, runs, batch)
        assert (steering.start, steering.draw.tolist(), steering.strength.tolist()) == (0, [2, 2], [-0.5, 1.0])
        assert steering.mask.sum(-1).tolist() == [WIDTH - 1 + ROOM, 2 + ROOM]
        assert not (steering.mask & (batch.positions == 0)).any()


@contextmanager
def batched(
    model: TransformerBridge, steer: Steer | None, rows: list[list[int]] = ROWS, read_at: tuple[int, ...] = ()
) -> Iterator[tuple[Batch, Steering]]:
    """The rows as one batch, at which the hooks are pointed."""
    with torch.no_grad(), steered(model, steer, read_at) as steering:
        batch = left_padded(model, rows, ROOM)
        pointed(model, steering, steer, torch.arange(len(rows)), batch)
        yield batch, steering


def _steer(model: TransformerBridge, how: str, depth: int) -> Steer | None:
    """A vector per run added at the depth, or its direction ablated there and at all depths above."""
    if how == "unsteered":
        return None
    vectors = 2 * torch.randn(3, model.cfg.d_model, generator=torch.Generator().manual_seed(3))
    if how == "ablated":
        return Steer(Ablate(vectors), tuple(range(depth, model.cfg.n_layers + 1)), DRAW, STRENGTH, "both")
    return Steer(Add(vectors), (depth,), DRAW, STRENGTH, how)


def _changes(steer: Steer | None, row: int, n_prompt: int) -> Callable[[Tensor], Tensor]:
    """What steering does to the stream of one unpadded text, position by position."""

    def change(resid: Tensor) -> Tensor:
        resid, vector = resid.clone(), steer.method.vectors[steer.draw[row]]
        for position in range(1, resid.shape[1]):
            if steer.which == ("generated" if position < n_prompt else "prompt"):
                continue
            if isinstance(steer.method, Add):
                resid[0, position] += steer.strength[row] * vector
            else:
                share = resid[0, position] @ vector / (vector @ vector)
                resid[0, position] -= steer.strength[row] * share * vector
        return resid

    return change


def _plain(
    model: TransformerBridge, ids: list[int], steer: Steer | None, row: int, after: list[int] | tuple = ()
) -> tuple[DynamicCache, Tensor]:
    """The library's cache and all logits of one text without padding or batch, steered as this row is."""
    change = _changes(steer, row, len(ids))
    hooks = [(site(model, depth), lambda resid, hook: change(resid)) for depth in (steer.depths if steer else ())]
    cache = DynamicCache(config=model.original_model.config)
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        read = torch.tensor([[*ids, *after]])
        return cache, model.original_model(input_ids=read, past_key_values=cache, use_cache=True).logits[0]


def _plain_streams(model: TransformerBridge, ids: list[int], steer: Steer | None, row: int) -> list[Tensor]:
    kept = []
    change = _changes(steer, row, len(ids))

    def hook_at(depth: int) -> Callable:
        def hook(resid: Tensor, hook) -> Tensor:
            kept.append(change(resid)[0] if steer and depth in steer.depths else resid[0].clone())
            return kept[-1][None]

        return hook

    with torch.no_grad(), model.hooks(fwd_hooks=[(site(model, d), hook_at(d)) for d in range(model.cfg.n_layers + 1)]):
        model.original_model(input_ids=torch.tensor([ids]), use_cache=False)
    return kept


def _rows_read(model: TransformerBridge, steer: Steer | None, rows: list[list[int]] = ROWS) -> list[list[int]]:
    """How many rows each block's attention works on, pass by pass."""
    read = [[] for _ in range(model.cfg.n_layers)]
    hooks = [
        (f"blocks.{block}.attn.hook_out", lambda out, hook, counts=counts: counts.append(len(out)))
        for block, counts in enumerate(read)
    ]
    with batched(model, steer, rows) as (batch, steering), model.hooks(fwd_hooks=hooks):
        prefilled(model, batch, steering, steer)
    return read


def _replaced(model: TransformerBridge) -> list[int]:
    return [number for number, block in enumerate(model.blocks) if "forward" in block.__dict__]


def _places(cache: DynamicCache) -> list[int]:
    """Where the keys lie, of those layers that keep all of them."""
    return [layer.keys.data_ptr() for layer in cache.layers if not layer.is_sliding]
