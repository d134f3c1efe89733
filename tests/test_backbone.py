"""A planted subspace that tells emotions apart is found, chance is chance, and texts that read alike break nothing."""

from collections.abc import Iterator

import jaxtyping
import numpy as np
import pytest
import torch
from conftest import seeded
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import residuals
from helpers.backbone import (
    WAYS,
    Subspace,
    accuracy,
    chosen,
    distances,
    fitted,
    random,
    separation,
    share_of_variance,
)
from helpers.stats import bootstrap_picks

TOPICS, EMOTIONS, D_MODEL = 40, 4, 24
CORNERS = torch.tensor([[12.0, 5], [12, -5], [-12, 5], [-12, -5]])  # of a plane: further apart along the first axis
KINDS = ["random, isotropic", "random, covariance-matched"]
EVERY_WAY = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the type checks of the tests, as in a notebook."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def noise(generator: Generator, topics: int = TOPICS, emotions: int = EMOTIONS) -> Tensor:
    return torch.randn(topics, emotions, D_MODEL, generator=generator)


def axes(generator: Generator) -> Tensor:
    """Orthonormal rows."""
    return torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=generator)).Q.T


def planted(generator: Generator, plane: Tensor, topics: int = TOPICS) -> Tensor:
    """Four emotions at the corners of a rectangle in the plane, far from the origin, with topics of their own."""
    return 3 + CORNERS @ plane + noise(generator, topics, 1) + noise(generator, topics)


def loud(generator: Generator, rows: Tensor, topics: int = TOPICS) -> Tensor:
    """Three emotions whose means differ most along the first row, which is noise, and clearly along the second."""
    means = torch.tensor([[3.0, 2], [-6, 0], [3, -2]]) @ rows[:2]
    along = 15 * torch.randn(topics, 3, 1, generator=generator) * rows[0]
    return means + along + 0.3 * noise(generator, topics, 3)


def alike(topics: int = 10, emotions: int = EMOTIONS, size: float = 1.0) -> Tensor:
    """The same activation for every text, whose mean is not exactly itself in floating point."""
    return (size * torch.randn(D_MODEL, generator=seeded(5))).expand(topics, emotions, D_MODEL).contiguous()


def smallest_cosine(basis: Tensor, other: Tensor) -> float:
    """The cosine of the largest principal angle between two subspaces with orthonormal rows."""
    return torch.linalg.svdvals(basis @ other.T).min().item()


def is_orthonormal(basis: Tensor) -> bool:
    return torch.allclose(basis @ basis.mT, torch.eye(basis.shape[-2]), atol=1e-5)


# A planted subspace


@EVERY_WAY
@pytest.mark.parametrize("seed", range(3))
def test_both_ways_find_a_planted_plane_and_which_of_its_axes_separates_most(way, seed):
    generator = seeded(seed)
    plane = axes(generator)[:2]
    found = fitted(planted(generator, plane), way, 2)
    assert found.basis.shape == (2, D_MODEL)
    assert smallest_cosine(found.basis, plane) > 0.97
    assert smallest_cosine(found.basis[:1], plane[:1]) > 0.97
    assert smallest_cosine(found.basis, axes(generator)[:2]) < 0.8  # another plane is not it


@EVERY_WAY
def test_the_means_in_the_subspace_are_the_planted_corners_around_the_centre(generator, way):
    plane = axes(generator)[:2]
    found = fitted(planted(generator, plane), way, 2)
    apart = torch.cdist(found.means, found.means)
    assert torch.allclose(apart, torch.cdist(CORNERS, CORNERS), atol=1.5)
    assert torch.allclose(found.means.mean(0), torch.zeros(2), atol=1e-4)


