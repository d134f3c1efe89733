"""What a comparison of models costs, and how two workers share it: `make bench`. Needs the siblings in data/."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import distributed
import pandas as pd
import pytest
import torch
from test_sweeps import seconds
from torch import Tensor

from helpers import across
from helpers.models import known_models, load_model
from helpers.workers import Measure, Task, spread, workers

SIBLINGS = across.comparison({}).models
GPU = 20e12  # FLOP/s in float32 that one large GPU is taken to sustain; none was at hand


def tokens_through(model, measure: Measure, depths: Sequence[int]) -> int:
    """How many tokens the first embedding reads while this is measured."""
    count = 0

    def add(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal count
        count += inputs[0].numel()

    hook = model.original_model.get_input_embeddings().register_forward_pre_hook(add)
    try:
        measure(model, tuple(depths))
    finally:
        hook.remove()
    return count


def test_what_nine_models_cost():
    """Forward passes only: 2 FLOPs per weight and token (Kaplan et al. 2020), attention to other tokens left out."""
    model = load_model(SIBLINGS[0])
    every, half = range(model.cfg.n_layers + 1), [model.cfg.n_layers // 2]
    asked = {across.comprehension: every, across.generation: every, across.steering: half}
    tokens = {measure.__name__: tokens_through(model, measure, depths) for measure, depths in asked.items()}
    tokens["comprehension, untrained twin"] = tokens["comprehension"]
    print("\ntokens of one model:", {name: f"{count:,}" for name, count in tokens.items()})
    known = known_models()
    nine = known[(known["hub_id"] != "")].assign(parameters=lambda table: table["parameters"].astype(float))
    flops = 2e6 * nine["parameters"] * sum(tokens.values())
    table = pd.DataFrame({"million weights": nine["parameters"], "GB": nine["memory"], "PFLOP": flops / 1e15})
    table[f"minutes at {GPU / 1e12:.0f} TFLOP/s"] = flops / GPU / 60
    print(f"{table.round(2).to_string()}\n{sum(tokens.values()):,} tokens each")
    print(f"all: {flops.sum() / 1e15:.0f} PFLOP, {flops.sum() / GPU / 3600:.1f} hours")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Here as in every worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cluster() -> Callable[[int], distributed.LocalCluster]:
    """A cluster of so many processes with one thread each."""

    def of(count: int) -> distributed.LocalCluster:
        options = {"processes": True, "threads_per_worker": 1, "dashboard_address": None, "silence_logs": 50}
        return distributed.LocalCluster(n_workers=count, **options)

    return of


@pytest.mark.usefixtures("one_thread")
def test_two_workers_against_one(
    cluster: Callable[[int], distributed.LocalCluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All with one thread each; joblib leaves the tasks of a single worker to this process."""
    # Dask has workers map every large tensor's memory anew, which takes twice as long
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000000")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "32000000")
    tasks = [Task(name, across.comprehension, untrained=twin) for name in SIBLINGS for twin in (False, True)]
    took = {}
    for count in (1, 2):
        with cluster(count) as local, local.get_client() as client, workers(local.scheduler_address):
            client.run(exec, "from helpers import across, workers")  # in every worker: imports take longer than a task
            took[count] = seconds(lambda count=count: spread(tasks, tmp_path / str(count)))
    print(f"\n{len(tasks)} tasks: one worker {took[1]:.0f} s, two {took[2]:.0f} s: {took[1] / took[2]:.2f} times")
    assert os.cpu_count() < 2 or took[2] < took[1]
