"""The four panels of the playground: controls in, a plain call of the Playground out (see `widgets.Panel`)."""

from typing import Any

import ipywidgets

from helpers import saes, widgets
from helpers.activations import POSITIONS
from helpers.answers import MINE, Firing, Reading
from helpers.emotions import names
from helpers.playground import FEAR, SEPARATOR, Playground
from helpers.widgets import Call, Panel

TEXT = "She ran through the dark wood, and something ran behind her. Then the door opened and her mother smiled."
PROMPT, ALONE = "She opened the letter, and", "(none)"
PAIRS = f"""\
The ice cracked under his boots. {SEPARATOR} The ice held under his boots.
Someone was breathing on the other side of the door. {SEPARATOR} Someone was singing on the other side of the door.
The rope slipped, and she began to fall. {SEPARATOR} The rope held, and she began to climb.
The dog bared its teeth and came at the child. {SEPARATOR} The dog wagged its tail and came to the child."""
BUTTONS = 40  # tokens that get buttons; the table of the plain call has all


def reading(play: Playground) -> Panel:
    """a: what every token of a text reads as; depth and emotions redraw without a press."""

    def asked(text: str, depth: int, emotion: str, beside: str) -> Call:
        return Call(play, "read", (text,), {"depth": depth, "emotions": _both(emotion, beside)})

    def redraw(found: Reading, text: str, depth: int, emotion: str, beside: str) -> tuple[Reading, dict[str, Any]]:
        options = {"depth": depth, "emotions": _both(emotion, beside)}
        return found.at(**options), options

    return Panel(
        "Read",
        asked,
        redraws=("depth", "emotion", "beside"),
        redraw=redraw,
        together=[["emotion", "beside", "depth"]],
        text=widgets.lines(TEXT, "text", "the text to read", 3),
        emotion=widgets.choice(names(), "afraid", "emotion", "the emotion that shades the text"),
        beside=widgets.choice([ALONE, *names()], "calm", "and", "a second emotion, shaded below the first"),
        depth=_depth(play, "where in the model to read; moving it redraws at once"),
    )


def own_pairs(play: Playground) -> Panel:
    """b: a direction from one's own pairs, and whether it reads other people's."""

    def asked(pairs: str, position: str, depth: int) -> Call:
        return Call(play, "direction", (pairs,), {"depth": depth, "position": position})

    return Panel(
        "Find direction",
        asked,
        together=[["position", "depth"]],
        pairs=widgets.lines(PAIRS, "pairs", f"one pair per line: emotional text {SEPARATOR} neutral text", 6),
        position=widgets.choice(POSITIONS, play.position, "read at", "the token at which both texts are read"),
        depth=_depth(play, "where in the model the direction lies"),
    )


def steering(play: Playground) -> Panel:
    """c: what the model writes with a direction added, beside what it writes without."""

    def asked(
        prompt: str, direction: str, depth: int, strength: float, which: str, n_tokens: int, way: str, seed: int
    ) -> Call:
        options = {"direction": direction, "depth": depth, "strength": round(strength, 4), "which": which}
        options |= {"n_tokens": n_tokens, "seed": None if way == "greedy" else seed}
        return Call(play, "steer", (prompt,), options, first=_own(play) if direction == MINE else None)

    directions = [("fear (the shipped pairs)", FEAR), (f"{MINE} (panel b)", MINE), *((name, name) for name in names())]
    return Panel(
        "Continue",
        asked,
        together=[["direction", "depth", "strength"], ["which", "n_tokens", "way", "seed"]],
        prompt=widgets.line(PROMPT, "prompt", "the beginning that the model continues; Enter continues it"),
        direction=widgets.choice(directions, "afraid", "direction", "what is added to the residual stream"),
        depth=_depth(play, "where in the model it is added"),
        strength=widgets.steps(0.3, -1, 1, 0.05, "strength", "in median residual norms of neutral text"),
        which=widgets.choice(["both", "prompt", "generated"], "both", "steer tokens", "the tokens it is added to"),
        n_tokens=widgets.whole(40, 1, 200, "new tokens", "how many tokens to write"),
        way=widgets.choice(["greedy", "sampled"], "greedy", "text", "the likeliest token, or one drawn with the seed"),
        seed=widgets.whole(0, 0, 10**9, "seed", "of sampled text, the same noise on both sides"),
    )


