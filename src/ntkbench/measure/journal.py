"""Rows of a study that is under way, on disk: a study that is stopped, by whatever, goes on behind its last one."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ntkbench import paths
from ntkbench.errors import OverMemory

Row = dict[str, Any]


class Journal:
    """A line of JSON when a row is begun, and one when it is done.

    Rows are known by their case, the columns that say what is measured; where two have the same, by their order.
    """

    def __init__(self, path: Path, made_for: str, stopped: Mapping[str, str] | None = None) -> None:
        """Read what is there, or begin.

        Args:
            path: of the journal.
            made_for: what rows depend on (settings, sources, commit); rows made for anything else do not count.
            stopped: status and reason if the process before was killed for the row that it was at.

        Raises:
            OverMemory: it was, and was at no row, so that beginning again would end in the same way.
        """
        self._path = path
        self._done: dict[str, deque[Row]] = defaultdict(deque)
        head = {"made_for": made_for}
        entries = list(_entries(path))
        entries = entries if entries[:1] == [head] else [head]
        if stopped:
            if "begun" not in entries[-1]:
                raise OverMemory(f"stopped between rows: {stopped['reason']}")
            case = entries[-1]["begun"]
            entries.append({"case": case, "row": {**json.loads(case), **stopped}})
        for entry in entries:
            if "row" in entry:
                self._done[entry["case"]].append(entry["row"])
        paths.write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in entries))  # without a half line

    def before(self, case: Mapping[str, Any]) -> Row | None:
        """The row of a case, if it was made before."""
        rows = self._done[_key(case)]
        return rows.popleft() if rows else None

    def begin(self, case: Mapping[str, Any]) -> None:
        """Note that a row is under way."""
        self._write({"begun": _key(case)})

    def finish(self, case: Mapping[str, Any], row: Row) -> None:
        """Keep a row."""
        self._write({"case": _key(case), "row": row})

    def _write(self, entry: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(entry, default=_plain) + "\n")


CURRENT: ContextVar[Journal | None] = ContextVar("journal", default=None)
"""The journal of the study that is being measured."""


@contextlib.contextmanager
def kept(journal: Journal | None) -> Iterator[None]:
    """Keep rows in a journal meanwhile."""
    token = CURRENT.set(journal)
    try:
        yield
    finally:
        CURRENT.reset(token)


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a journal; a line that was not written to its end is none."""
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


def _key(case: Mapping[str, Any]) -> str:
    return json.dumps(case, default=_plain)


def _plain(value: Any) -> Any:
    """A numpy scalar as a number of Python."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be kept in a journal")
