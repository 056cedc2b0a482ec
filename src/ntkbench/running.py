"""What every measuring process does alike: its threads, its clock, and the words for how something ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ntkbench.errors import OverMemory, Unavailable


def use_threads(threads: int) -> None:
    """One number of threads for all backends: torch is told; XLA goes by the processors that the process may use."""
    import torch

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def timed(call: Callable[[], Any], seconds: float, most: int = 100) -> tuple[list[float], list[Any]]:
    """Seconds of each call and what it returned, again and again until ``seconds`` are over; one call at least.

    Args:
        call: must end with a number on the host, so that a device has done its work.
        seconds: after which no further call is begun.
        most: calls.
    """
    times, found = [], []
    while not times or (len(times) < most and sum(times) < seconds):
        start = time.perf_counter()
        found.append(call())
        times.append(time.perf_counter() - start)
    return times, found


def quartiles(name: str, values: Any) -> dict[str, float]:
    """Median and quartiles as columns ``name``, ``name_q25``, ``name_q75``."""
    q25, q50, q75 = np.quantile(np.asarray(values, dtype=float), (0.25, 0.5, 0.75)).tolist()
    return {name: q50, f"{name}_q25": q25, f"{name}_q75": q75}


def ending(error: Exception) -> dict[str, str]:
    """Status and reason of what ended with an exception, as a row says them."""
    if isinstance(error, Unavailable):
        return {"status": "skipped", "reason": str(error)}
    out_of_memory = isinstance(error, MemoryError) or _says_out_of_memory(error)
    reason = str(error) if isinstance(error, OverMemory) else f"{type(error).__name__}: {error}"
    return {"status": "out_of_memory" if out_of_memory else "failed", "reason": reason.splitlines()[0]}


def _says_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return any(sign in text for sign in ("out of memory", "can't allocate memory", "resource_exhausted"))
