"""The shape of a dose-response curve: does it rise and then fall, and how large a fall could have been seen?"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import t as student
from scipy.stats import ttest_1samp
from torch import Tensor

from helpers.stats import holm


def turns(
    curves: Float[Tensor, "curve prompt strength"],
    strengths: Sequence[float],
    validation: Bool[Tensor, "prompt"],
    alpha: float = 0.05,
    power: float = 0.8,
) -> pd.DataFrame:
    """A test of every curve over strength for a turn: first one way, then back. One row per curve:

    peak (whether the turn is one) and at (its strength), chosen on the validation prompts; there, on the other prompts,
    `way` from strength 0 to the turn and `back` from the turn to the greatest strength (positive in the direction of a
    turn); p (the larger of two one-sided t-tests, so both must hold: an intersection-union test, Berger 1982, like the
    two lines of Simonsohn 2018) and p_holm over the curves; `visible`, the smallest `back` that this test finds with
    the given power at alpha over the number of curves.

    Strengths ascend from 0. Raises ValueError for fewer than three, for values that are missing or not finite, and for
    fewer than two prompts on either side.
    """
    if len(strengths) < 3 or strengths[0] != 0 or list(strengths) != sorted(set(strengths)):
        raise ValueError(f"a turn needs three strengths or more that ascend from 0, got {list(strengths)}")
    if len(strengths) != curves.shape[-1] or not curves.isfinite().all():
        raise ValueError(f"a turn needs a finite value for each of the {len(strengths)} strengths")
    if min(validation.sum(), (~validation).sum()) < 2:
        raise ValueError("a turn needs at least two validation prompts and two others")
    way = curves[..., 1:-1] - curves[..., :1]
    back = curves[..., 1:-1] - curves[..., -1:]
    rows = []
    for one_way, one_back in zip(way, back):
        chosen = torch.minimum(one_way[validation].mean(0), one_back[validation].mean(0))
        valley = torch.minimum(-one_way[validation].mean(0), -one_back[validation].mean(0))
        peak = bool(chosen.max() >= valley.max())
        at, sign = int((chosen if peak else valley).argmax()), 1 if peak else -1
        there, returned = (sign * part[~validation, at].double() for part in (one_way, one_back))
        p = max(_one_sided(there), _one_sided(returned))
        n = len(returned)
        reach = student.ppf(1 - alpha / len(curves), n - 1) + student.ppf(power, n - 1)
        visible = float(reach * returned.std() / n**0.5)
        rows.append((peak, strengths[1 + at], there.mean().item(), returned.mean().item(), p, visible))
    found = pd.DataFrame(rows, columns=["peak", "at", "way", "back", "p", "visible"])
    return found.assign(p_holm=holm(found["p"].tolist()))


def curves(runs: pd.DataFrame, value: str, prompts: Sequence[str]) -> Float[Tensor, "curve prompt strength"]:
    """A column of a sweep as one curve per method and draw, from strength 0 upwards; prompts in the given order.

    A strength that a draw lacks (a dose that it does not reach) has the value of the one before.
    """
    zero = runs[runs["strength"] == 0].set_index("prompt")[value].loc[list(prompts)]
    found = []
    for _, part in runs[runs["strength"] != 0].groupby(["method", "draw"], sort=False):
        table = part.pivot(index="prompt", columns="strength", values=value).loc[list(prompts)]
        table = table.reindex(columns=sorted(runs["strength"].unique()))
        table[0.0] = zero
        found.append(table.sort_index(axis=1).ffill(axis=1).to_numpy())
    return torch.tensor(np.stack(found), dtype=torch.float32)


def falls(
    curves: Float[Tensor, "curve prompt strength"], validation: Bool[Tensor, "prompt"], confidence: float
) -> pd.DataFrame:
    """How far each curve falls from its highest mean to the greatest strength: value, low, high (t-intervals).

    Where it is highest is chosen on the validation prompts, the fall is measured on the others.
    """
    at = curves[:, validation].mean(1).argmax(-1)
    rows = []
    for curve, highest in zip(curves[:, ~validation], at):
        fall = (curve[:, highest] - curve[:, -1]).double()
        reach = student.ppf((1 + confidence) / 2, len(fall) - 1) * (fall.std() / len(fall) ** 0.5).item()
        rows.append((fall.mean().item(), fall.mean().item() - reach, fall.mean().item() + reach))
    return pd.DataFrame(rows, columns=["value", "low", "high"])


def _one_sided(values: Float[Tensor, "prompt"]) -> float:
    """p of the mean being above 0; 1 where nothing varies around 0 or below."""
    if values.std() == 0:
        return 0.0 if values[0] > 0 else 1.0
    return float(ttest_1samp(values.numpy(), 0, alternative="greater").pvalue)
