"""Planted features of one emotion, of all and of all sentences are told apart; few false alarms under the null."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import Generator, Tensor

from helpers import specificity as module
from helpers.config import CFG
from helpers.specificity import by_kind, difference_interval, reading, specificity

EMOTIONS = ["happy", "sad", "angry", "calm"]
EACH = 8
AGAINST = ["matched sentences", "other emotions"]
SPECIFIC, EMOTIONAL, KIND_OF_SENTENCE, EVERYWHERE, NOWHERE = range(5)  # features of `happy`


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few enough to be quick; 99 null draws make p a whole percentage."""
    monkeypatch.setattr(module, "CFG", replace(CFG, bootstrap_draws=200, permutation_draws=99))


@pytest.fixture
def table() -> pd.DataFrame:
    """Key-word sentences of four emotions, then the matched ones."""
    rows = [
        (f"{emotion}-{kind.replace(' ', '-')}-{i:02}", emotion, kind)
        for kind in ("key word", "matched")
        for emotion in EMOTIONS
        for i in range(EACH)
    ]
    return pd.DataFrame(rows, columns=["id", "emotion", "kind"])


@pytest.fixture
def chosen() -> pd.DataFrame:
    return pd.DataFrame({"emotion": "happy", "feature": range(5)})


def noise(table: pd.DataFrame, features: int, generator: Generator) -> Tensor:
    """Sparse activations that know nothing of emotions."""
    return (torch.randn(len(table), features, generator=generator) - 0.5).relu()


def planted(table: pd.DataFrame, generator: Generator) -> Tensor:
    acts = noise(table, 5, generator)
    happy, own = (torch.tensor((table[column] == value).tolist()) for column, value in
                  (("emotion", "happy"), ("kind", "key word")))  # fmt: skip
    acts[:, SPECIFIC] += 3 * (happy & own)
    acts[:, EMOTIONAL] += 3 * own
    acts[:, KIND_OF_SENTENCE] += 3 * happy
    acts[:, EVERYWHERE] += 3
    acts[:, NOWHERE] = 0
    return acts


def test_planted_features_differ_where_they_were_made_to(table, chosen, generator):
    found = specificity(planted(table, generator), table, chosen, generator)
    p = found.pivot(index="feature", columns="against", values="p_max")
    assert (p < 0.05)[AGAINST].to_numpy().tolist() == [
        [True, True], [True, False], [False, True], [False, False], [False, False],
    ]  # fmt: skip
    assert p.loc[NOWHERE].tolist() == [1, 1]


def test_each_feature_is_held_against_the_emotion_that_it_was_chosen_for(table, generator):
    chosen = pd.DataFrame({"emotion": ["sad", "happy"], "feature": [SPECIFIC, SPECIFIC]})
    found = specificity(planted(table, generator), table, chosen, generator)
    assert (found.p_max < 0.05).tolist() == [False, True, False, True]
    assert (found.value > 2).tolist() == [False, True, False, True]


def test_values_are_mean_differences_with_an_interval_around_them(table, generator):
    acts = planted(table, generator)
    chosen = pd.DataFrame({"emotion": ["happy", "calm"], "feature": [EMOTIONAL, SPECIFIC]})
    found = specificity(acts, table, chosen, generator)
    assert found.columns.tolist() == ["emotion", "feature", "against", "value", "low", "high", "p_max"]
    assert found.against.tolist() == [AGAINST[0]] * 2 + [AGAINST[1]] * 2
    assert found.emotion.tolist() == ["happy", "calm"] * 2
    for row in found.itertuples():
        mean = pd.Series(acts[:, row.feature]).groupby([table["kind"], table["emotion"] == row.emotion]).mean()
        other = mean["matched", True] if row.against == AGAINST[0] else mean["key word", False]
        assert row.value == pytest.approx(mean["key word", True] - other, abs=1e-5)
        assert row.low < row.value < row.high