@EVERY_WAY
@pytest.mark.parametrize("size", [1, 2, 3])
def test_bases_are_orthonormal_and_a_smaller_one_begins_a_larger(generator, way, size):
    acts = planted(generator, axes(generator)[:2])
    found, largest = fitted(acts, way, size), fitted(acts, way, 3)
    assert found.basis.shape == (size, D_MODEL) and found.means.shape == (EMOTIONS, size)
    assert is_orthonormal(found.basis)
    overlap = (found.basis @ largest.basis[:size].T).abs()
    assert torch.allclose(overlap, torch.eye(size), atol=1e-3)


def test_means_gives_the_principal_components_of_scikit_learn(generator):
    acts = planted(generator, axes(generator)[:2])
    expected = torch.from_numpy(PCA(3).fit(acts.mean(0).double().numpy()).components_).float()
    assert torch.allclose((fitted(acts, "means", 3).basis @ expected.T).abs(), torch.eye(3), atol=1e-3)


def test_discriminants_beat_means_where_the_emotions_differ_most_along_a_direction_of_noise(generator):
    rows = axes(generator)
    train, test = loud(generator, rows), loud(generator, rows)
    found = {way: fitted(train, way, 1) for way in WAYS}
    assert abs(found["means"].basis[0] @ rows[0]) > 0.9
    noisy, quiet = (abs(found["discriminants"].basis[0] @ row) for row in rows[:2])
    assert quiet > 0.5 > 0.05 > noisy
    assert accuracy(found["discriminants"], test) > 0.95 > 0.6 > accuracy(found["means"], test)
    assert separation(found["discriminants"], test) > 0.95 > 0.75 > separation(found["means"], test)


def test_discriminants_take_what_topics_have_of_their_own_for_noise(generator):
    """An offset that all emotions of a topic share hides the axis along which their means differ most."""
    rows = axes(generator)
    means = torch.tensor([[3.0, 2], [-6, 0], [3, -2]]) @ rows[:2]
    acts = means + 15 * torch.randn(TOPICS, 1, 1, generator=generator) * rows[0] + 0.3 * noise(generator, TOPICS, 3)
    noisy, quiet = (abs(fitted(acts, "discriminants", 1).basis[0] @ row) for row in rows[:2])
    assert quiet > 0.5 > 0.05 > noisy


@EVERY_WAY
def test_scores_are_the_same_wherever_the_stream_lies_and_in_whatever_units(generator, way):
    plane = axes(generator)[:2] / 4
    train, test = planted(generator, plane), planted(generator, plane)
    found = fitted(train, way, 2)
    assert 0.5 < accuracy(found, test) < 0.95  # where a difference would show
    for moved in (lambda acts: acts + 20, lambda acts: acts * 64, lambda acts: acts / 512):
        again = fitted(moved(train), way, 2)
        assert accuracy(again, moved(test)).item() == pytest.approx(accuracy(found, test).item(), abs=0.01)
        assert separation(again, moved(test)) == pytest.approx(separation(found, test), abs=1e-3)
        shares = [share_of_variance(*each).item() for each in ((again, moved(test)), (found, test))]
        assert shares[0] == pytest.approx(shares[1], rel=1e-3)


def test_means_and_their_scores_turn_with_the_stream(generator):
    plane, turned = axes(generator)[:2] / 4, axes(generator)
    train, test = planted(generator, plane), planted(generator, plane)
    found, again = fitted(train, "means", 2), fitted(train @ turned, "means", 2)
    assert smallest_cosine(found.basis @ turned, again.basis) > 0.999
    assert separation(again, test @ turned) == pytest.approx(separation(found, test), abs=1e-3)


# What it is worth


