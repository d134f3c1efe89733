"""Statistics of two groups of projections, with intervals and permutation tests.

Every statistic reads the last axis and keeps the others (depths, draws), so resampled data go through in one call.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Shaped
from scipy.stats import binomtest, spearmanr
from torch import Generator, Tensor

Group = Float[Tensor, "*any group"]
Other = Float[Tensor, "*any other"]  # a second group, which may differ in size
Values = Float[Tensor, "*any"]


def gap_over_total_sd(emotional: Group, neutral: Other) -> Values:
    """Gap between the means over the standard deviation (ddof 0) of all points taken together.

    Figures published as "Cohen's d" for GPT-2's fear direction (Magee 2026) fit this formula. Two equal groups give
    at most 2, however far apart they are: see `from_cohens_d`.
    """
    return _ratio(_gap(emotional, neutral), torch.cat([emotional, neutral], -1).std(-1, correction=0))


def cohens_d(emotional: Group, neutral: Other) -> Values:
    """Gap between the means over the pooled within-group standard deviation (Cohen 1988, p. 67)."""
    n, m = emotional.shape[-1], neutral.shape[-1]
    _at_least(2, n, m)
    pooled = ((n - 1) * emotional.var(-1) + (m - 1) * neutral.var(-1)) / (n + m - 2)
    return _ratio(_gap(emotional, neutral), pooled.sqrt())


def paired_d_z(emotional: Group, neutral: Group) -> Values:
    """Mean within-pair difference over its standard deviation (Cohen 1988, p. 48; d_z in Lakens 2013)."""
    _at_least(2, emotional.shape[-1])
    difference = emotional - neutral
    return _ratio(difference.mean(-1), difference.std(-1))


def auroc(emotional: Group, neutral: Other) -> Values:
    """Chance that a random emotional point lies above a random neutral one, ties counting half.

    The area under the ROC curve, and Mann-Whitney's U over the number of comparisons (Hanley & McNeil 1982). Raises
    ValueError for NaN, which would count as the highest point.
    """
    ordered = torch.from_numpy(np.sort(neutral.numpy(force=True))).to(neutral.device)  # many times faster than torch's
    _no_nan(emotional, neutral)
    points = emotional.contiguous()
    below = torch.searchsorted(ordered, points) + torch.searchsorted(ordered, points, right=True)
    return below.float().mean(-1) / (2 * neutral.shape[-1])


def paired_accuracy(emotional: Group, neutral: Group) -> Values:
    """Share of pairs whose emotional side lies above the neutral one, ties counting half."""
    return (emotional - neutral).sign().add(1).div(2).mean(-1)


def overlap(emotional: Group, neutral: Other) -> Values:
    """Smallest sum of both error rates that a single threshold can reach: 0 means that no point is out of order.

    One minus the one-sided Kolmogorov-Smirnov distance. Raises ValueError for NaN, which would count as in order.
    """
    _no_nan(emotional, neutral)
    cuts = torch.cat([emotional, neutral], -1)[..., None]
    missed = (emotional[..., None, :] < cuts).float().mean(-1)
    false_alarms = (neutral[..., None, :] >= cuts).float().mean(-1)
    return (missed + false_alarms).amin(-1)


def explained_variance(acts: Float[Tensor, "row d_model"], reconstructed: Float[Tensor, "row d_model"]) -> float:
    """1 - sum of squared errors / sum of squared distances from the mean; below 0 when the mean does better."""
    acts, reconstructed = acts.double(), reconstructed.double()
    return 1 - ((acts - reconstructed).pow(2).sum() / (acts - acts.mean(0)).pow(2).sum()).item()


def from_cohens_d(d: float) -> float:
    """The `gap_over_total_sd` of two equal, large groups with this Cohen's d: d / sqrt(1 + d^2 / 4), below 2.

    The variance of all points together is the within-group variance plus a quarter of the squared gap.
    """
    return d / math.sqrt(1 + d**2 / 4)


def to_cohens_d(ratio: float, group: int) -> float:
    """The Cohen's d of two groups of this size whose `gap_over_total_sd` is `ratio`.

    Inverts the formula exactly: within-group variance (ddof 0) = 1 - ratio^2 / 4 in units of the total variance, and
    the pooled variance has 2 * group - 2 degrees of freedom. Raises ValueError for a ratio of 2 or more.
    """
    if not abs(ratio) < 2:
        raise ValueError(f"gap over total SD is always below 2 for equal groups, got {ratio}")
    return ratio / math.sqrt((1 - ratio**2 / 4) * group / (group - 1))


def bootstrap_picks(draws: int, rows: int, generator: Generator) -> Shaped[Tensor, "draw row"]:
    """Row numbers drawn with replacement, one line per bootstrap draw (Efron 1979)."""
    return torch.randint(rows, (draws, rows), generator=generator)


def counts(picks: Shaped[Tensor, "draw row"], rows: int) -> Float[Tensor, "draw rows"]:
    """How often each draw holds each row, as weights that sum to one."""
    weights = torch.zeros(len(picks), rows)
    return weights.scatter_add_(1, picks, torch.ones(picks.shape)) / picks.shape[1]


def sign_flips(draws: int, pairs: int, generator: Generator) -> Float[Tensor, "draw pair"]:
    """Random signs: -1 swaps the emotional and the neutral side of a pair."""
    return torch.randint(2, (draws, pairs), generator=generator) * 2.0 - 1


def centred_interval(value: Values, draws: Float[Tensor, "draw *any"], confidence: float) -> tuple[Values, Values]:
    """The spread of refitted bootstrap draws around their median, laid around the value.

    A draw fits its reader on about 63 % of the distinct pairs, so it scores lower than the value by construction, and
    a plain percentile interval inherits that: it can exclude the value itself. What the draws do tell is how far a
    score moves when train and test pairs are drawn anew. Near a ceiling (every pair in order) the draws hardly move and
    the interval is too narrow, as any bootstrap's is. tests/test_stats.py holds its coverage away from there.
    """
    low, high = interval(draws, confidence)
    shift = value - draws.quantile(0.5, 0)
    return low + shift, high + shift


def interval(draws: Float[Tensor, "draw *any"], confidence: float) -> tuple[Values, Values]:
    """Percentile interval over the first axis (Efron & Tibshirani 1993, ch. 13)."""
    tail = (1 - confidence) / 2
    return draws.quantile(tail, 0), draws.quantile(1 - tail, 0)


def mean_interval(
    values: Float[Tensor, "row"], generator: Generator, draws: int, confidence: float
) -> tuple[float, float, float]:
    """Mean, and its percentile bootstrap interval over rows."""
    low, high = interval(values[bootstrap_picks(draws, len(values), generator)].mean(-1), confidence)
    return values.mean().item(), low.item(), high.item()


def correlation(
    x: Float[Tensor, "row"], y: Float[Tensor, "row"], generator: Generator, draws: int, confidence: float
) -> tuple[float, float, float]:
    """Pearson's r, and its percentile bootstrap interval over rows; NaN where one side does not vary."""
    picks = torch.cat([torch.arange(len(x))[None], bootstrap_picks(draws, len(x), generator)])
    centred = [values[picks].double() - values[picks].double().mean(-1, keepdim=True) for values in (x, y)]
    r = (centred[0] * centred[1]).sum(-1) / (centred[0].norm(dim=-1) * centred[1].norm(dim=-1))
    low, high = interval(r[1:], confidence)
    return r[0].item(), low.item(), high.item()


