"""What a model says next, steered or not: log probabilities of given continuations, and generated ones.

Prompts are padded on the left with an explicit attention mask, so continuations are aligned and logits are computed
at their positions only. Every function takes one row per run: a prompt, its vector, its continuation or seed.
"""

import csv
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import batches, progress, tokens_at_once
from helpers.config import DATA
from helpers.prompts import first_token, tokens
from helpers.steering import Steered, Steering, steered, steering_mask


@dataclass(frozen=True)
class Added:
    """A vector per run to add to the residual stream at a depth, and the tokens that get it."""

    depth: int
    vectors: Float[Tensor, "run d_model"]
    which: Steered = "both"


def log_probs(
    model: TransformerBridge,
    prompts: Sequence[str],
    options: Sequence[Sequence[str] | Sequence[list[int]]],
    added: Added | None = None,
) -> list[list[Float[Tensor, "token"]]]:
    """Log probability (nats) of every token of each option's continuations: by option, then by run.

    An option holds one continuation per prompt: a text, tokenised apart from its prompt so that the boundary stays,
    or token ids. The prompt is read once for all options. Raises ValueError for an empty continuation, and when
    prompt and continuation do not fit the context.
    """
    before = _prompt_ids(model, prompts)
    after = [[_continuation_ids(model, continuation) for continuation in option] for option in options]
    for option in after:
        _check_runs(model, before, [len(ids) for ids in option], added)
    longest = torch.tensor([max(len(ids) for ids in each) for each in zip(*after)])
    length = torch.tensor([len(ids) for ids in before]) + longest
    found: list[list[Tensor]] = [[torch.empty(0)] * len(before) for _ in options]
    with (
        torch.no_grad(),
        steered(model, *_start(model, added)) as steering,
        progress(len(before), "run", "scoring") as bar,
    ):
        for rows in batches(length, tokens_at_once(model)):
            room = int(longest[rows].max())
            batch = _left_padded(model, [before[r] for r in rows], room)
            _steer(steering, added, rows, batch, room)
            read = _read(model, batch, room, [tuple(before[r]) if added is None else int(r) for r in rows])
            for option, scores in zip(after, found):
                written = _scores(model, batch, [option[r] for r in rows], *read, steering)
                for row, score in zip(rows, written):
                    scores[row] = score
            bar.update(len(rows))
    return found


def log_odds(
    model: TransformerBridge,
    prompts: Sequence[str],
    act: Sequence[str],
    refrain: Sequence[str],
    added: Added | None = None,
) -> Float[Tensor, "run"]:
    """Log probability of `act` minus that of `refrain` after each prompt, in nats, summed over their tokens."""
    for_act, for_refrain = log_probs(model, prompts, [list(act), list(refrain)], added)
    return torch.stack([a.sum() - r.sum() for a, r in zip(for_act, for_refrain)])


def generated(
    model: TransformerBridge,
    prompts: Sequence[str],
    n_tokens: int,
    added: Added | None = None,
    seeds: Sequence[int | None] | None = None,
    temperature: float = 1.0,
    use_cache: bool = True,
    min_tokens: int = 0,
) -> list[list[int]]:
    """Token ids that continue each prompt, up to `n_tokens`, cut before the first end-of-text token.

    A run without seed is greedy; one with a seed is sampled by Gumbel noise drawn for that seed alone, so it does not
    depend on the runs beside it, and runs that share a seed share their noise. Among the first `min_tokens` there is no
    end-of-text token. Raises ValueError when prompt and continuation do not fit the context.
    """
    if n_tokens < 1 or not temperature > 0:
        raise ValueError(f"needs at least one token and a temperature above 0, got {n_tokens=} and {temperature=}")
    before = _prompt_ids(model, prompts)
    seeds = list(seeds) if seeds is not None else [None] * len(before)
    if len(seeds) != len(before):
        raise ValueError(f"{len(seeds)} seeds for {len(before)} prompts")
    _check_runs(model, before, [n_tokens] * len(before), added)
    found: list[list[int]] = [[]] * len(before)
    length = torch.tensor([len(ids) + n_tokens for ids in before])
    with (
        torch.no_grad(),
        steered(model, *_start(model, added)) as steering,
        progress(len(before), "text", "writing") as bar,
    ):
        for rows in batches(length, 8 * tokens_at_once(model)):
            batch = _left_padded(model, [before[r] for r in rows], room=n_tokens)
            _steer(steering, added, rows, batch, n_tokens)
            drawn = _decoded(
                model, batch, n_tokens, [seeds[r] for r in rows], temperature, use_cache, steering, min_tokens
            )
            for row, ids in zip(rows, drawn.tolist()):
                end = model.tokenizer.eos_token_id
                found[row] = ids[: ids.index(end)] if end in ids else ids
            bar.update(len(rows))
    return found


