"""Every notebook on random weights of GPT-2 small's size, as `MODEL=gpt2-small` runs it offline: `make rehearse`.

The weights and SAEs lie in .rehearsal/ as a download leaves them (see rehearsal.py) and stay there for the next time.
What the notebooks find means nothing; that they run, how long, and in how much memory, is the result: printed, and kept
as figures/gpt2-small-rehearsal/rehearsal.csv and .png. Exit status 1 where a notebook fails or needs too much memory.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import run
from matplotlib.figure import Figure

from helpers.config import ROOT, grid

HUB = ROOT / ".rehearsal" / "hub"
NAMED, NAME = "gpt2-small", "gpt2-small-rehearsal"
MOST_GB = 6.0
STRENGTHS = {"04": 2}  # notebooks that thin strengths as well, about one in two being left


@dataclass(frozen=True)
class Cost:
    """What a command and all that it started took; peak_gb is the largest process's (in 10^9 bytes)."""

    failed: bool
    minutes: float
    cpu_minutes: float
    peak_gb: float


def cost(command: Sequence[str], environment: Mapping[str, str]) -> Cost:
    """Runs a command to its end and says what it took.

    A new process counts as no smaller than the one that starts it, so this module imports PyTorch only after the runs.
    """
    began = time.monotonic()
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    per_unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, KiB on Linux
    return Cost(
        failed=process.returncode != 0,
        minutes=(time.monotonic() - began) / 60,
        cpu_minutes=(usage.ru_utime + usage.ru_stime) / 60,
        peak_gb=usage.ru_maxrss * per_unit / 1e9,
    )


def costs(numbers: Sequence[str], environment: Mapping[str, str]) -> pd.DataFrame:
    """A row per notebook, with what `cost` says and an upper estimate for the full grid; stops at one that fails.

    The estimate lets everything grow with the number of prompts and strengths; loading and drawing do not.
    """
    rows, every = [], grid(environment["GRID"]).every
    for path in run.chosen(run.NOTEBOOKS, list(numbers)):
        took = cost([sys.executable, str(run.NOTEBOOKS / "run.py"), "--only", path.stem], environment)
        more = every * STRENGTHS.get(path.stem[:2], 1) if every > 1 else 1
        rows.append({"notebook": path.stem, **vars(took), "full_cpu_minutes": took.cpu_minutes * more})
        if took.failed:
            break
    return pd.DataFrame(rows).assign(grid=environment["GRID"], cores=os.cpu_count())


def chart(table: pd.DataFrame) -> Figure:
    """Minutes and peak memory of every notebook."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.45 * len(table) + 1.5), sharey=True)
    axes[0].barh(table["notebook"], table["minutes"], color="0.45")
    axes[0].set(xlabel="minutes", title=f"Random weights of GPT-2 small's size, {table['grid'].iloc[0]} grid")
    axes[1].barh(table["notebook"], table["peak_gb"], color="0.45")
    axes[1].axvline(MOST_GB, color="black", lw=1, ls="--")
    axes[1].set(xlabel="peak memory (GB)")
    axes[0].invert_yaxis()
    return figure


def told(table: pd.DataFrame) -> str:
    """The costs as text, with their sums, the peak, and how the full grid's was estimated."""
    sums, peak = table[["minutes", "cpu_minutes", "full_cpu_minutes"]].sum(), table["peak_gb"].max()
    return (
        f"{table.drop(columns=['failed', 'grid', 'cores']).round(1).to_string(index=False)}\n"
        f"{table['grid'].iloc[0]} grid: {sums.minutes:.0f} minutes ({sums.cpu_minutes:.0f} of CPU time, "
        f"{table['cores'].iloc[0]} cores), peak memory {peak:.1f} GB (at most {MOST_GB:g} GB wanted).\n"
        f"Full grid: at most about {sums.full_cpu_minutes:.0f} minutes of CPU time, each notebook's times the full "
        "grid's prompts (and strengths) over the reduced one's; what does not grow with them makes it less."
    )


def main(arguments: Sequence[str] | None = None, hub: Path = HUB, figures: Path = ROOT / "figures") -> int:
    """Exit status: 0, or 1 where a notebook failed or needed more than MOST_GB."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NN", default=[], help="beginnings of names, e.g. 01 04")
    parser.add_argument("--size", nargs="+", metavar="blocks=2", default=[], help="another size than GPT-2 small's")
    asked = parser.parse_args(arguments)
    here = {"HF_HOME": str(hub.parent), "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "FIGURES": str(figures)}
    environment = {**os.environ, **here, "MODEL": NAMED, "GRID": os.environ.get("GRID") or "reduced"}
    builder = [sys.executable, str(Path(__file__).with_name("rehearsal.py")), str(hub), *asked.size]
    if cost(builder, environment).failed:
        return 1
    table = costs(asked.only, environment)
    from helpers.plots import style, written

    style()
    written(chart(table), table, figures / NAME / "rehearsal", NAME)
    print(f"\n{told(table)}")
    return int(table["failed"].any() or table["peak_gb"].max() >= MOST_GB)


if __name__ == "__main__":
    sys.exit(main())
