"""The emotions: their human norms, the words that name them, situations that call for them, openings of stories.

Situations never name an emotion. There is one for every topic and emotion, always in the same order, so activations of
a table of them can be stacked topic by emotion (`stacked`).
"""

from functools import cache

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from helpers.config import DATA
from helpers.files import csv_rows
from helpers.prompts import of_split, thinned_rows

NEUTRAL = "neutral"


@cache
def _norms() -> pd.DataFrame:
    numbers = [f"{norm}{part}" for norm in ("valence", "arousal") for part in ("", "_sd", "_raters")]
    return csv_rows(DATA / "emotions.csv", ("emotion", "lemma", *numbers), numbers)


def norms() -> pd.DataFrame:
    """One row per emotion: emotion, valence and arousal (1 to 9, mean human ratings), their SDs and numbers of raters.

    (Warriner, Kuperman & Brysbaert 2013; the column lemma holds the entry that was rated.)
    """
    return _norms().copy()


def names() -> list[str]:
    """The emotions as adjectives, in the order of every table and tensor."""
    return _norms()["emotion"].tolist()


def synonyms() -> dict[str, set[str]]:
    """The words that name each emotion, itself included, in their common forms (data/lexicons/emotion_synonyms.csv)."""
    table = csv_rows(DATA / "lexicons" / "emotion_synonyms.csv", ("emotion", "word"))
    return {emotion: set(table.loc[table["emotion"] == emotion, "word"]) for emotion in names()}


def translations(language: str) -> dict[str, list[str]]:
    """Each emotion's usual words in a language, "zh" or "ru" (data/lexicons/translations.csv).

    Raises ValueError for another language.
    """
    table = csv_rows(DATA / "lexicons" / "translations.csv", ("emotion", "language", "word"))
    if language not in set(table["language"]):
        known = ", ".join(sorted(set(table["language"])))
        raise ValueError(f"translations.csv has no language {language!r}, only {known}")
    table = table[table["language"] == language]
    return {emotion: table.loc[table["emotion"] == emotion, "word"].tolist() for emotion in names()}


def naming(lens: pd.DataFrame) -> dict[str, bool]:
    """Whether each emotion's vector raises a word of its own among its top tokens.

    `lens` is the table of `directions.logit_lens` for one vector per emotion, whose place in `names` is its depth.
    """
    raised = lens[lens["side"] == "raised"]
    words, known = raised["token"].str.strip().str.lower(), synonyms()
    return {name: bool(words[raised["depth"] == i].isin(known[name]).any()) for i, name in enumerate(names())}


def situations(split: str | None = None) -> pd.DataFrame:
    """One situation per topic and emotion: topic, split, emotion, text; topics in turn, emotions in `names` order."""
    table = _situations(split)
    return table[table["emotion"] != NEUTRAL].reset_index(drop=True)


def neutral_situations(split: str | None = None) -> list[str]:
    """Texts on the same topics in which nobody has reason to be moved, two per topic."""
    table = _situations(split)
    return table.loc[table["emotion"] == NEUTRAL, "text"].tolist()


def openings(samples: int = 1) -> pd.DataFrame:
    """Openings of stories that name an emotion: topic, emotion, text, seed; topic after topic, emotions in order.

    The topics are those of the training situations. Each opening comes `samples` times; a seed belongs to a topic and
    sample, so emotions share it and differ by their openings alone.
    """
    rows = [
        (frame.topic, emotion, frame.emotional.replace("{emotion}", emotion), number * samples + sample)
        for number, frame in enumerate(_openings().itertuples())
        for emotion in names()
        for sample in range(samples)
    ]
    return pd.DataFrame(rows, columns=["topic", "emotion", "text", "seed"])


def neutral_openings(samples: int = 1) -> pd.DataFrame:
    """The same openings without any emotion: topic, emotion ("neutral"), text, seed."""
    rows = [
        (frame.topic, NEUTRAL, frame.neutral, number * samples + sample)
        for number, frame in enumerate(_openings().itertuples())
        for sample in range(samples)
    ]
    return pd.DataFrame(rows, columns=["topic", "emotion", "text", "seed"])


def stacked(
    acts: Float[Tensor, "text *depth d_model"], table: pd.DataFrame
) -> Float[Tensor, "topic emotion *depth d_model"]:
    """Activations of a table's texts as topic by emotion; several texts of the same topic and emotion are averaged.

    Raises ValueError unless the table goes through the emotions in `names` order, topic after topic, with as many texts
    of each.
    """
    runs = table.groupby(["topic", "emotion"], sort=False).size()
    topics = runs.index.unique("topic")
    if not (
        runs.index.equals(pd.MultiIndex.from_product([topics, names()], names=["topic", "emotion"]))
        and runs.nunique() == 1
        and list(zip(table["topic"], table["emotion"])) == [pair for pair, n in runs.items() for _ in range(n)]
    ):
        raise ValueError("the table must hold every emotion of every topic in order, as `situations` does")
    return acts.unflatten(0, (len(topics), len(names()), runs.iloc[0])).mean(2)


def _situations(split: str | None) -> pd.DataFrame:
    table = csv_rows(DATA / "prompts" / "situations.csv", ("topic", "split", "emotion", "text"))
    return of_split(thinned_rows(table, "topic", ["split"]), split, "situations.csv")


def _openings() -> pd.DataFrame:
    table = csv_rows(DATA / "prompts" / "story_openings.csv", ("topic", "emotional", "neutral"))
    return table[table["topic"].isin(_situations("train")["topic"])]
