"""The "CT scan" of a conversation: what a model reads in it, turn by turn and token by token, against neutral talk.

    python -m helpers.scan argument --model gpt2-small
    python -m helpers.scan my_scenario.yaml --out scans/mine

writes the tables of the notebook and a report to open in a browser.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers import effects, readouts, recordings
from helpers.activations import Position, residuals
from helpers.decoding import chosen
from helpers.emotions import situations, stacked
from helpers.patching import logits
from helpers.readouts import Background, References
from helpers.recordings import Recording, TurnPosition
from helpers.scenarios import Scenario

TURNS_AT: dict[Position, TurnPosition] = {"final punctuation": "end of turn", "mean": "mean of turn"}
CALM, JOY = "calm", "happy"
PUBLISHED_DEPTH = 31 / 36  # of Qwen2.5's layers, where the references were said to differ most
ENOUGH = 3  # conversations, below which an interval over them says nothing


@dataclass(frozen=True)
class Scale:
    """What states are read against: references and neutral states at the same position, and the depth to read at."""

    references: References
    background: Background
    position: TurnPosition
    depth: int

    def states(self, recording: Recording) -> Float[Tensor, "turn depth d_model"]:
        return recording.at_turns(self.position)

    def beyond_neutral(self, recording: Recording) -> Float[Tensor, "turn emotion depth"]:
        """Every turn's `readouts.beyond_neutral`."""
        at = torch.tensor(recording.turns["pos"].to_numpy())
        return readouts.beyond_neutral(self.states(recording), at, self.references, self.background)


def choice(model: TransformerBridge) -> pd.DataFrame:
    """How well vectors read the validation situations by position and depth, best first (see `decoding.chosen`)."""
    found = {}
    for split in ("train", "validation"):
        told = situations(split)
        acts = residuals(model, told["text"].tolist(), list(TURNS_AT))
        found[split] = {position: stacked(states, told) for position, states in acts.items()}
    return chosen({("situations", p, p): acts for p, acts in found["train"].items()}, found["validation"])


def scale(model: TransformerBridge, names: Sequence[str], position: Position, depth: int) -> Scale:
    """What turns are read against: situations and neutral turns at "final punctuation" or "mean".

    Raises ValueError for a position at which turns cannot be read.
    """
    if position not in TURNS_AT:
        raise ValueError(f"turns are read at {' or '.join(map(repr, TURNS_AT))}, not at {position!r}")
    background = recordings.neutral_background(model, TURNS_AT[position])
    return Scale(readouts.from_texts(model, names, position), background, TURNS_AT[position], depth)


def by_turn(scenario: Scenario, recorded: Sequence[Recording], against: Scale) -> pd.DataFrame:
    """Every turn and reference: scenario, conversation, turn, speaker, role, text, emotion, and the read-outs.

    These are cosine, error, overlap (raw, as published), centred and beyond neutral, at the scale's depth.
    """
    tables, references, depth = [], against.references, against.depth
    for each in recorded:
        states = against.states(each)
        found = {
            "cosine": readouts.cosine(states, references.centroids),
            "error": readouts.absolute_error(states, references.centroids),
            "overlap": readouts.overlap(states, references.centroids),
            "centred": readouts.centred_cosine(states, references),
            "beyond neutral": against.beyond_neutral(each),
        }
        emotions = len(references.names)
        rows = each.turns.loc[each.turns.index.repeat(emotions)].reset_index(drop=True)
        rows["emotion"] = list(references.names) * len(states)
        rows = rows.assign(**{name: values[..., depth].flatten().tolist() for name, values in found.items()})
        tables.append(rows.assign(conversation=each.conversation.name))
    return pd.concat(tables, ignore_index=True).assign(scenario=scenario.name)


def by_token(recording: Recording, references: References, background: Background) -> pd.DataFrame:
    """Every token, emotion and depth: pos, turn, speaker, token, emotion, depth, value (`readouts.beyond_neutral`).

    The background is that of tokens; position 0 is left out.
    """
    kept = recording.tokens["pos"].to_numpy() > 0
    rows = recording.tokens[kept]
    states, at = recording.stream[torch.tensor(kept)], torch.tensor(rows["pos"].to_numpy())
    values = readouts.beyond_neutral(states, at, references, background)
    count = values[0].numel()
    table = rows.loc[rows.index.repeat(count), ["pos", "turn", "speaker", "token"]].reset_index(drop=True)
    depths = values.shape[2]
    table["emotion"] = [name for name in references.names for _ in range(depths)] * len(rows)
    table["depth"] = list(range(depths)) * (len(rows) * len(references.names))
    return table.assign(value=values.flatten().tolist())


