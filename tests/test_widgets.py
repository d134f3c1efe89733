"""The "try your own" cells and the panels' building blocks: buttons, errors, code; here and in a real kernel."""

import re
from html import unescape
from typing import Any

import ipywidgets
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from helpers.widgets import Call, Panel, choice, line, lines, on_button, sentence, slider, steps, whole


def test_nothing_runs_before_the_press():
    called = []
    on_button("Read", called.append, x=ipywidgets.IntText(1))
    assert called == []


def test_a_press_runs_the_action_with_the_values_of_that_moment():
    called = []
    controls = {"text": sentence("He fell."), "strength": slider(0.2, -1, 1, "strength")}
    box = on_button("Read", lambda **values: called.append(values), **controls)
    controls["strength"].value = 0.5
    _button(box).click()
    controls["text"].value = "She ran."
    _button(box).click()
    assert called == [{"text": "He fell.", "strength": 0.5}, {"text": "She ran.", "strength": 0.5}]


def test_the_controls_stand_above_the_button_and_the_output_below():
    text, strength = sentence("He fell."), slider(0.2, -1, 1, "strength")
    box = on_button("Read", print, text=text, strength=strength)
    assert box.children[:2] == (text, strength)
    assert _button(box) is box.children[2]
    assert _button(box).description == "Read"
    assert isinstance(box.children[3], ipywidgets.Output)


def test_while_it_runs_the_button_says_so_and_takes_no_second_press():
    seen = []
    box = on_button("Read", lambda: seen.append((_button(box).disabled, _button(box).description)))
    _button(box).click()
    assert seen == [(True, "working ...")]
    assert (_button(box).disabled, _button(box).description) == (False, "Read")


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError])
def test_a_mistake_in_the_input_is_told_as_a_sentence(error: type[Exception], capsys: pytest.CaptureFixture):
    box = on_button("Read", lambda: _raise(error("the text is empty")))
    _button(box).click()
    assert "This did not work: the text is empty" in capsys.readouterr().out
    assert (_button(box).disabled, _button(box).description) == (False, "Read")


def test_a_bug_is_not_told_as_a_mistake_in_the_input(capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture):
    box = on_button("Read", lambda: _raise(ZeroDivisionError("a bug")))
    _button(box).click()  # ipywidgets logs what a callback raises
    assert "ZeroDivisionError: a bug" in caplog.text
    assert "did not work" not in capsys.readouterr().out
    assert (_button(box).disabled, _button(box).description) == (False, "Read")


