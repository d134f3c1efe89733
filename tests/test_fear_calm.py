"""The fear/calm pairs and the lexicon they must avoid: counts, splits, lengths, and no word that gives a side away."""

import re

import pandas as pd
import pytest

from helpers.config import DATA

PAIRS = DATA / "prompts" / "fear_calm.csv"
LEXICON = DATA / "lexicons" / "emotion_words.csv"
SIDES = ["emotional", "neutral"]
COUNTS = [f"gpt2_tokens_{side}" for side in SIDES]


@pytest.fixture(scope="module")
def pairs() -> pd.DataFrame:
    return pd.read_csv(PAIRS, keep_default_na=False)


@pytest.fixture(scope="module")
def lexicon() -> pd.DataFrame:
    return pd.read_csv(LEXICON, keep_default_na=False)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_columns(pairs):
    assert list(pairs.columns) == ["pair", "split", "topic", *SIDES, *COUNTS]


def test_pairs_per_split(pairs):
    assert pairs["split"].value_counts().to_dict() == {"train": 40, "holdout": 10, "validation": 20, "test": 40}


def test_topics_never_cross_splits(pairs):
    splits = pairs.groupby("topic")["split"].nunique()
    assert splits[splits > 1].empty


def test_pair_ids_are_unique_slugs_that_begin_with_their_topic(pairs):
    assert pairs["pair"].is_unique
    for pair, topic in zip(pairs["pair"], pairs["topic"]):
        assert re.fullmatch(r"[a-z]+(-[a-z]+)+", pair), pair
        assert pair.startswith(f"{topic}-"), pair


def test_no_text_occurs_twice(pairs):
    texts = pd.concat([pairs[side] for side in SIDES]).str.lower()
    assert texts[texts.duplicated()].empty


@pytest.mark.parametrize("side", SIDES)
def test_every_text_is_a_clean_ascii_sentence(pairs, side):
    for text in pairs[side]:
        assert text.isascii(), text
        assert re.fullmatch(r"[A-Z].*[a-z]\.", text), text
        assert text == " ".join(text.split()), text


@pytest.mark.parametrize("side", SIDES)
def test_no_word_of_the_lexicon(pairs, lexicon, side):
    banned = set(lexicon["word"])
    found = {pair: sorted(words(text) & banned) for pair, text in zip(pairs["pair"], pairs[side])}
    assert {pair: hits for pair, hits in found.items() if hits} == {}


@pytest.mark.parametrize("side", SIDES)
def test_token_counts_are_plausible(pairs, side):
    """The tokenizer is not here to recount, but no token spans two words or less than a character."""
    counts = pairs[f"gpt2_tokens_{side}"]
    assert counts.between(12, 28).all()
    assert (counts > pairs[side].str.split().str.len()).all()  # each word, and the full stop
    assert (counts < pairs[side].str.len()).all()


def test_token_counts_within_a_pair_differ_by_two_at_most(pairs):
    gap = (pairs[COUNTS[0]] - pairs[COUNTS[1]]).abs()
    assert pairs.loc[gap > 2, "pair"].empty


def test_neither_side_is_longer_on_average(pairs):
    gap = (pairs[COUNTS[0]] - pairs[COUNTS[1]]).groupby(pairs["split"]).mean()
    assert gap[gap.abs() >= 0.5].empty


def test_no_word_belongs_to_one_side_only(pairs):
    """A word used by four pairs or more occurs on both sides."""
    by_side = {side: pairs[side].map(lambda text: sorted(words(text))).explode().value_counts() for side in SIDES}
    used = pd.DataFrame(by_side).fillna(0)
    assert used[(used.max(axis=1) >= 4) & (used.min(axis=1) == 0)].empty


def test_lexicon_is_sorted_unique_and_lower_case(lexicon):
    assert list(lexicon.columns) == ["word", "kind"]
    assert lexicon["word"].is_unique
    assert lexicon["word"].is_monotonic_increasing
    assert lexicon["word"].str.fullmatch(r"[a-z]+").all()


def test_lexicon_covers_every_kind(lexicon):
    kinds = lexicon["kind"].value_counts()
    assert set(kinds.index) == {"fear", "calm", "bodily", "emotion"}
    assert kinds.min() >= 50 and len(lexicon) >= 400
