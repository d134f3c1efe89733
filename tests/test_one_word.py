"""The one-word pairs: one word apart, of equal length in tokens, and a word that tells little by itself."""

import re

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from helpers.config import DATA
from helpers.prompts import pairs, sides

SIDES = ["emotional", "neutral"]
WORDS = [f"word_{side}" for side in SIDES]
MODERN = {"bus", "car", "engine", "garage", "helicopter", "lorry", "nurse", "oxygen", "phone", "pilot", "plane", "van"}
PERSONS = {"second": {"you", "your"}, "first": {"i", "me", "my", "we", "us", "our"}}

each_split = pytest.mark.parametrize("split", ["validation", "test"])
each_side = pytest.mark.parametrize("side", SIDES)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.read_csv(DATA / "prompts" / "one_word.csv", keep_default_na=False)


@pytest.fixture(scope="module")
def bookworm() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DATA / "bookworm")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def changed(row) -> list[int]:
    """Places in the sentence, counted in words from 0, at which the two sides differ."""
    ours, theirs = row.emotional.split(), row.neutral.split()
    return [place for place, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other]


def couples(table: pd.DataFrame) -> list[str]:
    """The two words of each pair in alphabetical order: the same for a pair and its mirror."""
    return [" ".join(sorted(both)) for both in zip(*(table[column] for column in WORDS))]


def left_out_auroc(model, features: list | np.ndarray, group: list[str]) -> float:
    """AUROC over all texts, first all emotional, then all neutral, each scored by the model fitted on other groups."""
    group, is_emotional = np.array(group * 2), np.repeat([1, 0], len(group))
    features, scores = np.array(features), np.zeros(len(group))
    for out in set(group):
        fitted = model.fit(features[group != out], is_emotional[group != out])
        scores[group == out] = fitted.decision_function(features[group == out])
    return roc_auc_score(is_emotional, scores)


def bag_of_words():
    return make_pipeline(CountVectorizer(), LogisticRegression())


def test_columns(table):
    assert list(table) == ["pair", "split", "topic", *SIDES, *WORDS]
    assert not (table == "").any(axis=None)
    assert (DATA / "prompts" / "one_word.csv").read_bytes().isascii()


def test_pairs_per_split_and_topic(table):
    assert table["split"].tolist() == ["validation"] * 12 + ["test"] * 36
    assert table["topic"].value_counts().max() <= 2
    assert table.groupby("topic")["split"].nunique().max() == 1


@each_split
def test_the_helper_reads_them_as_pairs(table, split):
    rows = table[table["split"] == split].reset_index(drop=True)
    pd.testing.assert_frame_equal(pairs("one_word", split), rows, check_dtype=False)


def test_ids_are_unique_slugs_that_begin_with_their_topic(table):
    assert table["pair"].is_unique
    for row in table.itertuples():
        assert re.fullmatch(rf"{row.topic}(-[a-z]+)+", row.pair), row.pair
        assert re.fullmatch("[a-z]+", row.topic), row.topic


def test_no_text_occurs_twice_here_or_in_another_set_of_pairs(table):
    others = [pairs(name) for name in ("fear_calm", "reversible", "numeric", "confounds")]
    texts = pd.Series([text.lower() for one in (table, *others) for text in sides(one)])
    assert texts[texts.duplicated()].empty


@each_side
def test_every_text_is_one_clean_sentence_of_10_to_18_words(table, side):
    for text in table[side]:
        assert re.fullmatch(r"[A-Z][a-zA-Z ,']*[a-z]\.", text), text
        assert text == " ".join(text.split()), text
        assert 10 <= len(text.split()) <= 18, text


def test_the_sides_differ_in_one_word_and_nothing_else(table):
    for row in table.itertuples():
        assert len(changed(row)) == 1, row.pair
        assert re.sub(rf"\b{row.word_emotional}\b", row.word_neutral, row.emotional) == row.neutral, row.pair


@each_side
def test_the_word_stands_once_in_its_sentence_as_it_is_written(table, side):
    for text, word in zip(table[side], table[f"word_{side}"]):
        assert re.fullmatch("[a-z]+", word) and words(text).count(word) == 1, text
        assert re.search(rf"\b{word}\b", text), text


def test_at_least_three_words_follow_the_word(table):
    for row in table.itertuples():
        assert len(row.emotional.split()) - 1 - changed(row)[0] >= 3, row.pair


