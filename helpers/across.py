"""What is measured on every model of a comparison, one long table each, and how much the models differ.

`comprehension`, `comprehension_once`, `generation`, `steering` and `steering_halfway` are measurements for
`workers.spread`. Draw 0 is the data as they are, later draws are bootstrap samples of topics, the same for all models,
so that models can be compared draw by draw.
Models of different height meet at relative depth: 0 is the embeddings, 1 what leaves the last block.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import mannwhitneyu
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers import emotions, geometry, regimes
from helpers.activations import POSITIONS, residual_norms
from helpers.claims import siblings
from helpers.config import CFG
from helpers.decoding import Design, bootstrapped, curve, line, one_against_rest, read_by
from helpers.directions import covariance_matched, unit
from helpers.doses import Meter
from helpers.extraction import comprehended, told, while_writing
from helpers.findings import SPLITS
from helpers.geometry import AllDepths
from helpers.models import DEFAULT, slug
from helpers.prompts import beginnings, neutral_texts
from helpers.stats import interval, pearson, permutation_p
from helpers.steering import Add
from helpers.sweeps import Writing, sweep

DRAWS = 500  # bootstrap samples of topics
HALVES = 20  # random halves of the topics, for geometries that share no text
STEERED, RANDOM = ("afraid", "happy"), 2  # emotions that steer, random directions beside them
DOSES = (0.1, 0.3, 1.0, 3.0)  # nats per token of neutral text
LENGTH = {"story": 48, "steered": 30}  # tokens

GIVEN: WeakKeyDictionary = WeakKeyDictionary()  # the situations as a model reads them, for all its measurements


@dataclass(frozen=True)
class Comparison:
    """Models that are compared, one that is shown beside them, and the name that figures and tables carry."""

    name: str
    models: tuple[str, ...]
    beside: tuple[str, ...]  # one, or none
    sources: Mapping[str, str]  # what `load_model` takes for each of them

    def __str__(self) -> str:
        return f"Model: {self.name} (compared: {', '.join(self.models)})"

    @property
    def made_by(self) -> str:
        """What figures of all of them are marked with."""
        return ", ".join(self.everyone)

    @property
    def everyone(self) -> tuple[str, ...]:
        return self.models + self.beside


def comparison(environ: Mapping[str, str] = os.environ) -> Comparison:
    """The models that MODELS names, separated by spaces; without it the siblings, and MODEL beside them.

    Raises ValueError or FileNotFoundError for a name that `models.source` does not know, and ValueError for two models
    that would go by the same name, before anything is loaded.
    """
    if asked := tuple(dict.fromkeys(environ.get("MODELS", "").split())):
        names = tuple(slug(each) for each in asked)
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"MODELS names {twice[0]!r} twice: {', '.join(asked)}")
        return Comparison("+".join(names), names, (), dict(zip(names, asked)))
    models, beside = tuple(siblings()), environ.get("MODEL") or DEFAULT
    aside = () if beside in models else (slug(beside),)
    return Comparison(slug(beside), models, aside, dict.fromkeys(aside, beside) | dict(zip(models, models)))


def comprehension(model: TransformerBridge, depths: Sequence[int], draws: int = DRAWS) -> pd.DataFrame:
    """How vectors of given situations read the situations of other topics, by position and depth.

    Statistics: "AUROC" of every draw; "AUROC, validation" and, by emotion, "AUROC of one" of the data as they are;
    "cosine", the published measure (mean pairwise cosine of the vectors minus neutral), of every draw; "geometry", the
    cosines of all pairs of vectors in both halves of the topics, HALVES times, at the position and depth that
    validation prefers. Columns statistic, position, depth, draw, unit, value.
    """
    given = {split: _given(model, split) for split in SPLITS}
    train, test = (given[split]["mean"] for split in ("train", "test"))
    design = bootstrapped(len(train), len(test), len(emotions.names()), _seeded(), draws)
    neutral = comprehended(model, emotions.neutral_situations())
    tables = []
    for position in POSITIONS:
        texts = {split: given[split][position] for split in SPLITS}
        tables += _read(texts["train"], texts, design, position, depths)
        everything = torch.cat(list(texts.values()))[:, :, list(depths)]
        every = geometry.resampled(len(everything), everything.shape[1], _seeded(), draws)
        every = torch.cat([geometry.own(*everything.shape[:2]), every])
        found = geometry.cosine_curves(everything, neutral[position][:, list(depths)], every)["minus neutral"]
        tables.append(_rows(found, "cosine", position, depths))
    table = pd.concat(tables, ignore_index=True)
    best = table[table["statistic"] == "AUROC, validation"].nlargest(1, "value").iloc[0]
    position, depth = best["position"], int(best["depth"])
    everything = torch.cat([given[split][position][:, :, [depth]] for split in SPLITS])
    return pd.concat([table, _halves(everything, position, depth)], ignore_index=True)


def comprehension_once(model: TransformerBridge, depths: Sequence[int]) -> pd.DataFrame:
    """`comprehension` of the data as they are: what is asked of an untrained twin."""
    return comprehension(model, depths, draws=0)


def generation(model: TransformerBridge, depths: Sequence[int]) -> pd.DataFrame:
    """The same as `comprehension` for vectors of stories that the model writes itself, read while it writes them.

    Statistics "AUROC", "AUROC, validation" and "AUROC of one"; the position names where the stories and where the
    situations are read, e.g. "midpoint, last token", as published.
    """
    openings, given = emotions.openings(), {split: _given(model, split) for split in ("validation", "test")}
    stories = told(model, openings["text"].tolist(), LENGTH["story"], openings["seed"].tolist())
    written = while_writing(model, stories, skip=(LENGTH["story"] // 6,))
    tables = []
    for name in ("midpoint", f"mean from {LENGTH['story'] // 6}"):
        fitted = emotions.stacked(written[name], openings)
        draws = bootstrapped(len(fitted), len(given["test"]["mean"]), len(emotions.names()), _seeded(), DRAWS)
        for position in ("last token", "mean"):
            texts = {split: found[position] for split, found in given.items()}
            tables += _read(fitted, texts, draws, f"{name}, {position}", depths)
    return pd.concat(tables, ignore_index=True)


def steering(model: TransformerBridge, depths: Sequence[int]) -> pd.DataFrame:
    """What steering at these depths does to texts, at doses that are the same for all models.

    One row per text: depth, method ("emotion" or "random", covariance-matched), draw, dose, prompt, regime, and what
    decides it. A dose that a direction does not reach is left out. Limits of the regimes come from the validation
    prompts.
    """
    acts = _given(model, "train")["mean"]
    norm = residual_norms(model, neutral_texts())
    stories = beginnings("story")
    trials, held_out = (stories[stories["split"] == split] for split in ("validation", "test"))
    nothing = {0: {"nothing": Add(torch.zeros(1, model.cfg.d_model))}}
    samples = Writing(LENGTH["steered"], range(1, 5))
    limit = regimes.limits(sweep(model, trials, nothing, [0], writing=samples))
    meter = Meter.on(model, neutral_texts()[::4])
    methods: dict[int, dict[str, Add]] = {}
    for depth in depths:
        vectors = unit(geometry.centred(acts[:, :, depth].mean(0)))[[emotions.names().index(e) for e in STEERED]]
        drawn = covariance_matched(acts[:, :, [depth]].flatten(0, 1), RANDOM, _seeded())[:, 0]
        methods[depth] = {"emotion": Add(norm[depth] * vectors), "random": Add(norm[depth] * drawn)}
    strengths = meter.equal(methods, DOSES)
    runs = sweep(model, held_out, methods, strengths, writing=Writing(LENGTH["steered"], [1]))
    runs = regimes.with_regimes(runs, limit)
    runs = runs[runs["method"] != "none"].drop(columns="text").reset_index(drop=True)
    return runs.astype({"depth": int})


def steering_halfway(model: TransformerBridge, depths: Sequence[int]) -> pd.DataFrame:
    """`steering` at the middle one of these depths, the lower of two."""
    return steering(model, [depths[(len(depths) - 1) // 2]])


def curves_of(table: pd.DataFrame, statistic: str, position: str) -> dict[str, Float[Tensor, "draw depth"]]:
    """Every model's curves over its own depths, from a table of `workers.spread`."""
    chosen = table[(table["statistic"] == statistic) & (table["position"] == position)]
    if chosen.empty:
        raise ValueError(f"nothing was measured as {statistic!r} at {position!r}")
    return {
        name: torch.tensor(rows.pivot(index="draw", columns="depth", values="value").to_numpy()).float()
        for name, rows in chosen.groupby("model", sort=False)
    }


