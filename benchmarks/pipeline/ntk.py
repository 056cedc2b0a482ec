"""The pipeline's suite: every case is a cell (problem, method, backend, metric, passes) of one shard of a run.

Thin on purpose: ``ntkbench.measure.execution`` defines an execution. Only the pipeline runs this suite, through
``ntkbench.measure.engine``; the suite that asv runs over commits is ``benchmarks/history/``.
"""

from __future__ import annotations

import math
import sys

from ntkbench.errors import Unavailable
from ntkbench.measure import execution, plan, timing, watchdog
from ntkbench.measure.execution import Execution

PLAN = plan.Plan.current()


class _Case:
    """Prepares an execution once per process, however often asv calls ``setup``."""

    params = PLAN.labels
    param_names = ("case",)
    timeout = PLAN.config.limits.time_s + 30  # a fallback: the engine enforces the limits and gives the reason
    rounds = 1
    aspect: str

    def setup(self, label: str) -> None:
        if hasattr(self, "execution"):
            return
        watchdog.end_with_parent()
        index = PLAN.labels.index(label)
        cell = PLAN.cells[index]
        try:
            record = execution.record_file(PLAN.records, index, self.aspect)
            self.execution = Execution(cell, PLAN.config, record, PLAN.contents.get(cell.problem))
        except Unavailable as error:
            raise NotImplementedError(str(error)) from None  # asv's way of saying n/a
        self.prepare(cell.problem)

    def prepare(self, problem: str) -> None:
        """Preparation before the aspect is measured."""
        raise NotImplementedError


class Memory(_Case):
    aspect = "memory"

    def prepare(self, problem: str) -> None:
        self.execution.settle()

    def peakmem_estimate(self, label: str) -> None:
        self.execution.call_for_peak()


class Seconds(_Case):
    aspect = "seconds"
    number = 1
    warmup_time = 0  # the first call was made in setup

    def setup(self, label: str) -> None:
        super().setup(label)
        calls = PLAN.cells[PLAN.labels.index(label)].calls
        self.repeat = (calls, calls, math.inf)

    def prepare(self, problem: str) -> None:
        self.execution.first_call()
        self.execution.errors(PLAN.exact.get(problem))

    def time_estimate(self, label: str) -> None:
        with self.execution.recorded():
            self.execution.estimate()


if "run_server" in sys.argv:
    # asv's fork server: modules imported here are imported once, not once per case.
    watchdog.end_with_parent()
    timing.import_early(with_jax=any(cell.backend == "jax" for cell in PLAN.cells))
    print(plan.IMPORTED, flush=True)
