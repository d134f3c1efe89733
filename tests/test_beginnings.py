"""Unfinished sentences that a steered model continues: form, no emotion word, nothing from other prompts."""

import re

import pandas as pd
import pytest
from transformers import AutoTokenizer

from helpers.config import DATA
from helpers.prompts import beginnings

PROMPTS = DATA / "prompts"
OTHERS = ["fear_calm", "moral", "situations", "story_openings", "neutral", "confounds", "key_words"]
ROWS = {("story", "validation"): 8, ("story", "test"): 16, ("today", "test"): 8}
LENGTH = {"story": (8, 22), "today": (5, 14)}  # words


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.read_csv(PROMPTS / "beginnings.csv", keep_default_na=False)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def runs(text: str) -> set[tuple[str, ...]]:
    """All four successive words."""
    return set(zip(*(words(text)[i:] for i in range(4))))


def test_the_file_is_ascii_with_unix_line_ends():
    raw = (PROMPTS / "beginnings.csv").read_bytes()
    assert raw.isascii() and b"\r" not in raw and raw.endswith(b"\n")


def test_rows_per_kind_and_split(table):
    assert list(table) == ["prompt", "split", "kind", "text"]
    assert table.value_counts(["kind", "split"]).to_dict() == ROWS


def test_ids_are_unique_slugs(table):
    assert table.prompt.is_unique and table.prompt.str.fullmatch("[a-z]+-[a-z]+").all()


def test_every_beginning_is_one_unfinished_sentence(table):
    """No punctuation that ends a sentence, none at all at the end, and no space after the last word."""
    for row in table.itertuples():
        assert re.fullmatch(r"[A-Z][A-Za-z ,;']*[A-Za-z]", row.text), row.prompt
        assert row.text == " ".join(row.text.split()), row.prompt


def test_length_in_words_and_in_bookworms_tokens(table):
    tokenizer = AutoTokenizer.from_pretrained(DATA / "bookworm")
    for row in table.itertuples():
        shortest, longest = LENGTH[row.kind]
        assert shortest <= len(row.text.split()) <= longest, row.prompt
        assert len(tokenizer(row.text).input_ids) <= 40, row.prompt


def test_a_last_word_serves_three_times_at_most(table):
    assert table.text.map(lambda text: words(text)[-1]).value_counts().max() <= 3


def test_no_beginning_holds_an_emotion_word(table):
    lists = [
        pd.read_csv(DATA / "lexicons" / f"emotion_{name}.csv", keep_default_na=False) for name in ("words", "synonyms")
    ]
    banned = {word for listed in lists for word in listed.word}
    assert {row.prompt: hits for row in table.itertuples() if (hits := set(words(row.text)) & banned)} == {}


def test_today_is_told_in_the_first_person_and_named_nowhere_else(table):
    today = table.kind == "today"
    assert (table.text.map(lambda text: "today" in words(text)) == today).all()
    assert table.text[today].map(lambda text: bool({"i", "my", "me", "we"} & set(words(text)))).all()


def test_stories_are_told_in_the_first_and_in_the_third_person(table):
    first = table.text.map(lambda text: bool({"i", "my", "me", "we", "us", "our"} & set(words(text))))
    for split, told in first[table.kind == "story"].groupby(table.split):
        assert 0.2 < told.mean() < 0.8, split


def test_no_two_beginnings_share_four_successive_words(table):
    counts = table.text.map(lambda text: sorted(runs(text))).explode().value_counts()
    assert counts[counts > 1].index.tolist() == []


@pytest.mark.parametrize("name", OTHERS)
def test_no_beginning_shares_four_successive_words_with_another_prompt(table, name):
    other = pd.read_csv(PROMPTS / f"{name}.csv", keep_default_na=False).astype(str)
    seen = {run for column in other for text in other[column] for run in runs(text)}
    assert len(seen) > 100
    assert {row.prompt: hits for row in table.itertuples() if (hits := runs(row.text) & seen)} == {}


@pytest.mark.parametrize("kind, split", [*ROWS, ("story", None), ("today", None)])
def test_beginnings_are_the_rows_of_the_file_of_one_kind_and_split(table, kind, split):
    wanted = table[(table.kind == kind) & ((table.split == split) | (split is None))]
    pd.testing.assert_frame_equal(beginnings(kind, split), wanted.reset_index(drop=True))


def test_an_unknown_kind_or_split_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"^beginnings\.csv has no kind 'poem', only story, today$"):
        beginnings("poem")
    with pytest.raises(ValueError, match=r"^beginnings\.csv \(story\) has no split 'train', only test, validation$"):
        beginnings("story", "train")
    with pytest.raises(ValueError, match=r"^beginnings\.csv \(today\) has no split 'validation', only test$"):
        beginnings("today", "validation")
