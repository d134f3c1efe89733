"""Loading by name, from the hub's cache and from folders; what is refused, with its message; the twins."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from helpers.activations import residuals, token_residuals
from helpers.config import DATA
from helpers.models import (
    description,
    int8_twin,
    is_centred,
    known_models,
    load_model,
    slug,
    source,
    uncentred,
    untrained_twin,
    words_only_twin,
)
from helpers.prompts import first_token, tokens

TEXT = "The dog ran after me down the lane."
LAYER_NORM = {"gpt2", "gpt_neox"}
PINNED = known_models().loc["gpt2-small", "revision"]
TWINS = [untrained_twin, words_only_twin]


@pytest.fixture(scope="module")
def bookworm() -> TransformerBridge:
    return load_model()


@pytest.fixture
def folder(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny GPT-2's folder, to be broken."""
    return Path(shutil.copytree(model_folder("gpt2"), tmp_path / "broken"))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def uneven(request, model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model whose norms and biases vary, as trained ones do, so that shuffling them shows."""
    path = tmp_path_factory.mktemp("uneven") / request.param
    hf = AutoModelForCausalLM.from_pretrained(model_folder(request.param))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    hf.save_pretrained(path)
    for file in model_folder(request.param).glob("tokenizer*"):
        shutil.copy(file, path)
    return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which is out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def cached(hub: Path, repository: str, revision: str, content: Path, main: str | None = None) -> Path:
    """Lay `content` out as a snapshot in the hub's cache, with refs/main."""
    repository = hub / f"models--{repository.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(main or revision)
    return Path(shutil.copytree(content, repository / "snapshots" / revision))


def edit(file: Path, **changes: object) -> None:
    """Set keys of a JSON file; None drops the key."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def weights(model: TransformerBridge) -> dict[str, Tensor]:
    return dict(model.original_model.named_parameters())


def in_block(key: str) -> bool:
    return re.search(r"\.(h|layers)\.\d+\.", key) is not None


# Loading


def test_bookworm_is_in_eval_mode_without_gradients(bookworm):
    assert not any(part.training for part in bookworm.modules())
    assert not any(weight.requires_grad for weight in bookworm.parameters())
    assert not bookworm.original_model(tokens(bookworm, [TEXT]).ids).logits.requires_grad


def test_bookworm_is_centred_and_its_logits_are_those_of_hugging_face(bookworm):
    stream = token_residuals(bookworm, TEXT)
    assert is_centred(bookworm)
    assert (stream.mean(-1).abs() < 1e-5 * stream.norm(dim=-1)).all()
    ids = tokens(bookworm, [TEXT]).ids
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(DATA / "bookworm", dtype=torch.float32)(ids).logits
    assert torch.allclose(bookworm.original_model(ids).logits, expected, atol=1e-4)


def test_description_names_model_size_stream_and_precision(bookworm):
    for part in ("bookworm", "GPT2LMHeadModel", "8 blocks", "d_model 256", "8.5 M", "centred", "float32 on cpu"):
        assert part in description(bookworm)


def test_layer_norm_families_are_centred_and_rms_norm_ones_raw(any_model):
    family = any_model.cfg.model_name.removeprefix("local--tiny-")
    stream = token_residuals(any_model, TEXT)[1:]  # a Llama's embedding of the padding token is zero
    means = (stream.mean(-1).abs() / stream.norm(dim=-1)).amax(0)
    assert is_centred(any_model) == (family in LAYER_NORM)
    assert ("centred" if family in LAYER_NORM else "raw") in description(any_model)
    assert (means < 1e-5).all() if family in LAYER_NORM else (means > 1e-4).all()


def test_every_family_keeps_the_logits_of_hugging_face(any_model, model_folder):
    ids = tokens(any_model, [TEXT]).ids
    family = any_model.cfg.model_name.removeprefix("local--tiny-")
    hf = AutoModelForCausalLM.from_pretrained(model_folder(family), attn_implementation="eager")
    with torch.no_grad():
        assert torch.allclose(any_model.original_model(ids).logits, hf(ids).logits, rtol=1e-4, atol=1e-4)


def test_another_precision_is_loaded_and_named(folder):
    model = load_model(str(folder), dtype=torch.bfloat16)
    assert {weight.dtype for weight in weights(model).values()} == {torch.bfloat16}
    assert "bfloat16" in description(model)


def test_loading_is_silent(folder, capfd):
    load_model(str(folder))
    assert capfd.readouterr() == ("", "")


def test_mps_is_refused(folder):
    with pytest.raises(ValueError, match=r"'mps'.*use 'cuda' or 'cpu'"):
        load_model(str(folder), device="mps")


# The number of parameters


@pytest.fixture
def n_parameters(folder: Path) -> float:
    return AutoModelForCausalLM.from_pretrained(folder).num_parameters()


def test_stored_masks_are_no_parameters(folder, n_parameters):
    stored = load_file(folder / "model.safetensors")
    save_file(
        stored | {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64)}, folder / "model.safetensors", {"format": "pt"}
    )
    assert load_model(str(folder)).cfg.n_params == n_parameters


def test_a_second_copy_of_the_weights_is_not_counted(folder, n_parameters):
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert load_model(str(folder)).cfg.n_params == n_parameters


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bookworm", "bookworm"),
        ("gpt2-small", "gpt2-small"),
        ("gpt2", "gpt2-small"),
        ("openai-community/gpt2", "gpt2-small"),
        ("someone/some-model_1.5", "someone--some-model_1.5"),
        ("someone/some-model@v2", "someone--some-model@v2"),
    ],
)
def test_slug(name, expected):
    assert slug(name) == expected


def test_slug_of_a_folder_is_its_own_name(folder, monkeypatch):
    assert slug(str(folder)) == slug(f"{folder}/") == "local--broken"
    monkeypatch.chdir(folder)
    assert slug(".") == "local--broken"
    monkeypatch.chdir(folder.parent)
    assert slug("broken") == "local--broken"


def test_without_a_name_the_environment_decides(monkeypatch):
    monkeypatch.delenv("MODEL", raising=False)
    assert slug() == "bookworm"
    monkeypatch.setenv("MODEL", "gpt2")
    assert slug() == "gpt2-small"
    assert slug("bookworm") == "bookworm"
    monkeypatch.setenv("MODEL", "")
    assert slug() == "bookworm"


@pytest.mark.parametrize(("name", "nearest"), [("bookwrm", "bookworm"), ("gpt2-smal", "gpt2-small")])
def test_an_unknown_name_lists_the_known_ones_and_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"Unknown model '{name}'.*mean '{nearest}'.*bookworm, gpt2-small.*hub id"):
        load_model(name)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "../nowhere", "~/nowhere"])
def test_a_missing_folder_is_no_hub_name(name):
    with pytest.raises(FileNotFoundError, match=f"no model folder '{name}'"):
        load_model(name)


def test_every_known_hub_model_is_pinned_to_a_commit():
    on_hub = known_models().query("hub_id != ''")
    assert len(on_hub)
    assert on_hub["revision"].str.fullmatch("[0-9a-f]{40}").all()


# The hub's cache


@pytest.mark.parametrize("repository", ["openai-community/gpt2", "gpt2"])
@pytest.mark.parametrize("name", ["gpt2-small", "gpt2", "openai-community/gpt2"])
def test_a_cached_model_loads_at_its_pinned_revision(hub, model_folder, repository, name):
    """Under either name of its repository, whatever main points at."""
    cached(hub, repository, PINNED, model_folder("gpt2"), main="0" * 40)
    model = load_model(name)
    assert model.cfg.model_name == "gpt2-small"
    stored = load_file(model_folder("gpt2") / "model.safetensors")["transformer.wte.weight"]
    assert torch.allclose(model.embed.weight, stored - stored.mean(-1, keepdim=True), atol=1e-6)


def test_another_revision_in_the_cache_does_not_stand_in(hub, model_folder):
    cached(hub, "gpt2", "0" * 40, model_folder("gpt2"))
    with pytest.raises(OSError, match=PINNED):
        load_model("gpt2")


@pytest.mark.parametrize(("suffix", "blocks"), [("", 3), ("@" + "1" * 40, 2)])
def test_any_hub_model_loads_from_main_or_the_revision_asked_for(hub, folder, model_folder, suffix, blocks):
    edit(folder / "config.json", n_layer=2)
    first = cached(hub, "someone/model", "0" * 40, model_folder("gpt2"))
    shutil.copytree(folder, first.with_name("1" * 40))
    model = load_model(f"someone/model{suffix}")
    assert model.cfg.model_name == f"someone--model{suffix}"
    assert model.cfg.n_layers == blocks


@pytest.mark.parametrize("name", ["gpt2", "someone/model"])
def test_a_model_out_of_reach_names_what_was_looked_for_and_what_works_offline(hub, name):
    where = source(name)
    with pytest.raises(OSError) as refusal:
        load_model(name)
    for part in (where.slug, *where.hub_ids, where.revision or "main", "cache", "offline with 'bookworm'"):
        assert part in str(refusal.value)


def test_a_cached_tokenizer_does_not_pass_for_the_model(hub, folder):
    (folder / "model.safetensors").unlink()
    cached(hub, "openai-community/gpt2", PINNED, folder)
    with pytest.raises(OSError, match=r"'gpt2-small' cannot be loaded"):
        load_model("gpt2")


# Folders that are refused


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ("config.json", "holds no config.json"),
        ("model.safetensors", "holds no safetensors weights.*convert"),
        ("tokenizer.json", "holds no tokenizer file.*tokenizer.json.*save_pretrained"),
    ],
)
def test_an_incomplete_folder_is_refused(folder, lacking, message):
    (folder / lacking).unlink()
    with pytest.raises(ValueError, match=f"{folder} {message}"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("twin", "lacking"),
    [
        (untrained_twin, "config.json"),
        (words_only_twin, "config.json"),
        (words_only_twin, "model.safetensors"),
        (int8_twin, "model.safetensors"),
    ],
)
def test_a_twin_refuses_what_its_model_refuses(folder, twin, lacking):
    (folder / "pytorch_model.bin").write_bytes(b"pickled weights, which are not to be opened")
    (folder / lacking).unlink()
    with pytest.raises(ValueError, match=f"{folder} holds no"):
        twin(str(folder))


def test_pickled_weights_are_not_read(folder):
    stored = load_file(folder / "model.safetensors")
    torch.save(stored, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no safetensors weights. Pickled weights are not read"):
        load_model(str(folder))


def test_a_tokenizer_with_neither_bos_nor_eos_is_refused(folder):
    nameless = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<nothing>")
    (folder / "tokenizer.json").write_text(nameless)
    edit(folder / "tokenizer_config.json", bos_token=None, eos_token=None, pad_token=None, unk_token=None)
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        first_token(load_model(str(folder)))


@pytest.mark.parametrize(("bos", "first"), [("<|endoftext|>", "<|endoftext|>"), (None, "!")])
def test_position_0_is_bos_or_else_eos(folder, bos, first):
    edit(folder / "tokenizer_config.json", bos_token=bos, eos_token="!")
    model = load_model(str(folder))
    assert first_token(model) == model.tokenizer.convert_tokens_to_ids(first)


# Twins


@pytest.mark.parametrize(("twin", "name"), [(untrained_twin, "untrained"), (words_only_twin, "words only")])
def test_a_twin_says_what_it_is(uneven, twin, name):
    model = twin(uneven)
    assert model.cfg.model_name == f"{slug(uneven)}, {name}"
    assert name in description(model)


@pytest.mark.parametrize("twin", TWINS)
def test_a_twin_is_the_same_architecture_with_other_blocks(uneven, twin):
    ours, trained = weights(twin(uneven)), weights(load_model(uneven))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in trained.items()}
    matrices = [key for key in ours if in_block(key) and ours[key].ndim == 2]
    assert matrices
    assert not any(torch.allclose(ours[key], trained[key], atol=1e-3) for key in matrices)


@pytest.mark.parametrize("twin", TWINS)
def test_a_seed_decides_a_twin(uneven, twin):
    first, again, other = (residuals(twin(uneven, seed), [TEXT])["mean"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first[:, -1], other[:, -1], rtol=0.1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("load", [load_model, int8_twin, *TWINS])
def test_the_global_seed_is_left_alone(model_folder, family, load):
    before = torch.random.get_rng_state()
    load(str(model_folder(family)))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("twin", TWINS)
def test_a_twin_is_in_eval_mode_without_gradients_and_centred_like_its_model(uneven, twin):
    model = twin(uneven)
    assert not any(part.training for part in model.modules())
    assert not any(weight.requires_grad for weight in model.parameters())
    means = token_residuals(model, TEXT).mean(-1).abs().amax(0)
    assert (means < 1e-5).all() == is_centred(model)


def test_the_untrained_twin_has_the_embeddings_of_a_fresh_model(uneven):
    """The trained ones are eight times larger (see conftest)."""
    fresh, trained = untrained_twin(uneven).embed.weight, load_model(uneven).embed.weight
    assert 7 < trained.std() / fresh.std() < 9


def test_the_words_only_twin_keeps_all_but_the_blocks(uneven):
    ours, trained = weights(words_only_twin(uneven)), weights(load_model(uneven))
    kept = [key for key in ours if not in_block(key)]
    for part in ("wte|embed_tokens", r"\.ln_f|\.norm", "lm_head"):
        assert any(re.search(part, key) for key in kept)
    assert all(torch.equal(ours[key], trained[key]) for key in kept)


def test_the_words_only_twin_shuffles_the_values_of_every_tensor_of_a_block(uneven):
    """Raw weights of an RMSNorm model show it exactly; centring mixes those of a LayerNorm model that write."""
    ours, trained = words_only_twin(uneven), load_model(uneven)
    mixed = r"\.(o|c_proj|q|k|v)\." if is_centred(ours) else "$^"  # q, k and v are parts of one tensor
    whole = [key for key in weights(ours) if in_block(key) and not re.search(mixed, key)]
    assert len(whole) >= 8 * ours.cfg.n_layers
    for key in whole:
        shuffled, value = weights(ours)[key].flatten(), weights(trained)[key].flatten()
        assert torch.equal(shuffled.sort().values, value.sort().values), key
        assert not torch.equal(shuffled, value), key


@pytest.mark.parametrize("seed", [0, 1])
def test_the_words_only_twin_of_a_seed_is_the_permutation_that_the_seed_draws(uneven, seed):
    """Tensor after tensor of the blocks in the order of the model's parameters, by one generator."""
    generator = torch.Generator().manual_seed(seed)
    hf = AutoModelForCausalLM.from_pretrained(uneven)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        for key, weight in hf.named_parameters():
            if in_block(key):
                weight.view(-1)[:] = weight.flatten()[torch.randperm(weight.numel(), generator=generator)]
        found = uncentred(words_only_twin(uneven, seed)).original_model(ids).logits
        assert torch.allclose(found, hf(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, load_model(uneven).original_model(ids).logits, rtol=0.1, atol=0.1)


def int8_steps(weight: Tensor) -> Tensor:
    """A 127th of the largest weight of each row, or of each column where that is what the weights are multiples of."""
    steps = [weight.abs().amax(dim, keepdim=True) / 127 for dim in (1, 0)]
    return min(steps, key=lambda step: (weight / step - (weight / step).round()).abs().max())


@pytest.mark.parametrize("family", ["gpt2", "llama", "bookworm"])
def test_the_int8_twin_rounds_the_matrices_of_the_blocks_and_nothing_else(model_folder, family):
    """To whole steps, at most 127 in either direction, and at most half a step from where each weight was."""
    name = family if family == "bookworm" else str(model_folder(family))
    ours, trained = weights(uncentred(int8_twin(name))), weights(uncentred(load_model(name)))
    parts = r"\.attn\.[qkv]\." if family != "llama" else "$^"  # of one tensor, and rounded as such
    rounded = [key for key in ours if in_block(key) and ours[key].ndim == 2]
    assert list(ours) == list(trained) and len(ours) > len(rounded) >= 4 * 3
    for key, weight in ours.items():
        if key not in rounded:
            assert torch.equal(weight, trained[key]), key
        elif not re.search(parts, key):
            step = int8_steps(weight)
            levels = (weight / step).round()
            assert torch.allclose(weight, levels * step, atol=1e-6, rtol=1e-4), key
            assert levels.abs().max() == 127 and len(levels.unique()) <= 255
            assert ((trained[key] / step - levels).abs() < 0.501).all(), key
            assert not torch.equal(weight, trained[key])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_int8_twin_has_one_scale_per_output_in_every_family(model_folder, family):
    """As in the paper it follows, and in any int8 product: GPT-2 stores its matrices input by output, others turned."""
    ours = weights(uncentred(int8_twin(str(model_folder(family)))))
    into = [weight for key, weight in ours.items() if re.search(r"\.(c_fc|up_proj|up)\.", key) and weight.ndim == 2]
    assert len(into) == 3
    for weight in into:
        outputs = weight.T if family == "gpt2" else weight
        step = outputs.abs().amax(1, keepdim=True) / 127
        assert torch.allclose(outputs, (outputs / step).round() * step, atol=1e-6, rtol=1e-4)


def test_the_int8_twin_says_nearly_what_the_model_says(uneven, bookworm):
    for trained, name in ((load_model(uneven), uneven), (bookworm, None)):
        twin, ids = int8_twin(name), tokens(trained, [TEXT]).ids
        with torch.no_grad():
            found, expected = twin.original_model(ids).logits, trained.original_model(ids).logits
        error = (found - expected).pow(2).mean() / expected.var()
        assert 0 < error < 0.01
        assert twin.cfg.model_name == f"{slug(name)}, int8" and "int8" in description(twin)
        assert not any(part.training for part in twin.modules())
        assert not any(weight.requires_grad for weight in twin.parameters())
        assert is_centred(twin) == is_centred(trained) and twin.cfg.n_params == trained.cfg.n_params


def test_a_row_of_zeros_stays_zero_in_the_int8_twin(folder):
    stored = load_file(folder / "model.safetensors")
    stored["transformer.h.1.mlp.c_fc.weight"][3] = 0
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    twin = int8_twin(str(folder))
    assert all(weight.isfinite().all() for weight in weights(twin).values())
    (fc,) = (weight for key, weight in weights(twin).items() if ".h.1." in key and "c_fc" in key and weight.ndim == 2)
    assert torch.equal(fc[3], torch.zeros(len(fc[3]))) or torch.equal(fc[:, 3], torch.zeros(len(fc)))


# The raw stream


def test_the_uncentred_model_has_the_hidden_states_of_hugging_face(any_model, model_folder):
    raw, family = uncentred(any_model), any_model.cfg.model_name.removeprefix("local--tiny-")
    ids = tokens(raw, [TEXT]).ids
    hf = AutoModelForCausalLM.from_pretrained(model_folder(family), attn_implementation="eager").eval()
    with torch.no_grad():
        output = hf(ids, output_hidden_states=True)
        assert torch.allclose(raw.original_model(ids).logits, output.logits, rtol=1e-4, atol=1e-4)
    expected = torch.stack(output.hidden_states[:-1], 2)[0]  # the last one is behind the final norm
    assert torch.allclose(token_residuals(raw, TEXT)[:, :-1], expected, rtol=1e-4, atol=1e-5)


def test_centring_takes_the_mean_off_the_uncentred_stream_and_no_more(any_model):
    raw, stream = token_residuals(uncentred(any_model), TEXT), token_residuals(any_model, TEXT)
    expected = raw - raw.mean(-1, keepdim=True) if is_centred(any_model) else raw
    assert ((stream - expected).norm(dim=-1) <= 1e-5 * expected.norm(dim=-1) + 1e-7).all()


def test_the_uncentred_model_is_another_of_the_same_name(any_model):
    centred, before = is_centred(any_model), token_residuals(any_model, TEXT)
    raw = uncentred(any_model)
    assert raw is not any_model and not is_centred(raw) and "raw residual stream" in description(raw)
    for name in ("model_name", "folder", "dtype", "n_params", "n_ctx"):
        assert getattr(raw.cfg, name) == getattr(any_model.cfg, name)
    assert is_centred(any_model) == centred and torch.equal(token_residuals(any_model, TEXT), before)


@pytest.mark.parametrize("twin", TWINS)
def test_the_uncentred_twin_is_still_a_twin(uneven, twin):
    ours = twin(uneven)
    raw, stream = token_residuals(uncentred(ours), TEXT), token_residuals(ours, TEXT)
    expected = raw - raw.mean(-1, keepdim=True) if is_centred(ours) else raw
    assert torch.allclose(stream, expected, rtol=1e-4, atol=1e-5)
