"""A rehearsal of gpt2-small with its published SAEs: from the hub's cache, as a download leaves it, with the hub off.

Names, files, formats, revisions and the architecture are those of the hub. The weights are random, the tokenizer and
its smaller vocabulary are bookworm's. Every SAE but one is small: the directions of an orthonormal basis of the centred
stream, with both signs, which explain all of it and nothing of the raw stream's mean. One has its published size and
holds the same directions among random ones.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
from huggingface_hub import constants
from sae_lens import SAE
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.activations import at_positions, every_token
from helpers.config import DATA
from helpers.features import at_words, on_passages, pursuit, token_activations, top
from helpers.models import description, known_models, load_model
from helpers.prompts import key_words, passages, tokens, word_positions
from helpers.saes import dashboard, decoder_rows, load_sae, reconstruction
from helpers.similarity import cosines, nearest, rows_of, top_by_depth

KNOWN = known_models().loc["gpt2-small"]
SITES = [f"blocks.{block}.hook_resid_pre" for block in range(12)] + ["blocks.11.hook_resid_post"]
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
D_MODEL, D_SAE, LARGE = 768, 24_576, 7  # the depth of the SAE that has its published size
TEXT = "The dog ran after me down the lane."
WORDS = key_words("key word", "find").head(3)
PASSAGES = passages()[:2]
ON_HUB = [".gitattributes", "README.md", "pytorch_model.bin", "onnx/config.json"]  # listed, but never fetched

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs"),
    pytest.mark.filterwarnings(f"ignore:The SAE at depth {LARGE} explains"),
]

# What is planted


@cache
def directions() -> Tensor:
    """An orthonormal basis of the vectors whose mean is 0, then the same with the other sign."""
    drawn = torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(0))
    drawn[:, 0] = 1
    basis = torch.linalg.qr(drawn).Q[:, 1:].T
    return torch.cat([basis, -basis])


def size(depth: int) -> int:
    return D_SAE if depth == LARGE else len(directions())


def features_of(depth: int) -> Tensor:
    """Which feature of this depth's SAE each of the directions is."""
    return torch.randperm(size(depth), generator=torch.Generator().manual_seed(depth))[: len(directions())]


@cache
def sae_weights(depth: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + depth)
    rows = torch.nn.functional.normalize(torch.randn(size(depth), D_MODEL, generator=generator), dim=-1)
    rows[features_of(depth)] = directions()
    bias = 0.01 * torch.randn(len(directions()), generator=generator) @ directions()
    threshold = torch.full((size(depth),), -0.5 if depth == LARGE else 0.0)
    found = {"W_enc": rows.T.contiguous(), "b_enc": threshold, "W_dec": rows, "b_dec": bias}
    return found | ({"scaling_factor": torch.ones(size(depth))} if depth == 0 else {})  # old sae-lens saved it as well


def planted_activations(depth: int, acts: Tensor) -> Tensor:
    weights = sae_weights(depth)
    return ((acts - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()


# The cache


def folder_of(hub: Path, hub_id: str) -> Path:
    return hub / f"models--{hub_id.replace('/', '--')}"


def sae_file(hub: Path, depth: int, name: str) -> Path:
    return folder_of(hub, KNOWN.sae_hub_id) / "snapshots" / KNOWN.sae_revision / SITES[depth] / name


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


def save_gpt2(repository: Path) -> Tensor:
    """A random model with the files of openai-community/gpt2; its logits at TEXT.

    There, names of weights lack a prefix, attention masks are stored, and the tokenizer's configuration is bare.
    """
    bookworm = (DATA / "bookworm" / "tokenizer.json").read_text()
    bpe = json.loads(bookworm)["model"]
    config = {"n_layer": 12, "n_embd": D_MODEL, "n_head": 12, "n_positions": 1024, "vocab_size": len(bpe["vocab"])}
    config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config.from_dict(config)).eval()
        model.transformer.wpe.weight.add_(0.3 * torch.randn(1024, 1))  # a mean over d_model, to be centred away
        logits = model(torch.tensor([[0, *Tokenizer.from_str(bookworm).encode(TEXT).ids]])).logits
    masks = {f"h.{block}.attn.bias": torch.ones(1, 1, 1024, 1024).tril() for block in range(12)}
    files = {
        "config.json": config,
        "model.safetensors": dict(model.transformer.state_dict()) | masks,
        "tokenizer.json": bookworm,
        "tokenizer_config.json": {"model_max_length": 1024},
        "vocab.json": bpe["vocab"],
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in bpe["merges"])]),
    }
    for name, content in files.items():
        fetch(repository, KNOWN.revision, name, content)
    finish(repository, KNOWN.revision, main="0" * 40)  # it has moved on
    return logits


