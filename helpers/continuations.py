"""What a model says next, steered or not: log probabilities of given continuations, and generated ones.

Every function takes one row per run: a prompt, how it is steered, its continuation or seed.
"""

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import batches, progress, tokens_at_once
from helpers.passes import Batch, forward, left_padded, pointed, prefilled
from helpers.prompts import TooLong, check_whole, tokens, vocabulary
from helpers.steering import Steer, Steering, added, steered

Watch = Callable[[Int[Tensor, "row"], Batch, Tensor, dict[int, Tensor]], None]


def log_probs(
    model: TransformerBridge,
    prompts: Sequence[str],
    options: Sequence[Sequence[str] | Sequence[list[int]]],
    steer: Steer | None = None,
    read_at: tuple[int, ...] = (),
    watch: Watch | None = None,
) -> list[list[Float[Tensor, "token"]]]:
    """Log probability (nats) of every token of each option's continuations: by option, then by run.

    An option holds one continuation per prompt: a text, tokenised apart from its prompt so that the boundary stays,
    or token ids. The prompt is read once for all options. `watch` is shown what every batch of runs gives on the way:
    its runs, the batch, the logits after the prompts, and the stream by depth for the depths `read_at` (a dictionary
    that the next batch overwrites). Raises ValueError for an empty continuation, when prompt and continuation do not
    fit the context, and for logits that are not finite, naming the run.
    """
    before = prompt_ids(model, prompts)
    after = [_option_ids(model, option) for option in options]
    for room in [[0] * len(before), *([len(ids) for ids in option] for option in after)]:
        _check_runs(model, before, room, steer)
    longest = torch.tensor([max([len(ids) for ids in each], default=0) for each in zip(*after)] or [0] * len(before))
    length = torch.tensor([len(ids) for ids in before]) + longest
    found: list[list[Tensor]] = [[torch.empty(0)] * len(before) for _ in options]
    stream: dict[int, Tensor] = {}
    with (
        torch.no_grad(),
        steered(model, steer, read_at) as steering,
        progress(len(before), "run", "scoring") as bar,
    ):
        for rows in batches_of(before, length, 2 * tokens_at_once(model)):
            batch = left_padded(model, [before[r] for r in rows], int(longest[rows].max()))
            pointed(model, steering, steer, rows, batch)
            steering.reading = stream.__setitem__
            cache, logits = prefilled(model, batch, steering, steer)
            steering.reading = None
            check_finite_logits(logits[:, -1].isfinite().all(-1), rows, prompts, steer)
            if watch:
                watch(rows, batch, logits[:, -1].float(), stream)
            first = logits - logits.logsumexp(-1, keepdim=True)
            for option, scores in zip(after, found):
                written = _scores(model, batch, [option[r] for r in rows], cache, first, steering)
                check_finite_logits(written.isfinite().all(-1), rows, prompts, steer)
                for row, score in zip(rows.tolist(), written):
                    scores[row] = score[: len(option[row])]
            bar.update(len(rows))
    return found


def log_odds(
    model: TransformerBridge,
    prompts: Sequence[str],
    act: Sequence[str],
    refrain: Sequence[str],
    steer: Steer | None = None,
) -> Float[Tensor, "run"]:
    """Log probability of `act` minus that of `refrain` after each prompt, in nats, summed over their tokens."""
    for_act, for_refrain = log_probs(model, prompts, [list(act), list(refrain)], steer)
    return torch.stack([a.sum() - r.sum() for a, r in zip(for_act, for_refrain)])


