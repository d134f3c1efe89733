"""Planted emotions survive their nulls; noise, and what a null shows as well, does not."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from torch import Generator, Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers import findings
from helpers.activations import residuals
from helpers.emotions import names, neutral_situations, norms, situations
from helpers.findings import Reader, labels, own_vector, reader, stability, survival
from helpers.geometry import own
from helpers.prompts import pairs

HUMAN = torch.tensor(norms()[["valence", "arousal"]].to_numpy()).float()  # nearly uncorrelated
EMOTIONS, DEPTHS, D_MODEL, DRAWS = len(HUMAN), 3, 32, 60
TOPICS = {"train": 10, "validation": 4, "test": 8}
AFRAID = names().index("afraid")
NOTHING = torch.zeros(EMOTIONS, DEPTHS, D_MODEL)
IDENTITY = 0.4 * torch.randn(EMOTIONS, D_MODEL - 2, generator=Generator().manual_seed(99))
STABLE = "geometry at one depth with another's, r"
DECODED = {"held-out AUROC": 0.5, "held-out pairwise separation": 0.5, "held-out accuracy": 1 / EMOTIONS}  # and chance
RATED = ["|r| of PC1 with valence", "|r| of PC2 with arousal"]
NUMERIC = "numeric pairs in order"
EVERY = {*DECODED, *RATED, NUMERIC, STABLE}


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def planted(valence: float = 2, arousal: float = 1.5, at: Sequence[int] = range(DEPTHS)) -> Tensor:
    """Emotion x depth x d_model: valence on the first axis, arousal on the second, what is its own on the others.

    The same at each of these depths, nothing at the others.
    """
    structure, human = NOTHING.clone(), (HUMAN - HUMAN.mean(0)) / HUMAN.std(0)
    own = torch.cat([human * torch.tensor([valence, arousal]), IDENTITY], 1)
    structure[:, list(at)] = own[:, None]
    return structure


def world(structure: Tensor, seed: int = 0, carried: bool = False) -> Reader:
    """Structure, an offset of each topic and noise, which may be `carried` unchanged from depth to depth.

    The dangerous sides of numeric pairs lie towards "afraid".
    """
    generator = seeded(seed)

    def noise(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, 1 if carried else DEPTHS, D_MODEL, generator=generator)
        return drawn.expand(*shape, DEPTHS, D_MODEL)

    by_split = {name: structure + noise(count, 1) / 2 + noise(count, EMOTIONS) for name, count in TOPICS.items()}
    numeric = noise(2, 200) + torch.stack([structure[AFRAID] / 2, NOTHING[0]])[:, None]
    return Reader(by_split, noise(6), numeric)


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels in `DRAWS` draws."""
    monkeypatch.setattr(findings, "labels", partial(labels, draws=DRAWS))


def survivors(mine: Reader, embeddings: Reader, twins: dict[str, Reader], depth: int = 1) -> set[str]:
    table = survival(mine, depth, embeddings, twins, seeded(1))
    assert set(table["survives"]) <= {"yes", "no"}
    return set(table.loc[table["survives"] == "yes", "finding"])


# Labels


@pytest.mark.parametrize(("kind", "draws"), [("own", 1), ("resampled", 6), ("shuffled", 6)])
def test_every_kind_of_labels_begins_with_the_data_as_they_are(kind, draws):
    found = labels(world(NOTHING), kind, seeded(0), 5)
    assert found.held_out.fit.shape == (draws, EMOTIONS, 10 * EMOTIONS)
    assert found.every_topic.shape == (draws, EMOTIONS, 22 * EMOTIONS)
    assert torch.equal(found.held_out.fit[:1], own(10, EMOTIONS))
    assert torch.equal(found.every_topic[:1], own(22, EMOTIONS))
    assert found.held_out.picks.shape == (draws, 8) and found.held_out.picks[0].tolist() == list(range(8))


