"""Scenario files: what is read from a good one, what is refused and where, and the tokens of its turns."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from helpers import emotions
from helpers.config import DATA
from helpers.prompts import first_token
from helpers.scenarios import Conversation, Scenario, Turn, check_fits, load, shipped, turn_ids, with_written

GOOD = r"""title: A walk
about: Two people speak of a walk.
format: "\n{speaker} - {text}"
record:
  positions: end of turn
  streams: [after mlp]
references: [happy, calm,
             sad]
variants:
  - name: to the mill
    speakers: {Anna: user, Tom: assistant}
    turns:
      - Anna: "The mill is open."
      - Tom: "I shall bring the cart."

      - Anna: "Bring the grey horse too."
      - Tom: {write: 24}
  - name: to the sea
    speakers: {Ben: assistant, No: user}
    turns:
      - No: "The tide is out."
      - Ben: {write: 5}
"""
FOUR = {"argument": 8, "bad_news": 8, "joyful": 8, "neutral": 16}


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """Writes a file `walk.yaml` that holds this."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "walk.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def good(written: Callable) -> Scenario:
    return load(written(GOOD))


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def of_texts(*texts: str, template: str = "\n{speaker}: {text}") -> Scenario:
    """A scenario with one conversation of these turns, each speaker in turn; an empty text is the model's to write."""
    speakers = [("Anna", "user"), ("Tom", "assistant")]
    turns = [Turn(*speakers[i % 2], text or None, 0 if text else 3, 10 + i) for i, text in enumerate(texts)]
    talk = Conversation("talk", tuple(turns))
    streams = ("after mlp",)
    return Scenario("x", "x", "x", template, "every token", streams, ("happy", "sad"), (talk,), Path("some/walk.yaml"))


def joined(lists: list[list[int]]) -> list[int]:
    return [*chain.from_iterable(lists)]


def talk_of(words: int, write: int = 0) -> Scenario:
    """Two turns: as many words of one token, and then as many tokens for the model to write, or one word."""
    scenario = of_texts("so" + " so" * (words - 1), "" if write else "so")
    [talk] = scenario.conversations
    last = replace(talk.turns[1], write=write)
    return replace(scenario, conversations=(replace(talk, turns=(talk.turns[0], last)),))


# A good file


def test_a_file_is_read_as_it_is_written(good, tmp_path):
    assert (good.name, good.title, good.about) == ("walk", "A walk", "Two people speak of a walk.")
    assert good.template == "\n{speaker} - {text}"
    assert (good.positions, good.streams) == ("end of turn", ("after mlp",))
    assert good.references == ("happy", "calm", "sad")
    assert good.path == tmp_path / "walk.yaml"
    mill, sea = good.conversations
    assert mill == Conversation(
        "to the mill",
        (
            Turn("Anna", "user", "The mill is open.", 0, 13),
            Turn("Tom", "assistant", "I shall bring the cart.", 0, 14),
            Turn("Anna", "user", "Bring the grey horse too.", 0, 16),
            Turn("Tom", "assistant", None, 24, 17),
        ),
    )
    said = Turn("No", "user", "The tide is out.", 0, 21)  # YAML's no is a name here
    assert sea == Conversation("to the sea", (said, Turn("Ben", "assistant", None, 5, 22)))


@pytest.mark.parametrize("record", ["", "record: {}\n"])
def test_what_a_file_need_not_say_has_its_defaults(written, record):
    cut = re.sub(r"format.*\n(?=references)", record, GOOD, flags=re.DOTALL)
    scenario = load(written(cut))
    assert scenario.template == "\n{speaker}: {text}"
    assert (scenario.positions, scenario.streams) == ("every token", ("after mlp", "after attention"))


