"""Read-outs on numbers worked out by hand, on planted shifts and drifts, and references against means by hand."""

import math
import re
from collections.abc import Iterable

import pandas as pd
import pytest
import torch
from conftest import seeded
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from helpers import emotions
from helpers.activations import residuals, token_residuals
from helpers.config import DATA
from helpers.readouts import (
    Background,
    References,
    absolute_error,
    at_position,
    beyond_neutral,
    centred_cosine,
    cosine,
    from_lexicon,
    from_texts,
    overlap,
    with_last_hidden,
)

NAMES = ("happy", "sad", "calm")
AT = torch.arange(1, 61)  # positions of neutral states, two at each


def references(seed: int = 0, depth: int = 2, size: int = 8) -> References:
    centroids = torch.randn(len(NAMES), depth, size, generator=seeded(seed))
    return References(NAMES, centroids, torch.zeros(depth, size))


def at_depths(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def noisy(seed: int = 1, depth: int = 2, size: int = 8) -> Background:
    """Neutral states that differ by chance alone."""
    return Background(torch.randn(120, depth, size, generator=seeded(seed)), AT.repeat(2))


def to_both_sides(drift: Tensor, half: Tensor) -> Background:
    """Two states at every position, as far to both sides of where it has drifted: so what is left of each is known."""
    middle = curve(AT)[:, None, None] * drift
    return Background(torch.cat([middle + half, middle - half]), AT.repeat(2))


def curve(position: Tensor) -> Tensor:
    """Quadratic in the logarithm of the position, as the neutral expectation can be."""
    return (1.5 * position.log1p() - 0.4 * position.log1p() ** 2 + 2).float()


def close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-5)


# As published


def test_cosines_by_hand():
    """At each depth with the centroid of that depth; 0 with a vector of zeros."""
    states = torch.stack([at_depths([3, 4], [0, 2]), at_depths([0, 0], [-5, 0])])
    centroids = torch.stack([at_depths([1, 0], [0, 7]), at_depths([0, 9], [1, 1]), at_depths([0, 0], [-2, 0])])
    r = 0.5**0.5
    expected = torch.tensor([[[0.6, 1.0], [0.8, r], [0.0, 0.0]], [[0.0, 0.0], [0.0, -r], [0.0, 1.0]]])
    close(cosine(states, centroids), expected)
    close(cosine(states[0], centroids), expected[0])
    close(cosine(states[:, None].expand(2, 4, 2, 2), centroids), expected[:, None].expand(2, 4, 3, 2))


def test_centred_cosines_by_hand():
    """The mean of the centroids, (2, 1), is the origin."""
    refs = References(("happy", "sad"), torch.tensor([[[5.0, 1.0]], [[-1.0, 1.0]]]), torch.tensor([[9.0, 9.0]]))
    states = torch.tensor([[[2.0, 3.0]], [[4.0, 1.0]], [[5.0, 5.0]], [[2.0, 1.0]]])
    expected = torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.6, -0.6], [0.0, 0.0]])
    close(centred_cosine(states, refs)[..., 0], expected)


def test_what_all_share_does_not_count_in_a_centred_cosine():
    refs, states = references(), torch.randn(5, 2, 8, generator=seeded(2))
    shared = 20 * torch.randn(2, 8, generator=seeded(3))
    moved = References(NAMES, refs.centroids + shared, refs.neutral)
    close(centred_cosine(states + shared, moved), centred_cosine(states, refs), 1e-4)
    assert (cosine(states + shared, moved.centroids) > 0.9).all()  # as published it is all that counts


def test_emotions_that_do_not_differ_have_no_centred_cosine():
    refs = References(NAMES, torch.full((3, 2, 8), 0.1), torch.zeros(2, 8))
    assert (centred_cosine(torch.randn(5, 2, 8, generator=seeded(0)), refs) == 0).all()


def test_absolute_errors_by_hand():
    states = torch.stack([at_depths([1, 2], [0, 0]), at_depths([1, -1], [3, 3])])
    centroids = torch.stack([at_depths([1, 4], [1, -1]), at_depths([-1, 2], [3, 3])])
    expected = torch.tensor([[[1.0, 1.0], [1.0, 3.0]], [[2.5, 3.0], [2.5, 0.0]]])
    close(absolute_error(states, centroids), expected)
    close(absolute_error(states[1], centroids), expected[1])


