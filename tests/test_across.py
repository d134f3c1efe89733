"""Differences between models that were planted are found, and none where there is none."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers import across, emotions
from helpers.across import alike, apart, best_depths, by_emotion, comparison, curves_of, interaction, ways_compared
from helpers.activations import POSITIONS
from helpers.claims import siblings
from helpers.models import known_models
from helpers.regimes import REGIMES

SIBLINGS = siblings()


def noisy(models: int, units: int, depths: int, seed: int) -> Tensor:
    """The same bent curve for every model, a level of its own for every unit, and noise."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(1, units, 1, generator=generator)
    bend = torch.linspace(-1, 1, depths).pow(2)
    return bend + level + 0.1 * torch.randn(models, units, depths, generator=generator)


def long(by_model: dict[str, np.ndarray], **same: object) -> pd.DataFrame:
    """Draw x depth arrays as rows, as measurements give them."""
    rows = [
        (name, depth, draw, value)
        for name, drawn in by_model.items()
        for draw, line in enumerate(drawn)
        for depth, value in enumerate(line)
    ]
    return pd.DataFrame(rows, columns=["model", "depth", "draw", "value"]).assign(**same)


# Which models


def test_the_siblings_are_compared_and_the_model_stands_beside_them():
    study = comparison({})
    assert study.models == tuple(SIBLINGS) and study.beside == ("bookworm",) and study.name == "bookworm"
    assert comparison({"MODEL": "gpt2-small"}).everyone == (*SIBLINGS, "gpt2-small")
    assert comparison({"MODEL": "gpt2-small"}).name == "gpt2-small"


def test_a_sibling_does_not_stand_beside_itself():
    assert comparison({"MODEL": SIBLINGS[0]}).everyone == tuple(SIBLINGS)


def test_named_models_are_compared_instead():
    study = comparison({"MODELS": " gpt2-small  qwen3-0.6b gpt2-small", "MODEL": "bookworm"})
    assert study.everyone == ("gpt2-small", "qwen3-0.6b") and study.name == "gpt2-small+qwen3-0.6b"


def test_a_model_goes_by_its_short_name_wherever_it_lies(tmp_path):
    (tmp_path / "mine").mkdir()
    study = comparison({"MODELS": f"{tmp_path / 'mine'} openai-community/gpt2 someone/model@abc"})
    assert study.models == ("local--mine", "gpt2-small", "someone--model@abc")
    assert study.sources["local--mine"] == str(tmp_path / "mine")
    with pytest.raises(ValueError, match="MODELS names 'gpt2-small' twice: gpt2-small, gpt2"):
        comparison({"MODELS": "gpt2-small gpt2"})


def test_an_unknown_model_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match=r"Unknown model 'gpt2-smal'\. Did you mean 'gpt2-small'"):
        comparison({"MODELS": "bookworm gpt2-smal"})


def test_there_is_one_sibling_per_family():
    families = known_models().loc[SIBLINGS, "family"]
    assert families.is_unique and set(families) == {"GPT-2", "Llama", "Qwen", "Gemma", "Mistral"}


# Curves


def test_models_of_different_height_meet_at_relative_depth():
    heights = {"low": np.array([[0.0, 1.0, 2.0]]), "high": np.array([[0.0, 0.5, 1.0, 1.5, 2.0]])}
    parts = [long(heights, unit=emotion, position="mean") for emotion in emotions.names()]
    found = by_emotion(pd.concat(parts), "mean")
    assert torch.allclose(found["low"], found["high"]) and found["low"].shape == (len(emotions.names()), 5)


def test_every_model_keeps_its_own_depths():
    table = long({"low": np.eye(2, 3), "high": np.eye(2, 5)}, statistic="AUROC", position="mean")
    found = curves_of(table, "AUROC", "mean")
    assert found["low"].tolist() == np.eye(2, 3).tolist() and found["high"].shape == (2, 5)


def test_what_was_not_measured_is_named():
    table = long({"one": np.zeros((1, 3))}, statistic="AUROC", position="mean")
    with pytest.raises(ValueError, match="nothing was measured as 'AUROC' at 'last token'"):
        curves_of(table, "AUROC", "last token")


def test_best_depths_are_found_with_their_largest_difference():
    early, late = torch.zeros(101, 5), torch.zeros(101, 5)
    early[:, 1] = late[:, 4] = 1
    table = best_depths({"early": early, "late": late, "again": early}).set_index("condition")
    assert table["value"].to_dict() == {"early": 0.25, "late": 1.0, "again": 0.25, "largest difference": 0.75}
    assert (table["low"] == table["value"]).all() and (table["high"] == table["value"]).all()
    assert best_depths({"early": -early}, highest=False)["value"][0] == 0.25


