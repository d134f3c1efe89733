"""`make rehearse` on a model of two blocks: from an empty folder to the report, offline, on the reduced grid."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import rehearse
from huggingface_hub import constants
from rehearsal import KNOWN, NAME, NAMED, Size, built

from helpers.claims import VERDICTS, recorded
from helpers.config import FIGURES, ROOT
from helpers.models import known_models, slug, source

SMALL = ["blocks=2", "d_model=64", "heads=2", "vocabulary=9000", "d_sae=512"]
HOLD_ANYWAY = {"A-d-is-bounded", "E-key-word-features"}  # an identity; and a token is read where it stands


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished rehearsal of two notebooks: hub/ and figures/."""
    folder = tmp_path_factory.mktemp("rehearsal")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GRID", raising=False)
        arguments = ["--only", "01", "02", "--size", *SMALL]
        assert rehearse.main(arguments, folder / "hub", folder / "figures") == 0
    return folder


def test_the_notebooks_ran_from_top_to_bottom_under_a_name_of_their_own(done):
    assert [each.name for each in (done / "figures").iterdir()] == [NAME]
    for path in sorted((done / "figures" / NAME).glob("*.ipynb")):
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        said = "".join(output.get("text", "") for output in cells[0].outputs)
        assert said.startswith(f"Model: {NAME} (GPT2LMHeadModel, 2 blocks")
        assert said.rstrip().endswith("reduced grid")
    assert not (FIGURES / NAME / "01_fear_direction.ipynb").exists()


def test_every_number_says_whose_it_is(done):
    tables = list((done / "figures" / NAME).glob("*.csv"))
    assert len(tables) > 10
    for path in tables:
        assert set(pd.read_csv(path)["model"]) == {NAME}, path.name


def test_nothing_holds_of_random_weights(done):
    found = recorded(done / "figures" / NAME)
    assert set(found["verdict"]) <= set(VERDICTS)
    assert found["note"].str.endswith("reduced grid").all()
    assert set(found.loc[found["verdict"] == "holds", "claim"]) <= HOLD_ANYWAY


def test_the_report_says_how_long_and_in_how_much_memory(done):
    table = pd.read_csv(done / "figures" / NAME / "rehearsal.csv")
    assert table["notebook"].str[:2].tolist() == ["01", "02"]
    assert (table["peak_gb"].between(0.2, rehearse.MOST_GB)).all()
    assert (table["cpu_minutes"] > 0.05).all() and (table["full_cpu_minutes"] >= table["cpu_minutes"]).all()
    assert set(table["grid"]) == {"reduced"}
    assert (done / "figures" / NAME / "rehearsal.png").is_file()
    for part in ("reduced grid:", "peak memory", "Full grid: at most about"):
        assert part in rehearse.told(table)


def test_the_memory_of_what_a_command_starts_counts():
    inner = "x = b'1' * 400_000_000"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    asked = f"import rehearse, sys; print(rehearse.cost([sys.executable, '-c', {outer!r}], {{}}).peak_gb)"
    path = os.pathsep.join(str(ROOT / part) for part in ("", "notebooks", "tests"))
    said = subprocess.run([sys.executable, "-c", asked], env={"PYTHONPATH": path}, capture_output=True, check=True)
    assert 0.4 < float(said.stdout) < 0.6


def test_a_command_that_fails_is_a_failure():
    for status in (0, 3):
        assert rehearse.cost([sys.executable, "-c", f"raise SystemExit({status})"], {}).failed == bool(status)


@pytest.mark.parametrize(("failed", "peak_gb", "status"), [(False, 1.0, 0), (True, 1.0, 1), (False, 7.0, 1)])
def test_a_failure_or_too_much_memory_is_an_exit_status(tmp_path, monkeypatch, failed, peak_gb, status):
    cost = rehearse.Cost(failed, 1.0, 1.0, peak_gb)
    nothing = rehearse.Cost(False, 0.0, 0.0, 0.0)
    monkeypatch.setattr(rehearse, "cost", lambda command, _: cost if "--only" in command else nothing)
    assert rehearse.main(["--only", "01", "02"], tmp_path / "hub", tmp_path) == status
    assert len(pd.read_csv(tmp_path / NAME / "rehearsal.csv")) == (1 if failed else 2)


def test_what_lies_in_such_a_cache_goes_by_its_own_name(done, monkeypatch):
    assert slug(NAMED) == NAMED
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(done / "hub"))
    for name in (NAMED, *KNOWN.aliases.split(), KNOWN.hub_id, NAME):
        assert slug(name) == NAME
    assert source(NAMED).hub_ids[0] == KNOWN.hub_id
    assert NAMED not in known_models().index
    assert slug() == "bookworm"


def test_a_cache_is_made_whole_or_not_at_all_and_once(tmp_path, monkeypatch):
    small = Size(blocks=1, d_model=16, heads=2, vocabulary=8200, d_sae=40)
    (tmp_path / "hub.incomplete" / "blobs").mkdir(parents=True)  # as a stopped one leaves it
    first = built(tmp_path / "hub", small)
    files = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert not (tmp_path / "hub.incomplete").exists()
    assert built(tmp_path / "hub", small) == first
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == files
