"""Effects of a conversation: planted ones are found with their size, noise has none, intervals cover what they say."""

import math

import numpy as np
import pytest
import torch
from conftest import seeded
from torch import Generator, Tensor

from helpers import effects
from helpers.effects import bias, difference, fall, gaps, growth, to_opening

SETS = 300  # simulated sets of conversations, for the coverage of an interval
CONVERSATIONS, EXCHANGES, D_MODEL = 25, 9, 16
SPREAD_OUT = torch.tensor(
    [0.0, -2, -1, -0.5, 0.5, 1, 2]
)  # of the references: the first reads as the others do on average
TURNS = torch.arange(2 * EXCHANGES)
BY_USER = TURNS % 2 == 0
USER, ASSISTANT = True, False
NOWHERE = torch.zeros(1, 1, D_MODEL)


def noise(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(CONVERSATIONS, *shape, generator=generator)


def as_similar(similarity: Tensor, generator: Generator) -> Tensor:
    """Conversation x turn x d_model: states of any length whose cosine with the first turn's is this one."""
    opening, other = torch.linalg.qr(noise(generator, D_MODEL, 2)).Q.mT[:, :, None].unbind(1)
    later = similarity[..., None] * opening + (1 - similarity[..., None] ** 2).sqrt() * other
    turns = torch.cat([opening, later], 1)
    return turns * noise(generator, turns.shape[1], 1).exp()


def rotation(generator: Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=generator)).Q


# Bias


def test_bias_by_hand():
    # means 4 and 1, 2, 3: two above the mean of the others, whose SD is 1
    readouts = torch.tensor([[1.0, 5, 2, 3], [1, 3, 2, 3]])
    assert bias(readouts, 1, seeded(0))[0] == 2
    assert bias(readouts.flip(-1), 2, seeded(0))[0] == 2


@pytest.mark.parametrize("k", [-3, 0.5, 4])
@pytest.mark.parametrize("emotion", [0, 3, 6])
def test_a_bias_of_k_sds_is_found_whichever_reference_has_it(generator, k, emotion):
    others = SPREAD_OUT[1:]
    means = torch.cat([others[:emotion], others.mean() + k * others.std()[None], others[emotion:]])
    shared = noise(generator, 1).expand(-1, len(means))  # what every reference reads of a conversation alike
    value, low, high = bias(means + shared, emotion, generator)
    assert (value, low, high) == pytest.approx((k, k, k), abs=1e-4)
    value, low, high = bias(means + shared + noise(generator, len(means)), emotion, generator)
    assert low < k < high and low < value < high and low * high > 0
    assert value == pytest.approx(k, abs=0.6)


def test_the_interval_of_a_bias_narrows_with_the_root_of_the_number_of_conversations(generator):
    def width(conversations: int) -> float:
        _, low, high = bias(torch.randn(conversations, 7, generator=generator) + SPREAD_OUT, 0, generator)
        return high - low

    assert width(100) / width(1600) == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("scale", [0.25, 8])
def test_bias_is_the_same_when_all_readouts_are_scaled_and_shifted(generator, scale):
    readouts = noise(generator, 7) + SPREAD_OUT
    found = bias(readouts, 2, seeded(1))
    assert bias(scale * readouts, 2, seeded(1)) == pytest.approx(found, rel=1e-4)
    assert bias(readouts - 20, 2, seeded(1)) == pytest.approx(found, rel=1e-4)
    by_conversation = 5 * noise(generator, 1)
    assert bias(scale * readouts + by_conversation, 2, seeded(1)) == pytest.approx(found, rel=1e-4)


def test_bias_turns_round_with_the_sign_of_the_readouts(generator):
    readouts = noise(generator, 7) + SPREAD_OUT
    value, low, high = bias(readouts, 2, seeded(1))
    assert bias(-readouts, 2, seeded(1)) == pytest.approx((-value, -high, -low), abs=1e-5)


@pytest.mark.parametrize("conversations", [1, 5, 30])
def test_bias_is_zero_where_the_others_read_alike_even_to_rounding(conversations):
    readouts = (0.1 * torch.arange(1, conversations + 1))[:, None].expand(-1, 9).clone()
    readouts[:, 4] += 1
    assert bias(readouts, 4, seeded(0)) == (0, 0, 0)


