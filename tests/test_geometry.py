"""Valence and arousal planted in random activations come back; shuffled labels and noise give what chance gives."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity
from torch import Generator, Tensor

from helpers.emotions import names, norms
from helpers.geometry import (
    anisotropy,
    centred,
    clustered,
    components,
    cosine_curves,
    cosine_matrix,
    geometries,
    mean_pairwise_cosine,
    means,
    neighbours,
    off_diagonal_mean,
    ordered,
    own,
    pairs_of,
    pearson,
    placed,
    principal_components,
    quadratic,
    rated,
    resampled,
    shuffled,
    similarity_of_geometries,
    towards,
    without,
)
from helpers.stats import bootstrap_picks

HUMAN = torch.tensor(norms()[["valence", "arousal"]].to_numpy()).float()  # of 24 emotions, nearly uncorrelated
TOPICS, EMOTIONS = 40, len(HUMAN)
DRAWS = {
    "own": lambda topics, emotions, seed: own(topics, emotions),
    "resampled": lambda topics, emotions, seed: resampled(topics, emotions, seeded(seed), 20),
    "shuffled": lambda topics, emotions, seed: shuffled(topics, emotions, seeded(seed), 20),
}
EVERY_KIND = pytest.mark.parametrize("kind", DRAWS)
SEEDS = st.integers(0, 10_000)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def affective(generator: Generator, topics: int = TOPICS, d_model: int = 64) -> Tensor:
    """Topic x emotion x d_model: valence along one random direction, arousal along another, topic offsets, noise."""
    plane = torch.linalg.qr(torch.randn(d_model, 2, generator=generator)).Q.T
    offset = 5 * torch.randn(topics, 1, d_model, generator=generator)
    return offset + HUMAN @ plane + torch.randn(topics, EMOTIONS, d_model, generator=generator)


def cosines(acts: Tensor, draws: Tensor) -> Tensor:
    return pairs_of(cosine_matrix(centred(means(acts, draws))))


# Planted valence and arousal


def test_the_first_two_components_are_the_planted_valence_and_arousal(generator):
    scores, shares = components(centred(means(affective(generator), own(TOPICS, EMOTIONS)))[0])
    found = towards(scores, HUMAN)
    r = pearson(found.T[:, None], HUMAN.T[None])
    assert found.shape == HUMAN.shape
    assert (r.diagonal() > 0.97).all() and abs(r[0, 1]) < 0.2 and abs(r[1, 0]) < 0.2
    assert torch.allclose(found.std(0), HUMAN.std(0), rtol=0.1)  # units of the residual stream
    assert (shares.diff() <= 1e-6).all() and shares.sum().item() == pytest.approx(1)
    assert shares[0] > 2 * shares[1] > 4 * shares[2] and shares[:2].sum() > 0.7


def test_planted_components_are_found_in_every_resampled_draw_and_in_no_shuffled_one(generator):
    acts = affective(generator)
    r = {}
    for kind, draws in DRAWS.items():
        scores, _ = components(centred(means(acts, draws(TOPICS, EMOTIONS, 1))))
        r[kind] = pearson(towards(scores, HUMAN).mT, HUMAN.T)
    assert r["resampled"].shape == (20, 2) and r["resampled"].min() > 0.9
    assert r["shuffled"].min() >= 0 and r["shuffled"].mean() < 0.4


def test_components_are_scikit_learns_pca(generator):
    vectors = torch.randn(3, 8, 20, generator=generator) * torch.linspace(3, 0.5, 20)
    scores, shares = components(vectors)
    for draw in range(3):
        expected = PCA().fit(vectors[draw].double())
        assert np.allclose(scores[draw].abs(), np.abs(expected.transform(vectors[draw].double())), atol=2e-3)
        assert np.allclose(shares[draw], expected.explained_variance_ratio_, atol=1e-6)


def test_towards_turns_each_component_the_way_of_its_rating():
    human = torch.tensor([[1.0, 5], [2, 5], [3, 8]])
    up, down = torch.tensor([-11.0, -10, -9]), torch.tensor([1.0, 1, -2])  # wherever their mean lies
    scores = torch.stack([-up, down, torch.tensor([7.0, 8, 9])], -1)
    expected = torch.stack([up, -down], -1)
    assert torch.equal(towards(scores, human), expected)
    assert torch.equal(towards(torch.stack([scores, -scores]), human), torch.stack([expected, expected]))


def test_towards_leaves_a_component_that_goes_with_nothing():
    scores = torch.tensor([[1.0], [-2], [1]])
    assert torch.equal(towards(scores, torch.tensor([[1.0], [2], [3]])), scores)


def test_emotions_are_placed_by_valence_and_arousal_and_a_vector_of_ones_own_beside_its_like(generator):
    """A copy of an emotion's vector, half of it, and what no component holds lie where they belong, without valence."""
    vectors = centred(means(affective(generator), own(TOPICS, EMOTIONS)))[0]
    apart = torch.linalg.svd(vectors).Vh[-1]
    found = placed(vectors, norms(), {"copy": vectors[3], "half": vectors[3] / 2, "nowhere": 9 * apart})
    assert found.columns.tolist() == ["emotion", "x", "y", "valence", "xlabel", "ylabel"]
    assert found.emotion.tolist() == [*names(), "copy", "half", "nowhere"]
    assert found.valence[:EMOTIONS].tolist() == norms().valence.tolist() and found.valence[EMOTIONS:].isna().all()
    where = torch.tensor(found[["x", "y"]].to_numpy(dtype="float32"))
    assert (pearson(where[:EMOTIONS].T, HUMAN.T) > 0.97).all()
    assert torch.allclose(where[EMOTIONS:], torch.stack([where[3], where[3] / 2, torch.zeros(2)]), atol=1e-3)
    shares = components(vectors)[1]
    assert set(found.xlabel) == {f"PC1 ({shares[0]:.0%} of variance)"}
    assert set(found.ylabel) == {f"PC2 ({shares[1]:.0%} of variance)"}
    pd.testing.assert_frame_equal(placed(vectors, norms()), found[:EMOTIONS], check_dtype=False)


