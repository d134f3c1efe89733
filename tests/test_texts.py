"""Numbers about a text: perplexity, different n-grams, loops, words of a kind."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch

from helpers.texts import distinct_ngrams, judgement_words, longest_loop, perplexity, word_kinds

PROSE = list(range(100, 140))  # no token twice


def test_perplexity_of_known_probabilities():
    assert perplexity(torch.full((7,), 0.25).log()) == pytest.approx(4)
    assert perplexity(torch.tensor([0.5, 0.125]).log()) == pytest.approx(4)  # the geometric mean
    assert np.isnan(perplexity(torch.empty(0)))


def test_distinct_ngrams_by_hand():
    assert distinct_ngrams([1, 2, 3, 4, 5]) == 1
    assert distinct_ngrams([1, 2, 1, 2, 1, 2, 1]) == 2 / 5  # 121 212 121 212 121
    assert distinct_ngrams([7, 7, 7, 7], n=2) == 1 / 3
    assert distinct_ngrams([1, 2, 3, 3], n=1) == 3 / 4
    assert distinct_ngrams([1, 2]) == distinct_ngrams([]) == 1


@pytest.mark.parametrize("period", [1, 2, 5])
def test_a_loop_has_as_many_distinct_ngrams_as_its_period(period: int):
    loop = list(range(period)) * 62
    assert distinct_ngrams(loop[:62]) == period / 60


@pytest.mark.parametrize("period", [1, 3, 10])
@pytest.mark.parametrize("beyond", [0, 1])  # tokens of one more, unfinished round
def test_a_planted_loop_is_as_long_as_it_was_planted(period: int, beyond: int):
    loop = (list(range(period)) * 4)[: 3 * period + beyond]
    for before, after in ((0, 0), (9, 0), (0, 9), (9, 9)):  # the whole text, its end, its beginning, its middle
        assert longest_loop(PROSE[:before] + loop + PROSE[20 : 20 + after]) == len(loop)


def test_a_text_without_repetition_has_no_loop():
    assert longest_loop(PROSE) == 0
    assert longest_loop([1, 2, 1, 3, 1, 2, 4, 1, 2, 5]) == 0  # tokens that come back, but never at once
    assert longest_loop([*range(9), *range(9), *range(8), 50]) == 0  # all but the last token of a third round


def test_what_is_said_twice_is_no_loop_yet():
    """A name or a line that comes back once is prose."""
    for period in (1, 2, 10):
        assert longest_loop(PROSE[:5] + PROSE[20 : 20 + period] * 2 + PROSE[5:9]) == 0
        assert longest_loop(PROSE[:5] + PROSE[20 : 20 + period] * 3 + PROSE[5:9]) == 3 * period


def test_a_loop_of_a_longer_period_than_allowed_is_none():
    for period in (12, 20):
        assert longest_loop(PROSE[: period + 1] * 4, period) == 0
        assert longest_loop(PROSE[:period] * 4, period) == 4 * period
    assert longest_loop(PROSE[:11] * 4) == 0 and longest_loop(PROSE[:10] * 4) == 40
    assert longest_loop([1, 2, 1, 2, 1, 2], period=1) == 0


def test_the_longest_of_several_loops_counts():
    assert longest_loop([5, 5, 5, *PROSE[:4] * 3, 7, 7, 7]) == 12
    assert longest_loop([*PROSE[:2] * 3, 8, 9, 7, 7, 7, 7, 7, 7, 7]) == 7


def test_short_texts_loop_only_by_saying_all_of_it_three_times():
    assert [longest_loop(ids) for ids in ([], [1], [1, 1], [1, 2, 1, 2], [1, 1, 2, 2], [1, 2, 1, 2, 1])] == [0] * 6
    assert [longest_loop(ids) for ids in ([1, 1, 1], [2, 1, 1, 1], [1, 2, 1, 2, 1, 2])] == [3, 3, 6]


def test_loops_are_those_of_a_search_through_all_stretches():
    for ids in product(range(3), repeat=7):
        for period in (1, 2, 12):
            assert longest_loop(ids, period) == _longest_loop(ids, period)


def test_words_are_counted_by_kind_per_hundred_whatever_their_case_and_punctuation():
    said = 'Apparently, he could NOT act. "Don\'t confess!" cried the notary; almost...'  # 11 words
    found = word_kinds([said, "", "A tree."], judgement_words())
    assert set(found) == {"hedging", "negation", "direct_action"}
    assert found.loc[0].to_dict() == pytest.approx(
        {"hedging": 300 / 11, "negation": 200 / 11, "direct_action": 200 / 11}
    )
    assert (found.loc[1:] == 0).all(axis=None)


def test_a_word_may_be_of_two_kinds_and_counts_as_often_as_it_comes():
    found = word_kinds(["no no yes", "yes"], {"short": {"no"}, "all": ["no", "yes"], "none": ()})
    assert list(found) == ["short", "all", "none"]
    np.testing.assert_allclose(found, [[200 / 3, 100, 0], [0, 100, 0]])


def test_only_whole_words_count():
    found = word_kinds(["nothing notes not knot", "don't do"], {"negation": {"not", "don"}})
    assert found["negation"].tolist() == [25, 0]


def test_curly_apostrophes_and_dashes_do_not_hide_words():
    kinds = judgement_words()
    curly, straight = (word_kinds([text], kinds) for text in ("“Maybe” — I don’t", '"Maybe" - I don\'t'))
    assert curly.equals(straight)
    assert word_kinds(["don’t"], kinds)["negation"].item() == 100


def test_without_kinds_or_texts_the_table_keeps_its_other_side():
    assert word_kinds(["a", "b"], {}).shape == (2, 0)
    assert list(word_kinds([], {"negation": {"no"}})) == ["negation"]


def test_every_judgement_word_is_counted_as_its_own_kind_alone():
    kinds = judgement_words()
    assert set(kinds) == {"hedging", "direct_action", "negation"}
    for kind, words in kinds.items():
        found = word_kinds(sorted(words), kinds)
        assert (found[kind] == 100).all()
        assert (found.drop(columns=kind) == 0).all(axis=None)


def _longest_loop(ids: Sequence[int], period: int) -> int:
    stretches = [
        end - start
        for step in range(1, period + 1)
        for start in range(len(ids))
        for end in range(start + 3 * step, len(ids) + 1)
        if all(ids[i] == ids[i + step] for i in range(start, end - step))
    ]
    return max(stretches, default=0)
