"""Finished rows on disk, so that an interrupted grid or study resumes after its last row."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ntkbench import paths
from ntkbench.errors import NtkbenchError

Row = dict[str, Any]


class Journal:
    """A file of lines with a checksum and JSON: one line when a row begins, and one with the row when it is done.

    A row is identified by its key, and is valid only for the fingerprint that it was made with. While the fingerprint
    is unchanged, the row is not measured again. Only one process writes at a time.
    """

    def __init__(self, path: Path, others: list[Path] | None = None) -> None:
        """Read the existing lines; damaged lines are left out.

        Args:
            path: path of the journal.
            others: journals whose rows count as well.

        Raises:
            NtkbenchError: another process is writing to it.
        """
        self.path = path
        self._lock = FileLock(f"{path}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise NtkbenchError(f"another process is measuring into {path}; wait for it") from None
        self._rows = rows_of([*(others or []), path])
        self.begun = begun(path)
        self._file = path.open("a", encoding="utf-8")
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")

    def drop(self, statuses: Sequence[str], keys: Collection[str] | None = None) -> None:
        """Forget the rows that ended with one of these statuses, so that they are measured again.

        Args:
            statuses: the statuses.
            keys: only rows of these keys; those of others may belong to another process.
        """
        for (key, made_for), row in list(self._rows.items()):
            if row["status"] in statuses and (keys is None or key in keys):
                del self._rows[key, made_for]
                self._write({"key": key, "made_for": made_for, "row": None})

    def row(self, key: str, made_for: str) -> Row | None:
        """The row of a key, if it was made with this fingerprint."""
        return self._rows.get((key, made_for))

    def rows(self, made_for: str) -> list[Row]:
        """All rows that were made with a fingerprint, the oldest first."""
        return [row for (_, own), row in self._rows.items() if own == made_for]

    def forget_begun(self) -> None:
        """Forget that a row was begun and not finished. Finished rows stay."""
        if self.begun is not None:
            self._write({"key": self.begun, "made_for": "", "row": None})
            self.begun = None

    def begin(self, key: str, made_for: str) -> None:
        """Record that a row is being measured."""
        self.begun = key
        self._write({"key": key, "made_for": made_for})

    def finish(self, key: str, made_for: str, row: Row) -> None:
        """Record a finished row."""
        self.begun = None
        self._rows[key, made_for] = row
        self._write({"key": key, "made_for": made_for, "row": row})

    def close(self) -> None:
        """Close the file and release the lock."""
        with contextlib.suppress(OSError):  # failed writes were already reported
            self._file.close()
        self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, entry: Mapping[str, Any]) -> None:
        try:
            text = json.dumps({**entry, "time": time.time()}, default=plain)
            self._file.write(f"{_checksum(text)} {text}\n")
            self._file.flush()
        except OSError as error:
            raise NtkbenchError(f"{self.path} cannot be written: {os.strerror(error.errno or 0)}") from None


CURRENT: ContextVar[Rows | None] = ContextVar("rows", default=None)
"""The rows of the study that is being measured."""


class Rows:
    """Rows of one study in a journal, by their cases; equal cases are distinguished by their order.

    Args:
        journal: the journal that keeps them.
        made_for: fingerprint of the study.
        whence: provenance columns of new rows.
        say: called with a text that names the row being measured.
        place: columns with the values that a row of an earlier run must have. Others are measured again.

    Attributes:
        made: rows so far, including those from earlier runs.
        seconds: total seconds of the new rows' measurements.
    """

    def __init__(
        self,
        journal: Journal,
        made_for: str,
        whence: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda _: None,
        place: Mapping[str, Any] | None = None,
    ) -> None:
        self._journal, self._made_for, self.whence, self._say = journal, made_for, dict(whence or {}), say
        self._place = dict(place or {})
        self._count: dict[str, int] = {}
        self._own: list[tuple[str, Row]] = []
        self.made: list[Row] = []
        self.seconds = 0.0

    def key(self, case: Mapping[str, Any]) -> str:
        """The key of the next case."""
        said = json.dumps(case, default=plain)
        self._count[said] = self._count.get(said, 0) + 1
        return said if self._count[said] == 1 else f"{said} #{self._count[said]}"

    def before(self, key: str) -> Row | None:
        """The row of a key, if an earlier run made it in the same place."""
        row = self._journal.row(key, self._made_for)
        if row is None or not self._place.items() <= row.items():
            return None
        self.made.append(row)
        return row

    def begin(self, key: str) -> None:
        """Record that a row is being measured."""
        self._say(f"row {len(self.made) + 1}")
        self._journal.begin(key, self._made_for)

    def finish(self, key: str, row: Row, seconds: float) -> None:
        """Record a finished row, and the seconds that it took."""
        self.made.append(row)
        self._own.append((key, row))
        self.seconds += seconds
        self._journal.finish(key, self._made_for, row)

    def take_back(self, columns: Mapping[str, Any]) -> None:
        """Overwrite columns of the new rows; rows from earlier runs stay unchanged."""
        for key, row in self._own:
            row |= columns
            self._journal.finish(key, self._made_for, row)


@contextlib.contextmanager
def kept(rows: Rows | None) -> Iterator[None]:
    """Within this context, :data:`CURRENT` is a study's rows."""
    token = CURRENT.set(rows)
    try:
        yield
    finally:
        CURRENT.reset(token)


def begun(file: Path) -> str | None:
    """The key of the row that a journal has begun and not finished, if any."""
    key = None
    for entry in _entries(file):
        key = None if "row" in entry else entry["key"]
    return key


def rows_of(files: Iterable[Path]) -> dict[tuple[str, str], Row]:
    """The rows in some journals by key and fingerprint; the latest one if a row was made or dropped several times."""
    found: dict[tuple[str, str], Row] = {}
    entries: list[tuple[float, dict[str, Any]]] = []
    for file in files:
        when = 0.0
        for entry in _entries(file):
            when = max(when, entry.get("time", 0.0))  # a file keeps its order, even if the clock was set back
            entries.append((when, entry))
    for _, entry in sorted(entries, key=lambda dated: dated[0]):
        known = entry["key"], entry["made_for"]
        if entry.get("row"):
            found[known] = entry["row"]
        elif "row" in entry:  # it was dropped
            found.pop(known, None)
    return found


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        checksum, _, text = line.partition(" ")
        if checksum == _checksum(text):
            yield json.loads(text)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """A NumPy scalar as a Python number, for JSON."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be kept in a journal")


def write(path: Path, data: Any) -> None:
    """Write data as JSON, whole or not at all."""
    paths.write_atomically(path, json.dumps(data, default=plain, indent=1) + "\n")
