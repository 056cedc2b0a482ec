"""Data files: where they are looked for, and how they are had where they are not there.

A file is taken from the folder that ``$NTKBENCH_DATA`` names, else from the cache, else a library fetches it into the
cache. What is in a file is part of the identity of the problems that are made of it, and of the fingerprints of rows.
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
"""Seconds after which a connection that says nothing is given up."""

T = TypeVar("T")


@dataclass(frozen=True)
class DataFile:
    """A file of data that does not come with ntkbench.

    Attributes:
        name: relative to the folder, such as ``"text/tinyshakespeare.txt"``.
        what: what it is, as a message begins with it.
        source: who has it and in what form, for those who provide it by hand.
        fetch: has a library put the file into a folder of data files; ``None`` where none can.
    """

    name: str
    what: str
    source: str
    fetch: Callable[[Path], None] | None = None

    def here(self) -> Path | None:
        """The file, if it is on this machine; nothing is fetched.

        Raises:
            BadInput: the variable names no folder.
        """
        given = folder()
        there = ([given] if given else []) + [_cached()]
        return next((path / self.name for path in there if (path / self.name).is_file()), None)

    def path(self) -> Path:
        """The file, fetched if need be.

        Raises:
            BadInput: the variable names no folder.
            Unavailable: it is not here and cannot be fetched; says how to provide it.
        """
        if found := self.here():
            return found
        missing = f"{self.what} cannot be had: there is no {self.name} in ${VARIABLE} or {_cached()}"
        if self.fetch is None:
            raise Unavailable(f"{missing}; provide it there ({self.source})")
        try:
            with _patience():
                self.fetch(_cached())
        except Exception as error:  # loaders let URL, HTTP, socket and parser errors through as they are
            raise Unavailable(
                f"{missing}, and it could not be fetched ({summary(error)}); provide it there ({self.source})"
            ) from error
        return _cached() / self.name

    def read(self, parse: Callable[[Path], T]) -> T:
        """What a function reads from the file.

        Raises:
            BadInput, Unavailable: as :meth:`path`.
            Corrupt: it cannot be read.
        """
        file = self.path()
        try:
            return parse(file)
        except Exception as error:  # parsers of all formats let nearly every kind of exception through
            raise Corrupt(f"{file} is damaged, or is not {self.source}: {summary(error)}") from error


def folder() -> Path | None:
    """The user's folder of data files; ``None`` where the variable is not set.

    Raises:
        BadInput: it names no folder.
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