def over_depth(
    read: pd.DataFrame, twins: pd.DataFrame, statistic: str, position: str
) -> tuple[dict[str, Float[Tensor, "draw depth"]], pd.DataFrame]:
    """A statistic's `curves_of` all models, and the table that `across_plots.curves` draws, twins beside them."""
    own = curves_of(read, statistic, position)
    parts = [curve(drawn).assign(model=name, condition="the model") for name, drawn in own.items()]
    for name, drawn in curves_of(twins, statistic, position).items():
        parts.append(line(drawn[0]).assign(model=name, condition="untrained twin"))
    for part in parts:
        part["relative depth"] = part["depth"] / part["depth"].max()
    return own, pd.concat(parts)


def at_half_depth(table: pd.DataFrame, position: str) -> pd.DataFrame:
    """The rows of every model's AUROC at a position and half of its depth."""
    rows = table[(table["statistic"] == "AUROC") & (table["position"] == position)]
    return rows[rows["depth"] == rows.groupby("model")["depth"].transform("max") // 2]


def at_best(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of every model's AUROC at the position and depth that its validation topics prefer."""
    scores = table[table["statistic"] == "AUROC, validation"]
    best = scores.sort_values("value").drop_duplicates("model", keep="last")[["model", "position", "depth"]]
    return table[table["statistic"] == "AUROC"].merge(best)


def by_emotion(table: pd.DataFrame, position: str) -> dict[str, Float[Tensor, "emotion depth"]]:
    """AUROC of every emotion over relative depth, by model. Rows of "AUROC of one".

    All have as many points, evenly spaced, as the highest of the models has depths; lower ones are linear in between.
    """
    chosen = table[table["position"] == position]
    grid = np.linspace(0, 1, chosen["depth"].max() + 1)
    return {
        name: torch.tensor(
            _at(grid, rows.pivot(index="unit", columns="depth", values="value").loc[emotions.names()].to_numpy())
        ).float()
        for name, rows in chosen.groupby("model", sort=False)
    }


def best_depths(curves: Mapping[str, Float[Tensor, "draw depth"]], highest: bool = True) -> pd.DataFrame:
    """Relative depth of every model's best point, and the largest difference between two: condition, value, low, high.

    Intervals are quantiles over draws; the last row is "largest difference", which noise alone makes larger than 0.
    """
    best = {name: _best(drawn if highest else -drawn) for name, drawn in curves.items()}
    stacked = torch.stack(list(best.values()))
    best["largest difference"] = stacked.amax(0) - stacked.amin(0)
    rows = []
    for name, drawn in best.items():
        low, high = interval(drawn[1:], CFG.confidence)
        rows.append((name, drawn[0].item(), low.item(), high.item()))
    return pd.DataFrame(rows, columns=["condition", "value", "low", "high"])


def interaction(
    curves: Float[Tensor, "model unit depth"], generator: Generator, draws: int = CFG.permutation_draws
) -> tuple[float, float, Float[Tensor, "model depth"]]:
    """Do the models' curves differ in shape? Size of the model x depth interaction, its p, and the deviations.

    Every unit's curve loses its mean over depth, so a model that is better everywhere does not count. The size is the
    root mean square of what is left of the models' mean curves when the mean over models is taken off; p comes from
    dealing out each unit's curves to the models at random (Anderson & ter Braak 2003: permutation of units within
    blocks).
    """
    models, units, _ = curves.shape
    if models < 2 or units < 2:
        raise ValueError(f"an interaction needs at least two models and two units, got {models} and {units}")
    shape = curves - curves.mean(-1, keepdim=True)
    dealt = torch.rand(draws, models, units, generator=generator).argsort(1)

    def deviations(order: Tensor) -> Tensor:
        means = shape.gather(0, order[..., None].expand(-1, -1, shape.shape[-1])).mean(1)
        return means - means.mean(0)

    own = deviations(torch.arange(models)[:, None].expand(-1, units))
    null = torch.stack([deviations(order).pow(2).mean() for order in dealt]).sqrt()
    size = own.pow(2).mean().sqrt()
    return size.item(), permutation_p(size[None], null[:, None])[0].item(), own


def apart(
    curves: Mapping[str, Float[Tensor, "unit depth"]], generator: Generator, draws: int = CFG.permutation_draws
) -> pd.DataFrame:
    """The `interaction` of every two models, largest first: condition, value (its size), p."""
    rows = []
    for one, other in combinations(curves, 2):
        size, p, _ = interaction(torch.stack([curves[one], curves[other]]), generator, draws)
        rows.append((f"{one}, {other}", size, p))
    return pd.DataFrame(rows, columns=["condition", "value", "p"]).sort_values("value", ascending=False)


def ways_compared(comprehension: pd.DataFrame, generation: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    """AUROC by model and way, their difference, and its mean over models; and Mann-Whitney's p over models.

    Tables with the columns model, draw, value: one value per model and draw. Columns condition, statistic, value, low,
    high. p is the two-sided test as published, which takes every model for an independent sample.
    """
    names = comprehension["model"].unique()
    ways = [table.pivot(index="draw", columns="model", values="value")[names] for table in (comprehension, generation)]
    drawn = {"comprehension": ways[0], "generation": ways[1], "generation minus comprehension": ways[1] - ways[0]}
    rows = []
    for statistic, by_model in drawn.items():
        for name, values in {**by_model, "mean of all models": by_model.mean(axis=1)}.items():
            row = curve(torch.tensor(values.to_numpy(), dtype=torch.float32)[:, None]).drop(columns="depth")
            rows.append(row.assign(condition=name, statistic=statistic))
    p = mannwhitneyu(*(way.loc[0].to_numpy() for way in ways)).pvalue
    return pd.concat(rows, ignore_index=True), float(p)


def surgical(steered: pd.DataFrame) -> Float[Tensor, "model prompt dose"]:
    """Share of surgical texts under the vectors of emotions, at the doses that all of these reach in every model."""
    own = steered[steered["method"] == "emotion"].assign(surgical=steered["regime"] == "surgical")
    vectors = own[["model", "draw"]].drop_duplicates()
    reached = own.drop_duplicates(["model", "draw", "dose"])["dose"].value_counts()
    own = own[own["dose"].isin(reached.index[reached == len(vectors)])]
    shares = own.groupby(["model", "prompt", "dose"], sort=False)["surgical"].mean().unstack().unstack("prompt")
    return torch.tensor(shares.to_numpy(float)).float().unflatten(1, (-1, own["prompt"].nunique())).mT


def alike(table: pd.DataFrame) -> pd.DataFrame:
    """Correlation of the emotions' geometries between models, never on the same texts: model, other, r, low, high.

    Each time one half of the topics makes one model's geometry and the other half the other's; the value is the mean
    over halves both ways, the interval their spread. A model with itself is how reliable its geometry is.
    """
    rows = table[table["statistic"] == "geometry"]
    shapes = {
        name: torch.tensor(own.pivot(index="draw", columns="unit", values="value").to_numpy()).unflatten(0, (-1, 2))
        for name, own in rows.groupby("model", sort=False)
    }
    found = []
    for name, one in shapes.items():
        for other_name, other in shapes.items():
            r = (pearson(one[:, 0], other[:, 1]) + pearson(one[:, 1], other[:, 0])) / 2
            low, high = interval(r, CFG.confidence)
            found.append((name, other_name, r.mean().item(), low.item(), high.item()))
    return pd.DataFrame(found, columns=["model", "other", "r", "low", "high"])


def _seeded() -> Generator:
    return torch.Generator().manual_seed(CFG.seed)


def _given(model: TransformerBridge, split: str) -> dict[str, AllDepths]:
    """The situations of a split, read: by position."""
    here = GIVEN.setdefault(model, {})
    if split not in here:
        table = emotions.situations(split)
        found = comprehended(model, table["text"].tolist())
        here[split] = {position: emotions.stacked(acts, table) for position, acts in found.items()}
    return here[split]


def _read(
    fitted: AllDepths,
    texts: Mapping[str, Float[Tensor, "_ emotion depth d_model"]],
    draws: Design,
    position: str,
    depths: Sequence[int],
) -> list[pd.DataFrame]:
    """AUROC of vectors fitted on some texts, over depths: on the test and the validation texts, and by emotion."""
    once = Design(draws.fit[:1], torch.arange(len(texts["validation"]))[None])
    test, validation = (
        torch.stack([one_against_rest(read_by(fitted[:, :, d], texts[split][:, :, d], how)) for d in depths], 1)
        for split, how in (("test", draws), ("validation", once))
    )
    of_one = _rows(test[0].T, "AUROC of one", position, depths)
    of_one["unit"] = np.repeat(emotions.names(), len(depths))
    return [
        _rows(test.mean(-1), "AUROC", position, depths),
        _rows(validation.mean(-1), "AUROC, validation", position, depths),
        of_one.assign(draw=0),
    ]


def _rows(found: Float[Tensor, "draw depth"], statistic: str, position: str, depths: Sequence[int]) -> pd.DataFrame:
    count = len(found)
    return pd.DataFrame(
        {
            "statistic": statistic, "position": position, "depth": list(depths) * count,
            "draw": np.repeat(range(count), len(depths)), "unit": "", "value": found.flatten().numpy(),
        }
    )  # fmt: skip


def _halves(everything: AllDepths, position: str, depth: int) -> pd.DataFrame:
    """Cosines of all pairs in either half of the topics: draws 2 i and 2 i + 1 are the two halves of time i."""
    generator, found = _seeded(), []
    for _ in range(HALVES):
        order = torch.randperm(len(everything), generator=generator)
        for half in order.tensor_split(2):
            found.append(geometry.geometries(everything[half], geometry.own(len(half), everything.shape[1]))[0, 0])
    names = emotions.names()
    pairs = [f"{one}, {other}" for i, one in enumerate(names) for other in names[i + 1 :]]
    table = pd.DataFrame(torch.stack(found).numpy(), columns=pairs).rename_axis("draw").reset_index()
    table = table.melt("draw", var_name="unit", value_name="value")
    return table.assign(statistic="geometry", position=position, depth=depth)


def _at(grid: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Lines over depth at other, relative depths."""
    depths = np.linspace(0, 1, drawn.shape[1])
    return np.stack([np.interp(grid, depths, line) for line in drawn])


def _best(drawn: Float[Tensor, "draw depth"]) -> Float[Tensor, "draw"]:
    return drawn.argmax(-1) / (drawn.shape[1] - 1)
