"""Steering sweeps: methods x depths x strengths x prompts (x samples) as one tidy table, one row per run.

A method has a name, a depth and one or more draws; its strength multiplies what one unit of it adds. Strength 0 is the
same for every method: it is run once and stands under the method "none", without a depth.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import progress
from helpers.cells import fingerprint, kept, surroundings
from helpers.config import CFG
from helpers.continuations import generated, log_probs, prompt_ids
from helpers.passes import Batch
from helpers.stats import bootstrap_picks, finite, interval
from helpers.steering import Method, Steer, Steered, check_fits
from helpers.texts import distinct_ngrams, longest_loop, perplexity, word_kinds

Methods = Mapping[int, Mapping[str, Method]]  # by depth, then by name
RUNS = 512  # in one cell, so that a stopped sweep loses little


@dataclass(frozen=True)
class Readers:
    """Vectors that read the stream of the prompts at later depths: mean projection over all tokens but position 0."""

    names: Sequence[str]
    vectors: Mapping[int, Float[Tensor, "name d_model"]]  # by depth

    def __post_init__(self) -> None:
        for depth, vectors in self.vectors.items():
            finite(vectors, f"the reading vectors at depth {depth}")

    def columns(self) -> list[str]:
        """What the table calls them: "afraid at 6" is the vector of afraid at depth 6."""
        return [f"{name} at {depth}" for depth in self.vectors for name in self.names]


@dataclass(frozen=True)
class Writing:
    """Texts to write in every run: `greedy` is sample 0, others are drawn at temperature 1.

    The same sample of the same prompt uses the same noise at every strength, depth and method. `kinds` are the words
    to count.
    """

    n_tokens: int = 40
    samples: Sequence[int] = (0,)
    kinds: Mapping[str, Collection[str]] = field(default_factory=dict)


def sweep(
    model: TransformerBridge,
    prompts: pd.DataFrame,
    methods: Methods,
    strengths: Sequence[float] | pd.DataFrame,
    which: Steered = "both",
    readers: Readers | None = None,
    writing: Writing | None = None,
    onwards: bool = False,
    folder: Path | None = None,
) -> pd.DataFrame:
    """Every method at every depth and strength on every prompt: method, depth, draw, strength, prompt, sample, and

    `kl`: of the next token after the prompt, from the unsteered model to the steered one, in nats;
    `log_odds` of the columns `act` against `refrain` of `prompts`, where it has them, in nats;
    a column per reader and depth, see Readers;
    with `writing`: text, distinct (share of different trigrams), loop (tokens of the longest loop), perplexity (under
    the unsteered model), and words per 100 of every kind.

    `strengths` are those of every method, or a table with strengths for each draw: depth, method, draw, strength, where
    rows without a strength are left out and further columns (a dose, for instance) are added to the runs. `onwards`
    steers at every depth from the given one on, as ablation is usually done. With `folder` the runs are kept there as
    they are done: a stopped sweep goes on where it was, and an identical one is read back. Raises ValueError for a
    sweep without methods or strengths, for a strength that is not finite, for two prompts of one name, and for a run
    that overflows, which it names; the runs before it are kept.
    """
    samples = list(writing.samples) if writing else [0]
    _check(prompts, methods, strengths, samples)
    here = _surroundings(model, prompts["text"].tolist()) if folder else ""
    unsteered: dict[int, Tensor] = {}  # log probabilities of the next token, by prompt
    cells = list(_cells(methods, strengths, len(prompts) * len(samples), model.cfg.n_layers if onwards else 0))
    for cell in cells:
        check_fits(model, cell.method, cell.depths, tuple(readers.vectors) if readers else ())
    total = sum(len(cell.strength) for cell in cells) * len(prompts) * len(samples)
    tables = []
    with progress(total, "run", "sweeping") as bar:
        for cell in cells:
            name = fingerprint(here, cell, prompts, which, readers, writing) if folder else ""

            def run(cell: _Cell = cell) -> pd.DataFrame:
                if cell.method and not unsteered:  # the unsteered runs were read back
                    _scored(model, prompts, range(len(prompts)), None, None, unsteered)
                return _run(model, prompts, cell, which, readers, writing, samples, unsteered)

            tables.append(kept(folder, name, run))
            bar.update(len(tables[-1]))
    runs = pd.concat(tables, ignore_index=True)
    return runs.merge(strengths, "left") if isinstance(strengths, pd.DataFrame) else runs


def shifted(runs: pd.DataFrame, value: str) -> pd.DataFrame:
    """The same runs with `shift`: a column minus what the same prompt and sample has at strength 0."""
    zero = runs[runs["strength"] == 0].set_index(["prompt", "sample"])[value]
    if zero.empty:
        raise ValueError("the sweep has no strength 0 to compare with")
    before = zero.loc[pd.MultiIndex.from_frame(runs[["prompt", "sample"]])].to_numpy()
    return runs.assign(shift=runs[value] - before)


def over_prompts(
    runs: pd.DataFrame, value: str, generator: Generator, by: Sequence[str] = ("method", "strength")
) -> pd.DataFrame:
    """Mean of a column over prompts by method and strength (or other columns), with an interval: value, low, high.

    A method with one draw gets a bootstrap interval over prompts; random directions get the median and the quantiles
    over their draws.
    """
    rows = []
    per_prompt = runs.groupby([*by, "draw", "prompt"], sort=False, dropna=False)[value].mean()
    for key, group in per_prompt.groupby(level=list(by), sort=False, dropna=False):
        table = torch.tensor(group.unstack("prompt").to_numpy(), dtype=torch.float32)  # draw x prompt
        if len(table) == 1:
            centre = table.mean()
            draws = table[0][bootstrap_picks(CFG.bootstrap_draws, table.shape[1], generator)].mean(-1)
        else:
            draws = table.mean(-1)
            centre = draws.quantile(0.5)
        low, high = interval(draws, CFG.confidence)
        rows.append((*key, centre.item(), low.item(), high.item()))
    return pd.DataFrame(rows, columns=[*by, "value", "low", "high"])


def outside(summary: pd.DataFrame, control: str, by: Sequence[str]) -> pd.DataFrame:
    """The rows of a summary but the control's, with `outside`: whether low to high lies clear of the control's range.

    The control is one of its methods, random directions for instance, and is compared within the columns `by`.
    """
    ranges = summary[summary["method"] == control][[*by, "low", "high"]]
    both = summary[summary["method"] != control].merge(ranges, on=list(by), suffixes=("", "_control"))
    clear = (both["low"] > both["high_control"]) | (both["high"] < both["low_control"])
    return both.drop(columns=["low_control", "high_control"]).assign(outside=clear)


def beyond_carried(
    runs: pd.DataFrame, readers: Readers, vectors: Float[Tensor, "draw d_model"], depth: int
) -> Float[Tensor, "draw name"]:
    """The change of each read-out at a depth, mean over prompts, minus what each added vector itself contributes.

    `runs` is a sweep that added `vectors` at strength 1; residual streams carry them along unchanged.
    """
    columns = [f"{name} at {depth}" for name in readers.names]
    before = runs[runs["method"] == "none"][columns].mean().to_numpy()
    after = runs[runs["method"] != "none"].groupby("draw")[columns].mean().to_numpy()
    return torch.tensor(after - before).float() - vectors @ readers.vectors[depth].T


@dataclass(frozen=True)
class _Cell:
    """Runs that are made and kept together: some draws and strengths of one method at one depth."""

    name: str
    depths: tuple[int, ...]
    method: Method | None
    draw: list[int]
    strength: list[float]


def _cells(methods: Methods, strengths: Sequence[float] | pd.DataFrame, each: int, last: int) -> Iterator[_Cell]:
    """The cells of a sweep with `each` runs per draw and strength, which steers at every depth up to the last."""
    yield _Cell("none", (), None, [0], [0.0])
    size = max(1, RUNS // each)
    for depth, here in methods.items():
        for name, method in here.items():
            if isinstance(strengths, pd.DataFrame):
                mine = strengths[(strengths["depth"] == depth) & (strengths["method"] == name)].dropna(
                    subset="strength"
                )
                pairs = list(dict.fromkeys(zip(mine["draw"].tolist(), mine["strength"].tolist())))
            else:
                pairs = [(d, float(s)) for d in range(len(method)) for s in dict.fromkeys(strengths) if s != 0]
            for start in range(0, len(pairs), size):
                draw, strength = zip(*pairs[start : start + size])
                depths = tuple(range(depth, max(depth, last) + 1))
                yield _Cell(name, depths, method, list(draw), list(strength))


def _run(
    model: TransformerBridge,
    prompts: pd.DataFrame,
    cell: _Cell,
    which: Steered,
    readers: Readers | None,
    writing: Writing | None,
    samples: list[int],
    unsteered: dict[int, Tensor],
) -> pd.DataFrame:
    """The cell's rows of the table."""
    count = len(cell.draw)
    runs = pd.DataFrame(
        {
            "method": cell.name,
            "depth": pd.array([min(cell.depths, default=None)], dtype="Int64").repeat(count * len(prompts)),
            "draw": [draw for draw in cell.draw for _ in range(len(prompts))],
            "strength": [strength for strength in cell.strength for _ in range(len(prompts))],
            "prompt": prompts["prompt"].tolist() * count,
        }
    )
    number = list(range(len(prompts))) * count
    runs = runs.assign(**_scored(model, prompts, number, _steer(cell, runs, which), readers, unsteered))
    runs = runs.loc[runs.index.repeat(len(samples))].reset_index(drop=True)
    runs.insert(5, "sample", samples * (count * len(prompts)))
    if writing:
        number = [i for i in number for _ in samples]
        said = [prompts["text"].iloc[i] for i in number]
        seeds = [None if s == 0 else CFG.seed + 1000 * i + s for i, s in zip(number, runs["sample"])]
        runs = pd.concat([runs, written(model, said, seeds, _steer(cell, runs, which), writing)], axis=1)
    return runs


