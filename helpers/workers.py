"""Measurements of several models and large sweeps, spread over workers: processes here, or a Dask cluster.

joblib is told which. A task is a model, a measurement or method, and the depths that it covers. Its table is kept on
disk as soon as it is there, under a fingerprint of all that it depends on, so a study that was stopped, or whose
workers died, goes on where it was.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pandas as pd
import torch
from joblib import Parallel, delayed, parallel_config
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import progress
from helpers.cells import fingerprint, kept, surroundings
from helpers.config import CFG, DATA
from helpers.models import load_model, slug, untrained_twin
from helpers.sweeps import Methods, sweep

Measure = Callable[[TransformerBridge, tuple[int, ...]], pd.DataFrame]


@dataclass(frozen=True)
class Task:
    """One table to make: of a model (`load_model`'s name), or of its untrained twin, at some depths (all without)."""

    model: str
    measure: Measure
    depths: tuple[int, ...] = ()
    untrained: bool = False


@contextmanager
def workers(where: str | None = None) -> Iterator[None]:
    """Tasks of the block go to `where`: a number of processes, or the address of a Dask scheduler ("tcp://...").

    Without `where`, the environment variable WORKERS; without that, one process per CPU core, or this process alone
    where there is a GPU. Each process gets its share of the cores. joblib leaves the tasks of a cluster with a single
    worker to this process. Raises ValueError for anything else, and ImportError where Dask is asked for and not
    installed.
    """
    where = where or os.environ.get("WORKERS") or str(1 if torch.cuda.is_available() else os.cpu_count() or 1)
    if "://" in where:
        with _scheduler(where), parallel_config("dask"):
            yield
    elif where.isdigit() and (count := int(where)):
        if count == 1:
            with parallel_config("sequential"):
                yield
        else:
            share = max(1, (os.cpu_count() or 1) // count)
            with parallel_config("loky", n_jobs=count, inner_max_num_threads=share):
                yield
    else:
        raise ValueError(f"WORKERS={where!r} is neither a number of processes nor the address of a Dask scheduler")


def spread(tasks: Sequence[Task], folder: Path) -> pd.DataFrame:
    """The tables of all tasks in their order, with columns model (its slug), untrained and measured before them.

    Inside `workers` the tasks run there, otherwise here. `folder` keeps the tables; workers on other machines need to
    see it under the same path. A bar shows how many are done and how long the rest will take.
    """
    tables = []
    with progress(len(tasks), "task", "measuring") as bar:
        done = Parallel(return_as="generator", batch_size=1)(delayed(_measured)(task, folder) for task in tasks)
        for task, table in zip(tasks, done):
            table.insert(0, "model", slug(task.model))
            table.insert(1, "untrained", task.untrained)
            table.insert(2, "measured", task.measure.__name__)
            tables.append(table)
            bar.update()
    return pd.concat(tables, ignore_index=True)


def swept(
    model: TransformerBridge,
    prompts: pd.DataFrame,
    methods: Methods,
    strengths: Sequence[float] | pd.DataFrame,
    folder: Path,
    block: int = 1,
    **how: object,
) -> pd.DataFrame:
    """`sweeps.sweep`'s table, its runs made by workers: one task per method and block of so many depths.

    Workers load the model from its own folder and leave finished runs in `folder`, where `sweep` reads them back; so
    does the next call after one that was stopped. `how` are `sweep`'s other arguments.
    """
    depths, parts = list(methods), []
    for some in (depths[at : at + block] for at in range(0, len(depths), block)):
        for name in dict.fromkeys(name for depth in some for name in methods[depth]):
            parts.append({depth: {name: methods[depth][name]} for depth in some if name in methods[depth]})
    with progress(len(parts), "task", "sweeping") as bar:
        for together in (parts[:1], parts[1:]):  # the runs without steering, which all parts share, are made once
            made = (delayed(_swept)(str(model.cfg.folder), prompts, part, strengths, folder, how) for part in together)
            for _ in Parallel(return_as="generator", batch_size=1)(made):
                bar.update()
    return sweep(model, prompts, methods, strengths, folder=folder, **how)


def _swept(name: str, prompts: pd.DataFrame, methods: Methods, strengths: object, folder: Path, how: dict) -> None:
    sweep(_loaded(name, False)[0], prompts, methods, strengths, folder=folder, **how)


def _measured(task: Task, folder: Path) -> pd.DataFrame:
    model, here = _loaded(task.model, task.untrained)
    depths = task.depths or tuple(range(model.cfg.n_layers + 1))
    return kept(folder, fingerprint(here, task.measure, depths), lambda: task.measure(model, depths))


@lru_cache(maxsize=1)
def _loaded(name: str, untrained: bool) -> tuple[TransformerBridge, str]:
    """The model, loaded once by each worker for its tasks in a row, and the fingerprint of all that they share."""
    model = (untrained_twin if untrained else load_model)(name)
    files = [*Path(__file__).parent.glob("*.py"), *(DATA / "prompts").glob("*.csv"), DATA / "emotions.csv"]
    written = [file.read_bytes() for file in sorted(files)]
    return model, fingerprint(surroundings(model.original_model, str(model.cfg.device)), written, CFG)


@contextmanager
def _scheduler(address: str) -> Iterator[None]:
    """A client of the cluster, for the duration."""
    try:
        from dask.distributed import Client  # an extra of this package: most people have one machine
    except ImportError as error:
        raise ImportError(f"WORKERS={address} asks for Dask: pip install -e '.[cluster]'") from error
    with Client(address):
        yield