def test_overlaps_by_hand():
    """Half of four coordinates, by size whatever the sign: the same two, one of two, none."""
    states = torch.tensor([[[5.0, -4.0, 1.0, 0.0]]])
    centroids = torch.tensor([[[-9.0, 8.0, 0.0, 1.0]], [[0.0, 9.0, 1.0, -8.0]], [[0.0, 1.0, -7.0, 7.0]]])
    close(overlap(states, centroids, share=0.5)[0, :, 0], torch.tensor([1.0, 1 / 3, 0.0]))
    close(overlap(states, centroids, share=0.01)[0, :, 0], torch.tensor([1.0, 0.0, 0.0]))  # one at least
    assert overlap(states[0], centroids, share=0.5).shape == (3, 1)


def test_the_default_overlap_is_of_one_coordinate_in_a_hundred():
    state = torch.arange(300.0)[None, None]
    others = torch.stack([state[0].roll(shift, -1) for shift in (0, -1, 150)])
    close(overlap(state, others)[0, :, 0], torch.tensor([1.0, 2 / 4, 0.0]))


# Axes


def test_axes_are_unit_vectors_from_the_mean_of_all_centroids():
    refs = References(("happy", "sad"), torch.tensor([[[7.0, 5.0]], [[1.0, -3.0]]]), torch.tensor([[50.0, 0.0]]))
    close(refs.axes, torch.tensor([[[0.6, 0.8]], [[-0.6, -0.8]]]))


def test_axes_are_zero_where_the_emotions_do_not_differ():
    """Even by the rounding of their mean; and there nothing is read."""
    refs = references()
    refs.centroids[:, 0] = torch.randn(8, generator=seeded(4))
    assert (refs.axes[:, 0] == 0).all()
    close(refs.axes[:, 1].norm(dim=-1), torch.ones(3))
    states, background = torch.randn(5, 2, 8, generator=seeded(5)), noisy()
    for found in (
        beyond_neutral(states, AT[:5], refs, background),
        centred_cosine(states, refs),
    ):
        assert (found[..., 0] == 0).all() and (found[..., 1] != 0).all()


# Beyond what neutral text reads at that position


def test_a_shift_of_k_sds_along_an_axis_reads_k():
    """From where neutral text has drifted at that position, whatever the position."""
    refs = references()
    drift, half = 3 * torch.randn(2, 2, 8, generator=seeded(8))
    background = to_both_sides(drift, half)
    spread = (refs.axes * half).sum(-1).abs() * (120 / 119) ** 0.5
    at = torch.tensor([1, 2, 17, 60])
    neutral = curve(at)[:, None, None] * drift
    close(beyond_neutral(neutral, at, refs, background), torch.zeros(4, 3, 2), 1e-3)
    for emotion in range(3):
        for k in (-4.0, 2.5):
            shift = k * spread[emotion][:, None] * refs.axes[emotion]
            found = beyond_neutral(neutral + shift, at, refs, background)
            close(found[:, emotion], torch.full((4, 2), k), 2e-3)


def test_a_shift_at_one_depth_or_state_is_read_there_alone():
    refs, background = references(), noisy()
    states, at = torch.randn(6, 2, 8, generator=seeded(9)), torch.tensor([3, 9, 9, 20, 41, 60])
    shifted = states.clone()
    shifted[4, 1] += refs.axes[2, 1]
    change = beyond_neutral(shifted, at, refs, background) - beyond_neutral(states, at, refs, background)
    assert change[4, 2, 1] > 0.5
    elsewhere = torch.ones(6, 3, 2, dtype=torch.bool)
    elsewhere[4, :, 1] = False
    assert (change[elsewhere] == 0).all()


