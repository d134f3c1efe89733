"""Tables in one order, stacked as they stand; seeds that emotions share; what is refused."""

from collections import Counter

import pandas as pd
import pytest
import torch
from torch import Tensor

from helpers.emotions import (
    names,
    naming,
    neutral_openings,
    neutral_situations,
    norms,
    openings,
    situations,
    stacked,
    synonyms,
)

SPLITS = sorted(set(situations()["split"]))
REFUSED = "the table must hold every emotion of every topic in order, as `situations` does"


def numbered(table: pd.DataFrame, d_model: int = 3) -> Tensor:
    """Activations that tell which text they belong to."""
    return torch.arange(len(table) * d_model, dtype=torch.float32).view(len(table), d_model)


# Emotions


def test_norms_names_and_synonyms_have_the_same_emotions_in_order():
    assert names() == norms()["emotion"].tolist() == list(synonyms())
    assert len(set(names())) == len(names()) > 2
    assert all(name in synonyms()[name] for name in names())


def test_a_changed_copy_of_the_norms_changes_nothing():
    before, changed = norms().copy(), norms()
    changed["valence"] = 0.0
    changed.loc[0, "emotion"] = "nothing"
    pd.testing.assert_frame_equal(norms(), before)


# Situations


def test_splits_share_out_situations_and_their_topics():
    parts = [situations(split) for split in SPLITS]
    assert sorted(text for part in parts for text in part["text"]) == sorted(situations()["text"])
    assert sum(part["topic"].nunique() for part in parts) == situations()["topic"].nunique()
    for split, part in zip(SPLITS, parts):
        assert set(part["split"]) == {split}
        assert part.index.tolist() == list(range(len(part)))


@pytest.mark.parametrize("split", [None, *SPLITS])
def test_situations_go_through_the_emotions_topic_after_topic(split):
    table = situations(split)
    topics = table["topic"].unique()
    assert table["emotion"].tolist() == names() * len(topics)
    assert table["topic"].tolist() == [topic for topic in topics for _ in names()]


@pytest.mark.parametrize("split", [None, *SPLITS])
def test_two_neutral_situations_per_topic_and_none_among_the_emotions(split):
    found = neutral_situations(split)
    assert len(found) == len(set(found)) == 2 * situations(split)["topic"].nunique()
    assert not set(found) & set(situations(split)["text"])


@pytest.mark.parametrize("read", [situations, neutral_situations])
def test_an_unknown_split_is_refused_with_those_there_are(read):
    with pytest.raises(ValueError, match=rf"situations.csv has no split 'dev', only {', '.join(SPLITS)}"):
        read("dev")


# Openings


@pytest.mark.parametrize("samples", [1, 3])
def test_openings_go_through_the_emotions_topic_after_topic(samples):
    table = openings(samples)
    topics = table["topic"].unique()
    assert table["emotion"].tolist() == [name for name in names() for _ in range(samples)] * len(topics)
    assert table["topic"].tolist() == [topic for topic in topics for _ in range(samples * len(names()))]
    assert set(Counter(table["text"]).values()) == {samples}


def test_openings_of_a_topic_differ_by_the_emotions_name_alone():
    for _, part in openings().groupby("topic"):
        before, after = part["text"].iloc[0].split(names()[0])
        assert part["text"].tolist() == [f"{before}{name}{after}" for name in names()]


@pytest.mark.parametrize("samples", [1, 3])
def test_a_seed_belongs_to_a_topic_and_sample_whatever_the_emotion(samples):
    table, neutral = openings(samples), neutral_openings(samples)
    seeds = {(topic, name): part["seed"].tolist() for (topic, name), part in table.groupby(["topic", "emotion"])}
    for topic, part in neutral.groupby("topic"):
        assert part["seed"].nunique() == samples
        assert all(seeds[topic, name] == part["seed"].tolist() for name in names())
    assert neutral["seed"].is_unique and set(neutral["seed"]) == set(table["seed"])


