"""YAML as nodes that know their file and line, so that whatever is wrong can be said with its line.

Only plain YAML is read: texts, numbers, lists and mappings; nothing that a file says is ever run. Whatever is refused
is a ValueError that names the file, the line and the reason.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from helpers.files import utf8

PLAIN = "tag:yaml.org,2002:"  # begins the tags of plain YAML
KINDS = {"str": "a plain text", "int": "a number", "float": "a number", "bool": "a truth value", "timestamp": "a date"}
KINDS |= {"null": "nothing", "seq": "a list", "map": "a mapping"}


def document(path: Path) -> yaml.Node:
    """The file's one document."""
    text = utf8(path)
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


def fields(node: yaml.Node, what: str, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, yaml.Node]:
    """The values of a mapping that has all needed keys and none but these and the optional ones."""
    known = (*needed, *optional)
    pairs = entries(node, what)
    for key, _ in pairs:
        if key.value not in known:
            raise refusal(key, f"{what} has no key {shortened(key.value)}. {suggestion(key.value, known)}")
    found = {key.value: value for key, value in pairs}
    for key in needed:
        if key not in found:
            raise refusal(node, f"{what} lacks the key {key!r}")
    return found


def entries(node: yaml.Node, what: str) -> list[tuple[yaml.Node, yaml.Node]]:
    """The keys and values of a mapping, no key twice. A key counts as written, so a speaker may be called No."""
    if not isinstance(node, yaml.MappingNode) or node.tag != PLAIN + "map":
        raise refusal(node, f"{what} must be a mapping, got {kind_of(node)}")
    seen = set()
    for key, _ in node.value:
        if not any(is_scalar(key, kind) for kind in KINDS) or not key.value.strip():
            raise refusal(key, f"a key of {what} must be a text, got {kind_of(key)}")
        if key.value in seen:
            raise refusal(key, f"{what} has the key {shortened(key.value)} twice")
        seen.add(key.value)
    return node.value


def items(node: yaml.Node, what: str, least: int = 1) -> list[yaml.Node]:
    if not isinstance(node, yaml.SequenceNode) or node.tag != PLAIN + "seq":
        raise refusal(node, f"{what} must be a list, got {kind_of(node)}")
    if len(node.value) < least:
        raise refusal(node, f"{what} must be {least} or more, got {len(node.value)}")
    return node.value


def text_of(node: yaml.Node, what: str) -> str:
    if not is_scalar(node, "str"):
        raise refusal(node, f"{what} must be a text in double quotes, got {kind_of(node)}")
    if not node.value.strip():
        raise refusal(node, f"{what} is empty ({shortened(node.value)})")
    if half := re.search("[\ud800-\udfff]", node.value):  # written as an escape, "\ud83d"
        raise refusal(node, f"{what} holds half a character ({half[0]!r}): write the character itself")
    return node.value


def choice(node: yaml.Node, what: str, known: Sequence[str]) -> str:
    value = text_of(node, what)
    if value not in known:
        raise refusal(node, f"{what}: {shortened(value)} is unknown. {suggestion(value, known)}")
    return value


def choices(node: yaml.Node, what: str, known: Sequence[str], least: int = 1) -> tuple[str, ...]:
    """The texts of a list, each a known one and none twice."""
    found: list[str] = []
    for item in items(node, what, least):
        value = choice(item, what, known)
        if value in found:
            raise refusal(item, f"{what}: {value!r} comes twice")
        found.append(value)
    return tuple(found)


def suggestion(value: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(value[:100], known, 1, cutoff=0)[0]
    return f"Did you mean {nearest!r}? Known: {', '.join(known)}."


def is_scalar(node: yaml.Node, kind: str) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == PLAIN + kind


def kind_of(node: yaml.Node) -> str:
    """What a node is, in words, and how it begins."""
    kind = KINDS.get(node.tag.removeprefix(PLAIN), f"something with the tag {node.tag!r}")
    return f"{kind} ({shortened(node.value)})" if isinstance(node.value, str) and node.value else kind


def shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def line_of(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def refusal(node: yaml.Node, reason: str) -> ValueError:
    return ValueError(f"{node.start_mark.name}, line {line_of(node)}: {reason}")