def test_planted_ratings_go_with_their_component_alone_whatever_its_sign(generator):
    vectors = centred(means(affective(generator), own(TOPICS, EMOTIONS)))[0]
    ratings = pd.DataFrame({"valence": HUMAN[:, 0], "arousal": HUMAN[:, 1], "minus valence": -HUMAN[:, 0]})
    found = rated(vectors, ratings, 3, generator).set_index(["component", "rating"])
    assert found.columns.tolist() == ["share", "r", "low", "high", "null", "p"] and len(found) == 9
    assert found.share.groupby("component").first().tolist() == pytest.approx(components(vectors)[1][:3].tolist())
    hits = [(1, "valence"), (1, "minus valence"), (2, "arousal")]
    assert found.p[hits].tolist() == pytest.approx([1 / 1001] * 3) and found.r[hits].min() > 0.97
    assert found.p.drop(hits).min() > 0.05 and (found.r.drop(hits) < found.null.drop(hits)).all()
    assert ((found.low < found.r) & (found.r < found.high)).all() and found.low[hits].min() > 0.9
    assert found.r[1, "minus valence"] == pytest.approx(found.r[1, "valence"])


def test_the_null_of_ratings_is_the_usual_critical_value_and_its_p_is_even(generator):
    """Of 24 emotions, 95 % of random |r| lie below 0.404 (two-sided t test with 22 degrees of freedom)."""
    noise = pd.DataFrame(torch.randn(EMOTIONS, 100, generator=generator).numpy())
    found = rated(torch.randn(EMOTIONS, 40, generator=generator), noise, 1, generator)
    assert found.null.mean() == pytest.approx(0.404, abs=0.01)
    assert 0.4 < found.p.mean() < 0.6 and (found.p < 0.1).mean() < 0.2


def test_zero_vectors_go_with_no_rating(generator):
    found = rated(torch.zeros(EMOTIONS, 8), norms()[["valence"]], 1, generator)
    assert found.r.tolist() == [0] and found.p.tolist() == [1]


