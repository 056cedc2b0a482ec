"""A method that misbehaves in a different way at each budget; tests add it to a copy of the package."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ntkbench.errors import Unavailable
from ntkbench.estimate import Estimate
from ntkbench.methods.base import Stochastic


class State:
    """State of the process: calls so far, and memory held."""

    calls = 0
    held: list[Any] = []  # noqa: RUF012


def raises(error: BaseException) -> Callable[[], None]:
    """A way to misbehave by raising an error."""

    def way() -> None:
        raise error

    return way


def hog() -> None:
    for _ in range(60):
        State.held.append(np.ones(100 * 2**20 // 8))
        time.sleep(0.01)


def babble() -> None:
    for _ in range(5000):
        print("x" * 80)
    sys.stderr.write("y" * 200_000)


def litter() -> None:
    for _ in range(3):
        subprocess.Popen(["sleep", "300"])
    subprocess.Popen(["sleep", "300"], start_new_session=True)


def fail_later() -> None:
    if State.calls > 1:
        raise ValueError("the second call fails")


def linger() -> None:
    threading.Thread(target=lambda: time.sleep(1000)).start()


def fork() -> None:
    os.fork()


def close_streams() -> None:
    sys.stdout.close()
    sys.stderr.close()


WAYS: list[tuple[str, str, Callable[[], Any]]] = [
    ("failed", "RuntimeError: boom", raises(RuntimeError("boom\nsecond line"))),
    ("failed", "value is nan", lambda: {"value": float("nan")}),
    ("failed", "returned None", lambda: NotImplemented),
    ("failed", "SIGSEGV", lambda: ctypes.string_at(0)),
    ("failed", "exit status 0 and without a result", lambda: os._exit(0)),
    ("failed", "SystemExit: bye", lambda: sys.exit("bye")),
    ("failed", "KeyboardInterrupt", raises(KeyboardInterrupt())),
    ("failed", "the second call fails", fail_later),
    ("failed", "surrogate \\udcff here", raises(ValueError("surrogate \udcff here"))),
    ("failed", 'nul \\x00, comma, "quote" <b>', raises(ValueError('nul \x00, comma, "quote" <b>'))),
    ("failed", "its benchmark server ended", lambda: os.kill(os.getppid(), signal.SIGKILL)),
    ("failed", "SIGTERM", lambda: signal.raise_signal(signal.SIGTERM)),
    ("failed", "SIGKILL", lambda: signal.raise_signal(signal.SIGKILL)),
    ("timeout", "not finished within", lambda: ctypes.PyDLL(None).sleep(100)),  # holds the interpreter's lock
    ("timeout", "not finished within", lambda: signal.raise_signal(signal.SIGSTOP)),
    ("out_of_memory", "over the limit", hog),
    ("skipped", "Unavailable without a message", raises(Unavailable(""))),
    ("ok", "", lambda: {"value": np.float32(2.0), "passes": np.int64(5)}),
    ("ok", "", lambda: {"notes": ("note <script>", "\n\nx")}),
    ("ok", "", babble),
    ("ok", "", litter),
    ("ok", "", linger),
    ("ok", "", fork),
    ("ok", "", lambda: os.chdir("/")),
    ("ok", "", os.environ.clear),
    ("ok", "", close_streams),
]
"""Status, part of the reason, and what a call does; its result changes fields of the estimate or replaces it."""

FIRST = 10
"""The budget of the first of :data:`WAYS`."""


class Misbehaving(Stochastic):
    """Misbehaves in one of :data:`WAYS` at each budget."""

    title = 'bad <script>alert(1)</script>, "q"\nnewline'
    source = "the tests"
    backends = ("torch",)
    metrics = ("trace",)

    def passes_per_probe(self, metric: str) -> int:
        return 1

    def spend(self, prepared: Any, metric: str, passes: int, seed: int) -> Any:
        State.calls += 1
        changed = WAYS[passes - FIRST][2]()
        if changed is NotImplemented:
            return None
        made = {"value": 1.0 + seed, "standard_error": 0.1, "passes": passes, "notes": ()}
        return Estimate(**made | (changed or {}), method=self.name, metric=metric, degrees=5)
