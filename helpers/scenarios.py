"""Scripted conversations from YAML files (data/scenarios), checked as they are loaded, and what a model reads of them.

Whatever is wrong with a file is a ValueError that names the file, the line and the reason. Only plain YAML is read:
texts, numbers, lists and mappings; nothing that a file says is ever run.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal, get_args

import yaml
from transformer_lens.model_bridge import TransformerBridge

from helpers import emotions, nodes
from helpers.config import DATA, thinned
from helpers.prompts import TooLong, check_whole, first_token

Positions = Literal["every token", "end of turn"]
POSITIONS = get_args(Positions)
STREAMS = ("after mlp", "after attention")
ROLES = ("user", "assistant")
TEMPLATE = "\n{speaker}: {text}"


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
    root = nodes.fields(
        nodes.document(path), "a scenario", ("title", "about", "references", "variants"), ("format", "record")
    )
    record = nodes.fields(root["record"], "record", (), ("positions", "streams")) if "record" in root else {}
    return Scenario(
        name=path.stem,
        title=nodes.text_of(root["title"], "title"),
        about=nodes.text_of(root["about"], "about"),
        template=_template(root["format"]) if "format" in root else TEMPLATE,
        positions=nodes.choice(record["positions"], "positions", POSITIONS) if "positions" in record else POSITIONS[0],
        streams=nodes.choices(record["streams"], "streams", STREAMS) if "streams" in record else STREAMS,
        references=nodes.choices(root["references"], "references", emotions.names(), 2),
        conversations=_conversations(root["variants"]),
        path=path,
    )


def shipped() -> list[Scenario]:
    """The scenarios of data/scenarios by name; on a reduced grid with fewer conversations, at least three."""
    found = (load(path) for path in _shipped_files())
    return [replace(each, conversations=tuple(thinned(each.conversations))) for each in found]


def turn_ids(model: TransformerBridge, scenario: Scenario, conversation: Conversation) -> list[list[int]]:
    """The token ids of every turn as the template writes it; position 0 stands in front of the first turn.

    Of a turn that the model writes, those of what stands before its text, without spaces at its end ("\\nTom:").
    Every turn is tokenised apart, so its tokens do not depend on what follows, and a conversation read turn by turn
    has the tokens of one read at once.
    """
    texts = [_given(scenario, turn) for turn in conversation.turns]
    first, *others = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[first_token(model), *first], *others]


def check_fits(model: TransformerBridge, scenario: Scenario) -> None:
    """Raises TooLong where a conversation of the scenario is longer than the model's context.

    A turn that the model writes counts with the most tokens it may have.
    """
    limit = model.cfg.n_ctx
    for conversation in scenario.conversations:
        ids, turns = turn_ids(model, scenario, conversation), conversation.turns
        ends = list(accumulate(len(given) + turn.write for given, turn in zip(ids, turns)))
        if ends[-1] > limit:
            number, turn = next((i, turn) for i, (end, turn) in enumerate(zip(ends, turns), 1) if end > limit)
            raise TooLong(
                f"{scenario.path.name}, line {turns[0].line}: {conversation.name!r} has {ends[-1]} tokens with "
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
        check_whole(line, f"line {number}")
        roles.setdefault(speaker, ROLES[min(len(roles), 1)])
        turns.append(Turn(speaker, roles[speaker], text, 0, number))
    if not turns:
        raise ValueError("there is no turn to read: write lines such as 'Anna: You are late.'")
    if unknown := [name for name in references if name not in emotions.names()]:
        raise ValueError(f"references: {unknown[0]!r} is unknown. {nodes.suggestion(unknown[0], emotions.names())}")
    if len(set(references)) < max(2, len(references)):
        given = ", ".join(references) or "none"
        raise ValueError(f"references: two or more different emotions are needed, got {given}")
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
        ends = accumulate(len(ids) + turn.write for ids, turn in zip(turn_ids(model, scenario, whole), whole.turns))
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
    for item in nodes.items(node, "variants"):
        fields = nodes.fields(item, "a variant", ("name", "speakers", "turns"))
        name = nodes.text_of(fields["name"], "name")
        if name in found:
            raise nodes.refusal(fields["name"], f"two variants have the name {nodes.shortened(name)}")
        roles = _roles(fields["speakers"])
        found[name] = Conversation(name, tuple(_turn(turn, roles) for turn in nodes.items(fields["turns"], "turns")))
    return tuple(found.values())


def _roles(node: yaml.Node) -> dict[str, str]:
    """Every speaker's role."""
    entries = nodes.entries(node, "speakers")
    roles = {
        speaker.value: nodes.choice(role, f"the role of {nodes.shortened(speaker.value)}", ROLES)
        for speaker, role in entries
    }
    if sorted(roles.values()) != sorted(ROLES):
        given = ", ".join(f"{speaker}: {role}" for speaker, role in roles.items())
        raise nodes.refusal(node, f"speakers must be one user and one assistant, got {given or 'nobody'}")
    return roles


def _turn(node: yaml.Node, roles: dict[str, str]) -> Turn:
    if not isinstance(node, yaml.MappingNode):
        raise nodes.refusal(
            node, f"a turn needs its speaker, as in '{next(iter(roles))}: \"...\"', got {nodes.kind_of(node)}"
        )
    entries = nodes.entries(node, "a turn")
    if len(entries) != 1:
        given = " and ".join(nodes.shortened(speaker.value) for speaker, _ in entries)
        raise nodes.refusal(node, f"a turn has one speaker, got {given or 'none'}")
    [(speaker, said)] = entries
    if speaker.value not in roles:
        raise nodes.refusal(
            speaker, f"unknown speaker {nodes.shortened(speaker.value)}: the speakers are {' and '.join(roles)}"
        )
    by_model = isinstance(said, yaml.MappingNode)
    text = None if by_model else nodes.text_of(said, f"{speaker.value}'s turn")
    return Turn(speaker.value, roles[speaker.value], text, _most_tokens(said) if by_model else 0, nodes.line_of(node))


def _most_tokens(node: yaml.Node) -> int:
    write = nodes.fields(node, "a turn that the model writes", ("write",))["write"]
    if not nodes.is_scalar(write, "int") or not re.fullmatch("[1-9][0-9]{,8}", write.value):
        raise nodes.refusal(write, f"write must be a positive whole number, got {nodes.kind_of(write)}")
    return int(write.value)


def _template(node: yaml.Node) -> str:
    template = nodes.text_of(node, "format")
    if not re.fullmatch(r"[^{}]*\{speaker\}[^{}]*\{text\}", template):
        rule = "format must hold {speaker} once, {text} once as its end, and no other braces"
        raise nodes.refusal(node, f"{rule}; got {nodes.shortened(template)}")
    if r"\n" in template:
        raise nodes.refusal(node, r"format holds a backslash and an n: \n is a new line only within double quotes")
    return template
