"""How well a direction fitted on some pairs tells the two sides of other pairs apart, and what words or chance give.

Every reader returns scores, side x draw x depth x pair: draw 0 holds the data as they are, the others a bootstrap
that resamples train pairs (the reader is fitted anew) and test pairs. Readers given the same Resampling can be
compared draw by draw. `summary` and `excess` make tidy tables of scores: depth, statistic, value, low, high.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Generator, Tensor

from helpers.config import CFG
from helpers.directions import projections, refitted
from helpers.prompts import CLOSERS, SENTENCE_ENDS, SIDES, sides
from helpers.stats import (
    auroc,
    bootstrap_picks,
    centred_interval,
    cohens_d,
    counts,
    gap_over_total_sd,
    interval,
    overlap,
    paired_accuracy,
    paired_d_z,
    permutation_p,
    sign_flips,
)

Train = Float[Tensor, "side train depth d_model"]
Test = Float[Tensor, "side test depth d_model"]
Scores = Float[Tensor, "side draw depth pair"]
STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gap / total SD": gap_over_total_sd,
    "Cohen's d": cohens_d,
    "d_z": paired_d_z,
    "AUROC": auroc,
    "paired accuracy": paired_accuracy,
    "overlap": overlap,
}

SHARES = ("AUROC", "paired accuracy", "overlap")  # between 0 and 1, and so are their intervals


@dataclass(frozen=True)
class Resampling:
    """Weights on the train pairs and picks of the test pairs, draw by draw; draw 0 takes each pair once."""

    weights: Float[Tensor, "draw train"]
    picks: Int[Tensor, "draw test"]


def resampling(train: int, test: int, generator: Generator, draws: int = CFG.bootstrap_draws) -> Resampling:
    """`draws` bootstrap samples of both sets of pairs, after the data as they are."""
    weights = counts(bootstrap_picks(draws, train, generator), train)
    picks = bootstrap_picks(draws, test, generator)
    return Resampling(
        torch.cat([torch.full((1, train), 1 / train), weights]), torch.cat([torch.arange(test)[None], picks])
    )


def direction_scores(train: Train, test: Test, draws: Resampling) -> Scores:
    """The test pairs along the difference-in-means direction of the train pairs, in residual-stream units."""
    found = _projected(test, refitted(train[0] - train[1], draws.weights))
    return found.gather(-1, draws.picks[None, :, None].expand(*found.shape))


def along(
    direction: Float[Tensor, "d_model"],
    test: Float[Tensor, "side pair d_model"],
    generator: Generator,
    draws: int = CFG.bootstrap_draws,
) -> Scores:
    """The test pairs along a direction that is not refitted, at one depth; draws resample the pairs."""
    picks = torch.cat([torch.arange(test.shape[1])[None], bootstrap_picks(draws, test.shape[1], generator)])
    return _projected(test[:, :, None], direction[None, None])[:, 0, 0][:, picks][:, :, None]


def word_scores(train: pd.DataFrame, test: pd.DataFrame, draws: Resampling) -> Scores:
    """Log-odds from a logistic regression on word counts; one depth, since a bag of words has none.

    It knows which words occur and nothing of their order: what it reaches is what words alone give away.
    """
    vectorizer = CountVectorizer(token_pattern=r"[\w']+")
    seen = vectorizer.fit_transform(sides(train))
    unseen = vectorizer.transform(sides(test))
    is_emotional = [1] * len(train) + [0] * len(train)
    found = []
    for weights, picks in zip(draws.weights * len(train), draws.picks):
        fitted = LogisticRegression(solver="liblinear").fit(seen, is_emotional, sample_weight=weights.repeat(2).numpy())
        scores = torch.tensor(fitted.decision_function(unseen), dtype=torch.float32).view(2, len(test))
        found.append(scores[:, picks])
    return torch.stack(found, 1)[:, :, None]


def random_scores(directions: Float[Tensor, "draw depth d_model"], train: Train, test: Test) -> Scores:
    """The test pairs along random directions, one per draw.

    Each is pointed the way that puts the emotional train pairs higher, as a fitted direction would be.
    """
    sign = torch.einsum("nld,ld->nl", directions, (train[0] - train[1]).mean(0)).sign()
    return _projected(test, directions * sign[..., None])


def shuffled_label_scores(train: Train, test: Test, generator: Generator, draws: int = CFG.permutation_draws) -> Scores:
    """The test pairs along directions fitted after the sides of random train pairs were swapped, one per draw."""
    return _projected(test, refitted(train[0] - train[1], sign_flips(draws, train.shape[1], generator)))


def summary(scores: Scores) -> pd.DataFrame:
    """Every statistic at every depth: value from draw 0, `stats.centred_interval` over the bootstrap draws."""
    return _refit_table({name: statistic(*scores) for name, statistic in STATISTICS.items()})


def null_summary(scores: Scores) -> pd.DataFrame:
    """Every statistic at every depth of readers drawn at random: median as value, quantiles as low and high."""
    tables = []
    for name, statistic in STATISTICS.items():
        drawn = statistic(*scores)
        tables.append(_table(name, drawn.quantile(0.5, 0), *interval(drawn, CFG.confidence)))
    return pd.concat(tables, ignore_index=True)


def summaries(scores: dict[str, Scores], summarised: Callable[[Scores], pd.DataFrame] = summary) -> pd.DataFrame:
    """`summary` (or `null_summary`) of several readers under each other, named in the column `condition`."""
    return pd.concat([summarised(each).assign(condition=name) for name, each in scores.items()], ignore_index=True)


def excess(
    ours: Scores, theirs: Float[Tensor, "side other_draw other_depth pair"], statistic: str = "AUROC"
) -> pd.DataFrame:
    """How much more one reader's statistic is than another's, compared draw by draw.

    Raises ValueError unless both come from the same number of draws and of depths (or one of them has one depth).
    """
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"readers with {ours.shape[1]} and {theirs.shape[1]} draws cannot be compared draw by draw")
    if ours.shape[2] != theirs.shape[2] and 1 not in (ours.shape[2], theirs.shape[2]):
        raise ValueError(f"readers with {ours.shape[2]} and {theirs.shape[2]} depths cannot be compared")
    measure = STATISTICS[statistic]
    return _refit_table({f"excess {statistic}": measure(*ours) - measure(*theirs)})


def permutation_test(
    train: Train, test: Test, generator: Generator, draws: int = CFG.permutation_draws
) -> pd.DataFrame:
    """p of every statistic at every depth when sides are swapped within random pairs, in train and test, and refitted.

    `p_max` compares with the largest statistic over all depths of a draw (Westfall & Young 1993), so the smallest
    p_max of a table needs no further correction. For `overlap` small is strong, so its sign is turned.
    """
    observed = _projected(test, refitted(train[0] - train[1], torch.ones(1, train.shape[1])))
    swapped = _projected(test, refitted(train[0] - train[1], sign_flips(draws, train.shape[1], generator)))
    swap = (sign_flips(draws, test.shape[1], generator) < 0)[:, None]
    swapped = torch.where(swap, swapped.flip(0), swapped)
    tables = []
    for name, statistic in STATISTICS.items():
        sign = -1 if name == "overlap" else 1
        value, null = sign * statistic(*observed)[0], sign * statistic(*swapped)
        p, p_max = permutation_p(value, null), permutation_p(value, null.amax(-1, keepdim=True))
        rows = {"depth": range(len(value)), "statistic": name, "p": p.tolist(), "p_max": p_max.tolist()}
        tables.append(pd.DataFrame(rows))
    return pd.concat(tables, ignore_index=True)


def shuffled_words(table: pd.DataFrame, generator: Generator) -> pd.DataFrame:
    """The same pairs with the words of every text in random order, the closing punctuation left at the end."""

    def shuffled(text: str) -> str:
        closing = re.search(rf"[{re.escape(SENTENCE_ENDS + CLOSERS)}]*$", text)
        words = text[: closing.start()].split()
        return " ".join(words[i] for i in torch.randperm(len(words), generator=generator)) + closing.group()

    return table.assign(**{side: table[side].map(shuffled) for side in SIDES})


def _projected(test: Test, directions: Float[Tensor, "draw depth d_model"]) -> Scores:
    if not test.isfinite().all():
        raise ValueError("the test pairs hold non-finite activations: load the model in float32")
    return torch.stack([projections(side, directions) for side in test])


def _refit_table(found: dict[str, Float[Tensor, "draw depth"]]) -> pd.DataFrame:
    """Statistics by draw and depth as rows: draw 0 is the value, the others give the interval."""
    tables = []
    for name, drawn in found.items():
        low, high = centred_interval(drawn[0], drawn[1:], CFG.confidence)
        if name in SHARES:
            low, high = low.clamp(0, 1), high.clamp(0, 1)
        tables.append(_table(name, drawn[0], low, high))
    return pd.concat(tables, ignore_index=True)


def _table(statistic: str, value: Tensor, low: Tensor, high: Tensor) -> pd.DataFrame:
    numbers = {"value": value.tolist(), "low": low.tolist(), "high": high.tolist()}
    return pd.DataFrame({"depth": range(len(value)), "statistic": statistic, **numbers})
