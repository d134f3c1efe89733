"""The "CT scan" of a conversation without a notebook: tables, figures, and a report to open in a browser.

    python -m helpers.scan argument --model gpt2-small      # a scenario of data/scenarios
    python -m helpers.scan my_scenario.yaml --out scans/mine

Everything lands in scans/<model>/<scenario>/ unless --out says otherwise; report.html needs no other file.
"""

import argparse
import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from transformer_lens.model_bridge import TransformerBridge

from helpers import plots, readouts, recordings, scan_plots, scenarios, turns
from helpers.effects import mean
from helpers.files import replacing
from helpers.models import DEFAULT, description, load_model
from helpers.recordings import Recording
from helpers.scenarios import Conversation, Scenario

TEMPLATE = Path(__file__).with_name("scan_report.html")
NAMES = ("turns", "by_turn", "tokens", "lens", "effects")  # of the tables


def scan(model: TransformerBridge, scenario: Scenario, folder: Path, seed: int | None = None) -> Path:
    """The report of a scenario; beside it in `folder` its tables as CSV, and its figures.

    Position and depth of the read-out are those that read the validation situations best; every token is recorded,
    whatever the file asks for. Before anything runs, raises ValueError for a conversation that does not fit the
    model's context (those of neutral talk have to as well) and OSError for a folder in which nothing can be written.
    """
    scenario = replace(scenario, positions="every token", streams=("after mlp",))
    for needed in (scenario, scenarios.control()):
        scenarios.check_fits(model, needed)
    with replacing(folder / "report.html") as page:
        best, neutral = turns.choice(model).iloc[0], recordings.neutral_talk(model)
        against = turns.scale(model, scenario.references, best["texts at"], int(best["depth"]), neutral)
        recorded = recordings.recorded(model, scenario, seed)
        tables = _tables(model, scenario, recorded, against, recordings.background(neutral, "token"))
        figures = {
            "by_turn": scan_plots.by_turn(tables["by_turn"], "beyond neutral (SD)", scenario.references),
            "lens": scan_plots.lens_table(_of_first(tables["lens"], recorded)),
        }
        for name, figure in figures.items():
            plots.written(figure, tables[name], folder / name, model.cfg.model_name)
        for name in set(NAMES) - set(figures):
            with replacing(folder / f"{name}.csv") as path:
                tables[name].assign(model=model.cfg.model_name).to_csv(path, index=False, float_format="%.5g")
        page.write_text(_report(model, scenario, recorded, against, tables, figures["by_turn"]), encoding="utf-8")
    for figure in figures.values():
        plt.close(figure)
    return folder / "report.html"


def _tables(
    model: TransformerBridge,
    scenario: Scenario,
    recorded: Sequence[Recording],
    against: turns.Scale,
    background: readouts.Background,
) -> dict[str, pd.DataFrame]:
    every_turn = turns.by_turn(scenario, recorded, against)
    references = readouts.from_texts(model, scenario.references, "mean")
    tokens = [turns.by_token(each, references, background) for each in recorded]
    lens = [turns.lens(model, each) for each in recorded]
    control = recordings.recorded(model, scenarios.control())
    return {
        "turns": every_turn,
        "by_turn": _over_conversations(every_turn),
        "tokens": _named(tokens, recorded),
        "lens": _named(lens, recorded),
        "effects": turns.effects_of(recorded, control, _spliced(model, scenario, recorded), against),
    }


def _over_conversations(every_turn: pd.DataFrame) -> pd.DataFrame:
    """Mean and interval of every turn and emotion over conversations."""
    rows = [
        (turn, emotion, *mean(torch.tensor(part["beyond neutral"].to_numpy())))
        for (turn, emotion), part in every_turn.groupby(["turn", "emotion"], sort=False)
    ]
    table = pd.DataFrame(rows, columns=["turn", "emotion", "value", "low", "high"])
    return table.assign(scenario=every_turn["scenario"].iloc[0])


