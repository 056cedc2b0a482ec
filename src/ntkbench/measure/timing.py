"""What every measuring process does alike: its threads, its clock, and the words for how something ended."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkbench.errors import OverMemory, Unavailable

PATIENCE = 5.0
"""Seconds after which a first call counts."""


def use_threads(threads: int) -> None:
    """One number of threads for all backends: torch is told; XLA goes by the processors that the process may use."""
    import torch

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def timed(call: Callable[[], Any], seconds: float, most: int = 100) -> tuple[list[float], list[Any]]:
    """Seconds of each call and what it returned, again and again until ``seconds`` are over; one call at least.

    A first call, which may trace and compile, is made before and does not count, unless it takes longer than
    :data:`PATIENCE`: what is so long is not made twice for a first call's sake.

    Args:
        call: must end with a number on the host, so that a device has done its work.
        seconds: after which no further call is begun.
        most: calls.
    """
    times, found = [], []
    for i in range(most + 1):
        start = time.perf_counter()
        found.append(call())
        times.append(time.perf_counter() - start)
        if i == 0 and times[0] <= PATIENCE:
            times.clear()
        elif sum(times) >= seconds:
            break
    return times, found


def in_turn(calls: Sequence[Callable[[], Any]], seconds: float, most: int = 200) -> list[list[float]]:
    """Seconds of each call, call by call in turn, so that what slows the machine for a while slows all of them.

    Nothing is called beforehand to warm up.

    Args:
        calls: must end with a number on the host each, so that a device has done its work.
        seconds: of all of them, after which no further round is begun; three rounds at least, unless they take more
            than four times that.
        most: rounds.
    """
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for done in itertools.count(1):
        for call, own in zip(calls, times, strict=True):
            begun = time.perf_counter()
            call()
            own.append(time.perf_counter() - begun)
        spent = time.perf_counter() - start
        if spent > 4 * seconds or (done >= 3 and spent > seconds) or done >= most:
            return times


def quartiles(name: str, values: Any) -> dict[str, float]:
    """Median and quartiles as columns ``name``, ``name_q25``, ``name_q75``."""
    q25, q50, q75 = np.quantile(np.asarray(values, dtype=float), (0.25, 0.5, 0.75)).tolist()
    return {name: q50, f"{name}_q25": q25, f"{name}_q75": q75}


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """Resident bytes that a call took at its peak, over those before it; ``None`` where the kernel does not tell.

    Linux keeps a process's peak and lets the process set it back. Memory that was freed is given back first, where the
    C library can be told to; otherwise it counts as held before, and what is small comes out too small.
    """
    import psutil

    gc.collect()
    with contextlib.suppress(AttributeError):  # the GNU library has it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = psutil.Process().memory_info().rss
        call()
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return max(0, 1024 * int(peak) - before)


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