def save_saes(repository: Path) -> None:
    """SAEs with the files of jbloom/GPT2-Small-SAEs-Reformatted, whose configurations sae-lens wrote before 6.0."""
    for depth, name in enumerate(SITES):
        config = {
            "model_name": "gpt2-small",
            "hook_point": name,
            "hook_point_layer": min(depth, 11),
            "hook_point_head_index": None,
            "dataset_path": "Skylion007/openwebtext",
            "is_dataset_tokenized": False,
            "context_size": 128,
            "use_cached_activations": False,
            "cached_activations_path": f"activations/Skylion007_openwebtext/gpt2-small/{name}",
            "d_in": D_MODEL,
            "d_sae": size(depth),
            "expansion_factor": size(depth) // D_MODEL,
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
        fetch(repository, KNOWN.sae_revision, f"{name}/{WEIGHTS}", sae_weights(depth))
        sparsity = {"sparsity": torch.full((size(depth),), -3.0)}
        fetch(repository, KNOWN.sae_revision, f"{name}/sparsity.safetensors", sparsity)
    finish(repository, KNOWN.sae_revision, main=KNOWN.sae_revision)  # what `SAE.from_pretrained` reads


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The hub's cache, still empty; the hub is off, and the environment names the model."""
    path = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(path))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setenv("MODEL", "gpt2-small")
        yield path
    sae_weights.cache_clear()
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def saved_logits(hub: Path) -> Tensor:
    return save_gpt2(folder_of(hub, KNOWN.hub_id))


@pytest.fixture(scope="module")
def gpt2(hub: Path, saved_logits: Tensor) -> TransformerBridge:
    save_saes(folder_of(hub, KNOWN.sae_hub_id))
    return load_model()


@pytest.fixture(scope="module")
def large(gpt2: TransformerBridge) -> SAE:
    with pytest.warns(UserWarning, match=f"SAE at depth {LARGE} explains .* of the variance"):
        return load_sae(gpt2, LARGE)