def test_noise_widens_the_largest_difference():
    generator = torch.Generator().manual_seed(0)
    flat = {name: torch.randn(500, 9, generator=generator) for name in "abc"}
    row = best_depths(flat).set_index("condition").loc["largest difference"]
    assert row["low"] < 0.15 < row["high"]


# Interaction


def test_models_with_the_same_curve_do_not_interact():
    p = [interaction(noisy(5, 24, 8, seed), torch.Generator().manual_seed(0), 200)[1] for seed in range(40)]
    assert 0.3 < np.mean(p) < 0.7 and np.mean(np.array(p) < 0.05) <= 0.15


def test_a_model_that_peaks_elsewhere_is_found():
    curves = noisy(5, 24, 8, 0)
    curves[2] += 0.2 * torch.linspace(0, 1, 8)
    size, p, deviations = interaction(curves, torch.Generator().manual_seed(0), 200)
    assert p == pytest.approx(1 / 201) and deviations.abs().sum(1).argmax() == 2 and size > 0
    assert torch.allclose(deviations.sum(0), torch.zeros(8), atol=1e-5)


def test_a_model_that_is_better_everywhere_does_not_count():
    curves = noisy(4, 24, 8, 1)
    better = curves.clone()
    better[1] += 0.5
    same = [interaction(each, torch.Generator().manual_seed(0), 100) for each in (curves, better)]
    assert same[0][0] == pytest.approx(same[1][0], abs=1e-6) and same[0][1] == same[1][1]


def test_every_two_models_are_set_apart_and_the_odd_one_most():
    one, two, odd = noisy(3, 24, 8, 0)
    odd = odd + torch.linspace(0, 1, 8)
    table = apart({"one": one, "two": two, "odd": odd}, torch.Generator().manual_seed(0), 200)
    assert [set(pair.split(", ")) for pair in table["condition"]][2] == {"one", "two"}
    assert table["p"].iloc[:2].max() < 0.01 < table["p"].iloc[2] and table["value"].is_monotonic_decreasing
    alone = interaction(torch.stack([one, two]), torch.Generator().manual_seed(0), 200)[0]
    assert table["value"].iloc[2] == pytest.approx(alone)


@pytest.mark.parametrize("shape", [(1, 24, 8), (5, 1, 8)])
def test_an_interaction_needs_two_of_each(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="at least two models and two units"):
        interaction(torch.rand(shape), torch.Generator().manual_seed(0))


# Ways


def test_two_ways_are_compared_within_and_over_models():
    generator = np.random.default_rng(0)
    draws = 0.02 * generator.standard_normal((201, 5))
    draws[0] = 0
    levels = np.array([0.6, 0.65, 0.7, 0.75, 0.8])
    given, written = (
        pd.DataFrame(levels + gap + draws, columns=list("abcde")).rename_axis("draw").reset_index()
        .melt("draw", var_name="model") for gap in (0.0, -0.1)
    )  # fmt: skip
    table, p = ways_compared(given, written)
    gaps = table[table["statistic"] == "generation minus comprehension"].set_index("condition")
    assert gaps["value"].to_numpy() == pytest.approx(-0.1) and gaps.index[-1] == "mean of all models"
    assert (gaps["high"] < 0).all() and (gaps["low"] <= gaps["value"] + 1e-9).all()
    assert p == pytest.approx(mannwhitneyu(levels, levels - 0.1).pvalue)


# Regimes


def test_surgical_texts_are_counted_where_every_vector_reaches():
    table = pd.DataFrame(
        product("ba", ("emotion", "random"), (0, 1), (0.1, 1.0, 3.0), (0, 1, 2)),
        columns=["model", "method", "draw", "dose", "prompt"],
    )
    table = table.query("not (model == 'a' and draw == 1 and dose == 3)")
    kept = table.eval("model == 'b' and prompt == 1 and draw < 2 - dose")
    table = table.assign(regime=kept.map({True: "surgical", False: "explosive"}))
    shares = across.surgical(table)
    assert shares.shape == (2, 3, 2) and shares[0, 1].tolist() == [1.0, 0.5]
    assert shares.sum() == 1.5


# Geometry


def test_one_shape_is_alike_and_another_is_not():
    generator = np.random.default_rng(0)
    shape, other = generator.standard_normal((2, 100))
    models = {"one": shape, "two": shape, "three": other}
    rows = [
        (name, draw, unit, value + 0.01 * generator.standard_normal())
        for name, values in models.items()
        for draw in range(2 * 6)
        for unit, value in enumerate(values)
    ]
    table = pd.DataFrame(rows, columns=["model", "draw", "unit", "value"]).assign(statistic="geometry")
    found = alike(table).pivot(index="model", columns="other", values="r")
    assert found.loc["one", "two"] > 0.99 and found.loc["one", "one"] > 0.99
    assert abs(found.loc["one", "three"]) < 0.3
    assert np.allclose(found, found.T)


