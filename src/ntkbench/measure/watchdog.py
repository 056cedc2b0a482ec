"""A process of its own that stops another one when it goes over its time or its memory, or is left alone.

Being outside, it works while the other process sits in a long call that never comes back to Python, and it can still
say afterwards why that process is gone. ``python watchdog.py PID SECONDS BYTES VERDICT`` imports nothing of ntkbench,
so that it starts at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

POLL_SECONDS = 0.05


def guard(seconds: float, memory: float, verdict: Path) -> None:
    """Have the calling process killed, and ``verdict`` written, when it goes over its time or its resident memory.

    It is killed without a verdict when the process that started it is gone, so that nothing measures for nobody.

    Args:
        seconds: the time it may take from now.
        memory: the bytes it may hold.
        verdict: a JSON file with status and reason, written only if it is killed.
    """
    arguments = [str(os.getpid()), str(seconds), str(memory), str(verdict)]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen([sys.executable, __file__, *arguments], **quiet)


def _watch(pid: int, seconds: float, memory: float, verdict: Path) -> None:
    start = time.monotonic()
    process = psutil.Process(pid)
    parent = process.ppid()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        resident = process.memory_info().rss
        if resident > memory:
            message = f"held {resident / 2**30:.1f} GiB, over the memory limit of {memory / 2**30:.1f} GiB"
            _stop(process, verdict, "out_of_memory", message)
        elif time.monotonic() - start > seconds:
            _stop(process, verdict, "timeout", f"not done after the time limit of {seconds:g} s")
        elif process.ppid() != parent:
            process.kill()
        time.sleep(POLL_SECONDS)


def _stop(process: psutil.Process, verdict: Path, status: str, reason: str) -> None:
    half = verdict.with_suffix(".half")
    half.write_text(json.dumps({"status": status, "reason": reason}))
    half.replace(verdict)
    process.kill()


if __name__ == "__main__":
    with contextlib.suppress(psutil.NoSuchProcess):  # it finished
        _watch(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]))
