"""Controls for the "try your own" cells: nothing runs before the button is pressed, and errors are shown in place."""

import asyncio
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

import ipywidgets

LABELS, WIDE = {"description_width": "7em"}, ipywidgets.Layout(width="66em", max_width="98%")
STILL_BUSY = 0.2  # seconds after the end in which presses count as made before it
RED = "border-left:4px solid #c62828;padding:4px 10px;margin:4px 0;background:#fdecea;color:#000"
CODE = "width:100%;box-sizing:border-box;font-family:monospace;resize:vertical;background:#f5f5f5;color:#000"


def on_button(label: str, action: Callable[..., None], **controls: ipywidgets.Widget) -> ipywidgets.VBox:
    """The controls, a button, and below them what `action(**values)` shows when the button is pressed.

    While it runs the button says so and takes no second press. A mistake in the input (ValueError,
    LookupError, OSError) is shown as a sentence under the button instead of a stack trace.
    """
    button = ipywidgets.Button(description=label, button_style="primary")
    output = ipywidgets.Output()

    def run(_) -> None:
        button.disabled, button.description = True, "working ..."
        output.clear_output()
        try:
            with output:
                try:
                    action(**{name: control.value for name, control in controls.items()})
                except (ValueError, LookupError, OSError) as error:
                    print(f"This did not work: {error}")
        finally:
            button.disabled, button.description = False, label

    button.on_click(run)
    return ipywidgets.VBox([*controls.values(), button, output])


def sentence(value: str, label: str = "text") -> ipywidgets.Textarea:
    """A wide box for a sentence or two."""
    return ipywidgets.Textarea(value=value, description=label, layout=ipywidgets.Layout(width="40em"))


def slider(value: float, low: float, high: float, label: str) -> ipywidgets.FloatSlider:
    """A slider whose value counts when it is released."""
    return ipywidgets.FloatSlider(
        value=value, min=low, max=high, step=(high - low) / 100, description=label, continuous_update=False
    )


def number(value: int, label: str) -> ipywidgets.BoundedIntText:
    """A box for a whole number that is not negative."""
    return ipywidgets.BoundedIntText(value=value, min=0, max=10**9, description=label)


@dataclass(frozen=True)
class Call:
    """A call that a panel makes and shows, `play.read('She ran.', depth=4)`: what is shown is what was done."""

    of: Any
    name: str
    arguments: tuple = ()
    options: dict[str, Any] = field(default_factory=dict)
    known_as: str = "play"
    first: "Call | None" = None  # what has to be called before it

    def __call__(self) -> Any:
        return getattr(self.of, self.name)(*self.arguments, **self.options)

    def __str__(self) -> str:
        inside = [repr(each) for each in self.arguments] + [f"{name}={each!r}" for name, each in self.options.items()]
        before = f"{self.first}\n" if self.first else ""
        return f"{before}{self.known_as}.{self.name}({', '.join(inside)})"


