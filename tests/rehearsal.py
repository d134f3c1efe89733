"""A Hugging Face cache as a download of gpt2-small and its SAEs leaves it, with random weights: `rehearsal.py FOLDER`.

Names, files, formats, revisions and the architecture are those of the hub. The weights are random, the tokenizer is
bookworm's, whose tokens are fewer than the rows of the embedding. Among the random rows of every SAE's decoder stands
an orthonormal basis of the centred stream, with both signs, so that it explains all of it. A models.csv in the cache
gives what lies there a name of its own: nothing that is made of it can be taken for GPT-2's.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.config import DATA

MODELS = pd.read_csv(DATA / "models.csv", keep_default_na=False).set_index("name")
NAMED, NAME = "gpt2-small", "gpt2-small-rehearsal"
KNOWN = MODELS.loc[NAMED]
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
TEXT = "The dog ran after me down the lane."
CONTEXT, SPREAD = 1024, 2.0  # SD of the logits: as first drawn they hardly differ, and no steering would move them
ON_HUB = [".gitattributes", "README.md", "pytorch_model.bin", "onnx/config.json"]  # listed, but never fetched
BOOKWORM = (DATA / "bookworm" / "tokenizer.json").read_text()


@dataclass(frozen=True)
class Size:
    """What is to be built; GPT-2 small's numbers unless others are given."""

    blocks: int = 12
    d_model: int = 768
    heads: int = 12
    vocabulary: int = 50_257
    d_sae: int = 24_576


def built(hub: Path, size: Size) -> Path:
    """The cache in this folder, made unless it is there already, whole or not at all."""
    if hub.is_dir():
        return hub
    part = hub.with_name(f"{hub.name}.incomplete")
    shutil.rmtree(part, ignore_errors=True)
    save_gpt2(folder_of(part, KNOWN.hub_id), size)
    repository = folder_of(part, KNOWN.sae_hub_id)
    for depth, name in enumerate(sites(size.blocks)):
        save_sae(repository, name, sae_weights(depth, size.d_sae, size.d_model, basis=depth, others=-1.0))
    finish(repository, KNOWN.sae_revision, main=KNOWN.sae_revision)
    renamed = MODELS.rename(index={NAMED: NAME})
    renamed.loc[NAME, ["aliases", "neuronpedia"]] = f"{KNOWN.aliases} {NAMED}", ""
    if size != Size():
        renamed.loc[NAME, "sae_release"] = f"{NAME}-saes"  # the published ids are none of theirs
    renamed.to_csv(part / "models.csv")
    return part.rename(hub)


# The weights


@cache
def directions(d_model: int, seed: int = 0) -> Tensor:
    """An orthonormal basis of the vectors whose mean is 0, then the same with the other sign."""
    drawn = torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(seed))
    drawn[:, 0] = 1
    basis = torch.linalg.qr(drawn).Q[:, 1:].T
    return torch.cat([basis, -basis])


def features_of(depth: int, d_sae: int, d_model: int) -> Tensor:
    """Which feature of this depth's SAE each of the directions is."""
    return torch.randperm(d_sae, generator=torch.Generator().manual_seed(depth))[: 2 * d_model - 2]


def sae_weights(
    depth: int, d_sae: int, d_model: int, basis: int = 0, own: float = 0.0, others: float = 0.0
) -> dict[str, Tensor]:
    """The tensors of an SAE of sae-lens: the directions of a basis among random rows, with a bias for either."""
    generator = torch.Generator().manual_seed(100 + depth)
    planted, at = directions(d_model, basis), features_of(depth, d_sae, d_model)
    rows = torch.nn.functional.normalize(torch.randn(d_sae, d_model, generator=generator), dim=-1)
    rows[at] = planted
    shift = 0.01 * torch.randn(len(planted), generator=generator) @ planted
    bias = torch.full((d_sae,), others).index_fill(0, at, own)
    found = {"W_enc": rows.T.contiguous(), "b_enc": bias, "W_dec": rows, "b_dec": shift}
    return found | ({"scaling_factor": torch.ones(d_sae)} if depth == 0 else {})  # old sae-lens saved it as well


# The cache


def sites(blocks: int) -> list[str]:
    """The hook point of every depth."""
    return [f"blocks.{block}.hook_resid_pre" for block in range(blocks)] + [f"blocks.{blocks - 1}.hook_resid_post"]


def folder_of(hub: Path, hub_id: str) -> Path:
    return hub / f"models--{hub_id.replace('/', '--')}"


