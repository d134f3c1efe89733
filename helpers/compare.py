"""Report cards side by side: what every model that has been run shows of every claim.

A model's report card is figures/<model>/claims.csv, which `make reproduce MODEL=...` leaves. `make compare`
(`python -m helpers.compare`) reads all that are there, or those named, and writes figures/compared.csv and .png.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd

from helpers.across_plots import claims as claims_figure
from helpers.claims import RECORDED, published, recorded
from helpers.config import FIGURES
from helpers.files import replacing
from helpers.models import known_models
from helpers.plots import style


def models_with_cards(figures: Path = FIGURES) -> list[str]:
    """The folders of figures/ that hold a report card, known models first."""
    there = sorted(path.parent.name for path in figures.glob("*/claims.csv"))
    return sorted(there, key=lambda name: ([*known_models().index, name].index(name), name))


def report_cards(models: Sequence[str], figures: Path = FIGURES) -> pd.DataFrame:
    """Every claim on every model, in the ledger's order: columns as recorded; "not run" where nothing is.

    Raises ValueError for a model without a report card, naming those that have one.
    """
    there = models_with_cards(figures)
    if missing := [model for model in models if model not in there]:
        raise ValueError(
            f"{missing[0]} has no report card: run `make reproduce MODEL={missing[0]}` first. "
            f"There are: {', '.join(there) or 'none'}"
        )
    claims = published()["claim"]
    cards = []
    for model in models:
        card = recorded(figures / model, model).set_index("claim").reindex(claims).reset_index()
        cards.append(card.assign(model=model, verdict=card["verdict"].fillna("not run"), note=card["note"].fillna("")))
    return pd.concat(cards, ignore_index=True)[RECORDED]


def main(arguments: Sequence[str] | None = None, figures: Path = FIGURES) -> None:
    """Write figures/compared.csv and .png of all report cards (or of the named models) and print the verdicts."""
    parser = argparse.ArgumentParser(prog="python -m helpers.compare", description=main.__doc__)
    parser.add_argument("models", nargs="*", help="names of folders in figures/ (default: all with a claims.csv)")
    asked = parser.parse_args(arguments).models or models_with_cards(figures)
    try:
        if not asked:
            raise ValueError("There is no report card in figures/: run `make reproduce` first.")
        table = report_cards(asked, figures)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    matplotlib.use("agg")
    style()
    with replacing(figures / "compared.png") as picture, replacing(figures / "compared.csv") as numbers:
        claims_figure(table).savefig(picture)
        table.to_csv(numbers, index=False, float_format="%.6g")
    print(table.pivot(index="claim", columns="model", values="verdict")[asked].to_string())
    print(f"written to {figures / 'compared.csv'} and .png")


if __name__ == "__main__":
    main()