def test_two_samples_have_the_same_geometry_in_unrelated_directions_and_shuffled_labels_do_not(generator):
    one, other = affective(generator), affective(generator)
    alike = similarity_of_geometries(*(cosines(acts, own(TOPICS, EMOTIONS)) for acts in (one, other)))
    assert alike.item() > 0.9
    null = [cosines(acts, shuffled(TOPICS, EMOTIONS, generator, 30))[:, None] for acts in (one, other)]
    unlike = similarity_of_geometries(*null)
    assert unlike.shape == (30, 1, 1)
    assert unlike.abs().max() < 0.4 and abs(unlike.mean()) < 0.1


def test_similarity_of_geometries_correlates_every_depth_with_every_other(generator):
    a, b = torch.randn(2, 5, 3, 10, generator=generator)
    found = similarity_of_geometries(a, b)
    expected = [[[scipy.stats.pearsonr(x, y).statistic for y in b[n]] for x in a[n]] for n in range(5)]
    assert np.allclose(found, expected, atol=1e-5)


def test_off_diagonal_mean_by_hand():
    matrix = torch.tensor([[9.0, 1, 2], [3, 9, 4], [5, 6, 9]])
    assert off_diagonal_mean(matrix) == 3.5
    assert off_diagonal_mean(torch.stack([matrix, -matrix])).tolist() == [3.5, -3.5]


def test_geometries_and_cosine_curves_are_those_of_each_depth(generator):
    """All three kinds of vector, with a neutral mean that takes away what all texts share and another that does not."""
    acts, neutral = torch.randn(6, 5, 3, 50, generator=generator), torch.randn(4, 3, 50, generator=generator)
    acts += torch.tensor([0.0, 3, 3])[:, None]
    neutral[:, 1] += 3
    draws = torch.cat([own(6, 5), resampled(6, 5, generator, 2)])
    every, curves = geometries(acts, draws), cosine_curves(acts, neutral, draws)
    assert every.shape == (3, 3, 10) and set(curves) == {"raw", "minus neutral", "centred"}
    for depth in range(3):
        raw, zero = means(acts[:, :, depth], draws), neutral[:, depth].mean(0)
        kinds = {"raw": raw, "minus neutral": raw - zero, "centred": centred(raw)}
        assert torch.allclose(every[:, depth], pairs_of(cosine_matrix(kinds["centred"])), atol=1e-6)
        for name, vectors in kinds.items():
            assert torch.allclose(curves[name][:, depth], mean_pairwise_cosine(vectors), atol=1e-6)
    assert (curves["raw"][:, 1:] > 0.9).all() and (curves["minus neutral"][:, 1] < 0.8).all()
    assert (curves["minus neutral"][:, 2] > 0.9).all() and torch.allclose(
        curves["centred"], torch.tensor(-0.25), atol=0.1
    )


# Draws


@EVERY_KIND
def test_the_weights_of_every_emotion_add_up_to_one(kind):
    weights = DRAWS[kind](7, 4, 0)
    assert weights.shape == (1 if kind == "own" else 20, 4, 7 * 4)
    assert (weights >= 0).all() and torch.allclose(weights.sum(-1), torch.tensor(1.0))


def test_own_texts_give_the_plain_mean_over_topics(generator):
    acts = torch.randn(7, 4, 8, generator=generator)
    assert torch.allclose(means(acts, own(7, 4)), acts.mean(0)[None], atol=1e-6)


def test_resampled_draws_take_the_same_topics_for_every_emotion(generator):
    acts = torch.randn(7, 4, 8, generator=generator)
    picks = bootstrap_picks(20, 7, seeded(3))
    assert torch.allclose(means(acts, resampled(7, 4, seeded(3), 20)), acts[picks].mean(1), atol=1e-6)
    assert resampled(7, 4, generator, 20).unique(dim=0).shape[0] > 15


