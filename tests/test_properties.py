"""What holds for any text, any table of pairs and any numbers, tried on inputs that hypothesis makes up."""

import csv
import string
from io import StringIO
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers import stats
from helpers.activations import batches, token_weights
from helpers.cells import fingerprint
from helpers.continuations import prompt_ids
from helpers.files import csv_rows
from helpers.passes import left_padded
from helpers.playground import parsed_pairs
from helpers.prompts import PAIR_COLUMNS, pairs, readable, token_strings, tokens, word_positions
from helpers.regimes import Limits, limits, with_regimes
from helpers.steering import steering_mask
from helpers.texts import distinct_ngrams, longest_loop, word_kinds

FEW = settings(
    max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CHARACTERS = st.characters(exclude_categories=["Cs"])  # all but halves of one
TEXTS = st.text(CHARACTERS, min_size=1, max_size=12).filter(str.strip)
ANY_TEXT = st.text(st.characters(), max_size=60)
CELLS = st.text(CHARACTERS, max_size=12)
WORDS = st.text(string.ascii_letters + "äßжλ漢", min_size=1, max_size=6)
IDS = st.lists(st.integers(0, 3), max_size=30)
WHOLE = st.integers(-8, 8)  # small whole numbers tie, and float32 computes with them without rounding
GROUPS = st.lists(WHOLE, min_size=2, max_size=12).map(lambda values: torch.tensor(values).float())
NUMBERS = st.floats(-1e3, 1e3, width=32)


# Prompts


@FEW
@given(ANY_TEXT)
@example("\ud83d")
@example("\x00")
@example("a" * 60 + "🙂" * 2)
def test_any_text_is_read_whole_or_refused(model: TransformerBridge, text: str):
    """Never cut short: a text beyond the context is refused, whatever its characters."""
    try:
        read = tokens(model, [text])
    except ValueError as refused:
        readable_at_all = text.strip() and not any("\ud800" <= character <= "\udfff" for character in text)
        assert not readable_at_all or f"reads at most {model.cfg.n_ctx}" in str(refused)
        assert not readable_at_all or len(model.tokenizer(text)["input_ids"]) > model.cfg.n_ctx - 1
        return
    assert model.tokenizer.decode(read.ids[0, 1:]) == text
    assert "".join(token_strings(model, text)[1:]) == text


@FEW
@given(st.lists(st.integers(0, 8191), max_size=20))
def test_any_tokens_are_shown_as_the_text_that_they_are(model: TransformerBridge, ids: list[int]):
    """Also those that a model writes, which may end within a character."""
    shown = readable(model, ids)
    assert len(shown) == len(ids)
    assert "".join(shown).replace("�", "") == model.tokenizer.decode(ids).replace("�", "")


@FEW
@given(st.lists(TEXTS, min_size=1, max_size=5))
def test_masks_say_which_tokens_are_real_and_weights_add_up_to_one(model: TransformerBridge, texts: list[str]):
    read = tokens(model, texts)
    for row, text in enumerate(texts):
        alone = tokens(model, [text])
        count = int(alone.length[0])
        assert read.ids[row, :count].tolist() == alone.ids[0].tolist()
        assert read.real[row].tolist() == [True] * count + [False] * (read.ids.shape[1] - count)
        assert 0 < read.last[row] < count and (read.stop[row] == -1 or read.last[row] <= read.stop[row] < count)
    for position in ("mean", "last token"):
        weights = token_weights(read, position)
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(texts)))
        assert not weights[~read.real].any() and not weights[:, 0].any()


@FEW
@given(st.lists(TEXTS, min_size=1, max_size=4), st.integers(0, 3))
def test_only_real_tokens_behind_position_0_are_steered(model: TransformerBridge, texts: list[str], room: int):
    ids = prompt_ids(model, texts)
    batch = left_padded(model, ids, room)
    masks = {which: steering_mask(batch.prompt, batch.real & ~batch.prompt, which) for which in ("prompt", "generated")}
    for row, given_ids in enumerate(ids):
        assert batch.ids[row][batch.real[row]][: len(given_ids)].tolist() == given_ids
        assert batch.ids[row][masks["prompt"][row]].tolist() == given_ids[1:]
        assert batch.positions[row][batch.real[row]].tolist() == list(range(len(given_ids) + room))
    assert masks["generated"].sum(-1).tolist() == [room] * len(texts)
    both = steering_mask(batch.prompt, batch.real & ~batch.prompt, "both")
    assert torch.equal(both, masks["prompt"] | masks["generated"])


