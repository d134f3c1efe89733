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
    def bare_forward() -> None:
        cache = DynamicCache(config=hugging_face.config)
        for turn in ids:
            hugging_face(torch.tensor([turn]), past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def from_the_start() -> None:
        before: list[int] = []
        for turn in ids:
            before = before + turn
            hugging_face(torch.tensor([before]), use_cache=False, logits_to_keep=1)

    def recorded() -> recordings.Recording:
        return recordings.recorded(model, long)[0]

    seconds = medians({"bare, cached": bare_forward, "recorded": recorded, "again from the start": from_the_start})
    ratio = seconds["recorded"] / seconds["bare, cached"]
    again = seconds["again from the start"] / seconds["recorded"]
    print(f"\n{TURNS} turns: {seconds['recorded']:.1f} s, {ratio:.2f} times a bare cached pass;")
    print(f"reading everything again at every turn takes {again:.1f} x as long")
    assert len(recorded().turns) == TURNS
    assert ratio < 1.5
    benchmark.pedantic(recorded, rounds=1)
