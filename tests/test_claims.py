"""The claims ledger: its file, what notebooks record, and the README's table."""

import os

import pandas as pd
import pytest

from helpers import claims
from helpers.config import DATA, ROOT

NOTEBOOKS = """01_fear_direction 02_sae_features 03_cross_layer_similarity 04_steering_sweeps
               05_emotion_geometry 06_ct_scan 07_across_models 08_playground"""


def markdown(begin=claims.BEGIN, end=claims.END):
    return f"# Title\n\n{begin}\nold\n{end}\n\nBelow.\n"


def test_every_published_claim_is_complete():
    ledger = claims.published()
    assert ledger.claim.str.fullmatch(r"[A-E](-[a-z0-9]+)+").all()
    assert set(ledger.claim.str[0]) == set("ABCDE")
    assert set(ledger.notebook) <= set(NOTEBOOKS.split())
    assert ledger.decided_by.str.contains("holds if").all()
    assert ledger.decided_by.str.contains("does not hold").all()
    assert ledger.statement.str.len().max() <= 80, "the README's table wants short statements"


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("published", " ", "blank cells in the rows of: A-zero-overlap"),
        ("claim", "A-heldout-separation", "twice: A-heldout-separation"),
        ("notebook", "dreams", "than 01_fear_direction: dreams"),
    ],
)
def test_a_faulty_ledger_is_refused(tmp_path, column, value, message):
    ledger = claims.published()
    ledger.loc[ledger.claim == "A-zero-overlap", column] = value
    ledger.to_csv(tmp_path / "claims.csv", index=False)
    with pytest.raises(ValueError, match=message):
        claims.published(tmp_path / "claims.csv")


def test_what_is_recorded_is_read_back(tmp_path):
    note = 'one, "two" | drei\nvier é'
    claims.record(tmp_path, "toy", "B-u-shape", "not applicable", note=note)
    row = claims.record(tmp_path, "toy", "A-zero-overlap", "partly", 0.5, -0.25, 0.75)
    found = claims.recorded(tmp_path)
    assert list(found) == claims.RECORDED
    assert found.claim.tolist() == ["A-zero-overlap", "B-u-shape"]
    assert found.loc[0, claims.NUMBERS].tolist() == [0.5, -0.25, 0.75]
    assert found.loc[1, claims.NUMBERS].isna().all()
    assert found.note.tolist() == ["", 'one, "two" | drei vier é']
    pd.testing.assert_frame_equal(row, found.head(1), check_dtype=False)


def test_recording_again_replaces_the_row(tmp_path):
    for verdict, value in (("holds", 1.0), ("partly", 2.0)):
        claims.record(tmp_path, "toy", "A-zero-overlap", verdict, value)
    claims.record(tmp_path, "toy", "A-d-by-layer", "holds", 3.0)
    found = claims.recorded(tmp_path)
    assert found.claim.tolist() == ["A-d-by-layer", "A-zero-overlap"]
    assert found.verdict.tolist() == ["holds", "partly"]
    assert found.value.tolist() == [3.0, 2.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(claim="A-zero-overlp"), "no claim 'A-zero-overlp'; the nearest are A-zero-overlap"),
        (dict(verdict="maybe"), "'maybe' is no verdict; they are holds, partly"),
        (dict(verdict="not applicable", note=" "), "needs a note that says why"),
        (dict(value=float("nan")), "value=nan.* is not finite; leave it out"),
        (dict(value=1.0, low=0.0, high=float("inf")), "high=inf is not finite"),
        (dict(low=2.0, high=1.0), "low <= high, not low=2.0, high=1.0"),
        (dict(low=2.0), "an interval has two ends"),
    ],
)
def test_a_faulty_record_is_refused(tmp_path, given, message):
    given = dict(model="toy", claim="A-zero-overlap", verdict="holds") | given
    with pytest.raises(ValueError, match=message):
        claims.record(tmp_path, **given)
    assert not list(tmp_path.iterdir())


def test_nothing_recorded_is_an_empty_frame(tmp_path):
    found = claims.recorded(tmp_path / "nowhere")
    assert found.empty
    assert list(found) == claims.RECORDED
    assert (found.dtypes[claims.NUMBERS] == "float64").all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a readable CSV"),
        ("claim,value\nA-zero-overlap,1\n", "has the columns .'claim', 'value'."),
        ("claim,model,value,low,high,verdict,note\nx,toy,many,,,holds,\n", "a value that is no number .*many"),
        ("claim,model,value,low,high,verdict,note\nx,toy,1,,,maybe,\n", "unknown verdicts .'maybe'."),
        ("claim,model,value,low,high,verdict,note\nx,toy,1,,,holds,\nx,toy,1,,,holds,\n", "twice: x"),
    ],
)
def test_a_malformed_record_file_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "claims.csv").write_text(content)
    with pytest.raises(ValueError, match=f"claims.csv.*{message}"):
        claims.recorded(tmp_path)


