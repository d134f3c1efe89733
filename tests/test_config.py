"""Grids: what a reduced one leaves of prompts and strengths, and that it says so."""

from collections.abc import Iterator

import pandas as pd
import pytest

from helpers import claims, config, emotions, models, plots, prompts, scenarios
from helpers.config import GRIDS, grid, thinned

STRENGTHS = [-1, -0.5, -0.2, -0.1, 0, 0.1, 0.2, 0.5, 1]


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> Iterator[config.Config]:
    """The reduced grid, everywhere."""
    for module in (config, claims, models, plots):
        monkeypatch.setattr(module, "CFG", GRIDS["reduced"])
    yield GRIDS["reduced"]


def test_the_grid_is_that_of_the_environment_or_full(monkeypatch):
    monkeypatch.delenv("GRID", raising=False)
    assert grid() is GRIDS["full"]
    monkeypatch.setenv("GRID", "")
    assert grid() is GRIDS["full"]
    monkeypatch.setenv("GRID", "reduced")
    assert grid() is GRIDS["reduced"]


def test_an_unknown_grid_is_refused_by_name():
    with pytest.raises(ValueError, match="Unknown grid 'small': GRID is one of full, reduced"):
        grid("small")


def test_the_full_grid_leaves_everything_as_it_is():
    assert thinned(STRENGTHS) == STRENGTHS
    table = pd.read_csv(config.DATA / "prompts" / "fear_calm.csv", dtype=str)
    assert prompts.pairs().equals(table)
    assert not GRIDS["full"].label


def test_a_thinned_list_keeps_its_ends_its_order_and_what_is_named(reduced):
    assert thinned(STRENGTHS, keep=[0.5]) == [-1, 0, 0.5, 1]
    assert thinned(STRENGTHS) == [-1, 0, 1]
    assert thinned([3]) == [3]
    assert thinned([]) == []


@pytest.mark.parametrize("name", ["fear_calm", "reversible", "numeric", "one_word", "confounds"])
def test_thinned_pairs_are_whole_and_every_split_and_kind_keeps_some(reduced, monkeypatch, name):
    some = prompts.pairs(name)
    monkeypatch.undo()
    every = prompts.pairs(name)
    assert len(some) < len(every) / 2
    assert some.merge(every).equals(some)
    by = [column for column in ("split", "confound") if column in every]
    assert (some.groupby(by).size() >= 3).all()
    assert set(map(tuple, some[by].to_numpy())) == set(map(tuple, every[by].to_numpy()))


def test_a_pair_without_a_confound_is_not_lost(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "pair,split,topic,emotional,neutral,confound\na,train,x,One.,Two.,\nb,train,x,Three.,Four.,length\n"
    )
    assert prompts.pairs(path)["pair"].tolist() == ["a", "b"]


def test_thinned_situations_have_every_emotion_on_every_topic_and_openings_the_same_topics(reduced):
    for split in ("train", "validation", "test"):
        table = emotions.situations(split)
        topics = table["topic"].unique()
        assert 2 <= len(topics) < 10
        assert table["emotion"].tolist() == emotions.names() * len(topics)
        assert len(emotions.neutral_situations(split)) == 2 * len(topics)
    assert emotions.openings()["topic"].unique().tolist() == emotions.situations("train")["topic"].unique().tolist()


def test_thinned_key_words_stay_paired_with_their_matched_sentences(reduced):
    for split in ("find", "test"):
        both = [prompts.key_words(kind, split) for kind in ("key word", "matched")]
        assert both[0]["id"].str[-2:].tolist() == both[1]["id"].str[-2:].tolist()
        assert both[0]["emotion"].tolist() == both[1]["emotion"].tolist()
        assert both[0].groupby("emotion").size().nunique() == 1


def test_thinned_dilemmas_beginnings_and_texts_keep_every_split(reduced):
    assert prompts.dilemmas()["split"].value_counts().to_dict() == {"test": 5, "validation": 3}
    assert prompts.beginnings("story")["split"].value_counts().to_dict() == {"test": 5, "validation": 3}
    assert len(prompts.beginnings("today")) == 3
    assert len(prompts.neutral_texts()) == 9
    assert len(prompts.passages()) == 101


def test_thinned_scenarios_can_still_be_spliced(reduced):
    for scenario in scenarios.shipped():
        assert 3 <= len(scenarios.spliced(scenario).conversations) < 8
    assert len(scenarios.control().conversations) >= 3


def test_a_reduced_grid_says_so(reduced, model, tmp_path):
    assert models.description(model).endswith(", reduced grid")
    claim = claims.published()["claim"].iloc[0]
    claims.record(tmp_path, "some model", claim, "holds", 1.0, note="a note")
    assert claims.recorded(tmp_path)["note"].tolist() == ["a note; reduced grid"]
    figure = plots.plt.figure()
    plots.written(figure, pd.DataFrame({"x": [1]}), tmp_path / "some", "some model")
    assert [text.get_text() for text in figure.texts] == ["model: some model, reduced grid"]
    plots.plt.close(figure)
