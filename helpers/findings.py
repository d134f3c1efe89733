"""The numbers of the geometry notebook for one reader, so that a null can be asked exactly what the model was asked.

A reader is a model's activations at one depth, or a twin's, or its embeddings; its labels are the texts' own, resampled
or shuffled (see `geometry`). Every number comes back as a value per draw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import Position, pair_residuals, residuals
from helpers.config import CFG
from helpers.decoding import MEASURES, Design, bootstrapped, curve, line, read_by, shuffles
from helpers.emotions import names, neutral_situations, norms, situations, stacked
from helpers.extraction import comprehended
from helpers.geometry import (
    AllDepths,
    Draws,
    centred,
    components,
    geometries,
    means,
    off_diagonal_mean,
    own,
    resampled,
    shuffled,
    similarity_of_geometries,
    square,
)
from helpers.prompts import pairs
from helpers.stats import interval, paired_accuracy, pearson

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Reader:
    """Activations of one model at one position: situations by split, neutral ones, pairs that differ in one number."""

    by_split: Mapping[str, AllDepths]
    neutral: Float[Tensor, "text depth d_model"]
    numeric: Float[Tensor, "side pair depth d_model"]

    @property
    def everything(self) -> AllDepths:
        """All topics together."""
        return torch.cat([self.by_split[split] for split in SPLITS])


def reader(
    model: TransformerBridge, position: Position, given: Mapping[str, Mapping[str, AllDepths]] | None = None
) -> Reader:
    """What a model holds at one position of every situation, of the neutral ones, and of the numeric pairs.

    `given` are the situations by split and position, where they have been read already.
    """
    if given is None:
        tables = {split: situations(split) for split in SPLITS}
        read = {split: comprehended(model, table["text"].tolist())[position] for split, table in tables.items()}
        given = {split: {position: stacked(acts, tables[split])} for split, acts in read.items()}
    numeric = pair_residuals(model, pairs("numeric"), [position])[position]
    neutral = comprehended(model, neutral_situations())[position]
    return Reader({split: given[split][position] for split in SPLITS}, neutral, numeric)


@dataclass(frozen=True)
class Labels:
    """Draws of labels for the vectors that are tested on unseen topics, and for those fitted on all topics."""

    held_out: Design
    every_topic: Draws


def labels(read: Reader, kind: str, generator: Generator, draws: int = CFG.bootstrap_draws) -> Labels:
    """ "own" labels, one draw; "resampled" topics or "shuffled" labels, after one draw of the data as they are."""
    train, test, every = len(read.by_split["train"]), len(read.by_split["test"]), len(read.everything)
    as_is = own(every, len(names()))
    if kind == "own":
        return Labels(Design(own(train, len(names())), torch.arange(test)[None]), as_is)
    if kind not in ("resampled", "shuffled"):
        raise ValueError(f"unknown labels {kind!r}: choose 'own', 'resampled' or 'shuffled'")
    dealt = resampled if kind == "resampled" else shuffled
    design = (bootstrapped if kind == "resampled" else shuffles)(train, test, len(names()), generator, draws)
    return Labels(design, torch.cat([as_is, dealt(every, len(names()), generator, draws)]))


def findings(read: Reader, depth: int, by: Labels, emotion: str = "afraid") -> dict[str, Float[Tensor, "draw"]]:
    """What vectors at one depth show: three measures of decoding, two correlations with human ratings, one share.

    The first component's |r| with valence and the second's with arousal are those of vectors fitted on all topics, and
    the share is that of numeric pairs whose dangerous side lies higher along `emotion`.
    """
    train, test = (read.by_split[split][:, :, depth] for split in ("train", "test"))
    scores = read_by(train, test, by.held_out)
    found = {f"held-out {name}": measure(scores) for name, measure in MEASURES.items()}
    human = norms()
    along = components(means(read.everything[:, :, depth], by.every_topic))[0]
    for number, rating in enumerate(("valence", "arousal")):
        rated = torch.tensor(human[rating].to_numpy(), dtype=torch.float32)
        found[f"|r| of PC{number + 1} with {rating}"] = pearson(along[..., number], rated).abs()
    vector = centred(means(train, by.held_out.fit))[:, names().index(emotion)]
    found["numeric pairs in order"] = paired_accuracy(*(read.numeric[:, :, depth] @ vector.T).mT)
    return found


def survival(
    mine: Reader, depth: int, embeddings: Reader, twins: Mapping[str, Reader], generator: Generator
) -> pd.DataFrame:
    """`findings` and the mean stability over depth, beside the same of every null, and whether they survive.

    The nulls are the embeddings (depth 0 of a Reader of mean positions), the twins at the same depth, and shuffled
    labels with everything fitted anew. `lead` is what the model has more than the best of the readers, with an interval
    over resampled topics, the same for both (the numeric pairs stay as they are). A finding survives if this interval
    lies above 0 and the value above the 97.5th percentile of the shuffles. Raises ValueError without a twin.
    """
    if not twins:
        raise ValueError("nothing survives without a null: give at least one twin")
    resampled_labels, shuffled_labels = (labels(mine, kind, generator) for kind in ("resampled", "shuffled"))
    readers = {"the model": (mine, depth), "embeddings": (embeddings, 0)}
    readers |= {name: (twin, depth) for name, twin in twins.items()}
    found = {name: findings(read, at, resampled_labels) for name, (read, at) in readers.items()}
    shuffles, what = findings(mine, depth, shuffled_labels), "geometry at one depth with another's, r"
    for name, (read, _) in readers.items():
        if name != "embeddings":
            found[name][what] = off_diagonal_mean(_self_similarity(read, resampled_labels.every_topic))
    shuffles[what] = off_diagonal_mean(_self_similarity(mine, shuffled_labels.every_topic))
    rows = []
    for finding, ours in found["the model"].items():
        nulls = {name: found[name][finding] for name in readers if name != "the model" and finding in found[name]}
        best = max(nulls.values(), key=lambda drawn: drawn[0])
        lead = curve((ours - best)[:, None]).iloc[0]
        limit = interval(shuffles[finding][1:], CFG.confidence)[1].item()
        row = {"finding": finding, "the model": ours[0].item()} | {
            name: drawn[0].item() for name, drawn in nulls.items()
        }
        row |= {"shuffled labels, 97.5 %": limit, "lead": lead["value"], "low": lead["low"], "high": lead["high"]}
        survives = lead["low"] > 0 and ours[0] > limit
        rows.append(row | {"survives": "yes" if survives else "no"})
    return pd.DataFrame(rows)


def own_vector(
    model: TransformerBridge, mine: Reader, sentences: Sequence[str], position: Position, depth: int
) -> Float[Tensor, "d_model"]:
    """The vector of an emotion of one's own: mean of its sentences minus mean of all situations.

    Lines without text are left out. Raises ValueError for fewer than two sentences: one has no mean.
    """
    kept = [sentence.strip() for sentence in sentences if sentence.strip()]
    if len(kept) < 2:
        raise ValueError(f"an emotion needs at least two sentences, one per line; got {len(kept)}")
    acts = residuals(model, kept, [position])[position][:, depth]
    return acts.mean(0) - mine.everything[:, :, depth].mean((0, 1))


def stability(
    mine: Reader, twins: Mapping[str, Reader], generator: Generator, halves: int = 20
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Correlation of the emotions' cosines between depths (representational similarity), all topics, and its nulls.

    A table of squares (panel, depth, other, r) and their means over different depths (condition, value, low, high).
    "other topics" is the mean over random halves of the topics, one half at either depth: the same texts share their
    noise at every depth, as those of shuffled labels and twins do.
    """
    resampled, shuffled = (labels(mine, kind, generator).every_topic for kind in ("resampled", "shuffled"))
    found = {
        "same texts": _self_similarity(mine, resampled),
        "other topics": _across_halves(mine, generator, halves),
        "shuffled labels": _self_similarity(mine, shuffled),
    }
    found |= {name: _self_similarity(twin, resampled[:1]) for name, twin in twins.items()}
    squares, numbers = [], []
    for name, drawn in found.items():
        shown = drawn[1:].median(0).values if name == "shuffled labels" else drawn[0]
        squares.append(square(range(len(shown)), shown, ("depth", "other", "r")).assign(panel=name))
        means_of = off_diagonal_mean(drawn)[:, None]
        row = line(means_of[0]) if len(drawn) == 1 else curve(means_of, name == "shuffled labels")
        numbers.append(row.drop(columns="depth").assign(condition=name))
    return pd.concat(squares, ignore_index=True), pd.concat(numbers, ignore_index=True)


def _self_similarity(read: Reader, draws: Draws) -> Float[Tensor, "draw depth depth"]:
    shape = geometries(read.everything, draws)
    return similarity_of_geometries(shape, shape)


def _across_halves(read: Reader, generator: Generator, halves: int) -> Float[Tensor, "1 depth depth"]:
    """Mean over random halves of the topics of the similarity between one half's geometry and the other's."""
    topics, found = len(read.everything), []
    for _ in range(halves):
        order = torch.randperm(topics, generator=generator)
        one, other = (geometries(read.everything[half], own(len(half), len(names()))) for half in order.tensor_split(2))
        found.append(similarity_of_geometries(one, other)[0])
    across = torch.stack(found).mean(0)
    return ((across + across.T) / 2)[None]