def side_by_side(
    model: TransformerBridge, prompt: str, depth: int, vector: Float[Tensor, "d_model"], n_tokens: int = 40
) -> pd.DataFrame:
    """The greedy continuation of a prompt without and with a vector added at a depth: columns run, text."""
    vectors = torch.stack([torch.zeros_like(vector), vector])
    ids = generated(model, [prompt] * 2, n_tokens, Added(depth, vectors))
    return pd.DataFrame({"run": ["unsteered", "steered"], "text": [model.tokenizer.decode(row) for row in ids]})


def perplexity(scores: Float[Tensor, "token"]) -> float:
    """exp of the mean negative log probability per token; NaN for no tokens."""
    return float(scores.mean().neg().exp())


def distinct_ngrams(ids: Sequence[int], n: int = 3) -> float:
    """Share of a text's n-grams that are different ones (Li et al. 2016); 1 for a text shorter than n.

    A loop of period p in a long text comes near p over its length. A loop can have a low perplexity, so a score
    counts only beside this one.
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def word_kinds(texts: Sequence[str]) -> list[dict[str, int]]:
    """How many words of each kind (hedging, direct action, negation: data/lexicons) each text has."""
    with open(DATA / "lexicons" / "judgement_words.csv", newline="") as file:
        kind_of = {row["word"]: row["kind"] for row in csv.DictReader(file)}
    kinds = sorted(set(kind_of.values()))
    found = []
    for text in texts:
        words = re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower().replace("’", "'"))
        found.append({kind: sum(kind_of.get(word) == kind for word in words) for kind in kinds})
    return found


@dataclass(frozen=True)
class _Batch:
    """Left-padded prompts, then columns that wait for a continuation."""

    ids: Int[Tensor, "row pos"]
    real: Bool[Tensor, "row pos"]  # False at padding; True at the columns to come

    @property
    def positions(self) -> Int[Tensor, "row pos"]:
        return (self.real.cumsum(-1) - 1).clamp(min=0)


def _left_padded(model: TransformerBridge, rows: Sequence[list[int]], room: int) -> _Batch:
    width = max(len(ids) for ids in rows)
    ids = torch.full((len(rows), width + room), first_token(model))
    real = torch.zeros(len(rows), width + room, dtype=torch.bool)
    for row, row_ids in enumerate(rows):
        ids[row, width - len(row_ids) : width] = torch.tensor(row_ids)
        real[row, width - len(row_ids) :] = True
    return _Batch(ids.to(model.cfg.device), real.to(model.cfg.device))


def _forward(
    model: TransformerBridge, batch: _Batch, start: int, end: int, cache=None, use_cache=False, logits: int = 1
):
    """The model's output for columns `start` to `end`, those before `start` standing in the cache."""
    return model.original_model(
        input_ids=batch.ids[:, start:end],
        attention_mask=batch.real[:, :end].long(),
        position_ids=batch.positions[:, start:end].clamp(max=model.cfg.n_ctx - 1),  # columns no row of which is read
        past_key_values=cache,
        use_cache=use_cache,
        logits_to_keep=logits,
    )


def _read(model: TransformerBridge, batch: _Batch, room: int, alike: Sequence[Hashable]):
    """The cache of the batch's prompts, and the logits after them; rows that are alike are computed once."""
    place = {key: i for i, key in enumerate(dict.fromkeys(alike))}
    once = torch.tensor([alike.index(key) for key in place])
    out = _forward(model, _Batch(batch.ids[once], batch.real[once]), 0, batch.ids.shape[1] - room, use_cache=True)
    cache, logits = out.past_key_values, out.logits[:, -1:]
    cache.activate_past_recording()  # so that a sliding window can be cropped after each option
    if len(once) == len(alike):
        return cache, logits
    back = torch.tensor([place[key] for key in alike], device=logits.device)
    cache.batch_select_indices(back)
    return cache, logits[back]


