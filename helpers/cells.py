"""Pieces of a long computation, kept on disk as Parquet files named after everything that they depend on.

A cell is read back only if nothing that it was made from has changed: weights, vectors, prompts, settings, the code and
the versions of the libraries are all part of its fingerprint.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from inspect import isfunction, unwrap
from pathlib import Path
from types import CodeType, EllipsisType

import joblib
import pandas as pd
import torch
from pyarrow import ArrowException

from helpers.files import replacing

LIBRARIES = ("torch", "transformers", "transformer-lens", "sae-lens")
SOURCES = (
    "activations", "cells", "config", "continuations", "directions", "passes", "prompts", "steering", "sweeps", "texts",
)  # fmt: skip
LABEL = "fingerprint"


def fingerprint(*parts: object) -> str:
    """A name that changes with any of the parts: texts, numbers, tables, tensors, modules, functions, what holds these.

    Raises TypeError for a part of another kind, whose changes could go unnoticed.
    """
    return joblib.hash(_plain(parts), hash_name="sha1")


def surroundings(model: torch.nn.Module, device: str) -> str:
    """The fingerprint of what every cell depends on: the model's weights, where they run, the code, the libraries."""
    code = {name: (Path(__file__).parent / f"{name}.py").read_bytes() for name in SOURCES}
    return fingerprint(model, device, code, {name: version(name) for name in LIBRARIES})


def kept(folder: Path | None, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table that stands in `folder` under this fingerprint, or else what `make` returns, which is put there.

    A file that is damaged, or that was made for another fingerprint, counts as missing. Nothing is kept without folder.
    """
    if folder is None:
        return make()
    path = folder / f"{name}.parquet"
    if path.is_file():
        try:
            table = pd.read_parquet(path)
            if table.attrs.pop(LABEL, None) == name:
                return table
        except (OSError, ValueError, ArrowException):
            pass  # half a file of a killed machine: made anew below
    table = make()
    with replacing(path) as temporary:
        labelled = table.copy()
        labelled.attrs[LABEL] = name
        labelled.to_parquet(temporary, index=False)
    return table


def _plain(part: object) -> object:
    """The part as nested lists of text, numbers and arrays."""
    match part:
        case None | str() | bytes() | bool() | int() | float():
            return part
        case EllipsisType():
            return ["..."]
        case CodeType():
            return ["code", part.co_code, *part.co_names, _plain(part.co_consts)]
        case torch.Tensor():
            data = part.detach().cpu().contiguous()
            return [str(data.dtype), list(data.shape), data.reshape(-1).view(torch.uint8).numpy()]
        case torch.nn.Module():
            weights = {name: _plain(weight) for name, weight in part.state_dict().items()}
            return [type(part).__name__, _settings(part), weights]
        case pd.DataFrame():
            return [
                "table",
                *([_plain(name), [_plain(each) for each in column.tolist()]] for name, column in part.items()),
            ]
        case Mapping():
            return ["mapping", *([_plain(key), _plain(value)] for key, value in part.items())]
        case set() | frozenset():
            return ["set", *sorted(joblib.hash(_plain(each)) for each in part)]
        case Sequence():
            return [_plain(each) for each in part]
    if isfunction(part):  # one that was edited in a notebook is known for another
        inner = unwrap(part)
        enclosed = [cell.cell_contents for cell in inner.__closure__ or ()]
        return [part.__module__, part.__qualname__, *map(_plain, (inner.__code__, inner.__defaults__, enclosed))]
    if is_dataclass(part):
        values = [[field.name, _plain(getattr(part, field.name))] for field in fields(part)]
        return [type(part).__name__, _plain(getattr(type(part), "difference", None)), values]
    raise TypeError(f"cannot tell whether a {type(part).__name__} has changed: give text, numbers, tables or tensors")


def _settings(module: torch.nn.Module) -> str:
    """How a module of transformers or sae-lens computes with its weights; not the folder that it was loaded from."""
    config = getattr(module, "config", None) or getattr(module, "cfg", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return str(sorted((name, str(value)) for name, value in settings.items() if name != "_name_or_path"))
