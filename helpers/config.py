"""Where things lie, and the choices that every notebook shares."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
FIGURES = ROOT / "figures"


@dataclass(frozen=True)
class Config:
    """Choices shared by the notebooks. Those of a single notebook stand in its own setup cell."""

    seed: int = 0
    bootstrap_draws: int = 1000
    permutation_draws: int = 1000
    random_directions: int = 100
    confidence: float = 0.95


CFG = Config()
