"""Where in depth and text the difference between two versions of a sentence comes to matter for what follows.

Both versions run; then what one holds at a place is put into the other (see `patching`), in both directions, and the
share of the difference between them that this moves is read. Places are named by their part in the sentence, so that
pairs of different lengths can be averaged. Before the changed word both versions are the same, and nothing can move.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.config import CFG
from helpers.patching import Component, Measure, Runs, Swap, ran, swapped
from helpers.prompts import checked_pairs, sides, tokens
from helpers.stats import bootstrap_picks, interval

Giver = Literal["the other version", "another sentence of the same kind"]
GIVERS = get_args(Giver)


@dataclass(frozen=True)
class Trace:
    """Pairs as they ran, emotional versions before neutral ones, and what is measured on each as it is."""

    pairs: pd.DataFrame
    runs: Runs
    places: dict[str, Bool[Tensor, "pair pos"]]
    measured: Float[Tensor, "run measure"]
    names: tuple[str, ...]  # of the measures

    @property
    def total(self) -> Float[Tensor, "pair measure"]:
        """What the emotional version measures more than the neutral one."""
        return self.measured[: len(self.pairs)] - self.measured[len(self.pairs) :]


def aligned(model: TransformerBridge, table: pd.DataFrame) -> pd.DataFrame:
    """The pairs whose versions have equally many tokens and differ in one stretch, with its ends: first, last.

    Positions count position 0. Raises ValueError where this tokenizer leaves fewer than two.
    """
    read, count = tokens(model, sides(checked_pairs(table))), len(table)
    rows = []
    for i in range(count):
        length = int(read.length[i])
        differ = (read.ids[i] != read.ids[count + i])[:length].nonzero()[:, 0].tolist()
        if differ and length == int(read.length[count + i]) and differ == list(range(differ[0], differ[-1] + 1)):
            rows.append((i, differ[0], differ[-1]))
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} of {count} pairs have versions whose tokens correspond: patching needs two")
    kept, first, last = zip(*rows)
    return table.iloc[list(kept)].reset_index(drop=True).assign(first=first, last=last)


def traced(
    model: TransformerBridge,
    pairs: pd.DataFrame,
    stem: str,
    measure: Measure,
    names: Sequence[str],
    components: Sequence[Component],
) -> Trace:
    """Aligned pairs run with `stem` behind them, after which `measure` is taken; `names` are those of its columns."""
    texts = [f"{text} {stem}" for text in sides(pairs)]
    runs = ran(model, texts, components)
    places = _places(model, pairs, runs)
    return Trace(pairs, runs, places, measure(runs.last), tuple(names))


def moved(
    model: TransformerBridge,
    trace: Trace,
    component: Component,
    measure: Measure,
    giver: Giver = "the other version",
    places: Sequence[str] | None = None,
    shift: int = 1,
) -> Float[Tensor, "place layer pair measure"]:
    """How much of the difference moves when a component is swapped at one place and layer (or depth).

    Mean of both directions: what the neutral version gains and what the emotional one loses. Another sentence is the
    pair `shift` rows further on, never one's own: it erases what stood at the place and brings nothing of the other
    version. Half of what the place carries goes with that, where the pairs' own differences average out.
    """
    chosen = list(trace.places if places is None else places)
    swap, count = _swap(trace, chosen, giver, shift), len(trace.pairs)
    layers = range(model.cfg.n_layers + (component == "residual stream"))
    found = swapped(model, trace.runs, swap, component, layers, measure)
    change = found - trace.measured[swap.base]
    gain, loss = change.unflatten(1, (len(chosen), 2, count)).unbind(2)  # layer, place, pair, measure
    return ((gain - loss) / 2).transpose(0, 1)


def heads(model: TransformerBridge, trace: Trace, measure: Measure) -> Float[Tensor, "head layer pair measure"]:
    """The same for every attention head, swapped at all places at once."""
    n_heads = trace.runs.outputs["heads"].shape[3]
    everywhere = torch.stack(list(trace.places.values())).any(0)
    one = _swap(Trace(trace.pairs, trace.runs, {"all": everywhere}, trace.measured, trace.names), ["all"])
    rows = torch.arange(len(one.base)).repeat(n_heads)
    which = torch.eye(n_heads, dtype=torch.bool).repeat_interleave(len(one.base), 0)
    swap = Swap(one.base[rows], one.donor[rows], one.places[rows], one.source[rows], which)
    found = swapped(model, trace.runs, swap, "heads", range(model.cfg.n_layers), measure)
    change = found - trace.measured[swap.base]
    gain, loss = change.unflatten(1, (n_heads, 2, len(trace.pairs))).unbind(2)
    return ((gain - loss) / 2).transpose(0, 1)


def shares(
    trace: Trace, effects: Float[Tensor, "place layer pair measure"], places: Sequence[str], generator: Generator
) -> pd.DataFrame:
    """Share of the pairs' own differences that a swap moves: place, depth, measure, value, low, high.

    The slope, through zero, of what moves on the whole difference over pairs: 1 where a swap carries all of it, 0 where
    what moves has nothing to do with it. (A ratio of means would divide by what may be nothing, where pairs differ this
    way and that.) The interval resamples pairs. NaN where no pair differs.
    """
    picks = torch.cat(
        [torch.arange(len(trace.pairs))[None], bootstrap_picks(CFG.bootstrap_draws, len(trace.pairs), generator)]
    )
    whole = trace.total[picks]  # draw, pair, measure
    rows = []
    for place, by_layer in zip(places, effects):
        for depth, by_pair in enumerate(by_layer):
            share = (by_pair[picks] * whole).sum(1) / whole.square().sum(1)
            low, high = interval(share[1:], CFG.confidence)
            for i, name in enumerate(trace.names):
                rows.append((place, depth, name, share[0, i].item(), low[i].item(), high[i].item()))
    return pd.DataFrame(rows, columns=["place", "depth", "measure", "value", "low", "high"])


def _places(model: TransformerBridge, pairs: pd.DataFrame, runs: Runs) -> dict[str, Bool[Tensor, "pair pos"]]:
    """Parts of the sentence from the changed word on, then the tokens of the stem by their own name."""
    bare = tokens(model, pairs["emotional"].tolist())
    width = runs.read.ids.shape[1]
    at = torch.arange(width)
    first, last = (torch.tensor(pairs[end].to_numpy())[:, None] for end in ("first", "last"))
    stop, end = (bare.length.cpu() - 1)[:, None], runs.read.length.cpu()[: len(pairs), None]
    found = {
        "changed word": (at >= first) & (at <= last),
        "next token": (at == last + 1) & (at < stop),
        "in between": (at > last + 1) & (at < stop),
        "full stop": (at == stop) & (at > last),
    }
    steps = int((end - stop).min()) - 1
    ids = runs.read.ids.cpu()
    for step in range(1, steps + 1):
        name = model.tokenizer.decode([ids[0, int(stop[0]) + step]]).strip() or f"token {step}"
        found[name if name not in found else f"{name} ({step})"] = at == stop + step
    return found


def _swap(trace: Trace, places: Sequence[str], giver: Giver = "the other version", shift: int = 1) -> Swap:
    """One row for every place, direction (into the neutral version first) and pair.

    Where the giver's sentence has no such place, nothing is swapped.
    """
    count = len(trace.pairs)
    own = torch.arange(count)
    other = own if giver == "the other version" else (own + 1 + (shift - 1) % (count - 1)) % count
    if giver == "another sentence of the same kind":
        donors = torch.cat([count + other, other])
    elif giver == "the other version":
        donors = torch.cat([other, count + other])
    else:
        raise ValueError(f"unknown giver {giver!r}: choose from {', '.join(GIVERS)}")
    bases = torch.cat([count + own, own])
    both = {place: trace.places[place] & trace.places[place][other].any(-1, keepdim=True) for place in places}
    where = torch.cat([both[place].repeat(2, 1) for place in places])
    source = torch.cat([_source(trace.places[place], other).repeat(2, 1) for place in places])
    return Swap(bases.repeat(len(places)), donors.repeat(len(places)), where, source)


def _source(place: Bool[Tensor, "pair pos"], other: Int[Tensor, "pair"]) -> Int[Tensor, "pair pos"]:
    """For each token of a place, the token of the other pair's same place: counted from its start, at most its last."""
    at = torch.arange(place.shape[1])
    begins, ends = place.float().argmax(-1), place.shape[1] - 1 - place.flip(-1).float().argmax(-1)
    source = begins[other][:, None] + at - begins[:, None]
    source = torch.minimum(source, ends[other][:, None]).clamp(min=0)
    return torch.where(place, source, at)
