"""Curves of planted activations: centring makes cosines negative whatever the labels, and planted bends come back."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from torch import Generator, Tensor

from helpers import curves
from helpers.curves import cosines, decodability, parabolas
from helpers.decoding import bootstrapped, shuffles
from helpers.emotions import names
from helpers.findings import Reader, labels

EMOTIONS, DEPTHS, D_MODEL, DRAWS = len(names()), 4, 24, 40
TOPICS = {"train": 6, "validation": 3, "test": 5}
CONSTANT = -1 / (EMOTIONS - 1)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def world(gains: list[float], seed: int = 0, offset: float = 0) -> Reader:
    """Emotions with a direction each, by another gain at each depth, noise, and an offset that all texts share."""
    generator = seeded(seed)
    shared = offset * torch.randn(D_MODEL, generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, DEPTHS, D_MODEL, generator=generator) + shared

    structure = torch.tensor(gains)[:, None] * torch.randn(EMOTIONS, 1, D_MODEL, generator=seeded(99))
    by_split = {split: structure + noise(count, EMOTIONS) for split, count in TOPICS.items()}
    return Reader(by_split, noise(40), noise(2, 3))


NOISE = [0.0] * DEPTHS
AT_TWO = [0.0, 0.0, 1.0, 0.0]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels in `DRAWS` draws."""
    monkeypatch.setattr(curves, "labels", partial(labels, draws=DRAWS))


def of(table: pd.DataFrame, column: str = "value", **where: str) -> np.ndarray:
    """One column of the rows with these entries, by depth."""
    for name, entry in where.items():
        table = table[table[name] == entry]
    assert table["depth"].tolist() == list(range(len(table))) and len(table) == DEPTHS
    return table[column].to_numpy()


# Cosines


def test_every_panel_has_its_conditions_and_the_model_comes_first():
    table = cosines(world(NOISE), {"a twin": world(NOISE, 2), "another": world(NOISE, 3)}, seeded(0))[0]
    assert set(table) == {"panel", "condition", "depth", "value", "low", "high"}
    every = ["the model", "shuffled labels", "a twin", "another"]
    found = {panel: list(part["condition"].unique()) for panel, part in table.groupby("panel", sort=False)}
    assert found == {
        "raw": [*every, "two unrelated texts"],
        "minus neutral": every,
        "centred": [*every, "-1 / (K - 1)"],
    }
    banded = table[table["low"].notna() & table["high"].notna()]
    assert set(banded["condition"]) == {"the model", "shuffled labels"} and len(banded) == 2 * 3 * DEPTHS
    assert (banded["low"] <= banded["value"]).all() and (banded["value"] <= banded["high"]).all()


@pytest.mark.parametrize(("gains", "tolerance"), [(NOISE, 0.002), ([1.0] * DEPTHS, 0.005)])
def test_centred_vectors_have_the_same_cosine_whatever_the_labels_mean(gains, tolerance):
    table = cosines(world(gains, offset=3), {"a twin": world(NOISE, 2)}, seeded(0))[0]
    for condition in ("the model", "shuffled labels", "a twin"):
        assert of(table, panel="centred", condition=condition) == pytest.approx(CONSTANT, abs=tolerance)
    assert of(table, panel="centred", condition="-1 / (K - 1)") == pytest.approx(CONSTANT)


def test_an_offset_of_all_texts_is_in_raw_cosines_and_not_in_those_minus_neutral():
    table = cosines(world(NOISE, offset=3), {}, seeded(0))[0]
    for condition in ("the model", "shuffled labels"):
        assert (of(table, panel="raw", condition=condition) > 0.95).all()
        assert (abs(of(table, panel="minus neutral", condition=condition)) < 0.4).all()  # noise of their mean


def test_structure_lowers_the_cosine_minus_neutral_and_shuffled_labels_undo_it():
    mine = world([0.0, 1.0, 2.0, 3.0])
    mine = replace(mine, neutral=mine.neutral + 1)  # emotions have a direction in common
    table = cosines(mine, {}, seeded(0))[0]
    ours, null = (of(table, panel="minus neutral", condition=c) for c in ("the model", "shuffled labels"))
    assert (np.diff(ours) < -0.05).all() and (ours[1:] < null[1:] - 0.1).all()


def test_values_are_those_of_plain_means_over_all_topics():
    mine, twin = world([0.0, 0.3, 1.0, 0.1], offset=1), world(NOISE, 2, offset=1)
    table = cosines(mine, {"a twin": twin}, seeded(0))[0]
    above = np.triu_indices(EMOTIONS, 1)
    for condition, read in (("the model", mine), ("a twin", twin)):
        for depth in range(DEPTHS):
            means = read.everything[:, :, depth].mean(0)
            expected = {
                "raw": means,
                "minus neutral": means - read.neutral[:, depth].mean(0),
                "centred": means - means.mean(0),
            }
            for panel, vectors in expected.items():
                cosine = cosine_similarity(vectors.numpy())[above].mean()
                assert of(table, panel=panel, condition=condition)[depth] == pytest.approx(cosine, abs=1e-5)