def test_places_distances_and_scores_by_hand():
    basis, centre = torch.eye(3)[:1], torch.tensor([10.0, 0, 0])
    subspace = Subspace(basis, centre, torch.tensor([[-1.0], [3]]))
    acts = torch.tensor([[[8.0, 5, 5], [14, 5, 5]], [[12, 0, 7], [13, 0, 0]]])
    assert subspace.places(acts).squeeze(-1).tolist() == [[-2, 4], [2, 3]]
    assert distances(subspace, acts).tolist() == [[[1, 5], [5, 1]], [[3, 1], [4, 0]]]
    assert accuracy(subspace, acts) == 0.75
    assert accuracy(subspace, acts, torch.tensor([[0, 0], [0, 1], [1, 1]])).tolist() == [1, 0.75, 0.5]
    # 1 and 3 against 5 and 4 from the first mean; 1 and 0 against 5 and 1 from the second: one of four is a tie
    assert separation(subspace, acts) == (1 + 3.5 / 4) / 2
    assert share_of_variance(subspace, acts).item() == pytest.approx(20.75 / 72.5)


def test_distances_are_those_between_projections(generator):
    acts = planted(generator, axes(generator)[:2])
    found = fitted(acts, "discriminants", 3)
    onto = found.basis.T @ found.basis
    expected = torch.cdist((acts @ onto).flatten(0, 1), acts.mean(0) @ onto).view(TOPICS, EMOTIONS, EMOTIONS)
    assert torch.allclose(distances(found, acts), expected, atol=1e-3)


@EVERY_WAY
def test_accuracy_is_one_on_separated_emotions_in_every_resample(generator, way):
    plane = axes(generator)[:2]
    found, test = fitted(planted(generator, plane), way, 2), planted(generator, plane, 17)
    assert accuracy(found, test) == 1 and separation(found, test) > 0.99
    assert accuracy(found, test, bootstrap_picks(20, 17, generator)).tolist() == [1] * 20
    assert accuracy(found, test.roll(1, 1)) == 0  # every text under the next emotion's name


@EVERY_WAY
@pytest.mark.parametrize("size", [1, 3])
def test_accuracy_and_separation_are_chance_on_noise_that_was_not_fitted(generator, way, size):
    found = [fitted(noise(generator), way, size) for _ in range(20)]
    held_out = [(accuracy(each, test).item(), separation(each, test)) for each in found for test in [noise(generator)]]
    assert np.mean(held_out, 0) == pytest.approx([1 / EMOTIONS, 0.5], abs=0.03)


@EVERY_WAY
def test_on_the_noise_that_was_fitted_both_are_above_chance(generator, way):
    acts = noise(generator, 10)
    found = fitted(acts, way, 3)
    assert accuracy(found, acts) > 0.45 and separation(found, acts) > 0.65


@pytest.mark.parametrize("gap", [1 / 16, 1 / 8])
def test_separation_is_scikit_learns_area_under_the_curve(generator, gap):
    plane = axes(generator)[:2] * gap
    found, test = fitted(planted(generator, plane), "means", 2), planted(generator, plane)
    near, own = -distances(found, test), np.tile(np.arange(EMOTIONS), (TOPICS, 1))
    areas = [roc_auc_score((own == i).flatten(), near[..., i].flatten()) for i in range(EMOTIONS)]
    assert separation(found, test) == pytest.approx(np.mean(areas), abs=1e-5)
    assert 0.55 < np.mean(areas) < 0.95


# Share of variance


@EVERY_WAY
def test_share_of_variance_is_numpys(generator, way):
    acts = planted(generator, axes(generator)[:2])
    found = fitted(acts, way, 2)
    rows = noise(generator).flatten(0, 1)  # of other texts, around their own mean
    centred = (rows - rows.mean(0)).double().numpy()
    expected = np.trace(np.cov((centred @ found.basis.T.double().numpy()).T)) / np.trace(np.cov(centred.T))
    assert share_of_variance(found, rows.view(TOPICS, EMOTIONS, -1)).item() == pytest.approx(expected, rel=1e-4)


def test_share_of_variance_is_all_in_the_whole_space_and_that_of_pca_on_the_means(generator):
    acts = planted(generator, axes(generator)[:2])
    whole = Subspace(axes(generator), acts.mean((0, 1)), torch.zeros(EMOTIONS, D_MODEL))
    assert share_of_variance(whole, acts).item() == pytest.approx(1, abs=1e-5)
    only_means = acts.mean(0).expand(5, -1, -1)
    expected = PCA().fit(acts.mean(0).double().numpy()).explained_variance_ratio_.cumsum()
    found = [share_of_variance(fitted(only_means, "means", size), only_means).item() for size in (1, 2, 3)]
    assert found == pytest.approx(expected[:3].tolist(), abs=1e-4)


