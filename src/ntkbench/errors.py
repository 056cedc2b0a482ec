"""Errors that a user can act on; every message names what was wrong and what is allowed."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator


class NtkbenchError(Exception):
    """Base of everything that ntkbench raises on purpose."""


class BadInput(NtkbenchError, ValueError):
    """An argument or a configuration value that cannot be used."""


class Unavailable(NtkbenchError):
    """Something that cannot be had here (a data set, a device, so many operations); the reason goes into the table."""


class OverMemory(NtkbenchError, MemoryError):
    """A computation that would need more memory than it may use."""


class Undefined(NtkbenchError, ArithmeticError):
    """A metric that a kernel does not have, such as the effective rank of zero."""


class DidNotTrain(NtkbenchError):
    """A network whose training failed: it did not reach the loss that was asked for, diverged or raised."""


class NoExactValue(NtkbenchError):
    """A problem whose exact metrics cannot be computed."""


class Corrupt(NtkbenchError):
    """A committed file that is not as it was written."""


def unknown(kind: str, value: object, allowed: Iterable[str]) -> BadInput:
    """The error for a name that does not exist: what was given, what was meant, what there is."""
    names = sorted(allowed)
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return BadInput(f"unknown {kind} {value!r}{hint}; allowed: {', '.join(names)}")


def on_one_line(error: BaseException) -> str:
    """Type and message of any exception, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextlib.contextmanager
def as_one_line() -> Iterator[None]:
    """End a command with the message alone where it fails for a reason that its user can act on."""
    try:
        yield
    except NtkbenchError as error:
        sys.exit(f"ntkbench: {error}")