def lens(model: TransformerBridge, recording: Recording, top: int = 1) -> pd.DataFrame:
    """What every depth would say next at the end of each turn: turn, speaker, depth, rank, token, probability.

    The logit lens (nostalgebraist 2020): final norm and unembedding applied to the stream, at the last depth the
    model's own prediction.
    """
    ends, turns = recording.at_turns("end of turn"), recording.turns
    rows = []
    for depth in range(ends.shape[1]):
        chances = logits(model, ends[:, depth]).softmax(-1).topk(top)
        for turn, speaker, values, ids in zip(turns["turn"], turns["speaker"], chances.values, chances.indices):
            words = [model.tokenizer.decode([id_]) for id_ in ids.tolist()]
            rows += [(turn, speaker, depth, rank, *pair) for rank, pair in enumerate(zip(words, values.tolist()), 1)]
    return pd.DataFrame(rows, columns=["turn", "speaker", "depth", "rank", "token", "probability"])


def raw_over_depth(
    recorded: Sequence[Recording], centroids: Float[Tensor, "emotion depth d_model"]
) -> Float[Tensor, "conversation emotion depth"]:
    """Raw cosine of every conversation's turn ends with each reference, mean over its turns, as published."""
    return torch.stack([readouts.cosine(each.at_turns(), centroids).mean(0) for each in recorded])


def published_depth(model: TransformerBridge) -> int:
    """The depth at the same fraction of this model."""
    return round(PUBLISHED_DEPTH * model.cfg.n_layers)


def shock_absorber(recorded: Sequence[Recording], against: Scale, raw: bool) -> Float[Tensor, "conversation"]:
    """How much the gap in calm from user to assistant grows over each conversation (last third minus first third).

    Raw cosines as published, or read beyond neutral.
    """
    place, found = against.references.names.index(CALM), []
    for each in recorded:
        cosines = readouts.cosine(each.at_turns(), against.references.centroids)
        values = cosines if raw else against.beyond_neutral(each)
        by_user = torch.tensor((each.turns["role"] == "user").to_numpy())
        found.append(effects.growth(effects.gaps(values[None, :, place, against.depth], by_user)))
    return torch.cat(found)


def similarity_to_opening(recording: Recording, against: Scale, raw: bool) -> Float[Tensor, "1 later"]:
    """Cosine of every later turn with the first: of raw turn ends as published, or less what neutral turns hold."""
    if raw:
        states = recording.at_turns()[None, :, against.depth]
        return effects.to_opening(states, torch.zeros_like(states[:, :1]))
    at = torch.tensor(recording.turns["pos"].to_numpy())
    usual = readouts.at_position(against.background, against.background.states[:, against.depth], at)
    return effects.to_opening(against.states(recording)[None, :, against.depth], usual[None])


def fading(recorded: Sequence[Recording], against: Scale, raw: bool) -> Float[Tensor, "conversation"]:
    """How far each conversation's similarity to its opening falls."""
    return torch.cat([effects.fall(similarity_to_opening(each, against, raw)) for each in recorded])


def effects_of(
    scanned: Sequence[Recording],
    control: Sequence[Recording],
    spliced: Sequence[Recording] | None,
    against: Scale,
    generator: Generator,
) -> pd.DataFrame:
    """The published effects of one scenario, beside their control: effect, readout, of, value, low, high.

    `of` is "scenario", "control" or "difference". Calm shock absorber: the control is neutral talk. Fading memory: the
    same conversations spliced, which leaves the distance in tokens and takes away what was said. Without intervals
    for fewer than three conversations.
    """
    rows = []
    for readout, raw in (("raw", True), ("beyond neutral", False)):
        if CALM in against.references.names:
            ours, theirs = (shock_absorber(each, against, raw) for each in (scanned, control))
            rows += _compared("calm shock absorber", readout, ours, theirs, generator, paired=False)
        ours = fading(scanned, against, raw)
        theirs = None if spliced is None else fading(spliced, against, raw)
        rows += _compared("fading memory", readout, ours, theirs, generator, paired=True)
    return pd.DataFrame(rows, columns=["effect", "readout", "of", "value", "low", "high"])


def _compared(
    effect: str, readout: str, ours: Tensor, theirs: Tensor | None, generator: Generator, paired: bool
) -> list[tuple]:
    found = {"scenario": effects.mean(ours, generator)}
    if theirs is not None:
        found["control"] = effects.mean(theirs, generator)
        found["difference"] = (
            effects.mean(ours - theirs, generator) if paired else effects.difference(ours, theirs, generator)
        )
    known = len(ours) >= ENOUGH
    return [(effect, readout, of, v, *((a, b) if known else (None, None))) for of, (v, a, b) in found.items()]
