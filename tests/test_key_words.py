"""The data of the feature notebooks: key-word sentences, passages, published features, pinned SAEs."""

import re

import pandas as pd
import pytest
from tokenizers import Tokenizer

from helpers import claims
from helpers.config import DATA
from helpers.models import known_models
from helpers.prompts import key_words, passages

EMOTIONS = ["happy", "sad", "excited", "afraid", "angry", "calm"]
EMOTIONS += ["proud", "disgusted", "surprised", "lonely", "hopeful", "guilty"]
ROWS = {"key word": 15, "matched": 15, "inflected": 4, "synonym": 6, "implicit": 8, "other sense": 4, "mention": 3}
NONE = {("afraid", "inflected"), ("disgusted", "other sense")}
TITLES = r"\b(Mrs?|Dr|St)\."


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return key_words()


@pytest.fixture(scope="module")
def lexicon() -> set[str]:
    return set(pd.read_csv(DATA / "lexicons" / "emotion_words.csv", keep_default_na=False)["word"])


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def others(row) -> set[str]:
    """The words of the sentence besides the one at which it is read, in lower case."""
    return {word.lower() for word in words(row.sentence)} - {row.word}


def test_rows_per_emotion_and_kind(table):
    assert list(table) == ["id", "emotion", "kind", "split", "word", "sentence"]
    assert list(table.emotion.unique()) == EMOTIONS
    found = table.value_counts(["emotion", "kind"]).to_dict()
    assert found == {(e, kind): n for e in EMOTIONS for kind, n in ROWS.items() if (e, kind) not in NONE}


def test_ids_say_emotion_kind_and_number(table):
    number = table.groupby(["emotion", "kind"]).cumcount() + 1
    assert (table.id == table.emotion + "-" + table.kind.str.replace(" ", "-") + "-" + number.map("{:02}".format)).all()
    assert table.id.is_unique


def test_the_first_five_of_each_pair_find_and_all_else_tests(table):
    number = table.id.str[-2:].astype(int)
    finds = table.kind.isin(["key word", "matched"]) & (number <= 5)
    assert (table.split == finds.map({True: "find", False: "test"})).all()


def test_the_file_is_ascii_with_straight_quotes(table):
    assert (DATA / "prompts" / "key_words.csv").read_bytes().isascii()
    assert not table.sentence.str.contains('"').any()


def test_every_row_is_one_sentence(table):
    for row in table.itertuples():
        assert re.fullmatch(r"[A-Z].*\w\.", row.sentence), row.id
        assert not re.search(r"[.!?;:]", re.sub(TITLES, "", row.sentence)[:-1]), row.id
        assert row.sentence == " ".join(row.sentence.split()) and 7 <= len(row.sentence.split()) <= 18, row.id


def test_no_sentence_occurs_twice(table):
    assert table.sentence.str.lower().is_unique


def test_the_word_occurs_once_and_never_first(table):
    for row in table[table.kind != "implicit"].itertuples():
        assert [word.lower() for word in words(row.sentence)].count(row.word.lower()) == 1, row.id
        assert row.word in words(row.sentence)[1:], row.id
    assert (table.word[table.kind == "implicit"] == "").all()


def test_which_word_each_kind_reads(table):
    same = table.word == table.emotion
    assert same[table.kind.isin(["key word", "other sense", "mention"])].all()
    assert not table.word.str.lower()[table.kind.isin(["matched", "inflected", "synonym"])].isin(EMOTIONS).any()


def test_inflected_forms_share_the_stem(table):
    inflected = table[table.kind == "inflected"]
    akin = [
        word[:3] == emotion[:3] or (word, emotion) == ("pride", "proud")
        for word, emotion in zip(inflected.word, inflected.emotion)
    ]
    assert all(akin)


def test_three_synonyms_serve_twice_each_and_are_no_inflected_forms(table):
    synonyms = table[table.kind == "synonym"]
    uses = synonyms.value_counts(["emotion", "word"])
    assert (uses == 2).all() and (uses.groupby("emotion").size() == 3).all()
    assert synonyms.groupby("word").emotion.nunique().max() == 1
    assert not set(synonyms.word) & set(table.word[table.kind == "inflected"])


def test_no_sentence_holds_another_key_word(table):
    for row in table.itertuples():
        assert not others(row) & set(EMOTIONS), row.id


def test_no_emotion_word_besides_the_one_that_is_read(table, lexicon):
    for row in table.itertuples():
        assert not others(row) & lexicon, row.id
    assert not set(table.word[table.kind == "matched"].str.lower()) & lexicon
    assert set(EMOTIONS) <= lexicon


def test_partners_differ_in_exactly_one_word(table):
    pairs = table.set_index("id").sentence
    for row in table[table.kind == "matched"].itertuples():
        partner = pairs[row.id.replace("-matched-", "-key-word-")]
        differing = [pair for pair in zip(partner.split(), row.sentence.split(), strict=True) if pair[0] != pair[1]]
        assert [tuple(words(word)[0] for word in pair) for pair in differing] == [(row.emotion, row.word)], row.id
        assert re.sub(rf"\b{row.word}\b", row.emotion, row.sentence) == partner, row.id


