"""Sparse autoencoders (SAEs) of the residual stream, one per depth, in sae-lens' disk format.

A row of data/models.csv says where the SAEs of a known model lie: in a repository of the Hugging Face hub at a pinned
revision, or, as for any model in a local folder, in its subfolder `saes`. There each SAE has a folder named after its
hook point. Every number of an SAE's file may be read alone: rows of the decoder come by slice.
"""

import json
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from weakref import WeakKeyDictionary

import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import every_token, site
from helpers.hub import check_weights, snapshot
from helpers.models import is_centred, known_models, uncentred
from helpers.prompts import neutral_texts
from helpers.stats import explained_variance

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FLOOR = 0.5  # explained variance below which an SAE hardly fits the stream that it is given
STREAMS: WeakKeyDictionary = WeakKeyDictionary()  # what `reconstruction` read of a model, for all its depths


class NoSAEs(ValueError):
    """The model has no SAEs that we know of."""


@dataclass(frozen=True)
class Release:
    """The SAEs of one model: the name they go by, and where they lie."""

    name: str
    folder: Path | None = None
    hub_id: str = ""
    revision: str = ""
    stream: str = ""  # "centred", "raw", or "" where the SAEs' own files say it
    neuronpedia: str = ""  # with a place for {depth}; "" where Neuronpedia has no such SAEs


def release(model: TransformerBridge) -> Release:
    """Where the model's SAEs are. Raises NoSAEs for a model without any, naming the models that have some."""
    known = known_models()
    if model.cfg.model_name in known.index and (row := known.loc[model.cfg.model_name]).sae_release:
        folder = None if row.sae_hub_id else model.cfg.folder / "saes"
        return Release(row.sae_release, folder, row.sae_hub_id, row.sae_revision, row.sae_stream, row.neuronpedia)
    if (folder := model.cfg.folder / "saes").is_dir():
        return Release(f"{model.cfg.model_name}/saes", folder)
    raise NoSAEs(
        f"There are no SAEs for {model.cfg.model_name}. Known ones: {', '.join(known.index[known.sae_release != ''])}. "
        "Any other model takes those in a subfolder `saes` of its own local folder, in sae-lens' disk format, each in "
        "a folder named after its hook point."
    )


def has_saes(model: TransformerBridge) -> bool:
    """Whether we know of SAEs for this model."""
    try:
        return bool(release(model))
    except NoSAEs:
        return False


def sae_folder(model: TransformerBridge, depth: int) -> Path:
    """The folder of the SAE at this depth, downloaded if need be.

    Raises NoSAEs, ValueError for a depth that the model does not have, FileNotFoundError for one without an SAE, and
    OSError when the hub cannot be reached.
    """
    where, name = release(model), site(model, depth)
    if where.folder:
        return _whole(where.folder / name)
    what, files = f"SAE {name} of {where.name}", _files(name)
    return snapshot(what, [where.hub_id], where.revision, files, lambda folder: _whole(folder / name))


def fetch(name: str) -> None:
    """Download all SAEs of a known model that has some on the hub, where they are not on this machine."""
    known = known_models()
    if name in known.index and (hub_id := known.loc[name, "sae_hub_id"]):
        what, revision = f"SAEs {known.loc[name, 'sae_release']}", known.loc[name, "sae_revision"]
        snapshot(what, [hub_id], revision, _files("*"), _all_sound)


def load_sae(model: TransformerBridge, depth: int):
    """The SAE of this depth: a `sae_lens.SAE` in float32, in eval mode, without gradients, on the model's device.

    Refused with a ValueError: a file that is damaged, a width, hook point or centring of the stream that is not the
    model's. A poor reconstruction of neutral text is a warning that names the likely cause.
    """
    from sae_lens import SAE  # takes seconds, and most notebooks need none

    folder = sae_folder(model, depth)
    config = _config(folder)
    _check_fit(model, depth, config)
    try:
        with warnings.catch_warnings():  # sae-lens asks to load the model with the centring that we have just checked
            warnings.filterwarnings("ignore", "\\s*This SAE has non-empty model_from_pretrained_kwargs")
            sae = SAE.load_from_disk(folder, device=str(model.cfg.device), dtype="float32").eval()
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(_damaged(folder / WEIGHTS, error)) from error
    for name, weight in sae.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(_damaged(folder / WEIGHTS, f"{name} holds non-finite numbers"))
    sae.requires_grad_(False)
    sae.cfg.metadata.hook_name = sae.cfg.metadata.hook_name or site(model, depth)
    _warn_of_poor_fit(reconstruction(model, {depth: sae}))
    return sae


def reconstruction(model: TransformerBridge, saes: dict[int, object]) -> pd.DataFrame:
    """How well SAEs fit the model's stream on neutral text: depth, stream, explained_variance, l0.

    Every SAE is tried on the stream that the model has (its rows are marked in `used`) and on the other one, centred
    or raw. `l0` is the mean number of features that fire per token; position 0 is left out.
    """
    if model not in STREAMS:
        raw = every_token(uncentred(model) if is_centred(model) else model, neutral_texts())
        STREAMS[model] = {"centred": raw - raw.mean(-1, keepdim=True), "raw": raw}
    used, rows = "centred" if is_centred(model) else "raw", []
    for depth, sae in saes.items():
        for stream, acts in STREAMS[model].items():
            acts = acts[:, depth].to(sae.W_dec.device)
            with torch.no_grad():
                features = sae.encode(acts)
                value = explained_variance(acts, sae.decode(features))
            l0 = (features != 0).float().sum(-1).mean().item()
            rows.append((depth, stream, stream == used, value, l0))
    return pd.DataFrame(rows, columns=["depth", "stream", "used", "explained_variance", "l0"])