# Random subspaces


@pytest.mark.parametrize("size", [1, 3])
def test_random_subspaces_are_orthonormal_and_hold_the_means_of_the_emotions(generator, size):
    acts = planted(generator, axes(generator)[:2])
    found = random(acts, size, 20, generator)
    assert list(found) == KINDS
    for each in found.values():
        assert each.basis.shape == (20, size, D_MODEL) and is_orthonormal(each.basis)
        assert torch.equal(each.centre, acts.mean((0, 1)))
        expected = torch.stack([(acts.mean(0) - acts.mean((0, 1))) @ basis.T for basis in each.basis])
        assert torch.allclose(each.means, expected, atol=1e-4)
        cosines = (each.basis[:, 0] @ each.basis[:, 0].T).abs()
        assert cosines.fill_diagonal_(0).max() < 0.9999  # every draw is another


def test_draws_are_scored_as_they_are_one_by_one(generator):
    acts = planted(generator, axes(generator)[:2], 7)
    for each in random(acts, 2, 5, generator).values():
        alone = [Subspace(basis, each.centre, means) for basis, means in zip(each.basis, each.means)]
        assert distances(each, acts).shape == (5, 7, EMOTIONS, EMOTIONS)
        for score in (accuracy, share_of_variance, distances):
            assert torch.allclose(score(each, acts), torch.stack([score(one, acts) for one in alone]), atol=1e-4)


@pytest.mark.parametrize("size", [1, 3])
def test_random_subspaces_have_chance_accuracy_on_noise_and_more_on_emotions_that_differ(generator, size):
    for name, each in random(noise(generator, 200), size, 50, generator).items():
        found = accuracy(each, noise(generator, 200))
        assert found.shape == (50,) and found.mean().item() == pytest.approx(1 / EMOTIONS, abs=0.03), name
    plane = axes(generator)[:2]
    for name, each in random(planted(generator, plane), size, 50, generator).items():
        assert accuracy(each, planted(generator, plane)).mean() > 0.4, name


def test_isotropic_subspaces_hold_their_share_of_dimensions_and_matched_ones_more_where_the_stream_varies(generator):
    acts = noise(generator, 100) * torch.linspace(0.1, 4, D_MODEL) ** 2
    isotropic, matched = (share_of_variance(each, acts) for each in random(acts, 3, 300, generator).values())
    assert isotropic.mean().item() == pytest.approx(3 / D_MODEL, rel=0.1)
    variance = acts.flatten(0, 1).var(0)
    along_one = (variance.square().sum() / variance.sum().square()).item()  # of an unnormalised draw
    assert along_one < 0.15 and matched.mean() > 2 * along_one > isotropic.mean()


def test_random_subspaces_depend_on_the_generator_alone(generator):
    acts = noise(generator)
    first, again, other = (random(acts, 2, 4, seeded(seed)) for seed in (1, 1, 2))
    for name in KINDS:
        assert torch.equal(first[name].basis, again[name].basis)
        assert not torch.allclose(first[name].basis, other[name].basis)


# The choice


def by_depth(*depths: Tensor) -> Tensor:
    return torch.stack(depths, 2)


