"""Injection sweeps: which runs there are, which vector each gets, and what is said about them together."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import Generator
from transformer_lens.model_bridge import TransformerBridge

from helpers import continuations, sweeps
from helpers.activations import site
from helpers.config import CFG
from helpers.continuations import Added, distinct_ngrams, generated, log_odds, log_probs, perplexity, word_kinds
from helpers.directions import unit

DILEMMAS = pd.DataFrame(
    {
        "prompt": ["purse", "letter", "storm"],
        "text": ["He found a purse and chose to", "She opened the letter, then", "They saw the storm, and so they"],
        "act": [" return it", " told him", " turned back at once"],
        "refrain": [" keep it for himself", " said nothing", " went on"],
    }
)
STRENGTHS = [-0.5, 0, 2]
RUN = ["direction", "draw", "strength", "prompt", "sample"]


def test_strength_0_stands_once_for_all_directions(model: TransformerBridge, generator: Generator):
    runs = sweeps.log_odds_sweep(model, DILEMMAS, 1, _directions(generator), STRENGTHS)
    expected = [("none", 0, 0.0, prompt, 0) for prompt in DILEMMAS["prompt"]]
    for name, draw in (("fear", 0), ("random", 0), ("random", 1)):
        expected += [(name, draw, strength, prompt, 0) for strength in (-0.5, 2.0) for prompt in DILEMMAS["prompt"]]
    assert list(runs[RUN].itertuples(index=False, name=None)) == expected


def test_strength_0_is_run_even_when_it_is_not_asked_for(model: TransformerBridge, generator: Generator):
    directions = _directions(generator)
    asked = sweeps.log_odds_sweep(model, DILEMMAS, 1, directions, STRENGTHS)
    not_asked = sweeps.log_odds_sweep(model, DILEMMAS, 1, directions, [-0.5, 2])
    assert_frame_equal(asked, not_asked)


@pytest.mark.parametrize("depth", [0, 2, 3])
def test_every_run_gets_strength_times_unit_times_its_direction(
    model: TransformerBridge, generator: Generator, depth: int
):
    directions, length = _directions(generator), 3.5
    runs = sweeps.log_odds_sweep(model, DILEMMAS, depth, directions, STRENGTHS, length)
    asked = DILEMMAS.set_index("prompt")
    for run in runs.itertuples():
        vector = torch.zeros(model.cfg.d_model)
        if run.strength:
            vector = run.strength * length * directions[run.direction][run.draw]
        row = asked.loc[[run.prompt]]
        said = [row[column].tolist() for column in ("text", "act", "refrain")]
        by_hand = log_odds(model, *said, Added(depth, vector[None]))
        assert run.log_odds == pytest.approx(by_hand.item(), abs=1e-4)
    unsteered = log_odds(model, *(DILEMMAS[column].tolist() for column in ("text", "act", "refrain")))
    np.testing.assert_allclose(runs["log_odds"][:3], unsteered, atol=1e-4)


def test_the_shift_is_counted_from_the_same_prompt_at_strength_0(model: TransformerBridge, generator: Generator):
    runs = sweeps.log_odds_sweep(model, DILEMMAS, 1, _directions(generator), STRENGTHS, unit=5.0)
    zero = runs[runs["strength"] == 0]
    assert (zero["shift"] == 0).all()
    assert (runs["shift"][runs["strength"] != 0].abs() > 1e-3).all()
    before = dict(zip(zero["prompt"], zero["log_odds"]))
    np.testing.assert_allclose(runs["shift"], runs["log_odds"] - runs["prompt"].map(before))


def test_shifted_keeps_samples_apart():
    runs = pd.DataFrame(
        [("none", 0, 0.0, "a", 0, 1.0), ("none", 0, 0.0, "a", 1, 10.0), ("x", 0, 1.0, "a", 1, 12.0)],
        columns=[*RUN, "value"],
    )
    assert sweeps.shifted(runs, "value")["shift"].tolist() == [0, 0, 2]
    assert "shift" not in runs


def test_shifted_needs_a_strength_0():
    runs = pd.DataFrame([("x", 0, 1.0, "a", 0, 2.0)], columns=[*RUN, "value"])
    with pytest.raises(ValueError, match="no strength 0 to compare with"):
        sweeps.shifted(runs, "value")


def test_every_text_is_scored_as_by_hand(model: TransformerBridge, generator: Generator):
    directions = _directions(generator)
    runs = sweeps.text_sweep(model, DILEMMAS, 2, directions, [0, 4], unit=2.0, n_tokens=6)
    asked = DILEMMAS.set_index("prompt")["text"]
    for run in runs.to_dict("records"):
        vector = torch.zeros(1, model.cfg.d_model)
        if run["strength"]:
            vector = 8 * directions[run["direction"]][run["draw"]][None]
        ids = generated(model, [asked[run["prompt"]]], 6, Added(2, vector))[0]
        text = model.tokenizer.decode(ids)
        assert run["text"] == text
        assert run["distinct"] == distinct_ngrams(ids)
        unsteered = log_probs(model, [asked[run["prompt"]]], [[ids]])[0][0]
        assert run["perplexity"] == pytest.approx(perplexity(unsteered), rel=1e-3)
        for kind, count in word_kinds([text])[0].items():
            assert run[kind] == pytest.approx(100 * count / len(text.split()))
    assert runs["text"].nunique() > len(DILEMMAS)


def test_a_sample_has_the_same_noise_at_every_strength_and_direction(model: TransformerBridge, generator: Generator):
    too_small_to_matter = [-1e-9, 0, 1e-9]
    runs = sweeps.text_sweep(model, DILEMMAS, 1, _directions(generator), too_small_to_matter, n_tokens=6, samples=2)
    assert len(runs) == (1 + 3 * 2) * 3 * 3
    assert (runs.groupby(["prompt", "sample"])["text"].nunique() == 1).all()
    assert (runs.groupby("prompt")["text"].nunique() == 3).all()
    alike = pd.DataFrame({"prompt": ["a", "b"], "text": DILEMMAS["text"][0]})
    texts = sweeps.text_sweep(model, alike, 1, _directions(generator), [0], n_tokens=6, samples=1)["text"]
    assert texts[0] == texts[2]  # greedy
    assert texts[1] != texts[3]  # noise of its own for each prompt


def test_counted_words_are_per_hundred_of_the_text(model: TransformerBridge, generator: Generator):
    (word,) = model.tokenizer(" not", add_special_tokens=False)["input_ids"]
    direction = {"not": unit(model.original_model.get_output_embeddings().weight[word][None])}
    planted = sweeps.text_sweep(model, DILEMMAS, 3, direction, [1000], n_tokens=6).query("strength == 1000")
    assert (planted["text"] == " not" * 6).all()
    assert (planted["negation"] == 100).all()
    assert (planted[["hedging", "direct_action"]] == 0).all(axis=None)
    assert (planted["distinct"] == 1 / 4).all()


def test_a_text_that_ends_at_once_still_has_its_scores(model: TransformerBridge, generator: Generator):
    end = model.original_model.get_output_embeddings().weight[model.tokenizer.eos_token_id]
    direction = {"end": unit(end[None])}
    ended = sweeps.text_sweep(model, DILEMMAS, 3, direction, [1000], n_tokens=6).query("strength == 1000")
    assert (ended["text"] == "").all()
    assert (ended["distinct"] == 1).all()
    assert np.isfinite(ended["perplexity"]).all()
    assert (ended[["hedging", "negation", "direct_action"]] == 0).all(axis=None)


def test_a_sweep_does_not_depend_on_the_size_of_its_batches(
    model: TransformerBridge, generator: Generator, monkeypatch: pytest.MonkeyPatch
):
    directions = _directions(generator)
    large = sweeps.log_odds_sweep(model, DILEMMAS, 1, directions, STRENGTHS)
    texts = sweeps.text_sweep(model, DILEMMAS, 1, directions, STRENGTHS, n_tokens=5, samples=1)
    monkeypatch.setattr(continuations, "tokens_at_once", lambda model: 1)
    small = sweeps.log_odds_sweep(model, DILEMMAS, 1, directions, STRENGTHS)
    assert_frame_equal(small, large, atol=1e-4)
    again = sweeps.text_sweep(model, DILEMMAS, 1, directions, STRENGTHS, n_tokens=5, samples=1)
    assert_frame_equal(again, texts, rtol=1e-4)


def test_the_name_of_strength_0_is_refused_for_a_direction(model: TransformerBridge):
    with pytest.raises(ValueError, match='the name "none" belongs to strength 0'):
        sweeps.log_odds_sweep(model, DILEMMAS, 1, {"none": torch.ones(1, model.cfg.d_model)}, STRENGTHS)


def test_a_sweep_without_direction_or_strength_is_refused(model: TransformerBridge, generator: Generator):
    for directions, strengths in (({}, STRENGTHS), (_directions(generator), [])):
        for sweep in (sweeps.log_odds_sweep, sweeps.text_sweep):
            with pytest.raises(ValueError, match="at least one direction, a draw of each, and one strength"):
                sweep(model, DILEMMAS, 1, directions, strengths)


@pytest.mark.parametrize("sweep", [sweeps.log_odds_sweep, sweeps.text_sweep])
def test_an_interrupted_sweep_leaves_no_hook_behind(model: TransformerBridge, generator: Generator, sweep):
    said = [DILEMMAS[column].tolist() for column in ("text", "act", "refrain")]
    before = log_odds(model, *said)
    passes = []

    def third_time(resid, hook) -> None:
        passes.append(hook)
        if len(passes) == 3:
            raise KeyboardInterrupt

    options = {} if sweep is sweeps.log_odds_sweep else {"n_tokens": 5}
    with pytest.raises(KeyboardInterrupt), model.hooks(fwd_hooks=[(site(model, 2), third_time)]):
        sweep(model, DILEMMAS, 1, _directions(generator), STRENGTHS, **options)
    assert len(passes) == 3
    assert not [name for name, point in model.hook_dict.items() if point.fwd_hooks]
    assert torch.equal(log_odds(model, *said), before)


def test_one_draw_gets_the_mean_and_a_bootstrap_interval_over_prompts(generator: Generator):
    values = torch.randn(60, generator=generator).tolist()
    found = sweeps.over_prompts(_runs({"fear": [values]}), "value", generator)
    assert list(found) == ["direction", "strength", "value", "low", "high"]
    error = np.std(values) / np.sqrt(60)
    assert found["value"].item() == pytest.approx(np.mean(values), abs=1e-6)
    assert found["low"].item() == pytest.approx(np.mean(values) - 1.96 * error, abs=error / 4)
    assert found["high"].item() == pytest.approx(np.mean(values) + 1.96 * error, abs=error / 4)


def test_many_draws_get_their_median_and_quantiles(generator: Generator):
    draws = [[draw - 10.0, draw + 10.0] for draw in range(41)]  # means over two prompts: 0 to 40
    draws[40] = [990.0, 1010.0]
    found = sweeps.over_prompts(_runs({"random": draws}), "value", generator)
    assert found[["value", "low", "high"]].to_numpy().tolist() == [[20, 1, 39]]


def test_samples_of_a_prompt_are_averaged_before_prompts_are_compared(generator: Generator):
    runs = pd.DataFrame(
        [("fear", 0, 1.0, "a", 0, 0.0), ("fear", 0, 1.0, "a", 1, 4.0), ("fear", 0, 1.0, "b", 0, 2.0)],
        columns=[*RUN, "value"],
    )
    found = sweeps.over_prompts(runs, "value", generator)
    assert found[["value", "low", "high"]].to_numpy().tolist() == [[2, 2, 2]]


def test_directions_and_strengths_are_summarised_apart(generator: Generator):
    runs = pd.concat([_runs({"fear": [[1.0, 1.0]], "none": [[0.0, 0.0]]}), _runs({"fear": [[3.0, 3.0]]}, strength=2.0)])
    found = sweeps.over_prompts(runs, "value", generator).set_index(["direction", "strength"])["value"]
    assert found.to_dict() == {("fear", 1.0): 1, ("none", 1.0): 0, ("fear", 2.0): 3}


def test_the_interval_has_the_confidence_that_is_set(generator: Generator, monkeypatch: pytest.MonkeyPatch):
    draws = [[float(draw)] for draw in range(41)]
    monkeypatch.setattr(sweeps, "CFG", replace(CFG, confidence=0.5))
    found = sweeps.over_prompts(_runs({"random": draws}), "value", generator)
    assert found[["low", "value", "high"]].to_numpy().tolist() == [[10, 20, 30]]


def _directions(generator: Generator) -> dict[str, torch.Tensor]:
    return {
        "fear": unit(torch.randn(1, 32, generator=generator)),
        "random": unit(torch.randn(2, 32, generator=generator)),
    }


def _runs(values: dict[str, list[list[float]]], strength: float = 1.0) -> pd.DataFrame:
    """One run per direction, draw and prompt, in that nesting."""
    rows = [
        (direction, number, strength, f"prompt {prompt}", 0, value)
        for direction, draws in values.items()
        for number, draw in enumerate(draws)
        for prompt, value in enumerate(draw)
    ]
    return pd.DataFrame(rows, columns=[*RUN, "value"])
