"""Time and memory limits of measuring processes, enforced from outside, and cleanup of processes that a run leaves.

A watched process may hang in a call that never returns to Python, stop itself, or take all memory, so another process
watches it. :class:`Watch` is a thread of the process that starts the measurements. ``python watchdog.py`` is a small
process of its own: the *guardian* of a step of the pipeline. Once the step or its run is gone, for whatever reason, the
guardian ends all processes that the step started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

POLL_SECONDS = 0.05
LOOK_SECONDS = 0.5
"""Seconds between checks of processes, where the system does not report their end."""
STEP = "NTKBENCH_STEP"
"""Environment variable that marks all processes of one step of the pipeline, whatever starts them."""
RUN = "NTKBENCH_RUN"
"""Environment variable with the id of Snakemake's process, whose end is the end of the run."""


class Watched(NamedTuple):
    """A process under limits.

    Attributes:
        process: the process to end once it exceeds a limit.
        since: the time (``time.monotonic``) from which its seconds count.
        seconds: seconds that it may take.
    """

    process: psutil.Process
    since: float
    seconds: float


class Watch(threading.Thread):
    """Ends processes that exceed their time or memory.

    Attributes:
        verdict: status and reason once a process was ended; ``None`` before.

    Args:
        watched: returns the processes to watch now.
        memory: bytes that each may hold.
    """

    def __init__(self, watched: Callable[[], list[Watched]], memory: float) -> None:
        super().__init__(daemon=True)
        self.verdict: tuple[str, str] | None = None
        self._watched, self._memory = watched, memory
        self._done = threading.Event()

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            for watched in self._watched():
                with contextlib.suppress(psutil.Error):
                    self._look(*watched)

    def _look(self, process: psutil.Process, since: float, seconds: float) -> None:
        held = process.memory_info().rss
        if held > self._memory:
            held_gib, allowed = held / 2**30, self._memory / 2**30
            self._end(process, "out_of_memory", f"held {held_gib:.3g} GiB, over the limit of {allowed:.3g} GiB")
        elif time.monotonic() - since > seconds:
            self._end(process, "timeout", f"not finished within the limit of {seconds:g} s")

    def _end(self, process: psutil.Process, status: str, reason: str) -> None:
        self.verdict = self.verdict or (status, reason)
        process.kill()


def children(pid: int) -> list[int]:
    """Direct children of a process, from the kernel's list if there is one: a scan of all processes costs far more."""
    lists = list(Path(f"/proc/{pid}/task").glob("*/children"))
    if not lists:
        with contextlib.suppress(psutil.Error):
            return [child.pid for child in psutil.Process(pid).children()]
    found: list[int] = []
    for file in lists:
        with contextlib.suppress(OSError):
            found += map(int, file.read_text(encoding="utf-8").split())
    return found


@contextlib.contextmanager
def step() -> Iterator[str]:
    """Mark this process as a step of the pipeline and start its guardian; yields the mark.

    All processes started within the context carry the mark. The guardian ends them when this process is gone, or when
    the process that ``$NTKBENCH_RUN`` names is gone; in that case it ends this process too. Processes that are left at
    the end of the step are ended as well.
    """
    mark = f"{os.getpid()}-{time.time_ns()}"
    before = os.environ.get(STEP)
    os.environ[STEP] = mark
    _start_guardian(str(os.getpid()), os.environ.get(RUN, "0"), mark)
    try:
        yield mark
    finally:
        end_marked(mark)
        os.environ.pop(STEP)
        if before is not None:
            os.environ[STEP] = before


def end_marked(mark: str, keep: frozenset[int] = frozenset()) -> None:
    """Kill every process of a step except ``keep``; repeat until none is left, up to 10 times."""
    for _ in range(10):
        found = [process for process in _marked(mark) if process.pid not in keep]
        if not found:
            return
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=1)


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                process.pid != os.getpid()
                and process.status() != psutil.STATUS_ZOMBIE
                and process.environ().get(STEP) == mark
            ):
                yield process


def end_with_parent() -> None:
    """Have the kernel kill this process as soon as its parent is gone (Linux)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other systems lack the call, or such a library
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _start_guardian(*arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != STEP}
    subprocess.Popen(
        [sys.executable, "-P", __file__, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # so that signals that end a run do not end it
    )


def _first_gone(pids: Sequence[int]) -> set[int]:
    """Wait until at least one of the processes is gone; returns those that are.

    Linux reports the end of a process from 5.3 on, unless a sandbox forbids it. Otherwise the processes are polled.
    """
    with contextlib.suppress(AttributeError, OSError):
        return _first_reported(pids)
    while not (gone := {pid for pid in pids if _is_gone(pid)}):
        time.sleep(LOOK_SECONDS)
    return gone


def _first_reported(pids: Sequence[int]) -> set[int]:
    """Wait for the kernel's report.

    Raises:
        AttributeError: the system has no such reports.
        OSError: the kernel refuses them.
    """
    poll, watched, gone = select.poll(), {}, set()
    for pid in pids:
        try:
            watched[end := os.pidfd_open(pid)] = pid
            poll.register(end, select.POLLIN)
        except ProcessLookupError:
            gone.add(pid)  # gone before the wait
    return gone or {watched[end] for end, _ in poll.poll()}


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.Error as error:  # if access is denied, it exists
        return isinstance(error, psutil.NoSuchProcess)


def _guardian(step_pid: int, run_pid: int, mark: str) -> None:
    """Wait until the step or the run is gone; then end the processes that the step started."""
    gone = _first_gone([pid for pid in (step_pid, run_pid) if pid])
    if step_pid not in gone:
        with contextlib.suppress(psutil.Error):
            psutil.Process(step_pid).kill()
    end_marked(mark)


if __name__ == "__main__":
    _guardian(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
