"""What the playground computes: calls that take what a person typed and come back as something to look at.

`opened(model)` makes a Playground; every panel of the playground notebook makes one of its calls and shows it as code.
What takes long is computed when it is first needed, and kept. What comes back is in `answers`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers import markup, readouts, recordings
from helpers.activations import POSITIONS, Position, every_token, pair_residuals, residual_norms, site
from helpers.answers import MINE, Continuations, Firing, OwnDirection, Passages, Reading, chosen
from helpers.config import CFG, FIGURES
from helpers.continuations import generated, prompt_ids
from helpers.directions import mean_difference, mean_gap, random_directions
from helpers.doses import Meter
from helpers.emotions import names, norms
from helpers.feature_plots import passages as drawn_passages
from helpers.features import TOKENS_AT_ONCE, OnPassages, encoded, token_activations
from helpers.files import csv_rows
from helpers.geometry import away, neighbours, placed
from helpers.prompts import SIDES, check_whole, checked_pairs, neutral_texts, pairs, passages, pieces, tokens
from helpers.saes import checked_features, dashboard, load_sae, sae_folder
from helpers.separation import along, null_summary, random_scores, summary
from helpers.stats import auroc
from helpers.steering import Add, Steer, Steered

FEAR = "fear"
SEPARATOR = "|"
READ_AT: Position = "mean"  # where the emotions' situations are read: any token of a text may be compared with a mean
PASSAGES = 60  # in which a feature is looked for: a click should be answered soon
BACKGROUND_TOKENS = 256  # of each neutral conversation: a longer text of one's own is read against the last of them
DOSED_ON = 4  # every fourth neutral text gives the dose


@dataclass(frozen=True)
class Playground:
    """A model with what the panels share; see `opened`. `kept` holds what was computed since."""

    model: TransformerBridge
    depth: int
    position: Position
    chosen_by: str
    norm: Float[Tensor, "depth"]
    background: readouts.Background
    kept: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Playground of {self.model.cfg.model_name}: depth {self.depth}, {self.position!r} ({self.chosen_by})"

    def references(self, position: Position = READ_AT) -> readouts.References:
        """The 24 emotions' centroids from situations that never name them, read at a position."""
        return self._once(("references", position), lambda: readouts.from_texts(self.model, names(), position))

    def read(self, text: str, depth: int | None = None, emotions: Sequence[str] | None = None) -> Reading:
        """How much further every token of a text lies along emotions than neutral tokens at its place, in their SDs.

        Without `emotions`, the one that is strongest over the text. Raises ValueError for a text that is empty or too
        long, a depth that the model lacks, and an unknown emotion.
        """
        depth, wanted = self._depth(depth), None if emotions is None else chosen(emotions, names())
        ids = self._ids(text)
        states = every_token(self.model, [text])
        at = torch.arange(1, len(states) + 1)
        scores = readouts.beyond_neutral(states, at, self.references(), self.background)
        found = Reading(pieces(self.model, [], ids), names(), scores, depth, names()[:1])
        return found.at(depth, wanted or [found.strongest["emotion"].iloc[0]])

    def direction(self, pairs_text: str, depth: int | None = None, position: Position | None = None) -> OwnDirection:
        """The mean difference of one's own pairs, tried on shipped pairs; `steer` knows it as "my direction" then.

        One pair per line: `emotional text | neutral text`. Raises ValueError naming the line that is none, and when the
        two sides read the same at this depth.
        """
        depth, position = self._depth(depth), self._position(position)
        table = parsed_pairs(pairs_text)
        self._check_texts(table, position)
        mine = pair_residuals(self.model, table, [position])[position]
        gap = mean_gap(*mine)[depth]
        if not gap.any():
            raise ValueError(
                f"at depth {depth} both sides of your pairs read the same at the {position}: choose a deeper one"
            )
        vectors = mean_difference(*mine)
        compared = self._compared(mine[:, :, depth], vectors[depth], depth, position)
        centroids = self.references(position).centroids[:, depth]
        vectors_of_emotions = away(centroids, centroids.mean(0))
        near = neighbours(vectors_of_emotions, gap, names())
        places = placed(vectors_of_emotions, norms(), {MINE: gap})
        self.kept[MINE] = OwnDirection(vectors, depth, position, pairs_text, len(table), compared, near, places)
        return self.kept[MINE]

    def steer(
        self,
        prompt: str,
        direction: str = FEAR,
        depth: int | None = None,
        strength: float = 0.2,
        which: Steered = "both",
        n_tokens: int = 40,
        seed: int | None = None,
    ) -> Continuations:
        """What the model writes after a prompt, without and with a direction added: greedily, or sampled by a seed.

        `direction` is an emotion, "fear" (the shipped pairs) or "my direction"; `strength` counts in median residual
        norms of neutral text. Both sides use the same noise. Raises ValueError for a prompt that is empty or too long
        for `n_tokens` more, and for what cannot be a strength, a depth, tokens to steer or a seed; LookupError for a
        direction that there is not.
        """
        depth = self._depth(depth)
        if not math.isfinite(strength):
            raise ValueError(f"the strength is {strength}: give a number, 0 for no steering")
        if torch.tensor(strength, dtype=torch.float32).isinf():
            raise ValueError(f"a strength of {strength} overflows: stay nearer to 0")
        if n_tokens < 1:
            raise ValueError(f"cannot write {n_tokens} tokens: ask for at least one")
        if seed is not None and seed < 0:
            raise ValueError(f"the seed is {seed}: give a whole number from 0 on, or None for greedy text")
        ids, strength = self._ids(prompt, n_tokens, "the prompt"), float(strength)
        method = Add(self._vector(direction, depth)[None] * self.norm[depth])
        steer = Steer(method, (depth,), torch.zeros(2, dtype=torch.long), torch.tensor([0.0, strength]), which)
        found = generated(self.model, [prompt] * 2, n_tokens, steer, seeds=[seed] * 2)
        dose = self._dose(method, depth, strength)
        runs = dict(zip(("unsteered", "steered"), found))
        told = {run: pieces(self.model, ids, written) for run, written in runs.items()}
        text = "greedy" if seed is None else f"sampled with seed {seed}, the same noise on both sides"
        how = f"{direction}, strength {strength:g} at depth {depth}, steered tokens: {which}; {text}."
        return Continuations(prompt, runs, told, how, strength, dose)

    def features(self, text: str, depth: int | None = None, top: int = 3) -> Firing:
        """The strongest SAE features at every token of a text.

        Raises NoSAEs for a model without any, FileNotFoundError for a depth without one, ValueError for a text that is
        empty or too long and for fewer than one feature.
        """
        depth = self._depth(depth)
        if top < 1:
            raise ValueError(f"cannot show {top} features per token: ask for at least one")
        sae = self._sae(depth)
        words = pieces(self.model, [], self._ids(text))
        table = token_activations(self.model, sae, text)
        table = table[table["activation"] > 0].groupby("pos").head(top).reset_index(drop=True)
        table["token"] = [words[pos - 1] for pos in table["pos"]]
        table.insert(2, "rank", table.groupby("pos").cumcount() + 1)
        return Firing(words, table, depth)

    def passages(self, feature: int, depth: int | None = None, count: int = 5) -> Passages:
        """The shipped passages in which a feature fires most, and how often it fires at all.

        Raises IndexError for a feature that the SAE lacks, and what `features` raises.
        """
        depth = self._depth(depth)
        checked_features([feature], self._sae(depth).cfg.d_sae, depth)
        on = self._once(("passages", depth), lambda: self._encoded_passages(depth))
        here = replace(on, features=[feature], acts=on.acts.index_select(1, torch.tensor([feature])).to_dense())
        often = f"It fires on {here.frequency[feature]:.1%} of the tokens of {len(on.texts)} passages."
        page = dashboard(self.model, depth, feature)
        link = f"<a href='{page}' target='_blank' rel='noopener'>On Neuronpedia</a>" if page else "No Neuronpedia page."
        table = drawn_passages(self.model, here, feature, count).data
        html = f"<div style='{markup.PAPER};overflow-x:auto'>{markup.page(table, f'{often} {link}')}</div>"
        return Passages(feature, here.strongest(feature, count), html)

    def _once(self, key: Any, made: Callable[[], Any]) -> Any:
        if key not in self.kept:
            self.kept[key] = made()
        return self.kept[key]

    def _depth(self, depth: int | None) -> int:
        depth = self.depth if depth is None else depth
        site(self.model, depth)  # refuses what the model lacks
        return depth

    def _position(self, position: Position | None) -> Position:
        position = self.position if position is None else position
        if position not in POSITIONS:
            raise ValueError(f"unknown position {position!r}: choose from {', '.join(POSITIONS)}")
        return position

    def _ids(self, text: str, room: int = 0, what: str = "the text") -> list[int]:
        """The text's tokens without position 0, when they and `room` more fit the model."""
        if not text.strip():
            raise ValueError(f"{what} is empty: type at least one word")
        check_whole(text, what)
        count, most = len(self.model.tokenizer(text, add_special_tokens=False)["input_ids"]), self.model.cfg.n_ctx - 1
        if count + room > most:
            more = f", and {room} are to be written" if room else ""
            raise ValueError(
                f"{what} is {count} tokens long{more}, but {self.model.cfg.model_name} reads at most {most} in all: "
                f"leave out at least {count + room - most}"
            )
        return prompt_ids(self.model, [text])[0][1:]

    def _check_texts(self, table: pd.DataFrame, position: Position) -> None:
        for line, side, text in ((row.pair, side, getattr(row, side)) for row in table.itertuples() for side in SIDES):
            self._ids(text, what=f"the {side} text in {line}")
            if position == "final punctuation" and tokens(self.model, [text]).stop[0] < 0:
                raise ValueError(
                    f"the {side} text in {line} does not end in punctuation, so it has no 'final punctuation': add a "
                    "full stop, or choose another position"
                )

    def _compared(
        self, mine: Float[Tensor, "side pair d_model"], own: Float[Tensor, "d_model"], depth: int, position: Position
    ) -> pd.DataFrame:
        """AUROC on the validation pairs: of one's own direction, the shipped one, random ones; and in-sample."""
        train, valid = (self._shipped(split, position)[:, :, depth : depth + 1] for split in ("train", "validation"))
        seeded = torch.Generator().manual_seed
        drawn = random_directions(train.flatten(0, 1), CFG.random_directions, seeded(CFG.seed))
        name = "random, covariance-matched"
        ours = along(own, valid[:, :, 0], seeded(CFG.seed))
        theirs = along(self._fear(position)[depth], valid[:, :, 0], seeded(CFG.seed))
        of_random = random_scores(drawn[name], mine[:, :, None], valid)
        in_sample = auroc(*(mine @ own)).item()
        rows = [
            (f"{MINE}, held out", "result", *_auroc(summary(ours))),
            ("direction of the shipped train pairs, held out", "control", *_auroc(summary(theirs))),
            (
                f"{len(drawn[name])} random directions, held out (median, 95 %)",
                "control",
                *_auroc(null_summary(of_random)),
            ),
            (f"{MINE} on the pairs that made it (says little)", "control", in_sample, math.nan, math.nan),
        ]
        return pd.DataFrame(rows, columns=["condition", "kind", "value", "low", "high"]).assign(statistic="AUROC")

    def _shipped(self, split: str, position: Position) -> Float[Tensor, "side pair depth d_model"]:
        table = pairs("fear_calm", split)
        made = self._once(("pairs", split, position), lambda: pair_residuals(self.model, table, [position]))
        return made[position]

    def _fear(self, position: Position) -> Float[Tensor, "depth d_model"]:
        return mean_difference(*self._shipped("train", position))

    def _vector(self, direction: str, depth: int) -> Float[Tensor, "d_model"]:
        """The unit vector that a name stands for, at a depth."""
        if direction == MINE:
            if MINE not in self.kept:
                raise LookupError(f"there is no {MINE!r} yet: find one in panel b, or call play.direction(...) first")
            found = self.kept[MINE].vectors[depth]
        elif direction == FEAR:
            found = self._fear(self.position)[depth]
        else:
            (name,) = chosen([direction], [*names(), FEAR, MINE])
            found = self.references().axes[names().index(name), depth]
        if not found.any():
            raise LookupError(f"{direction!r} has no direction at depth {depth}: its texts read the same there")
        return found

    def _dose(self, method: Add, depth: int, strength: float) -> float:
        meter = self._once("meter", lambda: Meter.on(self.model, neutral_texts()[::DOSED_ON]))
        return meter.effects(depth, method, torch.zeros(1, dtype=torch.long), torch.tensor([strength]))[0].item()

    def _sae(self, depth: int):
        sae_folder(self.model, depth)  # says what is missing before anything is loaded
        return self._once(("sae", depth), lambda: load_sae(self.model, depth))

    def _encoded_passages(self, depth: int) -> OnPassages:
        """All features on the shipped passages, as a sparse matrix: any of them can be looked up at once."""
        texts = [text for text in passages()[:PASSAGES] if self._fits(text)]
        if not texts:
            raise ValueError(f"none of the shipped passages fits the context of {self.model.cfg.model_name}")
        acts = every_token(self.model, texts, [depth])[:, 0]
        sparse = torch.cat([encoded(self._sae(depth), part).to_sparse() for part in acts.split(TOKENS_AT_ONCE)])
        frequency = torch.bincount(sparse.coalesce().indices()[1], minlength=sparse.shape[1]) / len(acts)
        first = [0, *(tokens(self.model, texts).length - 1).cumsum(0).tolist()]
        return OnPassages(texts, [], frequency, sparse, first)

    def _fits(self, text: str) -> bool:
        return len(self.model.tokenizer(text, add_special_tokens=False)["input_ids"]) < self.model.cfg.n_ctx