def test_after_an_interruption_the_button_can_be_pressed_again():
    box = on_button("Read", lambda: _raise(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        _button(box).click()
    assert (_button(box).disabled, _button(box).description) == (False, "Read")


def test_what_the_action_prints_stands_in_the_output_and_the_next_press_clears_it():
    """Where prints go is settled between kernel and front end, so this one asks a kernel."""
    cells = [
        "from helpers.widgets import on_button, sentence\n"
        "def read(text): print('read', text) if text else [].index('no such thing')\n"
        "control = sentence('first')\n"
        "box = on_button('Read', read, text=control)",
        "box.children[1].click()",
        "control.value = 'second'\nbox.children[1].click()",
        "control.value = ''\nbox.children[1].click()",
    ]
    shown = []

    def look(**_: object) -> None:
        (output,) = [state["outputs"] for state in client.widget_state.values() if "outputs" in state]
        shown.append("".join(part["text"] for part in output))

    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    client = NotebookClient(notebook, kernel_name="python3", timeout=60, on_cell_executed=look)
    client.execute()
    assert shown[:3] == ["", "read first\n", "read second\n"]
    assert shown[3].startswith("This did not work: ")
    assert [output for cell in notebook.cells for output in cell.outputs] == []


def test_a_slider_covers_its_range_and_reports_when_it_is_released():
    control = slider(0.2, -1, 1, "strength")
    assert (control.value, control.min, control.max, control.description) == (0.2, -1, 1, "strength")
    assert control.continuous_update is False


class Answer:
    """What a Call may give: something with HTML."""

    def __init__(self, html: str) -> None:
        self.html = html

    def _repr_html_(self) -> str:
        return self.html


class Asked:
    """Notes how it was called; gives back the text in bold, or raises what it is given."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.calls, self.error = [], error

    def read(self, text: str, **options: Any) -> Answer:
        self.calls.append((text, options))
        if self.error:
            raise self.error
        return Answer(f"<b>{text}</b>")


def panel_of(play: Any, **options: Any) -> Panel:
    return Panel(
        "Read",
        lambda text, depth: Call(play, "read", (text,), {"depth": depth}),
        text=line("She ran.", "text", "a text"),
        depth=steps(4, 0, 8, 1, "depth", "where to read"),
        **options,
    )


def code_of(panel: Panel) -> str:
    return unescape("".join(re.findall(r"<textarea[^>]*>(.*)</textarea>", panel.code.value, re.DOTALL)))


@pytest.mark.parametrize(
    ("arguments", "options", "code"),
    [
        (("She ran.",), {"depth": 4, "emotions": ["afraid"]}, "play.read('She ran.', depth=4, emotions=['afraid'])"),
        (('It\'s "so"\n\\',), {}, "play.read('It\\'s \"so\"\\n\\\\')"),
        ((), {"strength": 0.3, "seed": None}, "play.read(strength=0.3, seed=None)"),
    ],
)
def test_a_call_is_shown_as_python_that_makes_it(arguments: tuple, options: dict[str, Any], code: str):
    assert str(Call(None, "read", arguments, options)) == code


def test_the_code_of_a_call_does_what_the_call_does():
    play = Asked()
    call = Call(play, "read", ('It\'s "so"\n | \\ 😱',), {"depth": 3}, first=Call(play, "read", ("before",)))
    exec(str(call), {"play": play})
    assert play.calls == [("before", {}), ('It\'s "so"\n | \\ 😱', {"depth": 3})]
    call()
    assert play.calls[2] == play.calls[1]


def test_a_panel_runs_nothing_before_the_press_and_then_what_it_shows_as_code():
    play = Asked()
    panel = panel_of(play)
    assert (play.calls, panel.code.value, panel.result.value) == ([], "", "")
    panel.controls["text"].value = "</textarea> It's"
    panel.button.click()
    assert play.calls == [("</textarea> It's", {"depth": 4})]
    assert code_of(panel) == 'play.read("</textarea> It\'s", depth=4)'
    assert panel.code.value.count("</textarea>") == 1
    assert panel.result.value == "<b></textarea> It's</b>"


def test_the_code_can_be_reached_and_copied_but_not_changed():
    panel = panel_of(Asked())
    panel.press()
    (tag,) = re.findall(r"<textarea[^>]*>", panel.code.value)
    assert " readonly " in tag
    assert "aria-label='as code'" in tag
    assert "disabled" not in tag
    assert "tabindex='-1'" not in tag
    assert "data-lm-suppress-shortcuts='true'" in tag  # or JupyterLab would select all cells


def test_enter_in_a_one_line_box_presses_the_button():
    play = Asked()
    panel = panel_of(play)
    text = panel.controls["text"]
    text._handle_custom_msg({"event": "blur"}, [])
    assert play.calls == []
    text._handle_custom_msg({"event": "submit"}, [])
    assert play.calls == [("She ran.", {"depth": 4})]


def test_while_a_panel_works_it_says_so_and_a_second_press_does_nothing():
    seen = []

    class Slow(Asked):
        def read(self, text: str, **options: Any) -> Answer:
            seen.append((panel.button.disabled, panel.button.description, "role='status'" in panel.state.value))
            if len(seen) == 1:
                panel.press()
                panel.button.click()
            return super().read(text, **options)

    play = Slow()
    panel = panel_of(play)
    panel.press()
    assert seen == [(True, "working ...", True)]
    assert len(play.calls) == 1
    assert (panel.button.disabled, panel.button.description, panel.state.value) == (False, "Read", "")
    panel.press()
    assert len(play.calls) == 2


@pytest.mark.parametrize("error", [ValueError, LookupError, FileNotFoundError, IndexError, KeyError])
def test_a_panel_tells_a_mistake_in_the_input_as_a_sentence(error: type[Exception]):
    panel = panel_of(Asked(error("the text <b> is empty")))
    panel.press()
    (alert,) = re.findall(r"<div role='alert'[^>]*>(.*)</div>", panel.said.value)
    assert alert == "This did not work: the text &lt;b&gt; is empty"
    assert (panel.button.disabled, panel.button.description) == (False, "Read")


def test_a_panel_tells_a_bug_with_its_type_and_the_traceback_folded_up(caplog: pytest.LogCaptureFixture):
    panel = panel_of(Asked(ZeroDivisionError("by <0>")))
    panel.press()
    assert "role='alert'" in panel.said.value
    assert "ZeroDivisionError: by &lt;0&gt;" in panel.said.value.split("<details>")[0]
    (folded,) = re.findall(r"<details>(.*)</details>", panel.said.value, re.DOTALL)
    assert "Traceback (most recent call last)" in folded
    assert "<0>" not in panel.said.value
    assert caplog.text == ""


def test_an_error_leaves_nothing_of_the_last_result_and_the_next_press_nothing_of_the_error():
    play = Asked()
    panel = panel_of(play)
    panel.press()
    play.error = ValueError("no")
    panel.press()
    assert (panel.result.value, panel.code.value, panel.made) == ("", "", None)
    play.error = None
    panel.press()
    assert panel.said.value == ""
    assert panel.result.value == "<b>She ran.</b>"


def test_an_interruption_is_no_mistake_and_the_panel_can_be_pressed_again():
    play = Asked(KeyboardInterrupt())
    panel = panel_of(play)
    with pytest.raises(KeyboardInterrupt):
        panel.press()
    play.error = None
    panel.press()
    assert panel.result.value == "<b>She ran.</b>"


def test_a_control_that_redraws_computes_nothing_and_keeps_the_text_that_was_read():
    play = Asked()
    drawn = []

    def redraw(found: Answer, text: str, depth: int) -> tuple[Answer, dict[str, Any]]:
        drawn.append(depth)
        return Answer(f"{found.html} at {depth}"), {"depth": depth}

    panel = panel_of(play, redraws=("depth",), redraw=redraw)
    panel.controls["depth"].value = 2
    assert drawn == []  # nothing to redraw yet
    panel.press()
    panel.controls["text"].value = "not read yet"
    panel.controls["depth"].value = 6
    assert len(play.calls) == 1
    assert panel.result.value == "<b>She ran.</b> at 6"
    assert code_of(panel) == "play.read('She ran.', depth=6)"


def test_a_redraw_that_fails_says_so():
    panel = panel_of(Asked(), redraws=("depth",), redraw=lambda *_, **__: _raise(ValueError("no such depth")))
    panel.press()
    panel.controls["depth"].value = 1
    assert "This did not work: no such depth" in panel.said.value


def test_a_panel_may_show_widgets():
    panel = panel_of(Asked(), shown=lambda found: ipywidgets.Label(found.html))
    panel.press()
    assert panel.place.children[0].value == "<b>She ran.</b>"


def test_controls_that_share_a_line_stand_together_in_their_order():
    controls = {name: whole(0, 0, 9, name, name) for name in "abcd"}
    panel = Panel("Go", lambda **_: None, together=[["b", "c"]], **controls)
    assert panel.children[0] is controls["a"]
    assert panel.children[1].children == (controls["b"], controls["c"])
    assert panel.children[2] is controls["d"]


def test_every_control_has_a_label_and_says_what_it_is_for():
    controls = [
        line("a", "text", "a text"),
        lines("a", "text", "a text", 3),
        choice(["a", "b"], "b", "text", "a text"),
        whole(3, 1, 5, "text", "a text"),
        steps(3, 1, 5, 1, "text", "a text"),
        steps(0.5, 0, 1, 0.1, "text", "a text"),
    ]
    assert {(control.description, control.tooltip) for control in controls} == {("text", "a text")}
    assert [control.value for control in controls] == ["a", "a", "b", 3, 3, 0.5]


def test_a_number_has_a_slider_of_its_range_beside_it():
    depth, strength = steps(3, 1, 5, 1, "depth", ""), steps(0.5, -1, 1, 0.05, "strength", "")
    for box in (depth, strength):
        assert (box.slid.value, box.slid.min, box.slid.max) == (box.value, box.min, box.max)
        assert box.slid.continuous_update is False
    assert isinstance(depth.value, int)
    panel = Panel("Go", lambda **_: None, depth=depth)
    assert panel.children[0].children == (depth, depth.slid)


def test_presses_made_while_the_kernel_works_are_lost_and_later_ones_are_not():
    """A kernel handles what arrives meanwhile afterwards, one after the other; so this one asks a kernel."""
    cells = [
        "import asyncio\nfrom helpers.widgets import Call, Panel, STILL_BUSY\n"
        "class Play:\n    calls = 0\n"
        "    def read(self):\n        self.calls += 1\n        return self\n"
        "    def _repr_html_(self):\n        return ''\n"
        "play = Play()\npanel = Panel('Read', lambda: Call(play, 'read'))",
        "panel.press()\npanel.press()\nasyncio.get_running_loop().call_later(0, panel.press)\nplay.calls",
        "await asyncio.sleep(2 * STILL_BUSY)\npanel.press()\nplay.calls",
    ]
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, kernel_name="python3", timeout=60).execute()
    assert [cell.outputs[0]["data"]["text/plain"] for cell in notebook.cells[1:]] == ["1", "2"]


def _button(box: ipywidgets.VBox) -> ipywidgets.Button:
    return next(child for child in box.children if isinstance(child, ipywidgets.Button))


def _raise(error: BaseException) -> None:
    raise error
