"""The scan of a conversation from the command line: its tables, its report, in a browser too, and what it refuses."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from helpers import recordings, scan, scenarios, turns
from helpers.models import description, load_model
from helpers.scenarios import Scenario

EMOTIONS = ["happy", "calm", "sad"]
HARMFUL = "</script><script>alert(1)</script> & <b>so</b>"
WALKS = (
    ("to <the> mill & back", HARMFUL, "I walked home."),
    ("to the sea", "The tide is out.", "So it is."),
    ("to the inn", "Is it open?", "Not yet."),
)
FILES = ["by_turn.csv", "by_turn.png", "effects.csv", "lens.csv", "lens.png", "report.html", "tokens.csv", "turns.csv"]
NAME = "local--longer"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking"]

pytestmark = pytest.mark.usefixtures("nothing_left_open")


def written(folder: Path, walks: tuple, name: str = "walk") -> Path:
    """A scenario file; the assistant's second turn is the model's to write. JSON is YAML."""
    variants = [
        {
            "name": title,
            "speakers": {"Anna": "user", "T<o>m": "assistant"},
            "turns": [{"Anna": first}, {"T<o>m": second}, {"Anna": "Was it\ncold?"}, {"T<o>m": {"write": 4}}],
        }
        for title, first, second in walks
    ]
    about = {"title": "A walk <i>& back", "about": 'Two people say "so" & <u>no</u>.', "references": EMOTIONS}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({**about, "record": {"positions": "end of turn"}, "variants": variants}))
    return path


@dataclass
class Scanned:
    """What a run left: its folder, what it printed, what was recorded, and what the report was made of."""

    folder: Path
    printed: str
    heard: list[Scenario]
    parts: tuple

    @property
    def page(self) -> str:
        return (self.folder / "report.html").read_text(encoding="utf-8")

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / f"{name}.csv", keep_default_na=False, na_values={"low": "", "high": ""})


@pytest.fixture(scope="module")
def longer(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a context that neutral conversations fit: rotary embeddings have no length."""
    folder = tmp_path_factory.mktemp("models") / "longer"
    shutil.copytree(model_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    return folder


@pytest.fixture(scope="module")
def run(longer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Scanned]:
    """Runs the command in a folder of its own."""

    def command(walks: tuple, *options: str) -> Scanned:
        folder, heard, parts = tmp_path_factory.mktemp("scan"), [], []
        recorded, report = recordings.recorded, scan._report

        def spied(model, scenario, seed=None):
            heard.append(scenario)
            return recorded(model, scenario, seed)

        def reported(*given):
            parts.extend(given)
            return report(*given)

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(recordings, "recorded", spied)
            patch.setattr(scan, "_report", reported)
            printed = []
            patch.setattr("builtins.print", lambda *said: printed.append(" ".join(map(str, said))))
            scan.main([str(written(folder, walks)), "--model", str(longer), *options])
        return Scanned(folder / "scans" / NAME / "walk", "\n".join(printed), heard, tuple(parts))

    return command


@pytest.fixture(scope="module")
def three(run: Callable) -> Scanned:
    return run(WALKS)


@pytest.fixture(scope="module")
def one(run: Callable) -> Scanned:
    """With a single conversation, and a seed."""
    return run(WALKS[:1], "--seed", "5")


class Page(HTMLParser):
    """Tags with their attributes, texts, and what the scripts hold."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self.inside == "script" else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    @property
    def shades(self) -> list[dict]:
        """What the script shades the conversations with."""
        return json.loads(re.search(r"^const data = (.*);$", "".join(self.scripts), re.MULTILINE)[1])


# What is written


def test_everything_lands_in_a_folder_of_the_model_and_the_scenario(three: Scanned):
    assert sorted(path.name for path in three.folder.iterdir()) == FILES
    model = load_model(str(three.parts[0].cfg.folder))
    assert three.printed.splitlines() == [
        description(model), f"Report: {Path('scans') / NAME / 'walk' / 'report.html'}",
    ]  # fmt: skip
    assert plt.get_fignums() == []


def test_every_table_says_which_model(three: Scanned):
    for name in scan.NAMES:
        assert set(three.table(name)["model"]) == {NAME}, name


def test_every_turn_of_every_conversation_has_its_rows(three: Scanned):
    table, titles = three.table("turns"), [title for title, *_ in WALKS]
    wanted = [(title, turn, emotion) for title in titles for turn in (1, 2, 3, 4) for emotion in EMOTIONS]
    assert list(zip(table["conversation"], table["turn"], table["emotion"])) == wanted
    assert set(table["scenario"]) == {"walk"} and table.loc[0, "text"] == HARMFUL
    over = three.table("by_turn")
    assert list(zip(over["turn"], over["emotion"])) == [(turn, e) for turn in (1, 2, 3, 4) for e in EMOTIONS]
    for row in over.itertuples():
        values = table.loc[(table["turn"] == row.turn) & (table["emotion"] == row.emotion), "beyond neutral"]
        assert row.value == pytest.approx(values.mean(), abs=1e-3)
        assert row.low < row.value < row.high


def test_every_token_is_recorded_whatever_the_file_asks_for(three: Scanned):
    table = three.table("tokens")
    first = table[table["conversation"] == WALKS[0][0]].drop_duplicates("pos")
    assert first["pos"].tolist() == list(range(1, len(first) + 1))
    assert "".join(first["token"]).startswith(f"\nAnna: {HARMFUL}\nT<o>m: I walked home.\nAnna: Was it\ncold?\nT<o>m:")
    assert set(table["depth"]) == {0, 1, 2, 3} and table["value"].notna().all()


def test_the_position_and_depth_of_turns_are_the_best_ones(three: Scanned):
    model, _, recorded, against, *_ = three.parts
    best = turns.choice(model).iloc[0]
    assert (against.position, against.depth) == (turns.TURNS_AT[best["texts at"]], best["depth"])
    expected = turns.by_turn(three.parts[1], recorded, against)
    np.testing.assert_allclose(three.table("turns")["beyond neutral"], expected["beyond neutral"], rtol=1e-3, atol=1e-4)


def test_the_lens_is_that_of_every_conversation(three: Scanned):
    table = three.table("lens")
    wanted = {(title, turn, depth) for title, *_ in WALKS for turn in (1, 2, 3, 4) for depth in range(4)}
    assert len(table) == len(wanted) and set(zip(table["conversation"], table["turn"], table["depth"])) == wanted


def test_effects_stand_beside_neutral_talk_and_the_conversations_exchanged(three: Scanned):
    table = three.table("effects")
    assert len(table) == 12 and set(table["of"]) == {"scenario", "control", "difference"}
    assert table[["value", "low", "high"]].notna().all().all()
    assert scenarios.control() in three.heard


def test_what_the_model_wrote_is_exchanged_and_not_written_anew(three: Scanned):
    own, exchanged = (each for each in three.heard if each.name == "walk")
    assert [turn.text for turn in own.conversations[0].turns][3] is None
    wrote = [
        [turn.text for turn in each.conversation.turns][3:] + each.turns["text"].tolist() for each in three.parts[2]
    ]
    texts = [turn.text for each in exchanged.conversations for turn in each.turns]
    assert None not in texts and sorted(texts) == sorted(text for each in wrote for text in each[1:])
    assert [each.turns[0].text for each in exchanged.conversations] == [first for _, first, _ in WALKS]


def test_a_seed_changes_what_the_model_writes_and_nothing_else(three: Scanned, one: Scanned):
    greedy, sampled = (each.table("turns").query("emotion == 'sad'")["text"].tolist()[:4] for each in (three, one))
    assert greedy[:3] == sampled[:3] and greedy[3] != sampled[3]


def test_one_conversation_has_no_intervals(one: Scanned):
    assert sorted(path.name for path in one.folder.iterdir()) == FILES
    effects = one.table("effects")
    assert effects["value"].notna().all() and len(effects) == 8
    for table in (one.table("by_turn"), effects[effects["of"] != "control"]):
        assert table["low"].isna().all() and table["high"].isna().all()
    fading = effects[effects["effect"] == "fading memory"]
    assert fading["of"].tolist() == ["scenario"] * 2  # there is nothing to exchange turns with
    assert "A single conversation has no intervals" in Page(one.page).text


def test_several_conversations_say_how_many_they_are(three: Scanned):
    text = Page(three.page).text
    assert "mean over 3 conversations" in text and "no intervals" not in text


# The report


def test_the_report_needs_no_other_file(three: Scanned):
    page = Page(three.page)
    sources = [value for _, given in page.tags for name, value in given.items() if name in ("src", "srcset", "data")]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,iVBORw0KGgo")
    assert not any({"href", "action", "poster", "background"} & set(given) for _, given in page.tags)
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|file:|//cdn|@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\b", three.page)
    assert three.page.startswith("<!DOCTYPE html>") and three.page.endswith("</html>")


def test_the_report_says_which_model_read_what_and_how(three: Scanned):
    text = Page(three.page).text
    assert description(three.parts[0]) in text
    assert f"at depth {three.parts[3].depth}" in text
    assert "A walk <i>& back" in text and 'Two people say "so" & <u>no</u>.' in text
    assert 'next in "to <the> mill & back"' in text and "4 T<o>m" in text


def test_texts_are_shown_and_not_read_as_html(three: Scanned):
    page = Page(three.page)
    assert [tag for tag, _ in page.tags].count("script") == 1 and not {"b", "i", "u", "o", "the"} & {
        tag for tag, _ in page.tags
    }
    assert three.page.count("</script>") == 1
    assert "".join(page.shades[0]["tokens"]).startswith(f"\nAnna: {HARMFUL}\nT<o>m:")
    assert [each["name"] for each in page.shades] == [title for title, *_ in WALKS]


def test_words_of_the_lens_are_shown_and_not_read_as_html(three: Scanned):
    *others, tables, _ = three.parts
    words = [" <b>", "</td>", "&amp;", "\n", "  ", "$5"]
    lens = tables["lens"].assign(token=[words[i % len(words)] for i in range(len(tables["lens"]))])
    page = Page(scan._report(*others, tables | {"lens": lens}, plt.figure()))
    plt.close("all")
    assert "b" not in {tag for tag, _ in page.tags}
    assert {"<b>", "</td>", "&amp;", "⏎", "␣", "$5"} <= set(page.texts)


def test_there_is_a_value_for_every_token_emotion_and_depth(three: Scanned):
    table = three.table("tokens")
    for each in Page(three.page).shades:
        part = table[table["conversation"] == each["name"]]
        words = part.drop_duplicates("pos")
        assert each["tokens"] == words["token"].tolist() and each["turns"] == words["turn"].tolist()
        for number, emotion in enumerate(EMOTIONS):
            for depth in range(4):
                rows = part[(part["emotion"] == emotion) & (part["depth"] == depth)]
                np.testing.assert_allclose(each["values"][number][depth], rows["value"], atol=0.0051, rtol=1e-4)
                assert rows["pos"].tolist() == words["pos"].tolist()
        assert np.array(each["values"]).shape == (3, 4, len(words))


def test_emotions_and_depths_can_be_chosen(three: Scanned):
    page = Page(three.page)
    depth = next(given for tag, given in page.tags if given.get("id") == "depth")
    assert (depth["min"], depth["max"], depth["value"]) == ("0", "3", str(three.parts[3].depth))
    body = three.page.split('<select id="emotion">')[1].split("</select>")[0]
    assert re.findall("<option>(.*?)</option>", body) == EMOTIONS


def test_tables_of_the_report_have_the_numbers_of_the_files(three: Scanned):
    page = three.page
    for name, count in (("by_turn", 12), ("effects", 36)):
        table = three.table(name)
        wanted = [f"{v:.2f}" for column in ("value", "low", "high") for v in table[column]][:count]
        assert set(wanted) <= set(re.findall(r">(-?\d+\.\d\d)</td>", page)), name


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path (chromium, google-chrome)")
def test_a_browser_shades_the_first_conversation_token_by_token(three: Scanned, tmp_path: Path):
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    found = subprocess.run(
        [*command, (three.folder / "report.html").as_uri()], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    shades, depth = Page(three.page).shades[0], three.parts[3].depth
    body = found.split('<div id="text">')[1].split("</div>")[0]
    titles = [given["title"] for tag, given in Page(body).tags if tag == "span"]
    assert titles == [f"{value:.2f} SD" for value in shades["values"][0][depth]]
    for row, value in zip(re.findall("<span.*?>", body), shades["values"][0][depth]):
        red, _, blue = map(int, re.search(r"background: ?rgb\((\d+), (\d+), (\d+)\)", row).groups())
        assert (red > blue) == (value > 0) or abs(value) < 0.05
        line = re.search(r"border-bottom: ?3px (\w+)", row)
        assert (line and line[1]) == (None if abs(value) < 1 else "solid" if value > 0 else "dotted")
    paragraphs = ["".join(Page(each).texts) for each in body.split("<p>")[1:]]
    assert paragraphs[:3] == [f"Anna: {HARMFUL}", "T<o>m: I walked home.", "Anna: Was it\ncold?"]
    assert len(paragraphs) == 4
    options = found.split('<select id="conversation">')[1].split("</select>")[0]
    assert Page(options).texts == [title for title, *_ in WALKS]


# What it refuses


@pytest.fixture
def stopped(longer: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs the command, which ends with one sentence, exit status 1 and nothing written in its folder; the sentence."""

    def command(scenario: str | Path, *options: str, model: str | Path = longer, out: Path | None = None) -> str:
        out = out or tmp_path / "out"
        with pytest.raises(SystemExit) as end:
            scan.main([str(scenario), "--model", str(model), "--out", str(out), *options])
        assert isinstance(end.value.code, str)  # which Python prints to stderr before it ends with status 1
        assert "\n" not in end.value.code and not list(tmp_path.rglob(".*-*"))
        assert not out.is_dir() or {path.name for path in out.iterdir()} <= {"report.html"}
        return end.value.code

    return command


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in (turns, "choice"), (recordings, "recorded"):
        monkeypatch.setattr(*part, lambda *given, name=part[1]: pytest.fail(f"{name} ran"))


def test_a_wrong_name_is_answered_with_the_shipped_ones(stopped: Callable, nothing_runs: None, tmp_path: Path):
    said = stopped("arguments")
    assert re.fullmatch(r"There is no scenario file .*arguments\.yaml\. Shipped scenarios: argument, .*neutral\.", said)
    assert "There is no scenario file" in stopped(tmp_path / "none.yaml")
    assert not (tmp_path / "out").exists()


def test_a_malformed_file_is_answered_with_its_line(stopped: Callable, nothing_runs: None, tmp_path: Path):
    path = written(tmp_path, WALKS)
    path.write_text('title: "A walk"\nabout: "x"\nreferences: [happy, angri]\nvariants: []\n')
    assert stopped(path).startswith("walk.yaml, line 3: references: 'angri' is unknown. Did you mean 'angry'?")
    path.write_text("title: [")
    assert stopped(path).startswith("walk.yaml, line 1: not YAML: ")
    path.write_bytes(b"title: \xff")
    assert stopped(path).startswith("walk.yaml, line 1: not UTF-8 (")


def test_a_conversation_that_is_too_long_is_named(stopped: Callable, nothing_runs: None, tmp_path: Path):
    path = written(tmp_path, ((*WALKS[0][:2], "so " * 300), *WALKS[1:]))
    said = stopped(path)
    assert re.fullmatch(
        r"walk\.yaml, line 1: 'to <the> mill & back' has \d+ tokens .* at most 256\. .* is turn 2 .*", said
    )


def test_a_model_too_short_for_neutral_talk_is_refused_before_it_reads(
    stopped: Callable, nothing_runs: None, model_folder: Callable, tmp_path: Path
):
    path = written(tmp_path, WALKS[1:])
    said = stopped(path, model=model_folder("llama"))
    assert re.match(r"neutral\.yaml, line \d+: '.*' has \d+ tokens .*, but local--tiny-llama reads at most 64\.", said)


def test_an_unknown_model_is_answered_with_the_known_ones(stopped: Callable, nothing_runs: None, tmp_path: Path):
    path = written(tmp_path, WALKS)
    assert stopped(path, model="bookwurm").startswith("Unknown model 'bookwurm'. Did you mean 'bookworm'? Known names:")
    assert stopped(path, model=tmp_path / "nowhere").startswith("There is no model folder")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in stopped(path, model=tmp_path / "empty")


def test_a_folder_that_cannot_be_written_is_named_before_anything_runs(
    stopped: Callable, nothing_runs: None, tmp_path: Path
):
    taken = tmp_path / "taken"
    taken.write_text("a file where the folder should be")
    said = stopped(written(tmp_path, WALKS), out=taken / "scan")
    assert said.startswith(f"cannot write report.html into {taken / 'scan'}: ")
    assert taken.read_text() == "a file where the folder should be"


@pytest.fixture
def old_report(tmp_path: Path) -> Iterator[Path]:
    """A report of an earlier scan, which stays as it was."""
    path = tmp_path / "out" / "report.html"
    path.parent.mkdir()
    path.write_text("an older report")
    yield path
    assert path.read_text() == "an older report"
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]