class Panel(ipywidgets.VBox):
    """Controls, a button, and below them what a Call gave, and the Call as code.

    `asked(**values)` makes the Call when the button is pressed, or Enter in a one-line box. While it runs the button
    says so, and another press does nothing. What goes wrong stands in place as a sentence; for anything but a mistake
    in the input with its type, and the traceback folded up. `shown(found)` may make a widget of the result, which is
    shown as its HTML otherwise. Controls named in `redraws` work at once, without a press: `redraw(found, **values)`
    gives the result as they want it, and the options of the Call that differ. `together` names controls that share a
    line.
    """

    def __init__(
        self,
        label: str,
        asked: Callable[..., Call],
        shown: Callable[[Any], ipywidgets.Widget] | None = None,
        redraws: Sequence[str] = (),
        redraw: Callable[..., tuple[Any, dict[str, Any]]] | None = None,
        together: Sequence[Sequence[str]] = (),
        **controls: ipywidgets.Widget,
    ) -> None:
        self.label, self.asked, self.shown, self.redraw, self.controls = label, asked, shown, redraw, controls
        self.made: Call | None = None
        self.found: Any = None
        self.busy = False
        self.button = ipywidgets.Button(description=label, button_style="primary", tooltip=label)
        self.state, self.said, self.result, self.code = (ipywidgets.HTML() for _ in range(4))
        self.place = ipywidgets.VBox([self.result])
        self.button.on_click(lambda _: self.press())
        for name, control in controls.items():
            if isinstance(control, ipywidgets.Text):
                control.on_msg(lambda _, message, __: self.press() if message.get("event") == "submit" else None)
            if name in redraws:
                control.observe(lambda _: self.again(), "value")
        pressed = ipywidgets.HBox([self.button, self.state])
        super().__init__([*_rows(controls, together), pressed, self.said, self.place, self.code])

    @property
    def values(self) -> dict[str, Any]:
        """What the controls hold now."""
        return {name: control.value for name, control in self.controls.items()}

    def press(self) -> None:
        """What the button does; an error leaves nothing of the last result."""
        if self.busy:
            return
        self.busy = True
        try:
            if not self.run(lambda: self.asked(**self.values), self._keep):
                self.clear()
        finally:
            _soon(self._free)

    def again(self) -> None:
        """The last result as the controls want it now; nothing is computed, and nothing is done before a first one."""
        if self.made is None:
            return
        with _told(self.said):
            self.found, options = self.redraw(self.found, **self.values)
            self._keep(Call(self.made.of, self.made.name, self.made.arguments, self.made.options | options), self.found)

    def run(self, asked: Callable[[], Call], keep: Callable[[Call, Any], None]) -> bool:
        """Make a call and hand it over with what it gave, the button saying so; whether that went well."""
        self.button.disabled, self.button.description = True, "working ..."
        self.state.value = "<span role='status'>this takes a moment</span>"
        try:
            with _told(self.said) as caught:
                call = asked()
                keep(call, call())
            return not caught
        finally:
            self.button.description, self.button.disabled, self.state.value = self.label, False, ""

    def show_code(self, call: Call) -> None:
        """The call in a box that can be reached, selected and copied, and not changed."""
        rows = min(6, str(call).count("\n") + 1 + len(str(call)) // 110)
        self.code.value = (
            f"<div style='margin-top:6px'>as code:</div><textarea readonly data-lm-suppress-shortcuts='true' "
            f"aria-label='as code' rows='{rows}' style='{CODE}'>{escape(str(call))}</textarea>"
        )

    def clear(self) -> None:
        """No result, and no code for one."""
        self.made = self.found = None
        self.place.children, self.result.value, self.code.value = [self.result], "", ""

    def _keep(self, call: Call, found: Any) -> None:
        self.made, self.found = call, found
        if self.shown:
            self.place.children = [self.shown(found)]
        else:
            self.result.value = found._repr_html_()
        self.show_code(call)

    def _free(self) -> None:
        self.busy = False


def _rows(controls: dict[str, ipywidgets.Widget], together: Sequence[Sequence[str]]) -> list[ipywidgets.Widget]:
    """The controls in their order, those that share a line in a box, at the place of the first of them."""
    line_of = {name: names for names in together for name in names}
    lines = dict.fromkeys(tuple(line_of.get(name, [name])) for name in controls)
    wrapping = ipywidgets.Layout(flex_flow="row wrap")
    boxed = ([_slid(controls[name]) for name in names] for names in lines)
    return [each[0] if len(each) == 1 else ipywidgets.HBox(each, layout=wrapping) for each in boxed]


def _slid(control: ipywidgets.Widget) -> ipywidgets.Widget:
    """The control, with its slider beside it if it has one."""
    return ipywidgets.HBox([control, control.slid]) if hasattr(control, "slid") else control


@contextmanager
def _told(place: ipywidgets.HTML) -> Iterator[list[Exception]]:
    """Errors of the block as a sentence in `place`; what was caught stands in the list that the block gets."""
    caught: list[Exception] = []
    place.value = ""
    try:
        yield caught
    except Exception as error:
        caught.append(error)
        place.value = sentence_of(error)


def sentence_of(error: Exception) -> str:
    """HTML that says what went wrong, announced by screen readers; a bug keeps its traceback, folded up."""
    if isinstance(error, (ValueError, LookupError, OSError)):
        return f"<div role='alert' style='{RED}'>This did not work: {escape(_message(error))}</div>"
    lines = "".join(traceback.format_exception(error))
    return (
        f"<div role='alert' style='{RED}'>This did not work, and it is not your input: {type(error).__name__}: "
        f"{escape(_message(error))}<details><summary>traceback</summary><pre style='color:#000;white-space:pre-wrap'>"
        f"{escape(lines)}</pre></details></div>"
    )


def _message(error: Exception) -> str:
    """What an error says; a KeyError says it in quotation marks."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _soon(done: Callable[[], None]) -> None:
    """Call `done` once the presses that came meanwhile have been handled; at once where no event loop runs."""
    try:
        asyncio.get_running_loop().call_later(STILL_BUSY, done)
    except RuntimeError:
        done()


def line(value: str, label: str, tooltip: str) -> ipywidgets.Text:
    """A one-line box; Enter in it presses the panel's button."""
    return ipywidgets.Text(value=value, description=label, tooltip=tooltip, layout=WIDE, style=LABELS)


def lines(value: str, label: str, tooltip: str, rows: int) -> ipywidgets.Textarea:
    """A box for several lines."""
    return ipywidgets.Textarea(value=value, description=label, tooltip=tooltip, layout=WIDE, style=LABELS, rows=rows)


def choice(options: Sequence, value: Any, label: str, tooltip: str) -> ipywidgets.Dropdown:
    """One of several; options are values, or (text, value)."""
    return ipywidgets.Dropdown(
        options=options, value=value, description=label, tooltip=tooltip, style=LABELS,
        layout=ipywidgets.Layout(width="20em"),
    )  # fmt: skip


def whole(value: int, low: int, high: int, label: str, tooltip: str) -> ipywidgets.BoundedIntText:
    """A box for a whole number."""
    return ipywidgets.BoundedIntText(
        value=value, min=low, max=high, description=label, tooltip=tooltip, style=LABELS,
        layout=ipywidgets.Layout(width="14em"),
    )  # fmt: skip


def steps(value: float, low: float, high: float, step: float, label: str, tooltip: str) -> ipywidgets.Widget:
    """A box for a number, whole where the step is, with a slider beside it (`slid`) that a mouse can move.

    The box has the label and all keys; in JupyterLab the arrow keys on a slider belong to the notebook.
    """
    whole = isinstance(step, int)
    kind, slides = (
        (ipywidgets.BoundedIntText, ipywidgets.IntSlider)
        if whole
        else (ipywidgets.BoundedFloatText, ipywidgets.FloatSlider)
    )
    span = {"value": value, "min": low, "max": high, "step": step, "tooltip": tooltip}
    box = kind(**span, description=label, style=LABELS, layout=ipywidgets.Layout(width="12.5em"))
    box.slid = slides(**span, readout=False, continuous_update=False, layout=ipywidgets.Layout(width="11em"))
    ipywidgets.jslink((box.slid, "value"), (box, "value"))
    return box
