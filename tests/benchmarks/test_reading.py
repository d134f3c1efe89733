"""What reading every depth costs, on random weights of GPT-2 small's size: `make bench`.

Ratios of calls that take turns within one run; the machine's own speed drops out.
"""

import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from helpers.activations import batches, residuals, tokens_at_once
from helpers.config import DATA
from helpers.models import load_model
from helpers.prompts import pairs, sides, tokens

ROUNDS = 3
torch.set_num_threads(os.cpu_count() or 1)  # the tests beside this folder use one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of GPT-2 small's size and vocabulary, with bookworm's tokenizer."""
    path = tmp_path_factory.mktemp("gpt2-size")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "bookworm" / file, path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> TransformerBridge:
    return load_model(str(folder))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return sides(pairs("fear_calm"))[:100]


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each call, taken in turns after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: median(taken[1:]) for name, taken in seconds.items()}


def peak() -> float:
    """Largest memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_reading_13_depths_of_100_prompts(benchmark, folder: Path, model: TransformerBridge, texts: list[str]) -> None:
    """At most 1.15 times a bare Hugging Face forward, a third of the usual loop, and under 300 MB more memory."""
    hugging_face = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    read = tokens(model, texts)
    ids = [read.rows(rows).ids for rows in batches(read.length, tokens_at_once(model))]

    @torch.no_grad()
    def bare_forward() -> None:
        for batch in ids:
            hugging_face.transformer(input_ids=batch, use_cache=False)

    @torch.no_grad()
    def usual_loop() -> None:
        for row, length in zip(read.ids, read.length):
            model.run_with_cache(row[None, :length])

    bare_forward()
    before = peak()
    residuals(model, texts)
    extra = peak() - before

    calls = {"forward": bare_forward, "residuals": lambda: residuals(model, texts), "loop": usual_loop}
    seconds = medians(calls)
    against_forward, against_loop = seconds["residuals"] / seconds["forward"], seconds["loop"] / seconds["residuals"]
    benchmark.extra_info |= {"against_forward": against_forward, "against_loop": against_loop, "extra_mb": extra}
    benchmark.pedantic(residuals, args=(model, texts), rounds=3)
    print(
        f"\nreading 13 depths of 100 prompts: {against_forward:.2f} x a bare batched forward, "
        f"{against_loop:.1f} x faster than the usual loop, {extra:.0f} MB extra"
    )
    assert against_forward <= 1.15
    assert against_loop >= 3
    assert extra < 300