def test_control_c_ends_with_a_sentence(
    stopped: Callable, old_report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    for module, name in ((scan, "load_model"), (turns, "choice"), (turns, "scale")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupted)
            assert stopped(written(tmp_path, WALKS)) == "Stopped. No file is half-written."


def test_a_full_disk_ends_with_a_sentence_and_leaves_nothing_half_written(
    three: Scanned, stopped: Callable, old_report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The scan as it was, up to where it writes."""
    _, _, recorded, against, tables, _ = three.parts
    for module, name, found in (
        (turns, "choice", pd.DataFrame({"texts at": ["mean"], "depth": [1]})),
        (turns, "scale", against),
        (recordings, "recorded", recorded),
        (scan, "_tables", tables),
    ):
        monkeypatch.setattr(module, name, lambda *given, found=found: found)

    def full(figure: plt.Figure, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plt.Figure, "savefig", full)
    assert "No space left on device" in stopped(written(tmp_path, WALKS))


@pytest.mark.filterwarnings("ignore:'helpers.scan' found in sys.modules")
def test_run_as_a_module_it_ends_with_the_sentence_as_its_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A text, which Python prints to stderr before it ends with status 1."""
    monkeypatch.setattr(sys, "argv", ["scan", "arguments", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^There is no scenario file ") as end:
        runpy.run_module("helpers.scan", run_name="__main__")
    assert isinstance(end.value.code, str)
    assert not (tmp_path / "out").exists()


def test_asked_for_help_it_says_what_it_does(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as end:
        scan.main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "python -m helpers.scan" in said and scan.main.__doc__ in " ".join(said.split())
