"""Prompts from CSV files, and the tokens that a model reads for them.

Position 0 is always one explicit token, BOS (EOS for a tokenizer without BOS). It is left out of every mean and norm.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.config import DATA, thinned
from helpers.files import csv_rows, needs_columns

SIDES = ("emotional", "neutral")
PAIR_COLUMNS = ("pair", "split", "topic", *SIDES)
DILEMMA_COLUMNS = (
    "prompt", "split", "topic", "scene", "paraphrase", "choice", "choice_swapped", "stem", "act", "refrain",
)  # fmt: skip
SENTENCE_ENDS = ".!?…。"
UNREADABLE = "�"  # what a part of a character decodes to
CLOSERS = "\"'”’)]» \n"


class TooLong(ValueError):
    """A text of more tokens than the model's context holds."""


@dataclass(frozen=True)
class Tokens:
    """Right-padded token ids of several texts; position 0 of each is BOS (or EOS)."""

    ids: Int[Tensor, "prompt pos"]
    length: Int[Tensor, "prompt"]  # real tokens, position 0 included
    last: Int[Tensor, "prompt"]  # the last token before the closing punctuation
    stop: Int[Tensor, "prompt"]  # the closing full stop (or ! ? …); -1 where the text has none

    @property
    def real(self) -> Bool[Tensor, "prompt pos"]:
        """True at real tokens, position 0 included; False at padding."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.length[:, None]

    def rows(self, rows: Int[Tensor, "row"]) -> "Tokens":
        """These texts alone, padded no further than the longest of them."""
        width = int(self.length[rows].max())
        return Tokens(self.ids[rows, :width], self.length[rows], self.last[rows], self.stop[rows])


def tokens(model: TransformerBridge, texts: Sequence[str]) -> Tokens:
    """The texts' tokens on the model's device.

    Raises ValueError for no texts at all, a text without a token, or one with half a character, and TooLong for one
    that the model's context does not hold.
    """
    if isinstance(texts, str):
        raise TypeError("tokens needs a list of texts, not one string")
    if len(texts) == 0:
        raise ValueError("there are no texts to read")
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text {number} is empty ({text!r}): give at least one word")
        check_whole(text, f"text {number}")
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    same = torch.tensor([place[text] for text in texts])
    encoded = model.tokenizer(list(place), add_special_tokens=False, return_offsets_mapping=True)
    first = first_token(model)
    length = torch.tensor([1 + len(ids) for ids in encoded["input_ids"]])[same]
    longest = int(length.argmax())
    if length[longest] > model.cfg.n_ctx:
        raise TooLong(
            f"text {longest} has {length[longest]} tokens with position 0, but {model.cfg.model_name} reads at most "
            f"{model.cfg.n_ctx}: shorten it ({texts[longest][:60]!r}...)"
        )
    if length.min() == 1:
        raise ValueError(f"text {int(length.argmin())} has no token under this tokenizer ({texts[length.argmin()]!r})")
    ids = torch.full((len(place), int(length.max())), first)
    last, stop = torch.zeros(2, len(place), dtype=torch.long)
    for row, (text, row_ids, offsets) in enumerate(zip(place, encoded["input_ids"], encoded["offset_mapping"])):
        ids[row, 1 : 1 + len(row_ids)] = torch.tensor(row_ids)
        last[row], stop[row] = _ends(text, offsets)
    device = model.cfg.device
    return Tokens(ids[same].to(device), length.to(device), last[same].to(device), stop[same].to(device))


def check_whole(text: str, what: str) -> None:
    """Raises ValueError for a text with half a character, a lone surrogate: no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{error.object[error.start]!r} at {error.start}"
        raise ValueError(f"{what} holds half a character ({half}): write the character itself") from error


def first_token(model: TransformerBridge) -> int:
    """The id that stands at position 0: BOS, else EOS. Raises ValueError for a tokenizer that has neither.

    The bridge gives such a tokenizer a token of its own, beyond the model's vocabulary.
    """
    tokenizer = model.tokenizer
    for id_ in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if id_ is not None and id_ < model.cfg.d_vocab:
            return id_
    raise ValueError(f"the tokenizer of {model.cfg.model_name} has neither BOS nor EOS to put at position 0")