def test_a_small_spread_of_large_readouts_is_more_than_rounding():
    readouts = torch.tensor([[0.9001, 0.9002, 0.9003, 0.9006]])  # raw cosines
    assert bias(readouts, 3, seeded(0))[0] == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(("references", "others"), [(1, 0), (2, 1)])
def test_bias_refuses_too_few_references_to_have_a_spread(references, others):
    with pytest.raises(ValueError, match=f"needs at least two other references to compare with, got {others}"):
        bias(torch.randn(5, references, generator=seeded(0)), 0, seeded(0))


# The gap between speakers


def test_gaps_by_hand():
    readout = torch.tensor([[1.0, 5, 2, 0], [0, 0, 10, 20]])
    assert torch.equal(gaps(readout, BY_USER[:4]), torch.tensor([[4.0, -2], [0, 10]]))


@pytest.mark.parametrize(
    ("by_user", "expected"),
    [
        ([USER, ASSISTANT], [3]),
        ([USER, ASSISTANT, USER], [3]),  # nobody answers the last one
        ([ASSISTANT, USER, ASSISTANT], [5]),  # the assistant opens
        ([USER, USER, ASSISTANT], [5]),  # right before the answer
        ([USER, ASSISTANT, ASSISTANT], [3]),  # right after the user
        ([USER, ASSISTANT, ASSISTANT, USER, ASSISTANT], [3, 9]),
    ],
)
def test_a_gap_is_that_of_a_user_and_the_answer_that_follows(by_user, expected):
    readout = torch.tensor([[1.0, 4, 9, 16, 25]])[:, : len(by_user)]
    assert gaps(readout, torch.tensor(by_user)).tolist() == [expected]


@pytest.mark.parametrize(
    "by_user", [[USER], [ASSISTANT], [USER, USER], [ASSISTANT, ASSISTANT], [ASSISTANT, USER], [ASSISTANT, USER, USER]]
)
def test_gaps_refuse_a_conversation_in_which_nobody_answers_a_user(by_user):
    with pytest.raises(ValueError, match="no turn of a user is followed by one of the assistant"):
        gaps(torch.ones(2, len(by_user)), torch.tensor(by_user))


# Growth


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        ([7.0], 0),  # one step is first and last
        ([1.0, 4], 3),
        ([1.0, 50, 4], 3),
        ([1.0, 50, 60, 70, 4], 3),  # thirds are rounded down
        ([1.0, 3, 50, 60, 9, 5], 5),
        ([1.0, 3, 50, 60, 70, 80, 9, 5], 5),
        ([1.0, 2, 3, 50, 60, 70, 4, 5, 6], 3),
    ],
)
def test_growth_is_the_last_third_minus_the_first(series, expected):
    both = torch.tensor([series, [-value for value in series]])
    assert growth(both).tolist() == [expected, -expected]


@pytest.mark.parametrize("g", [-0.5, 0.101, 2])
def test_a_gap_that_grows_by_g_is_found_whatever_both_speakers_share(generator, g):
    """Users read a wandering level; answers lie above it by a gap that is g larger in the last third than before."""
    by_exchange = 0.035 + g * (torch.arange(EXCHANGES) >= 6)
    level = 3 * noise(generator, EXCHANGES).cumsum(1)
    readout = torch.stack([level, level + by_exchange], -1).flatten(1)
    assert growth(gaps(readout, BY_USER)).tolist() == pytest.approx([g] * CONVERSATIONS, abs=1e-4)
    noisy = readout + 0.1 * abs(g) * noise(generator, len(TURNS))
    value, low, high = effects.mean(growth(gaps(noisy, BY_USER)))
    assert low < value < high and low * high > 0 and value == pytest.approx(g, rel=0.1)


def test_a_drift_that_both_speakers_share_is_no_growth_of_the_gap():
    assert growth(gaps(0.5 * TURNS[None], BY_USER)).tolist() == [0]


# Likeness to the opening


def test_to_opening_is_the_cosine_of_numpy(generator):
    states, origin = noise(generator, 5, D_MODEL), torch.randn(1, 1, D_MODEL, generator=generator)
    found = to_opening(states - origin)
    assert found.shape == (CONVERSATIONS, 4)
    moved = (states - origin).double().numpy()
    for i in (0, 7):
        for later in (1, 4):
            a, b = moved[i, 0], moved[i, later]
            assert found[i, later - 1].item() == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)


