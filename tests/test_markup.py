"""HTML of tokens, bars and pictures: escaped, readable without colour, with the numbers in it."""

import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from helpers import markup

COLOUR = r"rgb\((\d+),(\d+),(\d+)\)"


def test_every_token_is_shown_with_its_number_as_title():
    page = markup.shaded(["She", " ran", "."], [0.5, -1.25, 3.0], "afraid")
    assert re.findall(r"title='([^']*)'[^>]*>([^<]*)<", page) == [
        ("afraid: +0.50 SD", "She"),
        ("afraid: -1.25 SD", " ran"),
        ("afraid: +3.00 SD", "."),
    ]


def test_more_is_more_orange_and_less_more_blue_up_to_the_full_colour():
    page = markup.shaded(list("abcde"), [3.0, 9.0, 0.0, -3.0, 1.5], "x")
    full, beyond, none, below, half = [tuple(map(int, found)) for found in re.findall(COLOUR, page)]
    assert full == beyond == markup.ABOVE
    assert none == (255, 255, 255)
    assert below == markup.BELOW
    assert all(min(a, b) < c < max(a, b) for a, b, c in zip(full, none, half) if a != b)


@pytest.mark.parametrize(("value", "line"), [(0.99, None), (1.0, "solid"), (-0.99, None), (-1.0, "dotted")])
def test_a_line_says_which_side_a_token_is_on(value: float, line: str | None):
    page = markup.shaded(["a"], [value], "x")
    assert re.findall(r"border-bottom:3px (\w+)", page) == ([line] if line else [])


@pytest.mark.parametrize("value", [-3.0, -2.4, -1.8, -1.2, -0.6, 0.0, 0.6, 1.2, 1.8, 2.4, 3.0])
def test_text_stands_out_from_its_shade(value: float):
    """Contrast of at least 4.5 to 1, as WCAG 2 asks."""
    page = markup.shaded(["a"], [value], "x")
    red, green, blue = map(int, re.search(r"<span[^>]*background:" + COLOUR, page).groups())
    shade = 0.2126 * _light(red) + 0.7152 * _light(green) + 0.0722 * _light(blue)
    text = 1.0 if "color:#fff;" in page.split("<span")[1] else 0.0
    assert (max(shade, text) + 0.05) / (min(shade, text) + 0.05) >= 4.5


def test_what_was_typed_is_escaped_everywhere():
    nasty = "<b onclick='x'>&"
    table = pd.DataFrame({"name": [nasty], "value": [1.0]})
    pages = [
        markup.shaded([nasty], [0.0], nasty),
        markup.marked(nasty, [nasty], [True]),
        markup.bars(table, "name", "value"),
        markup.columns([(nasty, "")]),
        markup.folded(nasty, ""),
        markup.numbers(table),
    ]
    assert [page for page in pages if "<b onclick" in page] == []
    assert all("&lt;b onclick" in page for page in pages)


def test_only_tokens_that_differ_are_marked():
    page = markup.marked("It was", [" a", " dog", "."], [False, True, False])
    assert re.findall(r"<mark[^>]*>([^<]*)</mark>", page) == [" dog"]
    assert re.sub(r"<[^>]*>", "", page) == "It was a dog."


def test_tokens_that_cannot_be_seen_have_a_sign():
    page = markup.shaded(["\n", "", "a"], [0.0, 0.0, 0.0], "x")
    assert re.findall(r">([^<]+)</span>", page) == ["⏎\n", "·", "a"]


def test_bars_are_as_long_as_their_numbers():
    table = pd.DataFrame({"emotion": ["a", "b", "c"], "value": [2.0, 1.0, -2.0]})
    page = markup.bars(table, "emotion", "value")
    widths = [float(width) for width in re.findall(r"width:([\d.]+)em;height", page)]
    assert widths[0] == pytest.approx(2 * widths[1])
    assert widths[2] == widths[0]
    assert page.count("repeating-linear-gradient") == 1
    assert re.findall(r">([+-]\d\.\d\d)<", page) == ["+2.00", "+1.00", "-2.00"]


def test_bars_of_nothing_but_zeros_have_no_length():
    page = markup.bars(pd.DataFrame({"a": ["x"], "b": [0.0]}), "a", "b")
    assert "width:0.00em" in page


def test_a_picture_says_what_it_shows_and_leaves_no_figure_open():
    before = plt.get_fignums()
    figure, ax = plt.subplots(figsize=(20, 1))
    ax.plot([1, 2])
    page = markup.picture(figure, "a line")
    assert page.startswith("<img alt='a line' ")
    assert "src='data:image/png;base64,iVBOR" in page
    assert plt.get_fignums() == before


def _light(channel: int) -> float:
    return channel / 255 / 12.92 if channel <= 10 else ((channel / 255 + 0.055) / 1.055) ** 2.4
