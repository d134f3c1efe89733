"""Doses against plain passes of one text each, and strengths that cause the doses they were chosen for."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformer_lens.model_bridge import TransformerBridge

from helpers import doses
from helpers.activations import site
from helpers.doses import Meter
from helpers.prompts import first_token
from helpers.steering import Ablate, Add, Method

TEXTS = [
    "The box stood on the table.",
    "It was a long way from the house to the river, and the road went by the mill and over the bridge.",
    "Yes, he said.",
    "They walked home in the evening and had their supper.",
]
DRAW, STRENGTH = torch.tensor([0, 1, 2, 0, 2]), torch.tensor([0.5, 1.0, 0.0, -1.0, 1.5])
CLOSE = {"atol": 1e-5, "rtol": 1e-3}
METHODS = pytest.mark.parametrize("kind", ["add", "ablate", "ablate to a centre"])
DEPTHS = pytest.mark.parametrize("depth", [0, 2, 3])  # 3: what leaves the last block


@METHODS
@DEPTHS
def test_doses_and_losses_are_those_of_plain_passes_text_by_text(any_model: TransformerBridge, kind: str, depth: int):
    method = _method(any_model, kind)
    kl, loss = Meter.on(any_model, TEXTS).effects(depth, method, DRAW, STRENGTH)
    for run, (draw, strength) in enumerate(zip(DRAW.tolist(), STRENGTH.tolist())):
        expected = _plain_effects(any_model, depth, method, draw, strength)
        torch.testing.assert_close(torch.stack([kl[run], loss[run]]), expected.float(), **CLOSE)
    assert kl.shape == loss.shape == (5,)
    assert kl[STRENGTH != 0].min() > 1e-3


@METHODS
@DEPTHS
def test_a_strength_of_0_has_exactly_no_effect(any_model: TransformerBridge, kind: str, depth: int):
    method = _method(any_model, kind)
    kl, loss = Meter.on(any_model, TEXTS).effects(depth, method, torch.arange(3), torch.zeros(3))
    assert kl.tolist() == [0, 0, 0] and loss.tolist() == [0, 0, 0]


@pytest.mark.parametrize("batch_tokens", [1, 60])
def test_effects_depend_neither_on_the_size_of_a_batch_nor_on_other_runs(
    model: TransformerBridge, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
):
    method, meter = _method(model, "add"), Meter.on(model, TEXTS)
    together = torch.stack(meter.effects(1, method, DRAW, STRENGTH))
    alone = [torch.stack(meter.effects(1, method, DRAW[[run]], STRENGTH[[run]])) for run in range(5)]
    turned = torch.stack(meter.effects(1, method, DRAW.flip(0), STRENGTH.flip(0))).flip(1)
    monkeypatch.setattr(doses, "tokens_at_once", lambda model: batch_tokens)
    in_parts = torch.stack(Meter.on(model, TEXTS).effects(1, method, DRAW, STRENGTH))
    for found in (torch.cat(alone, 1), turned, in_parts):
        torch.testing.assert_close(found, together, atol=1e-5, rtol=1e-4)


def test_every_token_counts_the_same_in_texts_of_any_length(model: TransformerBridge):
    """Not every text: the mean of two texts lies where their numbers of tokens put it."""
    method, parts = _method(model, "add"), (TEXTS[1:2], TEXTS[2:3], TEXTS[1:3])
    long, short, both = (torch.stack(Meter.on(model, part).effects(1, method, DRAW, STRENGTH)) for part in parts)
    n, m = (len(_ids(model, part[0])) for part in parts[:2])
    assert n > 2 * m
    torch.testing.assert_close(both[0], (n * long[0] + m * short[0]) / (n + m), **CLOSE)
    torch.testing.assert_close(both[1], ((n - 1) * long[1] + (m - 1) * short[1]) / (n + m - 2), **CLOSE)


def test_a_text_of_one_token_has_a_dose_and_no_loss(model: TransformerBridge):
    assert len(_ids(model, " the")) == 1
    method = _method(model, "add")
    with_it, without = (
        Meter.on(model, texts).effects(1, method, DRAW, STRENGTH) for texts in ([*TEXTS, " the"], TEXTS)
    )
    torch.testing.assert_close(with_it[1], without[1], **CLOSE)
    assert not torch.allclose(with_it[0], without[0], atol=1e-4)


@pytest.mark.parametrize(("kind", "sign"), [("add", 1), ("add", -1), ("ablate", 1), ("ablate to a centre", -1)])
def test_the_strengths_cause_their_doses(any_model: TransformerBridge, kind: str, sign: int):
    meter, wanted = Meter.on(any_model, TEXTS[::2]), [0.02, 0.1, 0.3]
    method = _method(any_model, kind)
    found = meter.strengths(1, method, wanted, cap=20.0, sign=sign)
    assert found.shape == (3, 3) and found.isfinite().any(0).all()
    for draw, dose in found.isfinite().nonzero().tolist():
        caused = meter.effects(1, method, torch.tensor([draw]), found[draw, [dose]])[0].item()
        assert caused == pytest.approx(wanted[dose], rel=0.04)
    reached = found.isfinite()
    assert (sign * found[reached] > 0).all() and (sign * found[reached] <= 20).all()
    if kind == "add":
        assert reached.all()


def test_a_strength_is_the_smallest_that_does(model: TransformerBridge):
    """Between 0 and it, no strength causes the dose."""
    meter, method, wanted = Meter.on(model, TEXTS), _method(model, "add"), [0.1, 0.3]
    found = meter.strengths(1, method, wanted, cap=20.0)
    for draw in range(3):
        for dose, strength in zip(wanted, found[draw]):
            below = strength * torch.linspace(0, 0.97, 20)
            assert (meter.effects(1, method, torch.full((20,), draw), below)[0] < dose).all()


def test_beyond_what_causes_all_doses_nothing_is_tried(model: TransformerBridge, monkeypatch: pytest.MonkeyPatch):
    meter, method, tried = Meter.on(model, TEXTS), _method(model, "add"), []
    effects = Meter.effects

    def noted(self, depth, method, draw, strength):
        tried.append(strength.max().item())
        return effects(self, depth, method, draw, strength)

    monkeypatch.setattr(Meter, "effects", noted)
    found = meter.strengths(1, method, [0.01], cap=1000.0)
    assert found.isfinite().all() and max(tried) < 1000


@pytest.mark.parametrize("sign", [1, -1])
def test_strengths_rise_with_the_dose_whatever_the_order_of_the_doses(model: TransformerBridge, sign: int):
    meter, method = Meter.on(model, TEXTS), _method(model, "add")
    wanted = [0.01, 0.02, 0.05, 0.054, 0.1, 0.2, 0.3]  # further apart than the 3 % of a strength that is close enough
    found = meter.strengths(1, method, wanted, cap=5.0, sign=sign)
    assert (sign * found.diff(dim=-1) > 0).all()
    torch.testing.assert_close(meter.strengths(1, method, wanted[::-1], cap=5.0, sign=sign), found.flip(1), **CLOSE)


def test_strengths_of_a_draw_do_not_depend_on_the_other_draws(model: TransformerBridge):
    meter, method = Meter.on(model, TEXTS), _method(model, "add")
    found = meter.strengths(1, method, [0.05, 0.5], cap=20.0)
    alone = torch.cat([meter.strengths(1, Add(vector[None]), [0.05, 0.5], cap=20.0) for vector in method.vectors])
    torch.testing.assert_close(found, alone, rtol=0.03, atol=0)


def test_there_is_no_strength_where_even_the_cap_does_too_little(model: TransformerBridge):
    vectors = _method(model, "add").vectors * torch.tensor([[0.0], [1e-6], [1.0]])
    meter = Meter.on(model, TEXTS)
    found = meter.strengths(1, Add(vectors), [0.05, 1e4], cap=20.0)
    assert found.isnan().tolist() == [[True, True], [True, True], [False, True]]
    low, high = meter.effects(1, Add(vectors), torch.tensor([2, 2]), torch.tensor([1.0, 2.0]))[0].tolist()
    assert meter.strengths(1, Add(vectors[2:]), [(low + high) / 2], cap=1.0).isnan().all()
    assert meter.strengths(1, Add(vectors[2:]), [(low + high) / 2], cap=2.0).isfinite().all()


@pytest.mark.parametrize("times", [3, 30, 1000])
def test_a_dose_that_the_smallest_strength_of_the_grid_exceeds_is_found_below_it(model: TransformerBridge, times: int):
    meter, method = Meter.on(model, TEXTS), _method(model, "add")
    strong, wanted = Add(times * method.vectors), [0.02, 0.1]
    found = meter.strengths(1, strong, wanted, cap=20.0)
    smallest = doses.SMALLEST * 20
    assert (meter.effects(1, strong, torch.arange(3), torch.full((3,), smallest))[0] > 2 * max(wanted)).all()
    assert (found < smallest).all()
    for column, dose in enumerate(wanted):
        caused = meter.effects(1, strong, torch.arange(3), found[:, column])[0]
        assert caused.tolist() == pytest.approx([dose] * 3, rel=0.04)


def test_equal_has_a_row_for_every_depth_method_draw_and_dose(model: TransformerBridge):
    meter, wanted = Meter.on(model, TEXTS[::2]), [0.1, 0.02]
    methods = {
        2: {"add": _method(model, "add"), "ablated": _method(model, "ablate")},
        1: {"add": _method(model, "add")},
    }
    found = meter.equal(methods, wanted, {"add": 20.0, "ablated": 0.01, "not there": 5.0})
    assert list(found) == ["depth", "method", "draw", "dose", "strength"]
    runs = [(2, "add"), (2, "ablated"), (1, "add")]
    expected = [(*run, draw, dose) for run in runs for draw in range(3) for dose in wanted]
    assert list(found[["depth", "method", "draw", "dose"]].itertuples(index=False, name=None)) == expected
    for (depth, name), part in found.groupby(["depth", "method"]):
        alone = meter.strengths(depth, methods[depth][name], wanted, cap=0.01 if name == "ablated" else 20.0)
        torch.testing.assert_close(torch.tensor(part["strength"].tolist()), alone.flatten(), equal_nan=True, **CLOSE)
    assert (found["strength"].isna() == found["method"].eq("ablated")).all()


def test_equal_strengths_cause_equal_doses_whatever_the_method(any_model: TransformerBridge):
    meter = Meter.on(any_model, TEXTS[::2])
    kinds = {"long": Add(5 * _method(any_model, "add").vectors), "ablated": _method(any_model, "ablate to a centre")}
    found = meter.equal({1: {"add": _method(any_model, "add")}, 2: kinds}, [0.02, 0.1], {"add": 20.0}).dropna()
    assert set(found["method"]) == {"add", "long", "ablated"} and found["dose"].nunique() == 2
    for run in found.itertuples():
        method = {"add": _method(any_model, "add"), **kinds}[run.method]
        caused = meter.effects(run.depth, method, torch.tensor([run.draw]), torch.tensor([run.strength]))[0].item()
        assert caused == pytest.approx(run.dose, rel=0.04)


def test_a_method_without_a_cap_of_its_own_is_tried_up_to_2(model: TransformerBridge):
    meter, weak = Meter.on(model, TEXTS[::2]), Add(_method(model, "add").vectors[:1] / 20)
    wanted = meter.effects(1, weak, torch.tensor([0, 0]), torch.tensor([1.0, 3.0]))[0].tolist()
    for caps, missing in ((None, [False, True]), ({"other": 9.0}, [False, True]), ({"add": 9.0}, [False, False])):
        assert meter.equal({1: {"add": weak}}, wanted, caps)["strength"].isna().tolist() == missing


@pytest.mark.parametrize(("wanted", "cap"), [([0.1, 0.0], 2.0), ([-0.1], 2.0), ([math.nan], 2.0), ([0.1], 0.0)])
def test_a_dose_or_cap_that_is_not_above_0_is_refused(model: TransformerBridge, wanted: list[float], cap: float):
    with pytest.raises(ValueError, match="doses and the cap must be above 0"):
        Meter.on(model, TEXTS).strengths(1, _method(model, "add"), wanted, cap)


def _method(model: TransformerBridge, kind: str) -> Method:
    """Three draws."""
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randn(3, model.cfg.d_model, generator=generator)
    if kind == "add":
        return Add(2 * vectors)
    return Ablate(vectors, torch.tensor([3.0, -5.0, 8.0]) if "centre" in kind else None)


def _plain_effects(model: TransformerBridge, depth: int, method: Method, draw: int, strength: float) -> Tensor:
    """Dose and rise of the loss over the tokens of all texts, each text read alone."""
    kl, rise = [], []
    for text in TEXTS:
        ids = [first_token(model), *_ids(model, text)]
        before = _log_probs(model, ids, [])
        after = _log_probs(model, ids, [(site(model, depth), _change(method, draw, strength))])
        said, at = ids[2:], range(1, len(ids) - 1)
        kl.append(kl_div(after[1:], before[1:], reduction="none", log_target=True).sum(-1))
        rise.append(before[at, said] - after[at, said])
    return torch.stack([torch.cat(kl).mean(), torch.cat(rise).mean()])


def _change(method: Method, draw: int, strength: float) -> Callable:
    vector = method.vectors[draw]

    def change(resid: Tensor, hook) -> Tensor:
        after = resid.clone()
        for position in range(1, resid.shape[1]):
            if isinstance(method, Add):
                after[0, position] += strength * vector
            else:
                along = vector / vector.norm()
                target = 0.0 if method.centre is None else method.centre[draw]
                after[0, position] += strength * (target - resid[0, position] @ along) * along
        return after

    return change


def _log_probs(model: TransformerBridge, ids: list[int], hooks: list[tuple[str, Callable]]) -> Tensor:
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return model.original_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)


def _ids(model: TransformerBridge, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]
