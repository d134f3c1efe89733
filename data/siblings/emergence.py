"""When in training does a model begin to tell emotions apart? Measure the snapshots that the build script kept.

    python data/bookworm/build.py CORPUS_DIR OUT_DIR --sibling gpt2 --snapshots 0 125000 250000 ...
    python data/siblings/emergence.py OUT_DIR.work                  # writes data/siblings/emergence.csv

Each snapshot is read as notebook 07 reads the finished models: vectors fitted on training topics, AUROC on test topics.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import torch

from helpers import across
from helpers.config import DATA
from helpers.decoding import curve
from helpers.files import replacing
from helpers.models import load_model


def measured(folder: Path, tokens: int) -> pd.DataFrame:
    """AUROC by position and depth of the model in a folder: tokens, position, depth, value, low, high."""
    model = load_model(str(folder))
    table = across.comprehension(model, range(model.cfg.n_layers + 1))
    table = table[table["statistic"] == "AUROC"]
    found = []
    for position, rows in table.groupby("position", sort=False):
        drawn = torch.tensor(rows.pivot(index="draw", columns="depth", values="value").to_numpy())
        found.append(curve(drawn).assign(tokens=tokens, position=position))
    return pd.concat(found)[["tokens", "position", "depth", "value", "low", "high"]]


def main() -> None:
    """Measure every snapshot and the finished model of a work folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, metavar="OUT_DIR.work", help="the build script's work folder")
    work = parser.parse_args().work
    folders = {int(folder.name): folder for folder in (work / "snapshots").iterdir()}
    folders[json.loads((work / "trained.json").read_text())["tokens_seen"]] = work / "model"
    tables = [measured(folder, tokens) for tokens, folder in sorted(folders.items())]
    with replacing(DATA / "siblings" / "emergence.csv") as path:
        pd.concat(tables).to_csv(path, index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
