"""Residual streams against plain Hugging Face, whatever the batch, and what is refused, with its message."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from helpers import activations
from helpers.activations import (
    POSITIONS,
    at_positions,
    batches,
    checked_site,
    every_token,
    pair_residuals,
    residual_norms,
    residuals,
    site,
    token_residuals,
    weighted_residuals,
)
from helpers.models import is_centred, load_model
from helpers.prompts import tokens

TEXTS = [
    "He ran.",
    "The dog ran after me down the lane, and all the way to the sea I did not once look back at it or at him.",
    "Stop!",
    "I walked home along the quiet road.",
    "The dog ran after me.",
]
ENDS = torch.tensor([3, 5, 2, 4, 1])  # a position of each text
READERS = {
    "residuals": lambda m: residuals(m, TEXTS),
    "residual_norms": lambda m: residual_norms(m, TEXTS),
    "token_residuals": lambda m: token_residuals(m, TEXTS[1]),
    "every_token": lambda m: every_token(m, TEXTS),
    "at_positions": lambda m: at_positions(m, TEXTS, ENDS),
}
READERS = [pytest.param(read, id=name) for name, read in READERS.items()]


@pytest.fixture
def fresh(model_folder: Callable[[str], Path]) -> TransformerBridge:
    """A tiny GPT-2 of one's own, to be broken."""
    return load_model(str(model_folder("gpt2")))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the type checks of the tests, as in a notebook."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def hugging_face(folder: Path, ids: Tensor) -> Tensor:
    """Every hidden state [depth, prompt, pos, d_model] of the plain model, the last one before the final norm."""
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    named = dict(hf.base_model.named_children())
    norm = next(named[name] for name in ("ln_f", "final_layer_norm", "norm") if name in named)
    entering = []
    norm.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    with torch.no_grad():
        states = hf(ids, output_hidden_states=True).hidden_states
    return torch.stack([*states[:-1], *entering])


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal within 1e-5 of the norm of each vector."""
    assert found.shape == expected.shape
    assert found.isfinite().all()
    assert ((found - expected).norm(dim=-1) <= 1e-5 * expected.norm(dim=-1)).all()


def hooks(model: TransformerBridge) -> int:
    """How many hooks of any kind hang on any part of the model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "fwd_hooks", "bwd_hooks")
    return sum(len(getattr(part, kind, ())) for part in model.modules() for kind in kinds)


# What is read


@pytest.mark.parametrize("text", TEXTS[:2])
def test_every_depth_is_hugging_faces_hidden_state(any_model, model_folder, text):
    family = any_model.cfg.model_name.removeprefix("local--tiny-")
    expected = hugging_face(model_folder(family), tokens(any_model, [text]).ids)[:, 0].transpose(0, 1)
    if is_centred(any_model):
        expected = expected - expected.mean(-1, keepdim=True)
    assert_close(token_residuals(any_model, text), expected)


def test_depths_differ(any_model):
    stream = token_residuals(any_model, TEXTS[1])
    assert ((stream[1:, 1:] - stream[1:, :-1]).norm(dim=-1) > 1e-3 * stream[1:, 1:].norm(dim=-1)).all()


def test_positions_are_rows_of_the_stream(any_model):
    found, read = residuals(any_model, TEXTS), tokens(any_model, TEXTS)
    for row, text in enumerate(TEXTS):
        stream = token_residuals(any_model, text)
        assert_close(found["last token"][row], stream[read.last[row]])
        assert_close(found["final punctuation"][row], stream[read.stop[row]])
        assert_close(found["mean"][row], stream[1:].mean(0))


def test_a_position_asked_for_alone_is_the_same(model):
    together = residuals(model, TEXTS)
    for position in POSITIONS:
        alone = residuals(model, TEXTS, [position])
        assert list(alone) == [position]
        assert torch.equal(alone[position], together[position])


