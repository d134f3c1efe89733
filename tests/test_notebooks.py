"""The notebooks' form as committed, and whether they run on models of other families.

`make reproduce` executes them on bookworm; nothing here does.
"""

import ast
import json
import re
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import run
import torch
from nbformat import NotebookNode

from helpers import claims
from helpers.claims import VERDICTS
from helpers.config import DATA, FIGURES, ROOT

MOST_CELLS, MOST_LINES, LONGEST_DEF, LARGEST = 60, 20, 3, 1_000_000
NEED_SAES = {"04_output_features"}  # figures that a model without SAEs does not get
NOTEBOOKS = run.chosen(run.NOTEBOOKS)
COMPARES, COMPARED = {"07_across_models.ipynb"}, (*claims.siblings(), "bookworm")
# In prose: thresholds and confidence levels. Beyond these, only what data/claims.csv quotes for this notebook.
NOT_A_RESULT = {"0.05", "0.1", "0.5", "50 %", "95 %"}
NUMBER = re.compile(r"(?<![\w.])(?:\d+(?:\.\d+)? ?%|\d*\.\d+)(?![\w])")
MACHINE_PATH = re.compile(r"(?<![\w.:/])(?:/(?:home|root|Users|work|tmp|mnt|opt|var|content)/|[A-Z]:\\)")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    """Every committed notebook in turn."""
    return request.param