def features(play: Playground) -> Panel:
    """d: the strongest SAE features of every token, each a button that shows its passages."""
    narrow, small = ipywidgets.Layout(width="8.5em"), ipywidgets.Layout(width="8em")
    passages = ipywidgets.HTML("Press a feature to see the passages in which it fires most.")
    passages.layout = ipywidgets.Layout(flex="1 1 24em", min_width="0")
    buttons: list[ipywidgets.Button] = []

    def asked(text: str, depth: int, top: int) -> Call:
        return Call(play, "features", (text,), {"depth": depth, "top": top})

    def shown(found: Firing) -> ipywidgets.HBox:
        buttons.clear()
        passages.value = "Press a feature to see the passages in which it fires most."
        rows = [_row(found, pos) for pos in range(1, min(len(found.tokens), BUTTONS) + 1)]
        if len(found.tokens) > BUTTONS:
            rows.append(ipywidgets.HTML(f"Only the first {BUTTONS} of {len(found.tokens)} tokens have buttons."))
        left = ipywidgets.VBox(rows, layout=ipywidgets.Layout(max_height="30em", overflow="auto", flex="0 0 auto"))
        return ipywidgets.HBox([left, passages], layout=ipywidgets.Layout(flex_flow="row wrap"))

    def _row(found: Firing, pos: int) -> ipywidgets.HBox:
        token = found.tokens[pos - 1]
        parts: list[ipywidgets.Widget] = [ipywidgets.Label(token.strip() or "␣", layout=small)]
        for row in found.table[found.table["pos"] == pos].itertuples():
            told = f"feature {row.feature}, activation {row.activation:.1f} at {token.strip()!r}: show its passages"
            button = ipywidgets.Button(description=f"{row.feature} · {row.activation:.1f}", tooltip=told, layout=narrow)
            button.on_click(lambda pressed, feature=row.feature: look(pressed, feature, found.depth))
            buttons.append(button)
            parts.append(button)
        return ipywidgets.HBox(parts)

    def look(pressed: ipywidgets.Button, feature: int, depth: int) -> None:
        for button in buttons:
            button.button_style = "info" if button is pressed else ""
        call = Call(play, "passages", (int(feature),), {"depth": depth})
        panel.run(lambda: call, drawn)

    def drawn(call: Call, found: Any) -> None:
        passages.value = found._repr_html_()
        panel.show_code(call)

    panel = Panel(
        "Find features",
        asked,
        shown=shown,
        together=[["depth", "top"]],
        text=widgets.line(TEXT.partition(".")[0] + ".", "text", "a sentence; Enter finds its features"),
        depth=_depth(play, "the depth whose SAE reads"),
        top=widgets.whole(3, 1, 8, "per token", "how many features of every token"),
    )
    try:
        saes.release(play.model)
    except saes.NoSAEs as reason:
        panel.said.value = widgets.sentence_of(reason)
    return panel


def _depth(play: Playground, tooltip: str) -> ipywidgets.Widget:
    return widgets.steps(play.depth, 0, play.model.cfg.n_layers, 1, "depth", tooltip)


def _both(emotion: str, beside: str) -> list[str]:
    return [emotion] if beside in (ALONE, emotion) else [emotion, beside]


def _own(play: Playground) -> Call | None:
    """The call that found one's own direction, if it was found."""
    found = play.kept.get(MINE)
    return found and Call(play, "direction", (found.text,), {"depth": found.depth, "position": found.position})
