"""The confound sets: pairs that differ in fear, arousal, isolation, novelty or sadness, and in little else."""

import re
from collections import Counter

import pandas as pd
import pytest

from helpers.config import DATA
from helpers.prompts import pairs

SIDES = ["emotional", "neutral"]
COUNTS = [f"gpt2_tokens_{side}" for side in SIDES]
CONFOUNDS = ["fear", "arousal", "isolation", "novelty", "sadness"]
PAIRS = 16

each_set = pytest.mark.parametrize("confound", CONFOUNDS)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.read_csv(DATA / "prompts" / "confounds.csv", keep_default_na=False)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_columns(table):
    assert list(table) == ["pair", "split", "topic", "confound", *SIDES, *COUNTS]
    assert not (table == "").any(axis=None)
    assert (DATA / "prompts" / "confounds.csv").read_bytes().isascii()


def test_five_sets_of_sixteen_pairs_one_after_another(table):
    assert table["confound"].tolist() == [confound for confound in CONFOUNDS for _ in range(PAIRS)]


def test_the_sets_choose_nothing_and_are_read_as_pairs(table):
    assert set(table["split"]) == {"test"}
    pd.testing.assert_frame_equal(pairs("confounds", "test"), table.astype("str"))


def test_ids_are_unique_slugs_that_begin_with_their_set(table):
    assert table["pair"].is_unique
    for row in table.itertuples():
        assert re.fullmatch(rf"{row.confound}(-[a-z]+)+", row.pair), row.pair


@each_set
def test_a_topic_comes_once_in_a_set(table, confound):
    topics = table.loc[table["confound"] == confound, "topic"]
    assert topics.is_unique
    assert topics.str.fullmatch("[a-z]+( [a-z]+)?").all()


def test_no_text_occurs_twice_here_or_in_another_set_of_pairs(table):
    others = [pairs(name) for name in ("fear_calm", "reversible", "numeric")]
    texts = pd.concat([one[side] for one in (table, *others) for side in SIDES]).str.lower()
    assert texts[texts.duplicated()].empty


@pytest.mark.parametrize("side", SIDES)
def test_every_text_is_one_clean_sentence(table, side):
    for text in table[side]:
        assert re.fullmatch(r"[A-Z][a-zA-Z ,;'-]*[a-z]\.", text), text
        assert text == " ".join(text.split()), text


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("lexicon", ["emotion_words", "emotion_synonyms"])
def test_no_word_of_the_lexicons(table, side, lexicon):
    banned = set(pd.read_csv(DATA / "lexicons" / f"{lexicon}.csv", keep_default_na=False)["word"])
    found = {row["pair"]: hits for row in table.to_dict("records") if (hits := words(row[side]) & banned)}
    assert found == {}


def test_lengths_within_a_pair_differ_by_two_words_at_most(table):
    length = table[SIDES].map(lambda text: len(text.split()))
    assert length.min(axis=None) >= 13 and length.max(axis=None) <= 26
    assert table.loc[(length["emotional"] - length["neutral"]).abs() > 2, "pair"].empty


def test_neither_side_of_a_set_is_longer_on_average(table):
    length = table[SIDES].map(lambda text: len(text.split()))
    for count in (length, table[COUNTS]):
        gap = (count.iloc[:, 0] - count.iloc[:, 1]).groupby(table["confound"]).mean()
        assert gap[gap.abs() > 0.5].empty


@pytest.mark.parametrize("side", SIDES)
def test_token_counts_are_plausible(table, side):
    """The tokenizer is not here to recount, but no token spans two words or less than a character."""
    counts = table[f"gpt2_tokens_{side}"]
    assert (counts > table[side].str.split().str.len()).all()  # each word, and the full stop
    assert (counts < table[side].str.len()).all()
    assert ((table[COUNTS[0]] - table[COUNTS[1]]).abs() <= 3).all()


def test_the_sides_of_a_pair_tell_the_same_scene_with_few_words_changed(table):
    for row in table.itertuples():
        one, other = words(row.emotional), words(row.neutral)
        assert 0.4 < len(one & other) / len(one | other) < 1, row.pair


@each_set
def test_no_word_tells_the_sides_of_a_set_apart(table, confound):
    """In fewer than four pairs does a word, whichever, occur on one side and not on the other."""
    rows = table[table["confound"] == confound]
    for side, other in (SIDES, SIDES[::-1]):
        only = Counter(word for row in rows.to_dict("records") for word in words(row[side]) - words(row[other]))
        assert {word: count for word, count in only.items() if count >= 4} == {}, side