def _scores(
    model: TransformerBridge, batch: _Batch, option: Sequence[list[int]], cache, logits: Tensor, steering: Steering
) -> list[Tensor]:
    """Log probabilities of one continuation per row after the prompts in the cache, which is left as it was."""
    more = max(len(ids) for ids in option) - 1
    width = steering.start = cache.get_seq_length()
    ids = batch.ids.clone()
    for row, row_ids in enumerate(option):
        ids[row, width : width + len(row_ids)] = torch.tensor(row_ids)
    if more:
        out = _forward(model, _Batch(ids, batch.real), width, width + more, cache, True, more)
        logits = torch.cat([logits, out.logits], 1)
        cache.crop(-more)
    steering.start = 0
    chosen = ids[:, width : width + more + 1, None]
    scores = (logits.gather(-1, chosen)[..., 0] - logits.logsumexp(-1)).float().cpu()
    return [score[: len(row_ids)] for score, row_ids in zip(scores, option)]


def _decoded(model, batch, n_tokens, seeds, temperature, use_cache, steering, min_tokens) -> Int[Tensor, "row token"]:
    """The tokens that fill the batch's room, one step at a time."""
    width = batch.ids.shape[1] - n_tokens
    ids, cache, seen = batch.ids, None, 0
    sampled = sorted({seed for seed in seeds if seed is not None})
    generators = [torch.Generator().manual_seed(seed) for seed in sampled]
    noise_row = torch.tensor([sampled.index(seed) if seed is not None else -1 for seed in seeds])
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for end in range(width, width + n_tokens):
        steering.start = seen
        out = _forward(model, _Batch(ids, batch.real), seen, end, cache, use_cache)
        if use_cache:
            cache, seen = out.past_key_values, end
        logits = out.logits[:, -1].float()
        if end - width < min_tokens and model.tokenizer.eos_token_id < logits.shape[-1]:
            logits[:, model.tokenizer.eos_token_id] = -torch.inf
        if generators:
            vocab = logits.shape[-1]
            gumbel = torch.stack([torch.rand(vocab, generator=g).log().neg().log().neg() for g in generators])
            gumbel = torch.cat([gumbel, torch.zeros(1, vocab)])[noise_row].to(logits)
            logits = logits / temperature + gumbel
        ids = ids.index_copy(1, torch.tensor([end], device=ids.device), logits.argmax(-1, keepdim=True))
        done |= ids[:, end] == model.tokenizer.eos_token_id
        if done.all():
            break
    return ids[:, width : end + 1]


def _prompt_ids(model: TransformerBridge, prompts: Sequence[str]) -> list[list[int]]:
    read = tokens(model, prompts)
    return [row[:length].tolist() for row, length in zip(read.ids, read.length)]


def _continuation_ids(model: TransformerBridge, continuation: str | list[int]) -> list[int]:
    if isinstance(continuation, str):
        continuation = model.tokenizer(continuation, add_special_tokens=False)["input_ids"]
    if not continuation:
        raise ValueError("a continuation is empty: there is nothing to score")
    return continuation


def _check_runs(model: TransformerBridge, before: list[list[int]], room: list[int], added: Added | None) -> None:
    if len(room) != len(before):
        raise ValueError(f"{len(room)} continuations for {len(before)} prompts")
    if added is not None and len(added.vectors) != len(before):
        raise ValueError(f"{len(added.vectors)} vectors for {len(before)} prompts")
    for number, (ids, more) in enumerate(zip(before, room)):
        if len(ids) + more > model.cfg.n_ctx:
            raise ValueError(
                f"prompt {number} ({len(ids)} tokens) and its continuation ({more}) do not fit the {model.cfg.n_ctx} "
                f"tokens that {model.cfg.model_name} reads: shorten one of them"
            )


def _start(model: TransformerBridge, added: Added | None) -> tuple[int, Tensor, Tensor]:
    """Arguments of `steered` before the first batch: without steering, a vector that is added nowhere."""
    depth, vectors = (added.depth, added.vectors) if added else (0, torch.zeros(1, model.cfg.d_model))
    return depth, vectors, torch.zeros(len(vectors), 0, dtype=torch.bool)


def _steer(steering: Steering, added: Added | None, rows: Tensor, batch: _Batch, room: int) -> None:
    """Point the steering at these rows, whose last `room` columns are continuation."""
    steering.start = 0
    if added is None:
        steering.mask = torch.zeros_like(batch.real[:1])  # one row stands for all
        return
    width = batch.ids.shape[1] - room
    prompt, continuation = batch.real.clone(), batch.real.clone()
    prompt[:, width:], continuation[:, :width] = False, False
    steering.mask = steering_mask(prompt, continuation, added.which)
    steering.vectors = added.vectors[rows].to(batch.real.device)
