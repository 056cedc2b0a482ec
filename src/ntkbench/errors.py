"""Errors that a user can act on; every message names what was wrong and what is allowed."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any


class NtkbenchError(Exception):
    """Base class of all exceptions that ntkbench raises on purpose."""


class BadInput(NtkbenchError, ValueError):
    """An argument or a configuration value that cannot be used."""


class NotFinite(BadInput):
    """Weights, outputs or gradients of a network that are nan or infinite."""


class Unavailable(NtkbenchError):
    """A data set, package or device that is not available here, or a computation over a limit; tables record the
    reason."""


class Missing(Unavailable):
    """A missing package, or an analysis that a library does not provide; methods that do not need it still work."""


class Unsupported(BadInput, Unavailable):
    """A network that a method turns out not to support once it is prepared; tables skip it."""


class NoSecondPass(BadInput):
    """A network that keeps a part of its first call's graph, which a backward pass frees."""


class OverMemory(NtkbenchError, MemoryError):
    """A computation that would need more memory than it may use."""


class Undefined(NtkbenchError, ArithmeticError):
    """A metric that is undefined for a kernel, such as the effective rank of zero."""


class DidNotTrain(NtkbenchError):
    """A network whose training failed: it did not reach the requested loss, diverged or raised an exception."""


class NoExactValue(NtkbenchError):
    """A problem whose exact metrics cannot be computed."""


class Corrupt(NtkbenchError):
    """A committed file that has changed since it was written."""


def unknown(kind: str, value: object, allowed: Iterable[str]) -> BadInput:
    """The error for a name that does not exist; its message has the name, the closest one and all allowed ones."""
    names = sorted(allowed)
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    choices = f"allowed: {', '.join(names)}" if names else "there is none"
    return BadInput(f"unknown {kind} {value!r}{hint}; {choices}")


def missing(module: str, what: str, install: str) -> Missing:
    """The error for a module that is not installed.

    Args:
        module: its import name.
        what: what needs the module; begins the message.
        install: arguments of ``pip install``.
    """
    return Missing(f"{what} needs {module}, which is not installed; install it with: pip install {install}")


def need(module: str, what: str, install: str) -> None:
    """Check that an optional module is installed; arguments as of :func:`missing`.

    Raises:
        Missing: the module is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise missing(module, what, install)


JAX = "'.[jax]' (in ntkbench's checkout)"
NEURAL_TANGENTS = f"--no-deps neural-tangents==0.6.5, after {JAX}"
"""Without its declared dependencies, which include TensorFlow."""

LONGEST = 500
"""Maximum number of characters that :func:`one_line` returns."""


def one_line(text: str) -> str:
    """The first non-blank line of any text, made printable and encodable."""
    line = next((line for line in text.splitlines() if line.strip()), "").strip()
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)
    line = line.encode("utf-8", "backslashreplace").decode("utf-8")
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def summary(error: BaseException) -> str:
    """Type and message of any exception on one line."""
    name = one_line(type(error).__name__)
    try:
        message = one_line(str(error))
    except Exception as unreadable:
        message = f"its message cannot be read ({type(unreadable).__name__})"
    return f"{name}: {message}" if message else f"{name} without a message"


def reason(error: BaseException) -> str:
    """An exception on one line: the message alone if ntkbench raised it on purpose, else as :func:`summary`."""
    return one_line(str(error)) if isinstance(error, NtkbenchError) else summary(error)


@contextlib.contextmanager
def as_one_line() -> Iterator[None]:
    """End a command with only the message of an error that its user can act on."""
    try:
        yield
    except NtkbenchError as error:
        sys.exit(f"ntkbench: {error}")


def by_name(kind: str, things: Mapping[str, Any], use: Callable[[Any], Any]) -> dict[str, Any]:
    """``use`` of each thing, by name; an error on purpose names the thing, such as ``group 'head'``."""
    found = {}
    for name, each in things.items():
        try:
            found[name] = use(each)
        except NtkbenchError as error:
            error.args = (f"{kind} {name!r}: {error}", *error.args[1:])
            raise
    return found
