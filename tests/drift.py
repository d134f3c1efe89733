"""Have the numbers behind bookworm's figures drifted from the committed ones? `python tests/drift.py`, or `make drift`.

Compares every figures/bookworm/*.csv of the working tree with the version of the last commit: the same files, columns
and rows; numbers within ATOL + RTOL * |committed|; other text to the letter. Chosen depths may move by one. Texts that
a model wrote are left out: one token that falls otherwise changes all that follow.
"""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "figures/bookworm"
ATOL, RTOL = 0.02, 0.05
SAMPLED = {"text", "continuation", "token"}  # columns of text that a model wrote
# Files of numbers counted in such text: only their shape is compared.
WRITTEN = ("_published_sweep.csv", "_text_quality.csv", "_word_kinds.csv", "_continuations.csv")
DEPTHS, CHOICES = {"depth", "chosen_depth"}, "_choices.csv"  # in these files these columns may move by one


def committed(root: Path) -> dict[str, bytes]:
    """What the last commit holds of figures/bookworm/*.csv, by file name."""
    names = _git(root, "ls-tree", "-r", "--name-only", "HEAD", "--", FOLDER).decode().splitlines()
    return {Path(name).name: _git(root, "show", f"HEAD:./{name}") for name in names if name.endswith(".csv")}


def excess(old: pd.Series, new: pd.Series, allowed: float | pd.Series) -> float:
    """The largest change in units of what is allowed: drift above 1. Infinite where text or missing values differ."""
    if not (pd.api.types.is_numeric_dtype(old) and pd.api.types.is_numeric_dtype(new)):
        return 0.0 if old.astype(str).equals(new.astype(str)) else np.inf
    old, new = old.astype(float), new.astype(float)
    with np.errstate(invalid="ignore"):
        units = ((new - old).abs() / allowed).where(np.isfinite(old) & np.isfinite(new))
    same = (old == new) | (old.isna() & new.isna())
    return float(units.where(~same, 0).fillna(np.inf).max()) if len(old) else 0.0


def drift(name: str, old: pd.DataFrame, new: pd.DataFrame) -> tuple[float, str]:
    """How far file `name` moved in units of what is allowed, and the column (or the reason) that moved most."""
    if list(old.columns) != list(new.columns):
        return np.inf, f"columns were {', '.join(old.columns)}; are {', '.join(new.columns)}"
    if len(old) != len(new):
        return np.inf, f"rows were {len(old)}; are {len(new)}"
    worst = 0.0, ""
    if name.endswith(WRITTEN):
        return worst
    for column in old.columns.difference(SAMPLED, sort=False):
        one_step = name.endswith(CHOICES) and column in DEPTHS
        numeric = pd.api.types.is_numeric_dtype(old[column])
        allowed = 1.0 if one_step or not numeric else ATOL + RTOL * old[column].astype(float).abs()
        worst = max(worst, (excess(old[column], new[column], allowed), column), key=lambda pair: pair[0])
    return worst


def report(root: Path) -> pd.DataFrame:
    """One row per file: the largest change in units of what is allowed, where, and whether that is drift."""
    before = committed(root)
    now = {path.name: path.read_bytes() for path in (root / FOLDER).glob("[!.]*.csv")}
    rows = []
    for name in sorted(before | now):
        if name not in now:
            moved, where = np.inf, "is missing"
        elif name not in before:
            moved, where = np.inf, "is not committed"
        else:
            moved, where = drift(name, *(pd.read_csv(io.BytesIO(files[name])) for files in (before, now)))
        rows.append({"file": name, "of what is allowed": round(moved, 3), "where": where, "drifted": moved > 1})
    return pd.DataFrame(rows, columns=["file", "of what is allowed", "where", "drifted"])


def main(root: Path = ROOT) -> int:
    """Print the report; exit status 1 for drift, or when there is nothing to compare."""
    table = report(root)
    if table.empty:
        print(f"Nothing to compare: no CSV in {FOLDER}, committed or not.")
        return 1
    print(table.to_string(index=False))
    drifted = table.loc[table.drifted, "file"]
    print(f"\nallowed: {ATOL} + {RTOL} * |committed|, chosen depths 1; {len(drifted)} of {len(table)} files drifted")
    if len(drifted):
        print(f"Drifted: {', '.join(drifted)}. See git diff; commit the files if the change is meant.")
    return int(len(drifted) > 0)


def _git(root: Path, *arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True)
    if done.returncode:
        raise SystemExit(f"git {arguments[0]} failed in {root.name}: {done.stderr.decode().strip()}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