def generated(
    model: TransformerBridge,
    prompts: Sequence[str],
    n_tokens: int,
    steer: Steer | None = None,
    seeds: Sequence[int | None] | None = None,
    temperature: float = 1.0,
    use_cache: bool = True,
    min_tokens: int = 0,
) -> list[list[int]]:
    """Token ids that continue each prompt, up to `n_tokens`, cut before the first end-of-text token.

    A run without seed is greedy; one with a seed is sampled by Gumbel noise drawn for that seed alone, so it does not
    depend on the runs beside it, and runs that share a seed share their noise. Among the first `min_tokens` there is no
    end-of-text token. Raises ValueError when prompt and continuation do not fit the context, and for logits that are
    not finite, naming the run.
    """
    if n_tokens < 1 or not temperature > 0:
        raise ValueError(f"needs at least one token and a temperature above 0, got {n_tokens=} and {temperature=}")
    before = prompt_ids(model, prompts)
    seeds = list(seeds) if seeds is not None else [None] * len(before)
    if len(seeds) != len(before):
        raise ValueError(f"{len(seeds)} seeds for {len(before)} prompts")
    _check_runs(model, before, [n_tokens] * len(before), steer)
    found: list[list[int]] = [[]] * len(before)
    length = torch.tensor([len(ids) + n_tokens for ids in before])
    with (
        torch.no_grad(),
        steered(model, steer) as steering,
        progress(len(before), "text", "writing") as bar,
    ):
        for rows in batches_of(before, length, 32 * tokens_at_once(model)):
            batch = left_padded(model, [before[r] for r in rows], room=n_tokens)
            pointed(model, steering, steer, rows, batch)
            noise = [seeds[r] for r in rows]
            drawn, fine = _decoded(model, batch, steering, steer, noise, temperature, use_cache, min_tokens)
            check_finite_logits(fine, rows, prompts, steer)
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
    ids = generated(model, [prompt] * 2, n_tokens, added(depth, vectors))
    return pd.DataFrame({"run": ["unsteered", "steered"], "text": [model.tokenizer.decode(row) for row in ids]})


def check_finite_logits(
    fine: Bool[Tensor, "row"], runs: Int[Tensor, "row"], prompts: Sequence[str], steer: Steer | None
) -> None:
    """ValueError that names the first run whose logits are not `fine`: its prompt, and how it was steered."""
    if not fine.all():
        run = int(runs[(~fine).nonzero()[0, 0].cpu()])
        how = f"with {steer.of(run)}: stay nearer to 0, or" if steer else "without steering:"
        raise ValueError(
            f"non-finite logits after prompt {run} ({prompts[run][:60]!r}) {how} load the model in float32"
        )


def batches_of(before: list[list[int]], length: Int[Tensor, "run"], batch_tokens: int) -> list[Int[Tensor, "row"]]:
    """Runs grouped by similar length, those of one prompt side by side: they share the blocks below the steering."""
    order = torch.tensor(sorted(range(len(before)), key=before.__getitem__))
    return [order[rows] for rows in batches(length[order], batch_tokens)]


def _scores(
    model: TransformerBridge,
    batch: Batch,
    option: Sequence[list[int]],
    cache,
    first: Float[Tensor, "row 1 vocab"],
    steering: Steering,
) -> Float[Tensor, "row token"]:
    """Log probabilities of one continuation per row, 0 behind its end; `first` has those of what follows the prompts.

    The cache of the prompts is left as it was.
    """
    length = torch.tensor([len(ids) for ids in option])
    more = int(length.max()) - 1
    width = steering.start = batch.width
    ids = batch.ids.clone()
    for row, row_ids in enumerate(option):
        ids[row, width : width + len(row_ids)] = torch.tensor(row_ids)
    chosen = ids[:, width : width + more + 1, None]
    scores = first.gather(-1, chosen[:, :1])[..., 0]
    if more:
        logits = forward(model, Batch(ids, batch.real, width), width, width + more, cache, more).logits
        cache.crop(-more)
        scores = torch.cat([scores, logits.gather(-1, chosen[:, 1:])[..., 0] - logits.logsumexp(-1)], 1)
    steering.start = 0
    return scores.float().cpu().where(torch.arange(more + 1) < length[:, None], 0)