def test_resampled_labels_draw_topics_and_shuffled_ones_deal_out_their_texts():
    resampled, shuffled = (labels(world(NOTHING), kind, seeded(0), 40) for kind in ("resampled", "shuffled"))
    drawn, dealt = (((found.held_out.fit, 10), (found.every_topic, 22)) for found in (resampled, shuffled))
    for weights, topics in drawn:
        own_texts = weights[1:].unflatten(2, (topics, EMOTIONS)).diagonal(dim1=1, dim2=3)  # draw, topic, emotion
        assert own_texts.sum((1, 2)).tolist() == pytest.approx([EMOTIONS] * 40)  # none on another emotion's text
        assert (own_texts == own_texts[..., :1]).all()  # the same topics for every emotion
        assert (own_texts[..., 0] == 0).float().mean().item() == pytest.approx(1 / np.e, abs=0.05)  # are left out
    for weights, topics in dealt:
        of_topic = weights[1:].unflatten(2, (topics, EMOTIONS))  # draw, emotion, topic, text
        assert torch.allclose(of_topic.sum(1), torch.tensor(1 / topics))  # every text belongs to one emotion
        assert torch.allclose(of_topic.sum(3), torch.tensor(1 / topics))  # every emotion has one text of each topic
        assert of_topic.diagonal(dim1=1, dim2=3).count_nonzero().item() == pytest.approx(40 * topics, rel=0.4)
    assert (shuffled.held_out.picks == torch.arange(8)).all()
    assert len(resampled.held_out.picks.unique(dim=0)) == 41


def test_labels_depend_on_their_generator_alone():
    first, again, other = (labels(world(NOTHING), "shuffled", seeded(seed), 5) for seed in (0, 0, 1))
    assert torch.equal(first.every_topic, again.every_topic) and torch.equal(first.held_out.fit, again.held_out.fit)
    assert not torch.equal(first.every_topic, other.every_topic)


def test_unknown_labels_are_refused():
    with pytest.raises(ValueError, match="unknown labels 'random': choose 'own', 'resampled' or 'shuffled'"):
        labels(world(NOTHING), "random", seeded(0))


# What vectors at one depth show


def test_draw_0_is_what_plain_formulas_give():
    read, depth = world(planted(0.6, 0.4)), 2
    found = findings.findings(read, depth, labels(read, "own", seeded(0)))
    train, test, every = (
        acts[:, :, depth].numpy() for acts in (read.by_split["train"], read.by_split["test"], read.everything)
    )
    vectors = train.mean(0) - train.mean((0, 1))
    scores = (test - train.mean((0, 1))) @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
    own_text = np.tile(np.eye(EMOTIONS), (len(test), 1))
    pairs_in_order = [t[i, i] - t[i, j] > t[j, i] - t[j, j] for t in scores for i in range(EMOTIONS) for j in range(i)]
    along = PCA(2).fit_transform(every.mean(0))
    dangerous, safe = read.numeric[:, :, depth].numpy() @ vectors[AFRAID]
    expected = {
        "held-out AUROC": roc_auc_score(own_text, scores.reshape(-1, EMOTIONS)),
        "held-out pairwise separation": np.mean(pairs_in_order),
        "held-out accuracy": (scores.argmax(-1) == np.arange(EMOTIONS)).mean(),
        **{name: abs(np.corrcoef(along[:, i], HUMAN[:, i])[0, 1]) for i, name in enumerate(RATED)},
        NUMERIC: (dangerous > safe).mean(),
    }
    assert all(drawn.shape == (1,) for drawn in found.values())
    assert {name: drawn.item() for name, drawn in found.items()} == pytest.approx(expected, abs=1e-5)


