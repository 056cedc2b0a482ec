"""Data files: where they are looked up, and how missing ones are fetched.

A file is looked up in the folder that ``$NTKBENCH_DATA`` names, then in the cache. If it is in neither, a library
fetches it into the cache. The content of a file is part of the identity of the problems that use it, and of the
fingerprints of rows.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ntkbench import paths
from ntkbench.errors import BadInput, Corrupt, Unavailable, summary

VARIABLE = "NTKBENCH_DATA"
"""The environment variable that names the user's folder of data files."""
PATIENCE = 10.0
"""Timeout of a connection, in seconds."""

T = TypeVar("T")


@dataclass(frozen=True)
class DataFile:
    """A data file that does not come with ntkbench.

    Attributes:
        name: path relative to the folder, such as ``"text/tinyshakespeare.txt"``.
        what: description of the data, with which messages begin.
        source: origin and format of the file, for those who provide it by hand.
        fetch: downloads the file through a library into a folder of data files; ``None`` if no library can.
    """

    name: str
    what: str
    source: str
    fetch: Callable[[Path], None] | None = None

    def here(self) -> Path | None:
        """The file, if it exists on this machine; fetches nothing.

        Raises:
            BadInput: the variable does not name a folder.
        """
        given = folder()
        there = ([given] if given else []) + [_cached()]
        return next((path / self.name for path in there if (path / self.name).is_file()), None)

    def path(self) -> Path:
        """The file, fetched if necessary.

        Raises:
            BadInput: the variable does not name a folder.
            Unavailable: it is not on this machine and cannot be fetched; the message says how to provide it.
        """
        if found := self.here():
            return found
        missing = f"{self.what} not found: there is no {self.name} in ${VARIABLE} or {_cached()}"
        if self.fetch is None:
            raise Unavailable(f"{missing}; provide it there ({self.source})")
        try:
            with _patience():
                self.fetch(_cached())
        except Exception as error:  # loaders raise URL, HTTP, socket and parser errors unchanged
            raise Unavailable(
                f"{missing}, and it could not be fetched ({summary(error)}); provide it there ({self.source})"
            ) from error
        return _cached() / self.name

    def read(self, parse: Callable[[Path], T]) -> T:
        """The content of the file, as ``parse`` reads it.

        Raises:
            BadInput, Unavailable: as :meth:`path`.
            Corrupt: it cannot be read.
        """
        file = self.path()
        try:
            return parse(file)
        except Exception as error:  # parsers of all formats raise nearly every kind of exception
            raise Corrupt(f"{file} is damaged, or is not {self.source}: {summary(error)}") from error


def folder() -> Path | None:
    """The user's folder of data files; ``None`` if the variable is not set.

    Raises:
        BadInput: it does not name a folder.
    """
    named = os.environ.get(VARIABLE)
    if named and not Path(named).is_dir():
        raise BadInput(f"${VARIABLE} must name a folder; got {named!r}")
    return Path(named).absolute() if named else None


def _cached() -> Path:
    return paths.cache() / "data"


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
