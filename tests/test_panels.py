"""The playground's panels on a tiny random model: what is pressed, what is shown, and the code that gives the same."""

import re
from html import unescape

import ipywidgets
import pytest
from transformer_lens.model_bridge import TransformerBridge

from helpers import panels
from helpers.answers import MINE
from helpers.playground import Playground, opened
from helpers.widgets import Panel


@pytest.fixture(scope="module")
def play(model_with_saes: TransformerBridge) -> Playground:
    return opened(model_with_saes)


def code_of(panel: Panel) -> str:
    return unescape("".join(re.findall(r"<textarea[^>]*>(.*)</textarea>", panel.code.value, re.DOTALL)))


def buttons_of(panel: Panel) -> list[ipywidgets.Button]:
    rows = panel.place.children[0].children[0].children
    return [part for row in rows if hasattr(row, "children") for part in row.children[1:]]


def test_a_panel_computes_nothing_when_it_is_made(play: Playground):
    before = set(play.kept)
    for make in (panels.reading, panels.own_pairs, panels.steering, panels.features):
        panel = make(play)
        assert (panel.result.value, panel.code.value, panel.said.value) == ("", "", "")
    assert set(play.kept) == before


@pytest.mark.parametrize("name", ["reading", "own_pairs", "steering"])
def test_the_code_of_a_panel_gives_what_the_panel_shows(play: Playground, name: str):
    panel = getattr(panels, name)(play)
    panel.press()
    assert panel.said.value == ""
    assert panel.result.value
    again = eval(code_of(panel), {"play": play})._repr_html_()
    assert again == panel.result.value


def test_a_moved_depth_shows_what_a_press_there_would(play: Playground):
    panel = panels.reading(play)
    panel.press()
    panel.controls["depth"].value = 1
    panel.controls["beside"].value = panels.ALONE
    shown, code = panel.result.value, code_of(panel)
    assert code.endswith("depth=1, emotions=['afraid'])")
    panel.press()
    assert (panel.result.value, code_of(panel)) == (shown, code)


def test_the_same_emotion_twice_is_shown_once(play: Playground):
    panel = panels.reading(play)
    panel.controls["beside"].value = panel.controls["emotion"].value
    panel.press()
    assert code_of(panel).endswith("emotions=['afraid'])")


def test_the_controls_of_steering_reach_the_call(play: Playground):
    panel = panels.steering(play)
    values = {"direction": "fear", "depth": 2, "strength": 0.35, "which": "prompt", "n_tokens": 5, "seed": 8}
    for name, value in values.items():
        panel.controls[name].value = value
    panel.press()
    assert code_of(panel).endswith("depth=2, strength=0.35, which='prompt', n_tokens=5, seed=None)")
    panel.controls["way"].value = "sampled"
    panel.press()
    assert panel.made.options == values


def test_a_direction_of_ones_own_steers_and_its_code_begins_with_finding_it(model: TransformerBridge):
    play = opened(model)
    steering, own = panels.steering(play), panels.own_pairs(play)
    steering.controls["direction"].value = MINE
    steering.press()
    assert "there is no" in steering.said.value
    own.controls["position"].value = "mean"
    own.press()
    steering.press()
    assert steering.said.value == ""
    first, second = code_of(steering).splitlines()
    assert first == code_of(own)
    fresh = opened(model)
    exec(first, {"play": fresh})
    assert eval(second, {"play": fresh})._repr_html_() == steering.result.value


def test_every_feature_is_a_button_that_shows_its_passages(play: Playground, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("helpers.playground.passages", lambda: ["He ran home.", "The sea was calm."])
    panel = panels.features(play)
    panel.controls["top"].value = 2
    panel.press()
    found = panel.found
    buttons = buttons_of(panel)
    assert [button.description.split(" · ")[0] for button in buttons] == found.table["feature"].astype(str).tolist()
    assert code_of(panel).startswith("play.features(")
    buttons[3].click()
    feature = found.table["feature"].iloc[3]
    assert code_of(panel) == f"play.passages({feature}, depth={found.depth})"
    right = panel.place.children[0].children[1]
    assert right.value == play.passages(int(feature), found.depth).html
    assert [button.button_style == "info" for button in buttons].index(True) == 3
    assert all(f"feature {button.description.split(' · ')[0]}," in button.tooltip for button in buttons)


def test_features_that_were_found_stay_when_their_passages_fail(play: Playground, monkeypatch: pytest.MonkeyPatch):
    panel = panels.features(play)
    panel.controls["depth"].value = 3
    panel.press()
    monkeypatch.setattr("helpers.playground.passages", lambda: ["word " * 100])
    before = buttons_of(panel)
    before[0].click()
    assert "none of the shipped passages fits" in panel.said.value
    assert buttons_of(panel) == before


def test_a_long_text_gets_buttons_for_its_first_tokens_only(play: Playground, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(panels, "BUTTONS", 4)
    panel = panels.features(play)
    panel.controls["top"].value = 1
    panel.press()
    rows = panel.place.children[0].children[0].children
    assert len(rows) == 5
    assert "Only the first 4 of" in rows[4].value


def test_a_model_without_saes_is_told_at_once_and_the_other_panels_work(model: TransformerBridge):
    play = opened(model)
    panel = panels.features(play)
    assert "There are no SAEs for" in panel.said.value
    panel.press()
    assert "There are no SAEs for" in panel.said.value
    reading = panels.reading(play)
    reading.press()
    assert reading.said.value == ""


@pytest.mark.parametrize("name", ["reading", "own_pairs", "steering", "features"])
def test_every_control_of_every_panel_is_labelled(play: Playground, name: str):
    panel = getattr(panels, name)(play)
    assert [key for key, control in panel.controls.items() if not (control.description and control.tooltip)] == []
    labels = [control.description for control in panel.controls.values()]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("name", "control", "said"),
    [("reading", "text", "the text is empty"), ("own_pairs", "pairs", "at least two pairs"),
     ("steering", "prompt", "the prompt is empty"), ("features", "text", "the text is empty")],
)  # fmt: skip
def test_an_empty_box_is_told_as_a_sentence(play: Playground, name: str, control: str, said: str):
    panel = getattr(panels, name)(play)
    panel.controls[control].value = " "
    panel.press()
    assert "role='alert'" in panel.said.value
    assert said in panel.said.value