def fetch(repository: Path, revision: str, name: str, content: str | dict) -> None:
    """One file as a download leaves it: its content in blobs/ under its hash, and a relative link in the snapshot."""
    part = repository / "blobs" / "incomplete"
    part.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file(content, part, {"format": "pt"})
    else:
        part.write_text(content if isinstance(content, str) else json.dumps(content))
    with part.open("rb") as file:
        blob = part.rename(part.with_name(hashlib.file_digest(file, "sha256").hexdigest()))
    link = repository / "snapshots" / revision / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))


def finish(repository: Path, revision: str, main: str) -> None:
    """What the hub's client keeps beside the files: main's revision, and a list of all that the hub has there."""
    snapshot = repository / "snapshots" / revision
    names = [str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()]
    listed = {name: {"size": 1, "blob_id": "0" * 40} for name in [*names, *ON_HUB]}
    for kept, content in (("refs/main", main), (f"trees/{revision}.json", {"format_version": 1, "files": listed})):
        (repository / kept).parent.mkdir()
        (repository / kept).write_text(content if isinstance(content, str) else json.dumps(content))


def save_gpt2(repository: Path, size: Size) -> Tensor:
    """A random model with the files of openai-community/gpt2; its logits at TEXT.

    There, names of weights lack a prefix, attention masks are stored, and the tokenizer's configuration is bare.
    """
    bpe = json.loads(BOOKWORM)["model"]
    config = {"n_layer": size.blocks, "n_embd": size.d_model, "n_head": size.heads, "n_positions": CONTEXT}
    config |= {"vocab_size": size.vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config.from_dict(config)).eval()
        model.transformer.ln_f.weight.fill_(SPREAD / (0.02 * size.d_model**0.5))
        model.transformer.wpe.weight.add_(0.3 * torch.randn(CONTEXT, 1))  # a mean over d_model, to be centred away
        logits = model(torch.tensor([[0, *Tokenizer.from_str(BOOKWORM).encode(TEXT).ids]])).logits
    masks = {f"h.{block}.attn.bias": torch.ones(1, 1, CONTEXT, CONTEXT).tril() for block in range(size.blocks)}
    files = {
        "config.json": config,
        "model.safetensors": dict(model.transformer.state_dict()) | masks,
        "tokenizer.json": BOOKWORM,
        "tokenizer_config.json": {"model_max_length": CONTEXT},
        "vocab.json": bpe["vocab"],
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in bpe["merges"])]),
    }
    for name, content in files.items():
        fetch(repository, KNOWN.revision, name, content)
    finish(repository, KNOWN.revision, main="0" * 40)  # it has moved on
    return logits


def save_sae(repository: Path, name: str, weights: dict[str, Tensor]) -> None:
    """An SAE with the files of jbloom/GPT2-Small-SAEs-Reformatted, whose configurations sae-lens wrote before 6.0."""
    d_sae, d_model = weights["W_dec"].shape
    config = {
        "model_name": "gpt2-small",
        "hook_point": name,
        "hook_point_layer": int(name.split(".")[1]),
        "hook_point_head_index": None,
        "dataset_path": "Skylion007/openwebtext",
        "is_dataset_tokenized": False,
        "context_size": 128,
        "use_cached_activations": False,
        "cached_activations_path": f"activations/Skylion007_openwebtext/gpt2-small/{name}",
        "d_in": d_model,
        "d_sae": d_sae,
        "expansion_factor": d_sae // d_model,
        "n_batches_in_buffer": 128,
        "total_training_tokens": 300_000_000,
        "store_batch_size": 32,
        "train_batch_size": 4096,
        "device": "cuda",
        "seed": 42,
        "dtype": "torch.float32",
        "b_dec_init_method": "geometric_median",
        "lr": 0.0004,
        "lr_warm_up_steps": 5000,
        "l1_coefficient": 8e-05,
        "use_ghost_grads": False,
        "dead_feature_threshold": 1e-08,
        "log_to_wandb": True,
    }
    fetch(repository, KNOWN.sae_revision, f"{name}/{CONFIG}", config)
    fetch(repository, KNOWN.sae_revision, f"{name}/{WEIGHTS}", weights)
    fetch(repository, KNOWN.sae_revision, f"{name}/sparsity.safetensors", {"sparsity": torch.full((d_sae,), -3.0)})


def main(arguments: Sequence[str]) -> None:
    """Builds the cache; after its folder, sizes may be given as in `blocks=2`."""
    folder, *sizes = arguments
    built(Path(folder), Size(**{name: int(value) for name, _, value in (size.partition("=") for size in sizes)}))


if __name__ == "__main__":
    main(sys.argv[1:])
