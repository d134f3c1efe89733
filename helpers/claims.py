"""The claims ledger: what was published, what was measured here, and whether it holds.

data/claims.csv has one row per published claim. Notebooks write what they find into figures/<model>/claims.csv with
`record`. `python -m helpers.claims` writes the README's table from both; with --check it says whether it is current.
"""

import argparse
import math
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten

import pandas as pd

from helpers.config import CFG, DATA, FIGURES, ROOT
from helpers.files import alone, replacing

VERDICTS = ("holds", "partly", "does not hold", "not applicable", "not run")
PUBLISHED = ["claim", "source", "published_on", "statement", "published", "decided_by", "notebook"]
RECORDED = ["claim", "model", "value", "low", "high", "verdict", "note"]
NUMBERS = ["value", "low", "high"]
BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"
CARDS_BEGIN, CARDS_END = "<!-- cards:begin -->", "<!-- cards:end -->"
BAR = "\\|"  # in a cell of a Markdown table


def _rows(path: Path, columns: list[str]) -> pd.DataFrame:
    """The CSV as text with exactly these columns and no claim twice; a ValueError names the file otherwise."""
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable CSV ({error}); restore or delete it") from error
    if list(rows) != columns:
        raise ValueError(f"{path} has the columns {list(rows)}, not {columns}; restore or delete it")
    if twice := rows.claim[rows.claim.duplicated()].tolist():
        raise ValueError(f"{path} names a claim twice: {', '.join(twice)}")
    return rows


def published(path: Path = DATA / "claims.csv") -> pd.DataFrame:
    """Every published claim, one row each. Refuses blank cells, repeated ids and notebooks not named NN_name."""
    rows = _rows(path, PUBLISHED)
    if blank := [row.claim for row in rows.itertuples() if not all(cell.strip() for cell in row[1:])]:
        raise ValueError(f"{path} has blank cells in the rows of: {', '.join(blank)}")
    if odd := rows.notebook[~rows.notebook.str.fullmatch(r"\d\d_\w+")].tolist():
        raise ValueError(f"{path} names notebooks in another form than 01_fear_direction: {', '.join(odd)}")
    return rows


def recorded(folder: Path, model: str | None = None) -> pd.DataFrame:
    """What notebooks recorded in `folder`/claims.csv; no rows if there is no such file.

    Refuses a file with other columns, verdicts outside VERDICTS, text where a number belongs, or rows of another model
    than `model`, where one is named.
    """
    path = Path(folder) / "claims.csv"
    rows = _rows(path, RECORDED) if path.exists() else pd.DataFrame(columns=RECORDED, dtype=str)
    if odd := sorted(set(rows.verdict) - set(VERDICTS)):
        raise ValueError(f"{path} has unknown verdicts {odd}; they are {', '.join(VERDICTS)}")
    if others := sorted(set(rows.model) - {model}) if model else []:
        raise ValueError(f"{path} has rows of the model {others[0]!r}, not {model!r}: it belongs into another folder")
    try:
        return rows.assign(**{name: rows[name].replace("", "nan").astype(float) for name in NUMBERS})
    except ValueError as error:
        raise ValueError(f"{path} has a value that is no number ({error}); restore or delete it") from error


def record(
    folder: Path,
    model: str,
    claim: str,
    verdict: str,
    value: float | None = None,
    low: float | None = None,
    high: float | None = None,
    note: str = "",
) -> pd.DataFrame:
    """This claim's row, which now stands in `folder`/claims.csv in place of an earlier one.

    Refuses a claim that data/claims.csv lacks, a verdict outside VERDICTS, numbers that are not finite, an interval
    with one end or reversed, and "not applicable" without a note that says why.
    """
    if claim not in (known := published().claim.tolist()):
        near = ", ".join(get_close_matches(claim, known, n=3, cutoff=0))
        raise ValueError(f"data/claims.csv has no claim {claim!r}; the nearest are {near}")
    if verdict not in VERDICTS:
        raise ValueError(f"{claim}: {verdict!r} is no verdict; they are {', '.join(VERDICTS)}")
    if verdict == "not applicable" and not note.strip():
        raise ValueError(f"{claim}: 'not applicable' needs a note that says why")
    if not all(x is None or math.isfinite(x) for x in (value, low, high)):
        raise ValueError(f"{claim}: {value=}, {low=}, {high=} is not finite; leave it out and say why in the note")
    if (low is None) != (high is None) or (low is not None and low > high):
        raise ValueError(f"{claim}: an interval has two ends, low <= high, not {low=}, {high=}")
    note = "; ".join(filter(None, (" ".join(note.split()), CFG.label)))
    row = pd.DataFrame([[claim, model, value, low, high, verdict, note]], columns=RECORDED)
    row = row.astype(dict.fromkeys(NUMBERS, float))
    path = Path(folder) / "claims.csv"
    with alone(path):  # two notebooks may record at the same time
        others = recorded(folder, model).query("claim != @claim")
        rows = pd.concat([others, row]).sort_values("claim") if len(others) else row
        with replacing(path) as temporary:
            rows.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    return row


