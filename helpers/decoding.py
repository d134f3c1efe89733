"""How well vectors of emotions read situations on unseen topics, at one depth.

Every reader is fitted on train topics in many draws (see `geometry`), and draw d is tested on picks of the test topics
of its own. Results of readers given the same draws can be compared draw by draw.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.stats import mannwhitneyu
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Generator, Tensor

from helpers.config import CFG
from helpers.geometry import AllDepths, Draws, Texts, away, centred, means, own, resampled, shuffled, without
from helpers.stats import auroc, bootstrap_picks, centred_interval, interval, permutation_p

Test = Float[Tensor, "test emotion d_model"]
TestDepths = Float[Tensor, "test emotion depth d_model"]
Scores = Float[Tensor, "draw test emotion vector"]  # what each vector reads in the text of each topic and emotion


@dataclass(frozen=True)
class Design:
    """Which texts fit each draw's vectors, and which test topics it is tested on; draw 0 is the data as they are."""

    fit: Draws
    picks: Int[Tensor, "draw test"]


def bootstrapped(
    train: int, test: int, emotions: int, generator: Generator, draws: int = CFG.bootstrap_draws
) -> Design:
    """The data as they are, then `draws` bootstrap samples of train topics and of test topics."""
    fit = torch.cat([own(train, emotions), resampled(train, emotions, generator, draws)])
    return Design(fit, torch.cat([torch.arange(test)[None], bootstrap_picks(draws, test, generator)]))


def shuffles(train: int, test: int, emotions: int, generator: Generator, draws: int = CFG.permutation_draws) -> Design:
    """The data as they are, then `draws` in which the labels of the train texts are dealt out anew within topics."""
    fit = torch.cat([own(train, emotions), shuffled(train, emotions, generator, draws)])
    return Design(fit, torch.arange(test).expand(1 + draws, test))


def read_by(
    train: Texts,
    test: Test,
    design: Design,
    project_out: Float[Tensor, "component d_model"] | None = None,
    neutral: Float[Tensor, "d_model"] | None = None,
) -> Scores:
    """The test texts, from the mean of the train texts, along every emotion's unit vector (`geometry.centred`).

    `project_out` takes these components out of the vectors first. With `neutral` a vector is mean minus this instead.
    """
    vectors = means(train, design.fit)
    vectors = centred(vectors) if neutral is None else away(vectors, neutral)
    if project_out is not None:
        vectors = without(vectors, project_out)
    length = vectors.norm(dim=-1, keepdim=True)
    found = torch.einsum("tkd,nvd->ntkv", test - train.mean((0, 1)), vectors / length.where(length > 0, 1))
    return _picked(found, design.picks)


def one_against_rest(scores: Scores) -> Float[Tensor, "draw emotion"]:
    """AUROC of every vector: its own emotion's texts against all others; chance is 0.5."""
    emotions, found = scores.shape[-1], []
    for emotion in range(emotions):
        others = [other for other in range(emotions) if other != emotion]
        along = scores[..., emotion]
        found.append(auroc(along[:, :, emotion], along[:, :, others].flatten(1)))
    return torch.stack(found, -1)


def pairwise_separation(scores: Scores) -> Float[Tensor, "draw"]:
    """Share of topics and pairs of emotions whose two texts the difference of their two readings puts in order.

    Texts of one topic are compared, so topics play no part. Ties count half; chance is 0.5.
    """
    right = scores.diagonal(dim1=2, dim2=3)  # draw, topic, emotion: each text along its own vector
    less = right[..., None, :] - scores  # than the vector's own text has
    ahead = less + less.mT
    emotions = scores.shape[-1]
    pairs = torch.ones(emotions, emotions, dtype=torch.bool).triu(1)
    return ahead[..., pairs].sign().add(1).div(2).mean((1, 2))


def accuracy(scores: Scores) -> Float[Tensor, "draw"]:
    """Share of texts in which the own emotion's vector reads most; chance is one over the number of emotions."""
    own_emotion = torch.arange(scores.shape[-1])
    return (scores.argmax(-1) == own_emotion).float().mean((1, 2))


MEASURES: dict[str, Callable[[Scores], Float[Tensor, "draw"]]] = {
    "AUROC": lambda scores: one_against_rest(scores).mean(-1),
    "pairwise separation": pairwise_separation,
    "accuracy": accuracy,
}


def over_depth(
    train: AllDepths, test: TestDepths, design: Design, measures: Sequence[str] = ("AUROC",)
) -> dict[str, Float[Tensor, "draw depth"]]:
    """Each measure in every draw at every depth."""
    found: dict[str, list[Tensor]] = {name: [] for name in measures}
    for depth in range(train.shape[2]):
        scores = read_by(train[:, :, depth], test[:, :, depth], design)
        for name in measures:
            found[name].append(MEASURES[name](scores))
    return {name: torch.stack(drawn, -1) for name, drawn in found.items()}


def curve(drawn: Float[Tensor, "draw depth"], null: bool = False) -> pd.DataFrame:
    """A line over depth with its band: depth, value, low, high.

    Of bootstrap draws, draw 0 and `stats.centred_interval`; of shuffled labels (`null`), median and quantiles of the
    draws after it.
    """
    low, high = interval(drawn[1:], CFG.confidence) if null else centred_interval(drawn[0], drawn[1:], CFG.confidence)
    value = drawn[1:].quantile(0.5, 0) if null else drawn[0]
    numbers = {"value": value.tolist(), "low": low.tolist(), "high": high.tolist()}
    return pd.DataFrame({"depth": range(len(value)), **numbers})