def test_a_neutral_word_serves_an_emotion_three_times_at_most(table):
    assert table[table.kind == "matched"].value_counts(["emotion", "word"]).max() <= 3


def test_find_and_test_sentences_are_no_near_copies(table):
    """No five running words are shared, whatever the emotion."""
    asked = table[table.kind == "key word"]
    runs = {}
    for row in asked.itertuples():
        spoken = [word.lower() for word in words(row.sentence)]
        for run in zip(*(spoken[i:] for i in range(5))):
            runs.setdefault(run, set()).add(row.split)
    assert [run for run, splits in runs.items() if len(splits) > 1] == []


@pytest.fixture(scope="module")
def texts() -> pd.DataFrame:
    return pd.read_csv(DATA / "passages.csv", keep_default_na=False)


def test_passages_are_four_hundred_different_texts(texts):
    assert list(texts) == ["passage", "text"] and len(texts) == 400
    assert texts.passage.tolist() == [f"p{number:03}" for number in range(400)]
    assert texts.text.str[:60].is_unique and texts.text.str[-60:].is_unique
    assert texts.text.tolist() == passages()


def test_passages_are_clean_and_of_one_size(texts):
    assert (DATA / "passages.csv").read_bytes().isascii()
    for row in texts.itertuples():
        assert 500 <= len(row.text) <= 900, row.passage
        assert row.text == " ".join(row.text.split()), row.passage
        assert re.fullmatch(r"[A-Z\"'].*[.!?\"]", row.text), row.passage


def test_passages_fit_into_bookworms_context(texts):
    tokenizer = Tokenizer.from_file(str(DATA / "bookworm" / "tokenizer.json"))
    assert max(len(encoded.ids) for encoded in tokenizer.encode_batch(texts.text.tolist())) < 256  # and position 0


def test_passages_hold_no_page_furniture(texts):
    marks = r"[_\[\]{}<>*|#=~^\\]|CHAPTER|Chapter [IVX\d]|Gutenberg|Transcriber|Illustration|Footnote|https?:|www\."
    assert texts.passage[texts.text.str.contains(marks)].tolist() == []


@pytest.fixture(scope="module")
def ledger() -> pd.DataFrame:
    return claims.published().set_index("claim")


def published(name: str) -> pd.DataFrame:
    return pd.read_csv(DATA / "published" / f"{name}.csv")


def test_published_features_are_those_of_the_ledger(ledger):
    found = published("sae_features").sort_values(["depth", "emotion", "rank"])
    lists = found.groupby(["depth", "emotion"]).feature.agg(list).to_dict()
    layers = [[int(i) for i in part.split()] for part in ledger.published["E-top-by-layer"].split(";")]
    expected = {(depth, "happy"): ids for depth, ids in enumerate(layers)}
    for emotion in ["happy", "sad", "excited"]:
        row = ledger.loc[f"E-top-{emotion}"]
        ids = [int(i) for i in re.findall(r"\b\d{3,5}\b", row.published)]
        assert row.statement == f"Top three layer-7 features for {emotion}: {', '.join(map(str, ids[:3]))}"
        assert ids[:3] == expected.get((7, emotion), ids[:3])  # the two lists for happy agree
        expected[7, emotion] = ids
    assert len(layers) == 12 and lists == expected
    assert (found.groupby(["depth", "emotion"])["rank"].agg(list).map(lambda r: r == [*range(1, len(r) + 1)])).all()


def test_published_pairs_are_those_of_the_ledger(ledger):
    table = published("sae_feature_pairs")
    assert table.claim.tolist() == ["E-layer-pair-1-2", "E-layer-pair-1-7"]
    for row in table.itertuples():
        said = [int(number) for number in re.findall(r"\d+", ledger.statement[row.claim])]
        assert said == [row.feature, row.depth, row.match, row.to]
        assert re.match(r"cosine (\.\d+)", ledger.published[row.claim])[1] == f"{row.cosine:.3f}"[1:]
        assert f"layer-pair-{row.depth}-{row.to}" in row.claim


@pytest.mark.parametrize("name", ["sae_features", "sae_feature_pairs"])
def test_published_features_exist_in_the_saes_they_are_of(name):
    table = published(name)
    assert set(table.release) == {known_models().sae_release["gpt2-small"]} == {"gpt2-small-res-jb"}
    for column in {"depth", "feature", "to", "match"} & set(table):
        assert pd.api.types.is_integer_dtype(table[column])
        assert table[column].between(0, 11 if column in ("depth", "to") else 24575).all(), column
    assert not table.duplicated().any()


def test_saes_on_the_hub_are_pinned_to_a_commit():
    for row in known_models().itertuples():
        assert bool(row.sae_hub_id) == bool(row.sae_revision), row.Index
        assert re.fullmatch(r"([0-9a-f]{40})?", row.sae_revision), row.Index
        assert row.sae_stream in ("centred", "raw", ""), row.Index
        assert re.fullmatch(r"([\w.-]+/[^/]*\{depth\}[^/]*)?", row.neuronpedia), row.Index
        assert row.sae_release or not (row.sae_hub_id + row.sae_stream + row.neuronpedia), row.Index
