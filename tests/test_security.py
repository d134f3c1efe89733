"""What SECURITY.md says is never done, looked for in the code of helpers and notebooks."""

import ast
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from helpers.config import ROOT
from helpers.models import known_models

RUNS_DATA = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "importlib.import_module"}
UNPICKLES = {"torch.load", "joblib.load", "pd.read_pickle", "pandas.read_pickle", "np.load", "numpy.load"}
BUILDS_OBJECTS = {
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.UnsafeLoader",
    "yaml.Loader",
}
NEVER = RUNS_DATA | UNPICKLES | BUILDS_OBJECTS
OFF = {"trust_remote_code", "allow_pickle", "shell"}
MAY_ASK = {"AutoConfig.from_pretrained", "AutoModelForCausalLM.from_pretrained", "AutoTokenizer.from_pretrained"}
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
SCRIPTS = [*(ROOT / "helpers").glob("*.py"), *(ROOT / "notebooks").glob("*.py")]
SOURCES = [*SCRIPTS, *(ROOT / "notebooks").glob("[0-9]*.ipynb")]
REACHES_OUT = {"requests", "huggingface_hub", "neuronpedia", "urllib", "http", "socket", "httpx", "ftplib"}


def code(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def findings(text: str) -> Iterator[str]:
    """What the text does that nothing here may do."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in NEVER:
            yield ast.unparse(node)
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node) & PICKLING
        if isinstance(node, ast.keyword) and node.arg in OFF and ast.unparse(node.value) != "False":
            yield f"{node.arg}={ast.unparse(node.value)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in MAY_ASK:
            yield from {"trust_remote_code left out"} if "trust_remote_code" not in given(node) else ()


def given(call: ast.Call) -> set[str | None]:
    return {keyword.arg for keyword in call.keywords}


def imported(node: ast.Import | ast.ImportFrom) -> set[str]:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_unpickles_runs_data_or_trusts_a_models_code(path: Path):
    assert list(findings(code(path))) == []


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(path)",
        "import pickle",
        "from dill import loads",
        "eval(text)",
        "exec(text)",
        "yaml.load(text, yaml.Loader)",
        "np.load(path, allow_pickle=True)",
        "boot(folder, trust_remote_code=True)",
        "AutoConfig.from_pretrained(folder)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_what_nothing_may_do_is_found(text: str):
    assert list(findings(text))


def test_only_two_modules_reach_out():
    """The hub from hub, Neuronpedia from saes."""
    found = set()
    for path in SCRIPTS:
        nodes = [node for node in ast.walk(ast.parse(code(path))) if isinstance(node, ast.Import | ast.ImportFrom)]
        if any(imported(node) & REACHES_OUT for node in nodes):
            found.add(path.name)
    assert found == {"hub.py", "saes.py"}


def test_all_that_is_loaded_by_a_known_name_is_pinned():
    known = known_models()
    for at, revision in (("hub_id", "revision"), ("sae_hub_id", "sae_revision")):
        assert known.loc[known[at] != "", revision].str.fullmatch("[0-9a-f]{40}").all()


def test_the_readme_leads_to_what_is_said_about_security():
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
