"""Tiny random models, saved as Hugging Face folders with bookworm's tokenizer and loaded through `load_model`.

No network: the hub is switched off before any library reads the environment.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("MODEL", None)
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny: a second thread only waits, here and in kernels

import shutil
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.config import DATA
from helpers.models import load_model

matplotlib.use("Agg")

SIZE = {"vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": True}
WIDE = {
    **SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "gpt2": {**SIZE, "n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": 64},
    "llama": {**WIDE, "num_key_value_heads": 1},
    "gpt_neox": WIDE,
    "qwen3": {**WIDE, "num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {**WIDE, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 16},
    "mistral": {**WIDE, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 16},
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with random weights of one family, larger than freshly drawn ones so that depths differ."""

    def folder(family: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"tiny-{family}"
        if not path.exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
                with torch.no_grad():
                    for weight in model.parameters():
                        if weight.ndim == 2:
                            weight.mul_(8)
            model.save_pretrained(path)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(DATA / "bookworm" / file, path)
        return path

    return folder


@pytest.fixture(scope="session", params=FAMILIES)
def any_model(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> TransformerBridge:
    """A tiny random model of every family in turn."""
    return load_model(str(model_folder(request.param)))


@pytest.fixture(scope="session")
def model(model_folder: Callable[[str], Path]) -> TransformerBridge:
    """A tiny random GPT-2."""
    return load_model(str(model_folder("gpt2")))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