def test_other_draws_are_readers_of_their_topics_alone():
    """Accuracy apart: readings are taken from the mean of the train texts as they are, which moves it."""
    read = world(planted(0.6, 0.4))
    by = labels(read, "resampled", seeded(0), 3)
    found = findings.findings(read, 1, by)
    for draw in range(1, 4):
        train, every = (
            drawn(read.by_split["train"], by.held_out.fit[draw]),
            drawn(read.everything, by.every_topic[draw]),
        )
        test = read.by_split["test"][by.held_out.picks[draw]]
        by_split = {"train": train, "validation": every[:0], "test": test}
        alone, all_topics = (
            replace(read, by_split=s) for s in (by_split, dict(zip(by_split, every.split([*TOPICS.values()]))))
        )
        held_out, fitted = (findings.findings(each, 1, labels(each, "own", seeded(0))) for each in (alone, all_topics))
        expected = held_out | {name: fitted[name] for name in RATED}
        for name in found.keys() - {"held-out accuracy"}:
            assert found[name][draw].item() == pytest.approx(expected[name].item(), abs=1e-5), name


def drawn(acts: Tensor, weights: Tensor) -> Tensor:
    """Every topic as often as these weights count it."""
    counts = weights[0].unflatten(0, (len(acts), EMOTIONS))[:, 0].mul(len(acts)).round().int()
    assert counts.sum() == len(acts)
    return acts.repeat_interleave(counts, 0)


def test_numeric_pairs_are_read_along_the_emotion_that_is_asked_for():
    read, own_axis = world(planted()), planted()[:, 0]
    opposite = names()[int((own_axis @ own_axis[AFRAID]).argmin())]
    by = labels(read, "own", seeded(0))
    afraid, less = (findings.findings(read, 1, by, emotion)[NUMERIC].item() for emotion in ("afraid", opposite))
    assert afraid > 0.75 and less < 0.3
    assert findings.findings(read, 1, by)[NUMERIC].item() == afraid


def test_what_one_depth_shows_is_not_read_at_another():
    read = world(planted(at=[1]))
    shown = [findings.findings(read, depth, labels(read, "own", seeded(0))) for depth in range(DEPTHS)]
    for name, limit in {"held-out AUROC": 0.6, RATED[0]: 0.6, NUMERIC: 0.6}.items():
        before, planted_here, after = (found[name].item() for found in shown)
        assert planted_here > 0.7 and max(before, after) < limit, name


def test_shuffled_labels_give_chance():
    read = world(planted())
    found = findings.findings(read, 1, labels(read, "shuffled", seeded(0), 100))
    for name, chance in DECODED.items():
        assert found[name][0] > 1.5 * chance and found[name][1:].mean().item() == pytest.approx(chance, abs=0.02)
    for name in RATED:
        assert found[name][0] > 0.9 and found[name][1:].mean() < 0.3
    assert found[NUMERIC][1:].mean().item() == pytest.approx(0.5, abs=0.05)


# Survival


def test_everything_planted_survives_when_the_nulls_are_noise(few_draws):
    assert survivors(world(planted()), world(NOTHING, 2), {"twin": world(NOTHING, 3)}) == EVERY


def test_noise_does_not_survive(few_draws):
    survived = [
        survivors(world(NOTHING, 10 * i), world(NOTHING, 10 * i + 1), {"twin": world(NOTHING, 10 * i + 2)})
        for i in range(6)
    ]
    assert sum(map(len, survived)) <= 2  # of 6 times 7


def test_noise_that_stays_the_same_over_depth_is_no_stable_geometry(few_draws):
    carried = world(NOTHING, carried=True)
    table = survival(carried, 1, world(NOTHING, 2), {"twin": world(NOTHING, 3)}, seeded(1)).set_index("finding")
    stable = table.loc[STABLE]
    assert stable["the model"] > 0.999 and stable["low"] > 0.5 and stable["survives"] == "no"
    assert stable["shuffled labels, 97.5 %"] > 0.999


@pytest.mark.parametrize("null", ["embeddings", "a twin", "the second twin"])
def test_what_any_null_shows_as_well_does_not_survive(few_draws, null):
    """The null holds valence and nothing else, so all that survives is what rests on the rest."""
    only_valence = NOTHING.clone()
    only_valence[..., 0] = planted()[..., 0]
    nulls = [world(NOTHING, 2), world(NOTHING, 3), world(NOTHING, 4)]
    nulls[["embeddings", "a twin", "the second twin"].index(null)] = world(only_valence, 5)
    found = survivors(world(planted()), nulls[0], {"a twin": nulls[1], "the second twin": nulls[2]})
    assert RATED[0] not in found and {RATED[1], "held-out AUROC"} <= found