@pytest.mark.parametrize(
    "same",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.replace("\n", "\r\n").encode(),
        b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode(),
        b"# a comment beside it" + GOOD.encode()[GOOD.index("\n") :].replace(b"about", b"title: A walk\nabout", 1),
    ],
    ids=["BOM", "CRLF", "BOM and CRLF", "comment"],
)
def test_marks_and_line_ends_of_other_editors_change_nothing(written, good, same):
    other = load(written(same))
    shift = other.conversations[0].turns[0].line - 13
    assert shift in (0, 1)
    moved = [
        replace(talk, turns=tuple(replace(t, line=t.line - shift) for t in talk.turns)) for talk in other.conversations
    ]
    assert replace(other, conversations=tuple(moved)) == good


def test_a_part_may_be_named_once_and_used_again(written):
    text = changed("speakers: {Anna", "speakers: &two {Anna").replace("{Ben: assistant, No: user}", "*two")
    text = text.replace("- No:", "- Anna:").replace("- Ben:", "- Tom:")
    assert [turn.speaker for turn in load(written(text)).conversations[1].turns] == ["Anna", "Tom"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.lists(st.text().filter(str.strip), min_size=1, max_size=4), st.text().filter(str.strip))
@example(["yes", "42", "~", "2020-01-01", "=", "<<", "- a: b # c", "'\"\\", " a\u2028b\x85c\r\n\td\x00\ufeff "], "No")
@example(["null", "!!python/none x", "&a *a", "{write: 24}", "%YAML 9", "---", "...", "\U0001f631"], "{text}")
def test_every_text_that_says_something_comes_back_as_it_was(tmp_path, texts, name):
    turns = [{name: text} for text in texts]
    talk = {"name": name, "speakers": {name: "user", f"{name}'s friend": "assistant"}, "turns": turns}
    content = {"title": texts[0], "about": texts[-1], "references": ["sad", "happy"], "variants": [talk]}
    path = tmp_path / "walk.yaml"
    for style in (None, '"'):  # as PyYAML likes it, in escapes; and in double quotes, as typed
        path.write_text(
            yaml.safe_dump(content, default_style=style, allow_unicode=style is not None), encoding="utf-8", newline=""
        )
        scenario = load(path)
        [conversation] = scenario.conversations
        assert [turn.text for turn in conversation.turns] == texts
        assert {turn.speaker for turn in conversation.turns} == {conversation.name} == {name}
        assert (scenario.title, scenario.about) == (texts[0], texts[-1])


# What is refused

