"""Planted directions separate, shuffled labels do not, words that are the same on both sides give exactly half."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Generator, Tensor

from helpers import stats
from helpers.directions import isotropic, mean_difference, projections
from helpers.prompts import pairs, sides
from helpers.separation import (
    along,
    direction_scores,
    excess,
    null_summary,
    permutation_test,
    random_scores,
    resampling,
    shuffled_label_scores,
    shuffled_words,
    summaries,
    summary,
    word_scores,
)

STATISTICS = {
    "gap / total SD": stats.gap_over_total_sd,
    "Cohen's d": stats.cohens_d,
    "d_z": stats.paired_d_z,
    "AUROC": stats.auroc,
    "paired accuracy": stats.paired_accuracy,
    "overlap": stats.overlap,
}
WORDS = ["river", "door", "lamp", "garden", "table", "street", "bread", "window"]


@pytest.fixture
def planted(generator: Generator) -> tuple[Tensor, Tensor]:
    """Train and test pairs with a direction at depth 1 and none at depth 0; side x pair x depth x d_model."""
    return worlds(generator, gap=[0.0, 4.0])


def worlds(generator: Generator, gap: list[float], train: int = 20, test: int = 16) -> tuple[Tensor, Tensor]:
    """Normal activations whose emotional side is shifted along the first axis, by another gap at each depth."""
    acts = torch.randn(2, train + test, len(gap), 32, generator=generator)
    acts[0, ..., 0] += torch.tensor(gap)
    return acts[:, :train], acts[:, train:]


@pytest.fixture
def texts() -> pd.DataFrame:
    """Pairs of the same everyday words, but for a wolf on the emotional side and a clerk on the neutral one."""
    rng = np.random.default_rng(0)
    drawn = [" ".join(rng.choice(WORDS, 5, replace=False)) for _ in range(12)]
    return table([f"The wolf {text}." for text in drawn], [f"The clerk {text}." for text in drawn])


def table(emotional: list[str], neutral: list[str]) -> pd.DataFrame:
    numbers = [str(number) for number in range(len(emotional))]
    return pd.DataFrame(
        {"pair": numbers, "split": "train", "topic": numbers, "emotional": emotional, "neutral": neutral}
    )


def value(found: pd.DataFrame, statistic: str, column: str = "value") -> list[float]:
    """One column of a tidy table, by depth."""
    rows = found[found["statistic"] == statistic]
    assert rows["depth"].tolist() == list(range(len(rows)))
    return rows[column].tolist()


def test_resampling_takes_each_pair_once_and_then_draws_with_replacement(generator):
    draws = resampling(6, 4, generator, 50)
    assert torch.allclose(draws.weights.sum(-1), torch.ones(51))
    assert torch.allclose(draws.weights[0], torch.tensor(1 / 6))
    assert draws.picks[0].tolist() == [0, 1, 2, 3]
    assert draws.weights.shape == (51, 6) and draws.picks.shape == (51, 4)
    assert draws.weights[1:].unique(dim=0).shape[0] > 40 and draws.picks[1:].unique(dim=0).shape[0] > 30


def test_a_planted_direction_is_found_at_its_depth_alone(planted, generator):
    found = summary(direction_scores(*planted, resampling(20, 16, generator, 50)))
    nothing, strong = value(found, "AUROC")
    assert strong > 0.95 and abs(nothing - 0.5) < 0.25
    assert value(found, "overlap")[1] < 0.15 < 0.5 < value(found, "overlap")[0]


def test_shuffled_labels_give_half_on_average(planted, generator):
    scores = shuffled_label_scores(*planted, generator, 500)
    assert stats.auroc(*scores).mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.08)


def test_draw_0_of_the_direction_is_the_plain_fit(planted, generator):
    train, test = planted
    scores = direction_scores(train, test, resampling(20, 16, generator, 3))
    expected = torch.stack([projections(side, mean_difference(*train)) for side in test])
    assert scores.shape == (2, 4, 2, 16)
    assert torch.allclose(scores[:, 0], expected, atol=1e-5)


def test_other_draws_of_the_direction_are_fits_on_resampled_pairs(planted, generator):
    train, test = planted
    draws = resampling(20, 16, generator, 3)
    scores = direction_scores(train, test, draws)
    for draw in (1, 2, 3):
        rows = torch.arange(20).repeat_interleave((draws.weights[draw] * 20).round().int())
        assert len(rows) == 20
        direction = mean_difference(*train[:, rows])
        expected = torch.stack([projections(side, direction) for side in test[:, draws.picks[draw]]])
        assert torch.allclose(scores[:, draw], expected, atol=1e-5)


def test_along_reads_a_given_direction_and_resamples_whole_pairs(generator):
    direction, test = torch.randn(5, generator=generator), torch.randn(2, 9, 5, generator=generator)
    scores = along(direction, test, generator, 200)
    by_hand = torch.tensor([[sum(a * b for a, b in zip(row, direction)) for row in side] for side in test])
    assert scores.shape == (2, 201, 1, 9)
    assert torch.allclose(scores[:, 0, 0], by_hand, atol=1e-5)
    gap = (by_hand[0] - by_hand[1]).tolist()
    picked = [[gap.index(pytest.approx(g, abs=1e-5)) for g in row.tolist()] for row in (scores[0] - scores[1])[1:, 0]]
    assert set().union(*picked) == set(range(9)) and len({tuple(row) for row in picked}) == 200
    assert sum(len(set(row)) < 9 for row in picked) > 190  # with replacement
    counted = torch.bincount(torch.tensor(picked).flatten(), minlength=9)
    assert counted.tolist() == pytest.approx([200] * 9, rel=0.3)


def test_along_finds_a_planted_direction_and_no_other(generator):
    test = worlds(generator, gap=[4.0], train=0, test=30)[1][:, :, 0]
    first, second = torch.eye(32)[:2]
    for direction, low, high in ((first, 0.95, 1), (second, 0.2, 0.8), (-first, 0, 0.05)):
        found = summary(along(direction, test, generator, 200))
        assert low <= value(found, "AUROC")[0] <= high
        assert value(found, "AUROC", "low")[0] <= value(found, "AUROC")[0] <= value(found, "AUROC", "high")[0]


def test_along_depends_on_its_generator_alone(generator):
    direction, test = torch.randn(5, generator=generator), torch.randn(2, 9, 5, generator=generator)
    first = along(direction, test, Generator().manual_seed(1), 20)
    torch.manual_seed(3)
    assert torch.equal(along(direction, test, Generator().manual_seed(1), 20), first)
    assert not torch.equal(along(direction, test, Generator().manual_seed(2), 20), first)


def test_along_refuses_non_finite_activations(generator):
    test = torch.randn(2, 9, 5, generator=generator)
    test[1, 3, 2] = float("inf")
    with pytest.raises(ValueError, match="the test pairs hold non-finite activations: load the model in float32"):
        along(torch.ones(5), test, generator, 5)


def test_random_directions_point_where_the_emotional_train_pairs_lie(planted, generator):
    train, test = planted
    directions = isotropic(40, 2, 32, generator)
    on_train = random_scores(directions, train, train)
    assert (on_train[0].mean(-1) > on_train[1].mean(-1)).all()
    on_test = random_scores(directions, train, test)
    assert torch.allclose(on_test.abs()[1], projections(test[1], directions).abs(), atol=1e-5)
    assert value(null_summary(on_test), "AUROC")[1] > 0.55


def test_words_that_give_a_side_away_are_found(texts, generator):
    scores = word_scores(texts[::2], texts[1::2], resampling(6, 6, generator, 20))
    assert scores.shape == (2, 21, 1, 6)
    assert value(summary(scores), "AUROC") == [1]


@pytest.fixture(scope="module")
def real() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train and test pairs whose words differ from pair to pair."""
    return pairs("fear_calm", "validation"), pairs("fear_calm", "holdout")


