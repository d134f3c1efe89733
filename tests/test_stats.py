"""Every statistic against scipy, scikit-learn or a value worked by hand; resampling and intervals on planted data."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import r2_score, roc_auc_score
from torch import Generator, Tensor

from helpers import stats
from helpers.separation import STATISTICS, direction_scores, resampling

SIZES = pytest.mark.parametrize(("n", "m"), [(12, 12), (12, 7), (5, 40)])
Groups = tuple[Tensor, Tensor]


def groups(generator: Generator, n: int, m: int, gap: float = 1.0) -> Groups:
    """Two normal groups in double precision whose population means lie `gap` standard deviations apart."""
    normal = torch.randn(n + m, generator=generator, dtype=torch.float64)
    return normal[:n] + gap, normal[n:]


def tied(generator: Generator, n: int, m: int) -> Groups:
    """Two groups of small whole numbers: many ties within and between them."""
    return tuple(group.mul(1.5).round() for group in groups(generator, n, m))


def test_gap_over_total_sd_by_hand():
    # means 4 and 0; all four points have mean 2 and variance (1 + 9 + 1 + 9) / 4 = 5
    assert stats.gap_over_total_sd(torch.tensor([3.0, 5.0]), torch.tensor([1.0, -1.0])) == 4 / torch.tensor(5).sqrt()


@SIZES
def test_gap_over_total_sd_is_numpys(generator, n, m):
    emotional, neutral = groups(generator, n, m)
    expected = (emotional.mean() - neutral.mean()) / np.std(np.concatenate([emotional, neutral]))
    assert stats.gap_over_total_sd(emotional, neutral).item() == pytest.approx(expected.item())


@SIZES
def test_cohens_d_follows_from_the_t_test(generator, n, m):
    emotional, neutral = groups(generator, n, m)
    t = scipy.stats.ttest_ind(emotional, neutral).statistic
    assert stats.cohens_d(emotional, neutral).item() == pytest.approx(t * math.sqrt(1 / n + 1 / m))


def test_paired_d_z_follows_from_the_paired_t_test(generator):
    emotional, neutral = groups(generator, 15, 15)
    t = scipy.stats.ttest_rel(emotional, neutral).statistic
    assert stats.paired_d_z(emotional, neutral).item() == pytest.approx(t / math.sqrt(15))


@SIZES
@pytest.mark.parametrize("drawn", [groups, tied])
def test_auroc_is_scikit_learns_and_mann_whitneys_u(generator, drawn, n, m):
    emotional, neutral = drawn(generator, n, m)
    found = stats.auroc(emotional, neutral).item()
    assert found == pytest.approx(roc_auc_score([1] * n + [0] * m, torch.cat([emotional, neutral])))
    assert found == pytest.approx(scipy.stats.mannwhitneyu(emotional, neutral).statistic / (n * m))


def test_auroc_of_the_same_points_is_exactly_half(generator):
    points = torch.randn(37, generator=generator)
    assert stats.auroc(points, points[torch.randperm(37, generator=generator)]) == 0.5


def test_paired_accuracy_by_hand_counts_a_tie_half():
    # above, tied, below, above
    assert stats.paired_accuracy(torch.tensor([2.0, 1, 0, 5]), torch.tensor([1.0, 1, 1, 1])) == 2.5 / 4


@SIZES
@pytest.mark.parametrize("drawn", [groups, tied])
def test_overlap_is_one_minus_the_one_sided_kolmogorov_smirnov_distance(generator, drawn, n, m):
    emotional, neutral = drawn(generator, n, m)
    distance = scipy.stats.ks_2samp(neutral, emotional, alternative="greater").statistic
    assert stats.overlap(emotional, neutral).item() == pytest.approx(1 - distance)


@pytest.mark.parametrize(
    ("emotional", "neutral", "expected"),
    [([2.0, 3.0], [0.0, 1.0], 0), ([1.0, 3.0], [0.0, 2.0], 0.5), ([0.0, 1.0], [2.0, 3.0], 1), ([1.0], [1.0], 1)],
)
def test_overlap_by_hand(emotional, neutral, expected):
    assert stats.overlap(torch.tensor(emotional), torch.tensor(neutral)) == expected


@pytest.mark.parametrize("statistic", STATISTICS.values())
def test_batch_axes_agree_with_one_by_one(generator, statistic):
    emotional, neutral = torch.randn(2, 3, 4, 10, generator=generator)
    together = statistic(emotional, neutral)
    alone = [[statistic(emotional[i, j], neutral[i, j]) for j in range(4)] for i in range(3)]
    assert together.shape == (3, 4)
    assert torch.allclose(together.double(), torch.tensor(alone).double())


@pytest.mark.parametrize("gap", [0.5, 5, 50, 500])
def test_gap_over_total_sd_never_reaches_two(generator, gap):
    assert stats.gap_over_total_sd(*groups(generator, 10, 10, gap)) < 2


@pytest.mark.parametrize("gap", [-3, 0.1, 1, 10])
def test_gap_over_total_sd_follows_from_cohens_d_in_large_equal_groups(generator, gap):
    large = groups(generator, 20_000, 20_000, gap)
    expected = stats.from_cohens_d(stats.cohens_d(*large).item())
    assert stats.gap_over_total_sd(*large).item() == pytest.approx(expected, rel=1e-4)


def test_cohens_d_of_two_becomes_the_root_of_two():
    assert stats.from_cohens_d(2) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("gap", [-2, 0.1, 3, 100])
def test_to_cohens_d_inverts_exactly(generator, gap):
    ten = groups(generator, 10, 10, gap)
    found = stats.to_cohens_d(stats.gap_over_total_sd(*ten).item(), group=10)
    assert found == pytest.approx(stats.cohens_d(*ten).item(), rel=1e-8)


@pytest.mark.parametrize("ratio", [2.0, 2.5, -2.0, math.nan])
def test_to_cohens_d_refuses_a_ratio_that_no_equal_groups_have(ratio):
    with pytest.raises(ValueError, match="always below 2 for equal groups"):
        stats.to_cohens_d(ratio, group=10)


@pytest.mark.parametrize(
    ("statistic", "points"), [(stats.gap_over_total_sd, 0), (stats.cohens_d, 1), (stats.paired_d_z, 1)]
)
def test_too_few_points_are_refused(statistic, points):
    with pytest.raises(ValueError, match=f"at least {points + 1} points in each group, got {points}"):
        statistic(torch.ones(points), torch.zeros(points))


@pytest.mark.parametrize("drawn", [stats.bootstrap_picks, stats.sign_flips])
def test_resampling_depends_on_the_generator_alone(drawn):
    def draws(seed: int) -> Tensor:
        return drawn(20, 30, Generator().manual_seed(seed))

    torch.manual_seed(0)
    first = draws(7)
    torch.manual_seed(1)
    assert first.equal(draws(7)) and not first.equal(draws(8))
    assert not first[0].equal(first[1])


def test_bootstrap_picks_take_every_row_equally_often(generator):
    picks = stats.bootstrap_picks(4000, 5, generator)
    assert picks.shape == (4000, 5)
    assert torch.allclose(picks.flatten().bincount() / picks.numel(), torch.tensor(0.2), atol=0.01)


def test_counts_are_the_share_of_each_row_in_a_draw():
    picks = torch.tensor([[0, 0, 2, 3], [1, 1, 1, 1]])
    assert stats.counts(picks, 4).tolist() == [[0.5, 0, 0.25, 0.25], [0, 1, 0, 0]]


def test_sign_flips_are_plus_and_minus_one_equally_often(generator):
    flips = stats.sign_flips(2000, 5, generator)
    assert flips.abs().eq(1).all()
    assert flips.mean(0).abs().max() < 0.07


def test_interval_is_numpys_percentile(generator):
    draws = torch.randn(101, 3, generator=generator, dtype=torch.float64)
    low, high = stats.interval(draws, 0.9)
    assert np.allclose([low, high], np.percentile(draws, [5, 95], axis=0))


@pytest.mark.parametrize("value", [-10.0, 0.0, 10.0])
def test_centred_interval_contains_the_value_at_the_width_of_the_percentile_interval(generator, value):
    draws = torch.randn(200, 3, generator=generator).exp()
    low, high = stats.centred_interval(torch.full((3,), value), draws, 0.95)
    plain = stats.interval(draws, 0.95)
    assert (low < value).all() and (value < high).all()
    assert torch.allclose(high - low, plain[1] - plain[0], atol=1e-5)


def test_centred_interval_lays_the_median_on_the_value():
    # the draws 0..19 and 1000 have the median 10 (and another mean) and the 90 % interval 1..19
    low, high = stats.centred_interval(torch.tensor(30.0), torch.tensor([*range(20), 1000.0]), 0.9)
    assert (low.item(), high.item()) == pytest.approx((21, 39))


def test_centred_interval_covers_with_misses_on_both_sides_where_the_percentile_interval_misses_on_one(generator):
    """200 worlds, laid along the depth axis: 20 pairs to fit a planted direction in 128 dimensions, 40 to test it."""
    planted = torch.zeros(2, 1, 1, 128)
    planted[0, ..., 0] = 2.5
    train, test = (torch.randn(2, pairs, 200, 128, generator=generator) + planted for pairs in (20, 40))
    values = stats.cohens_d(*direction_scores(train, test, resampling(20, 40, generator, 200)))
    found, draws = values[0], values[1:]

    def misses(interval: tuple[Tensor, Tensor]) -> tuple[int, int]:
        """Worlds whose interval lies above the mean over worlds, and below it."""
        low, high = interval
        return int((low > found.mean()).sum()), int((high < found.mean()).sum())

    above, below = misses(stats.centred_interval(found, draws, 0.95))
    assert above + below <= 0.1 * 200
    assert min(above, below) >= 0.25 * (above + below) > 0
    above, below = misses(stats.interval(draws, 0.95))
    assert above == 0 and below > 0.05 * 200


def test_mean_interval_is_scipys_bootstrap(generator):
    values = torch.randn(40, generator=generator).exp()
    mean, low, high = stats.mean_interval(values, generator, draws=20_000, confidence=0.9)
    theirs = scipy.stats.bootstrap(
        [values.numpy()], np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=0
    ).confidence_interval
    assert mean == pytest.approx(values.mean().item())
    assert (low, high) == pytest.approx(theirs, abs=0.02)


def test_correlation_is_scipys(generator):
    x, noise = torch.randn(2, 40, generator=generator)
    r, low, high = stats.correlation(x, x + noise, generator, draws=4000, confidence=0.9)
    theirs = scipy.stats.bootstrap(
        [x.numpy(), (x + noise).numpy()],
        lambda x, y: scipy.stats.pearsonr(x, y, axis=-1).statistic,
        n_resamples=4000,
        confidence_level=0.9,
        paired=True,
        method="percentile",
        rng=0,
    ).confidence_interval
    assert r == pytest.approx(scipy.stats.pearsonr(x, x + noise).statistic, abs=1e-5)
    assert (low, high) == pytest.approx(theirs, abs=0.015)


@pytest.mark.parametrize("constant", [0.0, 0.1, 3.0])
def test_correlation_with_a_constant_is_nan(generator, constant):
    flat, varied = torch.full((7,), constant), torch.randn(7, generator=generator)
    for x, y in [(flat, varied), (varied, flat)]:
        assert np.isnan(stats.correlation(x, y, generator, 50, 0.9)).all()


def test_intervals_are_the_same_for_the_same_generator(generator):
    x, y = torch.randn(2, 20, generator=generator)
    for estimate in (lambda g: stats.mean_interval(x, g, 100, 0.9), lambda g: stats.correlation(x, y, g, 100, 0.9)):
        assert estimate(Generator().manual_seed(3)) == estimate(Generator().manual_seed(3))


def test_permutation_p_by_hand_counts_the_observed_value_and_ties():
    null = torch.tensor([1.0, 2, 3, 4])
    observed = {5.0: 1 / 5, 4.0: 2 / 5, 2.5: 3 / 5, 0.0: 1.0}
    for value, p in observed.items():
        assert stats.permutation_p(torch.tensor(value), null).item() == pytest.approx(p)


def test_permutation_p_of_several_depths_against_one_null_per_draw():
    found = stats.permutation_p(torch.tensor([0.0, 2.5, 9.0]), torch.tensor([[1.0], [2.0], [3.0]]))
    assert found.tolist() == [1, 0.5, 0.25]


def test_permutation_p_is_uniform_under_the_null(generator):
    values = torch.randn(100, 5000, generator=generator)
    p = stats.permutation_p(values[0], values[1:])
    for level in (0.01, 0.05, 0.25, 0.5, 0.9):
        assert (p <= level + 1e-6).float().mean().item() == pytest.approx(level, abs=0.02)


@pytest.mark.parametrize("statistic", [stats.gap_over_total_sd, stats.cohens_d, stats.paired_d_z])
def test_no_gap_is_an_effect_of_zero_also_where_nothing_varies(statistic):
    constant = torch.full((4,), 0.3)
    assert statistic(constant, constant).item() == 0
    assert statistic(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([4.0, 3.0, 2.0, 1.0])).item() == 0


def test_explained_variance_by_hand():
    # squared distances from the mean (2, 1): 1 + 1 + 1 + 1; squared errors: 1 + 0 + 0 + 1
    acts, reconstructed = torch.tensor([[1.0, 0], [3, 2]]), torch.tensor([[2.0, 0], [3, 1]])
    assert stats.explained_variance(acts, reconstructed) == 0.5


def test_explained_variance_is_scikit_learns(generator):
    acts = torch.randn(50, 8, generator=generator) * torch.arange(1, 9) + 3
    reconstructed = acts + torch.randn(50, 8, generator=generator)
    expected = r2_score(acts, reconstructed, multioutput="variance_weighted")
    assert stats.explained_variance(acts, reconstructed) == pytest.approx(expected, abs=1e-6)


def test_explained_variance_of_nothing_missing_of_the_mean_and_of_worse(generator):
    acts = torch.randn(50, 8, generator=generator) + 1000  # far from 0: single precision alone would lose it
    assert stats.explained_variance(acts, acts) == 1
    assert stats.explained_variance(acts, acts.double().mean(0).expand(50, 8).float()) == pytest.approx(0, abs=1e-6)
    assert stats.explained_variance(acts, torch.zeros(50, 8)) < -1000


def test_holm_by_hand_in_the_order_given():
    # sorted: .01 * 4, .02 * 3, .03 * 2 raised to the .06 before it, .4 * 1
    assert stats.holm([0.4, 0.01, 0.03, 0.02]) == pytest.approx([0.4, 0.04, 0.06, 0.06])
    assert stats.holm([0.5, 0.3, 0.9]) == pytest.approx([1, 0.9, 1])
    assert stats.holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert stats.holm([0.3]) == [0.3]
    assert stats.holm([]) == []


def test_holm_keeps_the_ranks_and_lies_between_p_and_bonferronis(generator):
    p = torch.rand(50, generator=generator).pow(4).tolist()
    corrected = stats.holm(p)
    order = sorted(range(50), key=p.__getitem__)
    assert all(corrected[i] <= corrected[j] for i, j in itertools.pairwise(order))
    assert all(each <= found <= min(1, 50 * each) for each, found in zip(p, corrected))
    assert corrected[order[0]] == 50 * min(p)
    turned = torch.randperm(50, generator=generator).tolist()
    assert stats.holm([p[i] for i in turned]) == [corrected[i] for i in turned]


def test_holm_seldom_finds_anything_where_there_is_nothing_and_more_than_bonferroni_where_there_is(generator):
    nulls = torch.rand(1000, 10, generator=generator)
    assert np.mean([min(stats.holm(p)) < 0.05 for p in nulls.tolist()]) == pytest.approx(0.05, abs=0.02)
    nulls[:, :8] /= 100  # eight true effects
    beyond = np.mean([(np.array(stats.holm(p)) < 0.05).sum() - (np.array(p) < 0.005).sum() for p in nulls.tolist()])
    assert beyond > 0.5
    assert np.mean([min(stats.holm(p)[8:]) < 0.05 for p in nulls.tolist()]) == pytest.approx(0.05, abs=0.02)
