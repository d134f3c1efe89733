"""Steering: what a method changes arrives where it was sent, nowhere else, and only while the block runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from torch import Generator, Tensor
from torch.nn.functional import normalize
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import site
from helpers.saes import load_sae
from helpers.steering import Ablate, Add, Clamp, Method, Steer, Steering, added, entry_depth, steered, steering_mask

IDS = torch.tensor([[0, 311, 52, 4000, 7, 900], [0, 8, 8, 1234, 77, 5000]])
MASK = torch.tensor([[False, True, False, True, True, False], [False, False, True, False, False, True]])
DRAW = torch.tensor([2, 0])
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
DEPTHS = pytest.mark.parametrize("depth", [0, 1, -1])  # -1: what leaves the last block
METHODS = pytest.mark.parametrize("kind", ["add", "ablate", "ablate to a centre", "clamp"])
KINDS = [
    pytest.param(StandardSAE, StandardSAEConfig, {}, id="standard"),
    pytest.param(TopKSAE, TopKSAEConfig, {"k": 20}, id="topk"),
    pytest.param(JumpReLUSAE, JumpReLUSAEConfig, {}, id="jumprelu"),
]


@pytest.fixture(scope="module")
def always_on(small_sae: Callable) -> Callable[[TransformerBridge], object]:
    """A basis whose features fire at every token, for the bias holds them up; its reconstruction is perfect."""

    def sae(model: TransformerBridge) -> object:
        d_model = model.cfg.d_model
        basis = torch.linalg.qr(torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(1))).Q
        made = small_sae(basis, site(model, 1))
        with torch.no_grad():
            made.b_dec.copy_(-100 * basis.sum(0))
        return made.requires_grad_(False)

    return sae


@pytest.fixture
def method(always_on: Callable) -> Callable[[TransformerBridge, str], Method]:
    """A method of each kind, in three draws."""

    def of_kind(model: TransformerBridge, kind: str) -> Method:
        generator = torch.Generator().manual_seed(2)
        vectors = 3 * torch.randn(3, model.cfg.d_model, generator=generator)
        if kind == "add":
            return Add(vectors)
        if kind == "clamp":
            return Clamp(always_on(model), [3, 17, 30], to=120.0)
        return Ablate(vectors, torch.randn(3, generator=generator) if "centre" in kind else None)

    return of_kind


@METHODS
def test_a_strength_of_0_adds_exactly_nothing(any_model: TransformerBridge, method: Callable, kind: str):
    logits, streams = _logits(any_model), _streams(any_model)
    depths = tuple(range(any_model.cfg.n_layers + 1))
    for strength, equal in (([0.0, 0.0], [True, True]), ([0.0, -1.0], [True, False]), ([1.0, 0.0], [False, True])):
        with pointed(any_model, Steer(method(any_model, kind), depths, DRAW, torch.tensor(strength))):
            after, seen = _logits(any_model), _streams(any_model)
        assert [torch.equal(a, b) for a, b in zip(after, logits)] == equal
        assert [[torch.equal(a, b) for a, b in zip(*rows)] for rows in zip(seen, streams)] == [equal] * len(depths)


@METHODS
def test_a_strength_multiplies_the_difference(model: TransformerBridge, method: Callable, kind: str):
    steers = [Steer(method(model, kind), (1,), DRAW, torch.full((2,), strength)) for strength in (0.0, 0.25, 1.0, 2.0)]
    none, quarter, one, two = (_steered_stream(model, steer, 1) for steer in steers)
    torch.testing.assert_close(quarter - none, (one - none) / 4, **CLOSE)
    torch.testing.assert_close(two - none, (one - none) * 2, **CLOSE)


@METHODS
def test_only_the_masked_tokens_change(any_model: TransformerBridge, method: Callable, kind: str):
    depth = any_model.cfg.n_layers
    steer = Steer(method(any_model, kind), (depth,), DRAW, torch.ones(2))
    changed = _steered_stream(any_model, steer, depth) != _streams(any_model)[depth]
    assert torch.equal(changed.any(-1), MASK)


@METHODS
def test_a_method_has_a_draw_per_vector_or_feature(model: TransformerBridge, method: Callable, kind: str):
    assert len(method(model, kind)) == 3
    assert isinstance(method(model, kind), Method)


@DEPTHS
def test_each_row_gets_its_draw_times_its_strength(any_model: TransformerBridge, generator: Generator, depth: int):
    depth = depth % (any_model.cfg.n_layers + 1)
    vectors, strength = torch.randn(3, any_model.cfg.d_model, generator=generator), torch.tensor([0.5, -3.0])
    before = _streams(any_model)[depth]
    after = _steered_stream(any_model, Steer(Add(vectors), (depth,), DRAW, strength), depth)
    assert torch.equal(
        after, torch.where(MASK[..., None], before + (strength[:, None] * vectors[DRAW])[:, None], before)
    )


def test_added_gives_every_run_its_own_vector_once(model: TransformerBridge, generator: Generator):
    vectors, before = torch.randn(2, model.cfg.d_model, generator=generator), _streams(model)[2]
    after = _steered_stream(model, added(2, vectors), 2)
    assert torch.equal(after, torch.where(MASK[..., None], before + vectors[:, None], before))
    assert [added(2, vectors, which).which for which in ("prompt", "generated")] == ["prompt", "generated"]


@pytest.mark.parametrize("centre", [None, torch.tensor([7.0, -2.0, 0.5])], ids=["to 0", "to a centre"])
@pytest.mark.parametrize("strength", [1.0, 0.25])
@DEPTHS
def test_ablation_leaves_what_the_strength_says_along_the_direction(
    any_model: TransformerBridge, generator: Generator, depth: int, strength: float, centre: Tensor | None
):
    depth = depth % (any_model.cfg.n_layers + 1)
    vectors = 5 * torch.randn(3, any_model.cfg.d_model, generator=generator)
    along = normalize(vectors, dim=-1)[DRAW][:, None]
    before = _streams(any_model)[depth]
    after = _steered_stream(any_model, Steer(Ablate(vectors, centre), (depth,), DRAW, _of(strength)), depth)
    target = 0 if centre is None else centre[DRAW][:, None]
    left = (1 - strength) * (before * along).sum(-1) + strength * target
    torch.testing.assert_close((after * along).sum(-1)[MASK], left[MASK], **CLOSE)
    across = [stream - (stream * along).sum(-1, keepdim=True) * along for stream in (before, after)]
    torch.testing.assert_close(*across, **CLOSE)
    assert ((before * along).sum(-1)[MASK].abs() > 1e-3).any()  # something lay along it


def test_ablation_does_not_depend_on_the_vectors_length(model: TransformerBridge, generator: Generator):
    vectors, centre = torch.randn(3, model.cfg.d_model, generator=generator), torch.tensor([1.0, 2.0, 3.0])
    long, short = (Ablate(length * vectors, centre) for length in (1000.0, 0.01))
    streams = [_steered_stream(model, Steer(each, (1,), DRAW, torch.ones(2)), 1) for each in (long, short)]
    torch.testing.assert_close(*streams, **CLOSE)


def test_ablation_at_several_depths_leaves_nothing_at_any_of_them(any_model: TransformerBridge, generator: Generator):
    vectors = torch.randn(3, any_model.cfg.d_model, generator=generator)
    along = normalize(vectors, dim=-1)[DRAW][:, None]
    left = {}
    for depths in ((1,), (1, 2, 3)):
        with pointed(any_model, Steer(Ablate(vectors), depths, DRAW, torch.ones(2))):
            left[depths] = [(stream * along).sum(-1)[MASK].abs().max() for stream in _streams(any_model)]
    assert max(left[1, 2, 3][1:]) < 1e-4
    assert left[1,][1] < 1e-4 < 1e-2 < min(left[1,][2:])  # the blocks above write along it again
    assert left[1, 2, 3][0] > 1e-2


@pytest.mark.parametrize("strength", [1.0, 0.25])
@DEPTHS
def test_clamping_sets_the_feature_and_no_other(
    any_model: TransformerBridge, always_on: Callable, depth: int, strength: float
):
    depth = depth % (any_model.cfg.n_layers + 1)
    sae, before = always_on(any_model), _streams(any_model)[depth]
    torch.testing.assert_close(sae.decode(sae.encode(before)), before, atol=1e-3, rtol=1e-5)  # it explains everything
    after = _steered_stream(any_model, Steer(Clamp(sae, [3, 17, 30], 120.0), (depth,), DRAW, _of(strength)), depth)
    wanted = sae.encode(before)
    for row, feature in enumerate((30, 3)):
        own = wanted[row, MASK[row], feature]
        wanted[row, MASK[row], feature] = (1 - strength) * own + strength * 120
    torch.testing.assert_close(sae.encode(after), wanted, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("how", ["layer_norm", "constant_norm_rescale"])
def test_an_sae_that_rescales_every_token_is_refused(model: TransformerBridge, small_sae: Callable, how: str):
    sae = small_sae(torch.eye(model.cfg.d_model), site(model, 1), normalize_activations=how)
    with pytest.raises(ValueError, match=f"with activations in units of its own \\({how}\\)"):
        Clamp(sae, [0], to=1.0)


@pytest.mark.parametrize(("kind", "config", "options"), KINDS)
@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_clamping_keeps_what_the_sae_does_not_explain(
    model: TransformerBridge,
    small_sae: Callable,
    generator: Generator,
    kind: type,
    config: type,
    options: dict,
    strength: float,
):
    d_model = model.cfg.d_model
    rows, encoder = (torch.randn(40, d_model, generator=generator) for _ in range(2))
    bias = torch.randn(40, generator=generator)
    sae = small_sae(rows, site(model, 1), encoder.T / d_model**0.5, bias, kind=kind, config=config, **options)
    sae.requires_grad_(False)
    before = _streams(model)[1]
    acts = sae.encode(before)
    features = acts[MASK].sum(0).topk(3).indices.tolist()  # of those that fire
    error = before - sae.decode(acts)
    assert error.norm() > before.norm() / 4
    for row, feature in enumerate((features[2], features[0])):
        acts[row, :, feature] = (1 - strength) * acts[row, :, feature] + strength * 4
    wanted = torch.where(MASK[..., None], error + sae.decode(acts), before)
    after = _steered_stream(model, Steer(Clamp(sae, features, 4.0), (1,), DRAW, _of(strength)), 1)
    torch.testing.assert_close(after, wanted, **CLOSE)


def test_clamping_adds_a_multiple_of_the_decoder_row_alone(model_with_saes: TransformerBridge):
    sae, before = load_sae(model_with_saes, 1), _streams(model_with_saes)[1]
    after = _steered_stream(model_with_saes, Steer(Clamp(sae, [5, 40, 5], 9.0), (1,), DRAW, torch.ones(2)), 1)
    gap = (after - before)[MASK]
    rows = sae.W_dec[5].expand(len(gap), -1)  # both draws name feature 5
    torch.testing.assert_close(gap, (gap * rows).sum(-1, keepdim=True) * rows, **CLOSE)
    torch.testing.assert_close((gap * rows).sum(-1), (9 - sae.encode(before)[..., 5])[MASK], **CLOSE)


def test_a_vector_is_added_at_one_depth_only(model: TransformerBridge, generator: Generator):
    before = _streams(model)
    with pointed(model, added(2, torch.randn(2, model.cfg.d_model, generator=generator))):
        after = _streams(model)
    assert [torch.equal(a, b) for a, b in zip(after, before)] == [True, True, False, False]


def test_decode_steps_take_the_masks_later_columns(generator: Generator):
    resid, vectors = torch.randn(2, 6, 4, generator=generator), torch.randn(3, 4, generator=generator)
    for method in (Add(vectors), Ablate(vectors)):
        whole = Steering(method, DRAW, torch.ones(2), MASK).changed(resid)
        for start in range(6):
            for end in (start + 1, 6):
                here = Steering(method, DRAW, torch.ones(2), MASK, start).changed(resid[:, start:end])
                torch.testing.assert_close(here, whole[:, start:end])


def test_the_stream_itself_is_not_edited(model: TransformerBridge, method: Callable, generator: Generator):
    resid = torch.randn(2, 6, model.cfg.d_model, generator=generator)
    before = resid.clone()
    for kind in ("add", "ablate", "clamp"):
        after = Steering(method(model, kind), DRAW, torch.ones(2), MASK).changed(resid)
        assert torch.equal(resid, before)
        assert not torch.equal(after, before)


def test_steering_can_be_pointed_anew_between_batches(model: TransformerBridge, generator: Generator):
    vectors, before = torch.randn(3, model.cfg.d_model, generator=generator), _streams(model)[1]
    with steered(model, Steer(Add(vectors), (1,), DRAW, torch.ones(2))) as steering:
        assert torch.equal(_streams(model)[1], before)  # not pointed yet
        for draw, mask in ((DRAW, MASK), (DRAW.flip(0), MASK.flip(0))):
            steering.draw, steering.strength, steering.mask = draw, torch.ones(2), mask
            expected = torch.where(mask[..., None], before + vectors[draw][:, None], before)
            assert torch.equal(_streams(model)[1], expected)


def test_what_is_read_is_the_steered_stream(any_model: TransformerBridge, generator: Generator):
    depths, seen = (1, 2, any_model.cfg.n_layers), {}
    steer = Steer(Add(torch.randn(3, any_model.cfg.d_model, generator=generator)), (1, 2), DRAW, torch.ones(2))
    with pointed(any_model, steer, depths) as steering:
        _logits(any_model)  # reads nothing, for no one asked
        steering.reading = seen.__setitem__
        expected = _streams(any_model)
    assert list(seen) == list(depths)
    assert all(torch.equal(seen[depth], expected[depth]) for depth in depths)


def test_unsteered_passes_are_read_at_any_depth(model: TransformerBridge):
    seen, expected = {}, _streams(model)
    with steered(model, None, (0, 1, 2, 3)) as steering:
        steering.reading = seen.__setitem__
        _logits(model)
    assert torch.equal(torch.stack([seen[depth] for depth in range(4)]), expected)


@pytest.mark.parametrize(
    ("depths", "first"), [((0,), 0), ((1,), 1), ((2, 1), 1), ((2,), 2), ((3,), 2), ((3, 1), 1), (None, 2)]
)
def test_the_first_block_that_depends_on_the_steering(model: TransformerBridge, depths: tuple | None, first: int):
    steer = depths and Steer(Add(torch.ones(1, model.cfg.d_model)), depths, torch.zeros(1).long(), torch.ones(1))
    assert entry_depth(model, steer) == first


def test_a_planted_direction_causes_its_token_and_ablating_it_takes_it_back(any_model: TransformerBridge):
    unembedding, depth = _unembedding(any_model), any_model.cfg.n_layers
    token = int(unembedding.norm(dim=-1).argmax())
    row = unembedding[token].expand(2, -1)
    plant, remove = (Steer(m, (depth,), torch.arange(2), _of(s)) for m, s in ((Add(row), 1000.0), (Ablate(row), 1.0)))
    before = _logits(any_model).argmax(-1)
    with pointed(any_model, plant):
        planted = _logits(any_model).argmax(-1)
        with pointed(any_model, remove):
            removed = _logits(any_model).argmax(-1)
    assert (planted == token)[MASK].all() and torch.equal(planted[~MASK], before[~MASK])
    assert (removed != token)[MASK].all() and (before != token).all()


def test_ablating_its_unembedding_takes_away_the_models_own_token(any_model: TransformerBridge):
    before, unembedding = _logits(any_model), _unembedding(any_model)
    for position in range(1, IDS.shape[1]):
        said = before[:, position].argmax(-1)
        mask = torch.arange(IDS.shape[1]).expand(2, -1) == position
        steer = Steer(Ablate(unembedding[said]), (any_model.cfg.n_layers,), torch.arange(2), torch.ones(2))
        with pointed(any_model, steer, mask=mask):
            after = _logits(any_model)
        assert (after[:, position].argmax(-1) != said).all()
        assert torch.equal(after[~mask], before[~mask])


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


@METHODS
def test_the_hooks_are_gone_after_the_block(any_model: TransformerBridge, method: Callable, kind: str):
    before = _logits(any_model)
    with pointed(any_model, Steer(method(any_model, kind), (1, 2, 3), DRAW, torch.ones(2)), (3,)):
        assert not torch.equal(_logits(any_model), before)
    assert not _hooks(any_model)
    assert torch.equal(_logits(any_model), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_hooks_are_gone_after_an_error_in_the_block(model: TransformerBridge, error: type[BaseException]):
    before = _logits(model)
    with pytest.raises(error), pointed(model, added(1, torch.ones(2, model.cfg.d_model)), (2,)):
        assert _hooks(model)
        raise error
    assert not _hooks(model)
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_hooks_are_gone_after_an_error_in_a_pass(model: TransformerBridge, error: type[BaseException]):
    def reading(depth: int, resid: Tensor) -> None:
        raise error

    with pytest.raises(error), pointed(model, added(1, torch.ones(2, model.cfg.d_model)), (2,)) as steering:
        steering.reading = reading
        _logits(model)
    assert not _hooks(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_vectors_that_are_not_finite_are_refused(value: float):
    vectors = torch.ones(2, 32)
    vectors[1, 3] = value
    with pytest.raises(ValueError, match="the steering vectors hold NaN or infinity"):
        Add(vectors)
    with pytest.raises(ValueError, match="non-finite vector has no direction"):
        Ablate(vectors)


@pytest.mark.parametrize("others", [0.0, 1.0], ids=["all of them", "one of them"])
def test_a_zero_vector_to_ablate_is_refused(others: float):
    vectors = torch.full((3, 32), others)
    vectors[1] = 0
    with pytest.raises(ValueError, match=r"zero .*has no direction"):
        Ablate(vectors)


@pytest.mark.parametrize("feature", [-1, 64])
def test_a_feature_that_the_sae_lacks_is_refused(model_with_saes: TransformerBridge, feature: int):
    with pytest.raises(IndexError, match=f"feature {feature} is out of range: the SAE has 0 to 63"):
        Clamp(load_sae(model_with_saes, 1), [3, feature], 1.0)


@pytest.mark.parametrize("depth", [-1, 4])
def test_a_depth_that_the_model_lacks_is_refused(model: TransformerBridge, depth: int):
    vectors = torch.ones(2, model.cfg.d_model)
    told = rf"depth {depth} is out of range: .* has depths 0 to 3"
    for depths in ((depth,), (1, depth)):
        steer = Steer(Add(vectors), depths, torch.arange(2), torch.ones(2))
        with pytest.raises(ValueError, match=told), steered(model, steer):
            pass
    with pytest.raises(ValueError, match=told), steered(model, None, (depth,)):
        pass
    assert not _hooks(model)


def test_reading_below_the_steered_depth_is_refused(model: TransformerBridge):
    steer = Steer(Add(torch.ones(2, model.cfg.d_model)), (3, 2), torch.arange(2), torch.ones(2))
    with pytest.raises(ValueError, match="steering at depth 2 does not reach depth 1"), steered(model, steer, (3, 1)):
        pass
    with steered(model, steer, (2, 3)):
        pass


@contextmanager
def pointed(
    model: TransformerBridge, steer: Steer, read_at: tuple[int, ...] = (), mask: Tensor = MASK
) -> Iterator[Steering]:
    """Steer the two texts of this file at the masked tokens."""
    with steered(model, steer, read_at) as steering:
        steering.draw, steering.strength, steering.mask = steer.draw, steer.strength, mask
        yield steering


def _of(strength: float) -> Tensor:
    return torch.full((2,), strength)


def _logits(model: TransformerBridge) -> Tensor:
    with torch.no_grad():
        return model.original_model(input_ids=IDS, use_cache=False).logits


def _streams(model: TransformerBridge) -> Tensor:
    """The residual stream by depth, as the rest of the model gets it."""
    kept = []
    reader = lambda resid, hook: kept.append(resid.clone())  # noqa: E731
    with model.hooks(fwd_hooks=[(site(model, depth), reader) for depth in range(model.cfg.n_layers + 1)]):
        _logits(model)
    return torch.stack(kept)


def _steered_stream(model: TransformerBridge, steer: Steer, depth: int) -> Tensor:
    with pointed(model, steer):
        return _streams(model)[depth]


def _unembedding(model: TransformerBridge) -> Tensor:
    return model.original_model.get_output_embeddings().weight.detach()


def _hooks(model: TransformerBridge) -> list[str]:
    return [name for name, point in model.hook_dict.items() if point.fwd_hooks]


def _unchecked(function):
    """The function without the type check that tests put around it, which would refuse first."""
    return getattr(function, "__wrapped__", function)