def test_to_opening_has_no_column_for_the_opening_itself(generator):
    states = noise(generator, 1, D_MODEL).repeat(1, 4, 1)
    assert torch.allclose(to_opening(states), torch.ones(CONVERSATIONS, 3))
    assert to_opening(states[:, :2]).shape == (CONVERSATIONS, 1)


@pytest.mark.parametrize("origins", [(1, 1), (1, 6), (CONVERSATIONS, 6)], ids=["one", "of each turn", "of each state"])
def test_to_opening_is_the_same_under_rotation_and_when_the_stream_moves_with_its_origin(generator, origins):
    states, origin = 3 + noise(generator, 6, D_MODEL), torch.randn(*origins, D_MODEL, generator=generator)
    found, turned = to_opening(states - origin), rotation(generator)
    assert torch.allclose(to_opening(states @ turned - (origin @ turned)), found, atol=1e-5)
    assert torch.allclose(to_opening((states + 5 * turned[0]) - (origin + 5 * turned[0])), found, atol=1e-5)
    lengths = noise(generator, 6, 1).exp()
    assert torch.allclose(to_opening((origin + lengths * (states - origin)) - origin), found, atol=1e-5)


def test_each_turn_is_taken_from_its_own_origin(generator):
    states, drift = noise(generator, 6, D_MODEL), 10 * torch.randn(1, 6, D_MODEL, generator=generator)
    still = to_opening(states)
    assert torch.allclose(to_opening((states + drift) - drift), still, atol=1e-4)


def test_what_all_states_share_makes_raw_likeness_high_and_none_from_its_own_origin(generator):
    shared = 3 * D_MODEL**0.5 * torch.eye(D_MODEL)[None, :1]
    states = shared + noise(generator, 12, D_MODEL)
    assert to_opening(states).mean() > 0.85
    assert abs(to_opening(states - shared).mean()) < 0.05


def test_likeness_with_an_opening_at_the_origin_is_zero():
    assert to_opening(torch.ones(1, 3, 4).cumsum(1) - torch.ones(1, 1, 4)).tolist() == [[0, 0]]


# Its fall


@pytest.mark.parametrize(
    ("similarity", "expected"),
    [([0.9], 0), ([0.9, 0.7], 0), ([1.0, 9, 0.5], 0.25), ([0.75, 1.25, 9, 0, 0.5], 0.75), ([2.0, 0, 9, 9, 1, 0], 0.5)],
)
def test_fall_by_hand(similarity, expected):
    assert fall(torch.tensor([similarity, similarity])).tolist() == [expected, expected]


@pytest.mark.parametrize("f", [-0.2, 0.169, 0.5])
@pytest.mark.parametrize("later", [4, 5, 8, 9])
def test_a_similarity_that_falls_by_f_is_found(generator, f, later):
    planted = 0.6 + 0.2 * torch.rand(CONVERSATIONS, 1, generator=generator).expand(-1, later).clone()
    planted[:, -2:] -= f
    states = as_similar(planted, generator)
    found = fall(to_opening(states))
    assert found.tolist() == pytest.approx([f] * CONVERSATIONS, abs=1e-5)
    turned = rotation(generator)
    assert torch.allclose(fall(to_opening((7 + states @ turned) - (NOWHERE + 7))), found, atol=1e-4)


@pytest.mark.parametrize("turns", [5, 6, 9, 10])
def test_what_sets_the_speakers_apart_is_no_fall(turns):
    """The opener's own turns are more like the opening than the other's: first minus last would find that."""
    similarity = torch.where(torch.arange(1, turns) % 2 == 0, 0.9, 0.4)[None]
    assert fall(similarity).item() == pytest.approx(0, abs=1e-6)


# A conversation with one exchange


def test_one_exchange_has_a_gap_and_neither_growth_nor_fall(generator):
    readout, states = noise(generator, 2), noise(generator, 2, D_MODEL)
    gap = gaps(readout, BY_USER[:2])
    assert torch.equal(gap, readout[:, 1:] - readout[:, :1])
    assert growth(gap).tolist() == [0] * CONVERSATIONS
    assert fall(to_opening(states)).tolist() == [0] * CONVERSATIONS