def opened(model: TransformerBridge) -> Playground:
    """A Playground of the model: the depth and position that notebook 01 chose, and neutral talk, recorded.

    Where notebook 01 has not run on this model: half of the depth, and the last token. Raises ValueError for a file
    of that choice that cannot be read.
    """
    last, name = model.cfg.n_layers, model.cfg.model_name
    depth, position, chosen_by = round(last / 2), "last token", "half of the depth; notebook 01 has chosen none here"
    path = FIGURES / name / "01_choices.csv"
    if path.is_file():
        row = csv_rows(path, ("depth", "position"), ["depth"]).iloc[0]
        if row.get("model", name) == name and row["depth"] in range(last + 1) and row["position"] in POSITIONS:
            depth, position, chosen_by = int(row["depth"]), row["position"], "chosen by notebook 01"
        else:
            chosen_by = f"half of the depth; what {path.name} has chosen is not for this model"
    background = recordings.background(recordings.neutral_talk(model, BACKGROUND_TOKENS), "token")
    return Playground(model, depth, position, chosen_by, residual_norms(model, neutral_texts()), background)


def parsed_pairs(text: str) -> pd.DataFrame:
    """A table of pairs from lines `emotional text | neutral text`; empty lines are left out.

    Raises ValueError naming the line that has no separator, more than one, an empty side or the same text twice, and
    for fewer than two pairs.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.split(SEPARATOR)]
        if len(parts) != 2:
            raise ValueError(
                f"line {number} has {len(parts) - 1} separators, not one: write `emotional text {SEPARATOR} neutral "
                f"text` ({line.strip()[:60]!r})"
            )
        if not all(parts):
            raise ValueError(f"line {number} has nothing on one side of {SEPARATOR!r} ({line.strip()[:60]!r})")
        if parts[0] == parts[1]:
            raise ValueError(f"line {number} has the same text on both sides ({parts[0][:60]!r}): one must differ")
        rows.append((f"line {number}", "mine", f"line {number}", *parts))
    if len(rows) < 2:
        raise ValueError(f"a direction needs at least two pairs, one per line; got {len(rows)}")
    return checked_pairs(pd.DataFrame(rows, columns=["pair", "split", "topic", *SIDES]), "your list of pairs")


def _auroc(table: pd.DataFrame) -> tuple[float, float, float]:
    row = table[table["statistic"] == "AUROC"].iloc[0]
    return row["value"], row["low"], row["high"]