@each_split
def test_the_word_stands_in_each_third_of_the_sentence_about_equally_often(table, split):
    rows = list(table[table["split"] == split].itertuples())
    third = [int(3 * (changed(row)[0] + 0.5) / len(row.emotional.split())) for row in rows]
    assert all(third.count(one) >= len(rows) / 4 for one in range(3)), pd.Series(third).value_counts()


@each_side
def test_no_word_tells_a_side_twice(table, side):
    """Nor does an inflection of it, as far as the first four letters show one."""
    beginnings = table[f"word_{side}"].str[:4]
    assert beginnings[beginnings.duplicated(keep=False)].empty


def test_two_thirds_of_the_pairs_have_a_mirror_in_their_split(table):
    """Another pair in which the same two words have changed sides; no other word is on both sides.

    So a score of the word alone, whatever it is, has the same values on both sides of them: an AUROC of one half.
    """
    ours = set(table[["split", *WORDS]].itertuples(index=False, name=None))
    mirrored = table[[(split, other, one) in ours for split, one, other in zip(table["split"], *map(table.get, WORDS))]]
    assert mirrored["split"].value_counts().to_dict() == {"validation": 6, "test": 26}
    assert sorted(mirrored[WORDS[0]]) == sorted(mirrored[WORDS[1]])
    assert set(table[WORDS[0]]) & set(table[WORDS[1]]) == set(mirrored[WORDS[0]])


@pytest.mark.parametrize("lexicon", ["emotion_words", "emotion_synonyms"])
def test_no_word_of_the_lexicons(table, lexicon):
    banned = set(pd.read_csv(DATA / "lexicons" / f"{lexicon}.csv", keep_default_na=False)["word"])
    found = {text: hits for text in sides(table) if (hits := set(words(text)) & banned)}
    assert found == {}


def person(text: str) -> str:
    return next((name for name, pronouns in PERSONS.items() if pronouns & set(words(text))), "third")


def test_first_second_and_third_person_are_mixed(table):
    counts = table["emotional"].map(person).value_counts()
    assert set(counts.index) == {"first", "second", "third"} and counts.min() >= 10


def test_every_other_row_has_nothing_that_1890_did_not_know(table):
    modern = [bool(set(words(text)) & MODERN) for text in table["emotional"] + " " + table["neutral"]]
    assert not any(modern[0::2]) and sum(modern[1::2]) >= 10


def test_the_word_is_one_token_and_all_other_tokens_are_the_same_under_bookworm(table, bookworm):
    for row in table.itertuples():
        one, other = (bookworm(text, add_special_tokens=False)["input_ids"] for text in (row.emotional, row.neutral))
        assert len(one) == len(other) <= 40, row.pair
        apart = [(a, b) for a, b in zip(one, other) if a != b]
        assert [tuple(map(bookworm.decode, both)) for both in apart] == [
            (f" {row.word_emotional}", f" {row.word_neutral}")
        ], row.pair


def test_what_counted_words_tell(table):
    """The figures of the card. A mirrored word is only ever learned from the wrong side, hence the first."""
    assert left_out_auroc(bag_of_words(), sides(table), table["pair"].tolist()) == pytest.approx(0.07, abs=0.01)
    assert left_out_auroc(bag_of_words(), sides(table), couples(table)) == pytest.approx(0.50, abs=0.01)
    train = pairs("fear_calm", "train")
    fitted = bag_of_words().fit(sides(train), np.repeat([1, 0], len(train)))
    scores = fitted.decision_function(sides(table))
    assert roc_auc_score(np.repeat([1, 0], len(table)), scores) == pytest.approx(0.50, abs=0.01)


def test_what_the_embedding_of_the_word_tells(table, bookworm):
    """The figures of the card: all 48 pairs, and the 16 without a mirror."""
    embedding = load_file(DATA / "bookworm" / "model.safetensors")["transformer.wte.weight"].astype(np.float32)
    ids = [bookworm(f" {word}", add_special_tokens=False)["input_ids"][0] for side in WORDS for word in table[side]]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    assert left_out_auroc(model, embedding[ids], couples(table)) == pytest.approx(0.59, abs=0.02)
    alone = ~pd.Series(couples(table)).duplicated(keep=False).to_numpy()
    few = embedding[ids][np.tile(alone, 2)]
    assert left_out_auroc(model, few, table.loc[alone, "pair"].tolist()) == pytest.approx(0.82, abs=0.02)