EMOTIONS = "Known: happy, excited, proud, .*, curious"
REFUSED = [
    # the file
    ("", 1, "the file is empty"),
    ("# nothing\n\n", 1, "the file is empty"),
    ("just words", 1, r"a scenario must be a mapping, got a plain text \('just words'\)"),
    ("\n- a\n- b", 2, "a scenario must be a mapping, got a list"),
    ("!!python/object:os.stat_result {}", 1, "a scenario must be a mapping, got something with the tag '.*python.*'"),
    (
        changed("  - name: to the sea", "  name: to the sea"),
        18,
        "not YAML: while parsing a block collection, .*begun in line 10",
    ),
    (changed("cart.", 'cart." he said'), 14, "not YAML: while parsing a block mapping, expected <block end>"),
    (changed('open."', "open."), 14, "not YAML: while parsing a block mapping, .*begun in line 13"),
    (changed('out."', "out."), 23, r"not YAML: while scanning a quoted scalar, found unexpected end.*begun in line 21"),
    (changed("A walk", "A walk: long"), 1, "not YAML: mapping values are not allowed here"),
    (changed("A walk", "A walk\n\tof two"), 2, r"not YAML: .*found character '\\t'"),
    (changed("A walk", "*walk"), 1, "not YAML: found undefined alias 'walk'"),
    (changed("A walk", r'"\UFFFFFFFF"'), 1, "not YAML: "),
    (GOOD + "---\ntitle: B\n", 23, "not YAML: expected a single document in the stream, but found another document"),
    (changed("mill is", "mill\x07is"), 13, r"YAML has no place for the character '\\x07'"),
    (
        changed("cart", "\U0001f434\x00").encode().replace(b"\n", b"\r\n"),
        14,
        r"YAML has no place for the character '\\x00'",
    ),
    (
        changed("cart", "café").encode("latin-1"),
        14,
        r"not UTF-8 \(invalid continuation byte\). Save the file as UTF-8.",
    ),
    (GOOD.encode("utf-16"), 1, r"not UTF-8 \(invalid start byte\)"),
    ("\n" + "[" * 3000, 2, "not YAML: maximum recursion depth exceeded"),
    # keys
    (changed("title", "titel"), 1, "a scenario has no key 'titel'. Did you mean 'title'. Known: title, .*, record."),
    (changed("record:", "records:"), 4, "a scenario has no key 'records'. Did you mean 'record'"),
    (
        changed("positions", "position"),
        5,
        "record has no key 'position'. Did you mean 'positions'. Known: positions, str",
    ),
    (changed("name: to the sea", "called: to the sea"), 18, "a variant has no key 'called'. Did you mean 'name'"),
    (
        changed("{write: 5}", "{writes: 5}"),
        22,
        "a turn that the model writes has no key 'writes'. Did you mean 'write'",
    ),
    (changed("{write: 5}", "{write: 5, seed: 3}"), 22, "a turn that the model writes has no key 'seed'"),
    (changed("about: Two people speak of a walk.\n", ""), 1, "a scenario lacks the key 'about'"),
    (GOOD[: GOOD.index("variants")], 1, "a scenario lacks the key 'variants'"),
    (changed("    speakers: {Ben: assistant, No: user}\n", ""), 18, "a variant lacks the key 'speakers'"),
    (changed("{write: 5}", "{}"), 22, "a turn that the model writes lacks the key 'write'"),
    (changed("variants", "title: B\nvariants"), 9, "a scenario has the key 'title' twice"),
    (changed("Tom: assistant", "Anna: assistant"), 11, "speakers has the key 'Anna' twice"),
    (changed('open."', 'open."\n        Anna: "Or is it?"'), 14, "a turn has the key 'Anna' twice"),
    (changed("record:", "[a, b]: c\nrecord:"), 4, "a key of a scenario must be a text, got a list"),
    (changed("Ben: assistant", "'  ': assistant"), 19, r"a key of speakers must be a text, got a plain text \('  '\)"),
    (
        changed("Ben: assistant", "!!python/none Ben: assistant"),
        19,
        "a key of speakers must be a text, got something wi",
    ),
    (changed("Ben: assistant", "<<: {A: user}, Ben: assistant"), 19, "a key of speakers must be a text, got .*merge"),
    # texts
    (changed("A walk", ""), 1, "title must be a text in double quotes, got nothing"),
    (changed("A walk", '""'), 1, r"title is empty \(''\)"),
    (changed("A walk", "1984"), 1, r"title must be a text in double quotes, got a number \('1984'\)"),
    (changed("A walk", "[a]"), 1, "title must be a text in double quotes, got a list"),
    (changed("A walk", "!!str [a]"), 1, "title must be a text in double quotes, got a plain text"),
    (
        changed("A walk", "!!binary aGk="),
        1,
        "title must be a text in double quotes, got something with the tag '.*binary'",
    ),
    (changed("Two people speak of a walk.", '"\\n "'), 2, r"about is empty \('\\n '\)"),
    (changed("to the sea", "2020-01-01"), 18, r"name must be a text in double quotes, got a date \('2020-01-01'\)"),
    (changed("to the sea", "' '"), 18, r"name is empty \(' '\)"),
    (changed("to the sea", "to the mill"), 18, "two variants have the name 'to the mill'"),
    (changed("to the sea\n", "\n      to the mill\n"), 19, "two variants have the name 'to the mill'"),
    # how it is written and recorded
    (
        changed("{speaker}", "speaker"),
        3,
        r"format must hold \{speaker\} once, \{text\} once .*got '\\nspeaker - \{text\}'",
    ),
    (changed("{text}", "text"), 3, "format must hold"),
    (changed("{text}", "{text}."), 3, "format must hold"),
    (changed("{speaker} - {text}", "{text} {speaker}"), 3, "format must hold"),
    (changed("{speaker}", "{speaker} ({role})"), 3, r"format must hold .* and no other braces"),
    (changed("{speaker}", "{speaker} {speaker}"), 3, "format must hold"),
    (changed("{speaker}", "{{{speaker}"), 3, "format must hold"),
    (changed("{speaker}", "{speaker!r}"), 3, "format must hold"),
    (changed('"\\n{speaker} - {text}"', "'\\n{speaker}: {text}'"), 3, r"a backslash and an n: \\n is a new line only"),
    (
        changed("end of turn", "each token"),
        5,
        "positions: 'each token' is unknown. Did you mean 'every token'. Known: ev",
    ),
    (changed("end of turn", "[end of turn]"), 5, "positions must be a text in double quotes, got a list"),
    (
        changed("[after mlp]", "[after mpl]"),
        6,
        "streams: 'after mpl' is unknown. Did you mean 'after mlp'. Known: after",
    ),
    (changed("[after mlp]", "after mlp"), 6, r"streams must be a list, got a plain text \('after mlp'\)"),
    (changed("[after mlp]", "[]"), 6, "streams must be 1 or more, got 0"),
    (changed("[after mlp]", "[after mlp, after mlp]"), 6, "streams: 'after mlp' comes twice"),
    (
        changed("record:\n  positions: end of turn\n  streams: [after mlp]", "record:"),
        4,
        "record must be a mapping, got no",
    ),
    # references
    (changed("sad]", "angri]"), 8, f"references: 'angri' is unknown. Did you mean 'angry'. {EMOTIONS}"),
    (changed("sad]", "Sad]"), 8, "references: 'Sad' is unknown. Did you mean 'sad'"),
    (changed("sad]", "yes]"), 8, r"references must be a text in double quotes, got a truth value \('yes'\)"),
    (changed("sad]", "happy]"), 8, "references: 'happy' comes twice"),
    (re.sub(r"\[happy[^\]]*\]", "[happy]", GOOD), 7, "references must be 2 or more, got 1"),
    (changed("[happy", "!!python/tuple [happy"), 7, "references must be a list, got something with the tag '.*tuple'"),
    (re.sub(r"\[happy[^\]]*\]", "all", GOOD), 7, r"references must be a list, got a plain text \('all'\)"),
    # variants and speakers
    (GOOD[: GOOD.index("variants")] + "variants: []", 9, "variants must be 1 or more, got 0"),
    (GOOD[: GOOD.index("variants")] + "variants:", 9, "variants must be a list, got nothing"),
    (GOOD[: GOOD.index("variants")] + "variants: &v [*v]", 9, "a variant must be a mapping, got a list"),
    (changed("{Ben: assistant, No: user}", "[Ben, No]"), 19, "speakers must be a mapping, got a list"),
    (
        changed("No: user", "No: usr"),
        19,
        "the role of 'No': 'usr' is unknown. Did you mean 'user'. Known: user, assistant",
    ),
    (
        changed("No: user", "No: assistant"),
        19,
        "speakers must be one user and one assistant, got Ben: assistant, No: ass",
    ),
    (changed(", No: user", ""), 19, "speakers must be one user and one assistant, got Ben: assistant$"),
    (
        changed(", No: user", ", No: user, Eve: user"),
        19,
        "one user and one assistant, got Ben: .*, No: user, Eve: user",
    ),
    (changed("{Ben: assistant, No: user}", "{}"), 19, "speakers must be one user and one assistant, got nobody"),
    # turns
    (re.sub(r"turns:\n      - No(.|\n)*", "turns: []", GOOD), 20, "turns must be 1 or more, got 0"),
    (re.sub(r"turns:\n      - No(.|\n)*", "turns:\n", GOOD), 20, "turns must be a list, got nothing"),
    (
        changed('Tom: "I ', '"I '),
        14,
        r"""a turn needs its speaker, as in 'Anna: "..."', got a plain text \('I shall bring""",
    ),
    (changed('- Tom: "I shall bring the cart."', "- 42"), 14, r"a turn needs its speaker, .*, got a number \('42'\)"),
    (changed('- Tom: "I shall bring the cart."', "-"), 14, "a turn needs its speaker, .*, got nothing"),
    (changed('- Tom: "I shall', '- Tim: "I shall'), 14, "unknown speaker 'Tim': the speakers are Anna and Tom"),
    (changed('- Tom: "I shall', '- Ben: "I shall'), 14, "unknown speaker 'Ben': the speakers are Anna and Tom"),
    (changed('- Tom: "I shall', '  Tom: "I shall'), 13, "a turn has one speaker, got 'Anna' and 'Tom'"),
    (changed('- Tom: "I shall bring the cart."', "- {}"), 14, "a turn has one speaker, got none"),
    (changed('"I shall bring the cart."', '""'), 14, r"Tom's turn is empty \(''\)"),
    (changed('"I shall bring the cart."', r'" \t\n\u00a0"'), 14, "Tom's turn is empty"),
    (changed('"I shall bring the cart."', ""), 14, "Tom's turn must be a text in double quotes, got nothing"),
    (
        changed('"I shall bring the cart."', "42"),
        14,
        r"Tom's turn must be a text in double quotes, got a number \('42'\)",
    ),
    (changed('"I shall bring the cart."', "4.5"), 14, r"Tom's turn must be a text .*, got a number \('4.5'\)"),
    (changed('"I shall bring the cart."', "yes"), 14, r"Tom's turn must be a text .*, got a truth value \('yes'\)"),
    (changed('"I shall bring the cart."', "[a, b]"), 14, "Tom's turn must be a text in double quotes, got a list"),
    (changed('"I shall bring the cart."', "!!python/name:os.system ''"), 14, "Tom's turn must be .* tag '.*os.system'"),
    (changed('"I shall bring the cart."', r'"\ud83d\ude31"'), 14, r"Tom's turn holds half a character \('\\ud83d'\)"),
    (changed('"I shall bring the cart."', "!!python/object:os.x {write: 3}"), 14, "writes must be a mapping, got some"),
    *(
        (changed("{write: 5}", f"{{write: {wrong}}}"), 22, f"write must be a positive whole number, got {kind}")
        for wrong, kind in {
            "0": "a number",
            "-3": "a number",
            "2.5": "a number",
            "0x10": "a number",
            "9" * 5000: "a number",
            "'24'": "a plain text",
            "many": "a plain text",
            "true": "a truth value",
            "": "nothing",
            "[24]": "a list",
            "!!int [24]": "a number",
        }.items()
    ),
]