@pytest.fixture
def broken(gpt2: TransformerBridge, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the cache, to be broken: blobs are shared with the original until they are unlinked."""
    copy = shutil.copytree(hub, tmp_path / "hub", symlinks=True, copy_function=os.link)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(copy))
    return copy


# The model


def test_the_model_comes_from_the_pinned_snapshot(gpt2, hub):
    assert gpt2.cfg.folder == folder_of(hub, KNOWN.hub_id) / "snapshots" / KNOWN.revision
    for part in ("gpt2-small (GPT2LMHeadModel, 12 blocks, d_model 768, context 1024", "centred"):
        assert part in description(gpt2)


def test_the_model_is_the_one_that_was_saved(gpt2, saved_logits):
    with torch.no_grad():
        assert torch.allclose(gpt2.original_model(tokens(gpt2, [TEXT]).ids).logits, saved_logits, atol=1e-4)


# The SAEs


@pytest.mark.parametrize("depth", [0, LARGE, 12])
def test_an_sae_is_what_sae_lens_makes_of_the_release(gpt2, depth):
    ours, theirs = load_sae(gpt2, depth), SAE.from_pretrained(KNOWN.sae_release, SITES[depth])
    assert ours.cfg.metadata.hook_name == theirs.cfg.metadata.hook_name == SITES[depth]
    assert ours.state_dict().keys() == theirs.state_dict().keys() == {"W_enc", "b_enc", "W_dec", "b_dec"}
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
        assert torch.equal(weight, sae_weights(depth)[name]), name
    acts = every_token(gpt2, [TEXT], [depth])[:, 0]
    assert torch.equal(ours.encode(acts), theirs.encode(acts))
    assert torch.allclose(ours.encode(acts), planted_activations(depth, acts), atol=1e-5)


def test_saes_that_fit_the_centred_stream_alone_load_without_a_warning(gpt2):
    with warnings.catch_warnings(action="error"):
        table = reconstruction(gpt2, {depth: load_sae(gpt2, depth) for depth in (0, 3, 12)})
    used, other = table[table.used], table[~table.used]
    assert set(used.stream) == {"centred"}
    assert (used.explained_variance > 0.9999).all()
    assert (other.explained_variance < 0.9).all()
    assert used.l0.round().tolist() == [len(directions()) / 2] * 3  # one of the two signs of each direction


def test_decoder_rows_are_those_of_the_file(gpt2):
    assert torch.equal(decoder_rows(gpt2, LARGE, [2392, 0, D_SAE - 1]), sae_weights(LARGE)["W_dec"][[2392, 0, -1]])
    assert torch.equal(decoder_rows(gpt2, 12), sae_weights(12)["W_dec"])
    with pytest.raises(IndexError, match=f"feature {D_SAE} is out of range: the SAE at depth {LARGE} has 0 to 24575"):
        decoder_rows(gpt2, LARGE, [D_SAE])


@pytest.mark.parametrize("depth", [0, LARGE, 12])
def test_dashboards_are_the_pages_of_neuronpedia(gpt2, depth):
    assert dashboard(gpt2, depth, 2392) == f"https://www.neuronpedia.org/gpt2-small/{depth}-res-jb/2392"


# Features on text


def test_features_at_words_are_the_encoder_at_the_words_last_token(gpt2, large):
    found = at_words(gpt2, large, WORDS)
    assert found.shape == (len(WORDS), D_SAE)
    for row, text, word in zip(found, WORDS.sentence, WORDS.word):
        acts = every_token(gpt2, [text], [LARGE])[word_positions(gpt2, [text], [word]) - 1, 0]
        assert torch.allclose(row, planted_activations(LARGE, acts), atol=1e-4)
    best = top(found, 5)
    means = found.mean(0)
    assert best.activation.tolist() == means.sort(descending=True).values[:5].tolist()
    assert best.activation.tolist() == means[best.feature.tolist()].tolist()


def test_token_activations_name_every_feature_that_fires(gpt2, large):
    table = token_activations(gpt2, large, TEXT)
    acts = planted_activations(LARGE, every_token(gpt2, [TEXT], [LARGE])[:, 0])
    assert len(table) == (acts > 0).sum() > 0
    assert torch.allclose(torch.tensor(table.activation), acts[table.pos - 1, table.feature].double(), atol=1e-4)


def test_features_on_passages_are_those_of_the_single_texts(gpt2, large):
    acts = planted_activations(LARGE, every_token(gpt2, PASSAGES, [LARGE])[:, 0])
    chosen = acts.amax(0).topk(3).indices.tolist()
    found = on_passages(gpt2, large, PASSAGES, chosen)
    assert torch.allclose(found.frequency, (acts > 0).float().mean(0), atol=1e-6)
    assert torch.allclose(found.acts, acts[:, chosen], atol=1e-4)
    best = next(found.strongest(chosen[0], 1).itertuples())
    alone = token_activations(gpt2, large, PASSAGES[best.passage], chosen[:1]).set_index("pos")["activation"]
    assert best.pos == alone.idxmax()
    assert best.activation == pytest.approx(acts.max().item(), rel=1e-4)


def test_pursuit_finds_the_rows_that_a_direction_is_made_of(gpt2):
    rows = decoder_rows(gpt2, LARGE)
    found = pursuit({"fear": 3 * rows[2392] - 2 * rows[11]}, rows, steps=2)
    assert found.feature.tolist() == [2392, 11]
    assert found.coefficient.tolist() == pytest.approx([3, -2], abs=1e-4)
    assert found.explained.iloc[1] == pytest.approx(1)


# Features across depths


def test_the_strongest_features_of_every_depth_and_their_rows(gpt2):
    table = top_by_depth(gpt2, WORDS, 3)
    assert table.depth.tolist() == [depth for depth in range(13) for _ in range(3)]
    texts = WORDS.sentence.tolist()
    acts = at_positions(gpt2, texts, word_positions(gpt2, texts, WORDS.word.tolist()))
    for depth, part in table.groupby("depth"):
        best = planted_activations(depth, acts[:, depth]).mean(0).topk(3)
        assert part.feature.tolist() == best.indices.tolist(), depth
        assert part.activation.tolist() == pytest.approx(best.values.tolist(), rel=1e-3), depth
    planted = [sae_weights(row.depth)["W_dec"][row.feature] for row in table.itertuples()]
    assert torch.equal(rows_of(gpt2, table), torch.stack(planted))


@pytest.mark.parametrize(("depth", "to"), [(3, LARGE), (LARGE, 12), (LARGE, LARGE)])
def test_the_nearest_feature_is_the_one_with_the_same_direction(gpt2, depth, to):
    """At a feature's own depth the nearest is another one."""
    table = pd.DataFrame({"depth": depth, "feature": features_of(depth)[:4].tolist()})
    found = nearest(gpt2, table, to)
    if depth == to:
        assert (found.cosine < 0.3).all()
        alike = cosines(rows_of(gpt2, table), decoder_rows(gpt2, to))
        assert found.cosine.tolist() == pytest.approx(alike.topk(2).values[:, 1].tolist(), abs=1e-5)
    else:
        assert found.match.tolist() == features_of(to)[:4].tolist()
        assert found.cosine.tolist() == pytest.approx([1] * 4, abs=1e-5)
        assert found.mutual.all()


# A cache that is not whole


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("lost", [[CONFIG, WEIGHTS], [WEIGHTS]])
def test_a_missing_sae_is_named(gpt2, broken, lost, listed):
    """With or without the client's list of what there is to fetch, which releases before 2.4 did not keep."""
    for name in lost:
        sae_file(broken, 5, name).unlink()
    if not listed:
        shutil.rmtree(folder_of(broken, KNOWN.sae_hub_id) / "trees")
    for read in (load_sae, decoder_rows):
        with pytest.raises(OSError, match=rf"SAE {SITES[5]} of gpt2-small-res-jb cannot.*{KNOWN.sae_revision}.*cache"):
            read(gpt2, 5)
    assert len(decoder_rows(gpt2, 4))


def test_an_sae_whose_blob_is_gone_is_named(gpt2, broken):
    sae_file(broken, 5, WEIGHTS).resolve().unlink()
    with pytest.raises(OSError, match=rf"SAE {SITES[5]} of gpt2-small-res-jb cannot be loaded"):
        load_sae(gpt2, 5)


def truncated(file: Path) -> Path:
    """The blob behind the file, which now lacks its second half."""
    blob = file.resolve()
    content = blob.read_bytes()
    blob.unlink()  # the original cache keeps it
    blob.write_bytes(content[: len(content) // 2])
    return blob


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("read", [load_sae, decoder_rows])
def test_a_truncated_file_is_named(gpt2, broken, read, name):
    truncated(file := sae_file(broken, 5, name))
    with pytest.raises(ValueError, match=f"{file} is damaged.*delete it and .* fetch"):
        read(gpt2, 5)


def test_the_blob_of_a_truncated_file_is_named(gpt2, broken):
    """With the link in the snapshot deleted and the blob kept, the next download would only link to it again."""
    blob = truncated(sae_file(broken, 5, WEIGHTS))
    with pytest.raises(ValueError, match=str(blob)):
        load_sae(gpt2, 5)
