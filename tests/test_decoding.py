"""Planted emotions are read on unseen topics, shuffled labels are not; every measure against another computation."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, roc_auc_score
from torch import Generator, Tensor

from helpers.config import CFG
from helpers.decoding import (
    MEASURES,
    Design,
    accuracy,
    bag_of_words,
    bootstrapped,
    chosen,
    confusion,
    curve,
    difference,
    judged,
    line,
    one_against_rest,
    over_depth,
    p_over_depths,
    pairwise_separation,
    read_by,
    shuffles,
)
from helpers.geometry import centred, means, own
from helpers.stats import bootstrap_picks, centred_interval

TRAIN, TEST, EMOTIONS, D_MODEL = 10, 6, 5, 32
CHANCE = {"AUROC": 0.5, "pairwise separation": 0.5, "accuracy": 1 / EMOTIONS}
SEEDS = st.integers(0, 10_000)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def world(generator: Generator, strengths: list[float], train: int = TRAIN, test: int = TEST) -> tuple[Tensor, Tensor]:
    """Train and test texts, topic x emotion x depth x d_model: a direction per emotion, as strong as each depth says.

    Topics have offsets of their own, and noise has standard deviation 1.
    """
    depths = len(strengths)
    of_emotion = torch.nn.functional.normalize(torch.randn(EMOTIONS, depths, D_MODEL, generator=generator), dim=-1)
    acts = torch.randn(train + test, EMOTIONS, depths, D_MODEL, generator=generator)
    acts += torch.tensor(strengths)[:, None] * of_emotion
    acts += 0.3 * torch.randn(train + test, 1, depths, D_MODEL, generator=generator)
    return acts[:train], acts[train:]


def single(generator: Generator, strength: float, train: int = TRAIN, test: int = TEST) -> tuple[Tensor, Tensor]:
    """The same at one depth, topic x emotion x d_model."""
    train_acts, test_acts = world(generator, [strength], train, test)
    return train_acts[:, :, 0], test_acts[:, :, 0]


def plain(train: int = TRAIN, test: int = TEST) -> Design:
    """The data as they are."""
    return Design(own(train, EMOTIONS), torch.arange(test)[None])


def drawn_scores(generator: Generator, draws: int = 3, tied: bool = False) -> Tensor:
    scores = torch.randn(draws, TEST, EMOTIONS, EMOTIONS, generator=generator)
    return scores.round() if tied else scores


# Designs


def test_draw_0_of_both_designs_is_the_data_as_they_are(generator):
    for made in (bootstrapped, shuffles):
        design = made(TRAIN, TEST, EMOTIONS, generator, 20)
        assert design.fit.shape == (21, EMOTIONS, TRAIN * EMOTIONS) and design.picks.shape == (21, TEST)
        assert torch.equal(design.fit[0], own(TRAIN, EMOTIONS)[0]) and design.picks[0].tolist() == list(range(TEST))
        assert torch.allclose(design.fit.sum(-1), torch.tensor(1.0))
        assert design.fit.unique(dim=0).shape[0] == 21


def test_bootstrap_draws_pick_test_topics_anew_and_shuffles_keep_them(generator):
    picks = bootstrapped(TRAIN, TEST, EMOTIONS, generator, 50).picks
    assert picks.min() == 0 and picks.max() == TEST - 1 and picks.unique(dim=0).shape[0] > 40
    assert (shuffles(TRAIN, TEST, EMOTIONS, generator, 50).picks == torch.arange(TEST)).all()


def test_bootstrap_draws_take_emotions_own_texts_and_shuffles_do_not(generator):
    others = ~torch.eye(EMOTIONS, dtype=torch.bool)
    foreign = {
        made: made(TRAIN, TEST, EMOTIONS, generator, 50).fit.unflatten(-1, (TRAIN, EMOTIONS)).sum(2)[:, others]
        for made in (bootstrapped, shuffles)
    }  # of every emotion's vector, the weight on each other emotion's texts
    assert (foreign[bootstrapped] == 0).all()
    assert foreign[shuffles][1:].mean().item() == pytest.approx(1 / EMOTIONS, abs=0.02)


def test_there_are_as_many_draws_as_the_notebooks_share(generator):
    assert len(bootstrapped(3, 2, 2, generator).picks) == 1 + CFG.bootstrap_draws
    assert len(shuffles(3, 2, 2, generator).picks) == 1 + CFG.permutation_draws


# Planted and shuffled


@pytest.mark.parametrize("measure", MEASURES)
def test_planted_emotions_are_read_at_their_depth_and_not_with_shuffled_labels(generator, measure):
    train, test = world(generator, [0.0, 5.0], TRAIN, TRAIN)
    drawn = over_depth(train, test, bootstrapped(TRAIN, TRAIN, EMOTIONS, generator, 60), [measure])[measure]
    null = over_depth(train, test, shuffles(TRAIN, TRAIN, EMOTIONS, generator, 300), [measure])[measure]
    assert drawn.shape == (61, 2) and drawn[:, 1].min() > 0.9 and drawn[0, 1] > 0.95
    assert abs(drawn[0, 0] - CHANCE[measure]) < 0.15
    assert null[1:].mean(0).tolist() == pytest.approx([CHANCE[measure]] * 2, abs=0.04)
    assert torch.equal(null[0], drawn[0])


def test_p_over_depths_finds_the_planted_depth(generator):
    train, test = world(generator, [0.0, 0.0, 4.0, 1.0], TRAIN, TRAIN)
    drawn = over_depth(train, test, shuffles(TRAIN, TRAIN, EMOTIONS, generator, 99))["AUROC"]
    p, best = p_over_depths(drawn)
    assert best == 2 and p == pytest.approx(1 / 100)


def test_p_over_depths_of_pure_noise_is_spread_evenly():
    """p of the best depth alone, without regard to the choice among depths, would be small far too often."""
    p = []
    for seed in range(60):
        train, test = world(seeded(seed), [0.0] * 4, 6, 6)
        p.append(p_over_depths(over_depth(train, test, shuffles(6, 6, EMOTIONS, seeded(seed), 99))["AUROC"])[0])
    assert 0.4 < np.mean(p) < 0.6 and np.mean(np.array(p) < 0.2) < 0.35


def test_p_over_depths_by_hand():
    drawn = torch.tensor([[0.5, 0.8, 0.6], [0.9, 0.1, 0.1], [0.7, 0.7, 0.7], [0.1, 0.2, 0.8], [0.0, 0.0, 0.0]])
    assert p_over_depths(drawn) == (pytest.approx(3 / 5), 1)


# Reading


def test_draw_0_reads_along_unit_centred_vectors_from_the_mean_of_the_train_texts(generator):
    train, test = single(generator, 2, TRAIN, TRAIN)
    found = read_by(train, test, plain(TRAIN, TRAIN))
    assert found.shape == (1, TRAIN, EMOTIONS, EMOTIONS)
    vectors = train.mean(0) - train.mean((0, 1))
    vectors /= vectors.norm(dim=-1, keepdim=True)
    assert torch.allclose(found[0], (test - train.mean((0, 1))) @ vectors.T, atol=1e-5)


def test_other_draws_read_picked_test_topics_along_refitted_vectors(generator):
    train, test = single(generator, 2, TRAIN, TRAIN)
    fitted = bootstrap_picks(4, TRAIN, seeded(5))
    design = bootstrapped(TRAIN, TRAIN, EMOTIONS, seeded(5), 4)
    found = read_by(train, test, design)
    for draw in range(4):
        here = train[fitted[draw]]
        vectors = torch.nn.functional.normalize(here.mean(0) - here.mean((0, 1)), dim=-1)
        expected = (test[design.picks[1 + draw]] - train.mean((0, 1))) @ vectors.T
        assert torch.allclose(found[1 + draw], expected, atol=1e-5)


def test_picks_hold_the_topics_of_each_draw(generator):
    train, test = single(generator, 2, TRAIN, TRAIN)
    every = read_by(train, test, plain(TRAIN, TRAIN))[0]
    picks = torch.randint(TRAIN, (3, TRAIN), generator=generator)
    found = read_by(train, test, Design(own(TRAIN, EMOTIONS).expand(3, -1, -1), picks))
    assert torch.allclose(found, every[picks], atol=1e-6)


def test_train_and_test_may_have_different_numbers_of_topics(generator):
    train, test = world(generator, [0.0, 5.0])
    design = bootstrapped(TRAIN, TEST, EMOTIONS, generator, 5)
    assert read_by(train[:, :, 1], test[:, :, 1], design).shape == (6, TEST, EMOTIONS, EMOTIONS)
    assert over_depth(train, test, design)["AUROC"][:, 1].min() > 0.9
    assert chosen({("own", "last", "last"): train}, {"last": test}).depth.tolist() == [1, 0]


def test_what_is_projected_out_is_not_read(generator):
    """Emotions lie along two directions; without them nothing is left, and moving texts along them changes nothing."""
    plane = torch.linalg.qr(torch.randn(D_MODEL, 2, generator=generator)).Q.T
    angle = torch.arange(EMOTIONS) * 2 * torch.pi / EMOTIONS
    acts = 6 * torch.stack([angle.cos(), angle.sin()], -1) @ plane
    train, test = acts + torch.randn(2, TRAIN, EMOTIONS, D_MODEL, generator=generator)
    design = plain(TRAIN, TRAIN)
    assert accuracy(read_by(train, test, design)).item() > 0.95
    without = read_by(train, test, design, plane)
    assert abs(one_against_rest(without).mean() - 0.5) < 0.1
    moved = test + torch.randn(TRAIN, EMOTIONS, 2, generator=generator) @ (50 * plane)
    assert torch.allclose(read_by(train, moved, design, plane), without, atol=1e-3)
    assert torch.allclose(read_by(train, test, design, plane[:0]), read_by(train, test, design), atol=1e-6)


def test_vectors_may_start_from_a_neutral_mean(generator):
    train, test = single(generator, 2, TRAIN, TRAIN)
    neutral, design = torch.randn(D_MODEL, generator=generator), plain(TRAIN, TRAIN)
    vectors = torch.nn.functional.normalize(train.mean(0) - neutral, dim=-1)
    expected = (test - train.mean((0, 1))) @ vectors.T
    assert torch.allclose(read_by(train, test, design, neutral=neutral)[0], expected, atol=1e-5)
    own_mean = read_by(train, test, design, neutral=train.mean((0, 1)))
    assert torch.allclose(own_mean, read_by(train, test, design), atol=1e-5)


def test_texts_that_are_all_alike_read_0_and_every_measure_gives_chance(generator):
    """As at depth 0 of a model without positions in its embedding, where every text ends in the same token."""
    alike = (10 * torch.randn(D_MODEL, generator=generator)).expand(TRAIN, EMOTIONS, D_MODEL).contiguous()
    design = bootstrapped(TRAIN, TRAIN, EMOTIONS, generator, 10)
    scores = read_by(alike, alike, design)
    assert (scores == 0).all() and (read_by(alike, alike, design, neutral=alike.mean((0, 1))) == 0).all()
    for name, measure in MEASURES.items():
        assert measure(scores).tolist() == pytest.approx([CHANCE[name]] * 11)


# Measures


@pytest.mark.parametrize("tied", [False, True])
def test_one_against_rest_is_scikit_learns_auroc(generator, tied):
    scores = drawn_scores(generator, tied=tied)
    is_own = np.tile(np.eye(EMOTIONS), (TEST, 1))
    expected = [
        [roc_auc_score(is_own[:, k], scores[draw, ..., k].flatten()) for k in range(EMOTIONS)] for draw in range(3)
    ]
    assert np.allclose(one_against_rest(scores), expected, atol=1e-6)
    assert np.allclose(MEASURES["AUROC"](scores), np.mean(expected, -1), atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_pairwise_separation_agrees_with_a_slow_loop(generator, tied):
    scores = drawn_scores(generator, tied=tied)
    for draw in range(3):
        won = []
        for text in scores[draw].tolist():
            for a in range(EMOTIONS):
                for b in range(a):
                    of_a, of_b = text[a][a] - text[a][b], text[b][a] - text[b][b]
                    won.append((of_a > of_b) + (of_a == of_b) / 2)
        assert pairwise_separation(scores)[draw].item() == pytest.approx(np.mean(won), abs=1e-6)


def test_two_texts_that_read_the_same_count_half(generator):
    """Whatever rounding makes of sums of their readings."""
    same = torch.randn(20, TEST, 1, EMOTIONS, generator=generator).expand(-1, -1, EMOTIONS, -1)
    assert (pairwise_separation(same) == 0.5).all() and (one_against_rest(same) == 0.5).all()


def test_accuracy_and_confusion_are_scikit_learns(generator):
    scores, names = drawn_scores(generator), ["sad", "afraid", "calm", "proud", "bored"]
    truth, read = list(range(EMOTIONS)) * TEST, scores.argmax(-1).flatten(1)
    assert accuracy(scores).tolist() == pytest.approx([accuracy_score(truth, each) for each in read])
    found = confusion(scores, names)
    assert found.columns.tolist() == ["emotion", "read as", "share"]
    table = found.pivot(index="emotion", columns="read as", values="share").loc[names, names]
    assert np.allclose(table, confusion_matrix(truth, read[0], normalize="true"))
    assert np.allclose(table.sum(axis=1), 1)
    assert np.diag(table).mean() == pytest.approx(accuracy(scores)[0].item())


def test_a_perfect_reader_and_its_opposite():
    scores = torch.eye(EMOTIONS).expand(1, TEST, -1, -1)
    assert {name: measure(scores).item() for name, measure in MEASURES.items()} == dict.fromkeys(MEASURES, 1)
    assert {name: measure(-scores).item() for name, measure in MEASURES.items()} == dict.fromkeys(MEASURES, 0)


@given(seed=SEEDS, size=st.floats(0, 20))
@settings(max_examples=25, deadline=None)
def test_what_all_test_texts_share_does_not_change_how_well_they_are_told_apart(seed, size):
    train, test = single(seeded(seed), 2, TEST, TEST)
    common = size * torch.randn(D_MODEL, generator=seeded(seed + 1))
    here, there = (read_by(train, acts, plain(TEST, TEST)) for acts in (test, test + common))
    for measure in (one_against_rest, pairwise_separation):
        assert torch.allclose(measure(here), measure(there), atol=0.01)


@given(seed=SEEDS, size=st.floats(0, 20))
@settings(max_examples=25, deadline=None)
def test_what_the_texts_of_a_topic_share_does_not_change_pairwise_separation(seed, size):
    train, test = single(seeded(seed), 2, TEST, TEST)
    offset = size * torch.randn(2, TEST, 1, D_MODEL, generator=seeded(seed + 1))
    here, there = (
        read_by(train, test, plain(TEST, TEST)),
        read_by(train + offset[0], test + offset[1], plain(TEST, TEST)),
    )
    assert torch.allclose(pairwise_separation(here), pairwise_separation(there), atol=0.02)


@given(seed=SEEDS, size=st.floats(0, 20))
@settings(max_examples=25, deadline=None)
def test_what_train_texts_of_a_topic_share_does_not_change_auroc(seed, size):
    train, test = single(seeded(seed), 2, TEST, TEST)
    offset = size * torch.randn(TEST, 1, D_MODEL, generator=seeded(seed + 1))
    here, there = (read_by(acts, test, plain(TEST, TEST)) for acts in (train, train + offset))
    assert torch.allclose(one_against_rest(here), one_against_rest(there), atol=0.02)


@given(seed=SEEDS, scale=st.floats(1e-3, 1e3))
@settings(max_examples=25, deadline=None)
def test_no_measure_depends_on_the_scale_of_the_activations(seed, scale):
    train, test = single(seeded(seed), 2, TEST, TEST)
    here, there = read_by(train, test, plain(TEST, TEST)), read_by(scale * train, scale * test, plain(TEST, TEST))
    assert torch.allclose(there, scale * here, rtol=1e-4, atol=1e-4 * scale)
    for measure in MEASURES.values():
        assert torch.allclose(measure(here), measure(there), atol=0.02)


def test_test_topics_that_differ_blur_auroc_and_leave_pairwise_separation(generator):
    train, test = single(generator, 4, TRAIN, TRAIN)
    test = test + 10 * torch.randn(TRAIN, 1, D_MODEL, generator=generator)
    scores = read_by(train, test, plain(TRAIN, TRAIN))
    assert pairwise_separation(scores).item() > 0.95 and one_against_rest(scores).mean() < 0.75


# Over depth


def test_over_depth_reads_every_depth_by_itself(generator):
    train, test = world(generator, [0.0, 1.0, 3.0], TRAIN, TRAIN)
    design = bootstrapped(TRAIN, TRAIN, EMOTIONS, generator, 4)
    found = over_depth(train, test, design, list(MEASURES))
    assert list(found) == list(MEASURES)
    for depth in range(3):
        scores = read_by(train[:, :, depth], test[:, :, depth], design)
        for name, measure in MEASURES.items():
            assert torch.equal(found[name][:, depth], measure(scores))
    assert list(over_depth(train, test, design)) == ["AUROC"]


def test_a_curve_of_bootstrap_draws_is_the_data_with_an_interval_around(generator):
    drawn = torch.randn(201, 3, generator=generator) + torch.tensor([0.0, 5, 10])
    drawn[0] += 1
    found = curve(drawn)
    assert found.columns.tolist() == ["depth", "value", "low", "high"] and found.depth.tolist() == [0, 1, 2]
    assert found.value.tolist() == drawn[0].tolist()
    low, high = centred_interval(drawn[0], drawn[1:], CFG.confidence)
    assert found.low.tolist() == low.tolist() and found.high.tolist() == high.tolist()
    assert ((found.low < found.value) & (found.value < found.high)).all()


def test_a_curve_of_shuffled_labels_is_their_median_and_quantiles_without_the_data(generator):
    drawn = torch.randn(201, 3, generator=generator)
    found = curve(drawn, null=True)
    expected = np.quantile(drawn[1:], [0.5, 0.025, 0.975], axis=0)
    assert np.allclose(found[["value", "low", "high"]].T, expected, atol=1e-5)
    drawn[0] = 1e6
    pd.testing.assert_frame_equal(curve(drawn, null=True), found)


def test_a_line_is_a_curve_without_a_band():
    found = line(torch.tensor([0.5, 0.75]))
    assert found.columns.tolist() == curve(torch.rand(5, 2)).columns.tolist()
    assert found.depth.tolist() == [0, 1] and found.value.tolist() == [0.5, 0.75]
    assert found[["low", "high"]].isna().all(axis=None)


@pytest.mark.parametrize("null", [False, True])
def test_readers_are_judged_by_two_measures_as_curves_are(generator, null):
    readers = {"centred": drawn_scores(generator, 40), "words": drawn_scores(generator, 30)}
    found = judged(readers, "control", null).set_index(["condition", "statistic"])
    assert len(found) == 4 and set(found.kind) == {"control"}
    for (name, statistic), row in found.iterrows():
        (expected,) = curve(MEASURES[statistic](readers[name])[:, None], null).to_dict("records")
        assert {column: row[column] for column in ("value", "low", "high")} == {
            column: expected[column] for column in ("value", "low", "high")
        }
    assert set(judged(readers).kind) == {"result"}


# Two readers compared


def test_the_difference_of_two_readers_by_scipy(generator):
    ours, theirs = torch.rand(2, 101, 24, generator=generator)
    ours[0] += 0.5  # the data lie far from the draws
    found = difference(ours, theirs)
    test = scipy.stats.mannwhitneyu(ours[0], theirs[0])
    assert found["gap"] == pytest.approx((ours[0].mean() - theirs[0].mean()).item(), abs=1e-6)
    assert found["superiority"] == pytest.approx(test.statistic / 24**2) and found["p"] == pytest.approx(test.pvalue)
    for name in ("gap", "superiority"):
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
    back = difference(theirs, ours)
    assert [back["gap"], back["gap_low"]] == pytest.approx([-found["gap"], -found["gap_high"]], abs=1e-6)
    assert back["superiority"] == pytest.approx(1 - found["superiority"]) and back["p"] == pytest.approx(found["p"])


def test_a_better_reader_is_found_better_and_a_reader_is_no_better_than_itself(generator):
    train, test = world(generator, [5.0, 0.5], TRAIN, TRAIN)
    design = bootstrapped(TRAIN, TRAIN, EMOTIONS, generator, 100)
    strong, weak = (one_against_rest(read_by(train[:, :, d], test[:, :, d], design)) for d in (0, 1))
    found = difference(strong, weak)
    assert found["gap_low"] > 0.1 and found["superiority"] == 1 and found["p"] < 0.02
    same = difference(strong, strong)
    assert same["gap"] == same["gap_low"] == same["gap_high"] == 0
    assert same["superiority"] == 0.5 and same["p"] == pytest.approx(1)


# Words alone


NAMES = ["sad", "afraid", "calm"]  # not in alphabetical order
TELLING = {"sad": "funeral", "afraid": "wolf", "calm": "lake"}


def written(topics: list[str], telling: bool = True) -> pd.DataFrame:
    rows = [
        (topic, name, f"The {topic} and the {TELLING[name] if telling else 'day'}.")
        for topic in topics
        for name in NAMES
    ]
    return pd.DataFrame(rows, columns=["topic", "emotion", "text"])


def test_words_that_tell_are_read_on_unseen_topics():
    scores = bag_of_words(written(["river", "door", "lamp"]), written(["garden", "bread"]), NAMES)
    assert scores.shape == (1, 2, 3, 3)
    assert accuracy(scores).item() == one_against_rest(scores).mean() == pairwise_separation(scores).item() == 1
    there = bag_of_words(written(["river", "door", "lamp"]), written(["garden", "bread"]), sorted(NAMES))
    assert not torch.equal(there, scores)


def test_words_that_tell_nothing_give_exactly_chance():
    scores = bag_of_words(written(["river", "door"], telling=False), written(["garden", "bread"], telling=False), NAMES)
    assert (one_against_rest(scores) == 0.5).all() and pairwise_separation(scores).item() == 0.5


def test_words_are_fitted_on_the_train_texts_alone():
    """Words that only test texts have tell nothing."""
    scores = bag_of_words(written(["river", "door"], telling=False), written(["river", "door"]), NAMES)
    assert (one_against_rest(scores) == 0.5).all()


def test_a_design_picks_test_topics_of_the_words_reader(generator):
    train, test = written(["river", "door", "lamp"]), written(["garden", "bread", "lamp", "river"])
    design = bootstrapped(3, 4, 3, generator, 10)
    once, found = bag_of_words(train, test, NAMES), bag_of_words(train, test, NAMES, design)
    assert found.shape == (11, 4, 3, 3) and torch.equal(found[0], once[0])
    assert torch.equal(found, once[0][design.picks])


# The choice of read-out and depth


def test_the_planted_way_and_depth_come_first(generator):
    """Texts of another way fit vectors as well, and are read where their key says."""
    strengths = {"last token": [0.0, 1.0, 2.0], "mean": [0.0, 6.0, 0.5]}
    worlds = {name: world(generator, each, TRAIN, TRAIN) for name, each in strengths.items()}
    validation = {position: both[1] for position, both in worlds.items()}
    noise = torch.randn(TRAIN, EMOTIONS, 3, D_MODEL, generator=generator)
    train = {("situations", name, name): both[0] for name, both in worlds.items()}
    train |= {("stories", "tokens from 50", "mean"): worlds["mean"][0] + noise}
    found = chosen(train, validation)
    keys = ["way", "read-out", "texts at"]
    assert found.columns.tolist() == [*keys, "depth", "AUROC"] and len(found) == 9
    assert found.loc[0, [*keys, "depth"]].tolist() == ["situations", "mean", "mean", 1] and found.AUROC[0] > 0.95
    assert found.AUROC.is_monotonic_decreasing and found.index.tolist() == list(range(9))
    for row in found.to_dict("records"):
        depth, unseen = row["depth"], validation[row["texts at"]]
        vectors = centred(means(train[tuple(row[key] for key in keys)][:, :, depth], own(TRAIN, EMOTIONS)))[0]
        along = (unseen[:, :, depth] @ torch.nn.functional.normalize(vectors, dim=-1).T).flatten(0, 1)
        expected = [roc_auc_score(np.tile(np.eye(EMOTIONS)[k], TRAIN), along[:, k]) for k in range(EMOTIONS)]
        assert row["AUROC"] == pytest.approx(np.mean(expected), abs=1e-4)


def test_of_equals_the_first_named_way_and_depth_is_chosen(generator):
    train, validation = (acts.repeat(1, 1, 2, 1) for acts in world(generator, [3.0], TRAIN, TRAIN))
    found = chosen({("b", "x", "last"): train, ("a", "x", "last"): train}, {"last": validation})
    assert list(zip(found.way, found.depth)) == [("b", 0), ("b", 1), ("a", 0), ("a", 1)]