@pytest.fixture
def notebook(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def test_the_title_has_the_number_of_the_file(path: Path, notebook: NotebookNode):
    assert notebook.cells[0].source.startswith(f"# {path.name[:2]} · ")
    titles = [line for text in _prose(notebook) for line in text.splitlines() if line.startswith("# ")]
    assert len(titles) == 1


@pytest.mark.parametrize("part", ["Question", "Answer", "Reads", "Writes", "Takes"])
def test_the_first_cell_says_what_to_expect(notebook: NotebookNode, part: str):
    assert re.search(rf"\*\*{part}\.?\*\* +\S", notebook.cells[0].source)


def test_the_files_that_it_says_it_reads_are_there(notebook: NotebookNode):
    named = re.findall(r"`(data/[^`<>*]+)`", "\n".join(_prose(notebook)))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("heading", ["Try your own", "What we cannot conclude"])
def test_it_ends_with_something_to_try_and_with_its_limits(notebook: NotebookNode, heading: str):
    assert any(text.startswith(f"## {heading}\n") for text in _prose(notebook))


def test_it_was_executed_from_top_to_bottom(notebook: NotebookNode):
    code = _code_cells(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_it_was_executed_on_bookworm(notebook: NotebookNode):
    printed = "".join(output.get("text", "") for cell in _code_cells(notebook) for output in cell.outputs)
    assert re.findall(r"^Model: (\S+)", printed, re.MULTILINE) == ["bookworm"]


def test_no_cell_failed_or_warned(notebook: NotebookNode):
    outputs = _outputs(notebook)
    assert [output.ename for output in outputs if output.output_type == "error"] == []
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []


def test_it_is_as_run_py_leaves_it(notebook: NotebookNode):
    """No stderr, widget views, timings: nothing that differs from run to run."""
    assert run.normalised(deepcopy(notebook)) == notebook
    assert [output for output in _outputs(notebook) if run.WIDGET_VIEW in output.get("data", {})] == []


def test_it_is_small_enough_to_read_and_to_keep(path: Path, notebook: NotebookNode):
    assert path.stat().st_size < LARGEST
    assert len(notebook.cells) <= MOST_CELLS


def test_code_cells_are_short(notebook: NotebookNode):
    sources = [cell.source for cell in _code_cells(notebook)]
    lines = {source.splitlines()[0]: len(source.splitlines()) for source in sources}
    assert {first: count for first, count in lines.items() if count > MOST_LINES} == {}


def test_functions_stand_in_helpers(notebook: NotebookNode):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    lines = {node.name: node.end_lineno - node.lineno + 1 for node in _nodes(notebook) if isinstance(node, kinds)}
    assert {name: count for name, count in lines.items() if count > LONGEST_DEF} == {}


def test_it_leaves_the_environment_alone(notebook: NotebookNode):
    found = [
        line
        for cell in _code_cells(notebook)
        for line in cell.source.splitlines()
        if re.search(r"sys\.path|os\.chdir|^\s*[%!]", line)
    ]
    assert found == []


def test_no_path_of_a_machine_in_code_or_outputs(notebook: NotebookNode):
    strings = [n.value for n in _nodes(notebook) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    assert [text for text in strings if text.startswith(("/", "~/")) and len(text) > 1] == []
    shown = [output.get("text", "") for output in _outputs(notebook)]
    for output in _outputs(notebook):
        shown += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    assert [text for text in [*strings, *shown] if MACHINE_PATH.search(text)] == []


def test_no_model_is_named_in_code(notebook: NotebookNode):
    code = "\n".join(cell.source for cell in _code_cells(notebook))
    assert re.findall(r"bookworm|gpt2\S*", code, re.IGNORECASE) == []


def test_every_figure_is_shown_and_stands_in_the_folder_with_its_numbers(path: Path, notebook: NotebookNode):
    saved = _saved(notebook)
    assert saved
    assert len(set(saved)) == len(saved)
    assert len([output for output in _outputs(notebook) if "image/png" in output.get("data", {})]) >= len(saved)
    for name in saved:
        assert name.startswith(f"{path.name[:2]}_")
        assert (FIGURES / "bookworm" / f"{name}.png").is_file()
        named = set(pd.read_csv(FIGURES / "bookworm" / f"{name}.csv")["model"])
        assert named == {"bookworm"} or (
            path.name in COMPARES and named <= {*COMPARED, ", ".join(COMPARED), ", ".join(claims.siblings())}
        )


def test_no_figure_is_left_from_an_earlier_version(path: Path, notebook: NotebookNode):
    there = {figure.stem for figure in (FIGURES / "bookworm").glob(f"{path.name[:2]}_*.png")}
    assert there == set(_saved(notebook))


def test_links_lead_somewhere(path: Path, notebook: NotebookNode):
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", "\n".join(_prose(notebook)))
    assert [target for target in targets if not (path.parent / target).exists()] == []
    assert [target for target in targets if target.endswith(".ipynb")] or len(NOTEBOOKS) == 1


def test_prose_states_no_results(path: Path, notebook: NotebookNode):
    """The same prose stands beside every model's results, so numbers are computed, or quoted from the ledger."""
    ledger = pd.read_csv(DATA / "claims.csv").query("notebook == @path.stem")
    quoted = _numbers(" ".join(ledger[["statement", "published", "decided_by"]].to_numpy().ravel()))
    assert _numbers(" ".join(_prose(notebook))) - NOT_A_RESULT - quoted == set()


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("an AUROC of 0.73, or .73; 41 % of 3 pairs", {"0.73", "41 %"}),
        ("chapter 3, version `1.2`, arXiv 2604.04064, 2026, [x](1.5.ipynb)", set()),
        ("d is 1.86.", {"1.86"}),
    ],
)
def test_numbers_that_look_like_results_are_found(text: str, numbers: set[str]):
    assert _numbers(text) == numbers


@pytest.fixture
def random_run(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, list[str], bool], Path]:
    """Runs notebooks on a random model of a family, with random SAEs or without; the folder with its figures."""

    def run_on(family: str, numbers: list[str], with_saes: bool, context: int = 256) -> Path:
        folder = _longer(model_folder(family), tmp_path / f"random-{family}", context)
        if with_saes:
            _random_saes(folder)
        monkeypatch.setenv("FIGURES", str(tmp_path / "figures"))
        monkeypatch.setenv("GRID", "reduced")
        monkeypatch.setenv("MODEL", str(folder))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        figures = tmp_path / "figures" / f"local--random-{family}"
        figures.mkdir(parents=True)
        shutil.copy(FIGURES / "bookworm" / "01_choices.csv", figures)  # notebook 01 replaces it, the others read it
        committed = {path: path.read_bytes() for path in NOTEBOOKS}
        run.run(run.chosen(run.NOTEBOOKS, numbers), tmp_path / "executed", figures)
        assert {path: path.read_bytes() for path in NOTEBOOKS} == committed
        assert not (FIGURES / f"local--random-{family}").exists()
        return figures

    return run_on


@pytest.mark.parametrize(
    ("family", "numbers", "with_saes"),
    [
        ("llama", ["01", "02", "03", "04", "05", "06", "08"], True),
        ("gpt_neox", ["01", "04", "05", "06", "08"], False),
    ],
)
def test_notebooks_run_on_a_random_model_of_another_family(
    family: str, numbers: list[str], with_saes: bool, random_run: Callable, tmp_path: Path
):
    figures, name = random_run(family, numbers, with_saes), f"local--random-{family}"
    for path in run.chosen(run.NOTEBOOKS, numbers):
        done = nbformat.read(tmp_path / "executed" / path.name, as_version=4)
        assert [cell.execution_count for cell in _code_cells(done)] == list(range(1, len(_code_cells(done)) + 1))
        for saved in _saved(done):
            if saved in NEED_SAES and not with_saes:
                continue
            assert (figures / f"{saved}.png").is_file()
            assert set(pd.read_csv(figures / f"{saved}.csv")["model"]) == {name}
    for choices in figures.glob("*_choices.csv"):
        assert with_saes or set(pd.read_csv(choices)["model"]) == {name}
    recorded = pd.read_csv(figures / "claims.csv")
    assert set(recorded["model"]) == {name}
    assert set(recorded["verdict"]) <= set(VERDICTS)


