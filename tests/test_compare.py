"""Report cards of several models stand side by side, and none is missing without a word."""

from pathlib import Path

import pandas as pd
import PIL.Image
import pytest

from helpers import compare
from helpers.claims import VERDICTS, published, record, siblings
from helpers.config import FIGURES

CLAIMS = published()["claim"].tolist()


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    record(tmp_path / "one", "one", CLAIMS[0], "holds", 1.5, 1.0, 2.0)
    record(tmp_path / "one", "one", CLAIMS[2], "not applicable", note="a context of 64 tokens is too short")
    record(tmp_path / "two", "two", CLAIMS[0], "does not hold", -0.1)
    (tmp_path / "three").mkdir()
    return tmp_path


def test_every_claim_stands_beside_every_model(figures: Path):
    assert compare.models_with_cards(figures) == ["one", "two"]
    table = compare.report_cards(["two", "one"], figures)
    assert table["claim"].tolist() == CLAIMS * 2 and table["model"].tolist() == ["two"] * len(CLAIMS) + ["one"] * len(
        CLAIMS
    )
    cards = table.set_index(["model", "claim"])
    assert cards.loc[("one", CLAIMS[0]), ["value", "low", "high", "verdict"]].tolist() == [1.5, 1.0, 2.0, "holds"]
    assert cards.loc[("two", CLAIMS[0]), "verdict"] == "does not hold"
    assert cards.loc[("one", CLAIMS[2]), "note"] == "a context of 64 tokens is too short"
    assert set(table["verdict"]) <= set(VERDICTS)


def test_known_models_come_first_in_the_order_of_their_table(tmp_path: Path):
    for name in ("aardvark", "zebra", "gpt2-small", "sibling-llama", "bookworm", "sibling-gpt2"):
        record(tmp_path / name, name, CLAIMS[0], "holds", 1.0)
    found = compare.models_with_cards(tmp_path)
    assert found == ["bookworm", "gpt2-small", "sibling-gpt2", "sibling-llama", "aardvark", "zebra"]


def test_the_committed_comparison_is_that_of_the_committed_cards():
    told = pd.read_csv(FIGURES / "compared.csv")
    models = list(told["model"].unique())
    assert models == ["bookworm", *siblings()]
    assert told["verdict"].tolist() == compare.report_cards(models)["verdict"].tolist()
    for row in told[told["verdict"] == "not applicable"].itertuples():
        assert row.note.strip()


def test_what_was_not_run_says_so(figures: Path):
    table = compare.report_cards(["one"], figures).set_index("claim")
    assert table.loc[CLAIMS[1], "verdict"] == "not run" and table["verdict"].notna().all()


def test_the_command_writes_a_figure_and_its_numbers(figures: Path, capsys: pytest.CaptureFixture):
    compare.main([], figures)
    assert "does not hold" in capsys.readouterr().out
    assert PIL.Image.open(figures / "compared.png").width > 300
    assert (figures / "compared.csv").read_text().splitlines()[0].startswith("claim,model,value,low,high,verdict,note")
    compare.main(["two"], figures)
    assert ",one," not in (figures / "compared.csv").read_text()


def test_a_model_without_a_report_card_is_named_with_those_that_have_one(figures: Path):
    with pytest.raises(
        SystemExit, match=r"three has no report card: run `make reproduce MODEL=three` first\. There are: one, two"
    ):
        compare.main(["three"], figures)
    assert not (figures / "compared.csv").exists()


def test_no_report_card_at_all_is_said(tmp_path: Path):
    with pytest.raises(SystemExit, match="no report card in figures/"):
        compare.main([], tmp_path)