def test_shuffled_draws_deal_each_text_of_a_topic_to_exactly_one_emotion(generator):
    dealt = (shuffled(7, 4, generator, 600) * 7).unflatten(-1, (7, 4)).transpose(1, 2)  # draw, topic, emotion, text
    assert set(dealt.unique().tolist()) == {0, 1}
    assert (dealt.sum(-1) == 1).all() and (dealt.sum(-2) == 1).all()
    assert torch.allclose(dealt.mean(0), torch.tensor(0.25), atol=0.08)  # every text goes to every emotion as often
    assert (dealt == dealt[:, :1]).flatten(1).all(-1).float().mean() < 0.05  # topics are dealt out one by one


@EVERY_KIND
@given(seed=SEEDS, scale=st.floats(0, 100))
@settings(max_examples=20, deadline=None)
def test_what_a_topic_has_in_common_cancels(kind, seed, scale):
    generator, draws = seeded(seed), DRAWS[kind](5, 4, seed)
    acts, offset = torch.randn(5, 4, 8, generator=generator), torch.randn(5, 1, 8, generator=generator)
    plain, moved = (centred(means(here, draws)) for here in (acts, acts + scale * offset))
    assert torch.allclose(plain, moved, atol=1e-4)


# Vectors and their cosines


def test_centred_vectors_add_up_to_zero_and_drop_what_all_share(generator):
    raw = torch.randn(3, 6, 8, generator=generator)
    assert torch.allclose(centred(raw).sum(-2), torch.zeros(3, 8), atol=1e-5)
    assert torch.allclose(centred(raw + 10 * torch.randn(8, generator=generator)), centred(raw), atol=1e-4)
    gaps, kept = (vectors[:, :, None] - vectors[:, None] for vectors in (raw, centred(raw)))
    assert torch.allclose(gaps, kept, atol=1e-5)


@pytest.mark.parametrize("emotions", [2, 3, 8, 24])
def test_centred_vectors_of_pure_noise_have_a_mean_cosine_of_minus_one_over_one_less_than_their_number(
    generator, emotions
):
    noise = torch.randn(10, emotions, 400, generator=generator)
    found = mean_pairwise_cosine(centred(means(noise, own(10, emotions))))
    assert found.item() == pytest.approx(-1 / (emotions - 1), abs=0.01)
    assert mean_pairwise_cosine(centred(torch.eye(emotions))).item() == pytest.approx(-1 / (emotions - 1), abs=1e-6)


def test_a_common_offset_makes_raw_vectors_alike_and_leaves_centred_ones(generator):
    offset, noise = torch.zeros(400), torch.randn(10, 8, 400, generator=generator)
    offset[0] = 20  # squared length 400; the noise of a mean over ten texts has 40
    raw = means(noise + offset, own(10, 8))
    assert mean_pairwise_cosine(raw).item() == pytest.approx(400 / 440, abs=0.02)
    assert mean_pairwise_cosine(centred(raw)).item() == pytest.approx(-1 / 7, abs=0.02)


def test_cosines_are_scikit_learns_in_every_draw(generator):
    vectors = torch.randn(3, 6, 8, generator=generator)
    assert np.allclose(cosine_matrix(vectors), [cosine_similarity(each) for each in vectors], atol=1e-6)


@given(seed=SEEDS, scales=st.lists(st.floats(1e-4, 1e4), min_size=5, max_size=5))
@settings(max_examples=40, deadline=None)
def test_cosines_do_not_depend_on_the_vectors_lengths(seed, scales):
    vectors = torch.randn(5, 8, generator=seeded(seed))
    scaled = vectors * torch.tensor(scales)[:, None]
    assert torch.allclose(cosine_matrix(scaled), cosine_matrix(vectors), atol=1e-5)


def test_pairs_come_row_after_row():
    matrix = torch.arange(16.0).view(4, 4)
    assert pairs_of(matrix).tolist() == [1, 2, 3, 6, 7, 11]
    assert pairs_of(torch.stack([matrix, matrix.T]))[1].tolist() == [4, 8, 12, 9, 13, 14]


