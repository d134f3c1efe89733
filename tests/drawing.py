"""What the tests of figures share."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.text import Text


def rendered(draw: Callable[..., Figure], *arguments: object) -> Figure:
    """A figure, rendered without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw(*arguments)
        figure.canvas.draw()
    return figure


def draw_and_nothing_else(draw: Callable[[], Figure], arguments: Sequence[object]) -> None:
    """Asserts that a figure has data on every axis, that its tables stay as they were, and that no other is open."""
    tables = [argument for argument in arguments if isinstance(argument, pd.DataFrame)]
    before = [table.copy() for table in tables]
    figure = draw()
    assert isinstance(figure, Figure) and [plt.figure(number) for number in plt.get_fignums()] == [figure]
    assert all(ax.has_data() for ax in figure.axes if ax.axison)
    for table, was in zip(tables, before):
        pd.testing.assert_frame_equal(table, was)


def public_functions(module: ModuleType) -> set[str]:
    """Names of the functions that a module defines, and does not only import."""
    found = inspect.getmembers(module, inspect.isfunction)
    return {name for name, each in found if each.__module__ == module.__name__ and not name.startswith("_")}


def titles(figure: Figure) -> list[str]:
    return [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes]


def seen(text: Text) -> str:
    """What stands in the picture, where it is read as text and not as mathematics."""
    shown, as_maths = text._preprocess_math(text.get_text())
    assert not as_maths
    return shown
