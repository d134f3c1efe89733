"""Matches between depths: planted copies are found, and chance levels agree with simulation or published values."""

import warnings
from collections.abc import Callable

import pandas as pd
import pytest
import scipy.stats
import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize
from transformer_lens.model_bridge import TransformerBridge

from helpers import similarity
from helpers.features import at_words, on_passages, top
from helpers.prompts import neutral_texts
from helpers.saes import load_sae
from helpers.similarity import (
    all_nearest,
    among,
    best_of_random,
    continuity,
    cosines,
    families,
    fire_together,
    followed,
    frequencies,
    like_frequency,
    nearest,
    one_to_one,
    onward,
    rows_of,
    top_by_depth,
)
from helpers.stats import share_interval, spearman

D_SAE = 48
EDGE = ["depth", "feature", "to", "match"]
PERMUTED = torch.randperm(D_SAE, generator=Generator().manual_seed(5)).tolist()  # feature of depth 1 -> its copy at 0


@pytest.fixture(scope="module")
def rows() -> dict[int, Tensor]:
    """Decoder rows of four depths: depth 1 has those of depth 0 in another order, longer and a little moved."""
    generator = Generator().manual_seed(6)
    rows = {depth: torch.randn(D_SAE, 32, generator=generator) for depth in range(4)}
    rows[1] = 3 * rows[0][PERMUTED] + 0.2 * torch.randn(D_SAE, 32, generator=generator)
    return rows


@pytest.fixture(scope="module")
def model(with_saes: Callable[..., TransformerBridge], rows: dict[int, Tensor]) -> TransformerBridge:
    return with_saes(rows=rows)


def table(depths: list[int], features: list[int]) -> pd.DataFrame:
    return pd.DataFrame({"depth": depths, "feature": features})


# Decoder rows


def test_rows_come_in_the_order_of_the_table(model, rows):
    depths, ids = [3, 0, 3, 1, 0, 3], [7, 7, 2, 0, 3, 7]
    expected = torch.stack([rows[depth][feature] for depth, feature in zip(depths, ids)])
    asked = table(depths, ids)
    assert torch.equal(rows_of(model, asked), expected)
    assert torch.equal(rows_of(model, asked[::-1]), expected.flip(0))
    assert torch.equal(rows_of(model, asked.iloc[[4, 2]]), expected[[4, 2]])


def test_rows_are_read_without_a_warning(model):
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rows_of(model, table([3, 0], [7, 7]))
    finally:
        torch.set_warn_always(False)


def test_cosines_by_hand():
    a, b = torch.tensor([[2.0, 0], [0, 0], [1, 1]]), torch.tensor([[5.0, 0], [0, -1]])
    assert torch.allclose(cosines(a, b), torch.tensor([[1, 0], [0, 0], [0.5**0.5, -(0.5**0.5)]]))


def test_the_features_of_every_depth_are_those_of_its_sae_alone(model_with_saes):
    words = pd.DataFrame({"sentence": ["The happy boys came.", "He was very happy."], "word": "happy"})
    found = top_by_depth(model_with_saes, words, 5)
    assert found.columns.tolist() == ["depth", "rank", "feature", "activation", "fires"]
    for depth in range(4):
        expected = top(at_words(model_with_saes, load_sae(model_with_saes, depth), words), 5)
        here = found[found.depth == depth].drop(columns="depth").reset_index(drop=True)
        pd.testing.assert_frame_equal(here, expected, rtol=1e-4)
    assert len(found) == 20


# The nearest feature


def test_a_permuted_copy_is_found_and_mutual(model):
    there = nearest(model, table([0] * D_SAE, list(range(D_SAE))), 1)
    assert there.columns.tolist() == [*EDGE, "cosine", "mutual"]
    assert [PERMUTED[match] for match in there.match] == list(range(D_SAE))
    assert there.mutual.all() and (there.cosine > 0.98).all() and (there.cosine < 1).all()
    assert set(there.depth) == {0} and set(there.to) == {1}
    back = nearest(model, table([1, 1], [4, 30]), 0)
    assert back.match.tolist() == [PERMUTED[4], PERMUTED[30]] and back.mutual.all()


@pytest.mark.parametrize("to", [1, 3])
def test_matches_agree_with_a_direct_search(model, rows, to):
    """Between unrelated depths: signed cosines, of which the largest wins, and mutual only where both sides agree."""
    found = nearest(model, table([3] * 20 + [1] * 20, [*range(20), *range(20, 40)]), to)
    for row in found.itertuples():
        here, there = (normalize(rows[depth], dim=-1) for depth in (row.depth, to))
        alike = here @ there.T
        if row.depth == to:
            alike.fill_diagonal_(-2)
        assert row.match == alike[row.feature].argmax()
        assert row.cosine == pytest.approx(alike[row.feature, row.match].item(), abs=1e-5)
        assert row.mutual == (alike[:, row.match].argmax() == row.feature)
    assert found.mutual.nunique() == 2


