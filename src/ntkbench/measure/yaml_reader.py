"""Strict reading of YAML files: UTF-8, one document, each key once, and the line of each value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ntkbench.errors import BadInput

Place = tuple[str | int, ...]
"""Keys and indices that lead from the top of a file to a value."""

MAX_BYTES = 2**18
MAX_DEPTH = 16
MAX_VALUES = 10_000
"""Values in a file; values repeated by an alias count again."""

_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_TEXT = "tag:yaml.org,2002:str"
_RESOLVER = yaml.resolver.Resolver()


def read(file: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    """The mapping that a YAML file holds, and the line of each value in it.

    Raises:
        BadInput: the file cannot be read or holds no such mapping; names the file and, if there is one, the line.
    """
    text = _text(file)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise BadInput(f"{file}:{mark.line + 1}: malformed YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BadInput(f"{file}:{line}: the character U+{ord(text[error.position]):04X} is not allowed") from None
    except RecursionError:
        raise BadInput(f"{file}: nested too deeply; at most {MAX_DEPTH} levels are allowed") from None
    if not isinstance(node, yaml.MappingNode):
        kind = "nothing" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise BadInput(f"{file}: keys with values are expected, but the file holds {kind}")
    reader = _Reader(file)
    return reader.value(node, ()), reader.lines


def scalar(text: str) -> Any:
    """The value of an unquoted scalar: a decimal number, ``true``, ``false``, ``null`` or else text.

    Raises:
        ValueError: YAML 1.1 reads it as something else, such as an octal number, a date, ``yes`` or ``.inf``.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if (tag := _RESOLVER.resolve(yaml.ScalarNode, text, (True, False))) != _TEXT:
        kind = tag.rpartition(":")[2]
        raise ValueError(f"{text!r} means {kind} in YAML; write a decimal number, true, false or quoted text")
    return text


def _text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # a null byte in the name is a ValueError
        raise BadInput(f"{str(file)!r}: cannot be read: {getattr(error, 'strerror', error)}") from None
    if len(data) > MAX_BYTES:
        raise BadInput(f"{file}: larger than {MAX_BYTES} bytes")
    if data.startswith(b"\xef\xbb\xbf"):
        raise BadInput(f"{file}:1: begins with a byte order mark; UTF-8 without one is expected")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{file}:{line}: byte 0x{data[error.start]:02x} is not UTF-8") from None


def _quoted(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is not None


class _Reader:
    """Turns nodes into values and notes their lines."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._values = 0
        self.lines: dict[Place, int] = {}

    def value(self, node: yaml.Node, place: Place) -> Any:
        self._values += 1
        self.lines.setdefault(place, node.start_mark.line + 1)
        if len(place) > MAX_DEPTH:
            raise self._bad(node, f"nested too deeply; at most {MAX_DEPTH} levels are allowed")
        if self._values > MAX_VALUES:
            raise self._bad(node, f"more than {MAX_VALUES} values, counting those repeated by aliases")
        self._check_tag(node)
        if isinstance(node, yaml.MappingNode):
            return {key: self.value(below, (*place, key)) for key, below in self._items(node, place)}
        if isinstance(node, yaml.SequenceNode):
            return [self.value(below, (*place, i)) for i, below in enumerate(node.value)]
        return self._scalar(node)

    def _check_tag(self, node: yaml.Node) -> None:
        if node.tag != _RESOLVER.resolve(type(node), node.value, (not _quoted(node), _quoted(node))):
            raise self._bad(node, f"the tag {node.tag!r} is not allowed")

    def _items(self, node: yaml.MappingNode, place: Place) -> Iterator[tuple[str, yaml.Node]]:
        first: dict[str, int] = {}
        for key_node, below in node.value:
            self._check_tag(key_node)
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                said = f"{key_node.value!r:.80}" if isinstance(key_node, yaml.ScalarNode) else "of several values"
                raise self._bad(key_node, f"the key {said} is not text")
            if key in first:
                raise self._bad(key_node, f"the key {key!r} is given twice, first in line {first[key]}")
            first[key] = self.lines[*place, key] = key_node.start_mark.line + 1
            yield key, below

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if _quoted(node):
            return node.value
        try:
            return scalar(node.value)
        except ValueError as error:
            raise self._bad(node, str(error)) from None

    def _bad(self, node: yaml.Node, message: str) -> BadInput:
        return BadInput(f"{self._file}:{node.start_mark.line + 1}: {message}")