@pytest.mark.parametrize(("content", "line", "reason"), REFUSED, ids=[reason[:40] for *_, reason in REFUSED])
def test_what_is_wrong_is_named_with_its_line(written, content, line, reason):
    with pytest.raises(ValueError) as refusal:
        load(written(content))
    assert re.search(rf"^walk\.yaml, line {line}: .*{reason}", str(refusal.value), re.DOTALL), refusal.value
    assert len(str(refusal.value)) < 500


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(st.data())
def test_a_damaged_file_is_read_or_refused_with_a_line_of_it(tmp_path, data):
    raw = GOOD.encode()
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, min(len(raw), start + 30)))
    piece = st.text("{}[]\"':-,&*!|>#%@\\\n\t x0~?=<", max_size=6).map(str.encode) | st.binary(max_size=3)
    path = tmp_path / "walk.yaml"
    path.write_bytes(raw[:start] + data.draw(piece) + raw[end:])
    try:
        assert isinstance(load(path), Scenario)
    except ValueError as refusal:
        found = re.match(r"walk\.yaml, line (\d+): ", str(refusal))
        assert found and 1 <= int(found[1]) <= GOOD.count("\n") + 8, refusal


def test_nothing_that_a_file_says_is_run(written, tmp_path):
    path = written(changed("A walk", f"!!python/object/apply:os.mkdir ['{tmp_path / 'made'}']"))
    with pytest.raises(ValueError, match="line 1: title must be a text in double quotes, got something with the tag"):
        load(path)
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("name", ["argment", "argment.yaml", Path("argment.yaml"), Path("argment"), "a/b.yml"])
def test_a_missing_file_is_answered_with_the_shipped_ones(name):
    with pytest.raises(FileNotFoundError) as missing:
        load(name)
    assert Path(name).stem in str(missing.value)
    assert str(missing.value).endswith(f"Shipped scenarios: {', '.join(s.name for s in shipped())}.")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no scenario file"):
        load(tmp_path)