@pytest.mark.parametrize("batch_tokens", [1, 30])
def test_batch_size_order_and_padding_do_not_matter(any_model, batch_tokens):
    together = residuals(any_model, TEXTS, batch_tokens=10_000)
    backwards = residuals(any_model, TEXTS[::-1], batch_tokens=batch_tokens)
    for position in POSITIONS:
        assert_close(backwards[position].flip(0), together[position])


def test_norms_are_medians_over_all_tokens_but_position_0(any_model):
    norms = [token_residuals(any_model, text)[1:].norm(dim=-1) for text in TEXTS]
    assert torch.allclose(residual_norms(any_model, TEXTS), torch.cat(norms).median(0).values, rtol=1e-5)


def test_position_0_has_no_say(fresh):
    """At depth 0, where no token has read another yet."""
    before = residuals(fresh, TEXTS)["mean"][:, 0], residual_norms(fresh, TEXTS)[0]
    with torch.no_grad():
        fresh.pos_embed.weight[0] += 100
    after = residuals(fresh, TEXTS)["mean"][:, 0], residual_norms(fresh, TEXTS)[0]
    assert all(torch.equal(*values) for values in zip(before, after))


@pytest.mark.parametrize("depths", [None, [2], [3, 0]])
def test_every_token_is_the_stream_of_text_after_text_without_position_0(any_model, depths):
    expected = torch.cat([token_residuals(any_model, text)[1:] for text in TEXTS])
    assert_close(every_token(any_model, TEXTS, depths), expected if depths is None else expected[:, depths])


@pytest.mark.parametrize("depths", [None, [2], [3, 0]])
def test_at_positions_takes_one_row_of_each_texts_stream(any_model, depths):
    ends = tokens(any_model, TEXTS).length - 1
    for positions in (ENDS, torch.ones(5, dtype=torch.long), ends):
        expected = torch.stack([token_residuals(any_model, text)[i] for text, i in zip(TEXTS, positions.tolist())])
        found = at_positions(any_model, TEXTS, positions, depths)
        assert_close(found, expected if depths is None else expected[:, depths])


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_tokens_do_not_depend_on_the_texts_read_with_them(any_model, batch_tokens, monkeypatch):
    whole, rows = every_token(any_model, TEXTS), at_positions(any_model, TEXTS, ENDS)
    monkeypatch.setitem(activations.BATCH_TOKENS, "cpu", batch_tokens)
    parts = every_token(any_model, TEXTS[::-1]).split((tokens(any_model, TEXTS[::-1]).length - 1).tolist())
    assert_close(torch.cat(parts[::-1]), whole)
    assert_close(at_positions(any_model, TEXTS[::-1], ENDS.flip(0)).flip(0), rows)


@pytest.mark.parametrize("batch_tokens", [1, 30, None])
def test_weighted_residuals_are_weighted_sums_of_each_texts_tokens(any_model, generator, batch_tokens):
    """By hand; whatever the weights are called, and position 0 included where a weight names it."""
    read = tokens(any_model, TEXTS)
    drawn = torch.rand(read.ids.shape, generator=generator) * read.real
    weights = {0: drawn / drawn.sum(-1, keepdim=True), ("a", "pair"): drawn.cumsum(-1) * read.real}
    weights["first"] = torch.eye(read.ids.shape[1])[0].expand(read.ids.shape)
    found = weighted_residuals(any_model, read, weights, batch_tokens)
    assert list(found) == list(weights)
    for row, text in enumerate(TEXTS):
        stream = token_residuals(any_model, text)
        for name, weight in weights.items():
            by_hand = sum(w * here for w, here in zip(weight[row].tolist(), stream))
            assert ((found[name][row] - by_hand).norm(dim=-1) <= 1e-5 * by_hand.norm(dim=-1) + 1e-6).all()


@pytest.mark.parametrize("depths", [[1, 1], [2, 0, 2]])
def test_a_depth_asked_for_twice_comes_twice(model, depths):
    expected = every_token(model, TEXTS), at_positions(model, TEXTS, ENDS)
    found = every_token(model, TEXTS, depths), at_positions(model, TEXTS, ENDS, depths)
    for some, every in zip(found, expected):
        assert_close(some, every[:, depths])