def test_a_zero_vector_has_a_cosine_of_0_with_everything():
    vectors = torch.tensor([[0.0, 0], [3, 0], [3, 3]])
    assert torch.allclose(cosine_matrix(vectors), torch.tensor([[0, 0, 0], [0, 1, 0.5**0.5], [0, 0.5**0.5, 1]]))
    assert mean_pairwise_cosine(torch.zeros(4, 8)) == 0


@EVERY_KIND
@pytest.mark.parametrize("topics", [5, 12, 40])
def test_texts_that_are_all_alike_have_cosines_of_0(generator, kind, topics):
    """As at depth 0 of a model without positions in its embedding, where every text ends in the same token."""
    alike = (10 * torch.randn(64, generator=generator)).expand(topics, EMOTIONS, 64).contiguous()
    assert (cosine_matrix(centred(means(alike, DRAWS[kind](topics, EMOTIONS, 0)))) == 0).all()


@pytest.mark.parametrize("topics", [5, 12, 40])
def test_neutral_texts_that_are_like_all_others_leave_cosines_of_0(generator, topics):
    alike = 10 * torch.randn(1, 64, generator=generator)
    acts, neutral = alike.repeat(topics, EMOTIONS, 1, 1), alike.repeat(2 * topics, 1, 1)
    curves = cosine_curves(acts, neutral, resampled(topics, EMOTIONS, generator, 20))
    assert (curves["minus neutral"] == 0).all() and (curves["centred"] == 0).all()
    assert torch.allclose(curves["raw"], torch.tensor(1.0))


def test_components_of_zero_vectors_are_zero():
    scores, shares = components(torch.zeros(2, 4, 8))
    assert (scores == 0).all() and (shares == 0).all()


# What is common to all texts


def anisotropy_by_hand(acts: Tensor) -> float:
    """Pair by pair."""
    topics, emotions = acts.shape[:2]
    texts = [(t, e) for t in range(topics) for e in range(emotions)]
    apart = [(a, b) for a in texts for b in texts if a[0] != b[0] and a[1] != b[1]]
    return np.mean([cosine_similarity(acts[a][None], acts[b][None]).item() for a, b in apart])


def test_anisotropy_recovers_a_planted_common_offset(generator):
    acts = torch.randn(20, 10, 400, generator=generator)
    acts[..., 0] += 30  # squared length 900; the noise of one text has 400
    assert anisotropy(acts) == pytest.approx(900 / 1300, abs=0.02)


def test_anisotropy_is_not_what_texts_of_one_topic_or_emotion_share(generator):
    topic, emotion = torch.randn(30, 1, 400, generator=generator), torch.randn(1, 20, 400, generator=generator)
    acts = torch.randn(30, 20, 400, generator=generator) + 5 * topic + 5 * emotion
    assert abs(anisotropy(acts)) < 0.01


def test_anisotropy_agrees_with_pair_by_pair(generator):
    acts = torch.randn(3, 4, 5, generator=generator) + 1
    acts[0, 0] = 0
    assert anisotropy(acts) == pytest.approx(anisotropy_by_hand(acts), abs=1e-5)


# Components taken out


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99, 1])
@pytest.mark.parametrize("rows", [8, 50])
def test_the_fewest_components_hold_the_share(generator, rows, share):
    acts = torch.randn(rows, 20, generator=generator) * torch.linspace(3, 0.1, 20) + 7
    found = principal_components(acts, share)
    assert torch.allclose(found @ found.T, torch.eye(len(found)), atol=1e-5)
    centre = acts - acts.mean(0)
    held = [(centre @ found[:count].T).pow(2).sum() / centre.pow(2).sum() for count in (len(found) - 1, len(found))]
    assert held[0] < share <= held[1] + 1e-5
    assert len(found) == min(rows - 1, 20) if share == 1 else len(found) == PCA(share).fit(acts).n_components_


@pytest.mark.parametrize("bad", [-0.01, 1.01, float("nan")])
def test_a_share_outside_of_0_to_1_is_refused(generator, bad):
    with pytest.raises(ValueError, match=f"a share of variance lies between 0 and 1, got {bad}"):
        principal_components(torch.randn(5, 4, generator=generator), bad)