def test_chosen_finds_the_planted_position_and_depth(generator):
    plane = axes(generator)[:2] / 3

    def texts(topics: int) -> dict[str, Tensor]:
        nothing = [noise(generator, topics) for _ in range(5)]
        return {"here": by_depth(*nothing[:3]), "there": by_depth(*nothing[3:], planted(generator, plane, topics))}

    found = chosen(texts(TOPICS), texts(30))
    assert found.columns.tolist() == ["position", "way", "size", "depth", "separation"]
    assert found.index.tolist() == list(range(2 * 3 * len(WAYS) * 3))
    assert not found.duplicated(["position", "way", "size", "depth"]).any()
    assert set(found["way"]) == set(WAYS) and set(found["size"]) == {1, 2, 3} and set(found["depth"]) == {0, 1, 2}
    assert (found["separation"].diff()[1:] <= 0).all()
    planted_here = (found["position"] == "there") & (found["depth"] == 2)
    assert found["size"][0] > 1 and planted_here[: 2 * len(WAYS)].all()
    assert found["separation"][~planted_here].max() < 0.7 < 0.9 < found["separation"][0]


def test_chosen_tells_what_a_subspace_fitted_on_train_is_worth_on_the_validation_texts(generator):
    plane = axes(generator)[:2] / 4
    train, validation = ({"mean": by_depth(noise(generator, n), planted(generator, plane, n))} for n in (TOPICS, 11))
    for row in chosen(train, validation).itertuples():
        expected = separation(
            fitted(train["mean"][:, :, row.depth], row.way, row.size), validation["mean"][:, :, row.depth]
        )
        assert row.separation == expected


def test_chosen_takes_the_discriminants_where_the_means_lie_along_noise(generator):
    rows = axes(generator)
    found = chosen(*({"mean": loud(generator, rows)[:, :, None]} for _ in range(2)))
    assert found["way"][0] == "discriminants"


def test_chosen_prefers_the_smaller_of_equals(generator):
    """Three emotions on a line, so far apart that every subspace with the line in it separates them perfectly."""
    line = torch.tensor([[-1000.0], [0], [1000]]) * axes(generator)[:1]
    train, validation = ({"mean": by_depth(*(line + noise(generator, 12, 3) for _ in range(2)))} for _ in range(2))
    found = chosen(train, validation)
    assert found["separation"].tolist() == [1] * 8
    assert found["size"].tolist() == [1] * 4 + [2] * 4
    for size in (1, 2):  # among equals of a size, as they come
        rows = found[found["size"] == size]
        assert [*zip(rows["depth"], rows["way"])] == [(depth, way) for depth in (0, 1) for way in WAYS]


# Refusals


@EVERY_WAY
@pytest.mark.parametrize(("emotions", "size"), [(4, 0), (4, 4), (4, 9), (4, -1), (2, 2)])
def test_a_size_that_so_many_emotions_do_not_have_is_refused(generator, way, emotions, size):
    message = f"{emotions} emotions are told apart by 1 to {emotions - 1} components, not {size}"
    with pytest.raises(ValueError, match=message):
        fitted(noise(generator, 10, emotions), way, size)


def test_an_unknown_way_lists_the_known_ones(generator, unchecked):
    with pytest.raises(ValueError, match="unknown way 'mean': choose from means, discriminants"):
        fitted(noise(generator), "mean", 2)


# Texts that read alike


@EVERY_WAY
@pytest.mark.parametrize("size", [0, 1e-3, 1, 1e3])
@pytest.mark.filterwarnings("error")
def test_where_all_texts_read_alike_every_score_is_chance(way, size):
    train, test = alike(10, size=size), alike(7, size=size)
    found = fitted(train, way, 2)
    assert is_orthonormal(found.basis) and not found.means.any() and not distances(found, test).any()
    assert accuracy(found, test) == 1 / EMOTIONS and separation(found, test) == 0.5
    assert share_of_variance(found, test) == 0


@pytest.mark.parametrize("size", [0, 1e-3, 1, 1e3])
@pytest.mark.filterwarnings("error")
def test_where_all_texts_read_alike_random_subspaces_are_there_and_worth_chance(generator, size):
    found = random(alike(size=size), 2, 6, generator)
    assert list(found) == KINDS
    for each in found.values():
        assert is_orthonormal(each.basis) and not each.means.any()
        assert accuracy(each, alike(7, size=size)).tolist() == [1 / EMOTIONS] * 6
        assert share_of_variance(each, alike(7, size=size)).tolist() == [0] * 6
    assert not torch.allclose(found[KINDS[0]].basis, found[KINDS[1]].basis)