def test_at_its_own_depth_a_feature_does_not_match_itself(model, rows):
    found = nearest(model, table([1] * D_SAE, list(range(D_SAE))), 1)
    assert (found.match != found.feature).all() and (found.cosine < 0.99).all()
    best = found.loc[found.cosine.idxmax()]
    assert best.mutual and found.match[best.match] == best.feature  # the closest pair of all chose each other


def test_all_nearest_leaves_out_a_features_own_depth(model):
    asked = table([0, 2, 1], [3, 4, 5])
    found = all_nearest(model, asked, [0, 1, 2])
    assert found.groupby("depth").to.apply(list).to_dict() == {0: [1, 2], 1: [0, 2], 2: [0, 1]}
    for to in (0, 1, 2):
        expected = nearest(model, asked[asked.depth != to], to)
        assert found[found.to == to].reset_index(drop=True).equals(expected)


def test_all_nearest_of_one_depths_features_keeps_its_types(model):
    """At the features' own depth nothing is left to match."""
    found = all_nearest(model, table([0, 0], [3, 4]), [0, 1, 2])
    assert found.to.tolist() == [1, 1, 2, 2]
    assert found.dtypes.equals(nearest(model, table([0, 0], [3, 4]), 1).dtypes)


@pytest.mark.parametrize("bad", [-1, D_SAE])
def test_a_feature_that_does_not_exist_is_refused(model, bad):
    for refused in (lambda: rows_of(model, table([1], [bad])), lambda: nearest(model, table([1], [bad]), 2)):
        with pytest.raises(IndexError, match=f"feature {bad} is out of range: the SAE at depth 1 has 0 to 47"):
            refused()


# What chance gives


@pytest.mark.parametrize(("count", "d_model"), [(1, 8), (50, 32), (1000, 16)])
def test_best_of_random_agrees_with_simulation(generator, count, d_model):
    fixed = torch.zeros(d_model)
    fixed[0] = 1
    drawn = torch.stack([
        (normalize(torch.randn(count, d_model, generator=generator), dim=-1) @ fixed).max() for _ in range(3000)
    ])  # fmt: skip
    for quantile in (0.05, 0.5, 0.95):
        expected = best_of_random(count, d_model, quantile)
        assert (drawn <= expected).float().mean().item() == pytest.approx(quantile, abs=0.035)


def test_like_frequency_is_nearest_on_a_log_scale():
    frequency = torch.tensor([0.1, 0.01, 0.15, 0, 0.06, 0.9, 0.1])
    assert like_frequency(frequency, 0, 3) == [6, 2, 4]  # 0.06 is nearer than 0.15 on a linear scale
    assert like_frequency(frequency, 0, 3, without=[6, 4]) == [2, 5, 1]
    assert like_frequency(frequency, 1, 1) == [4]


def test_like_frequency_leaves_out_the_feature_itself_and_those_that_never_fire():
    frequency = torch.tensor([0.1, 0, 0.2, 0, 0.4])
    assert like_frequency(frequency, 0, 9) == [2, 4]
    assert like_frequency(frequency * 0, 0, 9) == []


def test_like_the_frequency_of_a_feature_that_never_fires_are_the_rarest():
    assert like_frequency(torch.tensor([0.4, 0, 0.1, 0, 0.2]), 1, 2) == [2, 4]


# Everything at once


def test_one_to_one_recovers_a_permutation(generator):
    a = torch.randn(40, 16, generator=generator)
    order = torch.randperm(40, generator=generator)
    b = 2 * a[order] + 0.3 * torch.randn(40, 16, generator=generator)
    assert one_to_one(a, b) == order.argsort().tolist()


def test_one_to_one_gives_way_where_two_want_the_same():
    """Both are nearest to the first; the sum is largest when the second row takes the other."""
    angle = torch.tensor([0.1, 0.2, 0.0, -1.0])
    a, b = torch.stack([angle.cos(), angle.sin()], -1).split(2)
    assert cosines(a, b).argmax(-1).tolist() == [0, 0]
    assert one_to_one(a, b) == [1, 0]


def test_too_large_an_assignment_is_refused(monkeypatch):
    monkeypatch.setattr(similarity, "LARGEST_ASSIGNMENT", 10)
    assert one_to_one(torch.eye(10), torch.eye(10)) == list(range(10))
    with pytest.raises(ValueError, match="one-to-one assignment of 11 features takes too long: at most 10"):
        one_to_one(torch.eye(11), torch.eye(11))


