"""Regimes of written texts: planted ones are told apart, and only a coherent text that says and means it succeeds."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.activations import residuals
from helpers.config import CFG
from helpers.regimes import CRITERIA, REGIMES, Limits, judged, limits, reads, shares, success_shares, with_regimes

MEASURES = ["text", "distinct", "loop", "perplexity"]
LIMIT = Limits(perplexity=2.0, distinct=0.25, loop=6.0)
UNSTEERED = {0: ("a plain text", 0.875, 0, 20.0), 1: ("another text", 0.5, 12, 64.0)}  # by sample
PLANTED = {  # by strength: what is written, and the regime beside sample 0 and beside sample 1
    1.0: (("a plain text", 0.875, 0, 20.0), "unchanged", "surgical"),
    2.0: (("a calm text", 0.75, 3, 30.0), "surgical", "surgical"),
    3.0: (("by trigrams", 0.5625, 0, 20.0), "repetitive", "surgical"),
    4.0: (("by its loop", 0.875, 7, 20.0), "repetitive", "surgical"),
    5.0: (("word salad", 0.875, 0, 41.0), "explosive", "surgical"),
    6.0: (("again again again", 0.875, 30, 1.5), "repetitive", "repetitive"),  # which the model finds likely
    7.0: (("% % % %", 0.125, 0, 900.0), "repetitive", "repetitive"),
    8.0: (("worse salad", 0.875, 0, 132.0), "explosive", "explosive"),
    9.0: (("at the limits", 0.625, 6, 40.0), "surgical", "surgical"),
    10.0: (("another text", 0.5, 12, 64.0), "repetitive", "unchanged"),
}
EMOTIONS = {"afraid": {"fear", "dread"}, "happy": {"joy"}}
PLAIN, FEARFUL, JOYFUL = "The box stood there.", "He was all fear, with dread.", "She sang of her joy."
PROSE, LOOP = (0.9, 0, 20.0), (0.1, 30, 2.0)


# Limits


def _unsteered(rows: list[tuple]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["prompt", "sample", "perplexity", "distinct", "loop"])


def test_limits_by_hand():
    """Each text of a prompt against each other text of it: ratios 2, 4, 2 and their inverses."""
    rows = [("a", 1, 40.0, 0.75, 0), ("a", 2, 20.0, 1.0, 6), ("a", 3, 10.0, 0.5, 4)]
    widest = limits(_unsteered(rows), quantile=1.0)
    assert widest == Limits(perplexity=4.0, distinct=0.5, loop=6.0)
    middle = limits(_unsteered(rows), quantile=0.6)  # the fourth of six
    assert middle == Limits(perplexity=2.0, distinct=0.25, loop=2.0)
    usual = limits(_unsteered(rows))
    assert usual.perplexity == pytest.approx(2 + 0.875 * (4 - 2))  # 0.975 lies 0.875 between the fifth and the sixth
    assert usual.distinct == pytest.approx(0.25 + 0.875 * (0.5 - 0.25))
    assert usual.loop == pytest.approx(4 + 0.875 * (6 - 4))


def test_texts_of_different_prompts_are_not_compared():
    one, other = (
        [("a", 0, 10.0, 1.0, 0), ("a", 1, 20.0, 0.75, 0)],
        [("b", 0, 900.0, 0.125, 40), ("b", 1, 900.0, 0.125, 40)],
    )
    assert limits(_unsteered(one + other), quantile=1.0) == limits(_unsteered(one), 1.0) == Limits(2.0, 0.25, 0.0)
    assert limits(_unsteered(one + other[:1]), quantile=1.0) == Limits(2.0, 0.25, 0.0)


def test_greedy_texts_are_compared_across_prompts():
    rows = [("a", 0, 10.0, 1.0, 0), ("b", 0, 30.0, 0.5, 4), ("c", 0, 20.0, 0.75, 6)]
    assert limits(_unsteered(rows), quantile=1.0, across=True) == Limits(3.0, 0.5, 6.0)
    two_of_b = _unsteered([*rows[1:], ("b", 1, 9000.0, 0.0, 99)])  # which are not compared with each other
    assert limits(two_of_b, quantile=1.0, across=True) == Limits(450.0, 0.75, 93.0)
    assert limits(_unsteered([("b", 0, 30.0, 0.5, 4), *rows[2:]]), quantile=1.0, across=True) == Limits(1.5, 0.25, 2.0)


def test_limits_need_two_texts_to_compare():
    with pytest.raises(ValueError, match="at least two unsteered texts to compare"):
        limits(_unsteered([("a", 0, 10.0, 1.0, 0), ("b", 0, 20.0, 0.5, 4)]))
    with pytest.raises(ValueError, match="at least two unsteered texts to compare"):
        limits(_unsteered([("a", 0, 10.0, 1.0, 0), ("a", 1, 20.0, 0.5, 4)]), across=True)


# Regimes


def _planted(prompts: tuple[str, ...] = ("one", "two")) -> pd.DataFrame:
    """Runs as a sweep gives them; the second prompt has the samples of the first the other way round."""
    rows = []
    for turned, prompt in enumerate(prompts):
        for sample, text in UNSTEERED.items():
            rows.append(("none", None, 0, 0.0, prompt, sample ^ turned, *text, "unchanged"))
        for strength, (text, *regime) in PLANTED.items():
            rows += [("fear", 2, 0, strength, prompt, sample ^ turned, *text, regime[sample]) for sample in (0, 1)]
    columns = ["method", "depth", "draw", "strength", "prompt", "sample", *MEASURES, "expected"]
    return pd.DataFrame(rows, columns=columns).astype({"depth": "Int64"})


@pytest.mark.parametrize("seed", [None, 0])  # rows in another order
def test_planted_regimes_are_told_beside_the_unsteered_text_of_the_same_prompt_and_sample(seed: int | None):
    runs = _planted() if seed is None else _planted().sample(frac=1, random_state=seed)
    found = with_regimes(runs, LIMIT)
    assert found["regime"].tolist() == runs["expected"].tolist()
    assert set(found["regime"]) == set(REGIMES)
    pd.testing.assert_frame_equal(found[list(runs)], runs)
    assert list(found)[len(runs.columns) :] == ["perplexity_ratio", "distinct_lost", "loop_longer", "regime"]


def test_what_decides_a_regime_is_in_the_table():
    found = with_regimes(_planted(("one",)), LIMIT).set_index(["strength", "sample"])
    decides = found[["perplexity_ratio", "distinct_lost", "loop_longer"]]
    assert decides.loc[(2.0, 0)].tolist() == [1.5, 0.125, 3]
    assert decides.loc[(2.0, 1)].tolist() == [30 / 64, -0.25, -9]
    assert decides.loc[(0.0, 1)].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("limit", "strength"),
    [(Limits(2.05, 0.25, 6), 5.0), (Limits(2, 0.3125, 6), 3.0), (Limits(2, 0.25, 7), 4.0)],
    ids=["perplexity", "distinct", "loop"],
)
def test_each_limit_decides_for_itself(limit: Limits, strength: float):
    """One that is raised to what a text has lets this text pass, and no other."""
    strict, lax = (with_regimes(_planted(("one",)), each)["regime"] for each in (LIMIT, limit))
    changed = _planted(("one",))[strict != lax]
    assert changed[["strength", "sample"]].to_numpy().tolist() == [[strength, 0]]
    assert lax[strict != lax].tolist() == ["surgical"]


def test_shares_by_hand():
    regimes = {("x", 1.0): ["surgical"] * 3 + ["explosive"], ("x", 2.0): ["repetitive"] * 2, ("a", 1.0): ["unchanged"]}
    runs = pd.DataFrame(
        [(method, strength, regime) for (method, strength), each in regimes.items() for regime in each],
        columns=["method", "strength", "regime"],
    )
    found = shares(runs, ["method", "strength"])
    assert list(found) == ["method", "strength", *REGIMES, "commonest"]
    by = found.set_index(["method", "strength"])
    assert by[list(REGIMES)].loc[("x", 1.0)].tolist() == [0, 0.75, 0, 0.25]
    assert by[list(REGIMES)].loc[("x", 2.0)].tolist() == [0, 0, 1, 0]
    assert by["commonest"].to_dict() == {("x", 1.0): "surgical", ("x", 2.0): "repetitive", ("a", 1.0): "unchanged"}
    assert shares(runs, ["method"]).set_index("method").loc["x", list(REGIMES)].tolist() == [0, 0.5, 1 / 3, 1 / 6]


# Reading


@pytest.mark.parametrize("depth", [0, 2, 3])
def test_texts_are_read_as_the_unsteered_model_has_them(any_model: TransformerBridge, depth: int):
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    texts = [JOYFUL, "", FEARFUL, " \n", JOYFUL, "Yes"]
    found = reads(any_model, texts, depth, vectors)
    assert found.shape == (6, 3) and found.index.tolist() == list(range(6))
    for row, text in enumerate(texts):
        if text.strip():
            alone = residuals(any_model, [text], ["mean"])["mean"][0, depth]
            assert found.loc[row].tolist() == pytest.approx([(alone @ each).item() for each in vectors], rel=1e-3)
        else:
            assert found.loc[row].tolist() == [0, 0, 0]
    assert found.loc[0].equals(found.loc[4].rename(0)) and found.abs().loc[0].min() > 0


def test_texts_of_which_none_has_a_word_read_as_nothing(model: TransformerBridge):
    """As when every run ends at once."""
    assert (reads(model, ["", " "], 2, torch.ones(2, 32)) == 0).all(axis=None)


# Judging


@pytest.fixture(scope="module")
def vectors(model: TransformerBridge) -> Tensor:
    """Along the first, the fearful text reads higher than the plain one; along the second, the joyful one."""
    plain, *others = residuals(model, [PLAIN, FEARFUL, JOYFUL], ["mean"])["mean"][:, 2]
    return torch.stack([other - plain for other in others])


def _runs(texts: list[str], draw: int = 0, unsteered: str = PLAIN, prompt: str = "one", measures=PROSE) -> pd.DataFrame:
    """One prompt with a sample per text, before and after steering."""
    rows = [("none", None, 0, 0.0, prompt, sample, unsteered, *PROSE) for sample in range(len(texts))]
    rows += [("emotion", 2, draw, 0.5, prompt, sample, text, *measures) for sample, text in enumerate(texts)]
    columns = ["method", "depth", "draw", "strength", "prompt", "sample", *MEASURES]
    return pd.DataFrame(rows, columns=columns).astype({"depth": "Int64"})


def _judged(model: TransformerBridge, runs: pd.DataFrame, vectors: Tensor, words=EMOTIONS) -> pd.DataFrame:
    return judged(model, runs, ["afraid", "happy"], words, 2, vectors, LIMIT)


def test_a_coherent_text_with_the_emotions_words_that_reads_higher_is_a_success(
    model: TransformerBridge, vectors: Tensor
):
    found = _judged(model, _runs([FEARFUL]), vectors)
    columns = ["method", "depth", "strength", "draw", "emotion", "prompt", "words", "read", "surgical"]
    assert list(found) == [*columns, "more_words", "higher_read", "coherent", "success"]
    (row,) = found.to_dict("records")
    assert [row[each] for each in columns[:6]] == ["emotion", 2, 0.5, 0, "afraid", "one"]
    assert row["words"] == pytest.approx(200 / 6)  # of six words two are the emotion's
    assert row["read"] == pytest.approx((vectors[0] @ vectors[0]).item(), rel=1e-3)
    assert row["more_words"] and row["higher_read"] and row["coherent"] and row["success"]


def test_a_success_needs_all_three(model: TransformerBridge, vectors: Tensor):
    loop = _runs([FEARFUL], measures=LOOP)
    cases = {
        "more_words": _judged(model, _runs([FEARFUL]), vectors, EMOTIONS | {"afraid": {"terror"}}),
        "higher_read": _judged(model, _runs([FEARFUL]), -vectors),
        "coherent": _judged(model, loop, vectors),
    }
    for missing, found in cases.items():
        (row,) = found.to_dict("records")
        assert {each for each in ("more_words", "higher_read", "coherent") if not row[each]} == {missing}
        assert not row["success"]


def test_a_loop_of_the_emotions_words_is_no_success(model: TransformerBridge):
    said = "fear fear fear fear fear"
    plain, loop = residuals(model, [PLAIN, said], ["mean"])["mean"][:, 2]
    (row,) = _judged(model, _runs([said], measures=LOOP), (loop - plain).expand(2, -1)).to_dict("records")
    assert row["words"] == 100 and row["more_words"] and row["higher_read"]
    assert not row["coherent"] and not row["success"]


def test_what_the_unsteered_text_says_anyway_is_no_success(model: TransformerBridge, vectors: Tensor):
    (row,) = _judged(model, _runs([FEARFUL], unsteered=FEARFUL), vectors).to_dict("records")
    assert row["words"] == row["read"] == row["surgical"] == 0
    assert not (row["more_words"] or row["higher_read"] or row["coherent"] or row["success"])
    (row,) = _judged(model, _runs([PLAIN], unsteered=FEARFUL), vectors).to_dict("records")
    assert row["words"] == pytest.approx(-200 / 6) and row["read"] < 0 and row["coherent"] and not row["success"]


def test_every_draw_is_judged_by_the_emotion_that_own_names_for_it(model: TransformerBridge, vectors: Tensor):
    for text, emotion, draw in ((FEARFUL, "afraid", 0), (JOYFUL, "happy", 1)):
        own, other = (_judged(model, _runs([text], each), vectors).iloc[0] for each in (draw, 1 - draw))
        assert own["emotion"] == emotion != other["emotion"]
        assert own["success"] and not other["success"] and other["words"] == 0
        swapped = judged(model, _runs([text], 1 - draw), ["happy", "afraid"], EMOTIONS, 2, vectors, LIMIT).iloc[0]
        assert swapped["emotion"] == emotion and swapped["success"]


def test_samples_of_a_prompt_are_judged_together_and_prompts_apart(model: TransformerBridge, vectors: Tensor):
    runs = pd.concat(
        [
            _runs([FEARFUL, PLAIN], prompt="one"),  # one of two texts is surgical, the other unchanged
            _runs([FEARFUL, PLAIN + " Yes.", FEARFUL], prompt="two"),
            _runs([FEARFUL, PLAIN, FEARFUL], prompt="three"),
        ]
    )
    found = _judged(model, runs.sample(frac=1, random_state=2), vectors).set_index("prompt")
    assert found["words"].to_dict() == pytest.approx({"one": 100 / 6, "two": 400 / 18, "three": 400 / 18})
    assert found["surgical"].to_dict() == pytest.approx({"one": 1 / 2, "two": 1, "three": 2 / 3})
    assert found["success"].to_dict() == {"one": False, "two": True, "three": True}
    whole, half = (found["read"][prompt] for prompt in ("three", "one"))
    assert whole / (2 / 3) == pytest.approx(half / (1 / 2), rel=1e-4)


def test_methods_strengths_and_draws_are_judged_apart(model: TransformerBridge, vectors: Tensor):
    runs = _runs([FEARFUL])
    steered = runs[runs["method"] != "none"]
    more = [steered.assign(method="random", text=PLAIN), steered.assign(strength=0.25), steered.assign(draw=1)]
    found = _judged(model, pd.concat([runs, *more]), vectors)
    assert found[["method", "strength", "draw", "success"]].to_numpy().tolist() == [
        ["emotion", 0.5, 0, True], ["random", 0.5, 0, False], ["emotion", 0.25, 0, True], ["emotion", 0.5, 1, False],
    ]  # fmt: skip


def test_success_shares_have_exact_intervals_for_each_criterion_and_method():
    passed = {
        "more_words": [1, 1, 1, 0],
        "higher_read": [1, 0, 0, 0],
        "coherent": [1, 1, 1, 1],
        "success": [0, 0, 0, 0],
    }
    outcome = pd.DataFrame(passed, dtype=bool)
    both = pd.concat([outcome.assign(method="emotion"), (~outcome).assign(method="random")])
    found = success_shares(both)
    assert list(found) == ["condition", "kind", "statistic", "value", "low", "high"]
    assert len(found) == 2 * len(CRITERIA) and set(CRITERIA) == set(passed)
    tail = (1 - CFG.confidence) / 2
    none, all_ = (0, 0, 1 - tail ** (1 / 4)), (1, tail ** (1 / 4), 1)  # Clopper-Pearson where all or none pass
    by = found.set_index("condition")
    for column, label in CRITERIA.items():
        own, other = by.loc[f"{label}, emotion"], by.loc[f"{label}, random"]
        assert (own["kind"], other["kind"]) == ("result", "control")
        assert (own["value"], other["value"]) == (np.mean(passed[column]), 1 - np.mean(passed[column]))
        assert 0 <= own["low"] <= own["value"] <= own["high"] <= 1
    assert by.loc[f"{CRITERIA['success']}, emotion", ["value", "low", "high"]].tolist() == pytest.approx(none)
    assert by.loc[f"{CRITERIA['coherent']}, emotion", ["value", "low", "high"]].tolist() == pytest.approx(all_)
    assert by["statistic"].nunique() == 1