def written(
    model: TransformerBridge,
    prompts: Sequence[str],
    seeds: Sequence[int | None],
    steer: Steer | None,
    writing: Writing,
) -> pd.DataFrame:
    """What each run writes, one row each: text, distinct, loop, perplexity, and words per 100 of every kind."""
    ids = generated(model, prompts, writing.n_tokens, steer, seeds)
    end = [model.tokenizer.eos_token_id]  # a continuation that ended at once is scored for ending
    scores = log_probs(model, prompts, [[each or end for each in ids]])[0]
    texts = [model.tokenizer.decode(each) for each in ids]
    measured = {
        "text": texts,
        "distinct": [distinct_ngrams(each) for each in ids],
        "loop": [longest_loop(each) for each in ids],
        "perplexity": [perplexity(score) for score in scores],
    }
    return pd.concat([pd.DataFrame(measured), word_kinds(texts, writing.kinds)], axis=1)


def _scored(
    model: TransformerBridge,
    prompts: pd.DataFrame,
    number: Sequence[int],
    steer: Steer | None,
    readers: Readers | None,
    unsteered: dict[int, Tensor],
) -> dict[str, list[float]]:
    """What is read after each run's prompt, without writing anything: columns of the table.

    Runs without steering put their log probabilities of the next token into `unsteered`, the others compare with them.
    """
    kl = torch.zeros(len(number))
    reads = {depth: torch.zeros(len(number), len(readers.names)) for depth in readers.vectors} if readers else {}

    def watch(rows: Tensor, batch: Batch, logits: Tensor, stream: dict[int, Tensor]) -> None:
        after = logits.log_softmax(-1)
        if steer is None:
            unsteered.update(zip([number[row] for row in rows], after))
        before = torch.stack([unsteered[number[row]] for row in rows])
        kl[rows] = (before.exp() * (before - after)).sum(-1).cpu()
        inside = batch.prompt[:, : batch.width] & (batch.positions[:, : batch.width] > 0)
        weights = inside / inside.sum(-1, keepdim=True)
        for depth, found in reads.items():
            mean = (weights[:, None].to(stream[depth].device).float() @ stream[depth].float())[:, 0]
            found[rows] = (mean @ readers.vectors[depth].T.to(mean)).cpu()

    ask = [[prompts[column].iloc[i] for i in number] for column in ("act", "refrain") if column in prompts]
    texts = [prompts["text"].iloc[i] for i in number]
    options = log_probs(model, texts, ask, steer, tuple(reads), watch)
    found = {"kl": kl.tolist()}
    if len(options) == 2:
        found["log_odds"] = [(act.sum() - refrain.sum()).item() for act, refrain in zip(*options)]
    if readers:
        columns = torch.cat(list(reads.values()), -1).T.tolist()
        found |= dict(zip(readers.columns(), columns))
    return found


