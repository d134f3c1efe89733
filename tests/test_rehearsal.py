"""A rehearsal of gpt2-small with its published SAEs: from the hub's cache, as a download leaves it, with the hub off.

The cache is rehearsal.py's, with bookworm's smaller vocabulary. Every SAE but one is small: the directions of an
orthonormal basis of the centred stream, with both signs, which explain all of it and nothing of the raw stream's mean.
One has its published size and holds the same directions among random ones.
"""

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
from rehearsal import (
    BOOKWORM,
    CONFIG,
    KNOWN,
    TEXT,
    WEIGHTS,
    Size,
    directions,
    features_of,
    finish,
    folder_of,
    sae_weights,
    save_gpt2,
    save_sae,
    sites,
)
from sae_lens import SAE
from tokenizers import Tokenizer
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import at_positions, every_token
from helpers.features import at_words, on_passages, pursuit, token_activations, top
from helpers.models import description, load_model
from helpers.prompts import key_words, passages, tokens, word_positions
from helpers.saes import dashboard, decoder_rows, load_sae, reconstruction
from helpers.similarity import cosines, nearest, rows_of, top_by_depth

SITES, TOKENS = sites(12), Tokenizer.from_str(BOOKWORM).get_vocab_size()
D_MODEL, D_SAE, LARGE = 768, 24_576, 7  # the depth of the SAE that has its published size
WORDS = key_words("key word", "find").head(3)
PASSAGES = passages()[:2]

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs"),
    pytest.mark.filterwarnings(f"ignore:The SAE at depth {LARGE} explains"),
]

# What is planted


def size(depth: int) -> int:
    return D_SAE if depth == LARGE else 2 * D_MODEL - 2


@cache
def planted(depth: int) -> dict[str, Tensor]:
    """The tensors of this depth's SAE; in the large one, everything fires a little later."""
    bias = -0.5 if depth == LARGE else 0.0
    return sae_weights(depth, size(depth), D_MODEL, own=bias, others=bias)


def planted_activations(depth: int, acts: Tensor) -> Tensor:
    weights = planted(depth)
    return ((acts - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()


def sae_file(hub: Path, depth: int, name: str) -> Path:
    return folder_of(hub, KNOWN.sae_hub_id) / "snapshots" / KNOWN.sae_revision / SITES[depth] / name


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The hub's cache, still empty; the hub is off, and the environment names the model."""
    path = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(path))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setenv("MODEL", "gpt2-small")
        yield path
    planted.cache_clear()
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def saved_logits(hub: Path) -> Tensor:
    return save_gpt2(folder_of(hub, KNOWN.hub_id), Size(vocabulary=TOKENS))


@pytest.fixture(scope="module")
def gpt2(hub: Path, saved_logits: Tensor) -> TransformerBridge:
    repository = folder_of(hub, KNOWN.sae_hub_id)
    for depth, name in enumerate(SITES):
        save_sae(repository, name, planted(depth))
    finish(repository, KNOWN.sae_revision, main=KNOWN.sae_revision)  # what `SAE.from_pretrained` reads
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
        assert torch.equal(weight, planted(depth)[name]), name
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
    assert used.l0.round().tolist() == [len(directions(D_MODEL)) / 2] * 3  # one of the two signs of each direction


def test_decoder_rows_are_those_of_the_file(gpt2):
    assert torch.equal(decoder_rows(gpt2, LARGE, [2392, 0, D_SAE - 1]), planted(LARGE)["W_dec"][[2392, 0, -1]])
    assert torch.equal(decoder_rows(gpt2, 12), planted(12)["W_dec"])
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
    theirs = [planted(row.depth)["W_dec"][row.feature] for row in table.itertuples()]
    assert torch.equal(rows_of(gpt2, table), torch.stack(theirs))


@pytest.mark.parametrize(("depth", "to"), [(3, LARGE), (LARGE, 12), (LARGE, LARGE)])
def test_the_nearest_feature_is_the_one_with_the_same_direction(gpt2, depth, to):
    """At a feature's own depth the nearest is another one."""
    table = pd.DataFrame({"depth": depth, "feature": features_of(depth, size(depth), D_MODEL)[:4].tolist()})
    found = nearest(gpt2, table, to)
    if depth == to:
        assert (found.cosine < 0.3).all()
        alike = cosines(rows_of(gpt2, table), decoder_rows(gpt2, to))
        assert found.cosine.tolist() == pytest.approx(alike.topk(2).values[:, 1].tolist(), abs=1e-5)
    else:
        assert found.match.tolist() == features_of(to, size(to), D_MODEL)[:4].tolist()
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
