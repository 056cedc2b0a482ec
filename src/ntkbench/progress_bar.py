"""A bar of the passes of a long computation, on a terminal or in a notebook.

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
FORMAT = "{desc}: {n:.0f}/{total:.0f} passes [{elapsed}<{remaining}]"
OPEN = "{desc}: {n:.0f} passes [{elapsed}]{postfix}"
"""Where the number of passes is not known beforehand."""

_CURRENT: contextvars.ContextVar[tuple[Any, int] | None] = contextvars.ContextVar("progress_bar", default=None)


@contextlib.contextmanager
def of_passes(what: str, samples: int, total: float | None = None) -> Iterator[None]:
    """Show the passes of a computation while it runs; one that is part of another has no bar of its own.

    Nothing is shown, and tqdm not imported, where standard error is neither a terminal nor a notebook's.

    Args:
        what: is computed.
        samples: N of a pass.
        total: passes that it will take at most, if that is known.
    """
    if _CURRENT.get() is not None or not _is_seen():
        yield
        return
    from tqdm.auto import tqdm

    known = total is not None and 0 < total < math.inf
    bar = tqdm(
        desc=what,
        total=total if known else None,
        bar_format=FORMAT if known else OPEN,
        delay=DELAY,
        leave=False,
    )
    token = _CURRENT.set((bar, samples))
    try:
        yield
    finally:
        _CURRENT.reset(token)
        bar.close()


def advance(sample_passes: float) -> None:
    """Report passes, each counted once per sample."""
    if (current := _CURRENT.get()) is not None:
        bar, samples = current
        bar.update(sample_passes / samples)


def say(remark: str) -> None:
    """Show a remark beside the passes, such as the width of an interval."""
    if (current := _CURRENT.get()) is not None:
        current[0].set_postfix_str(remark, refresh=False)


def _is_seen() -> bool:
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())
