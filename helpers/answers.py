"""What the calls of the playground come back as: small objects with a table, and HTML for a page."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from helpers import markup
from helpers.activations import Position
from helpers.geometry_plots import emotion_map

MINE = "my direction"


@dataclass(frozen=True)
class Reading:
    """What every token of a text reads as, in SDs of neutral tokens at its place; at one depth, one or two emotions."""

    tokens: list[str]
    names: list[str]
    scores: Float[Tensor, "token emotion depth"]
    depth: int
    emotions: list[str]

    def at(self, depth: int, emotions: Sequence[str]) -> "Reading":
        """The same text at another depth, for other emotions; nothing is computed anew."""
        if not 0 <= depth < self.scores.shape[-1]:
            raise ValueError(f"depth {depth} is out of range: choose 0 to {self.scores.shape[-1] - 1}")
        return replace(self, depth=depth, emotions=chosen(emotions, self.names))

    @property
    def table(self) -> pd.DataFrame:
        """One row per token: pos, token, and a column for every emotion shown."""
        here = {name: self.scores[:, self.names.index(name), self.depth].tolist() for name in self.emotions}
        return pd.DataFrame({"pos": range(1, len(self.tokens) + 1), "token": self.tokens, **here})

    @property
    def strongest(self) -> pd.DataFrame:
        """Every emotion's mean over the tokens, highest first: emotion, mean (SD)."""
        mean = self.scores[..., self.depth].mean(0).tolist()
        table = pd.DataFrame({"emotion": self.names, "mean (SD)": mean})
        return table.sort_values("mean (SD)", ascending=False, ignore_index=True, kind="stable")

    def __repr__(self) -> str:
        first = self.strongest.iloc[0]
        return f"{len(self.tokens)} tokens at depth {self.depth}; most: {first.iloc[0]}, {first.iloc[1]:+.2f} SD"

    def _repr_html_(self) -> str:
        texts = [
            f"<b>{name}</b>{markup.shaded(self.tokens, self.table[name].tolist(), name)}" for name in self.emotions
        ]
        return markup.page(
            f"At depth {self.depth}, in standard deviations (SD) of neutral tokens at the same place of a text:",
            *texts,
            markup.legend(),
            "<b>strongest over the whole text</b>, mean of its tokens",
            markup.bars(self.strongest.head(6), "emotion", "mean (SD)"),
            markup.folded("the numbers, token by token", markup.numbers(self.table)),
        )


@dataclass(frozen=True)
class OwnDirection:
    """A direction from pairs of one's own, at every depth, and what it is worth at one of them.

    `table` has the AUROC of the direction and of what it is compared with (condition, kind, statistic, value, low,
    high); `near` the cosine with every emotion; `places` the map of `geometry.placed`.
    """

    vectors: Float[Tensor, "depth d_model"]
    depth: int
    position: Position
    text: str
    pairs: int
    table: pd.DataFrame
    near: pd.DataFrame
    places: pd.DataFrame

    def __repr__(self) -> str:
        held_out = self.table.iloc[0]
        interval = f"{held_out['value']:.2f} [{held_out['low']:.2f}, {held_out['high']:.2f}]"
        return f"direction of {self.pairs} pairs at depth {self.depth}, {self.position}; held-out AUROC {interval}"

    def _repr_html_(self) -> str:
        names = {"condition": "direction and pairs", "value": "AUROC", "low": "low", "high": "high"}
        check = markup.page(
            markup.numbers(self.table[list(names)].rename(columns=names)),
            "Held out: the shipped validation pairs, which the direction has not seen. The test pairs are left alone: "
            "whoever tries many directions on them uses them up. Chance is 0.5; random directions show how far from "
            "it luck goes. Low and high: 95 % intervals.",
            "<b>nearest emotions, by cosine</b>",
            markup.bars(self.near.head(5), "emotion", "cosine"),
        )
        where = markup.picture(emotion_map(self.places.assign(panel=MINE)), "map of the emotions, a star at your own")
        head = f"{self.pairs} pairs at depth {self.depth}, {self.position}. Panel c knows it as “{MINE}”."
        return markup.page(head, markup.columns([("does it read other pairs?", check), ("where does it lie?", where)]))