def test_unrelated_texts_share_neither_topic_nor_emotion():
    """Texts of one topic or of one emotion are nearly the same; any two others have the offset in common alone."""
    generator = seeded(5)
    topic, emotion = (
        torch.randn(*shape, DEPTHS, 400, generator=generator) for shape in ((sum(TOPICS.values()), 1), (1, EMOTIONS))
    )
    offset = torch.arange(DEPTHS)[:, None] * torch.ones(400)
    every = topic + emotion + offset
    by_split = dict(zip(TOPICS, every.split(list(TOPICS.values()))))
    mine = Reader(by_split, torch.zeros(2, DEPTHS, 400), torch.zeros(2, 1, DEPTHS, 400))
    table = cosines(mine, {}, generator)[0]
    assert of(table, panel="raw", condition="two unrelated texts") == pytest.approx([0, 1 / 3, 4 / 6, 9 / 11], abs=0.03)


def test_the_curves_by_draw_are_those_minus_neutral():
    table, drawn, null = cosines(world(AT_TWO, offset=1), {}, seeded(0))
    assert drawn.shape == null.shape == (DRAWS + 1, DEPTHS)
    assert torch.equal(drawn[0], null[0])  # both begin with the data as they are
    assert drawn[0].tolist() == pytest.approx(of(table, panel="minus neutral", condition="the model"))
    shuffled = of(table, panel="minus neutral", condition="shuffled labels")
    assert null[1:].quantile(0.5, 0).tolist() == pytest.approx(shuffled)
    assert (drawn[1:].std(0) > 0).all() and not torch.allclose(drawn[1:], null[1:], atol=1e-3)


# Decodability


WAYS = {"texts": AT_TWO, "stories": [0.0, 1.0, 0.0, 0.0]}


def decoded() -> tuple[pd.DataFrame, dict[str, Tensor], Tensor]:
    readers = {name: world(gains, number) for number, (name, gains) in enumerate(WAYS.items())}
    ways = {name: (read.by_split["train"], read.by_split["test"]) for name, read in readers.items()}
    draws = bootstrapped(6, 5, EMOTIONS, seeded(0), DRAWS), shuffles(6, 5, EMOTIONS, seeded(1), DRAWS + 1)
    return decodability(ways, {"a twin": world(NOISE, 8), "itself": readers["texts"]}, *draws)


def test_decodability_finds_the_depth_at_which_emotions_were_planted():
    table = decoded()[0]
    for way, gains in WAYS.items():
        auroc = of(table, condition=way)
        planted = np.array(gains) > 0
        assert auroc.argmax() == planted.argmax() and auroc[planted] > 0.95 and (abs(auroc[~planted] - 0.5) < 0.1).all()
    for condition in ("a twin", "random: shuffled labels"):
        assert of(table, condition=condition) == pytest.approx(0.5, abs=0.08)


def test_every_way_has_a_line_a_band_and_its_draws():
    table, drawn, _ = decoded()
    assert set(table) == {"condition", "depth", "value", "low", "high"}
    conditions = [*WAYS, "a twin", "itself", "random: shuffled labels"]
    assert list(table["condition"].unique()) == conditions
    banded = table[table["low"].notna() & table["high"].notna()]
    assert list(banded["condition"].unique()) == [*WAYS, "random: shuffled labels"]
    assert (banded["low"] <= banded["value"]).all() and (banded["value"] <= banded["high"]).all()
    assert list(drawn) == list(WAYS)
    for name, each in drawn.items():
        assert each.shape == (DRAWS + 1, DEPTHS) and each[0].tolist() == pytest.approx(of(table, condition=name))


def test_a_twin_is_read_by_the_data_as_they_are():
    table = decoded()[0]
    assert of(table, condition="itself") == pytest.approx(of(table, condition="texts"))


def test_shuffled_labels_are_those_of_the_first_way():
    table, drawn, null = decoded()
    assert null.shape == (DRAWS + 2, DEPTHS) and null[0].tolist() == pytest.approx(drawn["texts"][0].tolist())
    assert null[1:].quantile(0.5, 0).tolist() == pytest.approx(of(table, condition="random: shuffled labels"))
    assert null[1:].amax() < 0.7 < null[0].amax()


# Parabolas


DEPTH = torch.linspace(0, 1, 9)


def bent(square: float, turn: float, draws: int, noise: float = 0.02) -> Tensor:
    """Draws of a parabola with noise; draw 0 has none."""
    drawn = (square * (DEPTH - turn) ** 2 + 0.5).repeat(draws, 1)
    drawn[1:] += noise * torch.randn(draws - 1, len(DEPTH), generator=seeded(0))
    return drawn