@pytest.mark.parametrize(
    ("drifting", "error"),
    [
        (lambda at: torch.full(at.shape, 5.0), 1e-3),
        (curve, 1e-3),
        (lambda at: 3 * at.double().sqrt().float(), 0.2),
        (lambda at: 15 / (at + 1), 0.2),
        (lambda at: 4 * at.log1p().sin(), 0.2),
    ],
    ids=["a constant", "a quadratic in the logarithm", "a root", "a decay", "a wave"],
)
def test_what_drifts_with_the_position_in_all_states_alike_changes_nothing(drifting, error):
    """And much without the correction for the position."""
    refs, background = references(), noisy()
    states, at = torch.randn(60, 2, 8, generator=seeded(10)), AT
    along = torch.randn(2, 8, generator=seeded(11))
    moved = Background(background.states + drifting(background.position)[:, None, None] * along, background.position)
    there = states + drifting(at)[:, None, None] * along
    before, after = beyond_neutral(states, at, refs, background), beyond_neutral(there, at, refs, moved)
    assert (after - before).abs().max() < error
    if drifting is not curve and error > 0.1:
        along_axes = torch.einsum("...ld,eld->...el", moved.states, refs.axes)
        change = drifting(at)[:, None, None] * torch.einsum("ld,eld->el", along, refs.axes) / along_axes.std(0)
        assert (change.amax(0) - change.amin(0)).max() > 5 * error


def test_readings_of_neutral_states_themselves_have_mean_0_and_sd_1():
    background = noisy()
    found = beyond_neutral(background.states, background.position, references(), background)
    close(found.mean(0), torch.zeros(3, 2), 1e-4)
    close(found.std(0), torch.ones(3, 2), 1e-4)


def test_a_spread_of_zero_reads_zero():
    """At the depth where no neutral state differs from another but by its position; rounding is no spread."""
    refs, background = references(size=200), noisy(size=200)
    background.states[:, 0] = 100 * torch.randn(200, generator=seeded(12))
    background.states[:, 0] += curve(background.position)[:, None] * torch.randn(200, generator=seeded(13))
    found = beyond_neutral(torch.randn(5, 2, 200, generator=seeded(14)), AT[:5], refs, background)
    assert (found[..., 0] == 0).all() and (found[..., 1] != 0).all()


def test_leading_axes_stay():
    refs, background = references(), noisy()
    states, at = torch.randn(4, 5, 2, 8, generator=seeded(15)), torch.randint(1, 61, (4, 5), generator=seeded(16))
    found = beyond_neutral(states, at, refs, background)
    assert found.shape == (4, 5, 3, 2)
    close(found[2, 3], beyond_neutral(states[2, 3], at[2, 3], refs, background))
    close(found[:, 1], beyond_neutral(states[:, 1], at[:, 1], refs, background))


def test_a_background_needs_ten_states():
    def background(count: int) -> Background:
        return Background(torch.randn(count, 2, 8, generator=seeded(17)), torch.arange(count))

    with pytest.raises(ValueError, match="a neutral background needs at least ten states, got 9"):
        beyond_neutral(torch.zeros(1, 2, 8), torch.tensor([4]), references(), background(9))
    beyond_neutral(torch.zeros(1, 2, 8), torch.tensor([4]), references(), background(10))


def test_expected_values_follow_a_quadratic_and_stay_constant_outside_of_known_positions():
    background = Background(torch.zeros(56, 1, 1), torch.arange(5, 61))
    values = curve(background.position)
    asked = torch.tensor([[5, 9, 33], [34, 59, 60]])
    close(at_position(background, values, asked), curve(asked), 1e-4)
    outside = at_position(background, values, torch.tensor([0, 1, 4, 61, 500]))
    low, high = curve(torch.tensor([5, 60]))
    close(outside, torch.stack([low, low, low, high, high]), 1e-4)


@pytest.mark.parametrize(
    "position",
    [
        [5] * 10 + [6] * 10,
        [5] * 15 + [6, 7, 8, 9, 10],
        [1, 2, 3, 4, 5] + [60] * 15,
        [5] + [30] * 18 + [60],
        [3, 9] * 10,
    ],
    ids=["two", "many at the first", "many at the last", "many within", "in turn"],
)
def test_states_that_share_positions_are_expected_there_as_they_are(position):
    """However many of them share the first or last one."""
    background = Background(torch.zeros(20, 1, 1), torch.tensor(position))
    values = 100 + 0.5 * torch.tensor(position).log1p().float()
    close(at_position(background, values, background.position), values, 1e-3)
    ends = at_position(background, values, torch.tensor([0, max(position) + 30]))
    close(ends, torch.stack([values.min(), values.max()]), 1e-3)