def test_rows_that_are_all_alike_have_no_component():
    assert principal_components(torch.zeros(6, 8), 0.5).shape == (0, 8)


def test_planted_components_are_found_and_taken_out(generator):
    """Neutral texts vary along two directions, and a vector loses what it has along them and nothing else."""
    planted = torch.linalg.qr(torch.randn(20, 3, generator=generator)).Q.T
    noise = 0.1 * torch.randn(100, 20, generator=generator)
    neutral = torch.randn(100, 2, generator=generator) @ (planted[:2] * torch.tensor([[8.0], [5]])) + noise
    found = principal_components(neutral, 0.98)
    assert found.shape == (2, 20) and (found @ planted[:2].T).diagonal().abs().min() > 0.99
    kept = without(planted[None] + torch.zeros(4, 1, 1), found)
    assert kept.shape == (4, 3, 20) and (kept @ found.T).abs().max() < 1e-5
    assert kept[:, :2].norm(dim=-1).max() < 0.1 and torch.allclose(kept[:, 2], planted[2], atol=0.1)
    assert torch.allclose(without(kept, found), kept, atol=1e-6)


def test_a_share_of_0_takes_nothing_out(generator):
    none, vectors = principal_components(torch.randn(9, 8, generator=generator), 0), torch.randn(4, 8)
    assert none.shape == (0, 8) and torch.equal(without(vectors, none), vectors)


# A curve over depth

DEPTH = torch.arange(13.0)


@pytest.mark.parametrize(("bend", "lowest"), [(0.3, 4), (2, 8.5), (0.01, 0), (1e-4, 6)])
def test_a_planted_parabola_and_its_minimum_come_back(bend, lowest):
    fit, found = quadratic(DEPTH, (bend * (DEPTH - lowest) ** 2 - 0.5)[None])
    assert fit[0].tolist() == pytest.approx([bend, -2 * bend * lowest, bend * lowest**2 - 0.5], rel=1e-3, abs=1e-6)
    assert found.item() == pytest.approx(lowest, abs=2e-3)


@pytest.mark.parametrize(
    ("curve", "lowest"),
    [
        ((DEPTH + 5) ** 2, 0),  # lowest before the first depth
        ((DEPTH - 30) ** 2, 12),  # lowest after the last
        (-((DEPTH - 4) ** 2), 12),  # downwards: the end farther away
        (-((DEPTH - 9) ** 2), 0),
        (3 * DEPTH, 0),
        (-3 * DEPTH, 12),
    ],
)
def test_the_lowest_point_lies_within_the_depths(curve, lowest):
    assert quadratic(DEPTH, curve[None])[1].item() == pytest.approx(lowest, abs=1e-3)
    assert quadratic(DEPTH + 3, curve[None])[1].item() == pytest.approx(lowest + 3, abs=1e-3)


@pytest.mark.parametrize("level", [0.0, 0.5, -0.1])
def test_a_flat_curve_is_lowest_somewhere(level):
    fit, lowest = quadratic(DEPTH, torch.full((1, 13), level))
    assert fit[0].tolist() == pytest.approx([0, 0, level], abs=1e-6) and 0 <= lowest.item() <= 12


def test_many_curves_are_fitted_as_one_by_one_and_as_numpy_does(generator):
    curves = torch.randn(50, 13, generator=generator)
    fit, lowest = quadratic(DEPTH, curves)
    for draw in range(50):
        one_fit, one_lowest = quadratic(DEPTH, curves[[draw]])
        assert torch.allclose(fit[[draw]], one_fit, atol=1e-5) and torch.allclose(lowest[[draw]], one_lowest, atol=1e-4)
    fitted, grid = np.polyfit(DEPTH, curves.T, 2), np.linspace(0, 12, 12_001)
    assert np.allclose(fit, fitted.T, atol=1e-5)
    assert np.allclose(lowest, [grid[np.polyval(each, grid).argmin()] for each in fitted.T], atol=2e-3)
    assert (fit[:, 0] < 0).any() and (fit[:, 0] > 0).any()


