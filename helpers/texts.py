"""Numbers about a written text: its perplexity, its loops, its words."""

import re
from collections.abc import Collection, Mapping, Sequence

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from helpers.config import DATA
from helpers.files import csv_rows


def perplexity(scores: Float[Tensor, "token"]) -> float:
    """exp of the mean negative log probability per token; NaN for no tokens."""
    return float(scores.mean().neg().exp())


def distinct_ngrams(ids: Sequence[int], n: int = 3) -> float:
    """Share of a text's n-grams that are different ones (Li et al. 2016); 1 for a text shorter than n.

    A loop of period p in a long text comes near p over its length. A loop can have a low perplexity, so a score
    counts only beside this one.
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_loop(ids: Sequence[int], period: int = 10) -> int:
    """Tokens of the longest stretch that says the same up to `period` tokens three times or more; 0 without one."""
    longest = 0
    for step in range(1, min(period, len(ids) // 3) + 1):
        run = 0
        for earlier, later in zip(ids, ids[step:]):
            run = run + 1 if earlier == later else 0
            if run >= 2 * step:
                longest = max(longest, run + step)
    return longest


def judgement_words() -> dict[str, set[str]]:
    """Words of hedging, direct action and negation (data/lexicons/judgement_words.csv)."""
    table = csv_rows(DATA / "lexicons" / "judgement_words.csv", ("word", "kind"))
    return {kind: set(words) for kind, words in table.groupby("kind")["word"]}


def word_kinds(texts: Sequence[str], kinds: Mapping[str, Collection[str]]) -> pd.DataFrame:
    """How many words of each kind every text has, per 100 of its words: one row per text, one column per kind."""
    rows = []
    for text in texts:
        words = re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower().replace("’", "'"))
        per_word = 100 / max(1, len(text.split()))
        rows.append([per_word * sum(word in members for word in words) for members in kinds.values()])
    return pd.DataFrame(rows, columns=list(kinds), dtype=float)
