"""What the model reads for a text: position 0, padding, where a sentence ends; tables of pairs and what is refused."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from helpers.config import DATA
from helpers.models import load_model
from helpers.prompts import (
    checked_pairs,
    dilemmas,
    first_token,
    key_words,
    neutral_texts,
    pairs,
    passages,
    sides,
    token_strings,
    tokens,
    word_positions,
)

TEXTS = ["He ran.", "The dog ran after me down the long lane.", "Stop!"]


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "pair": ["dog", "roof"],
            "split": ["train", "test"],
            "topic": ["animals", "heights"],
            "emotional": ["The dog ran after me.", "I hung from the roof."],
            "neutral": ["I ran after the dog.", "I sat on the roof."],
        }
    )


# Tokens


def test_position_0_is_bos_and_the_rest_are_the_tokens_of_the_text(model):
    read = tokens(model, TEXTS)
    assert (read.ids[:, 0] == first_token(model)).all()
    for row, text in enumerate(TEXTS):
        inside = read.ids[row, 1 : read.length[row]]
        assert inside.tolist() == model.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.tokenizer.decode(inside) == text


def test_real_tokens_come_first_and_padding_after(model):
    read = tokens(model, TEXTS)
    assert read.ids.shape == (3, read.length.max())
    assert torch.equal(read.real.sum(-1), read.length)
    assert read.real[:, 0].all() and not (read.real[:, 1:] & ~read.real[:, :-1]).any()


def test_tokens_do_not_depend_on_the_texts_beside_them(model):
    together = tokens(model, TEXTS)
    for row, text in enumerate(TEXTS):
        alone = tokens(model, [text])
        assert torch.equal(together.ids[row, : alone.length[0]], alone.ids[0])
        assert (together.last[row], together.stop[row]) == (alone.last[0], alone.stop[0])


def test_a_text_that_comes_twice_has_the_same_tokens(model):
    texts = ["One.", "A longer text here?", "One.", "Two words"]
    found = tokens(model, texts)
    for row, text in enumerate(texts):
        alone = tokens(model, [text])
        length = int(alone.length[0])
        assert found.ids[row, :length].equal(alone.ids[0]) and found.length[row] == length
        assert found.last[row] == alone.last[0] and found.stop[row] == alone.stop[0]


def test_rows_are_padded_no_further_than_the_longest_of_them(model):
    read, few = tokens(model, TEXTS), tokens(model, [TEXTS[2], TEXTS[0]])
    chosen = read.rows(torch.tensor([2, 0]))
    for field in ("ids", "length", "last", "stop"):
        assert torch.equal(getattr(chosen, field), getattr(few, field))


@pytest.mark.parametrize(
    ("text", "last", "stop"),
    [
        ("He ran.", " ran", "."),
        ("He ran!", " ran", "!"),
        ("Who ran?", " ran", "?"),
        ("He ran?!", " ran", "?!"),
        ("He ran... ", " ran", "..."),
        ("He ran.\n", " ran", "."),
        ("He ran (down the lane).", " lane", ")."),
        ("He ran. She sat.", " sat", "."),
        ('"He ran."', " ran", '."'),
        ("“He ran.”", " ran", "."),
        ("He ran at 3.5", "5", None),
        ("He ran", " ran", None),
        ("He ran ", " ran", None),
        ("He ran,", ",", None),
        ('He said "the"', "the", None),
        ("The", "The", None),
        ("...", "...", "..."),
        ("!", "!", "!"),
        (". ! ?", "?", "?"),
        ('"', '"', None),
    ],
)
def test_where_a_sentence_ends(model, text, last, stop):
    read = tokens(model, [text])
    assert model.tokenizer.decode([read.ids[0, read.last[0]]]) == last
    assert (None if read.stop[0] < 0 else model.tokenizer.decode([read.ids[0, read.stop[0]]])) == stop


def test_the_end_of_a_sentence_is_counted_with_position_0(model):
    read = tokens(model, ["He ran.", "Stop!", "He ran"])
    assert read.last.tolist() == [2, read.length[1] - 2, 2]
    assert read.stop.tolist() == [3, read.length[1] - 1, -1]


@pytest.mark.parametrize("text", ["Ça va très bien.", "He ran 😱.", "走った。", "Привет…"])
def test_a_character_of_several_tokens_ends_with_its_last_one(model, text):
    read = tokens(model, [text])
    last, stop, end = read.last[0], read.stop[0], read.length[0] - 1
    assert stop == end
    assert model.tokenizer.decode(read.ids[0, 1 : last + 1]) == text[:-1]


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], ValueError, "no texts"),
        (["He ran.", ""], ValueError, r"text 1 is empty \(''\): give at least one word"),
        ([" \n\t", "He ran."], ValueError, r"text 0 is empty"),
        ("He ran.", TypeError, "list of texts, not one string"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(model, texts, error, message):
    with pytest.raises(error, match=message):
        tokens(model, texts)


def test_a_text_as_long_as_the_context_is_read_and_a_longer_one_refused(model):
    limit = model.cfg.n_ctx
    assert tokens(model, ["He" + " ran" * (limit - 2)]).length.tolist() == [limit]
    with pytest.raises(
        ValueError, match=f"text 1 has {limit + 1} tokens.*{model.cfg.model_name} reads at most {limit}"
    ):
        tokens(model, ["He ran.", "He" + " ran" * (limit - 1)])


def test_token_strings_are_the_text_cut_into_pieces(model):
    first, *pieces = token_strings(model, "The dog ran after me.")
    assert first == model.tokenizer.bos_token
    assert pieces == ["The", " dog", " ran", " after", " me", "."]


# Words


WORD_PLACES = [
    ("He ran.", "ran", " ran"),
    ("Happy boys ran.", "Happy", "Happy"),
    ("He was unhappy, not happy, and ran.", "happy", " happy"),
    ("He was happy", "happy", " happy"),
    ('"Happy?" he said, so happy.', "Happy", "Happy"),
    ("The boys were happy-go-lucky.", "happy", " happy"),
    ("The boy was flabbergasted, and ran.", "flabbergasted", "asted"),
    ("The boy — flabbergasted — ran.", "flabbergasted", "asted"),
    ("The happy boy’s dog ran.", "boy", " boy"),
    ("He (the boy) ran.", "(the boy)", ")"),
]


@pytest.mark.parametrize(("text", "word", "token"), WORD_PLACES)
def test_the_position_of_a_word_is_that_of_its_last_token(any_model, text, word, token):
    """The first position at which the model has read the whole word."""
    (position,) = word_positions(any_model, [text], [word]).tolist()
    read = token_strings(any_model, text)
    assert read[position] == token
    before = text.index(word) if word != "happy" else text.replace("unhappy", "_" * 7).index(word)
    assert len("".join(read[1:position])) < before + len(word) <= len("".join(read[1 : position + 1]))


def test_a_word_of_several_tokens_is_one(model):
    assert len(token_strings(model, "flabbergasted")) > 3  # or the tests above show nothing


def test_positions_of_many_texts_are_those_of_each(model):
    texts, words = [list(column) for column in zip(*WORD_PLACES)][:2]
    alone = [int(word_positions(model, [text], [word])) for text, word in zip(texts, words)]
    assert word_positions(model, texts, words).tolist() == alone


@pytest.mark.parametrize(
    ("text", "word", "times"),
    [
        ("He ran.", "happy", 0),
        ("He was unhappy.", "happy", 0),
        ("He smiled happily.", "happi", 0),
        ("His happiness grew.", "happy", 0),
        ("Happy boys ran.", "happy", 0),
        ("He ran.", "", 0),
        ("He ran.", "r.n", 0),
        ("The happy boy was happy.", "happy", 2),
    ],
)
def test_a_word_that_does_not_occur_exactly_once_is_refused(any_model, text, word, times):
    with pytest.raises(ValueError, match=re.escape(f"the word {word!r} occurs {times} times, not once, in {text!r}")):
        word_positions(any_model, ["He was happy.", text], ["happy", word])


def test_texts_and_words_come_in_pairs(model):
    with pytest.raises(ValueError, match="zip"):
        word_positions(model, ["He ran.", "Stop!"], ["ran"])
    with pytest.raises(ValueError, match="there are no texts to read"):
        word_positions(model, [], [])


# Tables of pairs


def test_a_good_table_comes_back_as_it_is(table):
    assert checked_pairs(table) is table


@pytest.mark.parametrize("column", ["pair", "split", "topic", "emotional", "neutral"])
def test_a_missing_column_is_named(table, column):
    with pytest.raises(ValueError, match=f"mine.csv lacks the column '{column}'. It needs pair, split.*it has .*o"):
        checked_pairs(table.drop(columns=column), "mine.csv")


@pytest.mark.parametrize("side", ["emotional", "neutral"])
@pytest.mark.parametrize("nothing", ["", "  ", float("nan"), None])
def test_a_pair_with_one_side_is_named(table, side, nothing):
    table.loc[1, side] = nothing
    with pytest.raises(ValueError, match=f"mine.csv: pair 'roof' has no text in the column '{side}'"):
        checked_pairs(table, "mine.csv")


def test_a_pair_with_one_side_is_named_whatever_the_index(table):
    table.loc[1, "neutral"] = ""
    with pytest.raises(ValueError, match="pair 'roof' has no text"):
        checked_pairs(table.iloc[::-1])


def test_a_repeated_pair_is_named(table):
    table["pair"] = "dog"
    with pytest.raises(ValueError, match=r"mine.csv: the pair 'dog' comes twice"):
        checked_pairs(table, "mine.csv")


@pytest.mark.parametrize("side", ["emotional", "neutral"])
def test_a_repeated_text_is_named_on_either_side(table, side):
    table.loc[1, side] = table.loc[0, "emotional"] if side == "neutral" else table.loc[0, "neutral"]
    with pytest.raises(ValueError, match=f"mine.csv: the text '{table.loc[1, side]}' comes twice"):
        checked_pairs(table, "mine.csv")


def test_a_table_without_rows_is_refused(table):
    with pytest.raises(ValueError, match=r"mine.csv has no rows"):
        checked_pairs(table.iloc[:0], "mine.csv")


def test_an_unknown_split_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"fear_calm.csv has no split 'dev', only holdout, test, train, validation"):
        pairs("fear_calm", "dev")


def test_one_split_of_pairs(table, tmp_path):
    table.to_csv(tmp_path / "mine.csv", index=False)
    pd.testing.assert_frame_equal(pairs(tmp_path / "mine.csv", "test"), table.iloc[1:].reset_index(drop=True))


@pytest.mark.parametrize("name", ["fear_calm", "reversible", "numeric"])
def test_pairs_of_the_repository_by_name_or_path(name):
    pd.testing.assert_frame_equal(pairs(name), pairs(DATA / "prompts" / f"{name}.csv"))
    assert sum(len(pairs(name, split)) for split in set(pairs(name)["split"])) == len(pairs(name))


def test_a_spreadsheets_csv_reads_like_ours(table, tmp_path):
    """With a byte order mark, CRLF, quotes and letters beyond ASCII."""
    table.loc[0, "emotional"] = 'The "dog", très près, ran after me.'
    table.to_csv(tmp_path / "mine.csv", index=False, encoding="utf-8-sig", lineterminator="\r\n")
    assert (tmp_path / "mine.csv").read_bytes().startswith(b"\xef\xbb\xbfpair,")
    pd.testing.assert_frame_equal(pairs(str(tmp_path / "mine.csv")), table)


def test_ids_of_pairs_stay_text(table, tmp_path):
    table.assign(pair=["007", "8"]).to_csv(tmp_path / "mine.csv", index=False)
    assert pairs(tmp_path / "mine.csv")["pair"].tolist() == ["007", "8"]


def test_sides_come_one_after_the_other_in_the_order_of_the_table(table):
    assert sides(table) == [*table["emotional"], *table["neutral"]]


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    for path in (tmp_path / "nowhere.csv", "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
            pairs(path)


# Dilemmas and neutral texts


def test_the_texts_of_a_dilemma_differ_in_one_part_at_a_time():
    for row in dilemmas().itertuples():
        assert row.text == f"{row.scene} {row.choice} {row.stem}"
        assert row.paraphrased == f"{row.paraphrase} {row.choice} {row.stem}"
        assert row.swapped == f"{row.scene} {row.choice_swapped} {row.stem}"
        assert row.no_scene == f"{row.choice} {row.stem}"
        assert row.no_scene_swapped == f"{row.choice_swapped} {row.stem}"


def test_dilemmas_of_one_split():
    everything = dilemmas()
    for split, some in everything.groupby("split"):
        pd.testing.assert_frame_equal(dilemmas(split), some.reset_index(drop=True))
    with pytest.raises(ValueError, match=r"moral.csv has no split 'train'"):
        dilemmas("train")


def test_neutral_texts_are_those_of_the_file():
    texts = neutral_texts()
    assert texts == pd.read_csv(DATA / "prompts" / "neutral.csv")["text"].tolist()
    assert texts and all(isinstance(text, str) for text in texts)


# Key words and passages


def test_key_words_are_those_of_the_file():
    table, file = key_words(), pd.read_csv(DATA / "prompts" / "key_words.csv", keep_default_na=False)
    assert table.equals(file) and table.columns.tolist() == ["id", "emotion", "kind", "split", "word", "sentence"]


def test_key_words_of_one_kind_split_and_emotion():
    table, found = key_words(), key_words("matched", "test", "afraid")
    wanted = (table.kind == "matched") & (table.split == "test") & (table.emotion == "afraid")
    assert len(found) > 0 and found.equals(table[wanted].reset_index(drop=True))
    assert key_words(split="find").split.unique().tolist() == ["find"]
    assert key_words(emotion="calm").emotion.unique().tolist() == ["calm"]


@pytest.mark.parametrize("column", ["kind", "split", "emotion"])
def test_an_unknown_kind_split_or_emotion_lists_the_known_ones(column):
    known = ", ".join(sorted(set(key_words()[column])))
    with pytest.raises(ValueError, match=re.escape(f"key_words.csv has no {column} 'nonsense', only {known}")):
        key_words(**{column: "nonsense"})


def test_key_words_that_no_row_has_together_are_refused():
    with pytest.raises(ValueError, match="has no split 'find', only test"):
        key_words("implicit", "find")


def test_every_key_word_is_found_in_its_sentence(model):
    table = key_words()
    table = table[table.word != ""]
    positions = word_positions(model, table.sentence.tolist(), table.word.tolist())
    assert (positions > 0).all()


def test_passages_are_those_of_the_file():
    assert passages() == pd.read_csv(DATA / "passages.csv").text.tolist()


def test_the_embedded_model_reads_every_passage():
    bookworm = load_model("bookworm")
    assert tokens(bookworm, passages()).length.max() <= bookworm.cfg.n_ctx