@pytest.mark.filterwarnings("error")
def test_chosen_leaves_a_depth_at_which_all_texts_read_alike_behind(generator):
    plane = axes(generator)[:2] / 3
    train, validation = ({"mean": by_depth(alike(n), planted(generator, plane, n))} for n in (TOPICS, 20))
    found = chosen(train, validation)
    assert found["separation"][found["depth"] == 0].tolist() == [0.5] * 6
    assert found["depth"].tolist() == [1] * 6 + [0] * 6


@EVERY_WAY
@pytest.mark.filterwarnings("error")
def test_emotions_whose_own_texts_read_alike_are_told_apart_perfectly(generator, way):
    """Without any variance within emotions there is no ratio to it."""
    acts = noise(generator, 1).expand(10, -1, -1).contiguous()
    found = fitted(acts, way, 3)
    assert is_orthonormal(found.basis)
    assert accuracy(found, acts) == 1 and separation(found, acts) == 1
    assert share_of_variance(found, acts).item() == pytest.approx(1, abs=1e-5)


@EVERY_WAY
@pytest.mark.parametrize("texts", [1, 5])
@pytest.mark.filterwarnings("error")
def test_a_few_texts_that_read_otherwise_give_finite_numbers(generator, way, texts):
    acts = alike(10)
    acts.view(-1, D_MODEL)[torch.randperm(40, generator=generator)[:texts]] *= -1
    found = fitted(acts, way, 3)
    assert is_orthonormal(found.basis)
    assert 0 < accuracy(found, acts) <= 0.5 and 0.3 < separation(found, acts) <= 0.7
    assert 0 <= share_of_variance(found, acts) <= 1 + 1e-5
    for each in random(acts, 3, 4, generator).values():
        assert is_orthonormal(each.basis) and share_of_variance(each, acts).isfinite().all()


@EVERY_WAY
@pytest.mark.parametrize("topics", [2, 3])
@pytest.mark.filterwarnings("error")
def test_as_few_topics_as_two_give_a_subspace(generator, way, topics):
    plane = axes(generator)[:2]
    found = fitted(planted(generator, plane, topics), way, 2)
    assert is_orthonormal(found.basis) and accuracy(found, planted(generator, plane)) > 0.9


def test_every_family_is_read_at_every_depth_and_the_full_stop_of_rotary_models_tells_nothing_at_depth_zero(any_model):
    acts = {split: stops(any_model, names) for split, names in (("train", "Tom Ann Sue"), ("validation", "Ben Eve"))}
    found = chosen(*({"final punctuation": each} for each in acts.values()))
    assert len(found) == acts["train"].shape[2] * len(WAYS) * 2 and found["separation"].between(0, 1).all()
    at_zero = acts["train"][:, :, 0]
    assert at_zero.eq(at_zero[0, 0]).all() == (any_model.cfg.positional_embedding_type == "rotary")
    if any_model.cfg.positional_embedding_type == "rotary":
        assert found["separation"][found["depth"] == 0].tolist() == [0.5] * 4
        assert found["depth"][0] > 0 and found["separation"][0] > 0.6
    for depth in range(acts["train"].shape[2]):
        here = acts["train"][:, :, depth]
        for each in random(here, 2, 3, seeded(0)).values():
            assert is_orthonormal(each.basis) and share_of_variance(each, here).isfinite().all()


def stops(model: TransformerBridge, names: str) -> Tensor:
    """Name x emotion x depth x d_model: the final full stop of short sentences of different lengths."""
    moods = ("was very glad.", "wept.", "shook with fear and ran.")
    told = [f"{name} {mood}" for name in names.split() for mood in moods]
    return residuals(model, told, ["final punctuation"])["final punctuation"].unflatten(0, (-1, len(moods)))