def fitted_words(vocabulary: pd.DataFrame, train: pd.DataFrame, test: pd.DataFrame) -> np.ndarray:
    """scikit-learn's plain log-odds of the test texts, side x pair."""
    vectorizer = CountVectorizer(token_pattern=r"[\w']+").fit(sides(vocabulary))
    is_emotional = [1] * len(train) + [0] * len(train)
    fitted = LogisticRegression(solver="liblinear").fit(vectorizer.transform(sides(train)), is_emotional)
    return fitted.decision_function(vectorizer.transform(sides(test))).reshape(2, len(test))


def test_draw_0_of_the_words_is_scikit_learns_plain_fit(real, generator):
    train, test = real
    scores = word_scores(train, test, resampling(len(train), len(test), generator, 1))
    assert np.allclose(scores[:, 0, 0], fitted_words(train, train, test), atol=1e-5)


def test_other_draws_of_the_words_are_fits_on_resampled_pairs(real, generator):
    train, test = real
    draws = resampling(len(train), len(test), generator, 1)
    resampled = train.loc[train.index.repeat((draws.weights[1] * len(train)).round().int().numpy())]
    expected = fitted_words(train, resampled, test)[:, draws.picks[1]]
    assert np.allclose(word_scores(train, test, draws)[:, 1, 0], expected, atol=1e-2)


