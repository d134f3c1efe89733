"""Controls for the "try your own" cells: nothing runs before the button is pressed, and errors are shown in place."""

from collections.abc import Callable

import ipywidgets


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
