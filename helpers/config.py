"""Where things lie, and the choices that every notebook shares."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
Value = TypeVar("Value")


@dataclass(frozen=True)
class Config:
    """Choices shared by the notebooks. Those of a single notebook stand in its own setup cell."""

    seed: int = 0
    bootstrap_draws: int = 1000
    permutation_draws: int = 1000
    random_directions: int = 100
    confidence: float = 0.95
    every: int = 1  # of prompts and strengths, one in so many is used
    label: str = ""  # what figures, claims and the model's description say where this is not the full grid


GRIDS = {"full": Config()}
GRIDS["reduced"] = Config(
    bootstrap_draws=100, permutation_draws=100, random_directions=20, every=4, label="reduced grid"
)


def grid(name: str | None = None) -> Config:
    """The choices of a grid: `full`, or `reduced` for a quick look; without a name the environment variable GRID's.

    Raises ValueError for another name.
    """
    name = name or os.environ.get("GRID") or "full"
    if name not in GRIDS:
        raise ValueError(f"Unknown grid {name!r}: GRID is one of {', '.join(GRIDS)}.")
    return GRIDS[name]


CFG = grid()
# What a reduced grid yields never takes the place of the rest.
FIGURES = Path(os.environ.get("FIGURES") or ROOT / "figures" / CFG.label.replace(" ", "-"))


def thinned(values: Sequence[Value], keep: Collection[Value] = ()) -> list[Value]:
    """The first, the last and every `CFG.every`-th of the values, and those to keep: all of them on the full grid."""
    last = len(values) - 1
    return [value for i, value in enumerate(values) if i % CFG.every == 0 or i == last or value in keep]