def test_a_single_conversation_has_no_interval(generator):
    for found, expected in (
        (effects.mean(torch.tensor([0.25])), 0.25),
        (difference(torch.tensor([0.75]), torch.tensor([0.25])), 0.5),
        (difference(torch.tensor([0.75, 0.75]), torch.tensor([0.25])), 0.5),
    ):
        assert found[0] == expected and math.isnan(found[1]) and math.isnan(found[2])
    value, low, high = bias(SPREAD_OUT[None] + 1, 6, generator)
    assert value == low == high


# Mean and difference


def test_the_interval_of_a_mean_is_as_wide_as_the_normal_one(generator):
    values = 3 + 2 * torch.randn(400, generator=generator)
    value, low, high = effects.mean(values)
    error = values.std().item() / 20
    assert value == values.mean().item()
    assert (low, high) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.2 * error)


def test_a_planted_difference_is_found_between_sets_of_different_sizes_and_turns_round(generator):
    ours, theirs = 1.5 + torch.randn(300, generator=generator), 0.5 + 3 * torch.randn(500, generator=generator)
    value, low, high = difference(ours, theirs)
    error = (ours.var() / 300 + theirs.var() / 500).sqrt().item()
    assert value == pytest.approx((ours.mean() - theirs.mean()).item()) and low < 1 < high
    assert (low, high) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.2 * error)
    back = difference(theirs, ours)
    assert back == pytest.approx((-value, -high, -low), abs=0.2 * error)


def test_each_set_of_a_difference_is_drawn_by_itself(generator):
    """Of a set and itself the difference is zero, its interval is not: it is wider than that of a mean."""
    values = torch.randn(400, generator=generator)
    value, low, high = difference(values, values)
    _, below, above = effects.mean(values)
    assert value == 0 and low < 0 < high
    assert (high - low) / (above - below) == pytest.approx(2**0.5, rel=0.1)


def test_the_interval_of_a_bias_depends_on_the_generator_alone(generator):
    readouts = noise(generator, 7)
    assert bias(readouts, 0, seeded(3)) == bias(readouts, 0, seeded(3)) != bias(readouts, 0, seeded(4))


def test_a_mean_of_few_conversations_has_students_interval():
    values = torch.tensor([1.0, 2.0, 4.0])
    error = values.std().item() / 3**0.5
    assert effects.mean(values)[1:] == pytest.approx((7 / 3 - 4.30265 * error, 7 / 3 + 4.30265 * error), rel=1e-4)


# Null data


def no_bias(generator: Generator) -> effects.Value:
    return bias(noise(generator, 7) + SPREAD_OUT, 0, generator)


def no_growth(generator: Generator) -> effects.Value:
    return effects.mean(growth(gaps(noise(generator, len(TURNS)) + BY_USER, BY_USER)))


def no_fall(generator: Generator) -> effects.Value:
    """Every turn as like the opening as any other of its speaker's."""
    own = torch.where(BY_USER, 0.5, -0.5)[:, None] * torch.eye(D_MODEL)[0]
    states = 2 * noise(generator, 1, D_MODEL) + own + noise(generator, len(TURNS), D_MODEL)
    return effects.mean(fall(to_opening(states)))


def no_difference(generator: Generator) -> effects.Value:
    ours, theirs = 1 + noise(generator), 1 + 2 * torch.randn(40, generator=generator)
    return difference(ours, theirs)


@pytest.mark.parametrize("simulated", [no_bias, no_growth, no_fall, no_difference])
def test_null_data_are_centred_on_zero_and_intervals_cover_it_about_as_often_as_they_say(simulated):
    """The percentile intervals of a bias cover a little less than 95 %; misses lie on both sides."""
    value, low, high = torch.tensor([simulated(seeded(seed)) for seed in range(SETS)]).T
    assert abs(value.mean()) < 3.5 * value.std() / SETS**0.5
    above, below = (low > 0).float().mean(), (high < 0).float().mean()
    assert 0.02 < above + below < 0.11 and min(above, below) > 0
    assert (low <= value).all() and (value <= high).all()
