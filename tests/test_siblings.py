"""The five siblings differ in architecture alone: same tokens, tokenizer and settings, nearly as many weights."""

import json

import pandas as pd
import pytest
from safetensors.torch import load_file
from test_build import build
from transformers import AutoModelForCausalLM

from helpers.activations import POSITIONS
from helpers.claims import siblings
from helpers.config import DATA
from helpers.models import known_models, load_model
from helpers.prompts import passages, tokens

NAMES = siblings()
FOLDERS = {name: DATA / known_models().loc[name, "folder"] for name in NAMES}


def told(name: str, file: str) -> dict:
    return json.loads((FOLDERS[name] / file).read_text(encoding="utf-8"))


def test_there_is_one_of_each_family():
    assert [told(name, "training.json")["settings"]["family"] for name in NAMES] == list(build.FAMILIES)


def test_all_see_identical_token_ids():
    """Of any text, as every one of them is loaded; and in training: one corpus, cut and ordered alike."""
    texts = [passage[:400] for passage in passages()[:40]]
    first, *others = [tokens(load_model(name), texts).ids for name in NAMES]
    assert all(first.equal(ids) for ids in others)
    bytes_of = {(FOLDERS[name] / "tokenizer.json").read_bytes() for name in NAMES}
    assert len(bytes_of) == 1
    corpora = [told(name, "training.json")["corpus"] for name in NAMES]
    assert all(corpus == corpora[0] for corpus in corpora) and len(corpora[0]["sha256"]) == 64
    orders = [
        [build.batch_rows(step, 5000, build.Settings(**build.SIBLING, family=family)) for step in (0, 7, 400)]
        for family in build.FAMILIES
    ]
    assert all(order == orders[0] for order in orders)


def test_all_were_trained_alike():
    settings = [told(name, "training.json")["settings"] for name in NAMES]
    for each in settings:
        each.pop("family")
        each.pop("snapshots")  # weights kept on the way change nothing
    assert all(each == settings[0] for each in settings)
    assert len({told(name, "training.json")["tokens_seen"] for name in NAMES}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_sibling_is_small_tied_half_precision_and_of_its_own_class(name):
    model = AutoModelForCausalLM.from_pretrained(FOLDERS[name])
    assert model.num_parameters() <= 2.5e6
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {str(weight.dtype) for weight in load_file(FOLDERS[name] / "model.safetensors").values()} == {
        "torch.float16"
    }
    assert float(known_models().loc[name, "parameters"]) == round(model.num_parameters() / 1e6, 1)


def test_they_have_nearly_as_many_weights_and_take_less_than_30_mb():
    counts = [AutoModelForCausalLM.from_pretrained(folder).num_parameters() for folder in FOLDERS.values()]
    assert max(counts) < 1.02 * min(counts)
    files = [path for path in (DATA / "siblings").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 30e6


def test_the_card_quotes_evaluations_of_the_shipped_weights():
    card = (DATA / "siblings" / "README.md").read_text(encoding="utf-8")
    for name, folder in FOLDERS.items():
        measured, config = told(name, "evaluation.json"), told(name, "config.json")
        assert measured["weights_sha256"] == build.sha256(folder / "model.safetensors")
        loss = f"| {measured['nats_per_token']:.2f} | {measured['bits_per_character']:.2f} |"
        row = next(
            line for line in card.splitlines() if line.startswith(f"| {name} | `{config['architectures'][0]}` |")
        )
        assert row.endswith(loss)
    assert f"{told(NAMES[0], 'training.json')['tokens_seen']:,}" in card


def test_the_csv_over_training_has_every_snapshot_position_and_depth():
    kept = told("sibling-gpt2", "training.json")
    table = pd.read_csv(DATA / "siblings" / "emergence.csv")
    assert sorted(table["tokens"].unique()) == [*kept["settings"]["snapshots"], kept["tokens_seen"]]
    assert sorted(table["position"].unique()) == sorted(POSITIONS)
    rows = table.groupby(["tokens", "position"])["depth"].apply(sorted)
    assert all(depths == list(range(kept["settings"]["layers"] + 1)) for depths in rows)
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()
