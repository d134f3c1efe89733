"""HTML of what a person typed and got back: shaded tokens, marked tokens, bars, tables, pictures.

Shading sets its own text colour, so it reads on a light and on a dark page; what colour says, a line under the token
or the title of it says too. Everything typed or generated is escaped.
"""

from base64 import b64encode
from collections.abc import Sequence
from html import escape

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from helpers import plots

ABOVE, BELOW = (230, 159, 0), (0, 114, 178)  # orange and blue; white between them
FULL = 3.0  # SD at which a colour is full
LINED = 1.0  # SD from which a line says what the colour says
PAPER = "background:#fff;color:#000;padding:2px 6px"  # so that black lines show on a dark page
TEXT = "line-height:2.1;max-width:60em;white-space:pre-wrap;overflow-wrap:anywhere"


def page(*parts: str) -> str:
    """Parts below each other, at a line height of their own: widgets would give them that of a button."""
    return f"<div style='line-height:1.5'>{''.join(f'<div>{part}</div>' for part in parts)}</div>"


def shaded(tokens: Sequence[str], values: Sequence[float], what: str) -> str:
    """A text whose tokens are orange where the value (in SD) is above 0 and blue where below; the title has it."""
    spans = [_span(token, value, f"{what}: {value:+.2f} SD") for token, value in zip(tokens, values, strict=True)]
    return f"<div style='{TEXT};{PAPER}'>{''.join(spans)}</div>"


def legend() -> str:
    """What the shades and lines of `shaded` mean, as one line."""
    signs = [
        (-FULL, f"−{FULL:g} SD"),
        (-LINED, f"−{LINED:g}"),
        (0.0, "0"),
        (LINED, f"+{LINED:g}"),
        (FULL, f"+{FULL:g} SD"),
    ]
    keys = " ".join(_span(name, value, name) for value, name in signs)
    return f"<div style='max-width:60em;{PAPER}'>{keys} &nbsp; solid line: above, dotted: below</div>"


def marked(before: str, tokens: Sequence[str], differs: Sequence[bool]) -> str:
    """A prompt in italics and what follows it, the tokens that differ marked by colour and underlined."""
    style = "background:#ffe08a;color:#000;text-decoration:underline;text-underline-offset:2px"
    parts = [
        f"<mark style='{style}'>{_visible(token)}</mark>" if differ else _visible(token)
        for token, differ in zip(tokens, differs, strict=True)
    ]
    return f"<div style='{TEXT.replace('2.1', '1.6')}'><i>{escape(before)}</i>{''.join(parts)}</div>"


def bars(table: pd.DataFrame, label: str, value: str) -> str:
    """Two columns of a table as a list with bars, orange above 0 and blue (and hatched) below, the number beside."""
    largest = table[value].abs().max() or 1.0
    rows = []
    for name, number in zip(table[label], table[value]):
        width = 12 * abs(number) / largest
        stripes = f"repeating-linear-gradient(45deg,{_rgb(BELOW)},{_rgb(BELOW)} 4px,#fff 4px,#fff 6px)"
        fill = _rgb(ABOVE) if number >= 0 else stripes
        bar = f"<div aria-hidden='true' style='width:{width:.2f}em;height:0.9em;background:{fill}'></div>"
        rows.append(f"<tr>{_cell(escape(str(name)))}{_cell(f'{number:+.2f}', 'right')}{_cell(bar)}</tr>")
    return f"<table style='border-collapse:collapse;width:auto'>{''.join(rows)}</table>"


def columns(parts: Sequence[tuple[str, str]]) -> str:
    """Headed parts beside each other, below each other where the page is narrow."""
    cells = [f"<div style='flex:1 1 20em;min-width:0'><b>{escape(head)}</b>{body}</div>" for head, body in parts]
    return f"<div style='display:flex;flex-wrap:wrap;gap:1.5em'>{''.join(cells)}</div>"


def folded(summary: str, body: str) -> str:
    """A part that opens on a click, or with Enter on its summary."""
    return f"<details style='margin:4px 0'><summary>{escape(summary)}</summary>{body}</details>"


def numbers(table: pd.DataFrame, precision: int = 2) -> str:
    """A table to read, as `plots.readable` makes it."""
    looks = [{"selector": "td, th", "props": "padding: 2px 8px"}, {"selector": "th", "props": "white-space: nowrap"}]
    return plots.readable(table, precision).set_table_styles(looks).to_html()


def picture(figure: Figure, alt: str) -> str:
    """The figure as a picture inside the page; closes the figure."""
    source = b64encode(plots.picture(figure)).decode()
    plt.close(figure)
    return f"<img alt='{escape(alt)}' style='max-width:100%' src='data:image/png;base64,{source}'>"


def _span(token: str, value: float, title: str) -> str:
    share = min(abs(value) / FULL, 1.0)
    colour = tuple(round(255 + share * (end - 255)) for end in (ABOVE if value >= 0 else BELOW))
    line = "" if abs(value) < LINED else f";border-bottom:3px {'solid' if value > 0 else 'dotted'} #000"
    dark = 0.2126 * _linear(colour[0]) + 0.7152 * _linear(colour[1]) + 0.0722 * _linear(colour[2]) < 0.179
    look = f"background:{_rgb(colour)};color:{'#fff' if dark else '#000'};padding:2px 1px{line}"
    return f"<span title='{escape(title)}' style='{look}'>{_visible(token)}</span>"


def _linear(channel: int) -> float:
    """A channel of sRGB as linear light (WCAG 2): what contrast is counted in."""
    share = channel / 255
    return share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4


def _visible(token: str) -> str:
    """A token that can be seen: line breaks have a sign, and so has a token that is a part of a character."""
    return escape(token).replace("\n", "⏎\n") or "·"


def _cell(body: str, align: str = "left") -> str:
    return f"<td style='padding:1px 8px 1px 0;text-align:{align}'>{body}</td>"


def _rgb(colour: tuple[int, ...]) -> str:
    return f"rgb({','.join(map(str, colour))})"