def test_families_are_what_edges_connect():
    """Features with the same number at different depths are different features; the largest family comes first."""
    edges = [(0, 9, 1, 8), (0, 1, 1, 2), (1, 2, 2, 3), (0, 5, 1, 2), (3, 4, 2, 3), (1, 1, 2, 9), (2, 9, 3, 9)]
    found = families(table([0, 3, 0], [1, 0, 9]), pd.DataFrame(edges, columns=EDGE))
    assert found.columns.tolist() == ["depth", "feature", "chosen", "family"]
    members = {number: set(zip(part.depth, part.feature)) for number, part in found.groupby("family")}
    assert members == {
        0: {(0, 1), (1, 2), (2, 3), (0, 5), (3, 4)},
        1: {(1, 1), (2, 9), (3, 9)},
        2: {(0, 9), (1, 8)},
        3: {(3, 0)},
    }
    assert not found.duplicated(["depth", "feature"]).any()
    assert set(zip(found.depth[found.chosen], found.feature[found.chosen])) == {(0, 1), (3, 0), (0, 9)}


def test_without_edges_every_feature_is_a_family_of_its_own():
    found = families(table([0, 1], [4, 4]), pd.DataFrame([], columns=EDGE))
    assert sorted(found.family) == [0, 1] and found.chosen.all()


# Over depth


def test_copies_continue_above_chance_and_random_rows_do_not(model):
    """Depth 1 is a copy of depth 0, depth 2 is not one of depth 1, and the last depth has no next one."""
    frequency = dict.fromkeys(range(4), torch.linspace(0.1, 0.9, D_SAE))
    found = onward(model, table([0] * 9 + [1] * 9 + [3], [*range(9), *range(9), 0]), frequency, others=20)
    assert found.depth.tolist() == [0] * 9 + [1] * 9 and (found.to == found.depth + 1).all()
    assert found["above chance"][found.depth == 0].all() and found["above chance"][found.depth == 1].mean() < 0.5
    assert found.random.tolist() == pytest.approx([best_of_random(D_SAE, 32, 0.95)] * 18)


def test_what_fires_as_often_is_compared_with_the_match(model, rows):
    frequency = dict.fromkeys(range(4), torch.linspace(0.1, 0.9, D_SAE))
    (found,) = onward(model, table([2], [11]), frequency, others=7).itertuples(index=False)
    like = like_frequency(frequency[2], 11, 7)
    expected = cosines(rows[2][like], rows[3][[found.match]]).quantile(0.95).item()
    assert found[list(found._fields).index("random") + 1] == pytest.approx(expected, abs=1e-5)


def test_among_takes_the_best_of_each_other_depth(model, rows):
    asked = table([0, 3, 0, 1], [4, 5, 6, 7])[::-1]
    found = among(model, asked).set_index(["depth", "feature", "to"]).cosine
    assert len(found) == 2 * 2 + 2 + 2
    alike = lambda a, b: cosines(rows[a[0]][[a[1]]], rows[b[0]][[b[1]]]).item()  # noqa: E731
    assert found[3, 5, 0] == pytest.approx(max(alike((3, 5), (0, 4)), alike((3, 5), (0, 6))), abs=1e-5)
    assert found[0, 4, 1] == pytest.approx(alike((0, 4), (1, 7)), abs=1e-5)


def test_features_that_fire_together_correlate(model_with_saes):
    """As computed from both features' activations at every token; one with itself correlates by 1."""
    texts = neutral_texts()[:4]
    pairs = pd.DataFrame([(0, 3, 2, 5), (1, 7, 0, 3), (2, 5, 2, 5)], columns=EDGE)
    found = fire_together(model_with_saes, pairs, texts)
    for value, (depth, feature, to, match) in zip(found.tolist(), pairs.itertuples(index=False)):
        x, y = (on_passages(model_with_saes, load_sae(model_with_saes, at), texts, [which]).acts[:, 0].numpy()
                for at, which in ((depth, feature), (to, match)))  # fmt: skip
        assert value == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-4)
    assert found[2] == pytest.approx(1) and found[:2].abs().max() < 0.9


def test_frequencies_of_all_depths_are_those_of_each(model_with_saes):
    texts = neutral_texts()[:4]
    found = frequencies(model_with_saes, texts, range(3))
    assert list(found) == [0, 1, 2]
    for depth, frequency in found.items():
        alone = on_passages(model_with_saes, load_sae(model_with_saes, depth), texts, []).frequency
        assert torch.allclose(frequency, alone, atol=1e-6) and 0 < alone.mean() < 1