def test_p_is_the_share_of_draws_whose_largest_difference_is_as_large(table, generator):
    """Against matched sentences, by hand: whole pairs change sides, and the largest t of both features counts."""
    acts = noise(table, 2, generator)
    acts[: len(EMOTIONS) * EACH, 0] += 0.4
    chosen = pd.DataFrame({"emotion": ["happy", "calm"], "feature": [0, 1]})
    found = specificity(acts, table, chosen, Generator().manual_seed(1)).p_max[:2].tolist()
    pairs = [acts[:EACH, 0] - acts[32 : 32 + EACH, 0], acts[32 - EACH : 32, 1] - acts[64 - EACH :, 1]]
    generator, null = Generator().manual_seed(2), []
    for _ in range(2000):
        null.append(max(t(pair * (torch.randint(2, (EACH,), generator=generator) * 2 - 1)) for pair in pairs))
    for p, pair in zip(found, pairs):
        assert p == pytest.approx(sum(draw >= t(pair) for draw in null) / 2000, abs=0.12)


def t(differences: Tensor) -> float:
    return (differences.mean() / differences.std(correction=0)).item()


@pytest.mark.parametrize(("against", "effect"), [(AGAINST[0], 0.7), (AGAINST[1], 0.1)])
def test_more_features_make_p_larger(table, generator, against, effect):
    """The largest difference of all features is what each is compared with."""
    acts = noise(table, 61, generator)
    acts[:EACH, 0] += effect
    emotions = ["happy", *(EMOTIONS[i % 4] for i in range(60))]
    among = specificity(acts, table, pd.DataFrame({"emotion": emotions, "feature": range(61)}), generator)
    alone = specificity(acts, table, pd.DataFrame({"emotion": ["happy"], "feature": [0]}), generator)
    p = [found[(found.feature == 0) & (found.against == against)].p_max.item() for found in (alone, among)]
    assert p[1] > p[0] + 0.1


def test_the_smallest_p_of_all_features_is_below_5_percent_5_times_in_100_at_most(table):
    """Under the null, with 12 features at a time; three standard errors of 300 runs are 3.8 percentage points."""
    chosen = pd.DataFrame({"emotion": EMOTIONS * 3, "feature": range(12)})
    smallest = []
    for seed in range(300):
        generator = Generator().manual_seed(seed)
        found = specificity(noise(table, 12, generator), table, chosen, generator)
        smallest.append(found.groupby("against").p_max.min())
    alarms = (pd.DataFrame(smallest) <= 0.05).mean()[AGAINST]
    assert (alarms > 0.01).all() and (alarms < 0.05 + 0.038).all()


@pytest.mark.parametrize("index", ["new", "kept"])
def test_neither_the_order_of_kinds_nor_the_index_matters(table, chosen, generator, index):
    """Partners side by side; activations are those of the table's rows, whatever the rows are called."""
    acts, half = planted(table, generator), len(table) // 2
    order = [i + side for i in range(half) for side in (half, 0)]
    mixed = table.iloc[order].reset_index(drop=index == "new")
    mixed = mixed if index == "new" else mixed.set_index("index")
    expected = specificity(acts, table, chosen, Generator().manual_seed(1))
    assert specificity(acts[order], mixed, chosen, Generator().manual_seed(1)).equals(expected)


@pytest.mark.parametrize("change", ["order", "missing", "another"])
def test_sentences_that_are_not_partners_are_refused(table, chosen, generator, change):
    last = len(table) - 1
    broken = {
        "order": lambda: table.iloc[[*range(last - 1), last, last - 1]],
        "missing": lambda: table.iloc[:last],
        "another": lambda: table.assign(id=[*table["id"][:-1], "calm-matched-99"]),
    }[change]().reset_index(drop=True)
    with pytest.raises(ValueError, match="the key-word sentences and the matched ones are not partners"):
        specificity(noise(broken, 5, generator), broken, chosen, generator)