def test_a_planted_u_comes_back_with_its_turn_and_lowest_point():
    points, fits = parabolas({"cosine": {"the model": bent(2, 0.375, 50)}})
    (fit,) = fits.to_dict("records")
    assert fit["square"] == pytest.approx(2, abs=1e-4) and fit["linear"] == pytest.approx(-4 * 0.375, abs=1e-4)
    assert fit["constant"] == pytest.approx(0.5 + 2 * 0.375**2, abs=1e-4)
    assert fit["turn"] == pytest.approx(0.375, abs=1e-4) and fit["best"] == pytest.approx(0.375)
    for name in ("square", "turn", "best"):
        assert fit[f"{name}_low"] <= fit[name] <= fit[f"{name}_high"]
    assert 1.7 < fit["square_low"] < fit["square_high"] < 2.3
    assert 0.3 < fit["turn_low"] < fit["turn_high"] < 0.45
    assert points["relative depth"].tolist() == pytest.approx(DEPTH.tolist())
    assert points["value"].tolist() == pytest.approx(bent(2, 0.375, 1)[0].tolist())
    assert set(points["measure"]) == {"cosine"} and set(points["condition"]) == {"the model"}


def test_a_measure_that_is_best_on_top_is_turned_round():
    hill = bent(-2, 0.625, 50)
    points, fits = parabolas({"highest AUROC": {"the model": hill}, "AUROC": {"the model": hill}})
    top, lowest = fits.to_dict("records")
    assert top["best"] == pytest.approx(0.625) and top["turn"] == pytest.approx(0.625, abs=1e-4)
    assert 0.5 <= top["best_low"] <= top["best_high"] <= 0.75 and 0.55 < top["turn_low"] <= top["turn_high"] < 0.7
    assert lowest["best"] == lowest["turn"] == 0  # the lower of the two ends
    for column in ("square", "linear", "constant", "square_low", "square_high"):  # those of the curve as it is drawn
        assert top[column] == pytest.approx(lowest[column], abs=1e-5)
    assert top["square"] == pytest.approx(-2, abs=1e-4) and top["square_low"] < -2 < top["square_high"]
    assert points["value"].tolist() == pytest.approx(hill[0].tolist() * 2)


def test_the_fit_is_the_curve_through_the_points_as_they_are_drawn():
    measures = {name: {"the model": bent(-1.5, 0.7, 20) + DEPTH.sin()} for name in ("lowest", "highest")}
    points, fits = parabolas(measures)
    for name, fit in fits.set_index("measure").iterrows():
        x, y = points.loc[points["measure"] == name, ["relative depth", "value"]].to_numpy().T
        assert np.polyfit(x, y, 2) == pytest.approx(fit[["square", "linear", "constant"]].astype(float), abs=1e-3)


def test_the_interval_leaves_the_data_as_they_are_out():
    """Draw 0 is a hill, all others are the same valley."""
    drawn = bent(2, 0.25, 4, noise=0)
    drawn[0] = bent(-2, 0.25, 1)[0]
    (fit,) = parabolas({"cosine": {"the model": drawn}})[1].to_dict("records")
    assert fit["square"] == pytest.approx(-2, abs=1e-4)
    assert fit["square_low"] == pytest.approx(2, abs=1e-4) and fit["square_high"] == pytest.approx(2, abs=1e-4)
    assert fit["best"] == 1 and fit["best_low"] == fit["best_high"] == pytest.approx(0.25)


def test_noise_around_a_straight_line_has_no_curvature():
    drawn = 0.3 * DEPTH + 0.05 * torch.randn(100, len(DEPTH), generator=seeded(0))
    (fit,) = parabolas({"cosine": {"the model": drawn}})[1].to_dict("records")
    assert fit["square_low"] < 0 < fit["square_high"]


def test_one_draw_has_no_interval():
    fits = parabolas({"cosine": {"the model": bent(2, 0.5, 20), "shuffled labels": bent(1, 0.5, 1)}})[1]
    ends = [f"{name}_{end}" for name in ("square", "best", "turn") for end in ("low", "high")]
    model, null = fits[ends].to_numpy()
    assert np.isfinite(model).all() and np.isnan(null).all()
    assert fits["square"].tolist() == pytest.approx([2, 1], abs=1e-4)


def test_every_measure_and_condition_has_its_points_and_its_fit():
    measures = {m: {c: bent(1, 0.5, 3) for c in ("the model", "null")} for m in ("cosine", "highest AUROC")}
    points, fits = parabolas(measures)
    expected = [(measure, condition) for measure in measures for condition in ("the model", "null")]
    assert list(zip(fits["measure"], fits["condition"])) == expected
    assert points.groupby(["measure", "condition"], sort=False).size().to_dict() == dict.fromkeys(expected, len(DEPTH))


def test_curves_depend_on_their_generator_alone():
    mine = world(AT_TWO)
    tables = [cosines(mine, {}, seeded(seed))[0] for seed in (0, 0, 1)]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert not tables[0].equals(tables[2])