def test_continuity_sums_up_the_other_tables(model, generator):
    asked = table([0, 0, 1, 2, 3], [4, 5, PERMUTED.index(4), 7, 8])
    frequency = dict.fromkeys(range(4), torch.linspace(0.1, 0.9, D_SAE))
    found = continuity(model, asked, frequency, generator).set_index("quantity")
    steps, cross = onward(model, asked, frequency), among(model, asked)
    later = cross[cross.to > 0].groupby(["depth", "feature"]).cosine.max()
    values = [
        steps["above chance"].mean(),
        scipy.stats.spearmanr((cross.depth - cross.to).abs(), cross.cosine).statistic,
        later[[1, 2, 3]].mean() - later[0].mean(),
    ]
    assert found.value.tolist() == pytest.approx(values, abs=1e-5)
    assert (found.low <= found.value).all() and (found.value <= found.high).all()


# Correlation and shares


def monotone(generator: Generator, groups: int, sign: int) -> pd.DataFrame:
    x = torch.randn(groups, generator=generator)
    noise = 0.5 * torch.randn(groups, generator=generator)
    return pd.DataFrame({"x": x, "y": (sign * (x + noise)).exp(), "group": range(groups)})


@pytest.mark.parametrize("sign", [1, -1])
def test_spearman_is_scipys_with_an_interval_on_its_side_of_zero(generator, sign):
    data = monotone(generator, 40, sign)
    value, low, high = spearman(data, "x", "y", "group", generator, 200, 0.95)
    assert value == pytest.approx(scipy.stats.spearmanr(data.x, data.y).statistic)
    assert -1 <= low < value < high <= 1
    assert low > 0 if sign > 0 else high < 0


def test_spearmans_interval_is_over_groups_and_not_over_rows(generator):
    """Ten copies of each row tell no more than one: groups know it, rows do not."""
    data = pd.concat([monotone(generator, 20, 1)] * 10, ignore_index=True)
    _, low, high = spearman(data, "x", "y", "group", generator, 200, 0.95)
    _, once_low, once_high = spearman(data[:20], "x", "y", "group", generator, 200, 0.95)
    _, row_low, row_high = spearman(data.assign(row=range(200)), "x", "y", "row", generator, 200, 0.95)
    assert high - low == pytest.approx(once_high - once_low, rel=0.35)
    assert row_high - row_low < 0.6 * (high - low)


@pytest.mark.parametrize(
    ("hits", "of", "low", "high"),
    [
        (0, 10, 0, 0.3085),
        (10, 10, 0.6915, 1),
        (5, 10, 0.1871, 0.8129),
        (1, 20, 0.0013, 0.2487),
        (8, 48, 0.0748, 0.3022),
    ],
)
def test_share_interval_is_clopper_and_pearsons(hits, of, low, high):
    assert share_interval(hits, of, 0.95) == pytest.approx((hits / of, low, high), abs=5e-5)


def test_a_lower_confidence_gives_a_narrower_share_interval():
    wide, narrow = share_interval(5, 20, 0.95), share_interval(5, 20, 0.8)
    assert wide[1] < narrow[1] < 0.25 < narrow[2] < wide[2]


def test_a_feature_is_followed_to_the_last_depth_and_only_as_long_as_it_continues(with_saes):
    rows = unit_rows(4)
    kept = {0: rows[0], 1: rows[1], 2: rows[2], 3: rows[3]}
    kept[1][5] = kept[0][2]  # feature 2 of depth 0 goes on as 5, 7 and 1; feature 3 ends at once
    kept[2][7] = kept[0][2]
    kept[3][1] = kept[0][2]
    model = with_saes("gpt2", kept)
    frequency = {depth: torch.full((len(kept[depth]),), 0.1) for depth in kept}
    start = pd.DataFrame({"depth": [0, 0], "feature": [2, 3]})
    links = followed(model, start, frequency)
    chain = links[links["cosine"] > 0.999]
    assert chain[["depth", "feature", "to", "match"]].to_numpy().tolist() == [[0, 2, 1, 5], [1, 5, 2, 7], [2, 7, 3, 1]]
    assert links["above chance"].all()
    assert not ((links["depth"] == 0) & (links["feature"] == 3)).any()


def unit_rows(depths: int) -> list[torch.Tensor]:
    """Random decoder rows for each depth, so few that none is close to another by chance alone."""
    generator = torch.Generator().manual_seed(5)
    return [torch.nn.functional.normalize(torch.randn(24, 32, generator=generator), dim=-1) for _ in range(depths)]