@dataclass(frozen=True)
class Continuations:
    """What a model writes after a prompt without and with steering: token ids, and the same as pieces of text."""

    prompt: str
    ids: dict[str, list[int]]
    pieces: dict[str, list[str]]
    how: str
    strength: float
    dose: float

    @property
    def table(self) -> pd.DataFrame:
        """Columns run, text, tokens, differ (how many of them are marked)."""
        rows = [
            (run, "".join(pieces), len(pieces), sum(marks))
            for (run, pieces), marks in zip(self.pieces.items(), differing(*self.ids.values()))
        ]
        return pd.DataFrame(rows, columns=["run", "text", "tokens", "differ"])

    @property
    def same(self) -> bool:
        return self.ids["steered"] == self.ids["unsteered"]

    def __repr__(self) -> str:
        return "\n".join(f"{run}: {self.prompt}{''.join(pieces)}" for run, pieces in self.pieces.items())

    def _repr_html_(self) -> str:
        marks = differing(*self.ids.values())
        parts = [
            (run, markup.marked(self.prompt, pieces or ["(the end of the text at once)"], here if pieces else [False]))
            for (run, pieces), here in zip(self.pieces.items(), marks)
        ]
        why = "a strength of 0 adds nothing" if self.strength == 0 else "the steering did not change a choice"
        said = [f"<b>The two texts are the same, token by token: {why}.</b>"] if self.same else []
        dose = f"Dose on neutral text: {self.dose:.3f} nats of KL divergence per token."
        return markup.page(markup.columns(parts), *said, f"{self.how} {dose}")


@dataclass(frozen=True)
class Firing:
    """The strongest features of an SAE at every token of a text: pos, token, rank, feature, activation."""

    tokens: list[str]
    table: pd.DataFrame
    depth: int

    def __repr__(self) -> str:
        return f"features at {len(self.tokens)} tokens, depth {self.depth}"

    def _repr_html_(self) -> str:
        cells = self.table.assign(text=[f"{row.feature} ({row.activation:.1f})" for row in self.table.itertuples()])
        wide = cells.pivot(index="pos", columns="rank", values="text").reindex(range(1, len(self.tokens) + 1))
        wide = wide.fillna("").rename(columns=lambda rank: f"feature {rank}")
        wide.insert(0, "token", self.tokens)
        return markup.page(f"Features (activation) at depth {self.depth}", markup.numbers(wide))


@dataclass(frozen=True)
class Passages:
    """The passages in which a feature fires most: rank, passage, pos, activation; and a page to look at."""

    feature: int
    table: pd.DataFrame
    html: str

    def __repr__(self) -> str:
        return f"feature {self.feature} in {len(self.table)} passages"

    def _repr_html_(self) -> str:
        return self.html


def differing(one: Sequence[int], other: Sequence[int]) -> tuple[list[bool], list[bool]]:
    """Which tokens of either text are not matched in the other one.

    Up to the first difference tokens are compared place by place, behind it by what both texts share in order.
    """
    same = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    matcher = difflib.SequenceMatcher(None, one[same:], other[same:], autojunk=False)
    marks = [False] * same + [True] * (len(one) - same), [False] * same + [True] * (len(other) - same)
    for start, other_start, size in matcher.get_matching_blocks():
        for side, begins in zip(marks, (start, other_start)):
            side[same + begins : same + begins + size] = [False] * size
    return marks


def chosen(emotions: Sequence[str], there: Sequence[str]) -> list[str]:
    """The names as a list, when all are there; LookupError with the nearest one otherwise."""
    wanted = [emotions] if isinstance(emotions, str) else list(emotions)
    if not wanted:
        raise LookupError(f"no emotion is named: choose from {', '.join(there)}")
    for name in wanted:
        if name not in there:
            nearest = "".join(f" Did you mean {near!r}?" for near in difflib.get_close_matches(name, there, 1))
            raise LookupError(f"unknown name {name!r}.{nearest} There are: {', '.join(there)}")
    return wanted
