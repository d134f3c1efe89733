"""Injection sweeps: directions x strengths x prompts (x samples) as tidy tables, one row per run.

A sweep takes `directions` by name, several draws each, and adds strength * unit * direction. With the median residual
norm as unit a strength is relative to the model; with a unit of 1 it is a length in the residual stream. Strength 0
is the same for every direction: it is run once and stands under the direction "none".
"""

from collections.abc import Sequence
from itertools import accumulate

import pandas as pd
import torch
from jaxtyping import Float
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.config import CFG
from helpers.continuations import Added, distinct_ngrams, generated, log_odds, log_probs, perplexity, word_kinds
from helpers.stats import bootstrap_picks, interval

Directions = dict[str, Float[Tensor, "draw d_model"]]


def log_odds_sweep(
    model: TransformerBridge,
    dilemmas: pd.DataFrame,
    depth: int,
    directions: Directions,
    strengths: Sequence[float],
    unit: float = 1.0,
) -> pd.DataFrame:
    """Log-odds (nats) of `act` against `refrain` in every run, and `shift`, their change from strength 0.

    `dilemmas` has the columns prompt, text, act, refrain.
    """
    runs = _grid(dilemmas, directions, strengths, samples=1)
    said = dilemmas.set_index("prompt").loc[runs["prompt"], ["text", "act", "refrain"]]
    asked = [said[column].tolist() for column in said]
    runs["log_odds"] = log_odds(model, *asked, _added(runs, depth, directions, unit)).tolist()
    return shifted(runs, "log_odds")


def text_sweep(
    model: TransformerBridge,
    dilemmas: pd.DataFrame,
    depth: int,
    directions: Directions,
    strengths: Sequence[float],
    unit: float = 1.0,
    n_tokens: int = 40,
    samples: int = 0,
) -> pd.DataFrame:
    """Generated continuations of every run: sample 0 is greedy, 1 and up are sampled at temperature 1.

    Columns beside the run: text, distinct (share of distinct trigrams), perplexity (of the continuation under the
    unsteered model), and words per 100 of every kind in data/lexicons/judgement_words.csv. The same sample of the
    same prompt uses the same noise at every strength.
    """
    runs = _grid(dilemmas, directions, strengths, samples=1 + samples)
    said = dilemmas.set_index("prompt").loc[runs["prompt"]]["text"].tolist()
    number = {prompt: i for i, prompt in enumerate(dilemmas["prompt"])}
    seeds = [
        None if sample == 0 else CFG.seed + 1000 * number[prompt] + sample
        for prompt, sample in zip(runs["prompt"], runs["sample"])
    ]
    written = generated(model, said, n_tokens, _added(runs, depth, directions, unit), seeds)
    end = [model.tokenizer.eos_token_id]  # a continuation that ended at once is scored for ending
    scores = log_probs(model, said, [[ids or end for ids in written]])[0]
    texts = [model.tokenizer.decode(ids) for ids in written]
    words = [max(1, len(text.split())) for text in texts]
    kinds = pd.DataFrame(word_kinds(texts)).mul(100).div(words, axis=0)
    measured = {
        "text": texts,
        "distinct": [distinct_ngrams(ids) for ids in written],
        "perplexity": [perplexity(score) for score in scores],
    }
    return pd.concat([runs.assign(**measured), kinds], axis=1)


def shifted(runs: pd.DataFrame, value: str) -> pd.DataFrame:
    """The same runs with `shift`: a column minus what the same prompt and sample has at strength 0."""
    zero = runs[runs["strength"] == 0].set_index(["prompt", "sample"])[value]
    if zero.empty:
        raise ValueError("the sweep has no strength 0 to compare with")
    before = zero.loc[pd.MultiIndex.from_frame(runs[["prompt", "sample"]])].to_numpy()
    return runs.assign(shift=runs[value] - before)


def over_prompts(runs: pd.DataFrame, value: str, generator: Generator) -> pd.DataFrame:
    """Mean of a column over prompts by direction and strength, with an interval: value, low, high.

    A direction with one draw gets a bootstrap interval over prompts; random directions get the median and the
    quantiles over their draws.
    """
    rows = []
    per_prompt = runs.groupby(["direction", "strength", "draw", "prompt"], sort=False)[value].mean()
    for (direction, strength), group in per_prompt.groupby(level=["direction", "strength"], sort=False):
        table = torch.tensor(group.unstack("prompt").to_numpy(), dtype=torch.float32)  # draw x prompt
        if len(table) == 1:
            centre = table.mean()
            draws = table[0][bootstrap_picks(CFG.bootstrap_draws, table.shape[1], generator)].mean(-1)
        else:
            draws = table.mean(-1)
            centre = draws.quantile(0.5)
        low, high = interval(draws, CFG.confidence)
        rows.append((direction, strength, centre.item(), low.item(), high.item()))
    return pd.DataFrame(rows, columns=["direction", "strength", "value", "low", "high"])


def _grid(dilemmas: pd.DataFrame, directions: Directions, strengths: Sequence[float], samples: int) -> pd.DataFrame:
    """One row per run: direction, draw, strength, prompt, sample."""
    if not all(map(len, [directions, strengths, *directions.values()])):
        raise ValueError("a sweep needs at least one direction, a draw of each, and one strength")
    if "none" in directions:
        raise ValueError('the name "none" belongs to strength 0: give the direction another one')
    steered = [
        (name, draw, float(strength))
        for name, draws in directions.items()
        for draw in range(len(draws))
        for strength in dict.fromkeys(strengths)
        if strength != 0
    ]
    return pd.DataFrame(
        [
            (*which, prompt, sample)
            for which in [("none", 0, 0.0), *steered]
            for prompt in dilemmas["prompt"]
            for sample in range(samples)
        ],
        columns=["direction", "draw", "strength", "prompt", "sample"],
    )


def _added(runs: pd.DataFrame, depth: int, directions: Directions, unit: float) -> Added:
    """Every run's vector: strength * unit * direction, zero for the runs at strength 0."""
    stacked = torch.cat([torch.zeros_like(next(iter(directions.values()))[:1]), *directions.values()])
    sizes = accumulate((len(draws) for draws in directions.values()), initial=1)
    first = {"none": 0, **dict(zip(directions, sizes))}
    rows = torch.tensor([first[name] + draw for name, draw in zip(runs["direction"], runs["draw"])])
    strength = torch.tensor(runs["strength"].to_numpy(), dtype=torch.float32)
    return Added(depth, strength[:, None] * unit * stacked[rows])
