"""The asv suite: every case is (problem, method, backend, metric, passes), measured in three aspects.

Thin on purpose: what an execution is stands in ``ntkbench.measure.execution``. Versions are fixed, so that a
refactoring does not cut the history; raise one by hand when a number's meaning changes.
"""

from __future__ import annotations

import math
import sys

from ntkbench.measure.execution import Execution, Refused
from ntkbench.measure.grid import Cell

from .plan import Plan

PLAN = Plan.current()

if "run_server" in sys.argv:
    # asv's fork server: what is imported here is paid for once and not once a case. Nothing may start a backend.
    import sklearn.datasets  # noqa: F401
    import torch._decomp.decompositions_for_jvp  # torch.func pulls these two in at its first use
    import torch._dynamo  # noqa: F401

    if any(Cell.from_label(label).backend == "jax" for label in PLAN.labels):
        import jax.numpy  # noqa: F401


class _Case:
    """Begins the execution once a process, however often asv calls setup, and ends it after the last call."""

    params = PLAN.labels
    param_names = ("case",)
    timeout = PLAN.config.time_limit_s + 30  # the watchdog comes first and says why
    rounds = 1
    aspect: str

    def setup(self, label: str) -> None:
        if not hasattr(self, "execution"):
            try:
                self.execution = Execution.begin(Cell.from_label(label), PLAN.config, self.aspect, PLAN.records)
            except Refused as refused:
                raise NotImplementedError(str(refused)) from None  # asv's way of saying n/a

    def teardown(self, label: str) -> None:
        if hasattr(self, "execution"):
            self.execution.end()


class Accuracy(_Case):
    aspect = "accuracy"

    def track_error(self, label: str) -> float:
        return self.execution.error()

    track_error.version = "1"
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

    def peakmem_estimate(self, label: str) -> None:
        self.execution.recorded_estimate()

    peakmem_estimate.version = "1"


class Seconds(_Case):
    aspect = "seconds"
    number = 1
    repeat = (1, 20, PLAN.config.timing_seconds)
    min_run_count = 1
    warmup_time = 0  # the first call was made in setup

    def time_estimate(self, label: str) -> None:
        self.execution.estimate()

    time_estimate.version = "1"
