"""A kernel written to a file that is larger than the allowed memory: killed midway, and resumed.

A first process writes the kernel until it is killed, and a second one resumes and finishes it. The blocks between the
first and the last samples are then compared with the same kernel in memory.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from pydantic import Field, PositiveFloat

from ntkbench import problems
from ntkbench.api import ntk
from ntkbench.errors import NtkbenchError
from ntkbench.measure import outcomes, timing, watchdog
from ntkbench.measure.schema import ProblemLabel
from ntkbench.studies import base

TIMED = True
PLUGINS = base.methods_and_problems()
COMPARED = 8
"""Samples at each end of the kernel that are compared."""


class Settings(base.Settings):
    """The kernels.

    Attributes:
        problems: labels of problems; the file of each has n x n entries and is removed afterwards.
        killed_at: share of the file's parts after which the first process is killed.
    """

    USES = base.OF_TARGET

    problems: list[ProblemLabel] = Field(default=["fc_relu[N=5000]"], min_length=1)
    killed_at: PositiveFloat = Field(default=0.3, lt=1)


def run(settings: Settings) -> pd.DataFrame:
    """One row for each problem.

    ``seconds`` is the time of both processes with their certificates, without imports, and ``resumed_seconds`` that of
    the second one. ``memory_bytes`` is the larger of their increases in resident memory, and ``allowed_bytes`` the
    value of ``memory=``. ``kept`` is the number of ``parts`` that the second process found complete.
    """
    return base.table(
        base.row({"problem": label}, functools.partial(_measure, settings, label)) for label in settings.problems
    )


def _measure(settings: Settings, label: str) -> dict[str, Any]:
    problem, target = problems.load(label), settings.target()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "theta.npy"
        killed_after, first_peak, _ = _written(settings, label, file, settings.killed_at)
        kept = _progress(file)[0]
        resumed, peak, difference = _written(settings, label, file)
        done, parts = _progress(file)
        if done < parts:
            raise NtkbenchError(f"{done} of {parts} parts are complete")
        size = file.stat().st_size
    return {
        **base.sizes(problem),
        "file_bytes": size,
        "parts": parts,
        "kept": kept,
        "seconds": killed_after + resumed,
        "resumed_seconds": resumed,
        "memory_bytes": max(first_peak, peak),
        "allowed_bytes": target.memory,
        "weights_bytes": problem.P * target.itemsize,
        "difference": difference,
        "calls": 1,
    }


def _progress(file: Path) -> tuple[int, int]:
    """Number of complete parts of a file, and of all its parts; ``(0, 1)`` if none is noted yet."""
    try:
        noted = json.loads(file.with_name(f"{file.name}.progress").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return 0, 1
    return noted["done"], noted["parts"]


def _written(
    settings: Settings, label: str, file: Path, killed_at: float | None = None
) -> tuple[float, int, float | None]:
    """Write the file in a separate process, which is killed at a share of its parts or runs to the end.

    Returns:
        Seconds and resident bytes that writing took, and the difference from the kernel in memory (``None`` if killed).

    Raises:
        NtkbenchError: the process failed, exceeded the limits, or finished before it could be killed.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_write, args=(there, settings, label, str(file)))
    child.start()
    there.close()
    process, limits, found = psutil.Process(child.pid), settings.limits, None
    watched = watchdog.Watched(process, time.monotonic(), limits.time_s)
    with watchdog.Watch(lambda: [watched], limits.memory_bytes) as watch:
        try:
            before, start, peak = here.recv(), time.monotonic(), 0
            while not here.poll(watchdog.POLL_SECONDS):
                peak = max(peak, process.memory_info().rss - before)
                done, parts = _progress(file)
                if killed_at is not None and done >= killed_at * parts:
                    child.kill()
                    child.join()
                    return time.monotonic() - start, peak, None
            found = here.recv()
        except (EOFError, psutil.NoSuchProcess):  # it was killed
            pass
        child.join()
    if isinstance(found, list):
        if killed_at is None:
            return found[0], found[1], found[2]
        raise NtkbenchError("the file was complete before its process could be killed")
    _, reason = found or watch.verdict or outcomes.of_exit(child.exitcode or 0)
    raise NtkbenchError(f"writing the kernel: {reason}")


def _write(there: Connection, settings: Settings, label: str, file: str) -> None:
    watchdog.end_with_parent()
    try:
        import torch

        from ntkbench.modules import copied, load

        timing.use_threads(settings.threads)
        problem, target = problems.load(label), settings.target()
        network = load(copied(problem.network), {**problem.weights("theta_0"), **problem.fixed("theta_0")})
        x = torch.from_numpy(problem.x)
        kernel = functools.partial(ntk, network, device=target.device, dtype=target.dtype, memory=target.memory)
        made: list[Any] = []
        there.send(psutil.Process(os.getpid()).memory_info().rss)
        start = time.perf_counter()
        peak = timing.peak_bytes(lambda: made.append(kernel(x, file=file)))
        seconds = time.perf_counter() - start
        few, rows = min(COMPARED, problem.N), min(COMPARED, problem.N) * problem.O
        expected = kernel(x[-few:], x[:few]).double().cpu()
        off = torch.from_numpy(made[0][-rows:, :rows].copy()).double() - expected
        there.send([seconds, peak or 0, float(off.norm() / expected.norm())])
    except Exception as error:
        there.send(tuple(outcomes.of_exception(error)))
