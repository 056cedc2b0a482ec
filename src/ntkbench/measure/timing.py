"""Seconds and bytes of calls. The number of calls is fixed, and never depends on the speed of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ntkbench import operators
from ntkbench.options import Target


def use_threads(threads: int, *, pinned: bool = True) -> None:
    """Set the number of threads of all backends and of NumPy's and SciPy's BLAS; pinning sets that of XLA.

    Args:
        threads: number of threads of each backend.
        pinned: whether to restrict the process to as many processors. Untimed work may share processors with other
            processes and need not be pinned. No effect on macOS and Windows.
    """
    import scipy.linalg  # noqa: F401 - a BLAS that is loaded later would take all processors
    import threadpoolctl
    import torch

    if pinned and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    threadpoolctl.threadpool_limits(threads)


def import_early(*, with_jax: bool) -> None:
    """Import modules that problems and backends import at first use, so that forked processes need not.

    No backend is started, since it would not survive a fork. The garbage collector ignores the imported objects.

    Args:
        with_jax: whether to import JAX, if it is installed.
    """
    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # noqa: F401

    if with_jax and importlib.util.find_spec("jax"):
        import jax.numpy  # noqa: F401
    gc.freeze()


class Timed(NamedTuple):
    """Seconds of calls.

    Attributes:
        first_seconds: seconds of the first call, which traces and compiles and is not among ``seconds``.
        seconds: seconds of each later call.
        first: what the first call returned.
    """

    first_seconds: float
    seconds: list[float]
    first: Any

    def columns(self) -> dict[str, float]:
        """Columns of a row: ``seconds`` with its quartiles, ``first_call_seconds`` and ``calls``."""
        return {
            **quartiles("seconds", self.seconds),
            "first_call_seconds": self.first_seconds,
            "calls": len(self.seconds),
        }


def timed(call: Callable[[], Any], calls: int) -> Timed:
    """Seconds of a first call and of a number of calls after it.

    Args:
        call: must end with a number on the host, so that a device has done its work.
        calls: number of timed calls.
    """
    start = time.perf_counter()
    first = call()
    first_seconds = time.perf_counter() - start
    return Timed(first_seconds, [_seconds(call) for _ in range(calls)], first)


def in_turn(calls: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of each call, in interleaved rounds, so that a temporary slowdown of the machine affects all calls.

    There is no warm-up.

    Args:
        calls: each must end with a number on the host, so that a device has done its work.
        rounds: how often each is called.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, own in zip(calls, times, strict=True):
            own.append(_seconds(call))
    return times


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def quartiles(name: str, values: Any) -> dict[str, float]:
    """Median and quartiles as columns ``name``, ``name_q25``, ``name_q75``."""
    q25, q50, q75 = np.quantile(np.asarray(values, dtype=float), (0.25, 0.5, 0.75)).tolist()
    return {name: q50, f"{name}_q25": q25, f"{name}_q75": q75}


def settle_memory() -> int | None:
    """Release freed memory and reset the process's peak; returns resident bytes, ``None`` without kernel support.

    Linux keeps a process's peak and lets the process reset it. Freed memory is first released to the system if the C
    library supports that; otherwise it counts as held, and small peaks are underestimated.
    """
    import psutil

    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # the GNU library has it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return None
    return int(psutil.Process().memory_info().rss)


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """Peak resident bytes of a call, minus those before it; ``None`` without kernel support."""
    before = settle_memory()
    call()
    if before is None:
        return None
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return max(0, 1024 * int(peak) - before)


def device_peak_bytes(call: Callable[[], Any], target: Target) -> int | None:
    """Peak of all allocations on the target's GPU during a call; ``None`` on the CPU, or if it is not known.

    JAX cannot reset its peak. It is that of the call only if the call raises it.
    """
    operators.reset_device_memory(target)
    before = operators.device_memory(target)
    call()
    after = operators.device_memory(target)
    return after if before is not None and after is not None and after > before else None


def peak_bytes_on(target: Target, call: Callable[[], Any]) -> int | None:
    """Memory of a call: :func:`peak_bytes` on the CPU, :func:`device_peak_bytes` on a GPU."""
    allocated: list[int | None] = []
    resident = peak_bytes(lambda: allocated.append(device_peak_bytes(call, target)))
    return resident if operators.device_memory(target) is None else allocated[0]