# Measurements


def test_comprehension_measures_every_position_and_depth(model: TransformerBridge):
    depths = range(model.cfg.n_layers + 1)
    table = across.comprehension(model, depths).assign(model="tiny")
    draws = table[table["statistic"] == "AUROC"]
    assert len(draws) == len(POSITIONS) * len(depths) * (across.DRAWS + 1) and draws["value"].between(0, 1).all()
    shapes = by_emotion(table[table["statistic"] == "AUROC of one"], "mean")
    assert list(shapes) == ["tiny"] and shapes["tiny"].shape == (len(emotions.names()), len(depths))
    mean = curves_of(table, "AUROC", "mean")["tiny"][0]
    assert torch.allclose(shapes["tiny"].mean(0), mean, atol=1e-5)
    assert alike(table)["r"].between(-1, 1).all()
    few = across.comprehension(model, [1])
    same = few[(few["statistic"] == "AUROC") & (few["position"] == "mean")]["value"].to_numpy()
    assert np.allclose(same, curves_of(table, "AUROC", "mean")["tiny"][:, 1], atol=1e-6)


def test_generation_is_measured_like_comprehension(model: TransformerBridge, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(across.LENGTH, "story", 12)
    table = across.generation(model, [0, 1])
    assert set(table["statistic"]) == {"AUROC", "AUROC, validation", "AUROC of one"}
    assert "midpoint, last token" in set(table["position"]) and table["value"].between(0, 1).all()


def test_steering_gives_one_regime_per_text(model: TransformerBridge):
    table = across.steering(model, (1,))
    assert set(table["regime"]) <= set(REGIMES) and set(table["depth"]) == {1}
    assert set(table["dose"]) <= set(across.DOSES) and set(table["method"]) <= {"emotion", "random"}
    assert not table.duplicated(["method", "draw", "dose", "prompt"]).any()


def test_a_model_is_steered_at_the_lower_middle_of_its_depths(model: TransformerBridge):
    table = across.steering_halfway(model, range(model.cfg.n_layers + 1))
    assert set(table["depth"]) == {model.cfg.n_layers // 2}


def test_what_is_asked_of_a_twin_is_the_first_draw(model: TransformerBridge):
    once, whole = across.comprehension_once(model, (1,)), across.comprehension(model, (1,))
    first = whole[(whole["draw"] == 0) | (whole["statistic"] == "geometry")].reset_index(drop=True)
    pd.testing.assert_frame_equal(once, first)


def test_curves_stand_beside_their_twins_over_relative_depth():
    rng = np.random.default_rng(0)
    read = long({"low": rng.random((3, 3)), "high": rng.random((3, 5))}, statistic="AUROC", position="mean")
    twins = read[read["model"] == "low"].assign(value=0.5)  # lower than the highest model
    own, table = across.over_depth(read, twins, "AUROC", "mean")
    assert list(own) == ["low", "high"]
    places = table.groupby(["condition", "model"])["relative depth"].agg(list).to_dict()
    low, high = [0, 0.5, 1], [0, 0.25, 0.5, 0.75, 1]
    assert places == {("the model", "low"): low, ("the model", "high"): high, ("untrained twin", "low"): low}
    assert (table.loc[table["condition"] == "untrained twin", "value"] == 0.5).all()
    values = table[(table["model"] == "high") & (table["condition"] == "the model")]["value"]
    assert np.allclose(values, read[(read["model"] == "high") & (read["draw"] == 0)]["value"])


def test_a_way_is_read_at_half_depth_or_where_validation_prefers():
    curves = {"low": np.array([[0.1, 0.2, 0.3]]), "high": np.array([[0.5, 0.6, 0.7, 0.8, 0.9]])}
    rows = [long(curves, statistic="AUROC", position=position) for position in ("mean", "last token")]
    trial = [rows[0].assign(statistic="AUROC, validation", value=-rows[0]["value"])]
    trial.append(rows[1].assign(statistic="AUROC, validation", value=-2.0))
    table = pd.concat([*rows, *trial])
    assert across.at_half_depth(table, "mean").set_index("model")["value"].to_dict() == {"low": 0.2, "high": 0.7}
    best = across.at_best(table)
    assert best.set_index("model")["value"].to_dict() == {"low": 0.1, "high": 0.5} and set(best["position"]) == {"mean"}


def test_a_comparison_says_which_models_it_is_about():
    assert str(comparison({"MODELS": "gpt2-small qwen3-0.6b"})) == (
        "Model: gpt2-small+qwen3-0.6b (compared: gpt2-small, qwen3-0.6b)"
    )