@pytest.mark.parametrize("step", [(pd.DataFrame, "to_csv"), (os, "replace")], ids=["while writing", "before replacing"])
def test_an_interrupted_record_leaves_the_old_file(tmp_path, monkeypatch, step):
    claims.record(tmp_path, "toy", "A-zero-overlap", "holds", 1.0)
    before = (tmp_path / "claims.csv").read_bytes()

    def interrupted(*arguments, **options):
        if step[1] == "to_csv":
            arguments[1].write_text("half a fi")
        raise KeyboardInterrupt

    monkeypatch.setattr(*step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        claims.record(tmp_path, "toy", "A-zero-overlap", "partly", 2.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".claims.csv.lock", "claims.csv"]
    assert (tmp_path / "claims.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.51, 0.9, "holds"),
        (0.5, 0.9, "partly"),
        (0.4, 0.51, "partly"),
        (0.4, 0.5, "does not hold"),
        (0.5, 0.5, "does not hold"),
        (float("nan"), 0.9, "does not hold"),
        (0.6, float("nan"), "does not hold"),
    ],
)
def test_verdict_at_its_boundaries(low, high, expected):
    assert claims.verdict(low, high, above=0.5) == expected


def test_the_table_shows_every_claim_and_says_what_was_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_fear_direction.ipynb").touch()
    claims.record(tmp_path / "bookworm", "bookworm", "A-zero-overlap", "partly", 0.51234, -0.2, 123.4)
    claims.record(tmp_path / "bookworm", "bookworm", "A-d-by-layer", "does not hold", 1.26)
    claims.record(tmp_path / "bookworm", "bookworm", "B-cross-lingual", "not applicable", note="one | script, nan")
    decided, waiting = claims.table(["bookworm", "gpt2-small"], tmp_path).split("<details>")
    lines = [line for line in (decided + waiting).splitlines() if line.startswith("| ") and " --- " not in line]
    header = "| claim | published (on) | bookworm (analogue) | gpt2-small | notebook |"
    assert lines.count(header) == 2
    statements = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line != header}
    rows = {row.claim: statements[row.statement] for row in claims.published().itertuples()}
    assert len(lines) == len(rows) + 2
    assert all(rows[claim] in decided for claim in ("A-zero-overlap", "A-d-by-layer", "B-cross-lingual"))
    assert f"{len(rows) - 3} further published claims" in waiting
    link = "[01](notebooks/01_fear_direction.ipynb)"
    assert rows["A-zero-overlap"].endswith(f"| partly 0.51 [-0.2, 123] | not run | {link} |")
    assert rows["A-d-by-layer"].endswith(f"| does not hold 1.3 | not run | {link} |")
    assert rows["B-cross-lingual"].endswith("| not applicable: one \\| script, nan | not run | 04 |")
    assert rows["C-pc1-valence"].endswith("| not run | not run | 05 |")
    assert "r = .81" in rows["C-pc1-valence"]


def test_the_command_writes_the_table_and_checks_it(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(markdown())
    with pytest.raises(SystemExit, match=r"not current: run `python -m helpers\.claims`"):
        claims.main(["--check"], readme, tmp_path)
    assert readme.read_text() == markdown()
    claims.main([], readme, tmp_path)
    assert readme.read_text() == markdown().replace("old", claims.table(figures=tmp_path))
    claims.main(["--check"], readme, tmp_path)
    claims.record(tmp_path / "bookworm", "bookworm", "A-zero-overlap", "holds", 1.0)
    with pytest.raises(SystemExit, match="not current"):
        claims.main(["--check"], readme, tmp_path)


def test_the_siblings_cards_stand_side_by_side_between_their_own_markers(tmp_path):
    first, *others = claims.siblings()
    claims.record(tmp_path / first, first, "A-zero-overlap", "partly", 0.5, 0.25, 0.75)
    claims.record(tmp_path / others[0], others[0], "A-zero-overlap", "not applicable", note="no room for 24 | turns")
    readme = tmp_path / "README.md"
    readme.write_text(f"{markdown()}\n{claims.CARDS_BEGIN}\nold\n{claims.CARDS_END}\nand more")
    claims.main([], readme, tmp_path)
    *_, cards = readme.read_text().split(claims.CARDS_BEGIN)
    assert cards.splitlines()[1] == f"| claim | {' | '.join([first, *others])} |"
    row = next(line for line in cards.splitlines() if line.startswith("| A-zero-overlap"))
    shown = ["partly 0.5 [0.25, 0.75]", "not applicable: no room for 24 \\| turns", "not run", "not run", "not run"]
    assert row == f"| A-zero-overlap | {' | '.join(shown)} |"
    assert len(cards.splitlines()) == 1 + 2 + len(claims.published()) + 2 and cards.endswith("and more")
    claims.main(["--check"], readme, tmp_path)


def test_the_published_projections_are_those_of_the_ledger():
    layers = pd.read_csv(DATA / "published" / "fear_projections.csv")["d"]
    row = claims.published().set_index("claim").loc["A-d-by-layer"]
    assert row.published.split(" (")[0].split() == [f"{d:.2f}" for d in layers]


@pytest.mark.parametrize("text", [markdown(end=""), markdown(begin=""), markdown(claims.END, claims.BEGIN)])
def test_a_readme_without_its_markers_is_refused(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(SystemExit, match=r"README\.md needs <!-- claims:begin --> and, below it"):
        claims.main([], readme, tmp_path)
    assert readme.read_text() == text


def test_the_readme_of_this_repository_is_current():
    claims.main(["--check"], ROOT / "README.md")