def test_the_interval_of_a_difference_covers_it():
    """Two groups of 30 whose means differ by 1, in 95 of 100 samples but for chance and the bootstrap's optimism."""
    covered = 0
    for seed in range(200):
        generator = Generator().manual_seed(seed)
        groups = torch.randn(2, 30, generator=generator)
        low, high = difference_interval(groups[0] + 1, groups[1], generator, 0.95)
        covered += low <= 1 <= high
    assert 0.88 < covered / 200 < 0.99


def test_the_interval_of_a_difference_is_as_wide_as_both_groups_make_it(generator):
    fixed, loose = torch.zeros(1), torch.randn(50, generator=generator)
    alone = difference_interval(loose, fixed, generator, 0.9)
    both = difference_interval(loose, loose, generator, 0.9)
    assert (both[1] - both[0]) / (alone[1] - alone[0]) == pytest.approx(2**0.5, rel=0.2)


# What else a feature fires on


KINDS = ["key word", "matched", "synonym", "implicit", "mention", "other sense"]
READS = {
    "concept": ["key word", "synonym", "implicit"],
    "emotion word": ["key word", "synonym", "mention"],
    "word": ["key word", "mention", "implicit"],
    "unclear": ["key word"],
}


@pytest.fixture
def kinds() -> pd.DataFrame:
    return pd.DataFrame(
        [(e, kind) for e in EMOTIONS for kind in KINDS for _ in range(EACH)], columns=["emotion", "kind"]
    )


def test_a_feature_is_read_by_the_kinds_that_were_planted(kinds, generator):
    """Implicit sentences count by their strongest token, all others by their word."""
    chosen = pd.DataFrame({"emotion": "sad", "feature": range(4)})
    at_word, anywhere = noise(kinds[:EACH], 4, generator).repeat(2, len(kinds) // EACH, 1)
    for feature, fires in enumerate(READS.values()):
        for kind in fires:
            rows = torch.tensor(((kinds.emotion == "sad") & (kinds.kind == kind)).tolist())
            (anywhere if kind == "implicit" else at_word)[rows, feature] += 4
    found = by_kind(at_word, anywhere, kinds, chosen, generator)
    assert found.columns.tolist() == ["emotion", "feature", "kind", "activation", "low", "high", "relative"]
    assert found.kind.tolist() == KINDS * 4
    read = reading(found)
    assert read["fires on"].tolist() == [", ".join(k for k in KINDS if k in fires) for fires in READS.values()]
    assert read["reads"].tolist() == list(READS)


def test_activation_by_kind_is_a_mean_beside_that_on_the_key_word(kinds, generator):
    at_word, anywhere = noise(kinds, 2, generator), noise(kinds, 2, generator) + 1
    found = by_kind(at_word, anywhere, kinds, pd.DataFrame({"emotion": ["calm"], "feature": [1]}), generator)
    for row in found.itertuples():
        values = (anywhere if row.kind == "implicit" else at_word)[:, 1]
        mean = pd.Series(values)[kinds.emotion == "calm"].groupby(kinds["kind"]).mean()
        assert row.activation == pytest.approx(mean[row.kind], abs=1e-5)
        assert row.relative == pytest.approx(mean[row.kind] / mean["key word"], abs=1e-5)
        matched = pd.Series((anywhere if row.kind == "implicit" else at_word)[:, 1])[
            (kinds.emotion == "calm") & (kinds.kind == "matched")
        ]
        assert row.low <= row.activation - matched.mean() <= row.high


def test_a_feature_that_is_silent_on_its_key_word_has_no_relative_activation(kinds, generator):
    silent = torch.zeros(len(kinds), 1)
    found = by_kind(silent, silent, kinds, pd.DataFrame({"emotion": ["calm"], "feature": [0]}), generator)
    assert (found.activation == 0).all() and not found.relative.gt(0).any()
    assert reading(found)["reads"].tolist() == ["unclear"]
