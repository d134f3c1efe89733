"""What recording a long conversation costs, on random weights of GPT-2 small's size and context: `make bench`."""

from dataclasses import replace
from pathlib import Path

import torch
from test_reading import folder, medians, model  # noqa: F401, fixtures
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, DynamicCache

from helpers import recordings, scenarios

TURNS = 60


def test_recording_60_turns(benchmark, folder: Path, model: TransformerBridge) -> None:  # noqa: F811
    """At most 1.5 times a bare Hugging Face forward of the same turns with its KV cache."""
    hugging_face = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    neutral = scenarios.load("neutral")
    turns = tuple(turn for conversation in neutral.conversations for turn in conversation.turns)[:TURNS]
    long = replace(neutral, conversations=(replace(neutral.conversations[0], turns=turns),))
    ids = scenarios.turn_ids(model, long, *long.conversations)

    @torch.no_grad()
    def bare_forward(passes: list[list[int]]) -> None:
        cache = DynamicCache(config=hugging_face.config)
        for part in passes:
            hugging_face(torch.tensor([part]), past_key_values=cache, use_cache=True, logits_to_keep=1)

    def recorded() -> recordings.Recording:
        return recordings.recorded(model, long)[0]

    calls = {
        "at once": lambda: bare_forward([[id_ for turn in ids for id_ in turn]]),
        "by turn": lambda: bare_forward(ids),
        "recorded": recorded,
    }
    seconds = medians(calls)
    by_turn, at_once = (seconds["recorded"] / seconds[way] for way in ("by turn", "at once"))
    print(f"\n{TURNS} given turns: {seconds['recorded']:.1f} s, {by_turn:.2f} times a bare cached pass per turn,")
    print(f"{at_once:.2f} times one bare pass over all of them")
    assert len(recorded().turns) == TURNS
    assert by_turn < 1.5
    benchmark.pedantic(recorded, rounds=1)
