"""Language models as TransformerBridges, by name: the embedded `bookworm`, the Hugging Face hub, or a local folder.

Models with LayerNorm get a centred residual stream (every activation minus its mean over d_model; the logits do not
change), which is the stream that gpt2-small-res-jb's SAEs were trained on. RMSNorm reads that mean, so models with
RMSNorm keep the raw stream. Only safetensors are read, and no code that comes with a model is run.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pandas as pd
import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import NewGELUActivation
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from helpers.config import CFG, DATA
from helpers.hub import OFFLINE, Damaged, cache_folder, check_weights, snapshot

DEFAULT = OFFLINE
WEIGHTS = "model.safetensors"
DEVICE_MAPS = ("auto", "balanced")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a folder on this machine, or a repository of the hub at a revision."""

    slug: str  # the name that figures, tables and folders carry
    folder: Path | None = None
    hub_ids: tuple[str, ...] = ()
    revision: str | None = None


def known_models() -> pd.DataFrame:
    """Known models by name: folder or hub id, aliases, pinned revision, family, licence (data/models.csv).

    A models.csv in the Hugging Face cache itself comes first: a rehearsal's says under which name its weights go.
    """
    own = cache_folder() / "models.csv"
    return _models_of(own if own.is_file() else DATA / "models.csv").copy()


@cache
def _models_of(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False).set_index("name")


def source(name: str | None = None) -> Source:
    """What `name` stands for: a known name, a local folder, or `organisation/model[@revision]` on the hub.

    Without a name: the environment variable MODEL, else bookworm. Raises ValueError or FileNotFoundError otherwise.
    """
    name = name or os.environ.get("MODEL") or DEFAULT
    known = known_models()
    for row in known.itertuples():
        if name in (row.Index, row.hub_id, *row.aliases.split()):
            if row.folder:
                return Source(row.Index, folder=DATA / row.folder)
            return Source(row.Index, hub_ids=(row.hub_id, *row.aliases.split()), revision=row.revision)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(f"local--{folder.resolve().name}", folder=folder.resolve())
    if folder.is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"There is no model folder {name!r} (looked in {folder.resolve()}).")
    hub_id, _, revision = name.partition("@")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        return Source(name.replace("/", "--"), hub_ids=(hub_id,), revision=revision or None)
    nearest = difflib.get_close_matches(name, known.index, 1, cutoff=0)[0]
    raise ValueError(
        f"Unknown model {name!r}. Did you mean {nearest!r}? Known names: {', '.join(known.index)}. "
        "Any other model goes by its hub id (organisation/model) or by the path of a local folder."
    )


def slug(name: str | None = None) -> str:
    """The name under which a model's figures and tables are kept, e.g. `gpt2-small` or `organisation--model`."""
    return source(name).slug


def model_folder(where: Source) -> Path:
    """The folder that holds a model's files: from the cache when it has them, else downloaded (see `hub.snapshot`)."""
    if where.folder:
        return _checked(where.folder)
    files = ["*.json", "*.safetensors", "*.txt", "*.model"]
    unread = ["*/*", "consolidated*"]  # Mistral's second copy of the weights
    return snapshot(f"Model {where.slug!r}", where.hub_ids, where.revision, files, _checked, unread)


def load_model(
    name: str | None = None, dtype: torch.dtype = torch.float32, device: str | dict | None = None
) -> TransformerBridge:
    """The model in eval mode, without gradients; `model.cfg.model_name` holds its slug.

    `device` is one device, or a device map of accelerate, which spreads the blocks over several GPUs: "auto",
    "balanced", or a dict. Without it the environment variable DEVICE; without that CUDA where there is one, else the
    CPU. Raises OSError when the weights can be had neither from the cache nor from the hub, and ValueError for a folder
    without tokenizer or safetensors files, or an unknown device. MPS is refused: it has given silently wrong
    activations.
    """
    where = source(name)
    return _bridge(model_folder(where), where.slug, dtype, device)


def untrained_twin(name: str | None = None, seed: int = 0, device: str | dict | None = None) -> TransformerBridge:
    """The same architecture and tokenizer with weights drawn anew by the architecture's own initialisation.

    What this model shows, training had no part in.
    """
    where = source(name)
    folder = model_folder(where)
    return _bridge(folder, f"{where.slug}, untrained", torch.float32, device, partial(_fresh, folder, seed))


def words_only_twin(name: str | None = None, seed: int = 0, device: str | dict | None = None) -> TransformerBridge:
    """The trained embeddings and final norm with scrambled blocks: every weight of a block is shuffled in its tensor.

    Shuffling keeps the trained scale of what the blocks write. What this model shows, the words alone explain.
    """
    where = source(name)
    folder = model_folder(where)
    return _bridge(folder, f"{where.slug}, words only", torch.float32, device, partial(_scrambled, folder, seed))


def int8_twin(name: str | None = None, device: str | dict | None = None) -> TransformerBridge:
    """The model with every matrix of its blocks rounded to 8 bits and back, each output scaled by its largest weight.

    Computes in float32, so the rounding of the weights is the only difference. (Absmax quantisation, after Dettmers et
    al. 2022, without their outliers.)
    """
    where = source(name)
    folder = model_folder(where)
    return _bridge(folder, f"{where.slug}, int8", torch.float32, device, partial(_rounded, folder))


def uncentred(model: TransformerBridge) -> TransformerBridge:
    """The same model with its raw residual stream."""
    return model.cfg.remade(centre=False)


def is_centred(model: TransformerBridge) -> bool:
    """Whether the residual stream is the raw one minus its mean over d_model: so for models with LayerNorm."""
    return model.cfg.centred


