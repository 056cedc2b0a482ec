"""Progress of a run: each step writes its state to a small file, and the run shows all of them on one line."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ntkbench.errors import NtkbenchError
from ntkbench.measure import journal

FOLDER = "progress"
EVERY = 20.0
"""Seconds between lines where standard error is not a terminal."""


KEYS = {"what", "done", "total", "start", "end", "measured"}
"""Keys of a step's file."""


class Progress:
    """Progress of one step of a run.

    Args:
        results: the run's results folder.
        step: name of the step.
        total: total amount of work, in the unit of :meth:`begin`'s ``share``.
    """

    def __init__(self, results: Path, step: str, total: float) -> None:
        self._file = results / FOLDER / f"{step}.json"
        self._total, self._done, self._share, self._start = total, 0.0, 0.0, time.time()
        self.measured = 0.0

    def __enter__(self) -> Progress:
        self._write("begins", None)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._done += self._share
        self._write("done" if kind is None else "ended", time.time())

    def begin(self, what: str, share: float = 1.0) -> None:
        """Report what is done next, and how much of the total that is."""
        self._done += self._share
        self._share = share
        self._write(what, None)

    def _write(self, what: str, end: float | None) -> None:
        said = {"what": what, "done": self._done, "total": self._total, "start": self._start, "end": end}
        with contextlib.suppress(NtkbenchError):  # a measurement does not need its progress shown
            journal.write(self._file, said | {"measured": self.measured})


class Line(threading.Thread):
    """One line on standard error for a whole run, until it is stopped.

    Args:
        results: the run's results folder.
        expected: called when the line starts; returns the expected seconds of each step by name.
    """

    def __init__(self, results: Path, expected: Callable[[], Mapping[str, float]]) -> None:
        super().__init__(daemon=True)
        self._results, self._make_expected = results, expected
        self._expected: dict[str, float] = {}
        self._begun, self._done = time.time(), threading.Event()
        self._terminal = sys.stderr.isatty()

    def stop(self, last: str) -> None:
        """End the line with a last text."""
        self._done.set()
        if self.is_alive():
            self.join()
        self._show(last, "\n")

    def run(self) -> None:
        self._expected = dict(self._make_expected())
        while not self._done.wait(0.5 if self._terminal else EVERY):
            self._show(self.text(), "" if self._terminal else "\n")

    def text(self) -> str:
        """The line's text: the share of the expected time that is done, the time left, and what is being measured."""
        steps = read(self._results, since=self._begun)
        done = sum(self._of(name, step) for name, step in steps.items())
        total = sum({**{name: step["total"] for name, step in steps.items()}, **self._expected}.values())
        share = min(done / total, 0.99) if total else 0.0
        spent = time.time() - self._begun
        left = f", about {_minutes(spent / share - spent)} left" if share > 0.02 else ""
        at = "; ".join(f"{name}: {step['what']}" for name, step in steps.items() if step["end"] is None)
        return f"ntkbench: {share:4.0%} after {_minutes(spent)}{left}  {at}"

    def _of(self, name: str, step: Mapping[str, float]) -> float:
        """The part of a step's expected seconds that is done."""
        expected = self._expected.get(name, step["total"])
        if step["end"]:
            return expected
        if step["total"]:
            return step["done"] / step["total"] * expected
        return min(time.time() - step["start"], 0.95 * expected)  # the step does not know its total

    def _show(self, text: str, end: str) -> None:
        if self._terminal:
            text = f"\r\x1b[K{text[:200]}"
        print(text, end=end, file=sys.stderr, flush=True)


def read(results: Path, since: float = 0.0) -> dict[str, dict[str, float]]:
    """The progress of a run's steps, by name; only of steps that wrote since a given time."""
    found = {}
    for file in sorted((results / FOLDER).glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            if file.stat().st_mtime >= since:
                said = json.loads(file.read_text(encoding="utf-8"))
                if isinstance(said, dict) and said.keys() >= KEYS:
                    found[file.stem] = said
    return found


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