def test_a_model_does_not_outlive_itself(few_draws):
    mine = world(planted())
    table = survival(mine, 0, mine, {"itself": mine}, seeded(1))
    assert (table[["lead", "low", "high"]] == 0).all().all() and set(table["survives"]) == {"no"}


def test_embeddings_are_read_at_depth_0_and_twins_at_the_depth_of_the_model(few_draws):
    """Both hold more than the model, at one depth alone."""
    mine, at_0, at_1 = world(0.8 * planted(at=[1])), world(planted(at=[0]), 2), world(planted(at=[1]), 3)
    assert survivors(mine, at_1, {"twin": at_0}) == EVERY - {STABLE}
    assert not survivors(mine, at_0, {"twin": at_0})
    assert not survivors(mine, at_1, {"twin": at_1})


def test_a_row_holds_draw_0_of_every_reader_and_the_lead_over_the_best_of_them(few_draws):
    readers = {"the model": world(planted(), 1), "embeddings": world(planted(0.5, 0.5), 2), "twin": world(NOTHING, 3)}
    mine, embeddings, twin = readers.values()
    table = survival(mine, 1, embeddings, {"twin": twin}, seeded(1)).set_index("finding")
    for name, depth in {"the model": 1, "embeddings": 0, "twin": 1}.items():
        alone = findings.findings(readers[name], depth, labels(readers[name], "own", seeded(0)))
        assert table.loc[list(alone), name].tolist() == pytest.approx([drawn.item() for drawn in alone.values()])
    best = table[["embeddings", "twin"]].max(axis=1)
    assert table["lead"].tolist() == pytest.approx((table["the model"] - best).tolist(), abs=1e-6)
    assert (table["low"] <= table["lead"]).all() and (table["lead"] <= table["high"]).all()
    assert np.isnan(table.loc[STABLE, "embeddings"])  # the embeddings have one depth


def test_the_limit_is_that_of_high_shuffles_without_the_data_as_they_are(monkeypatch):
    """Were the data among so few draws, they would be the limit."""
    monkeypatch.setattr(findings, "labels", partial(labels, draws=10))
    table = survival(world(planted()), 1, world(NOTHING, 2), {"twin": world(NOTHING, 3)}, seeded(1))
    limit = table.set_index("finding")["shuffled labels, 97.5 %"]
    assert all(chance < limit[name] < chance + 0.15 for name, chance in DECODED.items())
    assert all(0.2 < limit[name] < 0.6 for name in [*RATED, STABLE])


# Stability


def by_condition(mine: Reader, twins: dict[str, Reader] | None = None) -> pd.DataFrame:
    return stability(mine, twins or {}, seeded(1))[1].set_index("condition")


def test_the_same_texts_share_their_noise_and_other_topics_do_not(few_draws):
    r = by_condition(world(NOTHING, carried=True))["value"]
    assert r["same texts"] > 0.999 and r["shuffled labels"] > 0.999
    assert abs(r["other topics"]) < 0.1


def test_noise_that_is_new_at_every_depth_is_alike_nowhere(few_draws):
    r = by_condition(world(NOTHING))
    assert (r["value"].abs() < 0.15).all()
    assert r.loc["shuffled labels", "low"] < 0 < r.loc["shuffled labels", "high"]


@pytest.mark.parametrize("carried", [True, False])
def test_a_planted_geometry_is_stable_over_other_topics_too(few_draws, carried):
    r = by_condition(world(planted(), carried=carried))["value"]
    assert r["same texts"] > 0.9 and 0.8 < r["other topics"] < r["same texts"]
    assert r["shuffled labels"] > 0.999 if carried else r["shuffled labels"] < 0.6


