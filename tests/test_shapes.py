"""Turns of dose-response curves: planted ones are found, curves without one are not, and the power is as stated."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Generator, Tensor

from helpers.shapes import curves, falls, turns
from helpers.stats import holm

STRENGTHS = [0.0, 0.5, 1.0, 2.0, 4.0]
VALIDATION = torch.arange(32) < 8
PEAK, VALLEY = torch.tensor([0.0, 1, 3, 2, 1]), torch.tensor([0.0, -1, -2, -4, -1])
NULLS = {
    "flat": [0.0, 0, 0, 0, 0],
    "rising": [0.0, 1, 2, 3, 4],
    "falling": [0.0, -1, -2, -3, -4],
    "rising to a plateau": [0.0, 2, 2, 2, 2],  # back is exactly 0: the null curve that is hardest to keep out
    "falling at the end": [0.0, 0, 0, 0, -2],  # way is exactly 0
}


def noisy(means: Tensor, generator: Generator, prompts: int = 32, noise: float = 1.0) -> Tensor:
    """Curve x prompt x strength: normal noise around the mean curves, and a level of its own for every prompt."""
    level = 5 * torch.randn(len(means), prompts, 1, generator=generator)
    return means[:, None] + level + noise * torch.randn(len(means), prompts, means.shape[-1], generator=generator)


def test_a_planted_peak_and_a_planted_valley_are_found_where_they_are(generator: Generator):
    found = turns(noisy(torch.stack([PEAK, VALLEY]), generator, noise=0.5), STRENGTHS, VALIDATION)
    assert found["peak"].tolist() == [True, False]
    assert found["at"].tolist() == [1.0, 2.0]
    assert found["way"].tolist() == pytest.approx([3, 4], abs=0.4)
    assert found["back"].tolist() == pytest.approx([2, 3], abs=0.4)
    assert (found["p_holm"] < 1e-6).all()
    assert (found["visible"] < found["back"]).all()


def test_way_back_and_visible_by_hand():
    curves = torch.tensor([[0.0, 5, 1], [0, 5, 1], [0, 3, 2], [1, 6, 1], [2, 9, 1]])[None]
    found = turns(curves, [0, 1, 2], torch.tensor([True, True, False, False, False])).iloc[0]
    assert (found["peak"], found["at"]) == (True, 1)
    assert found["way"] == pytest.approx((3 + 5 + 7) / 3)
    assert found["back"] == pytest.approx((1 + 5 + 8) / 3)
    # two degrees of freedom: t = (2q - 1) / sqrt(2q (1 - q)) at the quantile q
    reach = sum((2 * q - 1) / math.sqrt(2 * q * (1 - q)) for q in (0.95, 0.8))
    assert found["visible"] == pytest.approx(reach * np.std([1, 5, 8], ddof=1) / math.sqrt(3))
    # of the way back, whose mean is the smaller against its spread: the p of Student's t = mean / standard error
    t = 14 / 3 / (np.std([1, 5, 8], ddof=1) / math.sqrt(3))
    assert found["p"] == pytest.approx((1 - t / math.sqrt(t**2 + 2)) / 2)


@pytest.mark.parametrize("null", NULLS.values(), ids=NULLS)
def test_curves_without_a_turn_are_found_at_most_as_often_as_the_level_allows(generator: Generator, null: list[float]):
    found = turns(noisy(torch.tensor(null).expand(400, 5), generator), STRENGTHS, VALIDATION)
    assert (found["p"] < 0.05).mean() <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)
    assert (found["p_holm"] > 0.05).all()


def test_a_plateau_uses_the_level_up(generator: Generator):
    """The test wastes nothing: with no way back, and only then, one curve in twenty has p < .05."""
    plateau = turns(noisy(torch.tensor(NULLS["rising to a plateau"]).expand(2000, 5), generator), STRENGTHS, VALIDATION)
    assert (plateau["p"] < 0.05).mean() == pytest.approx(0.05, abs=0.015)


def test_a_curve_without_noise_turns_or_does_not():
    curves = torch.tensor([NULLS["flat"], NULLS["rising"], PEAK.tolist(), VALLEY.tolist()])[:, None].expand(4, 32, 5)
    found = turns(curves, STRENGTHS, VALIDATION)
    assert found["p"].tolist() == [1, 1, 0, 0]
    assert found["visible"].tolist() == [0, 0, 0, 0]


def test_a_curve_upside_down_turns_the_other_way(generator: Generator):
    curves = noisy(torch.stack([PEAK, VALLEY]), generator)
    found, turned = turns(curves, STRENGTHS, VALIDATION), turns(-curves, STRENGTHS, VALIDATION)
    assert (found["peak"] != turned["peak"]).all()
    assert found.drop(columns="peak").equals(turned.drop(columns="peak"))


def test_what_a_prompt_has_at_every_strength_does_not_count(generator: Generator):
    curves = noisy(torch.stack([PEAK, VALLEY]), generator)
    shifted = turns(curves + 100 * torch.randn(2, 32, 1, generator=generator), STRENGTHS, VALIDATION)
    found = turns(curves, STRENGTHS, VALIDATION)
    assert shifted[["peak", "at"]].equals(found[["peak", "at"]])
    assert np.allclose(shifted[["way", "back", "p"]], found[["way", "back", "p"]], atol=1e-3)


def test_p_is_corrected_for_the_number_of_curves_and_so_is_visible(generator: Generator):
    means = torch.stack([PEAK / 4, VALLEY / 4, PEAK / 2, torch.tensor(NULLS["flat"])])
    curves = noisy(means, generator)
    found = turns(curves, STRENGTHS, VALIDATION)
    assert found["p_holm"].tolist() == holm(found["p"].tolist())
    for number, curve in enumerate(curves):
        alone = turns(curve[None], STRENGTHS, VALIDATION).iloc[0]
        assert alone["p_holm"] == alone["p"] == pytest.approx(found["p"][number])
        assert alone["visible"] < found["visible"][number]
        strict = turns(curve[None], STRENGTHS, VALIDATION, alpha=0.05 / 4).iloc[0]
        assert strict["visible"] == pytest.approx(found["visible"][number])


def test_the_turn_is_chosen_on_validation_prompts_alone(generator: Generator):
    curves = noisy(torch.stack([PEAK, VALLEY]), generator)
    other = curves.clone()
    other[:, ~VALIDATION] = noisy(torch.stack([VALLEY, PEAK]), generator, 24)
    found, swapped = turns(curves, STRENGTHS, VALIDATION), turns(other, STRENGTHS, VALIDATION)
    assert swapped[["peak", "at"]].equals(found[["peak", "at"]])
    assert (swapped["back"] < 0).all() and (swapped["p"] > 0.5).all()


def test_what_is_found_at_the_turn_comes_from_the_other_prompts_alone(generator: Generator):
    curves = noisy(torch.stack([PEAK, VALLEY]), generator)
    other = curves.clone()
    other[:, VALIDATION] = noisy(torch.stack([2 * PEAK, 2 * VALLEY]), generator, 8, noise=0.1)
    found = turns(curves, STRENGTHS, VALIDATION)
    assert found["at"].tolist() == [1.0, 2.0]
    assert turns(other, STRENGTHS, VALIDATION).equals(found)


def test_the_order_of_the_prompts_does_not_matter(generator: Generator):
    curves, order = noisy(torch.stack([PEAK, VALLEY]), generator), torch.randperm(32, generator=generator)
    found, turned = (turns(curves[:, o], STRENGTHS, VALIDATION[o]) for o in (torch.arange(32), order))
    assert found[["peak", "at"]].equals(turned[["peak", "at"]])
    assert np.allclose(found[["way", "back", "p", "visible"]], turned[["way", "back", "p", "visible"]], atol=1e-5)


@pytest.mark.parametrize("power", [0.5, 0.8])
@pytest.mark.parametrize("sign", [1, -1], ids=["peak", "valley"])
def test_a_way_back_as_large_as_visible_is_found_with_the_power_stated(generator: Generator, sign: int, power: float):
    """At alpha over the number of curves, where the way there is certain; 24 prompts."""

    def found(back: float) -> pd.DataFrame:
        means = sign * torch.tensor([0.0, 50, 50 - back]).expand(1000, 3)
        return turns(noisy(means, generator), [0, 1, 2], VALIDATION, alpha=0.5, power=power)

    visible = math.sqrt(found(0)["visible"].pow(2).mean())
    assert (found(visible)["p"] < 0.5 / 1000).mean() == pytest.approx(power, abs=0.05)


@pytest.mark.parametrize(
    "strengths", [[0.0, 1.0], [0.5, 1.0, 2.0], [0.0, 2.0, 1.0], [0.0, -1.0, -2.0], [0.0, 1.0, 1.0]]
)
def test_strengths_that_do_not_ascend_from_0_in_three_steps_are_refused(strengths: list[float]):
    with pytest.raises(ValueError, match="three strengths or more that ascend from 0"):
        turns(torch.zeros(1, 32, len(strengths)), strengths, VALIDATION)


@pytest.mark.parametrize("strengths", [[0.0, 0.5, 1.0, 2.0], [0.0, 0.5, 1.0, 2.0, 4.0, 8.0]])
def test_more_or_fewer_strengths_than_the_curves_have_are_refused(generator: Generator, strengths: list[float]):
    with pytest.raises(ValueError, match="strengths"):
        turns(noisy(torch.stack([PEAK, VALLEY]), generator), strengths, VALIDATION)


@pytest.mark.parametrize("of_validation", [0, 1, 31, 32])
def test_too_few_prompts_on_either_side_are_refused(of_validation: int):
    with pytest.raises(ValueError, match="at least two validation prompts and two others"):
        turns(torch.zeros(1, 32, 5), STRENGTHS, torch.arange(32) < of_validation)


@pytest.mark.parametrize("strength", [0, 2, 4])
def test_a_curve_with_a_gap_is_no_turn(generator: Generator, strength: int):
    """A fall whose end was never measured must not pass for a valley."""
    curves = noisy(torch.stack([torch.tensor(NULLS["falling"]), torch.tensor(NULLS["rising"])]), generator, noise=0.1)
    curves[..., strength] = math.nan
    with pytest.raises(ValueError, match="finite"):
        turns(curves, STRENGTHS, VALIDATION)


def test_no_curves_give_an_empty_table():
    found = turns(torch.zeros(0, 32, 5), STRENGTHS, VALIDATION)
    assert found.empty and list(found) == ["peak", "at", "way", "back", "p", "visible", "p_holm"]


def _runs(rows: list[tuple]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["method", "draw", "strength", "prompt", "odds"])


def test_curves_run_from_strength_0_upwards_with_the_prompts_in_the_order_given():
    value = {"a": 1.0, "b": 10.0}
    zero = [("none", 0, 0.0, prompt, -each) for prompt, each in value.items()]
    steered = [
        (method, draw, strength, prompt, factor * (100 * strength + each))
        for method, draw, factor in (("x", 1, 1), ("x", 0, 2), ("y", 0, 3))
        for strength in (2.0, 0.5)
        for prompt, each in value.items()
    ]
    found = curves(_runs([*steered, *zero]), "odds", ["b", "a"])
    one = torch.tensor([[[60.0, 210], [51, 201]]])
    zeros = torch.tensor([[-10.0], [-1]]).expand(3, 2, 1)  # shared: strength 0 is run once for all
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.cat([zeros, torch.cat([one, 2 * one, 3 * one])], -1))
    assert torch.equal(curves(_runs([*zero, *steered]), "odds", ["a"]), found[:, 1:])


def test_a_strength_that_a_draw_lacks_has_the_value_of_the_one_before():
    rows = [("none", 0, 0.0, "a", 7.0)]
    rows += [("x", draw, strength, "a", 10 * draw + strength) for draw in (1, 2) for strength in (1.0, 2.0, 4.0)]
    short = [row for row in rows if row[1:3] not in ((2, 2.0), (2, 4.0))]
    assert curves(_runs(short), "odds", ["a"]).tolist() == [[[7, 11, 12, 14]], [[7, 21, 21, 21]]]
    late = [row for row in rows if row[1:3] not in ((1, 1.0), (2, 2.0))]
    assert curves(_runs(late), "odds", ["a"]).tolist() == [[[7, 7, 12, 14]], [[7, 21, 21, 24]]]


def test_falls_by_hand():
    validation = torch.tensor([True, False, False, False])
    found = falls(torch.tensor([[[0.0, 9, 1], [0, 4, 3], [8, 6, 3], [1, 5, 0]]]), validation, 0.9)
    assert list(found) == ["value", "low", "high"]
    fall = [4 - 3, 6 - 3, 5 - 0]  # from the strength that is highest for the first prompt, to the greatest
    # two degrees of freedom: t = (2q - 1) / sqrt(2q (1 - q)) at the quantile q
    reach = 0.9 / math.sqrt(2 * 0.95 * 0.05) * np.std(fall, ddof=1) / math.sqrt(3)
    assert found.loc[0].tolist() == pytest.approx([3, 3 - reach, 3 + reach], rel=1e-6)


def test_where_a_curve_is_highest_is_chosen_on_validation_prompts_and_its_fall_measured_on_the_others(
    generator: Generator,
):
    means = noisy(torch.stack([PEAK, torch.tensor(NULLS["rising"])]), generator, noise=0.1)
    found = falls(means, VALIDATION, 0.95)
    assert found["value"].tolist() == pytest.approx([2, 0], abs=0.1)
    assert found.loc[1].tolist() == [0, 0, 0]  # a curve that only rises falls by nothing, whatever the noise
    assert found["low"][0] < 2 < found["high"][0] < 2.2
    other = means.clone()
    other[:, VALIDATION] = noisy(torch.stack([3 * PEAK, 3 * torch.tensor(NULLS["rising"])]), generator, 8)
    assert falls(other, VALIDATION, 0.95).equals(found)
    other[0, VALIDATION] = means[1, VALIDATION]  # which say that it is highest at the end
    assert falls(other, VALIDATION, 0.95).loc[0].tolist() == [0, 0, 0]
    down = falls(-means[:, :, [0, 1, 2]], VALIDATION, 0.95)  # from strength 0 itself
    assert down["value"].tolist() == pytest.approx([3, 2], abs=0.1)


def test_an_interval_of_falls_holds_the_true_fall_as_often_as_it_says(generator: Generator):
    found = falls(noisy(PEAK.expand(2000, 5), generator, noise=0.5), VALIDATION, 0.8)
    assert found["low"].lt(2).mul(found["high"] > 2).mean() == pytest.approx(0.8, abs=0.03)