def not_applicable(folder: Path, model: str, notebook: str, reason: str) -> None:
    """Record of every claim that this notebook decides that it does not apply to the model, and why."""
    for claim in published().query("notebook == @notebook")["claim"]:
        record(folder, model, claim, "not applicable", note=reason)


def share_verdict(share: float) -> str:
    """ "holds" for a share of 1, "does not hold" for 0 (or NaN), "partly" in between."""
    return "holds" if share == 1 else "partly" if share > 0 else "does not hold"


def verdict(low: float, high: float, above: float) -> str:
    """Whether an interval lies above a bar: "holds" if all of it, "does not hold" if none or NaN, else "partly"."""
    if any(math.isnan(x) for x in (low, high, above)) or high <= above:
        return "does not hold"
    return "holds" if low > above else "partly"


def _cell(rows: pd.DataFrame, claim: str) -> str:
    """Verdict, value and interval of one claim; the reason if not applicable; "not run" without a record."""
    if (rows := rows[rows.claim == claim]).empty:
        return "not run"
    row = rows.iloc[0]
    if row.verdict == "not applicable":
        return f"not applicable: {shorten(row.note, 80, placeholder=' ...')}"
    value, low, high = (f"{row[name]:.0f}" if abs(row[name]) >= 100 else f"{row[name]:.2g}" for name in NUMBERS)
    return f"{row.verdict} {value} [{low}, {high}]".replace(" [nan, nan]", "").replace(" nan", "")


def siblings() -> list[str]:
    """The models that differ in architecture alone, in the order of data/models.csv."""
    known = pd.read_csv(DATA / "models.csv", dtype=str, keep_default_na=False)
    return known.loc[known["folder"].str.startswith("siblings/"), "name"].tolist()


def cards(models: Sequence[str], figures: Path = FIGURES) -> str:
    """Markdown: every claim, and what each of the models shows: their report cards side by side."""
    found = {model: recorded(figures / model, model) for model in models}
    lines = [["claim", *models], ["---"] * (len(models) + 1)]
    lines += [[row.claim, *(_cell(found[model], row.claim) for model in models)] for row in published().itertuples()]
    return "\n".join(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |" for cells in lines)


def table(models: Sequence[str] = ("bookworm", "gpt2-small"), figures: Path = FIGURES) -> str:
    """Markdown: every claim, its published value, what each model shows, and the notebook that decides it.

    Claims that no model has been tried on come in a second table, folded away.
    """
    found = {model: recorded(figures / model, model) for model in models}
    titles = [f"{model} (analogue)" if model == "bookworm" else model for model in models]
    decided = {claim for rows in found.values() for claim in rows.claim}
    head = [["claim", "published (on)", *titles, "notebook"], ["---"] * (len(models) + 3)]
    shown, waiting = [*head], [*head]
    for row in published().itertuples():
        value = f"{shorten(row.published, 96, placeholder=' ...')} ({row.published_on})"
        link, number = f"notebooks/{row.notebook}.ipynb", row.notebook[:2]
        cells = [row.statement, value, *(_cell(found[model], row.claim) for model in models)]
        cells = [cell.replace("|", BAR) for cell in cells]
        (shown if row.claim in decided else waiting).append(
            [*cells, f"[{number}]({link})" if (ROOT / link).exists() else number]
        )
    first, rest = ("\n".join(f"| {' | '.join(cells)} |" for cells in lines) for lines in (shown, waiting))
    summary = f"<summary>{len(waiting) - len(head)} further published claims, not run yet</summary>"
    return f"{first}\n\n<details>{summary}\n\n{rest}\n\n</details>"


def updated(readme: Path, figures: Path = FIGURES) -> str:
    """The text of `readme` with today's table between its two markers; ValueError if they are missing.

    The siblings' report cards go between markers of their own, where there are such.
    """
    text = _between(readme.read_text(encoding="utf-8"), readme, BEGIN, END, table(figures=figures))
    if CARDS_BEGIN in text:
        text = _between(text, readme, CARDS_BEGIN, CARDS_END, cards(siblings(), figures))
    return text


def _between(text: str, readme: Path, begin: str, end: str, content: str) -> str:
    if not (text.count(begin) == text.count(end) == 1 and text.index(begin) < text.index(end)):
        raise ValueError(f"{readme} needs {begin} and, below it, {end}, once each: the table goes between them")
    return text[: text.index(begin)] + f"{begin}\n{content}\n" + text[text.index(end) :]


def main(arguments: Sequence[str] | None = None, readme: Path = ROOT / "README.md", figures: Path = FIGURES) -> None:
    """Write the claims table into the README, or with --check exit with 1 and a message if it is not current."""
    parser = argparse.ArgumentParser(prog="python -m helpers.claims", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if the table is not current")
    check = parser.parse_args(arguments).check
    try:
        text = updated(readme, figures)
        if check and text != readme.read_text(encoding="utf-8"):
            raise ValueError(f"the claims table in {readme} is not current: run `python -m helpers.claims`")
        if not check:
            with replacing(readme) as path:
                path.write_text(text, encoding="utf-8", newline="\n")
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
