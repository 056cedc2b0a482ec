"""What asv measures for each case: CPU seconds of a call, its peak memory, and its error.

Versions are fixed, so that a refactoring does not cut the history; raise one by hand when a number's meaning changes.
"""

from __future__ import annotations

import os
import sys
import time

from . import cases

if "run_server" in sys.argv:
    cases.import_early()  # asv's fork server: modules imported here are imported once, not once per case


class _Case:
    """A case, prepared once per process, however often asv calls ``setup``."""

    params = (cases.CASES,)
    param_names = ("case",)
    timeout = 120

    def setup(self, label: str) -> None:
        if hasattr(self, "case"):
            return
        os.environ["NTKBENCH_CACHE"] = os.getcwd()  # a folder of asv, removed when the process ends
        cases.one_thread()
        self.case = cases.Case(label)


class Accuracy(_Case):
    def track_error(self, label: str) -> float:
        return self.case.error()

    track_error.version = "2"  # over seeds wherever these change the value
    track_error.unit = "relative error"


class Memory(_Case):
    def track_peak(self, label: str) -> int:
        before = cases.settled_bytes()
        if before is None:
            raise NotImplementedError("peak memory is only available on Linux")
        self.case.call(0)
        return max(0, cases.peak_bytes() - before)

    track_peak.version = "1"
    track_peak.unit = "bytes"


class Seconds(_Case):
    timer = time.process_time
    rounds = 2
    repeat = 8
    number = 1
    warmup_time = 0  # the first call was made in setup

    def time_call(self, label: str) -> None:
        self.case.call(0)

    time_call.version = "1"
