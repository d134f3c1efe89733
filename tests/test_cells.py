"""Fingerprints that change with their content and nothing else; tables kept under them, read back or made anew."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from sae_lens import TopKSAE, TopKSAEConfig
from torch import Generator
from transformer_lens.model_bridge import TransformerBridge

from helpers import cells
from helpers.cells import fingerprint, kept, surroundings
from helpers.models import load_model
from helpers.steering import Ablate, Add, Clamp

ONE = torch.arange(6.0)
TABLE = pd.DataFrame(
    {
        "text": ["a", "", "ü"],
        "depth": pd.array([1, None, 3], dtype="Int64"),
        "value": [1 / 3, np.nan, -0.0],
        "count": [1, 2, 3],
    }
)
PROMPTS = pd.DataFrame({"text": ["a", "", "ü"], "value": [1 / 3, np.nan, 2.0], "count": [1, 2, 3]})


@dataclass(frozen=True)
class Inner:
    value: object


@dataclass(frozen=True)
class Outer:
    name: str
    inner: object


@dataclass(frozen=True)
class Other:
    name: str
    inner: object


def _module(value: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    made = torch.nn.Linear(3, 2).to(dtype)
    for weight in made.parameters():
        torch.nn.init.constant_(weight, value)
    return made


def _closed(value: object, default: int = 1) -> Callable:
    def inner(text: str, count: int = default) -> list:
        return [(value, each) for each in text[:count]]

    return inner


DIFFERENT = {
    "kinds of one": [1, 1.0, True, "1", b"1"],
    "empty": [None, "", 0, False, 0.0, [], b""],
    "numbers": [0.1, 0.1 + 1e-16, 1e-9, -1e-9, float("nan"), float("inf")],
    "texts": ["a", "a ", "A", "ab"],
    "lists": [["a", "b"], ["b", "a"], ["ab"], ["a", ["b"]], [["a"], ["b"]], ["a", "b", "b"]],
    "mappings": [{"a": 1}, {"a": 2}, {"b": 1}, {"a": 1, "b": 1}, {1: 1}],
    "values": [ONE, ONE + 1e-6, ONE.flip(0), ONE * torch.nan],
    "shapes": [ONE, ONE.view(2, 3), ONE.view(3, 2), ONE.view(1, 6), ONE[:5]],
    "dtypes": [torch.zeros(4, dtype=d) for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16)]
    + [torch.zeros(4, dtype=d) for d in (torch.int32, torch.int64, torch.uint8, torch.bool)],
    "same bytes": [torch.zeros(4, dtype=torch.bfloat16), torch.zeros(2), torch.zeros(8, dtype=torch.uint8)],
    "bfloat16": [torch.tensor([x], dtype=torch.bfloat16) for x in (1.0, 1.0078125, torch.nan)],
    "no numbers": [torch.zeros(0), torch.zeros(2, 0), torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)],
    "scalars": [torch.tensor(1.0), torch.tensor(2.0), torch.tensor([1.0]), torch.tensor(1), torch.tensor(True)],
    "cut elsewhere": [[ONE[:2], ONE[2:]], [ONE[:3], ONE[3:]], [ONE]],
    "modules": [_module(), _module(2.0), _module(dtype=torch.float64), torch.nn.Sequential(_module())],
    "dataclasses": [
        Outer("a", Inner(1)), Outer("a", Inner(2)), Outer("b", Inner(1)), Other("a", Inner(1)), Outer("a", Inner(1.0)),
        Outer("a", {"x": Inner([ONE])}), Outer("a", {"x": Inner([ONE + 1])}), Outer("a", None),
    ],
    "methods": [Add(ONE[None]), Ablate(ONE[None]), Ablate(ONE[None], torch.zeros(1)), Add(ONE[None] + 1)],
    "tables": [
        PROMPTS, PROMPTS.rename(columns={"text": "said"}), PROMPTS[["text"]], PROMPTS[::-1], PROMPTS[:2], PROMPTS[:0],
        PROMPTS[["count", "text", "value"]], PROMPTS.assign(text=["a", "", "u"]), PROMPTS.assign(value=[1 / 3, 0, 2]),
        PROMPTS.assign(count=[1.0, 2.0, 3.0]), PROMPTS.assign(count=["1", "2", "3"]),
    ],
    "functions": [_closed(1), _closed(2), _closed(None), _closed(1, 2), kept, surroundings],
    "parts of functions": [
        lambda text: text, lambda text: [each + "a" for each in text], lambda text: text[..., None],
        lambda text: text in {"a", "b"}, lambda text: text in {"a", "c"}, lambda text: text.lower(),
    ],
    "sets": [{"a"}, {"b"}, {"a", "b"}, {"ab"}, set()],
    "kinds of one in sets": [{1}, {"1"}],
}  # fmt: skip


@pytest.mark.parametrize("which", DIFFERENT)
def test_what_differs_has_another_fingerprint(which: str):
    for one, other in combinations(DIFFERENT[which], 2):
        assert fingerprint(one) != fingerprint(other), (one, other)
        assert fingerprint({"deep": [one]}) != fingerprint({"deep": [other]}), (one, other)


ALIKE = {
    "transposed": (ONE.view(2, 3).T.contiguous(), ONE.view(2, 3).T),
    "every second": (ONE[::2].clone(), ONE[::2]),
    "expanded": (torch.ones(4, 3), torch.ones(1, 3).expand(4, 3)),
    "a window of a longer one": (ONE[2:4].clone(), ONE[2:4]),
    "with gradient": (ONE, ONE.clone().requires_grad_()),
    "a parameter": (ONE, torch.nn.Parameter(ONE)),
    "bfloat16": (torch.ones(4, 3).bfloat16(), torch.ones(3, 4).bfloat16().T),
    "one object twice": ([ONE, ONE], [ONE, ONE.clone()]),
    "one text twice": (["long text"] * 2, ["long text", " ".join(["long", "text"])]),
    "modules": (_module(), _module()),
    "tables": (PROMPTS, PROMPTS.set_index(pd.Index([7, 8, 9]))),
    "a view of a table": (PROMPTS[1:].copy(), PROMPTS[1:]),
    "functions": (_closed("a"), _closed("a")),
    "sets": ({"a", "b", "c"}, frozenset(["c", "b", "a"])),
    "read-only mappings": ({"a": 1}, MappingProxyType({"a": 1})),
}


@pytest.mark.parametrize("which", ALIKE)
def test_what_is_alike_has_the_same_fingerprint(which: str):
    one, other = ALIKE[which]
    assert fingerprint(one) == fingerprint(other)


def test_the_parts_are_told_apart():
    assert fingerprint("a", "b") != fingerprint("b", "a") != fingerprint("ab") != fingerprint(["a", "b"], None)


def test_a_fingerprint_is_the_name_of_a_file():
    assert fingerprint(PROMPTS, ONE, "../..").isalnum()


PROGRAM = """
import json, torch
import pandas as pd
from helpers.cells import fingerprint
words = ["perhaps", "no", "said", "maybe", "never", "told"]
parts = [set(words), {"a": set(words), "b": 1.5}, torch.arange(6.).view(2, 3), None, torch.arange(4).bfloat16(),
         pd.DataFrame({"text": words, "number": 1}), torch.nn.Identity(), (words, b"x")]
