"""Whether a feature fires for its emotion, or for sentences of that kind and emotions of any kind."""

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from helpers.config import CFG
from helpers.stats import bootstrap_picks, interval, permutation_p, sign_flips


def specificity(
    acts: Float[Tensor, "prompt d_sae"], table: pd.DataFrame, chosen: pd.DataFrame, generator: Generator
) -> pd.DataFrame:
    """How much more each emotion's features fire at its key word than on matched sentences and on other emotions.

    `table` holds the rows of `acts`: kinds "key word" and "matched", partners in the same order. `chosen` has the
    columns emotion, feature. One row per feature and `against`: value (mean difference), its bootstrap interval over
    sentences, and p_max, which compares with the largest studentised difference of all features in a permutation
    (Westfall & Young 1993): sides swapped within pairs, or emotions shuffled between sentences. Raises ValueError when
    key-word and matched rows are not partners.
    """
    table = table.reset_index(drop=True)
    own, matched = table[table["kind"] == "key word"], table[table["kind"] == "matched"]
    if own["id"].str.replace("key-word", "matched").tolist() != matched["id"].tolist():
        raise ValueError("the key-word sentences and the matched ones are not partners in the same order")
    features, draws, count = chosen["feature"].tolist(), CFG.permutation_draws, len(own)
    at_word = acts[own.index][:, features]
    pairs = at_word - acts[matched.index][:, features]
    mine = torch.tensor([[word == emotion for emotion in chosen["emotion"]] for word in own["emotion"]])

    shuffles = [torch.randperm(count, generator=generator) for _ in range(draws)]
    t = {
        "matched sentences": _within(pairs, mine),
        "other emotions": _between(at_word, mine),
    }
    null = {
        "matched sentences": [_within(pairs * signs[:, None], mine) for signs in sign_flips(draws, count, generator)],
        "other emotions": [_between(at_word, mine[shuffle]) for shuffle in shuffles],
    }
    rows = []
    for against, observed in t.items():
        p = permutation_p(observed, torch.stack(null[against]).amax(-1, keepdim=True))
        for i, one in enumerate(chosen.itertuples()):
            paired = against == "matched sentences"
            ours = (pairs if paired else at_word)[mine[:, i], i]
            theirs = torch.zeros(1) if paired else at_word[~mine[:, i], i]
            value, ends = (ours.mean() - theirs.mean()).item(), difference_interval(ours, theirs, generator)
            rows.append((one.emotion, one.feature, against, value, *ends, p[i].item()))
    return pd.DataFrame(rows, columns=["emotion", "feature", "against", "value", "low", "high", "p_max"])


def by_kind(
    at_word: Float[Tensor, "prompt d_sae"],
    anywhere: Float[Tensor, "prompt d_sae"],
    table: pd.DataFrame,
    chosen: pd.DataFrame,
    generator: Generator,
) -> pd.DataFrame:
    """What else each emotion's features fire on: emotion, feature, kind, activation, low, high, relative.

    `at_word` holds activations at each row's word; `anywhere` the largest of each sentence, which alone says something
    of "implicit" sentences, for they have no such word. low and high bound the mean difference to the emotion's matched
    sentences, read in the same way; `relative` is the activation in units of that on the key word.
    """
    table, rows = table.reset_index(drop=True), []
    for one in chosen.itertuples():
        here = table["emotion"] == one.emotion
        for kind in table["kind"].unique():
            acts = anywhere if kind == "implicit" else at_word
            own, other = (acts[table.index[here & (table["kind"] == k)], one.feature] for k in (kind, "matched"))
            word = acts[table.index[here & (table["kind"] == "key word")], one.feature].mean().item() or torch.nan
            if len(own):
                ends = difference_interval(own, other, generator)
                rows.append((one.emotion, one.feature, kind, own.mean().item(), *ends, own.mean().item() / word))
    return pd.DataFrame(rows, columns=["emotion", "feature", "kind", "activation", "low", "high", "relative"])


def reading(kinds: pd.DataFrame) -> pd.DataFrame:
    """Each feature by what it fires on more than on matched sentences (interval above 0).

    One row per feature: emotion, feature, `fires on`, `reads`.

    "concept": synonyms and situations without the word. "word": the mentioned word or its other sense, no synonyms.
    "emotion word": synonyms, but no situations. "unclear": anything else.
    """
    rows = []
    for (emotion, feature), part in kinds.groupby(["emotion", "feature"], sort=False):
        on = set(part.loc[part["low"] > 0, "kind"])
        if {"synonym", "implicit"} <= on:
            reads = "concept"
        elif "synonym" in on:
            reads = "emotion word"
        else:
            reads = "word" if on & {"mention", "other sense"} else "unclear"
        rows.append((emotion, feature, ", ".join(kind for kind in part["kind"] if kind in on), reads))
    return pd.DataFrame(rows, columns=["emotion", "feature", "fires on", "reads"])


def difference_interval(
    ours: Float[Tensor, "row"], theirs: Float[Tensor, "*other"], generator: Generator, confidence: float | None = None
) -> tuple[float, float]:
    """Percentile bootstrap interval of the difference of two means, both groups resampled."""
    a, b = (values[bootstrap_picks(CFG.bootstrap_draws, len(values), generator)].mean(-1) for values in (ours, theirs))
    low, high = interval(a - b, confidence or CFG.confidence)
    return low.item(), high.item()


def _within(pairs: Float[Tensor, "prompt feature"], mine: Bool[Tensor, "prompt feature"]) -> Float[Tensor, "feature"]:
    """Mean difference within each feature's own pairs over its standard error."""
    count = mine.sum(0)
    mean = (pairs * mine).sum(0) / count
    return _ratio(mean, ((pairs - mean).pow(2) * mine).sum(0).sqrt() / count)


def _between(
    at_word: Float[Tensor, "prompt feature"], mine: Bool[Tensor, "prompt feature"]
) -> Float[Tensor, "feature"]:
    """Difference between each feature's own sentences and the others over its standard error (Welch 1947)."""
    means, errors = [], []
    for side in (mine, ~mine):
        count = side.sum(0)
        means.append((at_word * side).sum(0) / count)
        errors.append(((at_word - means[-1]).pow(2) * side).sum(0) / count.pow(2))
    return _ratio(means[0] - means[1], sum(errors).sqrt())


def _ratio(value: Tensor, spread: Tensor) -> Tensor:
    return torch.where(value == 0, 0.0, value / spread.clamp(min=1e-12))
