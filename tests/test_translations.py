"""The emotions' names in Chinese and Russian."""

import unicodedata

import pandas as pd
import pytest

from helpers.config import DATA
from helpers.emotions import names, translations

FILE = DATA / "lexicons" / "translations.csv"
SCRIPT = {"zh": "[\u4e00-\u9fff]+", "ru": "[а-яё]+"}
ADJECTIVE = ("ый", "ий", "ой", "ийся")  # masculine, nominative; of the nouns here only покой ends so
KNOWN = {
    "happy": ("快乐", "счастливый"),
    "afraid": ("害怕", "страх"),
    "angry": ("愤怒", "гнев"),
    "calm": ("平静", "спокойный"),
    "sad": ("悲伤", "грустный"),
    "hopeful": ("希望", "надежда"),
    "desperate": ("绝望", "отчаяние"),
    "disappointed": ("失望", "разочарование"),
    "curious": ("好奇", "любопытство"),
}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.read_csv(FILE, keep_default_na=False)


def test_the_file_is_utf_8_without_bom_with_unix_line_ends_and_composed_letters():
    raw = FILE.read_bytes()
    assert raw.startswith(b"emotion,language,word\n") and raw.endswith(b"\n") and b"\r" not in raw
    assert unicodedata.is_normalized("NFC", raw.decode("utf-8"))  # ё is one letter


def test_every_emotion_has_two_to_four_words_in_each_language_in_order(table):
    counts = table.groupby(["emotion", "language"], sort=False).size()
    assert list(counts.index) == [(name, language) for name in names() for language in SCRIPT]
    assert counts.between(2, 4).all()
    runs = table.emotion + table.language  # rows of an emotion and language stand together
    assert (runs != runs.shift()).sum() == len(counts)


def test_no_word_comes_twice(table):
    assert table.word.is_unique


def test_no_word_is_part_of_a_word_for_another_emotion(table):
    pairs = table.merge(table, on="language")
    inside = [one in other for one, other in zip(pairs.word_x, pairs.word_y)]
    assert sum(inside) >= len(table)
    assert pairs[pd.Series(inside) & (pairs.emotion_x != pairs.emotion_y)].empty


@pytest.mark.parametrize("language", SCRIPT)
def test_words_are_written_in_the_languages_script_alone(table, language):
    assert table.word[table.language == language].str.fullmatch(SCRIPT[language]).all()


def test_chinese_is_simplified(table):
    """GB 2312 has the common simplified characters and not the traditional ones that they replaced."""
    for word in table.word[table.language == "zh"]:
        word.encode("gb2312")
    with pytest.raises(UnicodeEncodeError):
        "快樂".encode("gb2312")


def test_russian_has_a_masculine_adjective_first_and_a_noun_last(table):
    for emotion, found in translations("ru").items():
        assert found[0].endswith(ADJECTIVE), emotion
        assert found[-1] == "покой" or not found[-1].endswith(ADJECTIVE), emotion


@pytest.mark.parametrize("language", SCRIPT)
def test_translations_are_the_words_of_the_file(table, language):
    found = translations(language)
    assert list(found) == names()
    rows = table[table.language == language]
    assert [(name, word) for name in found for word in found[name]] == list(zip(rows.emotion, rows.word))


@pytest.mark.parametrize("emotion", KNOWN)
def test_well_known_words_stand_under_their_emotion(emotion):
    for language, word in zip(SCRIPT, KNOWN[emotion]):
        assert word in translations(language)[emotion]


def test_an_unknown_language_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"^translations\.csv has no language 'de', only ru, zh$"):
        translations("de")
