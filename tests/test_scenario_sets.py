"""Sets of conversations made from those of a file: halves, chains that fill a context, and exchanged turns."""

from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import pytest

from helpers.scenarios import (
    STREAMS,
    TEMPLATE,
    Conversation,
    Scenario,
    Turn,
    calibration,
    chained,
    check_fits,
    control,
    load,
    shipped,
    spliced,
    turn_ids,
    with_written,
)

SIZES = pytest.mark.parametrize(("count", "turns"), [(3, 1), (3, 2), (3, 12), (4, 7), (5, 4), (8, 12)])


def grid(count: int, turns: int) -> Scenario:
    """Conversations whose texts say where they are from: "0 1" is the turn behind the first one of conversation 0."""
    talks = []
    for own in range(count):
        speakers = ((f"Anna{own}", "user"), (f"Tom{own}", "assistant"))
        said = [Turn(*speakers[t % 2], f"{own} {t}", 0, 100 * own + t) for t in range(turns)]
        talks.append(Conversation(f"talk {own}", tuple(said)))
    references = ("happy", "sad")
    return Scenario("x", "x", "x", TEMPLATE, "every token", STREAMS, references, tuple(talks), Path("a/walk.yaml"))


def origins(conversation: Conversation) -> list[tuple[int, int]]:
    """Which conversation each turn is from, and which turn it was there."""
    return [tuple(int(number) for number in turn.text.split()) for turn in conversation.turns]


def with_turns(scenario: Scenario, own: int, *turns: Turn) -> Scenario:
    talks = [*scenario.conversations]
    talks[own] = replace(talks[own], turns=turns)
    return replace(scenario, conversations=tuple(talks))


# Halves


def test_calibration_and_control_are_every_other_neutral_conversation():
    neutral = load("neutral")
    halves = calibration().conversations, control().conversations
    assert tuple(chain(*zip(*halves))) == neutral.conversations
    for half in (calibration(), control()):
        assert replace(half, conversations=()) == replace(neutral, conversations=())


def test_calibration_and_control_share_no_turn():
    said = [{turn.text for talk in half.conversations for turn in talk.turns} for half in (calibration(), control())]
    assert all(said) and not said[0] & said[1]


# Chains


@pytest.mark.parametrize("most", [64, 40, 1000])
def test_a_chain_is_ones_own_turns_and_the_others_behind_as_many_as_fit(model, most):
    scenario = grid(4, 5)
    found = chained(model, scenario, most)
    assert replace(found, conversations=()) == replace(scenario, conversations=())
    limit = min(most, model.cfg.n_ctx)
    for own, (given, talk) in enumerate(zip(scenario.conversations, found.conversations, strict=True)):
        wanted = [(other % 4, turn) for other in range(own, own + 4) for turn in range(5)]
        count = len(talk.turns)
        assert talk.name == given.name and origins(talk) == wanted[:count] and 0 < count < len(wanted)
        following = scenario.conversations[wanted[count][0]].turns[wanted[count][1]]
        taken, more = (
            sum(len(ids) for ids in turn_ids(model, found, replace(talk, turns=turns)))
            for turns in (talk.turns, (*talk.turns, following))
        )
        assert taken <= limit < more
    check_fits(model, found)


def test_position_0_takes_one_of_the_tokens(model):
    scenario = grid(3, 4)
    first, second, *_ = turn_ids(model, scenario, scenario.conversations[0])
    for most, count in ((len(first) + len(second), 2), (len(first) + len(second) - 1, 1), (len(first), 1)):
        assert len(chained(model, scenario, most).conversations[0].turns) == count


def test_every_conversation_comes_first_once_and_goes_round_where_there_is_room(model):
    """All of them, from each in turn, and nothing twice."""
    scenario = grid(3, 1)
    found = [origins(talk) for talk in chained(model, scenario, 64).conversations]
    assert found == [[(0, 0), (1, 0), (2, 0)], [(1, 0), (2, 0), (0, 0)], [(2, 0), (0, 0), (1, 0)]]