# Tokens


def test_turns_joined_are_the_conversation_as_the_template_writes_it(any_model, good):
    for conversation in good.conversations:
        first, *others = turn_ids(any_model, good, conversation)
        assert first[0] == first_token(any_model) and first_token(any_model) not in joined([first[1:], *others])
        said = [
            f"\n{turn.speaker} - {turn.text}" if turn.text else f"\n{turn.speaker} -" for turn in conversation.turns
        ]
        assert [any_model.tokenizer.decode(ids) for ids in (first[1:], *others)] == said
        assert any_model.tokenizer.decode(joined([first[1:], *others])) == "".join(said)


def test_a_turns_tokens_do_not_depend_on_the_turns_beside_it(model):
    """Even where a tokenizer that reads on would join them: two dots, one after the other."""
    template = ".{speaker} {text}"
    texts = ["Go on.", ".", "..", "Oh 😱", "naïve  "]
    together = of_texts(*texts, template=template)
    ids = turn_ids(model, together, together.conversations[0])
    for i, turn in enumerate(together.conversations[0].turns):
        [alone] = turn_ids(model, together, Conversation("alone", (turn,)))
        assert alone == [first_token(model), *ids[i]] if i else alone == ids[i]
        assert model.tokenizer.decode(alone[1:]) == f".{turn.speaker} {turn.text}"
    at_once, apart = (model.tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in ("..", [".", "."]))
    assert at_once != joined(apart)  # or the above shows nothing