def vocabulary(model: TransformerBridge) -> int:
    """How many ids stand for a token, the first so many: a model's own vocabulary is often padded beyond them.

    What comes after them has a row in the unembedding, and so a logit, but no text.
    """
    return min(len(model.tokenizer), model.cfg.d_vocab)


def word_positions(model: TransformerBridge, texts: Sequence[str], words: Sequence[str]) -> Int[Tensor, "prompt"]:
    """The position (BOS counted) of the last token of each text's word, found by character offsets.

    The last token is the first that has read the whole word. Raises ValueError for a text in which the word, whole
    and spelled exactly so, does not occur, or occurs twice.
    """
    tokens(model, texts)  # refuses what the model cannot read
    found = []
    for text, word in zip(texts, words, strict=True):
        places = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text)] if word else []
        if len(places) != 1:
            raise ValueError(f"the word {word!r} occurs {len(places)} times, not once, in {text!r}")
        offsets = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        inside = [i for i, (start, end) in enumerate(offsets) if start < places[0][1] and end > places[0][0]]
        found.append(1 + inside[-1])
    return torch.tensor(found)


def key_words(kind: str | None = None, split: str | None = None, emotion: str | None = None) -> pd.DataFrame:
    """Sentences with an emotion's key word and what they are compared with (data/prompts/key_words.csv).

    One row each: id, emotion, kind, split, word, sentence. Raises ValueError for a kind, split or emotion without rows.
    """
    table = csv_rows(DATA / "prompts" / "key_words.csv", ("id", "emotion", "kind", "split", "sentence"))
    table = thinned_rows(table, "id", ["emotion", "kind", "split"])
    for column, wanted in (("kind", kind), ("split", split), ("emotion", emotion)):
        if wanted is not None and wanted not in set(table[column]):
            raise ValueError(f"key_words.csv has no {column} {wanted!r}, only {', '.join(sorted(set(table[column])))}")
        table = table if wanted is None else table[table[column] == wanted]
    return table.reset_index(drop=True)


def passages() -> list[str]:
    """Passages of public-domain fiction, held out when bookworm's SAEs were trained (data/passages.csv)."""
    return thinned(csv_rows(DATA / "passages.csv", ("passage", "text"))["text"].tolist())


def token_strings(model: TransformerBridge, text: str) -> list[str]:
    """The text cut as the model reads it, position 0 first, as readable pieces (see `readable`)."""
    return readable(model, tokens(model, [text]).ids[0].tolist())


def readable(model: TransformerBridge, ids: Sequence[int]) -> list[str]:
    """Every token as text; of a character of several tokens (an emoji) the last has all, those before it nothing."""
    found = [model.tokenizer.decode([id_]) for id_ in ids]
    for broken, run in groupby(range(len(ids)), lambda i: UNREADABLE in found[i]):
        if broken:
            run = list(run)
            found[run[0] : run[-1] + 1] = pieces(model, [], [ids[i] for i in run])
    return found


def pieces(model: TransformerBridge, before: list[int], ids: list[int]) -> list[str]:
    """The text that every token adds to those before it; together they are the text.

    A token that ends within a character adds nothing; the one that completes the character adds all of it.
    """
    said, found = model.tokenizer.decode(before), []
    for end in range(1, len(ids) + 1):
        now = model.tokenizer.decode([*before, *ids[:end]])
        whole = now if end == len(ids) else now.rstrip(UNREADABLE)
        found.append(whole[len(said) :])
        said = whole if len(whole) > len(said) else said
    return found


def pairs(path: Path | str = "fear_calm", split: str | None = None) -> pd.DataFrame:
    """Prompt pairs, one row each (pair, split, topic, emotional, neutral), of one split or of all.

    `path` is a CSV file or the name of one in data/prompts. Raises ValueError for a missing column, an empty cell, a
    repeated pair or text, and an unknown split, naming the row; cells of further columns come as text too.
    """
    path = DATA / "prompts" / f"{path}.csv" if isinstance(path, str) and not path.endswith(".csv") else Path(path)
    table = checked_pairs(csv_rows(path, PAIR_COLUMNS), path.name)
    by = [column for column in ("split", "confound") if column in table]
    return of_split(thinned_rows(table, "pair", by), split, path.name)


