"""Continuations, scored and generated, against plain loops over one unpadded text without a cache."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers import continuations
from helpers.activations import site
from helpers.continuations import generated, log_odds, log_probs
from helpers.models import load_model
from helpers.passes import Batch
from helpers.steering import added

# A short prompt, one longer than the tiny models' sliding window of 16 tokens, one that comes twice.
PROMPTS = [
    "He fell!",
    "I walked home along the quiet road, past the church and the mill, and at last I sat down by it and",
    "The dog ran after me down the lane, and",
    "He fell!",
]
ACT = [" ran", " said nothing at all.", " I shouted for help", " got up again and walked on"]
REFRAIN = [" went on", ", and slept", " I kept quiet until it was gone,", " wept"]
WHICH = ("prompt", "generated", "both")
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def test_log_probs_are_those_of_a_plain_forward_pass(any_model: TransformerBridge):
    for option, found in zip((ACT, REFRAIN), log_probs(any_model, PROMPTS, [ACT, REFRAIN])):
        for prompt, continuation, scores in zip(PROMPTS, option, found):
            torch.testing.assert_close(scores, _scored(any_model, prompt, continuation), **CLOSE)


@pytest.mark.parametrize("which", WHICH)
def test_steered_log_probs_are_those_of_a_plain_steered_pass(
    any_model: TransformerBridge, generator: Generator, which: str
):
    for depth in (0, 1, any_model.cfg.n_layers):
        vectors = _vectors(any_model, generator)
        both = log_probs(any_model, PROMPTS, [ACT, REFRAIN], added(depth, vectors, which))
        for option, found in zip((ACT, REFRAIN), both):
            for prompt, continuation, vector, scores in zip(PROMPTS, option, vectors, found):
                plain = _scored(any_model, prompt, continuation, depth, vector, which)
                torch.testing.assert_close(scores, plain, **CLOSE)


@pytest.mark.parametrize("how", ["unsteered", *WHICH])
def test_what_is_watched_is_a_plain_pass_of_every_prompt_and_of_each_run_once(
    any_model: TransformerBridge, generator: Generator, monkeypatch: pytest.MonkeyPatch, how: str
):
    vectors, read_at = _vectors(any_model, generator), (1, 2, any_model.cfg.n_layers)
    steer = None if how == "unsteered" else added(1, vectors, how)
    for at_once, n_batches in ((1024, 1), (1, 4)):
        monkeypatch.setattr(continuations, "tokens_at_once", lambda model, at_once=at_once: at_once)
        shown = []

        def watch(rows: Tensor, batch: Batch, logits: Tensor, stream: dict[int, Tensor], shown: list = shown) -> None:
            assert list(stream) == list(read_at)
            of_rows = zip(rows.tolist(), logits, batch.prompt[:, : batch.width], *stream.values(), strict=True)
            shown.append([(row, after, [each[real] for each in streams]) for row, after, real, *streams in of_rows])

        log_probs(any_model, PROMPTS, [ACT, REFRAIN], steer, read_at, watch)
        assert len(shown) == n_batches
        runs = sorted((run for batch in shown for run in batch), key=lambda run: run[0])
        assert [row for row, *_ in runs] == [0, 1, 2, 3]
        for (_, after, streams), prompt, vector in zip(runs, PROMPTS, vectors):
            ids = _ids(any_model, prompt)
            plain = (any_model, ids, 1, vector, _where(len(ids), len(ids), how) if steer else ())
            torch.testing.assert_close(after, _logits(*plain)[-1], **CLOSE)
            for depth, stream in zip(read_at, streams):
                torch.testing.assert_close(stream, _stream(depth, *plain), **CLOSE)


def test_watching_without_options_shows_the_same_and_scores_nothing(any_model: TransformerBridge, generator: Generator):
    steer, seen = added(1, _vectors(any_model, generator)), {True: {}, False: {}}
    for scored, shown in seen.items():

        def watch(rows: Tensor, batch: Batch, logits: Tensor, stream: dict[int, Tensor], shown: dict = shown) -> None:
            shown.update({row: (each, there[-2:]) for row, each, there in zip(rows.tolist(), logits, stream[2])})

        found = log_probs(any_model, PROMPTS, [ACT] if scored else [], steer, (2,), watch)
        assert len(found) == scored
    for row in range(4):
        torch.testing.assert_close(seen[True][row], seen[False][row], **CLOSE)


def test_watching_does_not_change_the_scores(any_model: TransformerBridge, generator: Generator):
    steer = added(1, _vectors(any_model, generator))
    watched = log_probs(any_model, PROMPTS, [ACT, REFRAIN], steer, (1, 3), lambda *shown: None)
    torch.testing.assert_close(watched, log_probs(any_model, PROMPTS, [ACT, REFRAIN], steer), atol=0, rtol=0)


def test_nothing_is_read_unless_a_depth_is_named(model: TransformerBridge):
    shown = []
    log_probs(model, PROMPTS, [ACT], watch=lambda rows, batch, logits, stream: shown.append(dict(stream)))
    assert shown == [{}]


def test_reading_below_the_steered_depth_or_above_the_model_is_refused(model: TransformerBridge):
    steer = added(2, torch.ones(4, model.cfg.d_model))
    for read_at, told in (((1, 3), "steering at depth 2 does not reach depth 1"), ((4,), "depth 4 is out of range")):
        with pytest.raises(ValueError, match=told):
            log_probs(model, PROMPTS, [ACT], steer, read_at)


def test_a_wrong_number_of_steered_runs_is_refused_without_options_too(model: TransformerBridge):
    for count in (2, 5):
        with pytest.raises(ValueError, match=f"{count} steered runs for 4 prompts"):
            log_probs(model, PROMPTS, [], added(1, torch.ones(count, model.cfg.d_model)))


def test_a_batch_scores_as_its_rows_do_one_by_one(
    any_model: TransformerBridge, generator: Generator, monkeypatch: pytest.MonkeyPatch
):
    steer = added(1, _vectors(any_model, generator))
    together = [log_odds(any_model, PROMPTS, ACT, REFRAIN, each) for each in (None, steer)]
    monkeypatch.setattr(continuations, "tokens_at_once", lambda model: 1)
    alone = [log_odds(any_model, PROMPTS, ACT, REFRAIN, each) for each in (None, steer)]
    torch.testing.assert_close(together, alone, **CLOSE)


def test_options_scored_together_score_as_they_do_apart(any_model: TransformerBridge, generator: Generator):
    long = [" a" * 40, " b", " c d e", " f" * 20]
    for steer in (None, added(2, _vectors(any_model, generator))):
        together = log_probs(any_model, PROMPTS, [ACT, long, REFRAIN, ACT], steer)
        apart = [log_probs(any_model, PROMPTS, [option], steer)[0] for option in (ACT, long, REFRAIN, ACT)]
        torch.testing.assert_close(together, apart, **CLOSE)


def test_a_batch_may_be_wider_than_the_context_that_each_run_fits(any_model: TransformerBridge):
    prompts, option = ["He", "no" + " no" * 55], [" yes" * 58, " no"]
    lengths = [_ids(any_model, prompt) + _token_ids(any_model, c) for prompt, c in zip(prompts, option)]
    assert max(map(len, lengths)) <= any_model.cfg.n_ctx < 55 + 58
    for prompt, continuation, scores in zip(prompts, option, log_probs(any_model, prompts, [option])[0]):
        torch.testing.assert_close(scores, _scored(any_model, prompt, continuation), **CLOSE)


def test_token_ids_score_as_their_text(model: TransformerBridge):
    ids = [_token_ids(model, text) for text in ACT]
    torch.testing.assert_close(log_probs(model, PROMPTS, [ids]), log_probs(model, PROMPTS, [ACT]))


def test_log_odds_sum_over_the_tokens_of_each_side(model: TransformerBridge):
    for_act, for_refrain = log_probs(model, PROMPTS, [ACT, REFRAIN])
    by_hand = [sum(a.tolist()) - sum(r.tolist()) for a, r in zip(for_act, for_refrain)]
    assert [len(scores) for scores in for_act] == [len(_token_ids(model, text)) for text in ACT]
    np.testing.assert_allclose(log_odds(model, PROMPTS, ACT, REFRAIN), by_hand, atol=1e-4)
    np.testing.assert_allclose(log_odds(model, PROMPTS, REFRAIN, ACT), -np.array(by_hand), atol=1e-4)


def test_greedy_text_takes_the_likeliest_token_at_every_step(any_model: TransformerBridge):
    assert generated(any_model, PROMPTS, 8) == [_written(any_model, prompt, 8) for prompt in PROMPTS]


def test_steered_text_is_that_of_a_plain_loop(any_model: TransformerBridge, generator: Generator):
    prompts, written = PROMPTS[:3], {which: [] for which in WHICH}
    for depth in (1, any_model.cfg.n_layers):
        vectors = _vectors(any_model, generator)[:3]
        for which in WHICH:
            texts = generated(any_model, prompts, 5, added(depth, vectors, which))
            assert texts == [_written(any_model, p, 5, depth, v, which) for p, v in zip(prompts, vectors)]
            written[which] += texts
    assert written["prompt"] != written["generated"] != written["both"] != written["prompt"]


@pytest.mark.parametrize("seeds", [None, [3, 4, 5, 3]], ids=["greedy", "sampled"])
def test_a_batch_writes_as_its_rows_do_one_by_one_and_without_a_cache(
    any_model: TransformerBridge, generator: Generator, monkeypatch: pytest.MonkeyPatch, seeds: list[int] | None
):
    steer = added(1, _vectors(any_model, generator))
    together = generated(any_model, PROMPTS, 10, steer, seeds)
    assert generated(any_model, PROMPTS, 10, steer, seeds, use_cache=False) == together
    monkeypatch.setattr(continuations, "tokens_at_once", lambda model: 0)
    assert generated(any_model, PROMPTS, 10, steer, seeds) == together


def test_a_sample_depends_on_its_own_seed_alone(model: TransformerBridge):
    texts = generated(model, PROMPTS, 10, seeds=[3, 4, 5, 6])
    turned = generated(model, PROMPTS[::-1], 10, seeds=[6, 5, 4, 3])
    assert turned[::-1] == texts
    assert generated(model, PROMPTS, 10, seeds=[7, 4, None, 8])[1] == texts[1]
    assert generated(model, PROMPTS[1:2], 10, seeds=[4]) == texts[1:2]
    assert texts[0] != texts[3]  # the same prompt with another seed
    torch.manual_seed(1)
    assert generated(model, PROMPTS, 10, seeds=[3, 4, 5, 6]) == texts


def test_runs_with_one_seed_share_its_noise(model: TransformerBridge):
    texts = generated(model, PROMPTS, 6, seeds=[3, 3, None, 3], temperature=2.0)
    plain = [_written(model, prompt, 6, seed=seed, temperature=2.0) for prompt, seed in zip(PROMPTS, [3, 3, None, 3])]
    assert texts == plain
    assert texts[0] == texts[3]


@pytest.mark.parametrize("temperature", [0.15, 0.3])  # low, since a random model's distribution is nearly flat
def test_samples_follow_the_models_distribution(model: TransformerBridge, temperature: float):
    draws = 700
    texts = generated(model, PROMPTS[:1] * draws, 1, seeds=range(draws), temperature=temperature)
    probability = (_logits(model, _ids(model, PROMPTS[0]))[-1] / temperature).softmax(-1)
    counted = torch.bincount(torch.tensor([ids[0] if ids else 0 for ids in texts]), minlength=len(probability))
    common = probability.topk(5).indices
    error = (probability * (1 - probability) / draws).sqrt()
    assert ((counted / draws - probability).abs() < 4 * error)[common].all()
    assert probability[common].max() > 0.02  # enough for the check to mean something


@pytest.mark.parametrize("which", WHICH)
def test_a_planted_token_is_written_where_it_was_planted(any_model: TransformerBridge, which: str):
    unembedding = any_model.original_model.get_output_embeddings().weight
    token = int(unembedding.norm(dim=-1).argmax())
    planted = 1000 * unembedding[token] / unembedding[token].norm()
    steer = added(any_model.cfg.n_layers, planted.expand(len(PROMPTS), -1), which)
    for first, *rest in generated(any_model, PROMPTS, 4, steer):
        # the prompt's last token decides the first one written, each written one the next
        assert (first == token) == (which != "generated")
        assert rest == [token] * 3 or which == "prompt"


def test_a_text_is_cut_before_its_first_end_and_the_others_go_on(
    model_folder: Callable[[str], Path],
):
    model = load_model(str(model_folder("gpt2")))  # one of its own, to be given another end
    whole = generated(model, PROMPTS, 8)
    end = whole[1][3]
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(end)
    cut = generated(model, PROMPTS, 8)
    assert cut == [ids[: ids.index(end)] if end in ids else ids for ids in whole]
    assert len(cut[1]) <= 3
    assert max(map(len, cut)) == 8
    assert generated(model, PROMPTS[1:2], 8) == cut[1:2]


def test_no_end_is_written_among_the_first_tokens_and_then_it_is(model_folder: Callable[[str], Path]):
    """The model always prefers its end of text: a vector along that token's unembedding, added at the last depth."""
    for family in ("gpt2", "gemma2"):
        model = load_model(str(model_folder(family)))  # one of its own, to be given another end
        unembedding = model.original_model.get_output_embeddings().weight
        end = int(unembedding.norm(dim=-1).argmax())
        model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(end)
        planted = 1000 * unembedding[end] / unembedding[end].norm()
        steer = added(model.cfg.n_layers, planted.expand(len(PROMPTS), -1))
        assert generated(model, PROMPTS, 6, steer) == generated(model, PROMPTS, 6, steer, min_tokens=0) == [[]] * 4
        for least in (1, 3, 6, 9):
            texts = generated(model, PROMPTS, 6, steer, [None, 1, 2, None], 0.1, min_tokens=least)
            assert [len(ids) for ids in texts] == [min(least, 6)] * 4
            assert not any(end in ids for ids in texts)


