"""Planted directions are recovered, refitting equals fitting, random directions have the covariance they claim."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from helpers.directions import (
    covariance_matched,
    isotropic,
    lens,
    logistic_probe,
    logit_lens,
    mean_difference,
    mean_gap,
    projections,
    random_directions,
    refitted,
    unit,
)
from helpers.models import load_model
from helpers.stats import auroc, bootstrap_picks, counts


@pytest.fixture
def acts(generator: Generator) -> Tensor:
    """Side x pair x depth x d_model."""
    return torch.randn(2, 12, 3, 16, generator=generator)


def test_mean_difference_recovers_a_planted_direction_at_every_depth(generator):
    planted = normalize(torch.randn(3, 64, generator=generator), dim=-1)
    emotional, neutral = torch.randn(2, 100, 3, 64, generator=generator)
    found = mean_difference(emotional + 5 * planted, neutral)
    assert ((found * planted).sum(-1) > 0.95).all()
    assert torch.allclose(found.norm(dim=-1), torch.ones(3))


def test_mean_gap_by_hand_with_groups_of_different_size():
    emotional = torch.tensor([[4.0, 0.0], [2.0, 2.0], [0.0, 1.0]])
    neutral = torch.tensor([[1.0, 5.0]])
    assert mean_gap(emotional, neutral).tolist() == [1, -4]


@pytest.mark.parametrize("fitted", [mean_gap, mean_difference, logistic_probe])
def test_an_empty_group_is_refused(acts, fitted):
    for groups in [(acts[0], acts[1, :0]), (acts[0, :0], acts[1])]:
        with pytest.raises(ValueError, match="at least one emotional and one neutral activation"):
            fitted(*groups)


@pytest.mark.parametrize("fitted", [mean_gap, mean_difference, logistic_probe])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_single_non_finite_activation_is_refused(acts, fitted, value):
    acts[1, 3, 2, 5] = value
    with pytest.raises(ValueError, match="non-finite activations"):
        fitted(*acts)


@pytest.mark.parametrize("fitted", [mean_difference, logistic_probe])
def test_identical_groups_are_refused(acts, fitted):
    with pytest.raises(ValueError, match="are the two groups of texts identical"):
        fitted(acts[0, :1].expand(12, 3, 16), acts[0, :1].expand(12, 3, 16))


def test_mean_difference_of_a_group_with_itself_is_refused(acts):
    with pytest.raises(ValueError, match="are the two groups of texts identical"):
        mean_difference(acts[0], acts[0])


def test_logistic_probe_recovers_a_planted_direction_at_every_depth(generator):
    planted = normalize(torch.randn(3, 64, generator=generator), dim=-1)
    emotional, neutral = torch.randn(2, 200, 3, 64, generator=generator)
    found = logistic_probe(emotional + 5 * planted + 7, neutral + 7)
    assert ((found * planted).sum(-1) > 0.9).all()
    assert torch.allclose(found.norm(dim=-1), torch.ones(3))
    assert torch.allclose(logistic_probe(neutral + 7, emotional + 5 * planted + 7), -found, atol=1e-3)


@pytest.mark.parametrize("pairs", [20, 100])
def test_logistic_probe_leaves_out_what_both_groups_vary_along(generator, pairs):
    """The mean difference takes chance in a direction of large common variance for a part of the gap."""
    emotional, neutral = torch.randn(2, 500 + pairs, 1, 16, generator=generator) * torch.tensor([10.0] + [1.0] * 15)
    emotional[..., 1] += 2
    probe, gap = (fitted(emotional[:pairs], neutral[:pairs])[0] for fitted in (logistic_probe, mean_difference))
    assert 3 * probe[0].abs() < gap[0].abs()
    held_out = [auroc(emotional[pairs:, 0] @ found, neutral[pairs:, 0] @ found) for found in (probe, gap)]
    assert held_out[0] > held_out[1] + 0.1


def test_logistic_probe_of_each_depth_is_its_own(acts):
    together = logistic_probe(*acts)
    alone = torch.cat([logistic_probe(*acts[:, :, [depth]]) for depth in range(3)])
    assert torch.allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("times", [1e-3, 1e3])
def test_logistic_probe_does_not_depend_on_the_scale_or_the_origin(acts, times):
    acts[0, ..., 3] += 1
    found = logistic_probe(*acts)
    assert torch.allclose(logistic_probe(*(times * acts)), found, atol=1e-3)
    assert torch.allclose(logistic_probe(*(acts + 5)), found, atol=1e-3)


@pytest.mark.parametrize("neutral", [12, 7, 1])
@pytest.mark.parametrize("fitted", [mean_difference, logistic_probe])
def test_where_nothing_differs_there_is_no_direction(acts, generator, fitted, neutral):
    """Nor one made of rounding, whatever the sizes of the groups; 0.1 is no binary number."""
    acts[:, :, 1] = torch.randn(16, generator=generator) + 0.1
    found = fitted(acts[0], acts[1, :neutral])
    assert torch.equal(found[1], torch.zeros(16))
    assert torch.allclose(found[[0, 2]].norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize(
    "vectors", [[[1.0, 1.0], [float("nan"), 0.0]], [[1.0, 1.0], [float("inf"), 0.0]], [[0.0, 0.0]]]
)
def test_a_vector_without_direction_is_refused(vectors):
    with pytest.raises(ValueError, match="has no direction"):
        unit(torch.tensor(vectors))


def test_a_zero_vector_beside_others_stays_zero():
    assert torch.equal(unit(torch.tensor([[0.0, 2.0], [0.0, 0.0]])), torch.tensor([[0.0, 1.0], [0.0, 0.0]]))


def test_unit_keeps_the_direction_at_length_one():
    assert torch.allclose(unit(torch.tensor([[3.0, -4.0], [0.0, 1e-6]])), torch.tensor([[0.6, -0.8], [0.0, 1.0]]))


def test_refitted_with_equal_weights_is_the_mean_difference(acts):
    found = refitted(acts[0] - acts[1], torch.tensor([[1.0] * 12, [1 / 12] * 12]))
    assert torch.allclose(found, mean_difference(*acts).expand(2, 3, 16), atol=1e-6)


def test_refitted_with_bootstrap_counts_is_the_mean_difference_of_the_resampled_pairs(acts, generator):
    picks = bootstrap_picks(5, 12, generator)
    found = refitted(acts[0] - acts[1], counts(picks, 12))
    assert torch.allclose(found, torch.stack([mean_difference(*acts[:, rows]) for rows in picks]), atol=1e-6)


def test_refitted_with_a_negative_sign_swaps_the_sides_of_that_pair(acts):
    signs = torch.ones(2, 12)
    signs[0], signs[1, 4] = -1, -1
    flipped, one_swapped = refitted(acts[0] - acts[1], signs)
    assert torch.allclose(flipped, -mean_difference(*acts), atol=1e-6)
    acts[:, 4] = acts[:, 4].flip(0)
    assert torch.allclose(one_swapped, mean_difference(*acts), atol=1e-6)


def test_refitted_refuses_identical_sides(acts):
    with pytest.raises(ValueError, match="are the two groups of texts identical"):
        refitted(acts[0] - acts[0], torch.ones(1, 12))


def test_isotropic_directions_have_length_one_and_favour_no_direction(generator):
    drawn = isotropic(4000, 2, 8, generator)
    assert torch.allclose(drawn.norm(dim=-1), torch.ones(4000, 2))
    for depth in (0, 1):
        assert torch.allclose(drawn[:, depth].T @ drawn[:, depth] / 4000, torch.eye(8) / 8, atol=0.01)
    assert drawn.mean(0).norm(dim=-1).max() < 0.05
    assert (drawn[:, 0] * drawn[:, 1]).sum(-1).mean().abs() < 0.03


def test_covariance_matched_directions_follow_the_top_axis_of_each_depth_whatever_the_mean(generator):
    axes = normalize(torch.randn(2, 16, generator=generator), dim=-1)
    acts = torch.randn(50, 2, 16, generator=generator) + 4 * torch.randn(50, 2, 1, generator=generator) * axes + 100
    drawn = covariance_matched(acts, 2000, generator)
    assert torch.allclose(drawn.norm(dim=-1), torch.ones(2000, 2))
    for depth in (0, 1):
        own, theirs = (torch.linalg.eigh(each[:, depth].T.cov()).eigenvectors[:, -1] for each in (acts, drawn))
        assert (own @ theirs).abs() > 0.99
        assert (theirs @ axes[depth]).abs() > 0.95


def test_covariance_matched_directions_lie_along_two_axes_in_the_known_proportion(generator):
    # Standard deviations 3 and 1: cos² to the first axis is 9x² / (9x² + y²), whose mean over normal x, y is 3 / 4.
    acts = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])[:, None] + 10
    drawn = covariance_matched(acts, 5000, generator)
    assert drawn[:, 0, 0].square().mean().item() == pytest.approx(0.75, abs=0.02)


def test_random_directions_are_both_kinds_and_depend_on_the_generator_alone(acts):
    first, second, other = (random_directions(acts[0], 5, Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert [list(drawn.shape) for drawn in first.values()] == [[5, 3, 16]] * 2
    for name in ("random, isotropic", "random, covariance-matched"):
        assert first[name].equal(second[name]) and not first[name].equal(other[name])


def test_projections_agree_with_a_loop(acts, generator):
    directions = isotropic(4, 3, 16, generator)
    found = projections(acts[0], directions)
    assert found.shape == (4, 3, 12)
    for n in range(4):
        for depth in range(3):
            for row in range(12):
                assert torch.isclose(found[n, depth, row], acts[0, row, depth] @ directions[n, depth], atol=1e-5)
    assert torch.allclose(projections(acts[0], directions[0]), found[0], atol=1e-5)


@pytest.mark.parametrize(
    ("family", "norm"),
    [("gpt2", "transformer.ln_f"), ("gpt_neox", "gpt_neox.final_layer_norm"), ("llama", "model.norm")],
)
def test_logit_lens_is_the_final_norm_and_unembedding_by_hand(
    model_folder: Callable[[str], Path], tmp_path: Path, generator: Generator, family: str, norm: str
):
    shutil.copytree(model_folder(family), tmp_path, dirs_exist_ok=True)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for weight in hf.get_submodule(norm).parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    hf.save_pretrained(tmp_path)
    directions = isotropic(1, 4, 32, generator)[0]
    with torch.no_grad():
        final = hf.get_submodule(norm)
        logits = (final(directions[[1, 3]]) - final(torch.zeros(32))) @ hf.get_output_embeddings().weight.T

    table = logit_lens(load_model(str(tmp_path)), directions, depths=[1, 3], top=6)
    assert list(table) == ["depth", "side", "rank", "token", "logit"]
    for depth, row in zip([1, 3], logits.sort(descending=True).values):
        for side, expected in {"raised": row[:6], "lowered": row.flip(0)[:6]}.items():
            found = table[(table["depth"] == depth) & (table["side"] == side)]
            assert found["rank"].tolist() == [1, 2, 3, 4, 5, 6]
            assert torch.allclose(torch.tensor(found["logit"].tolist()), expected, atol=1e-3, rtol=1e-3)
    assert len(table) == 24


def test_logit_lens_names_the_token_whose_unembedding_is_the_direction(any_model):
    chosen = [300, 700, 1500]
    rows = any_model.original_model.get_output_embeddings().weight[chosen]
    for sign, side in ((1, "raised"), (-1, "lowered")):
        table = logit_lens(any_model, unit(sign * rows.float()), depths=[0, 1, 2], top=3)
        first = table[(table["rank"] == 1) & (table["side"] == side)]
        assert first["token"].tolist() == [any_model.tokenizer.decode([id_]) for id_ in chosen]


def test_lens_is_the_final_norm_and_unembedding_by_hand_minus_the_zero_vectors(any_model: TransformerBridge, generator):
    hf = AutoModelForCausalLM.from_pretrained(any_model.cfg.folder)
    final = next(part for name, part in hf.named_modules() if name.endswith(("ln_f", "final_layer_norm", "model.norm")))
    vectors = torch.cat(
        [isotropic(1, 4, 32, generator)[0] * torch.tensor([[0.1], [1], [5], [100]]), torch.zeros(1, 32)]
    )
    if any_model.cfg.centred:
        vectors -= vectors.mean(-1, keepdim=True)  # as is all that the stream holds
    with torch.no_grad():
        expected = hf.get_output_embeddings()(final(vectors)) - hf.get_output_embeddings()(final(torch.zeros(32)))
    found = lens(any_model, vectors)
    assert found.shape == (5, 8192)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(found[4], torch.zeros(8192))
    assert found[:4].std(-1).min() > 0.1


def test_lens_of_a_vector_does_not_depend_on_the_others(model: TransformerBridge, generator):
    vectors = isotropic(1, 5, 32, generator)[0]
    alone = torch.cat([lens(model, vector[None]) for vector in vectors])
    torch.testing.assert_close(lens(model, vectors), alone, atol=1e-5, rtol=1e-5)


def test_lens_takes_off_what_the_final_norm_adds(model_folder: Callable[[str], Path], tmp_path: Path, generator):
    """A bias of the norm raises the same tokens whatever the vector: no two directions have it in common."""
    vectors = isotropic(1, 3, 32, generator)[0]
    before = lens(load_model(str(model_folder("gpt2"))), vectors)
    shutil.copytree(model_folder("gpt2"), tmp_path, dirs_exist_ok=True)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    hf.transformer.ln_f.bias.data = 10 * torch.randn(32, generator=generator)
    hf.save_pretrained(tmp_path)
    torch.testing.assert_close(lens(load_model(str(tmp_path)), vectors), before, atol=1e-3, rtol=1e-3)
