"""What a row is of, and how its measurement ended: the same for cells, studies, problems and comparisons."""

from __future__ import annotations

import contextlib
import json
import signal
from pathlib import Path
from typing import NamedTuple

from ntkbench.errors import OverMemory, Unavailable, one_line, summary

OK, SKIPPED, FAILED, TIMEOUT, OUT_OF_MEMORY = STATUSES = ("ok", "skipped", "failed", "timeout", "out_of_memory")
KEY = ("problem", "method", "backend", "metric", "passes")
"""Columns that identify a cell."""
PASSING = (FAILED, TIMEOUT, OUT_OF_MEMORY)
"""Statuses that another attempt may change."""

KILLED = -9
"""Exit status of a process that was killed; Windows has no name for the signal."""


class Outcome(NamedTuple):
    """Status and reason, as a row has them."""

    status: str
    reason: str = ""

    def columns(self) -> dict[str, str]:
        """Columns of a row."""
        return self._asdict()


EDITED = Outcome(FAILED, "a file that this depends on was edited while it was measured")


def may_change(file: Path) -> bool:
    """Whether a table in CSV, or the facts of problems in JSON, has a row that another attempt may change.

    False if the file cannot be read.
    """
    import pandas as pd

    try:
        if file.suffix == ".json":
            statuses = {row["status"] for row in json.loads(file.read_text(encoding="utf-8")).values()}
        else:
            statuses = set(pd.read_csv(file, usecols=["status"], encoding="utf-8")["status"])
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        return False
    return not statuses.isdisjoint(PASSING)


def of_exception(error: BaseException) -> Outcome:
    """The outcome of a measurement that ended with an exception, of any type."""
    reason = summary(error)
    # The type of these errors says no more than the status.
    ours = isinstance(error, (Unavailable, OverMemory)) and str(error).strip()
    reason = one_line(str(error)) if ours else reason
    if isinstance(error, Unavailable):
        return Outcome(SKIPPED, reason)
    out_of_memory = isinstance(error, MemoryError) or any(sign in reason.lower() for sign in _SIGNS)
    return Outcome(OUT_OF_MEMORY if out_of_memory else FAILED, reason)


_SIGNS = ("out of memory", "can't allocate memory", "resource_exhausted")


def of_exit(code: int) -> Outcome:
    """The outcome of a process that ended before it could report why.

    Args:
        code: its exit status, negative for a signal.
    """
    if code < 0:
        try:
            ended = f"by {signal.Signals(-code).name}"
        except ValueError:
            ended = f"by signal {-code}"
    else:
        ended = f"with exit status {code}"
    return Outcome(FAILED, f"the process ended {ended} and without a result")


def say(text: str) -> None:
    """Print a line, and ignore errors: a plug-in may have closed standard output."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(text, flush=True)