@pytest.mark.parametrize("seeds", [None, [3, 4, 5, 3]], ids=["greedy", "sampled"])
def test_a_text_with_a_least_length_takes_the_best_token_but_the_end(
    model_folder: Callable[[str], Path], seeds: list[int] | None
):
    """Nothing changes before the end would have come, and what follows reads what was written instead of it."""
    model = load_model(str(model_folder("gpt2")))
    whole = generated(model, PROMPTS, 8, seeds=seeds)
    assert generated(model, PROMPTS, 8, seeds=seeds, min_tokens=8) == whole
    end = whole[1][3]
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(end)
    found = generated(model, PROMPTS, 8, seeds=seeds, min_tokens=8)
    for prompt, ids, before, seed in zip(PROMPTS, found, whole, seeds or [None] * 4):
        place = before.index(end) if end in before else 8
        assert len(ids) == 8 and end not in ids and ids[:place] == before[:place]
        assert ids == _written(model, prompt, 8, seed=seed, never=end)


def test_an_empty_continuation_is_refused(model: TransformerBridge):
    for empty in ("", []):
        with pytest.raises(ValueError, match="a continuation is empty"):
            log_probs(model, PROMPTS[:1], [[empty]])


def test_what_does_not_fit_the_context_is_refused_with_both_lengths(model: TransformerBridge):
    prompt = _ids(model, PROMPTS[1])
    for call in (
        lambda n: log_probs(model, PROMPTS[:2], [[[5], [5] * n]]),
        lambda n: generated(model, PROMPTS[:2], n),
    ):
        call(64 - len(prompt))
        with pytest.raises(ValueError, match=rf"prompt 1 \({len(prompt)} tokens\).*\({65 - len(prompt)}\).*64 tokens"):
            call(65 - len(prompt))