def test_words_give_exactly_half_on_pairs_of_the_same_words(texts, generator):
    same = table(
        ["The wolf chased the dog.", "He ran from the door, the lamp off.", "Bread, river, wolf."],
        ["The dog chased the wolf.", "The lamp ran off from the, door he.", "Wolf? Bread! River..."],
    )
    found = summary(word_scores(texts, same, resampling(12, 3, generator, 20)))
    for statistic in ("AUROC", "paired accuracy"):
        for column in ("value", "low", "high"):
            assert value(found, statistic, column) == [0.5]


def test_words_give_exactly_half_on_the_reversible_pairs_of_this_repository(generator):
    reversible = pairs("reversible")
    scores = word_scores(pairs("fear_calm", "train"), reversible, resampling(40, len(reversible), generator, 5))
    assert value(summary(scores), "AUROC") == [0.5]


def test_summary_holds_every_statistic_of_draw_0_inside_its_interval(planted, generator):
    scores = direction_scores(*planted, resampling(20, 16, generator, 100))
    found = summary(scores)
    assert list(found) == ["depth", "statistic", "value", "low", "high"] and len(found) == 2 * len(STATISTICS)
    assert (found["low"] <= found["value"]).all() and (found["value"] <= found["high"]).all()
    for name, statistic in STATISTICS.items():
        assert value(found, name) == pytest.approx(statistic(*scores[:, 0]).tolist(), abs=1e-5)


def test_intervals_of_shares_end_at_0_and_1(generator):
    scores = torch.randn(2, 50, 1, 8, generator=generator)
    scores[0, 0] += 10  # the value is perfect, the draws are noise
    found = summary(scores)
    for statistic in ("AUROC", "paired accuracy"):
        assert value(found, statistic) == value(found, statistic, "high") == [1]
    assert value(found, "overlap") == value(found, "overlap", "low") == [0]


def test_null_summary_is_the_median_and_the_quantiles_of_the_draws(planted, generator):
    scores = shuffled_label_scores(*planted, generator, 201)
    found = null_summary(scores)
    for name, statistic in STATISTICS.items():
        low, median, high = np.percentile(statistic(*scores), [2.5, 50, 97.5], axis=0)
        for column, expected in {"low": low, "value": median, "high": high}.items():
            assert value(found, name, column) == pytest.approx(expected, abs=1e-5)


def test_summaries_name_the_reader_of_each_row(planted, generator):
    scores = {name: shuffled_label_scores(*planted, generator, 20) for name in ("a", "b")}
    found = summaries(scores, null_summary)
    for name in scores:
        own = found[found["condition"] == name].drop(columns="condition").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, null_summary(scores[name]))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_excess_of_a_reader_over_itself_is_exactly_zero(planted, generator, statistic):
    scores = direction_scores(*planted, resampling(20, 16, generator, 20))
    found = excess(scores, scores, statistic)
    assert (found[["value", "low", "high"]] == 0).all().all()


def test_the_excess_over_a_reader_without_depths_is_taken_at_every_depth(planted, texts, generator):
    draws = resampling(20, 12, generator, 20)
    ours = direction_scores(planted[0], planted[1][:, :12], draws)
    theirs = word_scores(pd.concat([texts, texts[:8]]), texts, draws)
    gap = np.subtract(value(summary(ours), "AUROC"), value(summary(theirs), "AUROC"))
    assert value(excess(ours, theirs), "excess AUROC") == pytest.approx(gap)


def test_readers_with_other_draws_or_depths_cannot_be_compared(generator):
    scores = torch.randn(2, 5, 3, 8, generator=generator)
    with pytest.raises(ValueError, match="readers with 5 and 4 draws cannot be compared"):
        excess(scores, scores[:, :4])
    with pytest.raises(ValueError, match="depths"):
        excess(scores, scores[:, :, :2])


def test_identical_sides_are_refused(planted, generator):
    train, test = planted
    same = train[:1].expand_as(train)
    with pytest.raises(ValueError, match="are the two groups of texts identical"):
        direction_scores(same, test, resampling(20, 16, generator, 3))
    with pytest.raises(ValueError, match="are the two groups of texts identical"):
        permutation_test(same, test, generator, 3)