def line(values: Float[Tensor, "depth"]) -> pd.DataFrame:
    """A line over depth without a band, as `curve` gives one with."""
    table = pd.DataFrame({"depth": range(len(values)), "value": values.tolist()})
    return table.assign(low=float("nan"), high=float("nan"))


def judged(readers: Mapping[str, Scores], kind: str = "result", null: bool = False) -> pd.DataFrame:
    """AUROC and pairwise separation of several readers as `plots.forest` takes them; intervals as in `curve`."""
    tables = []
    for name, scores in readers.items():
        for statistic in ("AUROC", "pairwise separation"):
            row = curve(MEASURES[statistic](scores)[:, None], null).drop(columns="depth")
            tables.append(row.assign(condition=name, statistic=statistic, kind=kind))
    return pd.concat(tables, ignore_index=True)


def p_over_depths(drawn: Float[Tensor, "draw depth"]) -> tuple[float, int]:
    """p of the best depth against the best depth of each shuffled draw (Westfall & Young 1993), and that depth."""
    best = int(drawn[0].argmax())
    return permutation_p(drawn[0, best][None], drawn[1:].amax(-1)[:, None])[0].item(), best


def difference(ours: Float[Tensor, "draw emotion"], theirs: Float[Tensor, "draw emotion"]) -> dict[str, float]:
    """Two readers' AUROCs over emotions compared: gap of the means with its interval, and as published.

    `superiority` is the chance that a random emotion has a higher AUROC with us than another with them (Mann-Whitney's
    U over its largest value; 0.5 is no difference), with an interval; `p` the two-sided Mann-Whitney test as published,
    which takes the emotions for independent and the two readers for unrelated.
    """
    table = {}
    for name, drawn, least in (("gap", (ours - theirs).mean(-1), -1), ("superiority", auroc(ours, theirs), 0)):
        ends = centred_interval(drawn[0], drawn[1:], CFG.confidence)
        low, high = (end.clamp(least, 1).item() for end in ends)
        table |= {name: drawn[0].item(), f"{name}_low": low, f"{name}_high": high}
    return table | {"p": float(mannwhitneyu(ours[0].numpy(), theirs[0].numpy()).pvalue)}


def gaps(
    settings: Mapping[str, tuple[Texts, Texts, Texts]], design: Design
) -> tuple[pd.DataFrame, Float[Tensor, "setting draw"]]:
    """AUROC of two ways of extraction and the gap between them under every setting, as a table and the gaps by draw.

    A setting is the train texts of the first way (comprehension), those of the second (generation), and the test texts.
    """
    rows, found = [], []
    for setting, (given, written, test) in settings.items():
        comprehension, generation = (MEASURES["AUROC"](read_by(train, test, design)) for train in (given, written))
        found.append(generation - comprehension)
        drawn = {"comprehension": comprehension, "generation": generation, "gap": found[-1]}
        rows += [curve(each[:, None]).assign(setting=setting, statistic=name) for name, each in drawn.items()]
    return pd.concat(rows, ignore_index=True), torch.stack(found)


def confusion(scores: Scores, names: Sequence[str]) -> pd.DataFrame:
    """How often each vector reads most in each emotion's texts (draw 0): emotion, read as, share of topics."""
    strongest = torch.nn.functional.one_hot(scores[0].argmax(-1), scores.shape[-1]).float().mean(0)
    rows = [
        (emotion, other, strongest[i, j].item()) for i, emotion in enumerate(names) for j, other in enumerate(names)
    ]
    return pd.DataFrame(rows, columns=["emotion", "read as", "share"])


def bag_of_words(train: pd.DataFrame, test: pd.DataFrame, names: Sequence[str], design: Design | None = None) -> Scores:
    """Readings by a logistic regression on word counts: what the words alone tell, without any model.

    Log-probabilities of every emotion, less their mean; tables have the columns topic, emotion, text, as
    `emotions.situations`. One draw, or with a design its picks of the test topics (it is not fitted anew).
    """
    vectorizer = CountVectorizer(token_pattern=r"[\w']+")
    fitted = LogisticRegression(max_iter=1000).fit(vectorizer.fit_transform(train["text"]), train["emotion"])
    scores = torch.tensor(fitted.decision_function(vectorizer.transform(test["text"])), dtype=torch.float32)
    found = scores[:, [list(fitted.classes_).index(name) for name in names]].unflatten(0, (-1, len(names)))[None]
    return found if design is None else _picked(found.expand(len(design.picks), -1, -1, -1), design.picks)


def chosen(train: Mapping[tuple[str, str, str], AllDepths], validation: Mapping[str, TestDepths]) -> pd.DataFrame:
    """AUROC on the validation topics of every way to vectors at every depth, best first.

    `train` holds the texts that vectors are fitted on by way, read-out and the position at which the validation texts
    are read; `validation` these texts by position. Columns way, read-out, texts at, depth, AUROC.
    """
    rows = []
    for (way, readout, position), acts in train.items():
        texts = validation[position]
        once = Design(own(*acts.shape[:2]), torch.arange(len(texts))[None])
        drawn = over_depth(acts, texts, once)["AUROC"][0].tolist()
        rows += [(way, readout, position, depth, auroc) for depth, auroc in enumerate(drawn)]
    table = pd.DataFrame(rows, columns=["way", "read-out", "texts at", "depth", "AUROC"])
    return table.sort_values("AUROC", ascending=False, kind="stable", ignore_index=True)


def _picked(scores: Scores, picks: Int[Tensor, "draw test"]) -> Scores:
    """Each draw's scores at the test topics that it picks."""
    return scores.gather(1, picks[:, :, None, None].expand(-1, -1, *scores.shape[2:]))