@pytest.mark.parametrize(
    ("template", "before"),
    [
        ("\n{speaker}: {text}", "\nAnna:"),
        ("\n{speaker}:{text}", "\nAnna:"),
        ("{speaker}:\n{text}", "Anna:\n"),
        ("<{speaker}>   {text}", "<Anna>"),
    ],
)
def test_before_a_turn_of_the_model_stands_its_speaker_without_a_trailing_space(model, template, before):
    scenario = of_texts("", template=template)
    [[first, *ids]] = turn_ids(model, scenario, scenario.conversations[0])
    assert first == first_token(model)
    assert model.tokenizer.decode(ids) == before


def test_the_tokens_before_a_turn_of_the_model_begin_the_given_turn(any_model):
    """So the model writes from where the given text would have begun."""
    given, written = of_texts("He ran.", "She sat."), of_texts("He ran.", "")
    [_, whole], [_, start] = (turn_ids(any_model, s, s.conversations[0]) for s in (given, written))
    assert whole[: len(start)] == start and len(whole) > len(start)


# The context


def test_a_conversation_as_long_as_the_context_fits_and_one_token_more_does_not(any_model):
    limit = any_model.cfg.n_ctx
    heads = sum(len(ids) for ids in turn_ids(any_model, talk_of(1), talk_of(1).conversations[0])) - 1
    full = limit - heads
    check_fits(any_model, talk_of(full))
    with pytest.raises(ValueError) as refusal:
        check_fits(any_model, talk_of(full + 1))
    assert str(refusal.value) == (
        f"walk.yaml, line 10: 'talk' has {limit + 1} tokens with position 0 and what the model writes, but "
        f"{any_model.cfg.model_name} reads at most {limit}. The first turn that no longer fits is turn 2 "
        "(Tom, line 11)."
    )