@FEW
@given(st.lists(WORDS, min_size=1, max_size=6, unique=True), st.data())
def test_the_tokens_up_to_a_words_position_have_read_it_and_those_before_have_not(
    model: TransformerBridge, words: list[str], data: st.DataObject
):
    word, text = data.draw(st.sampled_from(words)), " ".join(words)
    position = int(word_positions(model, [text], [word])[0])
    shown, end = token_strings(model, text)[1:], len(" ".join(words[: words.index(word) + 1]))
    assert len("".join(shown[: position - 1])) < end <= len("".join(shown[:position]))


@FEW
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 100))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], most: int):
    found = batches(torch.tensor(lengths), most)
    assert sorted(torch.cat(found).tolist()) == list(range(len(lengths)))
    assert all(len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= most for rows in found)


# Pairs and other tables


@FEW
@given(
    st.lists(st.lists(CELLS, min_size=5, max_size=5), min_size=1, max_size=4),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_any_table_comes_back_cell_by_cell(tmp_path: Path, rows: list, quoting: int, end: str, mark: bool):
    names = list(string.ascii_lowercase[:5])
    rows = [["first", *row] for row in rows]  # a row of one empty cell would be a blank line
    text = StringIO(newline="")
    csv.writer(text, quoting=quoting, lineterminator=end).writerows([["row", *names], *rows])
    (tmp_path / "mine.csv").write_bytes((mark * "\ufeff" + text.getvalue()).encode())
    table = csv_rows(tmp_path / "mine.csv", ["row"])
    assert list(table) == ["row", *names]
    assert table.to_numpy().tolist() == rows


@FEW
@given(st.lists(TEXTS, min_size=2, max_size=8, unique=True), st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
def test_any_pairs_come_back_as_they_were_written(tmp_path: Path, texts: list[str], quoting: int):
    texts = texts[: len(texts) // 2 * 2]
    wanted = [[f"0{i}", "NA", "null", *sides] for i, sides in enumerate(zip(texts[::2], texts[1::2]))]
    with (tmp_path / "mine.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=quoting).writerows([PAIR_COLUMNS, *wanted])
    assert pairs(tmp_path / "mine.csv").to_numpy().tolist() == wanted


@FEW
@given(st.binary(max_size=80))
@example(b'pair,"')
@example(b"\xff")
@example(b"pair,split,topic,emotional,neutral\n1,2,3,4,\n")
def test_any_bytes_are_a_table_of_pairs_or_refused_by_name(tmp_path: Path, content: bytes):
    (tmp_path / "mine.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"mine\.csv"):
        pairs(tmp_path / "mine.csv")


@FEW
@given(st.text(st.sampled_from("ab|\n \u2028🙂"), max_size=30))
def test_typed_pairs_are_lines_with_one_separator_or_refused(text: str):
    lines = [line for line in text.splitlines() if line.strip()]
    sides = [[part.strip() for part in line.split("|")] for line in lines]
    try:
        table = parsed_pairs(text)
    except ValueError:
        whole = all(len(pair) == 2 and all(pair) for pair in sides)
        said = [part for pair in sides for part in pair]
        assert not whole or len(lines) < 2 or len(set(said)) < len(said)
        return
    assert table[["emotional", "neutral"]].to_numpy().tolist() == sides


# Statistics


@FEW
@given(GROUPS, GROUPS)
def test_auroc_counts_pairs_and_swaps_to_its_complement(one: Tensor, other: Tensor):
    counted = sum((a > b) + (a == b) / 2 for a, b in product(one.tolist(), other.tolist())) / (len(one) * len(other))
    assert stats.auroc(one, other).item() == pytest.approx(counted, abs=1e-6)
    assert stats.auroc(other, one).item() == pytest.approx(1 - counted, abs=1e-6)
    assert stats.auroc(-one, -other).item() == pytest.approx(1 - counted, abs=1e-6)


@FEW
@given(GROUPS, GROUPS)
def test_what_ranks_points_keeps_its_value_under_any_rising_map(one: Tensor, other: Tensor):
    for rising in (lambda x: 3 * x - 5, lambda x: x**3, lambda x: (x / 4).exp()):
        assert torch.equal(stats.auroc(rising(one), rising(other)), stats.auroc(one, other))
        assert torch.equal(stats.overlap(rising(one), rising(other)), stats.overlap(one, other))


@FEW
@given(GROUPS, GROUPS, st.integers(-50, 50), st.sampled_from([0.25, 0.5, 2.0, 16.0]))
def test_effect_sizes_ignore_shift_and_scale_and_turn_with_the_sign(
    one: Tensor, other: Tensor, shift: int, scale: float
):
    for size in (stats.cohens_d, stats.gap_over_total_sd):
        value = size(one, other)
        torch.testing.assert_close(size(one * scale + shift, other * scale + shift), value, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(size(other, one), -value)
        torch.testing.assert_close(size(-one, -other), -value)


@FEW
@given(GROUPS, GROUPS)
def test_gap_over_total_sd_is_below_what_the_sizes_of_the_groups_allow(one: Tensor, other: Tensor):
    """2 for equal groups: both means lie at most so far from the mean of all."""
    n, m = len(one), len(other)
    most = (n + m) / (n * m) ** 0.5
    assert stats.gap_over_total_sd(one, other).abs() <= most + 1e-4


@FEW
@given(st.floats(-50, 50), st.integers(2, 1000))
def test_the_two_effect_sizes_are_each_others_inverse(d: float, group: int):
    ratio = stats.from_cohens_d(d)
    assert abs(ratio) < 2
    correction = ((group - 1) / group) ** 0.5  # of small groups: from_cohens_d is that of large ones
    assert stats.to_cohens_d(ratio, group) == pytest.approx(d * correction, rel=1e-6, abs=1e-9)


@FEW
@given(st.lists(NUMBERS, min_size=2, max_size=20), st.integers(0, 2**31), st.sampled_from([0.5, 0.9, 0.95]))
def test_an_interval_of_a_mean_lies_within_the_values_and_is_ordered(values: list[float], seed: int, share: float):
    told = torch.tensor(values)
    mean, low, high = stats.mean_interval(told, Generator().manual_seed(seed), 50, share)
    assert mean == pytest.approx(told.mean().item())
    slack = 1e-3
    assert told.min() - slack <= low <= high <= told.max() + slack
    narrow = stats.mean_interval(told, Generator().manual_seed(seed), 50, share / 2)
    assert low - slack <= narrow[1] <= narrow[2] <= high + slack


@FEW
@given(WHOLE, st.integers(2, 20), st.integers(0, 2**31))
def test_an_interval_of_the_same_value_over_and_over_is_that_value(value: int, count: int, seed: int):
    same = torch.full((count,), float(value))
    assert stats.mean_interval(same, Generator().manual_seed(seed), 20, 0.95) == (value, value, value)
    low, high = stats.centred_interval(same[0], same, 0.95)
    assert low == high == value


@FEW
@given(st.lists(NUMBERS, min_size=1, max_size=30), NUMBERS)
def test_a_centred_interval_contains_its_value(draws: list[float], value: float):
    low, high = stats.centred_interval(torch.tensor(value), torch.tensor(draws), 0.95)
    assert low <= value + 1e-3 and value - 1e-3 <= high


@FEW
@given(st.integers(0, 30), st.integers(1, 30), st.sampled_from([0.8, 0.95]))
def test_an_interval_of_a_share_contains_it_and_mirrors(hits: int, more: int, confidence: float):
    of = hits + more
    share, low, high = stats.share_interval(hits, of, confidence)
    assert 0 <= low <= share <= high <= 1
    mirrored = stats.share_interval(of - hits, of, confidence)
    assert mirrored == pytest.approx((1 - share, 1 - high, 1 - low))


@FEW
@given(GROUPS, st.integers(-9, 9))
def test_a_p_value_is_above_zero_at_most_one_and_falls_with_the_value(null: Tensor, value: int):
    p, larger = (stats.permutation_p(torch.tensor(float(each)), null).item() for each in (value, value + 1))
    assert 1 / (len(null) + 1) == pytest.approx(min(p, larger, 1 / (len(null) + 1)))
    assert 0 < larger <= p <= 1
    assert p == pytest.approx((sum(each >= value for each in null.tolist()) + 1) / (len(null) + 1))


@FEW
@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=10), st.randoms(use_true_random=False))
def test_corrected_p_values_go_with_their_own_and_are_no_smaller(values: list[float], random):
    corrected = stats.holm(values)
    assert all(p <= c <= 1 for p, c in zip(values, corrected))
    assert [c for _, c in sorted(zip(values, corrected))] == sorted(corrected)
    assume(len(set(values)) == len(values))
    order = list(range(len(values)))
    random.shuffle(order)
    assert stats.holm([values[i] for i in order]) == [corrected[i] for i in order]


@FEW
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=12))
def test_pearsons_r_lies_between_minus_one_and_one_and_is_symmetric(rows: list[tuple[float, float]]):
    x, y = torch.tensor(rows).T
    r = stats.pearson(x, y)
    assert -1 - 1e-6 <= r <= 1 + 1e-6
    assert torch.equal(r, stats.pearson(y, x))
    torch.testing.assert_close(stats.pearson(x, -y), -r)


# Texts and regimes


@FEW
@given(IDS, st.integers(1, 4))
def test_distinct_ngrams_are_those_of_a_plain_count(ids: list[int], n: int):
    grams = [ids[i : i + n] for i in range(len(ids) - n + 1)]
    different = [gram for i, gram in enumerate(grams) if gram not in grams[:i]]
    assert distinct_ngrams(ids, n) == (len(different) / len(grams) if grams else 1.0)


@FEW
@given(IDS, st.integers(1, 5))
@example([0, 1] * 8, 3)
def test_the_longest_loop_is_that_of_a_search_through_all_stretches(ids: list[int], period: int):
    loops = [
        end - start
        for start, end in product(range(len(ids)), range(len(ids) + 1))
        for step in range(1, period + 1)
        if end - start >= 3 * step and all(ids[i] == ids[i + step] for i in range(start, end - step))
    ]
    assert longest_loop(ids, period) == max(loops, default=0)


@FEW
@given(ANY_TEXT)
def test_words_of_a_kind_are_counted_in_any_text(text: str):
    [[no, every]] = word_kinds([text], {"no": [], "every": list(string.ascii_lowercase)}).to_numpy()
    assert no == 0 and every >= 0


@settings(FEW, max_examples=15)
@given(st.lists(st.tuples(st.floats(1, 100), st.floats(0, 1), st.integers(0, 30)), min_size=2, max_size=6))
def test_an_unsteered_text_is_never_called_steered_and_wider_limits_call_fewer(rows: list[tuple[float, float, int]]):
    table = pd.DataFrame(rows, columns=["perplexity", "distinct", "loop"]).assign(prompt="p", strength=0.0)
    table = table.assign(sample=range(len(table)), text=[f"text {i}" for i in range(len(table))])
    assert set(with_regimes(table, limits(table))["regime"]) == {"unchanged"}
    steered = table.assign(strength=1.0, text="other", perplexity=table["perplexity"][::-1].to_numpy())
    both = pd.concat([table, steered], ignore_index=True)
    strict, wide = (
        (with_regimes(both, limit)["regime"] == "surgical").sum() for limit in (Limits(1, 0, 0), Limits(101, 1, 30))
    )
    assert strict <= wide == len(steered)


# Fingerprints

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def spelled(part: object) -> str:
    """What the part is, with the kinds of its values."""
    return repr(part)


@FEW
@given(PLAIN, PLAIN)
@example(0.0, -0.0)
@example([1, [2]], [[1], 2])
@example({"a": 1}, [["a", 1]])
@example(1, True)
def test_equal_parts_have_equal_names_and_different_parts_different_ones(one: object, other: object):
    assert fingerprint(one) == fingerprint(_again(one))
    assert (fingerprint(one) == fingerprint(other)) == (spelled(one) == spelled(other))


@FEW
@given(st.lists(PLAIN, min_size=1, max_size=4), PLAIN, st.data())
def test_any_changed_part_changes_the_name(parts: list, changed: object, data: st.DataObject):
    at = data.draw(st.integers(0, len(parts) - 1))
    assume(spelled(parts[at]) != spelled(changed))
    assert fingerprint(*parts) != fingerprint(*parts[:at], changed, *parts[at + 1 :])


@FEW
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8), st.data())
def test_any_changed_number_of_a_tensor_changes_the_name(values: list[float], data: st.DataObject):
    tensor, at = torch.tensor(values), data.draw(st.integers(0, len(values) - 1))
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    changed = tensor.clone()
    changed[at] = torch.nextafter(changed[at], torch.tensor(11.0))
    assert fingerprint(tensor) != fingerprint(changed)


def _again(part: object) -> object:
    """The same value in new objects."""
    match part:
        case list():
            return [_again(each) for each in part]
        case dict():
            return {_again(key): _again(value) for key, value in part.items()}
        case str():
            return "".join(list(part))
    return part
