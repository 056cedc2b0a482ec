"""Errors that a user can act on; every message names what was wrong and what is allowed."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
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


def missing(module: str, what: str, install: str) -> Unavailable:
    """The error for a module that is not installed.

    Args:
        module: its import name.
        what: needs it, as the message begins.
        install: what pip is to install.
    """
    return Unavailable(f"{what} needs {module}, which is not installed; install it with: pip install {install}")


def need(module: str, what: str, install: str) -> None:
    """That a module is installed which most of ntkbench does without; arguments as of :func:`missing`.

    Raises:
        Unavailable: it is not.
    """
    if importlib.util.find_spec(module) is None:
        raise missing(module, what, install)


JAX = "'.[jax]' (in ntkbench's checkout)"
NEURAL_TANGENTS = f"--no-deps neural-tangents==0.6.5, after {JAX}"
"""Without its declared dependencies, among which is TensorFlow."""

LONGEST = 500
"""Characters of a line that :func:`one_line` keeps."""


def one_line(text: str) -> str:
    """The first line of a text that is not blank, printable and encodable whatever was in it."""
    line = next((line for line in text.splitlines() if line.strip()), "").strip()
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)
    line = line.encode("utf-8", "backslashreplace").decode("utf-8")
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def summary(error: BaseException) -> str:
    """Type and message of an exception on one line, whatever the exception is like."""
    name = one_line(type(error).__name__)
    try:
        message = one_line(str(error))
    except Exception as unreadable:
        message = f"its message cannot be read ({type(unreadable).__name__})"
    return f"{name}: {message}" if message else f"{name} without a message"


def reason(error: BaseException) -> str:
    """What an exception says, on one line: the message alone where it was raised on purpose."""
    return one_line(str(error)) if isinstance(error, NtkbenchError) else summary(error)


@contextlib.contextmanager
def as_one_line() -> Iterator[None]:
    """End a command with the message alone where it fails for a reason that its user can act on."""
    try:
        yield
    except NtkbenchError as error:
        sys.exit(f"ntkbench: {error}")
