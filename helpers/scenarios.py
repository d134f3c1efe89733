"""Scripted conversations from YAML files (data/scenarios), checked as they are loaded, and what a model reads of them.

Whatever is wrong with a file is a ValueError that names the file, the line and the reason. Only plain YAML is read:
texts, numbers, lists and mappings; nothing that a file says is ever run.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal, get_args

import yaml
from transformer_lens.model_bridge import TransformerBridge

from helpers import emotions
from helpers.config import DATA
from helpers.prompts import first_token

Positions = Literal["every token", "end of turn"]
POSITIONS = get_args(Positions)
STREAMS = ("after mlp", "after attention")
ROLES = ("user", "assistant")
TEMPLATE = "\n{speaker}: {text}"
PLAIN = "tag:yaml.org,2002:"  # begins the tags of plain YAML
KINDS = {"str": "a plain text", "int": "a number", "float": "a number", "bool": "a truth value", "timestamp": "a date"}
KINDS |= {"null": "nothing", "seq": "a list", "map": "a mapping"}


@dataclass(frozen=True)
class Turn:
    """What one speaker says: a given text, or one that the model writes."""

    speaker: str
    role: str  # "user" or "assistant"
    text: str | None  # None: the model writes this turn
    write: int  # most tokens that the model writes; 0 for a given text
    line: int  # in the file, 1-based


@dataclass(frozen=True)
class Conversation:
    """One variant of a scenario."""

    name: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Scenario:
    """Conversations of one kind, how they are written as a text, and what to record of them."""

    name: str  # the file's name without .yaml
    title: str
    about: str
    template: str
    positions: Positions
    streams: tuple[str, ...]
    references: tuple[str, ...]  # the emotions that states are compared with
    conversations: tuple[Conversation, ...]
    path: Path


def load(path: Path | str) -> Scenario:
    """The scenario in a YAML file, or of that name in data/scenarios.

    Raises ValueError for the first thing that is wrong with the file, and FileNotFoundError where there is none.
    """
    by_name = isinstance(path, str) and not path.endswith((".yaml", ".yml"))
    path = DATA / "scenarios" / f"{path}.yaml" if by_name else Path(path).expanduser()
    if not path.is_file():
        names = ", ".join(shipped.stem for shipped in _shipped_files())
        raise FileNotFoundError(f"There is no scenario file {path}. Shipped scenarios: {names or 'none'}.")
    root = _fields(_document(path), "a scenario", ("title", "about", "references", "variants"), ("format", "record"))
    record = _fields(root["record"], "record", (), ("positions", "streams")) if "record" in root else {}
    return Scenario(
        name=path.stem,
        title=_text(root["title"], "title"),
        about=_text(root["about"], "about"),
        template=_template(root["format"]) if "format" in root else TEMPLATE,
        positions=_choice(record["positions"], "positions", POSITIONS) if "positions" in record else POSITIONS[0],
        streams=_choices(record["streams"], "streams", STREAMS) if "streams" in record else STREAMS,
        references=_choices(root["references"], "references", emotions.names(), 2),
        conversations=_conversations(root["variants"]),
        path=path,
    )


def shipped() -> list[Scenario]:
    """The scenarios of data/scenarios by name."""
    return [load(path) for path in _shipped_files()]


def turn_ids(model: TransformerBridge, scenario: Scenario, conversation: Conversation) -> list[list[int]]:
    """The token ids of every turn as the template writes it; position 0 stands in front of the first turn.

    Of a turn that the model writes, those of what stands before its text, without spaces at its end ("\\nTom:").
    Every turn is tokenised apart, so its tokens do not depend on what follows, and a conversation read turn by turn
    has the tokens of one read at once.
    """
    texts = [_given(scenario, turn) for turn in conversation.turns]
    first, *others = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[first_token(model), *first], *others]


def check_fits(model: TransformerBridge, scenario: Scenario, conversation: Conversation | None = None) -> None:
    """Raises ValueError where a conversation (or one of the scenario's) is longer than the model's context.

    A turn that the model writes counts with the most tokens it may have.
    """
    limit = model.cfg.n_ctx
    for checked in scenario.conversations if conversation is None else (conversation,):
        ids = turn_ids(model, scenario, checked)
        ends = list(accumulate(len(given) + turn.write for given, turn in zip(ids, checked.turns)))
        if ends[-1] > limit:
            number, turn = next((i, turn) for i, (end, turn) in enumerate(zip(ends, checked.turns), 1) if end > limit)
            raise ValueError(
                f"{scenario.path.name}, line {checked.turns[0].line}: {checked.name!r} has {ends[-1]} tokens with "
                f"position 0 and what the model writes, but {model.cfg.model_name} reads at most {limit}. The first "
                f"turn that no longer fits is turn {number} ({turn.speaker}, line {turn.line})."
            )


def with_written(conversation: Conversation, speaker_role: str = "assistant", tokens: int = 24) -> Conversation:
    """The same conversation in which the model writes every turn of that role, each of at most so many tokens."""
    if speaker_role not in ROLES:
        raise ValueError(f"unknown role {speaker_role!r}: it is one of {', '.join(ROLES)}")
    if tokens < 1:
        raise ValueError(f"a turn that the model writes needs 1 token or more, got {tokens}")
    turns = conversation.turns
    return replace(
        conversation,
        turns=tuple(replace(turn, text=None, write=tokens) if turn.role == speaker_role else turn for turn in turns),
    )


def answered(scenario: Scenario, tokens: int) -> Scenario:
    """The scenario in which the model writes every turn of the assistant, each of at most so many tokens."""
    conversations = (with_written(conversation, "assistant", tokens) for conversation in scenario.conversations)
    return replace(scenario, conversations=tuple(conversations))


def typed(talk: str, references: Sequence[str]) -> Scenario:
    """A scenario of one conversation from lines such as "Anna: You are late."; who speaks first is the user.

    Checked like a file, so mistakes are ValueErrors that name the line of the talk.
    """
    turns, roles = [], {}
    for number, line in enumerate(talk.splitlines(), 1):
        if not line.strip():
            continue
        speaker, colon, text = (part.strip() for part in line.partition(":"))
        if not (speaker and colon and text):
            raise ValueError(f"line {number}: a turn needs its speaker and a text, as in 'Anna: You are late.'")
        roles.setdefault(speaker, ROLES[min(len(roles), 1)])
        turns.append(Turn(speaker, roles[speaker], text, 0, number))
    if not turns:
        raise ValueError("there is no turn to read: write lines such as 'Anna: You are late.'")
    if unknown := [name for name in references if name not in emotions.names()]:
        raise ValueError(f"references: {unknown[0]!r} is unknown. {_suggestion(unknown[0], emotions.names())}")
    conversation = Conversation("typed", tuple(turns))
    return Scenario(
        "typed",
        "Typed",
        "Typed by hand.",
        TEMPLATE,
        POSITIONS[0],
        STREAMS,
        tuple(references),
        (conversation,),
        Path("typed"),
    )


def calibration() -> Scenario:
    """Every other conversation of the scenario `neutral`: the ones that say what nothing in particular reads as."""
    neutral = load("neutral")
    return replace(neutral, conversations=neutral.conversations[::2])


def control() -> Scenario:
    """The other half of the scenario `neutral`, which nothing was calibrated on."""
    neutral = load("neutral")
    return replace(neutral, conversations=neutral.conversations[1::2])


def chained(model: TransformerBridge, scenario: Scenario, most: int) -> Scenario:
    """Each conversation with the others behind it, as many turns as the model's context (or `most` tokens) holds."""
    limit, found = min(most, model.cfg.n_ctx), []
    for i, own in enumerate(scenario.conversations):
        behind = scenario.conversations[i:] + scenario.conversations[:i]
        whole = replace(own, turns=tuple(turn for conversation in behind for turn in conversation.turns))
        ends = accumulate(len(ids) for ids in turn_ids(model, scenario, whole))
        if (fits := sum(end <= limit for end in ends)) == 0:
            raise ValueError(f"{scenario.path.name}: not even the first turn of {own.name!r} fits into {limit} tokens")
        found.append(replace(whole, turns=whole.turns[:fits]))
    return replace(scenario, conversations=tuple(found))


def spliced(scenario: Scenario) -> Scenario:
    """The scenario with every turn but the first taken from another conversation, neighbouring turns from two.

    Spoken by one's own speaker of that role: place and length of the turns stay, and nothing goes back to the opening.
    Raises ValueError for fewer than three, and unless all have the same roles turn by turn.
    """
    conversations = scenario.conversations
    if len({tuple(turn.role for turn in conversation.turns) for conversation in conversations}) > 1:
        raise ValueError(f"{scenario.path.name}: conversations with other roles or numbers of turns cannot be spliced")
    if len(conversations) < 3:
        raise ValueError(f"{scenario.path.name}: splicing needs three conversations, got {len(conversations)}")
    found = []
    for i, own in enumerate(conversations):
        names = {turn.role: turn.speaker for turn in own.turns}
        others = [conversations[_donor(i, t, len(conversations))].turns[t] for t in range(len(own.turns))]
        found.append(replace(own, turns=tuple(replace(turn, speaker=names[turn.role]) for turn in others)))
    return replace(scenario, conversations=tuple(found))


def _donor(own: int, turn: int, count: int) -> int:
    """Whose turn stands there: one's own first, then the others in turn, never one's own again."""
    return own if turn == 0 else (own + 1 + (turn - 1) % (count - 1)) % count


def _given(scenario: Scenario, turn: Turn) -> str:
    """What the model reads of a turn, up to where it writes itself."""
    written = scenario.template.format(speaker=turn.speaker, text=turn.text or "")
    return written.rstrip(" ") if turn.text is None else written


def _shipped_files() -> list[Path]:
    return sorted((DATA / "scenarios").glob("*.yaml"))


# What a file may say


def _conversations(node: yaml.Node) -> tuple[Conversation, ...]:
    found: dict[str, Conversation] = {}
    for item in _list(node, "variants"):
        fields = _fields(item, "a variant", ("name", "speakers", "turns"))
        name = _text(fields["name"], "name")
        if name in found:
            raise _refusal(fields["name"], f"two variants have the name {_short(name)}")
        roles = _roles(fields["speakers"])
        found[name] = Conversation(name, tuple(_turn(turn, roles) for turn in _list(fields["turns"], "turns")))
    return tuple(found.values())


def _roles(node: yaml.Node) -> dict[str, str]:
    """Every speaker's role."""
    entries = _entries(node, "speakers")
    roles = {speaker.value: _choice(role, f"the role of {_short(speaker.value)}", ROLES) for speaker, role in entries}
    if sorted(roles.values()) != sorted(ROLES):
        given = ", ".join(f"{speaker}: {role}" for speaker, role in roles.items())
        raise _refusal(node, f"speakers must be one user and one assistant, got {given or 'nobody'}")
    return roles


def _turn(node: yaml.Node, roles: dict[str, str]) -> Turn:
    if not isinstance(node, yaml.MappingNode):
        raise _refusal(node, f"a turn needs its speaker, as in '{next(iter(roles))}: \"...\"', got {_kind(node)}")
    entries = _entries(node, "a turn")
    if len(entries) != 1:
        given = " and ".join(_short(speaker.value) for speaker, _ in entries)
        raise _refusal(node, f"a turn has one speaker, got {given or 'none'}")
    [(speaker, said)] = entries
    if speaker.value not in roles:
        raise _refusal(speaker, f"unknown speaker {_short(speaker.value)}: the speakers are {' and '.join(roles)}")
    by_model = isinstance(said, yaml.MappingNode)
    text = None if by_model else _text(said, f"{speaker.value}'s turn")
    return Turn(speaker.value, roles[speaker.value], text, _most_tokens(said) if by_model else 0, _line(node))


def _most_tokens(node: yaml.Node) -> int:
    write = _fields(node, "a turn that the model writes", ("write",))["write"]
    if not _is_scalar(write, "int") or not re.fullmatch("[1-9][0-9]{,8}", write.value):
        raise _refusal(write, f"write must be a positive whole number, got {_kind(write)}")
    return int(write.value)


def _template(node: yaml.Node) -> str:
    template = _text(node, "format")
    if not re.fullmatch(r"[^{}]*\{speaker\}[^{}]*\{text\}", template):
        rule = "format must hold {speaker} once, {text} once as its end, and no other braces"
        raise _refusal(node, f"{rule}; got {_short(template)}")
    if r"\n" in template:
        raise _refusal(node, r"format holds a backslash and an n: \n is a new line only within double quotes")
    return template


# YAML, node by node


def _document(path: Path) -> yaml.Node:
    """The file's one document, as nodes that know their file and line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path.name}, line {line}: not UTF-8 ({error.reason}). Save the file as UTF-8.") from error
    if odd := yaml.SafeLoader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, odd.start()) + 1
        raise ValueError(f"{path.name}, line {line}: YAML has no place for the character {odd[0]!r}")
    loader = yaml.SafeLoader(text)
    loader.name = path.name
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        if error.context_mark and error.context_mark.line != error.problem_mark.line:
            problem += f" (begun in line {error.context_mark.line + 1})"
        raise ValueError(f"{path.name}, line {error.problem_mark.line + 1}: not YAML: {problem}") from error
    except (ValueError, OverflowError, RecursionError) as error:  # an escape beyond Unicode; thousands of brackets
        raise ValueError(f"{path.name}, line {loader.line + 1}: not YAML: {error}") from error
    if node is None:
        raise ValueError(f"{path.name}, line 1: the file is empty")
    return node


def _fields(node: yaml.Node, what: str, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, yaml.Node]:
    """The values of a mapping that has all needed keys and none but these and the optional ones."""
    known = (*needed, *optional)
    entries = _entries(node, what)
    for key, _ in entries:
        if key.value not in known:
            raise _refusal(key, f"{what} has no key {_short(key.value)}. {_suggestion(key.value, known)}")
    found = {key.value: value for key, value in entries}
    for key in needed:
        if key not in found:
            raise _refusal(node, f"{what} lacks the key {key!r}")
    return found


def _entries(node: yaml.Node, what: str) -> list[tuple[yaml.Node, yaml.Node]]:
    """The keys and values of a mapping, no key twice. A key counts as written, so a speaker may be called No."""
    if not isinstance(node, yaml.MappingNode) or node.tag != PLAIN + "map":
        raise _refusal(node, f"{what} must be a mapping, got {_kind(node)}")
    seen = set()
    for key, _ in node.value:
        if not any(_is_scalar(key, kind) for kind in KINDS) or not key.value.strip():
            raise _refusal(key, f"a key of {what} must be a text, got {_kind(key)}")
        if key.value in seen:
            raise _refusal(key, f"{what} has the key {_short(key.value)} twice")
        seen.add(key.value)
    return node.value


def _list(node: yaml.Node, what: str, least: int = 1) -> list[yaml.Node]:
    if not isinstance(node, yaml.SequenceNode) or node.tag != PLAIN + "seq":
        raise _refusal(node, f"{what} must be a list, got {_kind(node)}")
    if len(node.value) < least:
        raise _refusal(node, f"{what} must be {least} or more, got {len(node.value)}")
    return node.value


def _text(node: yaml.Node, what: str) -> str:
    if not _is_scalar(node, "str"):
        raise _refusal(node, f"{what} must be a text in double quotes, got {_kind(node)}")
    if not node.value.strip():
        raise _refusal(node, f"{what} is empty ({_short(node.value)})")
    if half := re.search("[\ud800-\udfff]", node.value):  # written as an escape, "\ud83d"
        raise _refusal(node, f"{what} holds half a character ({half[0]!r}): write the character itself")
    return node.value


def _choice(node: yaml.Node, what: str, known: Sequence[str]) -> str:
    value = _text(node, what)
    if value not in known:
        raise _refusal(node, f"{what}: {_short(value)} is unknown. {_suggestion(value, known)}")
    return value


def _choices(node: yaml.Node, what: str, known: Sequence[str], least: int = 1) -> tuple[str, ...]:
    """The texts of a list, each a known one and none twice."""
    found: list[str] = []
    for item in _list(node, what, least):
        value = _choice(item, what, known)
        if value in found:
            raise _refusal(item, f"{what}: {value!r} comes twice")
        found.append(value)
    return tuple(found)


def _suggestion(value: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(value[:100], known, 1, cutoff=0)[0]
    return f"Did you mean {nearest!r}? Known: {', '.join(known)}."


def _is_scalar(node: yaml.Node, kind: str) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == PLAIN + kind


def _kind(node: yaml.Node) -> str:
    """What a node is, in words, and how it begins."""
    kind = KINDS.get(node.tag.removeprefix(PLAIN), f"something with the tag {node.tag!r}")
    return f"{kind} ({_short(node.value)})" if isinstance(node.value, str) and node.value else kind


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _refusal(node: yaml.Node, reason: str) -> ValueError:
    return ValueError(f"{node.start_mark.name}, line {_line(node)}: {reason}")