def test_what_the_model_may_write_takes_room_in_a_chain(model):
    scenario = grid(3, 4)
    by_model = replace(scenario, conversations=tuple(with_written(t, tokens=9) for t in scenario.conversations))
    found = chained(model, by_model, 64)
    check_fits(model, found)
    assert all(turn.write for talk in found.conversations for turn in talk.turns[1::2])
    assert all(len(talk.turns) > 2 for talk in found.conversations)


def test_a_chain_without_room_for_its_first_turn_is_refused(model):
    scenario = grid(3, 4)
    first = len(turn_ids(model, scenario, scenario.conversations[0])[0])
    chained(model, scenario, first)
    with pytest.raises(
        ValueError, match=f"walk.yaml: not even the first turn of 'talk 0' fits into {first - 1} tokens"
    ):
        chained(model, scenario, first - 1)


# Exchanged turns


@SIZES
def test_after_the_first_turn_none_is_ones_own_and_neighbours_are_from_two_conversations(count, turns):
    for own, talk in enumerate(spliced(grid(count, turns)).conversations):
        donors = [donor for donor, _ in origins(talk)]
        assert donors[0] == own
        assert own not in donors[1:]
        assert all(before != after for before, after in pairwise(donors))


@SIZES
def test_places_roles_and_names_stay_ones_own(count, turns):
    scenario = grid(count, turns)
    found = spliced(scenario)
    assert replace(found, conversations=()) == replace(scenario, conversations=())
    for given, talk in zip(scenario.conversations, found.conversations, strict=True):
        assert talk.name == given.name
        assert [place for _, place in origins(talk)] == [*range(turns)]
        assert [(t.role, t.speaker) for t in talk.turns] == [(t.role, t.speaker) for t in given.turns]


@SIZES
def test_every_turn_is_said_once_as_before(count, turns):
    """So what is said at a place, over all conversations, stays the same."""
    scenario = grid(count, turns)
    for place in range(turns):
        before, after = (
            Counter(talk.turns[place].text for talk in s.conversations) for s in (scenario, spliced(scenario))
        )
        assert before == after


def test_all_the_others_give_in_turn():
    for own, talk in enumerate(spliced(grid(5, 9)).conversations):
        assert Counter(donor for donor, _ in origins(talk)) == {i: 1 if i == own else 2 for i in range(5)}


def test_a_turn_keeps_its_text_line_and_what_may_be_written():
    """Of the conversation that it is from; and the scenario that was given stays as it was."""
    scenario = grid(3, 4)
    turns = scenario.conversations[1].turns
    by_model = replace(turns[1], text=None, write=7)
    scenario = with_turns(scenario, 1, turns[0], by_model, *turns[2:])
    kept = [talk.turns for talk in scenario.conversations]
    found = spliced(scenario).conversations
    assert found[0].turns[1] == replace(by_model, speaker="Tom0")
    assert [turn.line for turn in found[0].turns] == [0, 101, 202, 103]
    assert [talk.turns for talk in scenario.conversations] == kept


def test_other_roles_or_numbers_of_turns_cannot_be_spliced():
    scenario = grid(3, 4)
    turns = scenario.conversations[2].turns
    match = "walk.yaml: conversations with other roles or numbers of turns cannot be spliced"
    for others in (turns[:3], (turns[1], turns[0], *turns[2:]), (*turns, turns[0])):
        with pytest.raises(ValueError, match=match):
            spliced(with_turns(scenario, 2, *others))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_splicing_needs_three_conversations(count):
    with pytest.raises(ValueError, match=f"walk.yaml: splicing needs three conversations, got {count}"):
        spliced(grid(count, 4))


def test_every_shipped_scenario_can_be_spliced():
    """And nobody hears an answer from the conversation that was opened."""
    for scenario in [*shipped(), calibration(), control()]:
        for given, talk in zip(scenario.conversations, spliced(scenario).conversations, strict=True):
            assert talk.turns[0] == given.turns[0]
            assert not {turn.text for turn in talk.turns[1:]} & {turn.text for turn in given.turns}
            assert [turn.speaker for turn in talk.turns] == [turn.speaker for turn in given.turns]