def test_pairs_come_emotional_side_first_in_the_order_of_the_table(model):
    table = pd.DataFrame({"emotional": TEXTS[:2], "neutral": TEXTS[2:4]})
    found = pair_residuals(model, table, ["mean"])["mean"]
    assert found.shape == (2, 2, model.cfg.n_layers + 1, model.cfg.d_model)
    for side, texts in enumerate([TEXTS[:2], TEXTS[2:4]]):
        assert_close(found[side], residuals(model, texts, ["mean"])["mean"])


def test_a_text_as_long_as_the_context_is_read(any_model):
    found = residuals(any_model, ["He" + " ran" * (any_model.cfg.n_ctx - 2), "He ran"], ["mean"])
    assert found["mean"].isfinite().all()


def test_half_precision_comes_back_as_float32_on_the_cpu(model, model_folder):
    half = load_model(str(model_folder("gpt2")), dtype=torch.bfloat16)
    found, expected = residuals(half, TEXTS), residuals(model, TEXTS)
    for position in POSITIONS:
        assert found[position].dtype == torch.float32 and found[position].device.type == "cpu"
        assert ((found[position] - expected[position]).norm(dim=-1) < 0.05 * expected[position].norm(dim=-1)).all()


# How it is read


@pytest.mark.parametrize("read", READERS)
def test_the_unembedding_never_runs(any_model, read):
    ran = []
    unembeddings = {any_model.unembed, any_model.original_model.get_output_embeddings()}
    handles = [part.register_forward_hook(lambda *_: ran.append(1)) for part in unembeddings]
    try:
        read(any_model)
        assert not ran
        any_model.original_model(input_ids=tokens(any_model, TEXTS).ids)
        assert ran
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("depths", [[0], [1], [2, 0]])
def test_nothing_behind_the_last_depth_runs(fresh, depths):
    ran = []
    for number, block in enumerate(fresh.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    every_token(fresh, TEXTS, depths)
    at_positions(fresh, TEXTS, ENDS, depths)
    assert set(ran) == set(range(max(depths)))


@pytest.mark.parametrize("read", READERS)
def test_no_hooks_are_left_behind(any_model, read):
    read(any_model)  # the bridge puts up hooks of its own in the first pass
    before = hooks(any_model)
    read(any_model)
    assert hooks(any_model) == before


@pytest.mark.parametrize("read", READERS)
def test_no_hooks_are_left_behind_by_an_error_inside(fresh, read):
    read(fresh)
    before = hooks(fresh)
    handle = fresh.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read(fresh)
    handle.remove()
    assert hooks(fresh) == before


def test_a_hook_of_the_caller_is_read_and_stays(model):
    shift = torch.linspace(-1, 1, model.cfg.d_model)
    plain = token_residuals(model, TEXTS[0])
    with model.hooks(fwd_hooks=[(site(model, 1), lambda resid, hook: resid + shift)]):
        first, again = token_residuals(model, TEXTS[0]), token_residuals(model, TEXTS[0])
    assert torch.equal(first, again)
    assert_close(first[:, 1], plain[:, 1] + shift)
    assert torch.equal(first[:, 0], plain[:, 0])


@pytest.mark.parametrize("batch_tokens", [1, 50, 1000])
def test_batches_hold_each_row_once_and_keep_to_the_budget(generator, batch_tokens):
    length = torch.randint(2, 60, (100,), generator=generator)
    found = batches(length, batch_tokens)
    assert torch.cat(found).sort().values.tolist() == list(range(100))
    for rows in found:
        assert len(rows) == 1 or len(rows) * length[rows].max() <= batch_tokens


def test_batches_are_as_full_as_they_can_be():
    assert [len(rows) for rows in batches(torch.full((10,), 5), 20)] == [4, 4, 2]


# What is refused


@pytest.mark.parametrize("depth", [-1, 4])
def test_a_depth_out_of_range_is_refused(model, depth):
    with pytest.raises(ValueError, match=f"depth {depth} is out of range: local--tiny-gpt2 has depths 0 to 3"):
        site(model, depth)


def test_every_depth_has_its_hook_point(any_model):
    sites = [site(any_model, depth) for depth in range(any_model.cfg.n_layers + 1)]
    assert sites == [f"blocks.{depth}.hook_resid_pre" for depth in range(3)] + ["blocks.2.hook_resid_post"]


@pytest.mark.parametrize("name", ["blocks.0.hook_resid_pree", "blocks.3.hook_resid_pre", ""])
def test_a_hook_point_that_does_not_exist_is_refused(model, name):
    with pytest.raises(ValueError, match=f"local--tiny-gpt2 has no hook point '{name}'"):
        checked_site(model, name)


def test_an_unknown_position_is_refused(model, unchecked):
    with pytest.raises(ValueError, match="unknown position 'first': choose from last token, mean, final punctuation"):
        residuals(model, TEXTS, ["first"])


def test_a_text_without_final_punctuation_is_refused_for_that_position_only(model):
    texts = ["He ran.", "He ran", "She sat."]
    with pytest.raises(ValueError, match="text 1 does not end in punctuation, so it has no 'final punctuation'"):
        residuals(model, texts)
    assert residuals(model, texts, ["last token", "mean"])["mean"].isfinite().all()


@pytest.mark.parametrize(("row", "bad"), [(0, 0), (2, -1), (0, 4), (3, 10), (1, 40)])
def test_position_0_and_padding_are_refused(model, row, bad):
    positions = ENDS.clone()
    positions[row] = bad
    message = re.escape(f"positions {positions.tolist()} lie outside of texts with {[4, 29, 4, 9, 7]} tokens")
    with pytest.raises(ValueError, match=message):
        at_positions(model, TEXTS, positions)


@pytest.mark.parametrize("depth", [-1, 4])
def test_depths_that_the_model_lacks_are_refused(model, depth):
    for refused in (lambda: every_token(model, TEXTS, [0, depth]), lambda: at_positions(model, TEXTS, ENDS, [depth])):
        with pytest.raises(ValueError, match=f"depth {depth} is out of range: local--tiny-gpt2 has depths 0 to 3"):
            refused()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_activations_name_depth_and_text(fresh, bad):
    """At positions that only the second text reaches."""
    with torch.no_grad():
        fresh.pos_embed.weight[10:] = bad
    message = r"non-finite activation at depth 0 of text 1 \('The dog ran after me.*load the model in float32"
    with pytest.raises(ValueError, match=message):
        residuals(fresh, TEXTS, ["mean"], batch_tokens=1)
    assert residuals(fresh, TEXTS[:1], ["mean"])["mean"].isfinite().all()


def test_non_finite_tokens_name_depth_and_text(fresh, monkeypatch):
    """At positions that only the second text reaches, and only then."""
    monkeypatch.setitem(activations.BATCH_TOKENS, "cpu", 1)
    with torch.no_grad():
        fresh.pos_embed.weight[10:] = torch.nan
    message = r"non-finite activation at depth 0 of text 1 \('The dog ran after me"
    with pytest.raises(ValueError, match=message):
        every_token(fresh, TEXTS[:2])
    with pytest.raises(ValueError, match=message):
        at_positions(fresh, TEXTS[:2], torch.tensor([1, 12]))
    assert at_positions(fresh, TEXTS[::2], ENDS[::2]).isfinite().all()


def test_non_finite_activations_name_the_first_depth(fresh):
    with torch.no_grad():
        fresh.blocks[1].mlp.out.bias[0] = torch.nan
    with pytest.raises(ValueError, match="non-finite activation at depth 2 of text 0"):
        residuals(fresh, TEXTS)


@pytest.mark.parametrize("read", READERS[1:])
def test_no_reader_hands_on_non_finite_activations(fresh, read):
    with torch.no_grad():
        fresh.blocks[1].mlp.out.bias[0] = torch.nan
    with pytest.raises(ValueError, match="non-finite activation at depth 2"):
        read(fresh)