def test_a_turn_of_the_model_counts_with_all_that_it_may_write(model):
    taken = sum(len(ids) for ids in turn_ids(model, talk_of(3, 1), talk_of(3, 1).conversations[0]))
    room = model.cfg.n_ctx - taken
    check_fits(model, talk_of(3, room))
    with pytest.raises(ValueError, match=f"'talk' has {model.cfg.n_ctx + 1} tokens .* turn 2 .Tom, line 11"):
        check_fits(model, talk_of(3, room + 1))


def test_the_first_turn_that_no_longer_fits_is_named(model):
    with pytest.raises(ValueError, match=r"is turn 1 \(Anna, line 10\)"):
        check_fits(model, talk_of(200))
    heads = sum(len(ids) for ids in turn_ids(model, talk_of(1), talk_of(1).conversations[0])) - 1
    to_the_end = "so" + " so" * (model.cfg.n_ctx - heads - 1)
    for texts, number, speaker in (
        (["so", to_the_end, "He ran.", "She sat."], 3, "Anna"),
        (["so", to_the_end + " so", "He ran."], 2, "Tom"),
    ):
        with pytest.raises(
            ValueError, match=rf"walk.yaml, line 10: .* is turn {number} \({speaker}, line {9 + number}\)"
        ):
            check_fits(model, of_texts(*texts))


def test_all_conversations_are_checked(model):
    short, long = talk_of(3).conversations[0], replace(talk_of(100).conversations[0], name="too long")
    check_fits(model, replace(talk_of(3), conversations=(short,)))
    for asked in ((short, long), (long,)):
        with pytest.raises(ValueError, match="'too long' has"):
            check_fits(model, replace(talk_of(3), conversations=asked))


# Turns that the model writes instead


def test_every_turn_of_a_role_is_written_and_all_else_stays(good):
    mill = good.conversations[0]
    by_model = with_written(mill, tokens=7)
    assert by_model.name == mill.name
    assert by_model.turns[::2] == mill.turns[::2]
    assert [turn.text for turn in by_model.turns[1::2]] == [None, None]
    assert [turn.write for turn in by_model.turns] == [0, 7, 0, 7]
    assert [turn.line for turn in by_model.turns] == [turn.line for turn in mill.turns]
    users = with_written(mill, "user")
    assert users.turns[1::2] == mill.turns[1::2] and [turn.write for turn in users.turns] == [24, 0, 24, 24]
    assert mill == good.conversations[0] and mill.turns[0].text is not None


def test_no_other_role_and_no_turn_without_tokens_can_be_written(good):
    with pytest.raises(ValueError, match="unknown role 'Anna': it is one of user, assistant"):
        with_written(good.conversations[0], "Anna")
    for tokens in (0, -1):
        with pytest.raises(ValueError, match=f"needs 1 token or more, got {tokens}"):
            with_written(good.conversations[0], tokens=tokens)


# The shipped scenarios


@pytest.fixture(scope="module")
def four() -> dict[str, Scenario]:
    return {scenario.name: scenario for scenario in shipped()}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DATA / "bookworm")


def turns_of(scenario: Scenario, role: str | None = None) -> list[Turn]:
    return [turn for talk in scenario.conversations for turn in talk.turns if role in (None, turn.role)]


def test_a_shipped_scenario_is_loaded_by_name_or_path(four):
    assert four
    for name, scenario in four.items():
        assert scenario == load(name) == load(DATA / "scenarios" / f"{name}.yaml")
        assert scenario == load(str(DATA / "scenarios" / f"{name}.yaml"))


