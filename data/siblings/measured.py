"""Two measurements for notebook 07 whose models are not shipped: training as it goes on, and a second seed.

    python data/bookworm/build.py CORPUS_DIR OUT_DIR --sibling gpt2 --snapshots 0 125000 250000 ...
    python data/siblings/measured.py training OUT_DIR.work          # writes data/siblings/emergence.csv
    python data/bookworm/build.py CORPUS_DIR OTHER_DIR --sibling gpt2 --seed 1
    python data/siblings/measured.py seed OTHER_DIR                 # writes data/siblings/second_seed.csv

Models are read as notebook 07 reads them: vectors fitted on training topics, AUROC on test topics.
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

FIRST = "sibling-gpt2"


def read(name: str) -> pd.DataFrame:
    model = load_model(name)
    return across.comprehension(model, range(model.cfg.n_layers + 1))


def training(work: Path) -> pd.DataFrame:
    """AUROC of every snapshot and of the finished model: model, tokens, position, depth, value, low, high."""
    folders = {int(folder.name): folder for folder in (work / "snapshots").iterdir()}
    folders[json.loads((work / "trained.json").read_text())["tokens_seen"]] = work / "model"
    found = []
    for tokens, folder in sorted(folders.items()):
        table = read(str(folder)).query("statistic == 'AUROC'")
        for position, rows in table.groupby("position", sort=False):
            drawn = torch.tensor(rows.pivot(index="draw", columns="depth", values="value").to_numpy())
            found.append(curve(drawn).assign(model=FIRST, tokens=tokens, position=position))
    return pd.concat(found)[["model", "tokens", "position", "depth", "value", "low", "high"]]


def seed(folder: Path) -> pd.DataFrame:
    """AUROC of every emotion (column unit) in both seeds: model, position, depth, unit, value."""
    number = json.loads((folder / "training.json").read_text())["settings"]["seed"]
    found = []
    for name, model in ((FIRST, FIRST), (f"{FIRST}, seed {number}", str(folder))):
        table = read(model).query("statistic == 'AUROC of one'")
        found.append(table.assign(model=name)[["model", "position", "depth", "unit", "value"]])
    return pd.concat(found)


FILES = {training: "emergence.csv", seed: "second_seed.csv"}


def main() -> None:
    """Write one of the two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[each.__name__ for each in FILES])
    parser.add_argument("folder", type=Path, help="OUT_DIR.work, or the finished model of another seed")
    asked = parser.parse_args()
    measure = {each.__name__: each for each in FILES}[asked.what]
    table = measure(asked.folder)
    with replacing(DATA / "siblings" / FILES[measure]) as path:
        table.to_csv(path, index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
