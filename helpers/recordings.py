"""What a model holds while it goes through a conversation, recorded turn by turn.

Given turns cost their own tokens once, all that follow each other in one pass; what the model writes is one pass per
token, everything before it standing in the KV cache. Hooks are entered once per recording.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from helpers import scenarios
from helpers.activations import checked_site, progress, site
from helpers.prompts import readable, vocabulary
from helpers.readouts import Background
from helpers.scenarios import Conversation, Scenario, calibration, check_fits, turn_ids

TurnPosition = Literal["end of turn", "mean of turn"]


@dataclass(frozen=True)
class Recording:
    """The residual stream at every recorded token of one conversation, in float32 on the CPU.

    Depth l of `stream` is what enters block l (what attention and MLP of block l - 1 have left); layer l of `attention`
    is the stream between the attention and the MLP of block l, None where it was not recorded.
    """

    conversation: Conversation
    tokens: pd.DataFrame  # one row per recorded token: pos, turn (from 1), speaker, role, token, ends (the turn)
    stream: Float[Tensor, "token depth d_model"]
    attention: Float[Tensor, "token layer d_model"] | None
    ids: Int[Tensor, "pos"]  # the whole conversation as it was read, position 0 included

    def at_turns(self, position: TurnPosition = "end of turn") -> Float[Tensor, "turn depth d_model"]:
        """The stream of every turn: at its last token, or the mean over its tokens (position 0 left out)."""
        if position == "end of turn":
            return self.stream[torch.tensor(self.tokens["ends"].to_numpy())]
        if self.tokens["ends"].all():
            raise ValueError("only the end of every turn was recorded: there is no mean over its tokens")
        inside = self.tokens["pos"].to_numpy() > 0
        turn = self.tokens["turn"].to_numpy()
        return torch.stack([self.stream[(turn == number) & inside].mean(0) for number in sorted(set(turn))])

    @property
    def turn_positions(self) -> Int[Tensor, "turn"]:
        """How many tokens stand before the last one of each turn."""
        return torch.tensor(self.turns["pos"].to_numpy())

    @property
    def turns(self) -> pd.DataFrame:
        """One row per turn: turn, speaker, role, text (as given or written), pos (of its last token)."""
        ends = self.tokens[self.tokens["ends"]]
        return ends[["turn", "speaker", "role", "text", "pos"]].reset_index(drop=True)


def recorded(model: TransformerBridge, scenario: Scenario, seed: int | None = None) -> list[Recording]:
    """A recording of every conversation of the scenario, as it asks for.

    Turns that the model writes are greedy, or sampled with this seed. Raises ValueError, before anything runs, for a
    conversation that does not fit the model's context, and for activations that are not finite.
    """
    check_fits(model, scenario)
    tape, found = _Tape(model, "after attention" in scenario.streams), []
    with (
        torch.no_grad(),
        model.hooks(fwd_hooks=tape.hooks(model)),
        progress(len(scenario.conversations), "conversation", f"recording {scenario.name}") as bar,
    ):
        for conversation in scenario.conversations:
            noise = None if seed is None else torch.Generator().manual_seed(seed)
            found.append(_record(model, scenario, conversation, tape, noise))
            bar.update()
    return found


def neutral_talk(model: TransformerBridge, most: int = 1024) -> list[Recording]:
    """Neutral talk at every position of the context, for `background`.

    The calibration half of the scenario `neutral` (its 1st, 3rd, ... conversation), set one behind the other until the
    context (or `most` tokens) is full; every one of them comes first once. Without what the stream is after attention.
    """
    return recorded(model, replace(scenarios.chained(model, calibration(), most), streams=scenarios.STREAMS[:1]))


def background(talk: Sequence[Recording], position: TurnPosition | Literal["token"]) -> Background:
    """The states of recordings at every token (position 0 left out), or once per turn."""
    if position == "token":
        states = [each.stream[1:] for each in talk]
        at = [torch.tensor(each.tokens["pos"].to_numpy())[1:] for each in talk]
    else:
        states, at = [each.at_turns(position) for each in talk], [each.turn_positions for each in talk]
    return Background(torch.cat(states), torch.cat(at))


def _record(
    model: TransformerBridge, scenario: Scenario, conversation: Conversation, tape: "_Tape", noise: Generator | None
) -> Recording:
    given = turn_ids(model, scenario, conversation)
    tape.rewind(model, sum(len(ids) + turn.write for ids, turn in zip(given, conversation.turns)))
    rows = []
    for number, (ids, turn) in enumerate(zip(given, conversation.turns), 1):
        before = len(tape.ids)
        tape.ids += ids
        text = _written(model, tape, turn.write, noise) if turn.text is None else turn.text
        new = tape.ids[before:]
        rows += [(before + i, number, turn.speaker, turn.role, text, id_) for i, id_ in enumerate(new)]
    if tape.length < len(tape.ids):
        tape.read(model)
    return _recording(model, scenario, conversation, rows, tape)


def _written(model: TransformerBridge, tape: "_Tape", most: int, noise: Generator | None) -> str:
    """Writes a turn until a new line, the end of text, or so many tokens; the text. Its last token may stay unread."""
    written: list[int] = []
    for _ in range(most):
        chance = tape.read(model)[: vocabulary(model)].float().softmax(-1).cpu()
        if chance.isnan().any():
            break  # `_recording` says which activation it was
        id_ = int(chance.argmax()) if noise is None else int(torch.multinomial(chance, 1, generator=noise))
        if id_ == model.tokenizer.eos_token_id or "\n" in model.tokenizer.decode([id_]):
            break
        written.append(id_)
        tape.ids.append(id_)
    return model.tokenizer.decode(written).strip()


class _Tape:
    """Room for one conversation at a time, written from the front by the hooks of every pass."""

    def __init__(self, model: TransformerBridge, attention: bool) -> None:
        self.with_attention = attention
        self.rewind(model, 0)

    def rewind(self, model: TransformerBridge, room: int) -> None:
        """Fresh room for so many tokens; what a recording holds of the last conversation stays its own."""
        layers, d_model = model.cfg.n_layers, model.cfg.d_model
        self.stream = torch.empty(room, layers + 1, d_model)
        self.attention = torch.empty(room, layers, d_model) if self.with_attention else None
        self.cache = DynamicCache(config=model.original_model.config)
        self.ids: list[int] = []
        self.length = self.start = 0

    def read(self, model: TransformerBridge) -> Float[Tensor, "vocab"]:
        """Reads the ids that are still unread, after those before; the logits of what comes next."""
        self.start, self.length = self.length, len(self.ids)
        out = model.original_model(
            input_ids=torch.tensor([self.ids[self.start :]], device=model.cfg.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[0, -1]

    def hooks(self, model: TransformerBridge) -> list:
        depths = [(site(model, depth), self._keep(depth)) for depth in range(model.cfg.n_layers + 1)]
        if not self.with_attention:
            return depths
        attention = [checked_site(model, f"blocks.{layer}.hook_attn_out") for layer in range(model.cfg.n_layers)]
        return depths + [(name, self._keep_attention(layer)) for layer, name in enumerate(attention)]

    def _keep(self, depth: int):
        def keep(resid: Float[Tensor, "1 pos d_model"], hook) -> None:
            self.stream[self.start : self.length, depth] = resid[0]

        return keep

    def _keep_attention(self, layer: int):
        def keep(out: Float[Tensor, "1 pos d_model"], hook) -> None:
            here = slice(self.start, self.length)
            self.attention[here, layer] = self.stream[here, layer] + out[0].to(self.stream)

        return keep


def _recording(
    model: TransformerBridge, scenario: Scenario, conversation: Conversation, rows: list[tuple], tape: _Tape
) -> Recording:
    tokens = pd.DataFrame(rows, columns=["pos", "turn", "speaker", "role", "text", "token"])
    tokens["token"] = readable(model, tokens["token"].tolist())
    tokens["ends"] = ~tokens["turn"].duplicated(keep="last")
    stream, attention = tape.stream[: tape.length], tape.attention
    if not stream.isfinite().all():
        at = int((~stream.isfinite().all(-1)).T.nonzero()[0, 1])  # at the lowest depth: from there it spreads
        where = f"turn {tokens['turn'][at]} of {conversation.name!r}"
        raise ValueError(f"non-finite activation at token {at} ({where}): load the model in float32")
    attention = None if attention is None else attention[: tape.length]
    kept = torch.tensor(tokens["ends"].to_numpy() | (scenario.positions == "every token"))
    attention = None if attention is None else attention[kept]
    rows = tokens[kept.numpy()].reset_index(drop=True)
    return Recording(conversation, rows, stream[kept], attention, torch.tensor(tape.ids))
