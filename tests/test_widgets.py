"""The "try your own" cells: a button that runs an action, here and in a real kernel."""

import ipywidgets
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from helpers.widgets import on_button, sentence, slider


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


def _button(box: ipywidgets.VBox) -> ipywidgets.Button:
    return next(child for child in box.children if isinstance(child, ipywidgets.Button))


def _raise(error: BaseException) -> None:
    raise error
