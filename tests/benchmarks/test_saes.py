"""What comparing SAE features across depths costs, on 13 random SAEs of gpt2-small-res-jb's size: `make bench`.

A fresh process on one thread does the work, so that its peak memory is its own. Decoder rows read by slice take turns
with SAEs that sae_lens loads whole. It maps the files without reading them, so the numbers that nobody asks for cost
little; what reading all of them costs, as any use of the encoder does, comes third.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import pandas as pd
import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.config import DATA
from helpers.models import load_model
from helpers.similarity import all_nearest, cosines, rows_of

D_SAE, D_MODEL, BLOCKS = 24_576, 768, 12
SITES = [f"blocks.{block}.hook_resid_pre" for block in range(BLOCKS)] + [f"blocks.{BLOCKS - 1}.hook_resid_post"]
FEATURES = 3  # of each depth
ROUNDS = 3
ROOM = 4e9  # bytes: the files have 2.5e9
BAR_MB, BAR_SECONDS = 1500, 10
STATUS = Path("/proc/self/status")

pytestmark = pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Random weights of GPT-2 small's size with bookworm's tokenizer and 13 random SAEs, written one at a time."""
    if not STATUS.exists():
        pytest.skip("peak memory is read from /proc")
    if shutil.disk_usage(tmp_path).free < ROOM:
        pytest.skip(f"needs {ROOM / 1e9:.0f} GB of free disk in {tmp_path}")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "bookworm" / file, tmp_path)
    for name in SITES:
        metadata = SAEMetadata(hook_name=name, model_from_pretrained_kwargs={"center_writing_weights": True})
        sae = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=D_SAE, metadata=metadata))
        sae.save_model(tmp_path / "saes" / name)
    yield tmp_path
    shutil.rmtree(tmp_path)


def mb(key: str) -> float:
    """Memory of this process now (VmRSS) or at its peak (VmHWM), MB.

    Not getrusage's ru_maxrss: on Linux that of a new process starts from the peak of the one that started it.
    """
    return int(STATUS.read_text().split(f"{key}:")[1].split()[0]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def uncached(saes: Path) -> None:
    """Drop these files from the system's cache."""
    for path in saes.rglob("*.safetensors"):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def costs(folder: Path) -> dict[str, float]:
    """Seconds and MB of what a fresh process does; MB include its libraries and its model, `loaded` alone."""
    torch.set_num_threads(1)
    imported = mb("VmRSS")
    model = load_model(str(folder))
    found = {"imported": imported, "loaded": mb("VmRSS")}
    picks = torch.randint(D_SAE, (len(SITES), FEATURES), generator=torch.Generator().manual_seed(0)).tolist()
    table = pd.DataFrame([(depth, f) for depth, some in enumerate(picks) for f in some], columns=["depth", "feature"])

    def by_slice() -> Tensor:
        rows = rows_of(model, table)
        return cosines(rows, rows)

    def whole(read: bool = False) -> Tensor:
        saes = [SAE.load_from_disk(folder / "saes" / name) for name in SITES]
        if read:
            assert all(weight.isfinite().all() for sae in saes for weight in sae.parameters())
        rows = torch.cat([sae.W_dec.data[some] for sae, some in zip(saes, picks)])
        return cosines(rows, rows)

    def seconds(call: Callable[[], object], cached: bool) -> float:
        if not cached:
            uncached(folder / "saes")
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    found |= {"first": seconds(by_slice, cached=False), "peak": mb("VmHWM")}
    forget_peak()
    depths = range(len(SITES))
    found |= {"nearest": seconds(lambda: all_nearest(model, table, depths), cached=True), "nearest_peak": mb("VmHWM")}
    forget_peak()
    assert torch.allclose(by_slice(), whole(read=True))
    found["read_peak"] = mb("VmHWM")
    calls = {"slice": by_slice, "whole": whole, "read": lambda: whole(read=True)}
    for where in ("disk", "cached"):
        turns = [[seconds(call, where == "cached") for call in calls.values()] for _ in range(ROUNDS)]
        found |= {f"{name}_{where}": median(taken) for name, taken in zip(calls, zip(*turns))}
    return found


def test_cosines_of_three_features_per_depth(folder: Path) -> None:
    """Under 1.5 GB at the peak, libraries and model included."""
    ours = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    ran = subprocess.run([sys.executable, __file__, str(folder)], env=ours, stdout=subprocess.PIPE, check=True)
    cost = json.loads(ran.stdout)
    met = "met" if cost["first"] < BAR_SECONDS else "NOT met"
    print(
        f"\ncosines of {FEATURES} features of each of {len(SITES)} depths: {cost['first']:.2f} s from the disk (bar of "
        f"{BAR_SECONDS} s {met}), peak {cost['peak']:.0f} MB, {cost['peak'] - cost['loaded']:.0f} MB of it beyond "
        f"libraries ({cost['imported']:.0f} MB) and model ({cost['loaded'] - cost['imported']:.0f} MB)"
    )
    for name, what in (("whole", "with all SAEs loaded by sae_lens"), ("read", "and every number of them read")):
        disk, cached = (cost[f"{name}_{where}"] / cost[f"slice_{where}"] for where in ("disk", "cached"))
        print(f"{what}: {disk:.2f} x the time from the disk, {cached:.2f} x from the system's cache")
    print(f"peak with every number read: {cost['read_peak']:.0f} MB")
    print(
        f"their nearest features at every other depth: {cost['nearest']:.1f} s, peak {cost['nearest_peak']:.0f} MB, "
        f"{cost['nearest_peak'] - cost['loaded']:.0f} MB of it beyond libraries and model"
    )
    assert cost["peak"] < BAR_MB


if __name__ == "__main__":
    with warnings.catch_warnings(action="ignore"):
        print(json.dumps(costs(Path(sys.argv[1]))))
