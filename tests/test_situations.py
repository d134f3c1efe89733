"""The emotions' norms and words, the situations that call for them without naming them, the openings of stories."""

import re
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from helpers.config import DATA
from helpers.decoding import MEASURES, bag_of_words
from helpers.emotions import NEUTRAL, names, neutral_openings, norms, openings, situations, synonyms

FILES = ["emotions.csv", "lexicons/emotion_synonyms.csv", "prompts/situations.csv", "prompts/story_openings.csv"]
RATINGS = ["valence", "valence_sd", "valence_raters", "arousal", "arousal_sd", "arousal_raters"]
OTHER_LEMMA = {"loving": "love", "relieved": "relief"}
FULL_STOP = r"(?<!\bMr)(?<!\bMrs)\.(?= |$)"  # but not the stop of a title


@pytest.fixture(scope="module")
def texts() -> pd.DataFrame:
    return pd.read_csv(DATA / "prompts" / "situations.csv", keep_default_na=False)


@pytest.fixture(scope="module")
def lexicon() -> pd.DataFrame:
    return pd.read_csv(DATA / "lexicons" / "emotion_synonyms.csv", keep_default_na=False)


@pytest.fixture(scope="module")
def banned(lexicon) -> set[str]:
    return {*lexicon["word"], *pd.read_csv(DATA / "lexicons" / "emotion_words.csv", keep_default_na=False)["word"]}


@pytest.fixture(scope="module")
def frames() -> pd.DataFrame:
    return pd.read_csv(DATA / "prompts" / "story_openings.csv", keep_default_na=False)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def content_words(text: str) -> set[str]:
    return {word for word in words(text) if len(word) > 2} - ENGLISH_STOP_WORDS


@pytest.mark.parametrize("file", FILES)
def test_files_are_ascii_with_unix_line_ends(file):
    raw = (DATA / file).read_bytes()
    assert raw.isascii() and b"\r" not in raw and raw.endswith(b"\n")


def test_columns(texts, lexicon, frames):
    assert list(norms()) == ["emotion", "lemma", *RATINGS]
    assert list(lexicon) == ["emotion", "word"]
    assert list(texts) == ["topic", "split", "emotion", "text"]
    assert list(frames) == ["topic", "emotional", "neutral"]
    for table in (lexicon, texts, frames):
        assert not (table == "").any(axis=None)


# situations


def test_topics_never_cross_splits(texts):
    splits = texts.groupby("topic")["split"].unique()
    assert (splits.str.len() == 1).all()
    assert splits.str[0].value_counts().to_dict() == {"train": 10, "validation": 4, "test": 10}


def test_every_topic_has_each_emotion_once_in_order_and_two_neutral_texts(texts):
    expected = [(topic, emotion) for topic in texts["topic"].unique() for emotion in [*names(), NEUTRAL, NEUTRAL]]
    assert list(zip(texts["topic"], texts["emotion"])) == expected
    assert len(texts) == 24 * 26


def test_every_text_is_two_or_three_clean_sentences_of_25_to_40_words(texts):
    for text in texts["text"]:
        assert re.fullmatch(r"[A-Z][A-Za-z0-9 ,.;:'-]+[a-z0-9]\.", text), text  # no quotation mark, ! or ?
        assert " '" not in text, text  # an apostrophe opens no quotation
        assert text == " ".join(text.split()), text
        assert len(re.findall(FULL_STOP, text)) in (2, 3), text
        assert 25 <= len(text.split()) <= 40, text


def test_no_situation_names_an_emotion_or_what_it_does_to_a_body(texts, banned):
    found = {text: sorted(hits) for text in texts["text"] if (hits := words(text) & banned)}
    assert found == {}


def test_no_text_is_a_near_copy_of_another(texts):
    """Two texts share less than a quarter of their content words (Jaccard); the closest pair of 194,376 has .22."""
    assert texts["text"].str.lower().is_unique
    content = [(text, content_words(text)) for text in texts["text"]]
    near = [(a, b) for (a, one), (b, other) in combinations(content, 2) if len(one & other) > 0.24 * len(one | other)]
    assert near == []


def test_length_does_not_go_with_the_emotion(texts):
    length = texts["text"].str.split().str.len()
    mean = length.groupby(texts["emotion"]).mean()
    assert mean.between(36, 39.5).all() and mean.max() - mean.min() < length.std()


