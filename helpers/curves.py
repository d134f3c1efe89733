"""Curves over depth with their nulls, and whether they are U-shaped. Tables as `geometry_plots` takes them."""

from collections.abc import Mapping

import pandas as pd
import torch
from jaxtyping import Float
from torch import Generator, Tensor

from helpers.config import CFG
from helpers.decoding import Design, TestDepths, curve, line, over_depth
from helpers.findings import Reader, labels
from helpers.geometry import AllDepths, anisotropy, cosine_curves, quadratic
from helpers.stats import interval

Drawn = Float[Tensor, "draw depth"]
Shuffled = Float[Tensor, "shuffle depth"]


def cosines(mine: Reader, twins: Mapping[str, Reader], generator: Generator) -> tuple[pd.DataFrame, Drawn, Shuffled]:
    """Mean pairwise cosine over depth of raw, minus-neutral and centred vectors, all topics, with what each means.

    A table (panel, condition, depth, value, low, high) of the model, shuffled labels, twins, two unrelated texts (the
    anisotropy of single ones) and -1/(K-1); then the minus-neutral curve in draws of topics and of shuffled labels.
    """
    every = mine.everything
    resampled, shuffled = (labels(mine, kind, generator).every_topic for kind in ("resampled", "shuffled"))
    own, dealt = (cosine_curves(every, mine.neutral, draws) for draws in (resampled, shuffled))
    lines = [curve(drawn).assign(panel=panel, condition="the model") for panel, drawn in own.items()]
    lines += [curve(drawn, True).assign(panel=panel, condition="shuffled labels") for panel, drawn in dealt.items()]
    for name, twin in twins.items():
        found = cosine_curves(twin.everything, twin.neutral, resampled[:1])
        lines += [line(drawn[0]).assign(panel=panel, condition=name) for panel, drawn in found.items()]
    unrelated = torch.tensor([anisotropy(every[:, :, depth]) for depth in range(every.shape[2])])
    constant = torch.full_like(unrelated, -1 / (every.shape[1] - 1))
    lines += [
        line(unrelated).assign(panel="raw", condition="two unrelated texts"),
        line(constant).assign(panel="centred", condition="-1 / (K - 1)"),
    ]
    return pd.concat(lines, ignore_index=True), own["minus neutral"], dealt["minus neutral"]


def decodability(
    ways: Mapping[str, tuple[AllDepths, TestDepths]], twins: Mapping[str, Reader], bootstrap: Design, shuffles: Design
) -> tuple[pd.DataFrame, dict[str, Drawn], Shuffled]:
    """Held-out AUROC over depth of every way (train and test texts), of the twins, and of shuffled labels.

    A table (condition, depth, value, low, high), the ways' AUROC by draw, and that of the first way's shuffled labels.
    """
    drawn = {name: over_depth(*acts, bootstrap)["AUROC"] for name, acts in ways.items()}
    lines = [curve(each).assign(condition=name) for name, each in drawn.items()]
    once = Design(bootstrap.fit[:1], bootstrap.picks[:1])
    for name, twin in twins.items():
        found = over_depth(twin.by_split["train"], twin.by_split["test"], once)["AUROC"]
        lines.append(line(found[0]).assign(condition=name))
    null = over_depth(*next(iter(ways.values())), shuffles)["AUROC"]
    lines.append(curve(null, True).assign(condition="random: shuffled labels"))
    return pd.concat(lines, ignore_index=True), drawn, null


def parabolas(measures: Mapping[str, Mapping[str, Drawn]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Points and fitted parabolas of curves by measure and condition; a measure named "highest ..." is best on top.

    Points: measure, condition, relative depth, value. Fits: square, linear, constant; the interval of `square`; `best`,
    the depth of the best point, and `turn`, that of the parabola, each with an interval over draws. A condition with
    one draw has no intervals.
    """
    points, fits = [], []
    for measure, conditions in measures.items():
        sign = -1 if measure.startswith("highest") else 1
        for condition, drawn in conditions.items():
            relative = torch.linspace(0, 1, drawn.shape[1])
            where = {"measure": measure, "condition": condition}
            points.append(pd.DataFrame({"relative depth": relative, "value": drawn[0]}).assign(**where))
            fit, turn = quadratic(relative, sign * drawn)
            best = relative[(sign * drawn).argmin(-1)]
            row = where | dict(zip(("square", "linear", "constant"), (sign * fit[0]).tolist()))
            for name, found in (("square", sign * fit[:, 0]), ("best", best), ("turn", turn)):
                low, high = interval(found[1:], CFG.confidence) if len(found) > 1 else (torch.nan, torch.nan)
                row |= {name: float(found[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
            fits.append(row)
    return pd.concat(points, ignore_index=True), pd.DataFrame(fits)
