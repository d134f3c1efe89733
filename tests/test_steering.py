"""Steering: the vector arrives where it was sent, nowhere else, and only while the block runs."""

import pytest
import torch
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import site
from helpers.steering import Steering, steered, steering_mask

IDS = torch.tensor([[0, 311, 52, 4000, 7, 900], [0, 8, 8, 1234, 77, 5000]])
MASK = torch.tensor([[False, True, False, True, True, False], [False, False, True, False, False, True]])
DEPTHS = (0, 1, -1)  # -1: what leaves the last block


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_zero_vector_leaves_the_logits_bit_for_bit_unchanged(any_model: TransformerBridge, depth: int):
    before = _logits(any_model)
    with steered(any_model, _depth(any_model, depth), torch.zeros(2, any_model.cfg.d_model), MASK):
        assert torch.equal(_logits(any_model), before)


@pytest.mark.parametrize("depth", DEPTHS)
def test_each_row_gets_its_vector_at_the_masked_tokens_alone(
    any_model: TransformerBridge, generator: Generator, depth: int
):
    depth = _depth(any_model, depth)
    vectors = torch.randn(2, any_model.cfg.d_model, generator=generator)
    before = _stream(any_model, depth)
    with steered(any_model, depth, vectors, MASK):
        after = _stream(any_model, depth)
    assert torch.equal(after, torch.where(MASK[..., None], before + vectors[:, None], before))
    assert not torch.equal(after[:, 1:], before[:, 1:])


def test_a_vector_is_added_at_one_depth_only(model: TransformerBridge, generator: Generator):
    before = [_stream(model, depth) for depth in range(4)]
    with steered(model, 2, torch.randn(2, model.cfg.d_model, generator=generator), MASK):
        after = [_stream(model, depth) for depth in range(4)]
    assert [torch.equal(a, b) for a, b in zip(after, before)] == [True, True, False, False]


def test_decode_steps_take_the_masks_later_columns(generator: Generator):
    resid, vectors = torch.randn(2, 6, 4, generator=generator), torch.randn(2, 4, generator=generator)
    whole = Steering(vectors, MASK).added_to(resid)
    for start in range(6):
        assert torch.equal(Steering(vectors, MASK, start).added_to(resid[:, start:]), whole[:, start:])
        assert torch.equal(
            Steering(vectors, MASK, start).added_to(resid[:, start : start + 1]), whole[:, start : start + 1]
        )


def test_the_stream_itself_is_not_edited(generator: Generator):
    resid = torch.randn(2, 6, 4, generator=generator)
    before = resid.clone()
    Steering(torch.ones(2, 4), MASK).added_to(resid)
    assert torch.equal(resid, before)


def test_vectors_and_tokens_can_be_set_anew_between_batches(model: TransformerBridge):
    before = _stream(model, 1)
    with steered(model, 1, torch.zeros(1, model.cfg.d_model), torch.zeros(1, 0, dtype=torch.bool)) as steering:
        steering.vectors, steering.mask = torch.ones(2, model.cfg.d_model), MASK
        after = _stream(model, 1)
    assert torch.equal(after, before + MASK[..., None].float())


@pytest.mark.parametrize(
    ("which", "tokens"),
    [("prompt", [1, 2]), ("generated", [3, 4]), ("both", [1, 2, 3, 4])],
)
@pytest.mark.parametrize("padding", ["left", "right", "none"])
def test_position_0_and_padding_are_never_steered(which: str, tokens: list[int], padding: str):
    # BOS, two prompt tokens, two generated ones; padding before or behind them
    ahead, behind = {"left": (3, 0), "right": (0, 3), "none": (0, 0)}[padding]
    prompt = torch.tensor([[False] * ahead + [True] * 3 + [False] * (2 + behind)])
    generated = torch.tensor([[False] * (ahead + 3) + [True] * 2 + [False] * behind])
    mask = steering_mask(prompt, generated, which)
    assert mask[0].nonzero()[:, 0].tolist() == [ahead + token for token in tokens]


def test_rows_of_different_length_each_keep_their_own_position_0():
    prompt = torch.tensor([[True] * 4 + [False], [False, False, True, True, False], [False, False, False, True, False]])
    generated = torch.tensor([[False] * 4 + [True]]).expand(3, 5)
    expected = torch.tensor([[False, True, True, True, True], [False] * 3 + [True, True], [False] * 4 + [True]])
    assert torch.equal(steering_mask(prompt, generated, "both"), expected)
    assert not (steering_mask(prompt, generated, "prompt") & generated).any()


def test_unknown_tokens_to_steer_are_refused():
    with pytest.raises(ValueError, match="unknown tokens to steer 'all': choose 'prompt', 'generated' or 'both'"):
        _unchecked(steering_mask)(MASK, MASK, "all")


def test_a_mask_with_position_0_is_refused(model: TransformerBridge):
    mask = MASK.clone()
    mask[1, 0] = True
    with pytest.raises(ValueError, match="position 0"), steered(model, 1, torch.ones(2, model.cfg.d_model), mask):
        pass


def test_the_hook_is_gone_after_the_block(any_model: TransformerBridge):
    before = _logits(any_model)
    with steered(any_model, 1, torch.ones(2, any_model.cfg.d_model), MASK):
        assert not torch.equal(_logits(any_model), before)
    assert torch.equal(_logits(any_model), before)
    assert not _hooks(any_model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_hook_is_gone_after_an_error_in_the_block(model: TransformerBridge, error: type[BaseException]):
    before = _logits(model)
    with pytest.raises(error), steered(model, 1, torch.ones(2, model.cfg.d_model), MASK):
        assert _hooks(model)
        raise error
    assert not _hooks(model)
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_vector_that_is_not_finite_is_refused(model: TransformerBridge, value: float):
    vectors = torch.ones(2, model.cfg.d_model)
    vectors[1, 3] = value
    with pytest.raises(ValueError, match="hold NaN or infinity"), steered(model, 1, vectors, MASK):
        pass
    assert not _hooks(model)


@pytest.mark.parametrize("depth", [-1, 4])
def test_a_depth_that_the_model_lacks_is_refused(model: TransformerBridge, depth: int):
    vectors = torch.ones(2, model.cfg.d_model)
    told = rf"depth {depth} is out of range: .* has depths 0 to 3"
    with pytest.raises(ValueError, match=told), steered(model, depth, vectors, MASK):
        pass
    assert not _hooks(model)


def _depth(model: TransformerBridge, depth: int) -> int:
    return depth % (model.cfg.n_layers + 1)


def _logits(model: TransformerBridge) -> Tensor:
    with torch.no_grad():
        return model.original_model(input_ids=IDS, use_cache=False).logits


def _stream(model: TransformerBridge, depth: int) -> Tensor:
    """The residual stream as the rest of the model gets it."""
    kept = []
    with model.hooks(fwd_hooks=[(site(model, depth), lambda resid, hook: kept.append(resid.clone()))]):
        _logits(model)
    return kept[0]


def _hooks(model: TransformerBridge) -> list[str]:
    return [name for name, point in model.hook_dict.items() if point.fwd_hooks]


def _unchecked(function):
    """The function without the type check that tests put around it, which would refuse first."""
    return getattr(function, "__wrapped__", function)