def test_no_content_word_belongs_to_one_emotion_only(texts):
    """A content word used by six situations or more occurs under several emotions."""
    table = situations()
    used = table.assign(word=table["text"].map(lambda text: sorted(content_words(text)))).explode("word")
    counts = used.groupby("word")["emotion"].agg(["size", "nunique"])
    assert (counts["size"] >= 6).sum() > 100
    assert counts[(counts["size"] >= 6) & (counts["nunique"] == 1)].empty


def test_how_much_the_words_alone_tell():
    """Much more than chance, since some things happen to one emotion only: what a model reads is held against this.

    A reader of words fitted on the train topics is at .71 on the test topics. Above .78, texts give themselves away by
    their words; below .62, the card in data/README.md is out of date.
    """
    train, test = situations("train"), situations("test")
    assert 0.62 < MEASURES["AUROC"](bag_of_words(train, test, names())).item() < 0.78
    dealt = train.assign(emotion=train.groupby("topic")["emotion"].sample(frac=1, random_state=0).to_numpy())
    assert abs(MEASURES["AUROC"](bag_of_words(dealt, test, names())).item() - 0.5) < 0.08


# norms


def test_norms_are_ratings_of_24_emotions():
    table = norms()
    assert len(table) == 24
    assert table["emotion"].is_unique and table["emotion"].str.fullmatch("[a-z]+").all()
    assert dict(zip(table["emotion"], table["lemma"])) == {name: OTHER_LEMMA.get(name, name) for name in names()}
    for rated in ("valence", "arousal"):
        assert table[rated].between(1, 9).all()
        assert table[f"{rated}_sd"].between(0, 4, inclusive="neither").all()  # 4 is what a scale from 1 to 9 allows
        assert (table[f"{rated}_raters"] >= 10).all() and table[f"{rated}_raters"].dtype == "int64"


def test_the_emotions_fill_all_four_quadrants_and_both_dimensions_can_be_told_apart():
    table = norms()
    high = {rated: table[rated] > table[rated].median() for rated in ("valence", "arousal")}
    quadrants = pd.crosstab(high["valence"], high["arousal"])
    assert quadrants.shape == (2, 2) and quadrants.min(axis=None) >= 3
    assert abs(np.corrcoef(table["valence"], table["arousal"])[0, 1]) < 0.2


# synonyms


def test_synonyms_are_unique_lower_case_and_sorted_within_emotions_in_order(lexicon):
    assert lexicon["word"].str.fullmatch("[a-z]+").all()
    assert lexicon["word"].is_unique  # under one emotion only
    rank = lexicon["emotion"].map({name: i for i, name in enumerate(names())})
    assert rank.notna().all()
    in_order = lexicon.assign(rank=rank).sort_values(["rank", "word"], ignore_index=True).drop(columns="rank")
    pd.testing.assert_frame_equal(lexicon, in_order)


def test_every_emotion_has_ten_words_or_more_among_them_its_own(lexicon):
    for name, found in synonyms().items():
        assert name in found and len(found) >= 10, name
    assert list(synonyms()) == names() and sum(map(len, synonyms().values())) == len(lexicon)


# story openings


def test_openings_are_on_the_train_topics(frames):
    assert frames["topic"].tolist() == situations("train")["topic"].unique().tolist()


def test_an_opening_names_its_emotion_once_and_the_neutral_one_has_no_place_for_it(frames, banned):
    for frame in frames.itertuples():
        assert re.findall(r"\{.*?\}", frame.emotional) == ["{emotion}"] and frame.emotional.count("{") == 1
        assert "{" not in frame.neutral and "}" not in frame.neutral
        assert not re.search(r"\ban? \{", frame.emotional), frame.topic  # fits "angry" and "happy" alike
        assert not (words(frame.emotional.replace("{emotion}", "")) | words(frame.neutral)) & banned, frame.topic
    for row in openings().itertuples():
        assert words(row.text) & banned == {row.emotion}


def test_openings_await_a_continuation_and_end_in_the_same_words(frames):
    assert pd.concat([frames["emotional"], frames["neutral"]]).is_unique
    for frame in frames.itertuples():
        for text in (frame.emotional, frame.neutral):
            assert re.fullmatch(r"[A-Z][A-Za-z{} ,.]+[a-z]", text), text
            assert text == " ".join(text.split()), text
        assert frame.emotional.split(". ")[1:] == frame.neutral.split(". ")[1:] != [], frame.topic
        assert abs(len(frame.emotional.split()) - len(frame.neutral.split())) <= 3, frame.topic


def test_both_kinds_of_opening_differ_in_every_text():
    texts = pd.concat([openings()["text"], neutral_openings()["text"]])
    assert texts.is_unique and len(texts) == 10 * 25
