"""notebooks/run.py on notebooks of a few cells, in real kernels."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import run
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers.claims import published, recorded
from helpers.config import ROOT

GOOD = [
    "import os, sys\nprint(os.environ['MODEL'], os.path.basename(os.getcwd()))",
    "print('noise', file=sys.stderr)\n6 * 7",
]
FAILING = ["x = 1", "x / 0", "print('never reached')"]


@pytest.fixture
def notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for notebooks; MODEL is not set, nor MODELS."""
    monkeypatch.setenv("MODEL", "")
    monkeypatch.setenv("MODELS", "")
    folder = tmp_path / "notebooks"
    folder.mkdir()
    return folder


def test_an_executed_notebook_overwrites_the_committed_one_and_a_second_run_changes_nothing(
    notebooks: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    path = _notebook(notebooks / "01_good.ipynb", GOOD)
    assert run.main([], notebooks, tmp_path / "figures") == 0
    first = path.read_bytes()
    cells = nbformat.read(path, as_version=4).cells
    assert [cell.execution_count for cell in cells[1:]] == [1, 2]
    assert cells[1].outputs[0].text == "bookworm notebooks\n"
    assert [output.output_type for output in cells[2].outputs] == ["execute_result"]
    said = capsys.readouterr().out
    assert "[1 of 1] 01_good" in said
    assert "1 of 1 notebooks ran" in said
    assert run.main([], notebooks, tmp_path / "figures") == 0
    assert path.read_bytes() == first
    assert list(notebooks.iterdir()) == [path]


def test_printed_pieces_are_joined_only_where_they_follow_each_other():
    printed = [new_output("stream", name=name, text=text) for name, text in zip("ooeoo", "abcde")]
    names = {"o": "stdout", "e": "stderr"}
    for output in printed:
        output.name = names[output.name]
    shown = new_output("display_data", data={"text/plain": "x"})
    cell = new_code_cell("1", outputs=[*printed[:3], shown, *printed[3:]])
    joined = run._joined(cell.outputs)
    assert [output.get("text") for output in joined] == ["ab", "c", None, "de"]


def test_what_differs_from_run_to_run_is_dropped():
    cell = new_code_cell(
        "bar()", execution_count=3, metadata={"execution": {"iopub.status.busy": "now"}, "tags": ["a"]}
    )
    cell.outputs = [
        new_output("stream", name="stderr", text="warning"),
        new_output("stream", name="stdout", text="kept"),
        new_output("display_data", data={run.WIDGET_VIEW: {"model_id": "random"}, "text/plain": "Slider()"}),
        new_output("display_data", data={"text/plain": "<Styler at 0x7f5b8f6f3450>"}),
    ]
    metadata = {
        "widgets": {"state": {}},
        "language_info": {"name": "python", "version": "3.11.7"},
        "kernelspec": {"name": "mine", "display_name": "Mine"},
    }
    notebook = run.normalised(new_notebook(cells=[cell], metadata=metadata))
    assert notebook.metadata == {"kernelspec": run.KERNEL, "language_info": run.LANGUAGE}
    kept, address = notebook.cells[0].outputs
    assert kept.text == "kept"
    assert address.data == {"text/plain": "<Styler>"}
    assert notebook.cells[0].metadata == {"tags": ["a"]}
    assert notebook.cells[0].execution_count == 3


def test_a_failing_cell_is_named_and_its_notebook_stays_as_it_was(
    notebooks: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    path = _notebook(notebooks / "01_failing.ipynb", FAILING)
    later = _notebook(notebooks / "02_later.ipynb", GOOD)
    before = path.read_bytes(), later.read_bytes()
    assert run.main([], notebooks, tmp_path / "figures") == 1
    told = capsys.readouterr().err
    assert "01_failing.ipynb failed in cell 3 of 4" in told
    assert "x / 0" in told
    assert "ZeroDivisionError: division by zero" in told
    assert "\x1b" not in told
    assert (path.read_bytes(), later.read_bytes()) == before
    assert sorted(notebooks.iterdir()) == [path, later]


def test_a_kernel_that_dies_is_reported_with_its_cell(notebooks: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = _notebook(notebooks / "01_dying.ipynb", ["x = 1", "import os\nos._exit(9)"])
    before = path.read_bytes()
    assert run.main([], notebooks, tmp_path / "figures") == 1
    told = capsys.readouterr().err
    assert "01_dying.ipynb failed in cell 3 of 3" in told
    assert "os._exit(9)" in told
    assert "memory" in told
    assert path.read_bytes() == before


def test_ctrl_c_leaves_the_notebook_as_it_was_and_nothing_beside_it(notebooks: Path, tmp_path: Path):
    started = tmp_path / "started"
    cells = [f"import pathlib, time\npathlib.Path({str(started)!r}).touch()\ntime.sleep(60)"]
    path = _notebook(notebooks / "01_long.ipynb", cells)
    before = path.read_bytes()
    code = "import sys, run; from pathlib import Path; sys.exit(run.main([], Path(sys.argv[1]), Path(sys.argv[2])))"
    running = subprocess.Popen(
        [sys.executable, "-c", code, str(notebooks), str(tmp_path / "figures")],
        env={**os.environ, "PYTHONPATH": str(Path(run.__file__).parent)},
        stderr=subprocess.PIPE,
        text=True,
    )
    waited = time.monotonic()
    while not started.exists() and time.monotonic() - waited < 60:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    told = running.communicate(timeout=30)[1]
    assert running.returncode == 130
    assert told.strip() == "Stopped. The notebook that was running stays as it was."
    assert path.read_bytes() == before
    assert list(notebooks.iterdir()) == [path]


def test_another_model_leaves_the_committed_notebook_alone(
    notebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = _notebook(notebooks / "01_good.ipynb", GOOD)
    before = path.read_bytes()
    monkeypatch.setenv("MODEL", "some-organisation/some-model")
    assert run.main([], notebooks, tmp_path / "figures") == 0
    assert path.read_bytes() == before
    copies = list((tmp_path / "figures").rglob("*.ipynb"))
    assert len(copies) == 1
    assert "some-model" in copies[0].parent.name
    outputs = nbformat.read(copies[0], as_version=4).cells[1].outputs
    assert outputs[0].text == "some-organisation/some-model notebooks\n"


def test_several_models_go_through_the_notebook_that_compares_them_and_replace_nothing(
    notebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ("06_good", "07_good"):
        _notebook(notebooks / f"{name}.ipynb", GOOD)
    before = {path: path.read_bytes() for path in notebooks.iterdir()}
    monkeypatch.setenv("MODELS", "gpt2-small qwen3-0.6b")
    assert run.main([], notebooks, tmp_path / "figures") == 0
    assert {path: path.read_bytes() for path in notebooks.iterdir()} == before
    assert [path.name for path in (tmp_path / "figures" / "gpt2-small+qwen3-0.6b").iterdir()] == ["07_good.ipynb"]
    assert "Model: gpt2-small qwen3-0.6b. Notebooks: 07_good" in capsys.readouterr().out


def test_a_notebook_that_a_model_cannot_run_is_skipped_and_its_claims_say_why(
    notebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Unless it is a committed one, which has to run."""
    lacking = ["class NoSAEs(ValueError): pass", "raise NoSAEs('There are none. Known ones: others')"]
    path = _notebook(notebooks / "02_sae_features.ipynb", lacking)
    before = path.read_bytes()
    assert run.main([], notebooks, tmp_path / "figures") == 1
    assert "02_sae_features.ipynb does not run: There are none. Known ones" in capsys.readouterr().err
    monkeypatch.setenv("MODEL", "someone/model")
    assert run.main([], notebooks, tmp_path / "figures") == 0
    assert path.read_bytes() == before and "0 of 1 notebooks ran" in capsys.readouterr().out
    card = recorded(tmp_path / "figures" / "someone--model", "someone--model")
    assert card["claim"].tolist() == sorted(published().query("notebook == '02_sae_features'")["claim"])
    assert set(card["verdict"]) == {"not applicable"} and set(card["note"]) == {"There are none"}


def test_a_local_folder_is_handed_on_as_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my model"
    folder.mkdir()
    (tmp_path / "bookworm").mkdir()
    assert run.model_name({"MODEL": "my model"}) == str(folder)
    assert run.model_name({"MODEL": "gpt2-small"}) == "gpt2-small"
    assert run.model_name({"MODEL": ""}) == run.model_name({}) == "bookworm"


def test_notebooks_run_in_order_and_by_the_beginning_of_their_names(notebooks: Path):
    paths = [_notebook(notebooks / name, []) for name in ("01_a.ipynb", "02_b.ipynb", "10_c.ipynb")]
    _notebook(notebooks / "draft.ipynb", [])
    assert run.chosen(notebooks) == paths
    assert run.chosen(notebooks, ["10", "01"]) == [paths[0], paths[2]]
    with pytest.raises(run.Failure, match=r"no notebook begins with '03'; there are: 01_a, 02_b, 10_c"):
        run.chosen(notebooks, ["03"])


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(
    notebooks: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    started = tmp_path / "started"
    source = _notebook(notebooks / "01_good.ipynb", [f"open({str(started)!r}, 'w')"])
    (tmp_path / "figures").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="cannot write 01_good"):
        run.execute(source, tmp_path / "figures" / "01_good.ipynb")
    assert not started.exists()


def _notebook(path: Path, sources: list[str]) -> Path:
    """A notebook as an earlier run left it: a title, and code cells with counts and outputs."""
    stale = [new_output("stream", name="stdout", text="stale")]
    code = [new_code_cell(source, execution_count=9, outputs=stale) for source in sources]
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A title"), *code]), path)
    return path


@pytest.mark.parametrize(
    ("grid", "folders"),
    [("", ["notebooks", "figures"]), ("reduced", ["figures/reduced-grid/bookworm", "figures/reduced-grid"])],
)
def test_a_reduced_grid_replaces_nothing_that_is_committed(grid: str, folders: list[str]):
    asked = "import run; from helpers.config import FIGURES; print(run.output_folder('bookworm'), FIGURES, sep='\\n')"
    here = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "notebooks")]), "GRID": grid}
    said = subprocess.run([sys.executable, "-c", asked], env=here, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == [str(ROOT / folder) for folder in folders]