def test_a_geometry_that_turns_over_depth_is_not_stable(few_draws):
    """Every depth has a geometry of its own, which other topics share at the same depth alone."""
    structure = torch.randn(EMOTIONS, DEPTHS, D_MODEL, generator=seeded(7))
    squares, numbers = stability(world(structure), {}, seeded(1))
    r = numbers.set_index("condition")["value"]
    assert abs(r["same texts"]) < 0.1 and abs(r["other topics"]) < 0.1
    other_topics = squares[squares["panel"] == "other topics"]
    assert (other_topics.loc[other_topics["depth"] == other_topics["other"], "r"] > 0.7).all()


def test_squares_are_symmetric_and_their_means_leave_the_diagonal_out(few_draws):
    twins = {"a twin": world(NOTHING, 2), "another": world(planted(), 3)}
    squares, numbers = stability(world(planted()), twins, seeded(1))
    conditions = ["same texts", "other topics", "shuffled labels", *twins]
    assert list(squares["panel"].unique()) == conditions == numbers["condition"].tolist()
    assert list(numbers) == ["value", "low", "high", "condition"]
    for name, value in numbers.set_index("condition")["value"].items():
        panel = squares[squares["panel"] == name]
        grid = panel.pivot(index="depth", columns="other", values="r").to_numpy()
        assert grid.shape == (DEPTHS, DEPTHS) and np.allclose(grid, grid.T, atol=1e-5)
        assert (np.diag(grid) > 1 - 1e-5).all() == (name != "other topics")
        off = panel.loc[panel["depth"] != panel["other"], "r"].mean()
        assert value == pytest.approx(off, abs=0.03 if name == "shuffled labels" else 1e-5)  # there, medians of draws


def test_twins_are_read_once_and_have_no_interval(few_draws):
    mine, twin = world(planted()), world(planted(), 3)
    r = by_condition(mine, {"itself": mine, "a twin": twin})
    assert r.loc["itself", "value"] == pytest.approx(r.loc["same texts", "value"])
    assert r.loc["a twin", "value"] == pytest.approx(by_condition(twin).loc["same texts", "value"])
    bounded = ["same texts", "shuffled labels"]
    assert r.loc[r["low"].notna() & r["high"].notna()].index.tolist() == bounded
    assert (r.loc[bounded, "low"] <= r.loc[bounded, "value"]).all()
    assert (r.loc[bounded, "value"] <= r.loc[bounded, "high"]).all()


def test_halves_differ_from_draw_to_draw_and_depend_on_the_generator_alone(few_draws):
    mine = world(planted(0.5, 0.5))
    one, again = (stability(mine, {}, seeded(1), 3)[1] for _ in range(2))
    pd.testing.assert_frame_equal(one, again)
    values = [stability(mine, {}, seeded(seed), 1)[1].set_index("condition")["value"] for seed in range(5)]
    assert len({value["other topics"] for value in values}) == 5
    assert len({value["same texts"] for value in values}) == 1


# Readers of a model


@pytest.fixture(scope="module")
def read(model: TransformerBridge) -> Reader:
    """A tiny random model at the last token."""
    return reader(model, "last token")


def test_a_reader_holds_every_text_where_its_topic_and_emotion_are(model, read):
    for split, topic, emotion in (("train", 3, 5), ("validation", 0, 0), ("test", 9, 23)):
        table = situations(split)
        acts = read.by_split[split]
        assert acts.shape == (table["topic"].nunique(), EMOTIONS, model.cfg.n_layers + 1, model.cfg.d_model)
        row = table[(table["topic"] == table["topic"].unique()[topic]) & (table["emotion"] == names()[emotion])]
        alone = residuals(model, row["text"].tolist(), ["last token"])["last token"][0]
        assert torch.allclose(acts[topic, emotion], alone, atol=1e-3)
    alone = residuals(model, neutral_situations()[-1:], ["last token"])["last token"]
    assert read.neutral.shape == (len(neutral_situations()), *alone.shape[1:])
    assert torch.allclose(read.neutral[-1:], alone, atol=1e-3)


