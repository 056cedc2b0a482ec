"""One execution of one cell: prepared, watched, and recorded whatever becomes of it.

An execution is a process that measures one aspect of a cell (seconds, memory or accuracy). What it finds out beyond the
one number that asv keeps goes into a record, a small JSON file that is there from the start of the execution, so that a
process that was killed or crashed leaves a trace as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ntkbench import methods, operators, paths, problems
from ntkbench.estimate import Estimate
from ntkbench.measure import cells, outcomes, timing, watchdog
from ntkbench.measure.cells import Cell
from ntkbench.measure.config import Config
from ntkbench.problems.base import reference

ASPECTS = ("accuracy", "memory", "seconds")
"""In the order in which asv takes them."""


class Refused(Exception):
    """The cell is not to be measured; the reason is the message."""


@dataclass
class Execution:
    """A cell in this process, ready to be estimated."""

    cell: Cell
    config: Config
    aspect: str
    record: Path
    found: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, cell: Cell, config: Config, aspect: str, records: Path) -> Execution:
        """Start watching, load the problem, prepare the method and, but for memory, make the first call.

        Raises:
            Refused: the cell is left out, or an earlier execution of it failed.
        """
        for earlier in ASPECTS[: ASPECTS.index(aspect)]:
            status = read(record_file(records, cell, earlier)).get("status", "ok")
            if status != "ok":
                raise Refused(f"measuring its {earlier} ended with {status}")
        execution = cls(cell, config, aspect, record_file(records, cell, aspect))
        execution._write(status="started")
        limit = config.memory_limit_mb * 2**20
        os.environ["NTKBENCH_MEMORY_LIMIT"] = str(int(limit))
        watchdog.guard(config.time_limit_s, limit, execution.record.with_suffix(".verdict"))
        with execution._recorded():
            execution._prepare()
        return execution

    def _prepare(self) -> None:
        timing.use_threads(self.config.threads)
        problem = problems.load(self.cell.problem)
        if reason := cells.unsupported(self.cell, problem, self.config):
            raise Refused(reason)
        self._method = methods.get(self.cell.method)
        start = time.perf_counter()
        self._prepared = self._method.prepare(problem, self.config.target(self.cell.backend))
        if self.aspect == "memory":
            self.found["baseline_bytes"] = psutil.Process().memory_info().rss
            return
        self._first = self.estimate()
        self.found["first_call_seconds"] = time.perf_counter() - start

    def estimate(self, seed: int = 0) -> Estimate:
        """The timed region: from device-ready inputs to a number on the host."""
        return self._method.estimate(self._prepared, self.cell.metric, self.cell.passes, seed)

    def recorded_estimate(self) -> None:
        """:meth:`estimate` whose failure becomes part of the record."""
        with self._recorded():
            self.estimate()

    @property
    def passes(self) -> float | None:
        """Passes that the first call spent."""
        return self._first.passes

    @property
    def first_call_seconds(self) -> float:
        """Seconds of prepare and first call together: tracing, compiling and running once."""
        return self.found["first_call_seconds"]

    def error(self) -> float:
        """Median relative error over seeds against the exact value; all estimates go into the record.

        Takes up to ``config.seeds`` seeds, fewer (but at least five) where they take longer than
        ``config.error_seconds``.
        """
        with self._recorded():
            values = reference.exact(problems.load(self.cell.problem))
            exact = values[self.cell.metric]
            estimates = [self._first]
            start = time.perf_counter()
            while self._method.takes_passes and len(estimates) < self.config.seeds:
                if len(estimates) >= 5 and time.perf_counter() - start > self.config.error_seconds:
                    break
                estimates.append(self.estimate(seed=len(estimates)))
            self.found |= {
                "reference": exact,
                "effective_rank": values["effective_rank"],
                "estimates": [e.value for e in estimates],
                "standard_errors": [e.standard_error for e in estimates],
                "covered": [e.covers(exact, self.config.dtype) for e in estimates],
                "passes_spent": estimates[0].passes,
                "notes": "; ".join(estimates[0].notes),
            }
            return statistics.median(abs(e.value - exact) / abs(exact) for e in estimates)

    def end(self) -> None:
        """Declare the execution done."""
        self.found["gpu_peak_bytes"] = operators.device_memory(self.config.target(self.cell.backend))
        self._write(status="ok", **self.found)

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        try:
            yield
        except Refused as error:
            self._write(status="skipped", reason=str(error))
            raise
        except Exception as error:
            self._write(**outcomes.of_exception(error).columns())
            raise

    def _write(self, **record: Any) -> None:
        paths.write_atomically(self.record, json.dumps(record))


def record_file(records: Path, cell: Cell, aspect: str) -> Path:
    """Where the record of an execution lies."""
    return records / f"{cell.label.replace('/', '~')}.{aspect}.json"


def read(record: Path) -> dict[str, Any]:
    """What an execution left, the watchdog's verdict first; empty if it never began."""
    for file in (record.with_suffix(".verdict"), record):
        if file.exists():
            return json.loads(file.read_text())
    return {}