def test_a_wrong_number_of_vectors_seeds_or_continuations_is_refused(model: TransformerBridge):
    two = added(1, torch.ones(2, model.cfg.d_model))
    with pytest.raises(ValueError, match="2 steered runs for 4 prompts"):
        log_odds(model, PROMPTS, ACT, REFRAIN, two)
    with pytest.raises(ValueError, match="2 steered runs for 4 prompts"):
        generated(model, PROMPTS, 2, two)
    with pytest.raises(ValueError, match="3 seeds for 4 prompts"):
        generated(model, PROMPTS, 2, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="3 continuations for 4 prompts"):
        log_probs(model, PROMPTS, [ACT, REFRAIN[:3]])


def _ids(model: TransformerBridge, prompt: str) -> list[int]:
    return [model.tokenizer.bos_token_id, *_token_ids(model, prompt)]


def _token_ids(model: TransformerBridge, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def _vectors(model: TransformerBridge, generator: Generator) -> Tensor:
    """One vector per prompt, about as long as the residual stream."""
    return 2 * torch.randn(len(PROMPTS), model.cfg.d_model, generator=generator)


def _logits(
    model: TransformerBridge,
    ids: Sequence[int],
    depth: int = 0,
    vector: Tensor | None = None,
    where: Sequence[int] = (),
) -> Tensor:
    """Logits of one text without padding, batch or cache, with a vector added at some of its positions."""
    with torch.no_grad(), model.hooks(fwd_hooks=_hooks(model, depth, vector, where)):
        return model.original_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def _hooks(model: TransformerBridge, depth: int, vector: Tensor | None, where: Sequence[int]) -> list:
    def add(resid: Tensor, hook) -> Tensor:
        resid = resid.clone()
        for position in where:
            resid[0, position] += vector
        return resid

    return [(site(model, depth), add)] if vector is not None else []


def _stream(depth_read: int, model: TransformerBridge, ids: Sequence[int], *steering: object) -> Tensor:
    """The residual stream of one text in the pass of `_logits`, steered likewise."""
    kept = []
    keep = (site(model, depth_read), lambda resid, hook: kept.append(resid[0].clone()))
    with torch.no_grad(), model.hooks(fwd_hooks=[*_hooks(model, *steering), keep]):
        model.original_model(input_ids=torch.tensor([ids]), use_cache=False)
    return kept[0]


def _where(n_prompt: int, n_all: int, which: str) -> range:
    return {"prompt": range(1, n_prompt), "generated": range(n_prompt, n_all), "both": range(1, n_all)}[which]


def _scored(
    model: TransformerBridge,
    prompt: str,
    continuation: str,
    depth: int = 0,
    vector: Tensor | None = None,
    which: str = "both",
) -> Tensor:
    before, after = _ids(model, prompt), _token_ids(model, continuation)
    where = _where(len(before), len(before + after), which)
    scores = _logits(model, before + after, depth, vector, where).log_softmax(-1)
    return torch.stack([scores[len(before) - 1 + i, token] for i, token in enumerate(after)])


def _written(
    model: TransformerBridge,
    prompt: str,
    n_tokens: int,
    depth: int = 0,
    vector: Tensor | None = None,
    which: str = "both",
    seed: int | None = None,
    temperature: float = 1.0,
    never: int | None = None,
) -> list[int]:
    before = ids = _ids(model, prompt)
    noise = torch.Generator().manual_seed(seed) if seed is not None else None
    for _ in range(n_tokens):
        logits = _logits(model, ids, depth, vector, _where(len(before), len(ids), which))[-1]
        if never is not None:
            logits[never] = -torch.inf
        if noise is not None:
            logits = logits / temperature - torch.rand(len(logits), generator=noise).log().neg().log()
        ids = [*ids, int(logits.argmax())]
    return ids[len(before) :]


@pytest.mark.parametrize("wrong", [{"n_tokens": 0}, {"n_tokens": 4, "temperature": 0.0}])
def test_no_tokens_and_no_temperature_are_refused(model: TransformerBridge, wrong: dict):
    with pytest.raises(ValueError, match="at least one token and a temperature above 0"):
        generated(model, PROMPTS, **wrong)
