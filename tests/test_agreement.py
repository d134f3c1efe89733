"""Reading and writing: planted words and correlations come back, and sums equal those of plain calls."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.agreement import named_next, of_random_sets, pleasantness, reads, writes
from helpers.continuations import log_probs
from helpers.steering import added

TEXTS = ["He ran.", "I walked home along the quiet road, past the mill, and sat down by it.", "The dog barked at me."]
WORDS = ["happy", "sad", "proud", "afraid", "downhearted"]  # of one and of several tokens
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def drawn(model: TransformerBridge, generator: Generator, count: int) -> Tensor:
    return 2 * torch.randn(count, model.cfg.d_model, generator=generator)


def test_the_words_are_of_one_and_of_several_tokens(model):
    lengths = {len(model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) for word in WORDS}
    assert min(lengths) == 1 < max(lengths)


# What is said next


def test_named_next_sums_log_probs_of_each_word_taken_by_itself(any_model, generator):
    asked = [f"{text} I was so" for text in TEXTS]
    for steer in (None, added(1, drawn(any_model, generator, len(TEXTS)))):
        found = named_next(any_model, TEXTS, WORDS, steer)
        assert found.shape == (len(TEXTS), len(WORDS))
        for column, word in enumerate(WORDS):
            scores = log_probs(any_model, asked, [[f" {word}"] * len(asked)], steer)[0]
            torch.testing.assert_close(found[:, column], torch.stack([score.sum() for score in scores]), **CLOSE)


def test_named_next_is_a_log_probability_of_the_whole_word(model):
    """By hand, from plain passes over the text, the stem and the word."""
    found = named_next(model, TEXTS[:1], WORDS)[0]
    before = model.tokenizer(f"{TEXTS[0]} I was so", add_special_tokens=False)["input_ids"]
    for value, word in zip(found.tolist(), WORDS):
        after = model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model.original_model(input_ids=torch.tensor([[0, *before, *after]]), use_cache=False).logits[0]
        scores = logits[len(before) :].log_softmax(-1)
        assert value == pytest.approx(sum(scores[i, token].item() for i, token in enumerate(after)), abs=1e-4)


def test_pleasantness_is_the_pleasant_mean_minus_the_other_mean():
    log_odds = torch.tensor([[-1.0, -2.0, -6.0, -4.0, -8.0], [0.0, 0.0, 0.0, 0.0, 3.0]])
    pleasant = torch.tensor([True, False, True, False, False])
    assert pleasantness(log_odds, pleasant).tolist() == pytest.approx([-3.5 + 14 / 3, -1.0])
    assert pleasantness(log_odds[0], pleasant).item() == pytest.approx(-3.5 + 14 / 3)
    assert torch.allclose(pleasantness(log_odds, ~pleasant), -pleasantness(log_odds, pleasant))
    assert torch.allclose(pleasantness(log_odds + 7, pleasant), pleasantness(log_odds, pleasant))
    assert pleasantness(log_odds.expand(4, 2, 5), pleasant).shape == (4, 2)


# Reading


def test_reads_are_pearsons_correlations_over_texts(generator):
    readouts, measured = torch.randn(30, 4, generator=generator), torch.randn(30, generator=generator)
    readouts[:, 1] += 2 * measured
    readouts[:, 2] = 5 - 3 * measured
    found = reads(readouts, measured)
    expected = [pearsonr(readouts[:, vector], measured).statistic for vector in range(4)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[1] > 0.7 and found[2].item() == pytest.approx(-1)


def test_a_readout_that_does_not_vary_reads_nothing(generator):
    readouts = torch.ones(10, 2)
    readouts[:, 1] = torch.arange(10)
    assert reads(readouts, torch.arange(10.0)).tolist() == pytest.approx([0, 1])


# Writing


def test_a_zero_vector_writes_nothing(any_model, generator):
    vectors = drawn(any_model, generator, 3)
    vectors[1] = 0
    found = writes(any_model, TEXTS, WORDS, 1, vectors)
    torch.testing.assert_close(found[1], torch.zeros(len(WORDS)), **CLOSE)
    assert (found[[0, 2]].abs() > 1e-3).any(-1).all()


def test_the_opposite_vector_writes_the_opposite(any_model, generator):
    vectors = drawn(any_model, generator, 2)
    for depth in (0, 2, any_model.cfg.n_layers):
        found = writes(any_model, TEXTS, WORDS, depth, torch.cat([vectors, -vectors]))
        torch.testing.assert_close(found[2:], -found[:2], **CLOSE)


def test_writing_is_half_the_difference_of_adding_and_subtracting(any_model, generator):
    vectors = drawn(any_model, generator, 3)
    found = writes(any_model, TEXTS, WORDS, 2, vectors)
    for vector, row in zip(vectors, found):
        up, down = (named_next(any_model, TEXTS, WORDS, added(2, (s * vector).expand(3, -1))) for s in (1, -1))
        torch.testing.assert_close(row, ((up - down) / 2).mean(0), **CLOSE)


def test_a_planted_word_is_raised_most(any_model):
    """The unembedding direction of a word, added to what leaves the last block."""
    encoded = [any_model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in WORDS]
    words = [word for word, ids in zip(WORDS, encoded) if len(ids) == 1]
    rows = any_model.original_model.get_output_embeddings().weight[[ids[0] for ids in encoded if len(ids) == 1]]
    planted = 3 * rows / rows.norm(dim=-1, keepdim=True)
    found = writes(any_model, TEXTS, words, any_model.cfg.n_layers, planted)
    assert len(words) > 2
    assert found.argmax(-1).tolist() == list(range(len(words)))
    assert (found.diagonal() > 0.1).all()


# Sets of vectors


def test_sets_of_all_vectors_have_one_correlation(generator):
    read, write = torch.randn(2, 9, generator=generator)
    expected = pearsonr(read, write).statistic
    assert of_random_sets(read, write, 9, generator) == pytest.approx((expected,) * 3, abs=1e-6)


def test_random_sets_are_all_subsets_without_repetition(generator):
    read, write = torch.tensor([0.0, 1.0, 2.0, 4.0, 3.0]), torch.tensor([1.0, 0.0, 3.0, 2.0, 2.5])
    subsets = [list(rows) for rows in combinations(range(5), 3)]
    possible = sorted(pearsonr(read[rows], write[rows]).statistic for rows in subsets)
    median, low, high = of_random_sets(read, write, 3, generator)
    assert (low, high) == pytest.approx((possible[0], possible[-1]), abs=1e-6)  # each is a tenth of the draws
    assert any(median == pytest.approx(r, abs=1e-6) for r in possible[3:7])


def test_vectors_that_write_what_they_read_agree_in_every_set(generator):
    read = torch.randn(20, generator=generator)
    assert of_random_sets(read, 2 * read + 1, 6, generator) == pytest.approx((1, 1, 1))
    assert of_random_sets(read, -read, 6, generator) == pytest.approx((-1, -1, -1))
    _, low, high = of_random_sets(read, torch.randn(20, generator=generator), 6, generator)
    assert low < 0 < high


def test_random_sets_depend_on_their_generator_alone():
    read, write = torch.randn(2, 12, generator=Generator().manual_seed(1))
    first = of_random_sets(read, write, 5, Generator().manual_seed(2))
    torch.manual_seed(5)
    assert of_random_sets(read, write, 5, Generator().manual_seed(2)) == first
    assert of_random_sets(read, write, 5, Generator().manual_seed(3)) != first


@pytest.mark.parametrize("size", [13, 40])
def test_a_set_larger_than_there_are_vectors_is_refused(generator, size):
    read, write = torch.randn(2, 12, generator=generator)
    with pytest.raises(ValueError, match=f"{size}"):
        of_random_sets(read, write, size, generator)