def test_four_scenarios_are_shipped_with_so_many_variants_of_twelve_turns(four):
    assert {name: len(scenario.conversations) for name, scenario in four.items()} == FOUR
    assert {len(talk.turns) for scenario in four.values() for talk in scenario.conversations} == {12}


def test_the_user_begins_and_both_speak_in_turn(four):
    for scenario in four.values():
        for talk in scenario.conversations:
            assert [turn.role for turn in talk.turns] == ["user", "assistant"] * 6, talk.name
            assert all(turn.text for turn in talk.turns), talk.name


def test_scenarios_differ_in_nothing_but_their_conversations(four):
    settings = {(s.template, s.positions, s.streams, s.references) for s in four.values()}
    nine = ("happy", "excited", "calm", "sad", "lonely", "afraid", "angry", "disgusted", "bored")
    assert settings == {("\n{speaker}: {text}", "every token", ("after mlp", "after attention"), nine)}
    assert len({s.title for s in four.values()}) == len(four)


def test_topics_speakers_and_turns_are_all_different(four):
    names = [talk.name for scenario in four.values() for talk in scenario.conversations]
    assert len({name.lower() for name in names}) == len(names)
    for scenario in four.values():
        pairs = Counter(tuple(turn.speaker for turn in talk.turns[:2]) for talk in scenario.conversations)
        assert max(pairs.values()) == 1, scenario.name
    texts = Counter(turn.text.lower() for scenario in four.values() for turn in turns_of(scenario))
    assert [text for text, times in texts.items() if times > 1] == []


def test_every_turn_is_one_clean_short_sentence_or_two(four, tokenizer):
    for scenario in four.values():
        for turn in turns_of(scenario):
            assert re.fullmatch(r"[A-Z][A-Za-z0-9 ,.?!']*[a-z0-9][.?!]", turn.text), turn
            assert turn.text == " ".join(turn.text.split()), turn
            assert 5 <= len(turn.text.split()) <= 11, turn
            assert len(tokenizer(f" {turn.text}", add_special_tokens=False)["input_ids"]) <= 14, turn


def test_a_conversation_fits_into_bookworms_context_with_room(four, tokenizer):
    for scenario in four.values():
        for talk in scenario.conversations:
            text = "".join(scenario.template.format(speaker=turn.speaker, text=turn.text) for turn in talk.turns)
            whole = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert 1 + len(whole) <= 230, talk.name
            apart = [scenario.template.format(speaker=turn.speaker, text=turn.text) for turn in talk.turns]
            assert joined(tokenizer(apart, add_special_tokens=False)["input_ids"]) == whole, talk.name


def test_no_turn_names_an_emotion(four):
    banned = set(pd.read_csv(DATA / "lexicons" / "emotion_words.csv", keep_default_na=False)["word"])
    banned = banned.union(*emotions.synonyms().values())
    said = {turn.text: set(re.findall("[a-z]+", turn.text.lower())) for s in four.values() for turn in turns_of(s)}
    assert {text: sorted(words & banned) for text, words in said.items() if words & banned} == {}


def test_neither_the_last_token_nor_the_length_gives_the_scenario_away(four):
    """Shares of turns that end in a full stop, and mean numbers of words: alike over scenarios and roles."""
    stops, lengths = {}, {}
    for name, scenario in four.items():
        for role in ("user", "assistant"):
            texts = [turn.text for turn in turns_of(scenario, role)]
            stops[name, role] = sum(text.endswith(".") for text in texts) / len(texts)
            lengths[name, role] = sum(len(text.split()) for text in texts) / len(texts)
    assert min(stops.values()) >= 2 / 3
    assert max(stops.values()) - min(stops.values()) <= 0.05
    assert max(lengths.values()) - min(lengths.values()) <= 0.5