def description(model: TransformerBridge) -> str:
    """One line that says which model this is: name, size, stream, precision."""
    cfg = model.cfg
    stream = "centred" if is_centred(model) else "raw"
    return (
        f"Model: {cfg.model_name} ({cfg.architecture}, {cfg.n_layers} blocks, d_model {cfg.d_model}, context "
        f"{cfg.n_ctx}, {cfg.n_params / 1e6:,.1f} M parameters), {stream} residual stream, "
        f"{str(cfg.dtype).removeprefix('torch.')} on {cfg.device}{CFG.label and f', {CFG.label}'}"
    )


def _fresh(folder: Path, seed: int) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


def _scrambled(folder: Path, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)

    def shuffled(weight: torch.Tensor, _: torch.nn.Module) -> torch.Tensor:
        return weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight)

    return _with_blocks(folder, shuffled)


def _rounded(folder: Path) -> torch.nn.Module:
    def rounded(weight: torch.Tensor, part: torch.nn.Module) -> torch.Tensor:
        if weight.ndim < 2:
            return weight
        inputs = 0 if isinstance(part, Conv1D) else -1  # GPT-2's matrices stand the other way round
        step = weight.abs().amax(inputs, keepdim=True).clamp(min=1e-12) / 127
        return (weight / step).round() * step

    return _with_blocks(folder, rounded)


def _with_blocks(folder: Path, changed: Callable[[torch.Tensor, torch.nn.Module], torch.Tensor]) -> torch.nn.Module:
    """The trained model with every weight inside a block replaced by what `changed` makes of it and its module."""
    with _quietly():
        hf = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", use_safetensors=True, trust_remote_code=False
        )
    with torch.no_grad():
        for key, weight in hf.named_parameters():
            if re.search(r"\.\d+\.", key):  # transformer.h.3.attn...: inside a block
                weight.copy_(changed(weight, hf.get_submodule(key.rpartition(".")[0])))
    return hf


def _bridge(
    folder: Path,
    name: str,
    dtype: torch.dtype,
    device: str | dict | None,
    weights: Callable[[], torch.nn.Module] | None = None,
    centre: bool = True,
) -> TransformerBridge:
    place = _place(device)
    with _quietly(), torch.random.fork_rng():
        if weights:
            place = {"hf_model": _placed(weights().eval(), **place)}
        model = TransformerBridge.boot_transformers(str(folder), dtype=dtype, **place)
        model.cfg.n_params = _parameters(folder)
        model.cfg.centred = centre and not model.cfg.uses_rms_norm
        if model.cfg.centred:
            model.enable_compatibility_mode(
                center_writing_weights=True,
                center_unembed=False,
                fold_ln=False,
                fold_value_biases=False,
                disable_warnings=True,
            )
    _fuse(model)
    model.eval()
    model.original_model.requires_grad_(False)
    model.cfg.model_name, model.cfg.folder = name, folder
    model.cfg.remade = partial(_bridge, folder, name, dtype, device, weights)
    return model


def _place(device: str | dict | None) -> dict[str, str | dict]:
    """`device` as the bridge takes it: one device, or a device map."""
    device = device or os.environ.get("DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, dict) or device in DEVICE_MAPS:
        return {"device_map": device}
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"Unknown device {device!r}: give 'cuda', 'cpu', or {' or '.join(DEVICE_MAPS)}.") from error
    if kind == "mps":
        raise ValueError("device 'mps' has given silently wrong activations: use 'cuda' or 'cpu'.")
    return {"device": device}


def _placed(hf: torch.nn.Module, device: str | None = None, device_map: str | dict | None = None) -> torch.nn.Module:
    """A model that was made on the CPU, moved to a device or spread as a device map says."""
    if device_map is None:
        return hf.to(device)
    if isinstance(device_map, str):
        whole = {"no_split_module_classes": list(hf._no_split_modules)}
        room = get_balanced_memory(hf, low_zero=False, **whole) if device_map == "balanced" else None
        device_map = infer_auto_device_map(hf, max_memory=room, **whole)
    return dispatch_model(hf, device_map)


def _fuse(model: torch.nn.Module) -> None:
    """GPT-2's activation in one kernel, where transformers spells its formula out in six."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def _parameters(folder: Path) -> int:
    """Number of weights of the architecture, tied ones counted once; nothing is allocated."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config).num_parameters()


def _checked(folder: Path) -> Path:
    """The folder, if it holds what a model needs; ValueError that says what is missing otherwise."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: it is not a Hugging Face model folder.")
    config = _json(folder / "config.json")
    if "auto_map" in config and config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{folder} brings code of its own for {config.get('model_type')!r} models, which transformers does not "
            "know. No code that comes with a model is run: choose a model of a known family."
        )
    weights, index = folder / WEIGHTS, folder / f"{WEIGHTS}.index.json"
    parts = _json(index).get("weight_map", {}).values() if index.is_file() else [WEIGHTS] * weights.is_file()
    if not parts or not all(str(part).endswith(".safetensors") for part in parts):  # PyTorch would unpickle others
        raise ValueError(f"{folder} holds no safetensors weights. Pickled weights are not read: convert them first.")
    for part in sorted(set(parts)):
        if not (folder / part).is_file():
            raise ValueError(f"{folder} lacks {part}, a part of the weights that its index names.")
        check_weights(folder / part)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(
            f"{folder} holds no tokenizer file (looked for {', '.join(TOKENIZER_FILES)}): "
            "save the model's tokenizer into the same folder with tokenizer.save_pretrained(folder)."
        )
    return folder


def _json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise Damaged(f"{path} is damaged ({error}): fetch or save the model again.") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bar for reading weights, which would end up in the notebooks' outputs."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()