def test_states_at_a_single_position_are_refused():
    background = Background(torch.randn(12, 2, 8, generator=seeded(18)), torch.full((12,), 7))
    with pytest.raises(ValueError, match="neutral states at two positions or more are needed, all are at 7"):
        beyond_neutral(torch.zeros(1, 2, 8), torch.tensor([7]), references(), background)


# References


def test_centroids_of_texts_are_means_of_each_emotions_training_situations(any_model):
    table = pd.read_csv(DATA / "prompts" / "situations.csv").query("split == 'train'").reset_index(drop=True)
    acts = residuals(any_model, table["text"].tolist(), ["mean"])["mean"]
    names = ("afraid", "happy", "bored")
    found = from_texts(any_model, names, "mean")
    assert found.names == names
    for name, centroid in zip((*names, "neutral"), (*found.centroids, found.neutral)):
        rows = torch.tensor(table.index[table["emotion"] == name].to_numpy())
        close(centroid, acts[rows].mean(0), 1e-4)


def test_references_are_read_at_the_position_that_is_asked_for(model):
    at_end, on_average = (from_texts(model, NAMES, position) for position in ("final punctuation", "mean"))
    assert (at_end.centroids - on_average.centroids).abs().max() > 0.01
    texts = emotions.situations("train").query("emotion == 'sad'")["text"].tolist()
    close(at_end.centroids[1], residuals(model, texts, ["final punctuation"])["final punctuation"].mean(0), 1e-4)


def read_alone(model: TransformerBridge, words: Iterable[str]) -> Tensor:
    """The states at the end of each word."""
    return residuals(model, [f" {word}" for word in words], ["last token"])["last token"]


def test_centroids_of_the_lexicon_are_means_of_words_read_alone(model):
    found = from_lexicon(model, ("sad", "calm"))
    table = pd.read_csv(DATA / "lexicons" / "emotion_synonyms.csv")
    assert found.names == ("sad", "calm")
    for name, centroid in zip(found.names, found.centroids):
        words = table.loc[table["emotion"] == name, "word"].unique()
        close(centroid, read_alone(model, words).mean(0), 1e-4)
    neutral = " ".join(pd.read_csv(DATA / "prompts" / "neutral.csv")["text"]).lower()
    ordinary = set(re.findall("[a-z]+", neutral)) - set(table["word"])
    close(found.neutral, read_alone(model, ordinary).mean(0), 1e-4)


def test_words_that_name_an_emotion_are_no_neutral_words(model, monkeypatch):
    monkeypatch.setattr("helpers.readouts.neutral_texts", lambda: ["The happy dog ran.", "The dog was afraid, SAD."])
    found = from_lexicon(model, ("sad", "calm")).neutral
    close(found, read_alone(model, ["the", "dog", "ran", "was"]).mean(0), 1e-4)


@pytest.mark.parametrize("of", [lambda m, names: from_texts(m, names, "mean"), from_lexicon], ids=["texts", "lexicon"])
def test_an_unknown_emotion_is_answered_with_the_known_ones(model, of):
    known = ", ".join(emotions.names())
    with pytest.raises(ValueError) as refusal:
        of(model, ("happy", "Sad", "angri"))
    assert str(refusal.value) == f"unknown emotion 'Sad': choose from {known}"


@torch.no_grad()
def test_the_depth_after_the_last_is_hugging_faces_last_hidden_state(any_model):
    """The stream after the final norm, put behind the other depths."""
    text = "I walked home along the quiet road."
    states = token_residuals(any_model, text)
    found = with_last_hidden(any_model, states)
    assert torch.equal(found[:, :-1], states)
    hf = AutoModelForCausalLM.from_pretrained(any_model.cfg.folder, attn_implementation="eager").eval()
    ids = any_model.tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = hf(torch.tensor([[0, *ids]]), output_hidden_states=True).hidden_states[-1][0]
    close(found[:, -1], expected, 1e-4 * math.sqrt(expected.square().mean()))
    close(with_last_hidden(any_model, states[2]), found[2])
