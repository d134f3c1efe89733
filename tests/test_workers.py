"""Tasks give the same tables wherever they run, and nothing that is done is lost."""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from helpers import sweeps
from helpers import workers as module
from helpers.activations import residual_norms
from helpers.models import slug
from helpers.steering import Ablate, Add
from helpers.sweeps import Writing, sweep
from helpers.workers import Task, spread, swept, workers

distributed = pytest.importorskip("distributed")


def norms(model: TransformerBridge, depths: tuple[int, ...]) -> pd.DataFrame:
    """A measurement, with what tells where and after how many loads it was made."""
    found = residual_norms(model, ["The dog ran.", "It rained all day."])
    where = {"process": os.getpid(), "loads": module._loaded.cache_info().misses}
    return pd.DataFrame({"depth": list(depths), "value": found[list(depths)].tolist(), **where})


def fatal_once(model: TransformerBridge, depths: tuple[int, ...]) -> pd.DataFrame:
    """The same, but the first worker that comes here with depth 1 is killed."""
    flag = Path(os.environ["FATAL"])
    if depths == (1,) and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return norms(model, depths)


def counted(model: TransformerBridge, depths: tuple[int, ...]) -> pd.DataFrame:
    """Leave a line for every call; fail at depth 1 as long as there is a file that says so."""
    with Path(os.environ["CALLS"]).open("a") as calls:
        calls.write(f"{depths}\n")
    if depths == (1,) and Path(os.environ["FAILING"]).exists():
        raise KeyboardInterrupt
    return norms(model, depths)


def set_variable(name: str, value: str) -> None:
    os.environ[name] = value


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    module._loaded.cache_clear()
    yield
    module._loaded.cache_clear()