def test_notebook_07_compares_any_models(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folders = [_longer(model_folder(family), tmp_path / f"random-{family}", 256) for family in ("llama", "gpt_neox")]
    slugs = [f"local--{folder.name}" for folder in folders]
    card = tmp_path / "figures" / "+".join(slugs)
    choices = {"FIGURES": tmp_path / "figures", "GRID": "reduced", "WORKERS": 1, "OMP_NUM_THREADS": 1}
    for name, value in {**choices, "MODELS": " ".join(map(str, folders))}.items():
        monkeypatch.setenv(name, str(value))
    [path] = run.chosen(run.NOTEBOOKS, ["07"])
    run.run([path], tmp_path / "executed", card)
    done = nbformat.read(tmp_path / "executed" / path.name, as_version=4)
    for saved in _saved(done):
        assert (card / f"{saved}.png").is_file()
    curves = pd.read_csv(card / "07_separation.csv")
    assert set(curves["model"]) == set(slugs) and set(curves["relative depth"]) >= {0, 1}
    recorded = claims.recorded(card, card.name)
    assert recorded["claim"].tolist() == ["B-architecture-invariant"] and set(recorded["verdict"]) <= set(VERDICTS)


def test_notebooks_about_saes_are_skipped_for_a_model_without_any(
    random_run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    figures = random_run("gpt_neox", ["02", "03"], False)
    said = capsys.readouterr().out
    assert said.count("skipped: There are no SAEs for local--random-gpt_neox. Known ones: bookworm, gpt2-small") == 2
    assert "0 of 2 notebooks ran" in said
    assert not list((tmp_path / "executed").glob("*.ipynb"))
    card = claims.recorded(figures).set_index("claim")
    assert set(card["verdict"]) == {"not applicable"} and "E-happy-block" in card.index
    assert set(card["note"]) == {"There are no SAEs for local--random-gpt_neox"}


def test_a_context_too_short_for_the_texts_is_a_reason_that_the_report_card_gives(
    random_run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    card = claims.recorded(random_run("gpt_neox", ["06"], False, context=64)).set_index("claim")
    assert re.search(r"skipped: \w+\.yaml, line \d+: .* reads at most 64", capsys.readouterr().out)
    asked = claims.published().query("notebook == '06_ct_scan'")["claim"]
    assert sorted(card.index) == sorted(asked) and set(card["verdict"]) == {"not applicable"}
    assert card["note"].str.contains("reads at most 64").all()
    assert not list((tmp_path / "executed").glob("*.ipynb"))


def _random_saes(folder: Path) -> None:
    """Random SAEs in the folder's `saes`, one per depth, that read the raw stream of a Llama."""
    from sae_lens import StandardSAE, StandardSAEConfig

    config = json.loads((folder / "config.json").read_text())
    n_layers, generator = config["num_hidden_layers"], torch.Generator().manual_seed(0)
    hooks = [f"blocks.{i}.hook_resid_pre" for i in range(n_layers)] + [f"blocks.{n_layers - 1}.hook_resid_post"]
    for hook in hooks:
        sae = StandardSAE(StandardSAEConfig(d_in=config["hidden_size"], d_sae=96))
        sae.cfg.metadata.hook_name = hook
        sae.W_dec.data = torch.nn.functional.normalize(torch.randn(sae.W_dec.shape, generator=generator), dim=-1)
        sae.W_enc.data = sae.W_dec.data.T.contiguous()
        sae.save_model(folder / "saes" / hook)


def _longer(folder: Path, to: Path, context: int) -> Path:
    """The same model with another context (the prompts of notebook 04 need 256): rotary embeddings have no length."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))
    return to


def _prose(notebook: NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def _code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in _code_cells(notebook) for output in cell.outputs]


def _nodes(notebook: NotebookNode) -> Iterator[ast.AST]:
    """Every node of the notebook's code; lines that are not Python (% and !) are another test's matter."""
    for cell in _code_cells(notebook):
        yield from ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.MULTILINE)))


def _saved(notebook: NotebookNode) -> list[str]:
    """The names of all figures that the notebook saves."""
    calls = [node for node in _nodes(notebook) if isinstance(node, ast.Call) and ast.unparse(node.func) == "plots.save"]
    return [ast.literal_eval(call.args[2]) for call in calls]


def _numbers(text: str) -> set[str]:
    """Decimals and percentages outside of code, links and arXiv's numbers."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|arXiv:? ?[\d.v]+", " ", text)
    found = {re.sub(r" ?%", " %", number) for number in NUMBER.findall(text)}
    return {f"0{number}" if number.startswith(".") else number for number in found}