def test_neutral_openings_are_of_the_same_topics_and_name_no_emotion():
    table = neutral_openings(2)
    assert table["topic"].unique().tolist() == openings()["topic"].unique().tolist()
    assert set(table["emotion"]) == {"neutral"}
    assert list(Counter(table["text"]).values()) == [2] * table["topic"].nunique()
    assert not any("{" in text for text in [*table["text"], *openings()["text"]])


def test_the_topics_of_openings_are_those_of_the_training_situations():
    assert set(openings()["topic"]) <= set(situations("train")["topic"])


# Stacked


@pytest.mark.parametrize("split", SPLITS)
def test_each_activation_lands_at_its_topic_and_emotion(split):
    table = situations(split)
    acts = numbered(table)
    found, topics = stacked(acts, table), table["topic"].unique().tolist()
    assert found.shape == (len(topics), len(names()), 3)
    for row, (topic, emotion) in enumerate(zip(table["topic"], table["emotion"])):
        assert torch.equal(found[topics.index(topic), names().index(emotion)], acts[row])


def test_samples_of_a_topic_and_emotion_are_averaged():
    table = openings(3)
    acts = numbered(table)
    found, topics = stacked(acts, table), table["topic"].unique().tolist()
    for (topic, emotion), rows in table.groupby(["topic", "emotion"]).indices.items():
        assert torch.equal(found[topics.index(topic), names().index(emotion)], acts[rows].mean(0))


def test_depths_are_kept(generator):
    table = openings(2)
    acts = torch.randn(len(table), 4, 5, generator=generator)
    found = stacked(acts, table)
    assert found.shape[2:] == (4, 5)
    for depth in range(4):
        assert torch.equal(found[:, :, depth], stacked(acts[:, depth], table))


def test_row_labels_of_the_table_do_not_matter():
    table = situations(SPLITS[0])
    assert torch.equal(stacked(numbered(table), table.set_index("text")), stacked(numbered(table), table))


BROKEN = {
    "two rows swapped": lambda table: table.iloc[[1, 0, *range(2, len(table))]],
    "backwards": lambda table: table.iloc[::-1],
    "the last emotion missing": lambda table: table.iloc[:-1],
    "the first emotion missing": lambda table: table.iloc[1:],
    "an emotion missing everywhere": lambda table: table[table["emotion"] != names()[3]],
    "one text twice": lambda table: table.iloc[[0, *range(len(table))]],
    "every table row again at the end": lambda table: pd.concat([table, table]),
    "emotions in turn": lambda table: table.sort_values("emotion", kind="stable"),
    "an emotion too many": lambda table: pd.concat([table, table.iloc[-1:].assign(emotion="neutral")]),
    "no rows": lambda table: table.iloc[:0],
}


@pytest.mark.parametrize("broken", [pytest.param(change, id=name) for name, change in BROKEN.items()])
def test_a_table_in_another_order_or_with_gaps_is_refused(broken):
    table = broken(situations(SPLITS[0]))
    with pytest.raises(ValueError, match=REFUSED):
        stacked(numbered(table), table)


def test_samples_in_turn_are_refused():
    """The same openings, but the second sample of all after the first of all."""
    table = pd.concat([openings(), openings()])
    with pytest.raises(ValueError, match=REFUSED):
        stacked(numbered(table), table)


def test_neutral_texts_are_no_emotions():
    with pytest.raises(ValueError, match=REFUSED):
        stacked(numbered(neutral_openings()), neutral_openings())


def test_a_vector_names_its_emotion_by_a_word_of_its_own_among_the_raised_tokens():
    rows = [(0, "raised", " Joyful"), (1, "lowered", " excited"), (2, "raised", " happy"), (3, "raised", "amuse")]
    found = naming(pd.DataFrame(rows, columns=["depth", "side", "token"]))
    assert list(found) == names()
    assert [name for name, hit in found.items() if hit] == ["happy", "amused"]