print(json.dumps([list(set(words)), *map(fingerprint, parts)]))
"""


def test_fingerprints_are_the_same_in_every_process():
    """Also where sets of texts have another order."""
    (order, *one), (other_order, *other) = (_in_another_process(hash_seed) for hash_seed in ("1", "2"))
    assert order != other_order
    assert one == other
    assert len(set(one)) == len(one)


@pytest.mark.parametrize(
    "unknown", [print, object(), np.zeros(2), pd.Series([1]), iter([]), pd.Timestamp(0), Path("a"), 1j]
)
def test_what_could_change_unnoticed_is_refused(unknown: object):
    kind = type(unknown).__name__
    for part in (unknown, [1, unknown], {"a": unknown}, Inner(unknown), pd.DataFrame({"a": pd.Series([unknown, 1])})):
        with pytest.raises(TypeError, match=f"cannot tell whether a {kind} has changed"):
            fingerprint(part)


def test_every_weight_of_the_model_is_in_its_surroundings(any_model: TransformerBridge):
    before = _surroundings(any_model)
    assert before == _surroundings(any_model)
    for name, weight in any_model.original_model.named_parameters():
        with _changed(weight):
            assert _surroundings(any_model) != before, name
    for weight in any_model.parameters():
        with _changed(weight):
            assert _surroundings(any_model) != before
    assert _surroundings(any_model) == before


def test_running_the_model_leaves_its_surroundings(any_model: TransformerBridge):
    before = _surroundings(any_model)
    with torch.no_grad():
        any_model.original_model(input_ids=torch.arange(5)[None])
    assert _surroundings(any_model) == before


def test_a_model_of_the_same_weights_that_computes_otherwise_has_other_surroundings(
    model: TransformerBridge, tmp_path: Path
):
    """Its settings are no weights, but what it says depends on them."""
    folder = Path(shutil.copytree(model.cfg.folder, tmp_path / "tiny-gpt2"))
    same = load_model(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 0.5}))
    other = load_model(str(folder))
    ids = torch.arange(5)[None]
    with torch.no_grad():
        logits = [each.original_model(input_ids=ids).logits for each in (model, same, other)]
    assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2])
    assert _surroundings(model) == _surroundings(same) != _surroundings(other)


def test_saes_of_the_same_weights_that_compute_otherwise_have_other_fingerprints(
    small_sae: Callable, generator: Generator
):
    rows = torch.randn(8, 32, generator=generator)
    few, many = (small_sae(rows, "blocks.1.hook_resid_pre", kind=TopKSAE, config=TopKSAEConfig, k=k) for k in (1, 8))
    assert not torch.equal(few.encode(rows), many.encode(rows))
    assert fingerprint(Clamp(few, [0], 1.0)) != fingerprint(Clamp(many, [0], 1.0))


def test_the_surroundings_change_with_device_code_and_libraries(monkeypatch: pytest.MonkeyPatch):
    here = surroundings(_module(), "cpu")
    assert surroundings(_module(), "cpu") == here
    assert surroundings(_module(), "cuda") != here
    for name in cells.LIBRARIES:
        with monkeypatch.context() as patch:
            patch.setattr(cells, "version", lambda asked, name=name: "0" if asked == name else "1")
            one = surroundings(_module(), "cpu")
            patch.setattr(cells, "version", lambda asked: "1")
            assert surroundings(_module(), "cpu") != one != here
    monkeypatch.setattr(cells, "SOURCES", cells.SOURCES[1:])
    assert surroundings(_module(), "cpu") != here


def test_an_edited_helper_changes_the_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in cells.SOURCES:
        (tmp_path / f"{name}.py").write_bytes((Path(cells.__file__).parent / f"{name}.py").read_bytes())
    here = surroundings(_module(), "cpu")
    monkeypatch.setattr(cells, "__file__", str(tmp_path / "cells.py"))
    assert surroundings(_module(), "cpu") == here
    for name in cells.SOURCES:
        before = (tmp_path / f"{name}.py").read_bytes()
        (tmp_path / f"{name}.py").write_bytes(before + b"\n")
        assert surroundings(_module(), "cpu") != here
        (tmp_path / f"{name}.py").write_bytes(before)


def test_a_kept_table_comes_back_exactly_without_being_made_again(tmp_path: Path):
    name = fingerprint("one")
    made = kept(tmp_path / "new" / "folder", name, TABLE.copy)
    found = kept(tmp_path / "new" / "folder", name, _never)
    for table in (made, found):
        assert_frame_equal(table, TABLE, check_exact=True)
        assert table.attrs == {}
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [f"{name}.parquet"]


def test_a_table_without_rows_comes_back_with_its_kinds(tmp_path: Path):
    kept(tmp_path, "empty", lambda: TABLE[:0])
    assert_frame_equal(kept(tmp_path, "empty", _never), TABLE[:0], check_exact=True)


def test_nothing_is_kept_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    made = iter([TABLE, TABLE[:1]])
    assert [len(kept(None, "name", lambda: next(made))) for _ in range(2)] == [3, 1]
    assert list(tmp_path.iterdir()) == []


def test_tables_of_different_names_stand_side_by_side(tmp_path: Path):
    for rows in (1, 2, 3):
        kept(tmp_path, fingerprint(rows), lambda rows=rows: TABLE[:rows])
    assert [len(kept(tmp_path, fingerprint(rows), _never)) for rows in (3, 1, 2)] == [3, 1, 2]


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_made_anew(tmp_path: Path, share: float):
    kept(tmp_path, "name", TABLE.copy)
    whole = (tmp_path / "name.parquet").read_bytes()
    (tmp_path / "name.parquet").write_bytes(whole[: int(share * len(whole))])
    _is_made_anew(tmp_path, "name")


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"text, not Parquet", b"PAR1" * 100])
def test_a_file_that_is_no_parquet_is_made_anew(tmp_path: Path, damage: bytes):
    (tmp_path / "name.parquet").write_bytes(damage)
    _is_made_anew(tmp_path, "name")


def test_a_file_under_another_name_is_made_anew(tmp_path: Path):
    kept(tmp_path, "one", lambda: TABLE[:1])
    (tmp_path / "one.parquet").rename(tmp_path / "two.parquet")
    _is_made_anew(tmp_path, "two")


def test_a_file_without_a_fingerprint_is_made_anew(tmp_path: Path):
    TABLE[:1].to_parquet(tmp_path / "name.parquet")
    _is_made_anew(tmp_path, "name")


def test_an_interruption_while_making_leaves_nothing(tmp_path: Path):
    def stopped() -> pd.DataFrame:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path, "name", stopped)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def half(table: pd.DataFrame, path: Path, **_: object) -> None:
        path.write_bytes(b"PAR1 and so on")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pd.DataFrame, "to_parquet", half)
        kept(tmp_path, "name", TABLE.copy)
    assert list(tmp_path.iterdir()) == []
    _is_made_anew(tmp_path, "name")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"cannot write name\.parquet into") as raised:
        kept(tmp_path / "runs", "name", TABLE.copy)
    assert str(tmp_path / "runs") in str(raised.value)


def _never() -> pd.DataFrame:
    pytest.fail("the kept table was to be read back")


def _is_made_anew(folder: Path, name: str) -> None:
    """What is made replaces the file and is read back the next time."""
    assert_frame_equal(kept(folder, name, TABLE.copy), TABLE)
    assert_frame_equal(kept(folder, name, _never), TABLE)
    assert [path.name for path in folder.iterdir()] == [f"{name}.parquet"]


def _in_another_process(seed: str) -> list:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONHASHSEED": seed},
        cwd=Path(cells.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def _surroundings(model: TransformerBridge) -> str:
    return surroundings(model.original_model, str(model.cfg.device))


@contextmanager
def _changed(weight: torch.Tensor) -> Iterator[None]:
    """The last number of a weight is another one, for the duration."""
    last = tuple(size - 1 for size in weight.shape)
    before = weight.data[last].clone()
    weight.data[last] += 1
    yield
    weight.data[last] = before


def test_an_edited_method_has_another_fingerprint():
    def method(code: str) -> object:
        found: dict = {}
        exec(f"from dataclasses import dataclass\n@dataclass\nclass Push:\n    by: int\n    {code}\n", found)
        return found["Push"](1)

    one = "def difference(self, resid, draw): return resid * 2"
    assert fingerprint(method(one)) == fingerprint(method(one))
    assert fingerprint(method(one)) != fingerprint(method(one.replace("2", "3")))
    assert fingerprint(method(one)) != fingerprint(method(one.replace("*", "+")))
