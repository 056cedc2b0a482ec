"""The asv suite: every case is a cell (problem, method, backend, metric, passes), measured in three aspects.

Thin on purpose: what an execution is stands in ``ntkbench.measure.execution``. Versions are fixed, so that a
refactoring does not cut the history; raise one by hand when a number's meaning changes.
"""

from __future__ import annotations

import math
import sys

from ntkbench.errors import Unavailable
from ntkbench.measure import execution, timing, watchdog
from ntkbench.measure.execution import Execution
from ntkbench.measure.plan import Plan

PLAN = Plan.current()

if "run_server" in sys.argv:
    # asv's fork server: what is imported here is paid for once and not once a case.
    watchdog.end_with_parent()
    timing.import_early(with_jax=any(cell.backend == "jax" for cell in PLAN.cells))


class _Case:
    """Prepares an execution once a process, however often asv calls setup."""

    params = PLAN.labels
    param_names = ("case",)
    timeout = PLAN.config.limits.time_s + 30  # the limits are kept from outside, which says why; this is in reserve
    rounds = 1
    aspect: str

    def setup(self, label: str) -> None:
        if hasattr(self, "execution"):
            return
        watchdog.end_with_parent()
        index = PLAN.labels.index(label)
        cell, limits = PLAN.cells[index], PLAN.config.limits
        record = execution.record_file(PLAN.records, index, self.aspect) if PLAN.records else None
        if record is None:
            watchdog.guard(limits.time_s, limits.memory_bytes)
        try:
            self.execution = Execution(cell, PLAN.config, record)
        except Unavailable as error:
            raise NotImplementedError(str(error)) from None  # asv's way of saying n/a
        self.prepare(cell.problem)

    def prepare(self, problem: str) -> None:
        """What comes before the aspect is measured."""
        self.execution.first_call()


class Accuracy(_Case):
    aspect = "accuracy"

    def track_error(self, label: str) -> float:
        return self.execution.errors()

    track_error.version = "2"
    track_error.unit = "median relative error"

    def track_passes(self, label: str) -> float:
        passes = self.execution.passes
        return math.nan if passes is None else passes  # n/a where a method is not made of passes

    track_passes.version = "1"
    track_passes.unit = "passes"

    def track_first_call_seconds(self, label: str) -> float:
        return self.execution.first_call_seconds

    track_first_call_seconds.version = "1"
    track_first_call_seconds.unit = "seconds"


class Memory(_Case):
    aspect = "memory"

    def prepare(self, problem: str) -> None:
        self.execution.settle()

    def peakmem_estimate(self, label: str) -> None:
        self.execution.call_for_peak()

    peakmem_estimate.version = "1"


class Seconds(_Case):
    aspect = "seconds"
    number = 1
    warmup_time = 0  # the first call was made in setup

    def setup(self, label: str) -> None:
        super().setup(label)
        calls = PLAN.cells[PLAN.labels.index(label)].calls
        self.repeat = (calls, calls, math.inf)

    def prepare(self, problem: str) -> None:
        super().prepare(problem)
        if PLAN.records:  # the pipeline takes errors from the same process
            self.execution.errors(PLAN.exact.get(problem))

    def time_estimate(self, label: str) -> None:
        with self.execution.recorded():
            self.execution.estimate()

    time_estimate.version = "2"