def _decoded(
    model: TransformerBridge,
    batch: Batch,
    steering: Steering,
    steer: Steer | None,
    seeds: Sequence[int | None],
    temperature: float,
    use_cache: bool,
    min_tokens: int,
) -> tuple[Int[Tensor, "row token"], Bool[Tensor, "row"]]:
    """The tokens that fill the batch's room, one step at a time; and for which rows every choice was one of numbers."""
    width, ids = batch.width, batch.ids
    sampled = sorted({seed for seed in seeds if seed is not None})
    generators = [torch.Generator().manual_seed(seed) for seed in sampled]
    noise_row = torch.tensor([sampled.index(seed) if seed is not None else -1 for seed in seeds])
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    fine = ~done
    cache = None
    for end in range(width, ids.shape[1]):
        so_far = Batch(ids, batch.real, width)
        if not use_cache:
            logits = forward(model, so_far, 0, end).logits
        elif cache is None:
            cache, logits = prefilled(model, so_far, steering, steer)
        else:
            steering.start = end - 1
            logits = forward(model, so_far, end - 1, end, cache).logits
        logits = logits[:, -1, : vocabulary(model)].float()
        if end - width < min_tokens and model.tokenizer.eos_token_id < logits.shape[-1]:
            logits[:, model.tokenizer.eos_token_id] = -torch.inf
        if generators:
            vocab = logits.shape[-1]
            gumbel = torch.stack([torch.rand(vocab, generator=g) for g in generators]).log().neg().log().neg()
            gumbel = torch.cat([gumbel, torch.zeros(1, vocab)])[noise_row].to(logits)
            logits = logits / temperature + gumbel
        chosen = logits.argmax(-1, keepdim=True)  # NaN counts as the largest
        fine &= done | logits.gather(-1, chosen)[:, 0].isfinite()
        ids = ids.index_copy(1, torch.tensor([end], device=ids.device), chosen)
        done |= ids[:, end] == model.tokenizer.eos_token_id
        if done.all():
            break
    return ids[:, width : end + 1], fine


def prompt_ids(model: TransformerBridge, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of each prompt, position 0 first, without padding."""
    read = tokens(model, prompts)
    return [row[:length] for row, length in zip(read.ids.tolist(), read.length.tolist())]


def _option_ids(model: TransformerBridge, option: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
    """The tokens of an option's continuations, each different text tokenised once."""
    texts = dict.fromkeys(each for each in option if isinstance(each, str))
    ids = {text: _continuation_ids(model, text) for text in texts}
    return [ids[each] if isinstance(each, str) else _continuation_ids(model, each) for each in option]


def _continuation_ids(model: TransformerBridge, continuation: str | list[int]) -> list[int]:
    if isinstance(continuation, str):
        check_whole(continuation, "a continuation")
        continuation = model.tokenizer(continuation, add_special_tokens=False)["input_ids"]
    if not continuation:
        raise ValueError("a continuation is empty: there is nothing to score")
    if odd := [id_ for id_ in continuation if not 0 <= id_ < model.cfg.d_vocab]:
        raise ValueError(f"there is no token {odd[0]}: {model.cfg.model_name} has 0 to {model.cfg.d_vocab - 1}")
    return continuation


def _check_runs(model: TransformerBridge, before: list[list[int]], room: list[int], steer: Steer | None) -> None:
    if len(room) != len(before):
        raise ValueError(f"{len(room)} continuations for {len(before)} prompts")
    if steer is not None and len(steer.draw) != len(before):
        raise ValueError(f"{len(steer.draw)} steered runs for {len(before)} prompts")
    for number, (ids, more) in enumerate(zip(before, room)):
        if len(ids) + more > model.cfg.n_ctx:
            raise TooLong(
                f"prompt {number} ({len(ids)} tokens) and its continuation ({more}) do not fit the {model.cfg.n_ctx} "
                f"tokens that {model.cfg.model_name} reads: shorten one of them"
            )
