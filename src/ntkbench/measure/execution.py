"""One execution of one cell in a process of its own: prepared, called and recorded, even if it fails.

An execution prepares the call whose time or peak asv measures. Results beyond the one number that asv keeps go into a
record, a small JSON file. A failure is recorded as soon as it happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ntkbench import methods, paths, problems
from ntkbench.errors import NtkbenchError, Unavailable
from ntkbench.estimate import Estimate
from ntkbench.measure import cells, outcomes, seeds, timing
from ntkbench.measure.cells import Cell
from ntkbench.measure.config import Config
from ntkbench.measure.seeds import Reruns
from ntkbench.metrics import OF_KERNEL

ASPECTS = ("memory", "seconds")
"""What a cell's executions measure, in this order; ``seconds`` includes the errors over seeds."""


class Execution:
    """A cell in this process, ready to be estimated."""

    def __init__(self, cell: Cell, config: Config, record: Path, contents: str | None = None) -> None:
        """Load the problem and prepare the method, without an estimate.

        Args:
            cell: what is measured.
            config: the settings.
            record: file for the results.
            contents: hash of the weights and inputs that the exact values belong to; not checked if not given.

        Raises:
            Unavailable: the cell is skipped.
            NtkbenchError: the problem has other weights or inputs.
        """
        self._cell, self._config, self._record = cell, config, record
        self._found: dict[str, Any] = {}
        self._pid = os.getpid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends an interrupted run
        with self.recorded():
            timing.use_threads(config.threads)
            self._problem = problems.load(cell.problem)
            if contents is not None and self._problem.contents() != contents:
                raise NtkbenchError(
                    f"{cell.problem} has other weights or inputs than when its exact values were computed: "
                    "make it the same in every process, with seeded random numbers or with weights in one cache"
                )
            if reason := cells.unsupported(cell, self._problem, config):
                raise Unavailable(reason)
            self._method = methods.get(cell.method)
            start = time.perf_counter()
            self._prepared = self._method.prepare(self._problem, config.target(cell.backend))
            self._prepare_seconds = time.perf_counter() - start

    def estimate(self, seed: int = 0) -> Estimate:
        """The timed region: from device-ready inputs to a number on the host."""
        return self._method.estimate(self._prepared, self._cell.metric, self._cell.passes, seed)

    def first_call(self) -> None:
        """The first estimate, which traces and compiles; records its seconds plus those of preparing."""
        with self.recorded():
            start = time.perf_counter()
            self._first = seeds.checked(self.estimate(), self._cell.metric)
            self._keep(first_call_seconds=self._prepare_seconds + time.perf_counter() - start)

    def errors(self, exact: dict[str, float] | None = None) -> None:
        """Errors over the cell's seeds. Call it after :meth:`first_call`, whose estimate is the first of them.

        Args:
            exact: exact values by metric; looked up if not given.
        """
        with self.recorded():
            metric = self._cell.metric
            if exact is None or metric in OF_KERNEL:
                from ntkbench.problems.base import reference

                exact = reference.exact(self._problem) if exact is None else exact
            if metric in OF_KERNEL:
                exact = exact | reference.of_kernel(self._problem)
                if metric not in exact:
                    raise Unavailable(f"the exact {metric} of {self._problem.name} is not known in float64")
            start = time.perf_counter()
            reruns = Reruns(exact[metric], self._config.dtype, estimates=[self._first])
            columns = reruns.run(self.estimate, range(1, self._cell.seeds)).columns()
            self._keep(
                **columns,
                effective_rank=exact.get("effective_rank"),
                error_seconds=time.perf_counter() - start,
            )

    def settle(self) -> None:
        """Make the first call, which traces and compiles, and record the bytes held before the one that is measured."""
        self.first_call()
        self._keep(baseline_bytes=timing.settle_memory())

    def call_for_peak(self) -> None:
        """The call whose peak is measured; on a GPU, records the allocator's peak, if it is known for this call."""
        with self.recorded():
            target = self._config.target(self._cell.backend)
            start = time.perf_counter()
            gpu = timing.device_peak_bytes(self.estimate, target)
            self._keep(memory_seconds=time.perf_counter() - start, gpu_peak_bytes=gpu)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Record a failure. A forked copy of this process ends here, so that nothing is done twice."""
        try:
            yield
        except BaseException as error:
            self._end_twin()
            self._keep(**outcomes.of_exception(error).columns())
            raise
        self._end_twin()

    def _end_twin(self) -> None:
        if os.getpid() != self._pid:
            os._exit(1)

    def _keep(self, **found: Any) -> None:
        self._found |= found
        paths.write_atomically(self._record, json.dumps(self._found))


def record_file(records: Path, index: int, aspect: str) -> Path:
    """The file with the record of a case's execution."""
    return records / f"{index}.{aspect}.json"


def read(record: Path) -> dict[str, Any]:
    """The record of an execution; empty if there is none that can be read."""
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