def checked_pairs(table: pd.DataFrame, name: str = "the table of pairs") -> pd.DataFrame:
    """The same table when each row is a whole pair and no pair or text comes twice; ValueError otherwise."""
    needs_columns(list(table), PAIR_COLUMNS, name)
    if table.empty:
        raise ValueError(f"{name} has no rows")
    for side in SIDES:
        blank = table[side].isna() | (table[side].astype(str).str.strip() == "")
        if blank.any():
            raise ValueError(f"{name}: pair {table['pair'][blank.idxmax()]!r} has no text in the column {side!r}")
    if table["pair"].duplicated().any():
        raise ValueError(f"{name}: the pair {table['pair'][table['pair'].duplicated()].iloc[0]!r} comes twice")
    texts = pd.concat([table[side] for side in SIDES], ignore_index=True)
    if texts.duplicated().any():
        raise ValueError(f"{name}: the text {texts[texts.duplicated()].iloc[0]!r} comes twice")
    return table


def dilemmas(split: str | None = None) -> pd.DataFrame:
    """Moral-judgement prompts (data/prompts/moral.csv) with the texts that notebooks read.

    Adds `text` (scene, choice, stem), `paraphrased` (the scene in other words), `swapped` (the two options named in
    the other order), and the same without the scene: `no_scene`, `no_scene_swapped`.
    """
    table = thinned_rows(csv_rows(DATA / "prompts" / "moral.csv", DILEMMA_COLUMNS), "prompt", ["split"])
    table = of_split(table, split, "moral.csv")
    return table.assign(
        text=table.scene + " " + table.choice + " " + table.stem,
        paraphrased=table.paraphrase + " " + table.choice + " " + table.stem,
        swapped=table.scene + " " + table.choice_swapped + " " + table.stem,
        no_scene=table.choice + " " + table.stem,
        no_scene_swapped=table.choice_swapped + " " + table.stem,
    )


def beginnings(kind: str, split: str | None = None) -> pd.DataFrame:
    """Unfinished sentences that call for no emotion (data/prompts/beginnings.csv): prompt, split, kind, text.

    `kind` is story or today. Raises ValueError for another, and for a split that the kind does not have.
    """
    table = csv_rows(DATA / "prompts" / "beginnings.csv", ("prompt", "split", "kind", "text"))
    table = thinned_rows(table, "prompt", ["kind", "split"])
    if kind not in set(table["kind"]):
        raise ValueError(f"beginnings.csv has no kind {kind!r}, only {', '.join(sorted(set(table['kind'])))}")
    return of_split(table[table["kind"] == kind].reset_index(drop=True), split, f"beginnings.csv ({kind})")


def neutral_texts() -> list[str]:
    """The fixed neutral texts (data/prompts/neutral.csv) on which residual norms and doses are measured."""
    return thinned(csv_rows(DATA / "prompts" / "neutral.csv", ("text_id", "topic", "text"))["text"].tolist())


def sides(table: pd.DataFrame) -> list[str]:
    """All emotional texts of a table of pairs, then all neutral ones in the same order."""
    return [text for side in SIDES for text in table[side]]


def thinned_rows(table: pd.DataFrame, unit: str, by: Sequence[str]) -> pd.DataFrame:
    """The rows of the units that `config.thinned` leaves in each group, all of them on the full grid.

    A unit is what stays whole: a pair, or a topic with all its texts.
    """
    units = table[[*by, unit]].drop_duplicates().groupby(list(by), sort=False, dropna=False)[unit]
    kept = {value for _, group in units for value in thinned(group.tolist())}
    return table[table[unit].isin(kept)].reset_index(drop=True)


def of_split(table: pd.DataFrame, split: str | None, name: str) -> pd.DataFrame:
    if split is None:
        return table
    if split not in set(table["split"]):
        raise ValueError(f"{name} has no split {split!r}, only {', '.join(sorted(set(table['split'])))}")
    return table[table["split"] == split].reset_index(drop=True)


def _ends(text: str, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Positions (BOS counted) of the last token before the closing punctuation, and of that punctuation or -1."""
    body = text.rstrip(CLOSERS)
    words = body.rstrip(SENTENCE_ENDS + CLOSERS)
    starts = [start for start, _ in offsets]
    last = max((i for i, start in enumerate(starts) if start < len(words)), default=len(starts) - 1)
    if len(words) == len(body):
        return 1 + last, -1
    return 1 + last, 1 + max(i for i, start in enumerate(starts) if start < len(body))
