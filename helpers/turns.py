"""What turns and tokens of a conversation read as, against neutral talk, and the published effects of it, as tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers import effects, readouts, recordings
from helpers.activations import Position, residuals
from helpers.decoding import chosen
from helpers.directions import logits
from helpers.emotions import situations, stacked
from helpers.prompts import vocabulary
from helpers.readouts import Background, References
from helpers.recordings import Recording, TurnPosition
from helpers.scenarios import Scenario

TURNS_AT: dict[Position, TurnPosition] = {"final punctuation": "end of turn", "mean": "mean of turn"}
CALM, JOY = "calm", "happy"
PUBLISHED_DEPTH = 31 / 36  # of Qwen2.5's layers, where the references were said to differ most


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
        states, at = self.states(recording), recording.turn_positions
        return readouts.beyond_neutral(states, at, self.references, self.background)

    def apart(self, recording: Recording) -> Float[Tensor, "turn d_model"]:
        """Every turn's state at the depth, less what neutral turns hold at its position."""
        usual = self.background.states[:, self.depth]
        here = readouts.at_position(self.background, usual, recording.turn_positions)
        return self.states(recording)[:, self.depth] - here


def choice(model: TransformerBridge) -> pd.DataFrame:
    """How well vectors read the validation situations by position and depth, best first (see `decoding.chosen`)."""
    found = {}
    for split in ("train", "validation"):
        told = situations(split)
        acts = residuals(model, told["text"].tolist(), list(TURNS_AT))
        found[split] = {position: stacked(states, told) for position, states in acts.items()}
    return chosen({("situations", p, p): acts for p, acts in found["train"].items()}, found["validation"])


def scale(
    model: TransformerBridge, names: Sequence[str], position: Position, depth: int, neutral: Sequence[Recording]
) -> Scale:
    """What turns are read against: situations at "final punctuation" or "mean", and turns of `recordings.neutral_talk`.

    Raises ValueError for a position at which turns cannot be read.
    """
    if position not in TURNS_AT:
        raise ValueError(f"turns are read at {' or '.join(map(repr, TURNS_AT))}, not at {position!r}")
    background = recordings.background(neutral, TURNS_AT[position])
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
        chances = logits(model, ends[:, depth]).softmax(-1)[:, : vocabulary(model)].topk(top)
        for turn, speaker, values, ids in zip(turns["turn"], turns["speaker"], chances.values, chances.indices):
            words = [model.tokenizer.decode([id_]) for id_ in ids.tolist()]
            rows += [(turn, speaker, depth, rank, *pair) for rank, pair in enumerate(zip(words, values.tolist()), 1)]
    return pd.DataFrame(rows, columns=["turn", "speaker", "depth", "rank", "token", "probability"])


def raw_over_depth(
    recorded: Sequence[Recording], centroids: Float[Tensor, "emotion depth d_model"]
) -> Float[Tensor, "conversation emotion depth"]:
    """Raw cosine of every conversation's turn ends with each reference, mean over its turns, as published."""
    return torch.stack([readouts.cosine(each.at_turns(), centroids).mean(0) for each in recorded])


def raw_and_centred(
    recorded: Sequence[Recording], references: References, depth: int
) -> dict[str, Float[Tensor, "conversation emotion"]]:
    """Mean cosine of every conversation's turn ends with each reference at a depth: raw as published, and centred."""
    raw = [readouts.cosine(each.at_turns(), references.centroids) for each in recorded]
    centred = [readouts.centred_cosine(each.at_turns(), references) for each in recorded]
    means = {"raw": raw, "centred": centred}
    return {name: torch.stack([x[..., depth].mean(0) for x in found]) for name, found in means.items()}


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
    states = recording.at_turns()[:, against.depth] if raw else against.apart(recording)
    return effects.to_opening(states[None])


def fading(recorded: Sequence[Recording], against: Scale, raw: bool) -> Float[Tensor, "conversation"]:
    """How far each conversation's similarity to its opening falls."""
    return torch.cat([effects.fall(similarity_to_opening(each, against, raw)) for each in recorded])


def effects_of(
    scanned: Sequence[Recording],
    control: Sequence[Recording],
    spliced: Sequence[Recording] | None,
    against: Scale,
) -> pd.DataFrame:
    """The published effects of one scenario, beside their control: effect, readout, of, value, low, high.

    `of` is "scenario", "control" or "difference". Calm shock absorber: the control is neutral talk. Fading memory: the
    same conversations spliced, which leaves the distance in tokens and takes away what was said. Intervals are NaN
    for a single conversation; there is no first effect where calm is no reference or a user goes unanswered,
    and no second where a conversation has a single turn.
    """
    rows = []
    absorbs = CALM in against.references.names and all(_is_answered(each) for each in scanned)
    fades = all(len(each.turns) > 1 for each in scanned)
    for readout, raw in (("raw", True), ("beyond neutral", False)):
        if absorbs:
            ours, theirs = (shock_absorber(each, against, raw) for each in (scanned, control))
            rows += _compared("calm shock absorber", readout, ours, theirs, paired=False)
        if fades:
            ours = fading(scanned, against, raw)
            theirs = None if spliced is None else fading(spliced, against, raw)
            rows += _compared("fading memory", readout, ours, theirs, paired=True)
    table = pd.DataFrame(rows, columns=["effect", "readout", "of", "value", "low", "high"])
    return table.astype({"value": float, "low": float, "high": float})


def _is_answered(recording: Recording) -> bool:
    """Whether a turn of the assistant follows one of the user."""
    role = recording.turns["role"]
    return bool(((role == "assistant") & (role.shift() == "user")).any())


def _compared(effect: str, readout: str, ours: Tensor, theirs: Tensor | None, paired: bool) -> list[tuple]:
    found = {"scenario": effects.mean(ours)}
    if theirs is not None:
        found["control"] = effects.mean(theirs)
        found["difference"] = effects.mean(ours - theirs) if paired else effects.difference(ours, theirs)
    return [(effect, readout, of, *value) for of, value in found.items()]
