"""A progress bar of the passes of a long computation, on a terminal or in a notebook.

Operators and traced networks report the passes that they take. A bar appears after :data:`DELAY` seconds. It is drawn
by tqdm, which its own environment variables turn off: ``TQDM_DISABLE=1``.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import sys
from collections.abc import Iterator
from typing import Any

DELAY = 3.0
"""Seconds after which a computation is long enough for a bar."""
INTERVAL = 0.1
"""Minimum number of seconds between two updates of a bar."""
FORMAT = "{desc}: {n:.0f}/{total_fmt} passes [{elapsed}<{remaining}]"
OPEN = "{desc}: {n:.0f} passes [{elapsed}]{postfix}"
"""Format if the number of passes is not known beforehand."""

_CURRENT: contextvars.ContextVar[_Bar | None] = contextvars.ContextVar("progress_bar", default=None)


@contextlib.contextmanager
def of_passes(what: str, samples: int, total: float | None = None) -> Iterator[None]:
    """Show the passes of a computation while it runs; a nested one has no bar of its own.

    Nothing is shown, and tqdm not imported, if standard error is neither a terminal nor a notebook's. A bar that cannot
    be drawn is dropped, and the computation continues.

    Args:
        what: what is computed.
        samples: number of samples of a pass.
        total: expected number of passes, if it is known; it may be exceeded.
    """
    if _CURRENT.get() is not None or not _is_seen():
        yield
        return
    shown = _Bar(what, samples, total)
    token = _CURRENT.set(shown)
    try:
        yield
    finally:
        _CURRENT.reset(token)
        shown.close()


def advance(sample_passes: float) -> None:
    """Report passes, multiplied by their number of samples."""
    if (shown := _CURRENT.get()) is not None:
        shown.advance(sample_passes)


def say(remark: str) -> None:
    """Show a remark beside the passes, such as the width of an interval."""
    if (shown := _CURRENT.get()) is not None:
        shown.say(remark)


class _Bar:
    """A bar of tqdm, or nothing once that has failed."""

    def __init__(self, what: str, samples: int, total: float | None) -> None:
        self._samples = samples
        self._bar: Any = None
        known = total is not None and 0 < total < math.inf
        with self._harmless():
            from tqdm.auto import tqdm

            self._bar = tqdm(
                desc=what,
                total=math.ceil(total) if known and total is not None else None,
                bar_format=FORMAT if known else OPEN,
                delay=DELAY,
                mininterval=INTERVAL,
                leave=False,
            )

    def advance(self, sample_passes: float) -> None:
        with self._harmless():
            if self._bar is not None:
                passes = sample_passes / self._samples
                if self._bar.total is not None and self._bar.n + passes > self._bar.total:
                    self._bar.total, self._bar.bar_format = None, OPEN
                self._bar.update(passes)

    def say(self, remark: str) -> None:
        with self._harmless():
            if self._bar is not None:
                self._bar.set_postfix_str(remark, refresh=False)

    def close(self) -> None:
        with self._harmless():
            if self._bar is not None:
                self._bar.close()

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception:  # an error of the terminal or of tqdm must not lose a result
            self._bar = None


def _is_seen() -> bool:
    try:
        return "ipykernel" in sys.modules or sys.stderr.isatty()
    except Exception:  # it may be closed, or be any object with a write method
        return False
