"""Tiny random models, saved as Hugging Face folders with bookworm's tokenizer and loaded through `load_model`.

No network: the hub is switched off before any library reads the environment.
"""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("MODEL", None)
os.environ.pop("MODELS", None)
os.environ.pop("DEVICE", None)
os.environ.pop("WORKERS", None)
os.environ.pop("GRID", None)
os.environ.pop("FIGURES", None)
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny: a second thread only waits, here and in kernels

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.activations import site
from helpers.config import DATA
from helpers.models import is_centred, load_model
from helpers.plots import style

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
    "gemma3_text": {**WIDE, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 16},
    "mistral": {**WIDE, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 16, "tie_word_embeddings": False},
}
NO_BOS = {"gpt_neox", "qwen3"}  # nor a pad token, as models of the hub


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with random weights of one family, larger than freshly drawn ones so that depths differ.

    Mistral's unembedding is its own, the others' are their embeddings; two families have a tokenizer with neither BOS
    nor a pad token.
    """

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
            shutil.copy(DATA / "bookworm" / "tokenizer.json", path)
            settings = json.loads((DATA / "bookworm" / "tokenizer_config.json").read_text())
            settings |= {"bos_token": None, "pad_token": None} if family in NO_BOS else {}
            (path / "tokenizer_config.json").write_text(json.dumps(settings))
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


@pytest.fixture(scope="session")
def small_sae() -> Callable:
    """An SAE of sae-lens with these decoder rows; its encoder is their transpose unless another is given."""
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    def sae(
        rows: Tensor,
        hook_name: str,
        encoder: Tensor | None = None,
        bias: Tensor | None = None,
        centred: bool = True,
        kind: type = StandardSAE,
        config: type = StandardSAEConfig,
        **options: object,
    ):
        about = SAEMetadata(
            hook_name=hook_name, model_from_pretrained_kwargs={"center_writing_weights": True} if centred else {}
        )
        with warnings.catch_warnings():  # sae-lens says which options of its own loader the SAE goes with
            warnings.simplefilter("ignore")
            made = kind(config(d_in=rows.shape[1], d_sae=len(rows), metadata=about, **options))
        with torch.no_grad():
            made.W_dec.copy_(rows)
            made.W_enc.copy_(rows.T if encoder is None else encoder)
            made.b_enc.copy_(torch.zeros(len(rows)) if bias is None else bias)
        return made.eval()

    return sae


@pytest.fixture(scope="session")
def with_saes(
    model_folder: Callable[[str], Path], small_sae: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TransformerBridge]:
    """A tiny model of one family with SAEs in its folder, as sae-lens writes them: these rows at these depths.

    Without rows, every depth has an SAE that reconstructs perfectly: an orthonormal basis and its negative.
    """

    def model(family: str = "gpt2", rows: dict[int, Tensor] | None = None) -> TransformerBridge:
        bare = load_model(str(model_folder(family)))
        folder = Path(shutil.copytree(model_folder(family), tmp_path_factory.mktemp("with-saes") / f"tiny-{family}"))
        for depth in range(bare.cfg.n_layers + 1) if rows is None else rows:
            basis = torch.linalg.qr(torch.randn(bare.cfg.d_model, bare.cfg.d_model, generator=seeded(depth))).Q
            here = torch.cat([basis, -basis]) if rows is None else rows[depth]
            sae = small_sae(here, site(bare, depth), centred=is_centred(bare))
            sae.save_model(folder / "saes" / site(bare, depth))
        return load_model(str(folder))

    return model


@pytest.fixture(scope="session")
def model_with_saes(with_saes: Callable[..., TransformerBridge]) -> TransformerBridge:
    """A tiny random GPT-2 with an SAE of 64 features at every depth; their reconstruction is perfect."""
    return with_saes()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def nothing_left_open() -> Iterator[None]:
    """The look of the notebooks' figures, and no figure open before or afterwards."""
    style()
    plt.close("all")
    yield
    plt.close("all")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
