"""The prompt sets that tell a situation from its words, the moral prompts, the neutral texts, the judgement lexicon."""

import re
from collections import Counter

import pandas as pd
import pytest

from helpers.config import DATA

PROMPTS = DATA / "prompts"
PAIR_COLUMNS = [
    "pair",
    "split",
    "topic",
    "emotional",
    "neutral",
    "gpt2_tokens_emotional",
    "gpt2_tokens_neutral",
]
MORAL_COLUMNS = [
    "prompt",
    "split",
    "topic",
    "scene",
    "paraphrase",
    "choice",
    "choice_swapped",
    "stem",
    "act",
    "refrain",
]
NEUTRAL_COLUMNS = ["text_id", "topic", "text", "gpt2_tokens"]
ROWS = {"reversible": 24, "numeric": 24, "moral": 24, "neutral": 32}
COLUMNS = {
    "reversible": PAIR_COLUMNS,
    "numeric": PAIR_COLUMNS,
    "moral": MORAL_COLUMNS,
    "neutral": NEUTRAL_COLUMNS,
}
TEXTS = {
    "reversible": ["emotional", "neutral"],
    "numeric": ["emotional", "neutral"],
    "moral": ["scene", "paraphrase", "choice", "choice_swapped", "stem", "act", "refrain"],
    "neutral": ["text"],
}
NUMBER_WORDS = {"two": 2, "three": 3, "four": 4, "nine": 9}
NUMBER_WORDS |= {"thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "eighty": 80, "ninety": 90}
LEXICON_SIZES = {"hedging": 43, "direct_action": 61, "negation": 35}

all_sets = pytest.mark.parametrize("name", sorted(ROWS))
pair_sets = pytest.mark.parametrize("name", ["reversible", "numeric"])


def prompts(name):
    return pd.read_csv(PROMPTS / f"{name}.csv", keep_default_na=False)


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def number(word):
    """The value of a number in digits or in words; None for any other word."""
    return int(word) if word.isdigit() else NUMBER_WORDS.get(word)


@all_sets
def test_rows_and_columns(name):
    table = prompts(name)
    assert list(table.columns) == COLUMNS[name]
    assert len(table) == ROWS[name]
    assert not (table == "").any(axis=None)


@all_sets
def test_ids_are_unique_slugs(name):
    ids = prompts(name).iloc[:, 0]
    assert ids.is_unique
    assert ids.str.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*").all()


@all_sets
def test_no_text_occurs_twice(name):
    table = prompts(name)
    columns = [column for column in TEXTS[name] if column not in ("choice", "choice_swapped", "stem", "act", "refrain")]
    texts = table[columns].stack().str.lower()
    assert texts.is_unique


@all_sets
def test_files_are_ascii(name):
    assert (PROMPTS / f"{name}.csv").read_bytes().isascii()


@all_sets
def test_no_emotion_word(name):
    lexicon = pd.read_csv(DATA / "lexicons" / "emotion_words.csv", keep_default_na=False)
    assert {"fear", "calm", "bodily", "emotion"} <= set(lexicon["kind"])
    forbidden = set(lexicon["word"])
    texts = prompts(name)[TEXTS[name] + ["topic"]].stack()
    found = {word for text in texts for word in words(text)} & forbidden
    assert not found


@pair_sets
def test_pairs_are_read_once_in_the_test_split(name):
    assert set(prompts(name)["split"]) == {"test"}


@pair_sets
def test_pairs_are_single_sentences_of_near_equal_length(name):
    table = prompts(name)
    counts = table[["gpt2_tokens_emotional", "gpt2_tokens_neutral"]]
    assert counts.min(axis=None) >= 10 and counts.max(axis=None) <= 28
    assert (counts.iloc[:, 0] - counts.iloc[:, 1]).abs().max() <= (1 if name == "reversible" else 0)
    for side in ("emotional", "neutral"):
        assert table[side].str.fullmatch(r"[A-Z][^.!?]*[.]").all()
        assert (table[f"gpt2_tokens_{side}"] > table[side].str.split().str.len()).all()  # the stop is a token too


def test_reversible_sides_have_the_same_words_in_another_order():
    for row in prompts("reversible").itertuples():
        assert sorted(words(row.emotional)) == sorted(words(row.neutral)), row.pair
        assert sorted(row.emotional.lower()) == sorted(row.neutral.lower()), row.pair  # commas too
        assert words(row.emotional) != words(row.neutral), row.pair


def test_most_reversible_pairs_end_in_the_same_word():
    table = prompts("reversible")
    last = table[["emotional", "neutral"]].map(lambda text: words(text)[-1])
    assert (last["emotional"] == last["neutral"]).sum() >= 16


def test_numeric_sides_differ_in_one_number():
    for row in prompts("numeric").itertuples():
        emotional, neutral = row.emotional.split(), row.neutral.split()
        assert len(emotional) == len(neutral), row.pair
        changed = [pair for pair in zip(emotional, neutral) if pair[0] != pair[1]]
        assert len(changed) == 1, row.pair
        ((one, other),) = changed
        assert number(one) is not None and number(other) is not None, row.pair
        assert one.isdigit() == other.isdigit(), row.pair


def test_the_larger_number_is_the_dangerous_one_in_half_of_the_pairs_in_digits_and_in_words():
    balance = Counter()
    for row in prompts("numeric").itertuples():
        ((one, other),) = [p for p in zip(row.emotional.split(), row.neutral.split()) if p[0] != p[1]]
        balance["larger" if number(one) > number(other) else "smaller", one.isdigit()] += 1
    assert balance == {(size, in_digits): 6 for size in ("larger", "smaller") for in_digits in (True, False)}


@pair_sets
def test_every_pair_has_a_topic_of_its_own(name):
    assert prompts(name)["topic"].is_unique


def test_moral_splits():
    table = prompts("moral")
    assert table["split"].value_counts().to_dict() == {"test": 16, "validation": 8}
    assert (table.groupby("topic")["split"].nunique() == 1).all()


def test_moral_scenes_are_short_and_the_paraphrase_is_about_as_long():
    table = prompts("moral")
    lengths = table[["scene", "paraphrase"]].map(lambda text: len(text.split()))
    assert lengths.min(axis=None) >= 15 and lengths.max(axis=None) <= 35
    assert (lengths["scene"] - lengths["paraphrase"]).abs().max() <= 5
    for column in ("scene", "paraphrase"):
        assert table[column].str.fullmatch(r"[A-Z\"].*[.!?]\"?").all()


def test_moral_paraphrases_use_other_words():
    for row in prompts("moral").itertuples():
        names = set(re.findall(r"[A-Z][a-z]+", row.scene)) & set(re.findall(r"[A-Z][a-z]+", row.paraphrase))
        long = [{word for word in words(text) if len(word) > 3} for text in (row.scene, row.paraphrase)]
        shared = long[0] & long[1] - {name.lower() for name in names}
        assert len(shared) <= 2, (row.prompt, shared)


def test_moral_choices_name_both_options_in_both_orders():
    for row in prompts("moral").itertuples():
        subject = row.choice.split()[0]
        orders = {
            f"{subject} could{row.act} or{row.refrain}.",
            f"{subject} could{row.refrain} or{row.act}.",
        }
        assert subject in ("He", "She"), row.prompt
        assert {row.choice, row.choice_swapped} == orders and len(orders) == 2, row.prompt
        assert sorted(words(row.choice)) == sorted(words(row.choice_swapped)), row.prompt


def test_each_option_comes_first_in_half_of_the_moral_choices():
    table = prompts("moral")
    act_first = table.apply(lambda row: f" could{row['act']} or" in row["choice"], axis=1)
    assert act_first.groupby(table["split"]).mean().to_dict() == {"test": 0.5, "validation": 0.5}


def test_moral_stems_await_a_continuation():
    stems = prompts("moral")["stem"]
    assert stems.str.fullmatch(r"[A-Z].*[a-z]").all()
    assert stems.nunique() >= 12


def test_moral_continuations_begin_with_a_space_and_compete():
    table = prompts("moral")
    for side in ("act", "refrain"):
        assert table[side].str.fullmatch(r"( [a-z]+){1,4}").all()
    for row in table.itertuples():
        assert not row.act.startswith(row.refrain) and not row.refrain.startswith(row.act), row.prompt
    assert table["act"].str.split().str[0].nunique() >= 12


def test_neutral_texts_are_two_or_three_sentences_of_30_to_60_tokens():
    table = prompts("neutral")
    assert table["gpt2_tokens"].between(30, 60).all()
    assert (table["gpt2_tokens"] > table["text"].str.split().str.len()).all()
    assert table["text"].str.count(r"[.](?: |$)").isin([2, 3]).all()
    assert table["text"].str.endswith(".").all()


def test_judgement_words():
    path = DATA / "lexicons" / "judgement_words.csv"
    assert path.read_bytes().isascii()
    lexicon = pd.read_csv(path, keep_default_na=False)
    assert list(lexicon.columns) == ["word", "kind"]
    assert lexicon["kind"].value_counts().to_dict() == LEXICON_SIZES
    assert lexicon["word"].is_unique
    assert lexicon["word"].str.fullmatch(r"[a-z]+('t)?").all()
    in_order = lexicon.sort_values(["kind", "word"], ignore_index=True)
    pd.testing.assert_frame_equal(lexicon, in_order)
    contractions = lexicon.loc[lexicon["word"].str.contains("'"), "kind"]
    assert set(contractions) == {"negation"}
