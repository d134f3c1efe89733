"""A model whose vocabulary is larger than its tokenizer's: what has no text is neither shown nor written."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import continuations, directions, output_features, recordings, scenarios, turns
from helpers.config import DATA
from helpers.models import load_model
from helpers.prompts import vocabulary

PADDING = 40


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory):
    """A tiny GPT-2 with rows beyond the tokenizer's, long ones of both signs: without care they win everywhere."""
    folder: Path = tmp_path_factory.mktemp("padded") / "model"
    size = FAMILIES["gpt2"]
    config = AutoConfig.for_model("gpt2", **{**size, "vocab_size": size["vocab_size"] + PADDING, "n_positions": 256})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        rows = 10 * torch.randn(PADDING // 2, size["n_embd"])
        model.get_input_embeddings().weight[-PADDING:] = torch.cat([rows, -rows])
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "bookworm" / file, folder)
    return load_model(str(folder))


def test_the_vocabulary_is_the_tokenizers(padded, model):
    assert vocabulary(padded) == vocabulary(model) == FAMILIES["gpt2"]["vocab_size"]
    assert padded.cfg.d_vocab == vocabulary(padded) + PADDING


def test_the_padding_would_win(padded):
    prompt = torch.tensor([[0, 5, 6]])
    assert padded.original_model(prompt).logits[0, -1].argmax() >= vocabulary(padded)


def test_the_logit_lens_shows_tokens_that_have_a_text(padded):
    vectors = torch.eye(padded.cfg.d_model)[:3]
    assert directions.lens(padded, vectors).shape[1] == vocabulary(padded)
    assert (directions.logit_lens(padded, vectors, range(3))["token"] != "").all()
    scores = output_features.output_scores(padded, 1, vectors, ["The dog ran."])
    assert scores["score"].between(0, 1).all()


@pytest.mark.parametrize("seeds", [None, [1, 2]])
def test_only_tokens_of_the_tokenizer_are_written(padded, seeds):
    found = continuations.generated(padded, ["The dog ran.", "She sang."], 12, seeds=seeds, min_tokens=12)
    assert [len(ids) for ids in found] == [12, 12]
    assert max(map(max, found)) < vocabulary(padded)


@pytest.mark.parametrize("seed", [None, 1])
def test_a_conversation_holds_tokens_of_the_tokenizer_alone(padded, seed):
    talk = scenarios.answered(scenarios.typed("Anna: You are late.\nTom: I know.", ["afraid", "calm"]), 8)
    [each] = recordings.recorded(padded, talk, seed)
    assert each.ids.max() < vocabulary(padded)
    seen = turns.lens(padded, each, top=3)
    assert (seen["token"] != "").all()