def test_a_reader_holds_the_dangerous_side_of_numeric_pairs_first(model, read):
    table = pairs("numeric")
    assert read.numeric.shape == (2, len(table), model.cfg.n_layers + 1, model.cfg.d_model)
    for side, column in enumerate(("emotional", "neutral")):
        alone = residuals(model, table[column].tolist()[-1:], ["last token"])["last token"]
        assert torch.allclose(read.numeric[side, -1:], alone, atol=1e-3)


def test_a_reader_reads_at_its_position(model, read):
    mean = reader(model, "mean")
    text = situations("test")["text"].tolist()[:1]
    assert torch.allclose(mean.by_split["test"][0, 0], residuals(model, text, ["mean"])["mean"][0], atol=1e-3)
    for one, other in ((mean.neutral, read.neutral), (mean.numeric, read.numeric), (mean.everything, read.everything)):
        assert not torch.allclose(one, other, atol=0.1)


def test_situations_that_were_read_before_are_not_read_again(model, read, monkeypatch):
    given = {split: {"last token": acts} for split, acts in read.by_split.items()}
    monkeypatch.setattr(findings, "situations", None)
    again = reader(model, "last token", given)
    assert torch.equal(again.everything, read.everything)
    assert torch.equal(again.neutral, read.neutral) and torch.equal(again.numeric, read.numeric)


def test_everything_is_the_splits_one_after_the_other():
    by_split = {split: torch.full((int(n), 24, DEPTHS, D_MODEL), n) for split, n in (("test", 4.0), ("train", 3.0))}
    read = replace(world(NOTHING), by_split=by_split | {"validation": torch.full((2, 24, DEPTHS, D_MODEL), 2.0)})
    assert read.everything[:, 0, 0, 0].tolist() == [3, 3, 3, 2, 2, 4, 4, 4, 4]


# A vector of one's own


OWN = ["The soup was cold again.", "He had told her three times to wipe her boots."]


@pytest.mark.parametrize(("position", "depth"), [("mean", 0), ("last token", 2), ("final punctuation", 3)])
def test_an_own_vector_is_the_mean_of_its_sentences_minus_that_of_all_situations(model, read, position, depth):
    by_split = {split: torch.randn(n, EMOTIONS, 4, 32, generator=seeded(n)) for split, n in TOPICS.items()}
    mine = replace(read, by_split=by_split)
    found = own_vector(model, mine, OWN, position, depth)
    sentences = [residuals(model, [sentence], [position])[position][0, depth] for sentence in OWN]
    every = torch.cat([acts[:, :, depth].flatten(0, 1) for acts in mine.by_split.values()])
    assert torch.allclose(found, (sentences[0] + sentences[1]) / 2 - every.mean(0), atol=1e-4)


def test_own_sentences_need_no_full_stop(model, read):
    open_ended = [line.rstrip(".") for line in OWN]
    assert own_vector(model, read, open_ended, "mean", 2).isfinite().all()
    with pytest.raises(ValueError, match="does not end in punctuation"):
        own_vector(model, read, open_ended, "final punctuation", 2)


def test_survival_without_a_twin_is_refused(few_draws):
    with pytest.raises(ValueError, match="at least one twin"):
        survival(world(planted()), 1, world(NOTHING), {}, seeded(1))


def test_lines_without_text_are_left_out_of_an_own_vector(model, read):
    spaced = ["", f"  {OWN[0]} ", "   ", f"{OWN[1]}\t", ""]
    assert torch.equal(*(own_vector(model, read, lines, "mean", 2) for lines in (spaced, OWN)))


@pytest.mark.parametrize(("lines", "count"), [([], 0), (["", " "], 0), ([OWN[0], "", "  "], 1)])
def test_an_emotion_of_one_sentence_is_refused(model, read, lines, count):
    with pytest.raises(ValueError, match=f"needs at least two sentences, one per line; got {count}"):
        own_vector(model, read, lines, "mean", 2)
