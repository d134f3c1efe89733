"""Conversations that are typed in, and those in which the model gives the answers."""

from dataclasses import replace

import pytest

from helpers import emotions
from helpers.recordings import recorded
from helpers.scenarios import STREAMS, TEMPLATE, Turn, answered, load, typed

TALK = "Anna: You are late.\n\n  Tom :  The train stood at 10:30.  \nAnna: It always does.\n"
REFERENCES = ("angry", "calm")


# Typed


def test_a_typed_talk_is_one_conversation_with_the_lines_as_its_turns():
    scenario = typed(TALK, REFERENCES)
    [conversation] = scenario.conversations
    assert conversation.turns == (
        Turn("Anna", "user", "You are late.", 0, 1),
        Turn("Tom", "assistant", "The train stood at 10:30.", 0, 3),
        Turn("Anna", "user", "It always does.", 0, 4),
    )
    assert scenario.references == REFERENCES
    assert (scenario.template, scenario.positions, scenario.streams) == (TEMPLATE, "every token", STREAMS)


def test_who_speaks_first_is_the_user_and_everybody_else_the_assistant():
    turns = typed("Tom: a\nTom: b\nAnna: c\nEve: d\nTom: e", REFERENCES).conversations[0].turns
    assert [turn.role for turn in turns] == ["user", "user", "assistant", "assistant", "user"]


def test_a_typed_talk_is_read_like_one_from_a_file(model):
    [found] = recorded(model, typed(TALK, REFERENCES))
    assert "".join(found.tokens["token"][1:]) == (
        "\nAnna: You are late.\nTom: The train stood at 10:30.\nAnna: It always does."
    )
    assert found.turns["text"].tolist() == ["You are late.", "The train stood at 10:30.", "It always does."]


def test_braces_in_a_talk_are_text():
    [found] = typed("{text}: {speaker} {0}", REFERENCES).conversations[0].turns
    assert (found.speaker, found.text) == ("{text}", "{speaker} {0}")


@pytest.mark.parametrize("line", ["You are late.", ": You are late.", "Anna:", "Anna:   "])
def test_a_line_without_speaker_or_text_is_named(line):
    with pytest.raises(ValueError) as refusal:
        typed(f"Anna: Hello.\n\n{line}\nTom: Yes.", REFERENCES)
    assert str(refusal.value) == "line 3: a turn needs its speaker and a text, as in 'Anna: You are late.'"


@pytest.mark.parametrize("talk", ["", " \n\n\t"])
def test_a_talk_without_turns_is_refused(talk):
    with pytest.raises(ValueError, match=r"there is no turn to read: write lines such as 'Anna: You are late\.'"):
        typed(talk, REFERENCES)


def test_an_unknown_reference_is_answered_with_the_nearest():
    with pytest.raises(ValueError) as refusal:
        typed(TALK, ("calm", "angri"))
    known = ", ".join(emotions.names())
    assert str(refusal.value) == f"references: 'angri' is unknown. Did you mean 'angry'? Known: {known}."


@pytest.mark.parametrize(("references", "got"), [((), "none"), (("calm",), "calm"), (("calm", "calm"), "calm, calm")])
def test_two_different_references_are_needed(references, got):
    with pytest.raises(ValueError, match=f"^references: two or more different emotions are needed, got {got}$"):
        typed(TALK, references)


# Answered


def test_the_model_writes_every_turn_of_the_assistant_and_no_other():
    scenario = load("argument")
    found = answered(scenario, 7)
    assert replace(found, conversations=()) == replace(scenario, conversations=())
    for given, own in zip(scenario.conversations, found.conversations, strict=True):
        assert given.name == own.name
        for was, turn in zip(given.turns, own.turns, strict=True):
            assert turn == (was if was.role == "user" else replace(was, text=None, write=7))
    assert any(turn.text is None for turn in found.conversations[-1].turns)


def test_it_writes_a_token_at_least():
    with pytest.raises(ValueError, match="a turn that the model writes needs 1 token or more, got 0"):
        answered(load("argument"), 0)