def _steer(cell: _Cell, runs: pd.DataFrame, which: Steered) -> Steer | None:
    if cell.method is None:
        return None
    draw, strength = torch.tensor(runs["draw"].to_numpy()), torch.tensor(runs["strength"].to_numpy()).float()
    return Steer(cell.method, cell.depths, draw, strength, which)


def _surroundings(model: TransformerBridge, texts: list[str]) -> str:
    """The fingerprint of all that is the same for every cell but the sweep's own arguments."""
    vocabulary = repr(sorted(model.tokenizer.get_vocab().items()))
    tokenizer = vocabulary, model.tokenizer.eos_token_id, prompt_ids(model, texts)
    return fingerprint(surroundings(model.original_model, str(model.cfg.device)), tokenizer, CFG.seed)


def _check(
    prompts: pd.DataFrame, methods: Methods, strengths: Sequence[float] | pd.DataFrame, samples: Sequence[int]
) -> None:
    if not (methods and all(methods.values()) and len(strengths)):
        raise ValueError("a sweep needs at least one depth, a method at each, and one strength")
    values = strengths["strength"].dropna() if isinstance(strengths, pd.DataFrame) else strengths
    if odd := [value for value in values if not math.isfinite(value)]:
        raise ValueError(f"a strength is {odd[0]}: give numbers, 0 for no steering")
    if prompts.empty or not samples:
        raise ValueError("a sweep needs at least one prompt and one sample of each")
    if any(not len(method) for here in methods.values() for method in here.values()):
        raise ValueError("a sweep needs at least one draw of every method")
    if any("none" in here for here in methods.values()):
        raise ValueError('the name "none" belongs to strength 0: give the method another one')
    if twice := prompts["prompt"][prompts["prompt"].duplicated()].tolist():
        raise ValueError(f"two prompts have the name {twice[0]!r}")
