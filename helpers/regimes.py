"""What steering did to a text: nothing, a coherent change, a loop, or a blow-up; and whether it did what it should.

Everything is relative to what the unsteered model writes with the same noise. A text has collapsed into repetition if
it loops more, or exploded if the unsteered model finds it less likely, than one unsteered text differs from another.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import residuals, site
from helpers.config import CFG
from helpers.stats import finite, share_interval
from helpers.sweeps import shifted
from helpers.texts import word_kinds

CRITERIA = {
    "more_words": "more words", "higher_read": "higher read-out", "coherent": "not collapsed", "success": "all three"
}  # fmt: skip
REGIMES = ("unchanged", "surgical", "repetitive", "explosive")


@dataclass(frozen=True)
class Limits:
    """How far a text may lie from the unsteered one: perplexity ratio, distinct trigrams lost, longer loop."""

    perplexity: float
    distinct: float
    loop: float


def limits(unsteered: pd.DataFrame, quantile: float = 0.975, across: bool = False) -> Limits:
    """Quantiles of the differences between unsteered texts of the same prompt: columns prompt, sample, measures.

    To be taken on validation prompts. `across` compares the texts of different prompts instead, for greedy ones, of
    which a prompt has but one. Raises ValueError where there are no two texts to compare.
    """
    both = unsteered.merge(unsteered, "cross", suffixes=("", "_other"))
    same = both["prompt"] == both["prompt_other"]
    both = both[~same if across else same & (both["sample"] != both["sample_other"])]
    if both.empty:
        raise ValueError("limits need at least two unsteered texts to compare")
    ratio = both["perplexity"] / both["perplexity_other"]
    lost, longer = both["distinct_other"] - both["distinct"], both["loop"] - both["loop_other"]
    return Limits(*(float(values.quantile(quantile)) for values in (ratio, lost, longer)))


def with_regimes(runs: pd.DataFrame, limit: Limits) -> pd.DataFrame:
    """The runs of a sweep with `regime`, and what decides it: perplexity_ratio, distinct_lost, loop_longer.

    A loop is called so whatever its perplexity, which can be low.
    """
    zero = runs[runs["strength"] == 0].set_index(["prompt", "sample"])
    before = zero.loc[pd.MultiIndex.from_frame(runs[["prompt", "sample"]])]
    found = runs.assign(
        perplexity_ratio=runs["perplexity"].to_numpy() / before["perplexity"].to_numpy(),
        distinct_lost=-shifted(runs, "distinct")["shift"],
        loop_longer=shifted(runs, "loop")["shift"],
    )
    found["regime"] = "surgical"
    found.loc[found["perplexity_ratio"] > limit.perplexity, "regime"] = "explosive"
    found.loc[(found["distinct_lost"] > limit.distinct) | (found["loop_longer"] > limit.loop), "regime"] = "repetitive"
    found.loc[(runs["text"].to_numpy() == before["text"].to_numpy()), "regime"] = "unchanged"
    return found


def shares(runs: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """The share of runs in each regime, and the commonest one: columns of `by`, every regime, commonest."""
    counted = runs.groupby(by, sort=False)["regime"].value_counts(normalize=True).unstack(fill_value=0.0)
    counted = counted.reindex(columns=list(REGIMES), fill_value=0.0)
    return counted.assign(commonest=counted.idxmax(axis=1)).reset_index()


def judged(
    model: TransformerBridge,
    runs: pd.DataFrame,
    own: Sequence[str],
    words: Mapping[str, Collection[str]],
    depth: int,
    vectors: Float[Tensor, "emotion d_model"],
    limit: Limits,
) -> pd.DataFrame:
    """One row per draw and prompt, its samples together: what of the draw's emotion is in its texts, and success.

    `own` names each draw's emotion, `words` has the words of every emotion, and `vectors` (in the order of `words`)
    read the texts at a depth of the unsteered model. `more_words` and `higher_read` compare with the unsteered texts,
    means over samples; `coherent` if more than half of the texts are surgical. A `success` has all three: a loop never
    has.
    """
    runs = with_regimes(runs, limit).reset_index(drop=True)
    counted, read = word_kinds(runs["text"].tolist(), words), reads(model, runs["text"].tolist(), depth, vectors)
    read.columns = list(words)
    place = runs.reset_index().set_index(["prompt", "sample", "strength"])["index"].xs(0.0, level="strength")
    steered = runs[runs["strength"] != 0]
    before = place.loc[pd.MultiIndex.from_frame(steered[["prompt", "sample"]])].to_numpy()
    emotion = [own[draw] for draw in steered["draw"]]
    after = {"words": counted, "read": read}
    for name, table in after.items():
        pairs = zip(steered.index, before, emotion)
        steered = steered.assign(**{name: [table.at[i, e] - table.at[z, e] for i, z, e in pairs]})
    steered = steered.assign(emotion=emotion, surgical=steered["regime"] == "surgical")
    by = ["method", "depth", "strength", "draw", "emotion", "prompt"]
    found = steered.groupby(by, sort=False)[["words", "read", "surgical"]].mean().reset_index()
    found["more_words"], found["higher_read"] = found["words"] > 0, found["read"] > 0
    found["coherent"] = found["surgical"] > 0.5
    return found.assign(success=found["more_words"] & found["higher_read"] & found["coherent"])


def success_shares(outcome: pd.DataFrame) -> pd.DataFrame:
    """The share of runs that pass each criterion and all of them, with exact intervals, by method.

    `outcome` is the table of `judged`; columns condition ("all three, emotion"), kind ("result" for the method
    "emotion", else "control"), statistic, value, low, high.
    """
    rows = []
    for column, label in CRITERIA.items():
        for method, part in outcome.groupby("method", sort=False):
            share = share_interval(int(part[column].sum()), len(part), CFG.confidence)
            kind = "result" if method == "emotion" else "control"
            rows.append((f"{label}, {method}", kind, "share of runs", *share))
    return pd.DataFrame(rows, columns=["condition", "kind", "statistic", "value", "low", "high"])


def reads(
    model: TransformerBridge, texts: Sequence[str], depth: int, vectors: Float[Tensor, "emotion d_model"]
) -> pd.DataFrame:
    """Mean projection of each text's tokens on each vector at a depth, as the model reads it unsteered.

    One row per text, one column per vector; 0 for a text without a word. Raises ValueError for a depth that the model
    lacks, and for vectors that are not finite.
    """
    site(model, depth)
    finite(vectors, "the reading vectors")
    told = [text for text in dict.fromkeys(texts) if text.strip()]
    if not told:
        return pd.DataFrame(0.0, index=range(len(texts)), columns=range(len(vectors)))
    acts = residuals(model, told, ["mean"])["mean"][:, depth] @ vectors.T
    return pd.DataFrame(acts.numpy(), index=told).reindex(texts).fillna(0.0).reset_index(drop=True)
