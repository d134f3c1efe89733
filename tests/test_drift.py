"""tests/drift.py on a small repository: noise passes, planted drift is found."""

import subprocess
from pathlib import Path

import pandas as pd
import pytest
from drift import main, report

NAMES = ["01_effect.csv", "01_choices.csv"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A committed folder with one table of numbers and texts, and one of choices."""
    effect = {"depth": [0, 1, 2], "d": [0.5, None, -8.0], "kind": ["fear", "calm", "fear"], "text": ["a", "b", "c"]}
    choices = {"depth": [4], "position": ["last"], "score": [0.9]}
    _write(tmp_path, "01_effect.csv", effect)
    _write(tmp_path, "01_choices.csv", choices)
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "figures"]):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_unchanged_files_have_not_moved(root: Path):
    assert report(root)["of what is allowed"].tolist() == [0, 0]
    assert main(root) == 0


def test_noise_within_the_tolerance_passes(root: Path, capsys: pytest.CaptureFixture):
    _edit(root, "01_effect.csv", d=[0.54, None, -8.4], text=["x", "y", "z"])
    _edit(root, "01_choices.csv", depth=[5])
    assert main(root) == 0
    assert "0 of 2 files drifted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("01_effect.csv", {"d": [0.55, None, -8.0]}),  # allowed at 0.5: 0.045
        ("01_effect.csv", {"d": [0.5, None, -8.5]}),  # allowed at -8: 0.42
        ("01_effect.csv", {"d": [0.5, 0.0, -8.0]}),
        ("01_effect.csv", {"d": [None, None, -8.0]}),
        ("01_effect.csv", {"d": [float("inf"), None, -8.0]}),
        ("01_effect.csv", {"d": ["0.5", "high", "-8"]}),
        ("01_effect.csv", {"kind": ["fear", "fear", "fear"]}),
        ("01_effect.csv", {"depth": [0, 2, 2]}),  # one step is for choices alone
        ("01_effect.csv", {"more": [1, 1, 1]}),
        ("01_choices.csv", {"depth": [6]}),
        ("01_choices.csv", {"position": ["mean"]}),
    ],
)
def test_planted_drift_is_found_in_its_file_alone(root: Path, name: str, planted: dict, capsys: pytest.CaptureFixture):
    _edit(root, name, **planted)
    assert main(root) == 1
    assert f"Drifted: {name}." in capsys.readouterr().out


def test_counts_in_written_text_may_move_but_not_their_shape(root: Path):
    name = "04_word_kinds.csv"
    _write(root, name, {"strength": [0, 1], "value": [1.0, 2.0]})
    for command in (["add", "."], ["commit", "-q", "-m", "counts"]):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *command], cwd=root, check=True)
    _edit(root, name, value=[9.0, 0.0])
    assert main(root) == 0
    _write(root, name, {"strength": [0], "value": [1.0]})
    assert main(root) == 1


def test_missing_and_added_rows_and_files_are_drift(root: Path):
    folder = root / "figures/bookworm"
    table = pd.read_csv(folder / "01_effect.csv")
    table.iloc[:2].to_csv(folder / "01_effect.csv", index=False)
    (folder / "01_choices.csv").rename(folder / "01_chosen.csv")
    found = report(root).set_index("file")
    assert found.drifted.tolist() == [True, True, True]
    assert found["where"].to_dict() == {
        "01_choices.csv": "is missing",
        "01_chosen.csv": "is not committed",
        "01_effect.csv": "rows were 3; are 2",
    }


def test_nothing_to_compare_is_a_failure(tmp_path: Path):
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "empty"]):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *command], cwd=tmp_path, check=True)
    assert main(tmp_path) == 1


def _write(root: Path, name: str, columns: dict) -> None:
    path = root / "figures/bookworm" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_csv(path, index=False)


def _edit(root: Path, name: str, **columns: list) -> None:
    table = pd.read_csv(root / "figures/bookworm" / name)
    _write(root, name, {**table.to_dict("list"), **columns})