# Order and correlation


def test_planted_groups_stand_together(generator):
    group = torch.arange(24) % 4
    vectors = 3 * torch.randn(4, 32, generator=generator)[group] + torch.randn(24, 32, generator=generator)
    order = clustered(cosine_matrix(vectors))
    assert sorted(order) == list(range(24))
    assert len(group[order].unique_consecutive()) == 4


def test_what_lies_on_a_line_stands_in_its_order(generator):
    angle = torch.linspace(0, 2.5, 16)[torch.randperm(16, generator=generator)]
    found = angle[clustered(cosine_matrix(torch.stack([angle.cos(), angle.sin()], -1)))]
    assert torch.equal(found, angle.sort().values) or torch.equal(found, angle.sort(descending=True).values)


def test_a_zero_vector_has_a_place_in_the_order():
    vectors = torch.tensor([[1.0, 0], [0, 0], [1, 0.1]])
    order = clustered(cosine_matrix(vectors))
    assert sorted(order) == [0, 1, 2] and order[1] != 1
    assert sorted(clustered(cosine_matrix(vectors[:2]))) == [0, 1]


def test_ordered_cosines_keep_their_names(generator):
    group = torch.arange(6) % 2
    vectors = 3 * torch.randn(2, 16, generator=generator)[group] + torch.randn(6, 16, generator=generator)
    found = ordered(vectors, list("abcdef"))
    assert found.columns.tolist() == ["emotion", "other", "cosine"] and len(found) == 36
    order = found.emotion.drop_duplicates().tolist()
    assert order == found.other.drop_duplicates().tolist() == ["abcdef"[i] for i in clustered(cosine_matrix(vectors))]
    assert {*order[:3]} in ({*"ace"}, {*"bdf"})
    table = found.pivot(index="emotion", columns="other", values="cosine").loc[list("abcdef"), list("abcdef")]
    assert np.allclose(table, cosine_similarity(vectors), atol=1e-6)


def test_the_nearest_emotion_comes_first(generator):
    vectors = torch.randn(4, 16, generator=generator)
    found = neighbours(vectors, 3 * vectors[2] - vectors[1] / 2, list("abcd"))
    assert found.columns.tolist() == ["emotion", "cosine"] and found.cosine.is_monotonic_decreasing
    expected = cosine_similarity(vectors, (3 * vectors[2] - vectors[1] / 2)[None])[:, 0]
    assert found.emotion[0] == "c" and found.emotion.tolist() == ["abcd"[i] for i in (-expected).argsort()]
    assert found.cosine.tolist() == pytest.approx(sorted(expected, reverse=True), abs=1e-6)


def test_pearson_is_scipys_over_leading_axes(generator):
    x, y = torch.randn(4, 1, 9, generator=generator), torch.randn(3, 9, generator=generator)
    expected = [[scipy.stats.pearsonr(x[i, 0], y[j]).statistic for j in range(3)] for i in range(4)]
    assert np.allclose(pearson(x, y), expected, atol=1e-6)
    assert pearson(x[0, 0], y[0]).item() == pytest.approx(expected[0][0], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pearson_is_0_where_one_side_does_not_vary(generator, dtype):
    varies, same = torch.randn(6, 11, generator=generator, dtype=dtype), torch.full((11,), 0.1, dtype=dtype)
    assert (pearson(varies, same) == 0).all() and (pearson(same, varies) == 0).all() and pearson(same, same) == 0


@given(seed=SEEDS, slope=st.floats(0.01, 100), level=st.floats(-100, 100))
@settings(max_examples=40, deadline=None)
def test_pearson_does_not_depend_on_units(seed, slope, level):
    x, y = torch.randn(2, 12, generator=seeded(seed))
    r = pearson(x, y).item()
    assert -1 <= r <= 1
    assert pearson(slope * x + level, y).item() == pytest.approx(r, abs=1e-3)
    assert pearson(-slope * x, y).item() == pytest.approx(-r, abs=1e-5)