def test_non_finite_train_activations_are_refused(planted, generator):
    train, test = planted
    train[0, 3, 1, 5] = float("nan")
    with pytest.raises(ValueError, match="non-finite"):
        direction_scores(train, test, resampling(20, 16, generator, 3))


def test_a_single_test_pair_is_refused(planted, generator):
    train, test = planted
    with pytest.raises(ValueError, match="at least 2 points in each group, got 1"):
        summary(direction_scores(train, test[:, :1], resampling(20, 1, generator, 10)))


def test_permutation_finds_the_planted_depth_with_the_smallest_p_there_is(planted, generator):
    found = permutation_test(*planted, generator, 199)
    assert set(found["statistic"]) == set(STATISTICS)
    for statistic in STATISTICS:
        nothing, strong = value(found, statistic, "p")
        assert strong == pytest.approx(1 / 200) and nothing > 0.01
        assert value(found, statistic, "p_max")[1] == pytest.approx(1 / 200)
    assert (found["p_max"] >= found["p"]).all()


def test_permutation_p_max_compares_with_the_largest_depth_of_a_draw(generator):
    found = permutation_test(*worlds(generator, gap=[1.5] + [0.0] * 19), generator, 199)
    for statistic in STATISTICS:
        p, p_max = (np.array(value(found, statistic, column)) for column in ("p", "p_max"))
        assert (p_max >= p).all() and np.median(p_max[1:]) > 0.9


def test_permutation_refits_the_direction_in_every_draw(generator):
    # The sides of the test pairs differ along axis 0, far below what each pair has in common along axis 1. All train
    # pairs together point mostly along axis 1; where the two that do so cancel, swapped pairs spread along axis 0.
    train = torch.zeros(2, 3, 1, 2)
    train[0, 0, 0, 0] = train[0, 1:, 0, 1] = 1
    test = torch.zeros(2, 16, 1, 2)
    test[..., 0, 1] = 100 * torch.randn(16, generator=generator)
    test[0, ..., 0], test[1, ..., 0] = 1, -1
    p = value(permutation_test(train, test, generator, 199), "AUROC", "p")
    assert p[0] > 0.1


def test_permutation_p_is_uniform_when_there_is_nothing_to_find(generator):
    found = permutation_test(*worlds(generator, gap=[0.0] * 400, train=10, test=10), generator, 99)
    for statistic in ("Cohen's d", "d_z", "gap / total SD"):
        p = np.array(value(found, statistic, "p"))
        for level in (0.05, 0.25, 0.5):
            three_standard_errors = 3 * (level * (1 - level) / 400) ** 0.5
            assert (p <= level + 1e-6).mean() == pytest.approx(level, abs=three_standard_errors)


def test_shuffled_words_keep_the_words_and_the_closing_punctuation(generator):
    before = pairs("fear_calm", "test")
    after = shuffled_words(before, generator)
    moved = 0
    for old, new in zip(sides(before), sides(after)):
        assert old[-1] == new[-1] == "."
        assert Counter(old[:-1].split()) == Counter(new[:-1].split())
        moved += old != new
    assert moved > 70
    other = [column for column in before if column not in ("emotional", "neutral")]
    pd.testing.assert_frame_equal(before[other], after[other])


@pytest.mark.parametrize("closing", ["", ".", "?!", "…", ".”", '."', "!') "])
def test_shuffled_words_leave_any_closing_punctuation_at_the_end(generator, closing):
    words = ["one", "two,", "three", "it's", "“four"]
    after = shuffled_words(table([" ".join(words) + closing], ["five."]), generator)["emotional"][0]
    assert after.endswith(closing)
    assert Counter(after.removesuffix(closing).split()) == Counter(words)


def test_nothing_depends_on_the_global_seed(planted, texts):
    def everything(seed: int) -> list:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002, the global state is the point
        own = Generator().manual_seed(3)
        draws = resampling(20, 16, own, 10)
        return [
            direction_scores(*planted, draws),
            word_scores(texts, texts, resampling(12, 12, own, 5)),
            shuffled_label_scores(*planted, own, 10),
            torch.tensor(permutation_test(*planted, own, 20)[["p", "p_max"]].values),
            sides(shuffled_words(texts, own)),
        ]

    for first, second in zip(everything(0), everything(1)):
        assert first.equal(second) if isinstance(first, Tensor) else first == second