def decoder_rows(
    model: TransformerBridge, depth: int, features: Sequence[int] | None = None
) -> Float[Tensor, "feature d_model"]:
    """Rows of the decoder at this depth (all without `features`), read by slice: the SAE itself is not loaded.

    Raises IndexError for a feature that the SAE does not have, and what `sae_folder` and `load_sae` raise.
    """
    folder = sae_folder(model, depth)
    _check_fit(model, depth, _config(folder))
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            rows = file.get_slice("W_dec")
            checked_features(features or [], rows.get_shape()[0], depth)
            return (rows[:] if features is None else rows[list(features)]).float()
    except SafetensorError as error:
        raise ValueError(_damaged(folder / WEIGHTS, error)) from error


def checked_features(features: Sequence[int], d_sae: int, depth: int) -> list[int]:
    """The feature ids as a list; IndexError naming the first that an SAE with `d_sae` features does not have."""
    for feature in features:
        if not 0 <= feature < d_sae:
            raise IndexError(f"feature {feature} is out of range: the SAE at depth {depth} has 0 to {d_sae - 1}")
    return [int(feature) for feature in features]


def dashboard(model: TransformerBridge, depth: int, feature: int) -> str:
    """The address of the feature's page on Neuronpedia; "" where it has none for these SAEs."""
    page = release(model).neuronpedia.format(depth=depth)
    return f"https://www.neuronpedia.org/{page}/{feature}" if page else ""


def explanation(model: TransformerBridge, depth: int, feature: int) -> str:
    """Neuronpedia's explanation of the feature, or in brackets why there is none: "(offline)", for instance.

    Neuronpedia answers to a key only, in the environment variable NEURONPEDIA_API_KEY.
    """
    page = release(model).neuronpedia.format(depth=depth)
    if not page:
        return "(not on Neuronpedia)"
    import requests
    from neuronpedia.np_feature import Feature
    from neuronpedia.requests import base_request

    try:
        with redirect_stdout(StringIO()):  # the package says what it requests
            found = Feature.get(*page.split("/"), str(feature)).explanations or []
    except (base_request.NPKeyMissingError, base_request.NPUnauthorizedError):
        return "(needs NEURONPEDIA_API_KEY)"
    except (requests.ConnectionError, requests.Timeout):
        return "(offline)"
    except (requests.RequestException, base_request.NPRateLimitError, base_request.NPInvalidResponseError):
        return "(refused by Neuronpedia)"
    return found[0].text if found else "(no explanation yet)"


def _whole(folder: Path) -> Path:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            there = sorted(path.parent.name for path in folder.parent.glob(f"*/{WEIGHTS}"))
            others = f"SAEs there: {', '.join(there) or 'none'}."
            raise FileNotFoundError(f"There is no SAE at {folder.name}: {name} is missing in {folder}. {others}")
    return folder


def _sound(folder: Path) -> Path:
    check_weights(_whole(folder) / WEIGHTS)
    return folder


def _all_sound(folder: Path) -> Path:
    for config in folder.glob(f"*/{CONFIG}"):
        _sound(config.parent)
    return folder


def _files(name: str) -> list[str]:
    return [f"{name}/{CONFIG}", f"{name}/{WEIGHTS}"]


def _config(folder: Path) -> dict:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return {**config, **config.get("metadata", {})}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise ValueError(_damaged(folder / CONFIG, error)) from error


def _check_fit(model: TransformerBridge, depth: int, config: dict) -> None:
    """ValueError when the SAE was trained on something else than this depth of this model's stream."""
    where, wanted = release(model), site(model, depth)
    name = f"The SAE for {wanted} of {where.name}"
    if config.get("d_in") != model.cfg.d_model:
        raise ValueError(
            f"{name} reads {config.get('d_in')} numbers per token, but {model.cfg.model_name} has d_model "
            f"{model.cfg.d_model}."
        )
    trained_at = config.get("hook_name") or config.get("hook_point")
    if trained_at != wanted:
        raise ValueError(
            f"{name} says that it was trained at {trained_at}: its folder is named after another hook point."
        )
    stream = where.stream
    if not stream:
        loaded = config.get("model_from_pretrained_kwargs") or {}
        stream = "centred" if loaded.get("center_writing_weights", False) else "raw"
    if (stream == "centred") != is_centred(model):
        ours = "centred" if is_centred(model) else "raw"
        raise ValueError(
            f"{name} was trained on the {stream} residual stream, but {model.cfg.model_name} is loaded with the {ours} "
            "one (models with LayerNorm are centred, those with RMSNorm are raw)."
        )


def _warn_of_poor_fit(table: pd.DataFrame) -> None:
    here, other = table[table.used].iloc[0], table[~table.used].iloc[0]
    value = f"The SAE at depth {here.depth} explains {here.explained_variance:.2f} of the variance of neutral text"
    if other.explained_variance > max(here.explained_variance + 0.01, FLOOR):
        better = f"{other.explained_variance:.2f} on the {other.stream} stream"
        warnings.warn(f"{value}, but {better}: it was probably trained on that.", stacklevel=3)
    elif here.explained_variance < FLOOR:
        warnings.warn(f"{value}: it probably belongs to another model or depth, or saw other text.", stacklevel=3)


def _damaged(path: Path, reason: object) -> str:
    behind = f" and {path.resolve()}, which it links to," if path.is_symlink() else ""
    return f"{path} is damaged or not an SAE of sae-lens ({reason}): delete it{behind} and fetch or make it again."