def pearson(x: Float[Tensor, "*any row"], y: Float[Tensor, "*other row"]) -> Float[Tensor, "*both"]:
    """Pearson's r over the last axis; 0 where one side does not vary."""
    return (standardised(x) * standardised(y)).sum(-1).float()


def standardised(values: Float[Tensor, "*any row"]) -> Float[Tensor, "*any row"]:
    """Minus the mean, at length 1; zero where nothing varies, rounding apart."""
    centred = values.double() - values.double().mean(-1, keepdim=True)
    length = centred.norm(dim=-1, keepdim=True)
    return centred / length.where(length > 1e-12, torch.inf)


def spearman(
    table: pd.DataFrame, x: str, y: str, by: str, generator: Generator, draws: int, confidence: float
) -> tuple[float, float, float]:
    """Spearman's rank correlation of two columns, and its bootstrap interval over the groups in the column `by`."""
    groups = [part[[x, y]].to_numpy() for _, part in table.groupby(by)]
    picks = bootstrap_picks(draws, len(groups), generator).tolist()
    drawn = [spearmanr(np.concatenate([groups[i] for i in pick])).statistic for pick in picks]
    low, high = interval(torch.tensor(drawn, dtype=torch.double), confidence)
    return float(spearmanr(table[x], table[y]).statistic), low.item(), high.item()


def share_interval(hits: int, of: int, confidence: float) -> tuple[float, float, float]:
    """A share and its exact binomial interval (Clopper & Pearson 1934)."""
    exact = binomtest(hits, of).proportion_ci(confidence)
    return hits / of, exact.low, exact.high


def permutation_p(observed: Float[Tensor, "*#any"], null: Float[Tensor, "draw *#any"]) -> Values:
    """Share of null draws at or above the observed value, which itself counts as one (Phipson & Smyth 2010).

    What cannot be compared counts as above: without a value or without a null there is no evidence, and p is 1.
    """
    return ((~(null < observed)).sum(0) + 1) / (len(null) + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, in their own order (Holm 1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def finite(values: Values, what: str) -> Values:
    """The values, none of which is NaN or infinite; ValueError that says what they are otherwise."""
    if not values.isfinite().all():
        raise ValueError(f"{what} hold NaN or infinity")
    return values


def _no_nan(emotional: Group, neutral: Other) -> None:
    if emotional.isnan().any() or neutral.isnan().any():
        raise ValueError("points to compare hold NaN: is every activation and every direction finite?")


def _gap(emotional: Group, neutral: Other) -> Values:
    _at_least(1, emotional.shape[-1], neutral.shape[-1])
    return emotional.mean(-1) - neutral.mean(-1)


def _ratio(gap: Values, spread: Values) -> Values:
    """gap / spread, and 0 without a gap, also where nothing varies."""
    return torch.where(gap == 0, 0.0, gap / spread)


def _at_least(needed: int, *sizes: int) -> None:
    if min(sizes) < needed:
        raise ValueError(f"needs at least {needed} points in each group, got {min(sizes)}")