@pytest.fixture
def tasks(model_folder: Callable[[str], Path]) -> list[Task]:
    names = [str(model_folder(family)) for family in ("gpt2", "llama")]
    return [Task(name, norms, (depth,)) for name in names for depth in range(2)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A real cluster on this machine: a scheduler and two worker processes."""
    with distributed.LocalCluster(
        n_workers=2, processes=True, threads_per_worker=1, dashboard_address=None, silence_logs=50
    ) as local:
        yield local.scheduler_address


def plain(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns=["process", "loads"])


def test_tables_come_in_the_order_of_the_tasks_with_their_names(tasks: list[Task], tmp_path: Path):
    table = spread(tasks, tmp_path)
    assert table["model"].tolist() == [slug(task.model) for task in tasks]
    assert table["depth"].tolist() == [task.depths[0] for task in tasks]
    assert set(table["measured"]) == {"norms"} and not table["untrained"].any()


def test_a_task_without_depths_covers_all_and_a_twin_is_another_model(model_folder: Callable, tmp_path: Path):
    name = str(model_folder("gpt2"))
    table = spread([Task(name, norms), Task(name, norms, untrained=True)], tmp_path)
    trained, twin = (table[table["untrained"] == kind] for kind in (False, True))
    assert trained["depth"].tolist() == twin["depth"].tolist() == list(range(len(trained)))
    assert (trained["value"].to_numpy() != twin["value"].to_numpy()).any()


def test_processes_give_the_same_table_as_this_one(tasks: list[Task], tmp_path: Path):
    here = spread(tasks, tmp_path / "here")
    with workers("2"):
        there = spread(tasks, tmp_path / "there")
    pd.testing.assert_frame_equal(plain(here), plain(there), rtol=1e-5)
    assert os.getpid() in set(here["process"]) and os.getpid() not in set(there["process"])


def test_a_dask_cluster_gives_the_same_table_and_each_worker_loads_a_model_once(
    tasks: list[Task], tmp_path: Path, cluster: str
):
    here = spread(tasks, tmp_path / "here")
    one_model = [Task(tasks[0].model, norms, (depth,)) for depth in (0, 1, 0, 1)]
    with workers(cluster):
        there = spread(tasks, tmp_path / "there")
        same = spread(one_model, tmp_path / "same")
    pd.testing.assert_frame_equal(plain(here), plain(there), rtol=1e-5)
    assert os.getpid() not in set(there["process"])
    first = same.groupby("process")["loads"].min()
    assert (same["loads"] == same["process"].map(first)).all()


def test_progress_is_shown_wherever_tasks_run(
    tasks: list[Task],
    tmp_path: Path,
    cluster: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    """In the notebooks once it has taken two seconds."""
    monkeypatch.setattr(module, "progress", lambda total, unit, what: tqdm(total=total, unit=unit, desc=what))
    for where in ("1", "2", cluster):
        with workers(where):
            spread(tasks, tmp_path / where.replace("/", ""))
        assert re.search(r"measuring: 100%.* 4/4 ", capsys.readouterr().err)


@pytest.mark.parametrize("where", ["2", "cluster"])
def test_a_sweep_is_the_same_table_whoever_makes_its_runs(
    model: TransformerBridge, tmp_path: Path, cluster: str, where: str, monkeypatch: pytest.MonkeyPatch
):
    vectors = torch.randn(3, 2, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    prompts = pd.DataFrame({"prompt": ["dog", "rain"], "text": ["The dog ran", "It rained all"]})
    methods = {depth: {"add": Add(vectors[depth]), "ablate": Ablate(vectors[depth][:1])} for depth in range(3)}
    strengths, how = [0, 0.5, 1.0], {"which": "prompt", "writing": Writing(6, (0, 1))}
    here = sweep(model, prompts, methods, strengths, **how)
    with workers(cluster if where == "cluster" else where):
        there = swept(model, prompts, methods, strengths, tmp_path, block=2, **how)
    pd.testing.assert_frame_equal(here, there, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(sweeps, "_run", lambda *_: pytest.fail("a run was made again"))
    pd.testing.assert_frame_equal(there, swept(model, prompts, methods, strengths, tmp_path, **how))


def test_a_worker_that_is_killed_loses_nothing(
    tasks: list[Task], tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
):
    flag = tmp_path / "killed"
    with distributed.Client(cluster) as client:
        client.run(set_variable, "FATAL", str(flag))
    monkeypatch.setenv("FATAL", str(flag))  # for workers that are started anew
    fatal = [Task(task.model, fatal_once, task.depths) for task in tasks]
    with workers(cluster):
        there = spread(fatal, tmp_path / "there")
    assert flag.exists()
    monkeypatch.setattr("os.kill", lambda *_: pytest.fail("killed here"))
    pd.testing.assert_frame_equal(
        plain(there).drop(columns="measured"),
        plain(spread(tasks, tmp_path / "here")).drop(columns="measured"),
        rtol=1e-5,
    )
    assert len(list((tmp_path / "there").glob("*.parquet"))) == len(fatal)


def test_a_stopped_study_goes_on_where_it_was(tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls, failing = tmp_path / "calls", tmp_path / "failing"
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("FAILING", str(failing))
    failing.touch()
    todo = [Task(tasks[0].model, counted, task.depths) for task in tasks[:2]]
    with pytest.raises(KeyboardInterrupt):
        spread(todo, tmp_path / "kept")
    failing.unlink()
    spread(todo, tmp_path / "kept")
    assert calls.read_text().splitlines() == ["(0,)", "(1,)", "(1,)"]
    spread([Task(tasks[0].model, counted, (0, 1))], tmp_path / "kept")
    assert len(calls.read_text().splitlines()) == 4


def test_another_measurement_is_another_table(tasks: list[Task], tmp_path: Path):
    def halved(model: TransformerBridge, depths: tuple[int, ...]) -> pd.DataFrame:
        table = norms(model, depths)
        return table.assign(value=table["value"] / 2)

    def other(model: TransformerBridge, depths: tuple[int, ...]) -> pd.DataFrame:
        table = norms(model, depths)
        return table.assign(value=table["value"] / 4)

    other.__name__, other.__qualname__ = halved.__name__, halved.__qualname__  # one edited in a notebook
    one, two = (spread([Task(tasks[0].model, measure, (1,))], tmp_path)["value"][0] for measure in (halved, other))
    assert one == pytest.approx(2 * two)


@pytest.mark.parametrize("where", ["0", "-1", "many", "2.5"])
def test_what_names_no_workers_is_refused(where: str):
    with (
        pytest.raises(ValueError, match=f"WORKERS='{where}' is neither a number of processes nor the address"),
        workers(where),
    ):
        pytest.fail("ran")


def test_a_missing_dask_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    with (
        pytest.raises(ImportError, match=r"tcp://nowhere:1 asks for Dask: pip install -e '.\[cluster\]'"),
        workers("tcp://nowhere:1"),
    ):
        pytest.fail("ran")


def test_the_environment_says_where(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORKERS", "nowhere")
    with pytest.raises(ValueError, match="WORKERS='nowhere'"), workers():
        pytest.fail("ran")