def _named(tables: Sequence[pd.DataFrame], recorded: Sequence[Recording]) -> pd.DataFrame:
    named = [table.assign(conversation=each.conversation.name) for table, each in zip(tables, recorded)]
    return pd.concat(named, ignore_index=True)


def _of_first(table: pd.DataFrame, recorded: Sequence[Recording]) -> pd.DataFrame:
    return table[table["conversation"] == recorded[0].conversation.name]


def _spliced(model: TransformerBridge, scenario: Scenario, recorded: Sequence[Recording]) -> list[Recording] | None:
    """The conversations, as they went, with their turns exchanged; None where there are too few, or of other forms."""
    said = replace(scenario, conversations=tuple(_said(each) for each in recorded))
    try:
        exchanged = scenarios.spliced(said)
        scenarios.check_fits(model, exchanged)
    except ValueError:
        return None
    return recordings.recorded(model, exchanged)


def _said(recording: Recording) -> Conversation:
    """The conversation with the texts of all turns given, those that the model wrote among them."""
    texts = zip(recording.conversation.turns, recording.turns["text"])
    return replace(recording.conversation, turns=tuple(replace(turn, text=text, write=0) for turn, text in texts))


def _report(
    model: TransformerBridge,
    scenario: Scenario,
    recorded: Sequence[Recording],
    against: turns.Scale,
    tables: dict[str, pd.DataFrame],
    over_turns: Figure,
) -> str:
    """One page that needs nothing else: the conversations shaded token by token, a figure, tables."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    shown = tables["by_turn"].pivot(index="turn", columns="emotion", values="value")[list(scenario.references)]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        scenario=scenario,
        model=description(model),
        against=against,
        data=json.dumps([_shades(tables["tokens"], each) for each in recorded]).replace("<", "\\u003c"),
        depth=against.depth,
        depths=model.cfg.n_layers + 1,
        picture="data:image/png;base64," + b64encode(plots.picture(over_turns)).decode(),
        by_turn=plots.readable(shown.reset_index()).to_html(),
        effects=plots.readable(tables["effects"]).to_html(),
        lens=_of_first(tables["lens"], recorded).to_dict("records"),
        conversations=len(recorded),
        enough=len(recorded) > 1,
        first=recorded[0].conversation.name,
    )


def _shades(tokens: pd.DataFrame, recording: Recording) -> dict:
    """What the page's script shades one conversation with: its tokens, and values by emotion, depth and token."""
    part = tokens[tokens["conversation"] == recording.conversation.name]
    shape = part["pos"].nunique(), part["emotion"].nunique(), part["depth"].nunique()
    values = torch.tensor(part["value"].to_numpy()).view(shape).permute(1, 2, 0)
    words = part.drop_duplicates("pos")
    return {
        "name": recording.conversation.name,
        "tokens": words["token"].tolist(),
        "turns": words["turn"].tolist(),
        "values": [[[round(v, 2) for v in depth] for depth in emotion] for emotion in values.tolist()],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Scan the conversations of a scenario and write tables, figures and a report."""
    parser = argparse.ArgumentParser(prog="python -m helpers.scan", description=main.__doc__)
    parser.add_argument("scenario", help="a YAML file, or the name of one in data/scenarios, e.g. argument")
    parser.add_argument("--model", default=None, help=f"a known name, a hub id, a folder; MODEL or {DEFAULT} without")
    parser.add_argument("--out", type=Path, default=None, help="folder for the results (scans/<model>/<scenario>)")
    parser.add_argument("--seed", type=int, default=None, help="of turns that the model writes; greedy without")
    asked = parser.parse_args(arguments)
    try:
        scenario = scenarios.load(asked.scenario)
        model = load_model(asked.model)
        print(description(model))
        folder = asked.out or Path("scans") / model.cfg.model_name / scenario.name
        plots.style()
        print(f"Report: {scan(model, scenario, folder, asked.seed)}")
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit("Stopped. No file is half-written.") from None


if __name__ == "__main__":
    main()
