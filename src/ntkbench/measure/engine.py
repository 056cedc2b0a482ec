"""asv's fork server, which runs one case at a time. No other module of the package depends on asv.

Every case runs in a process of its own, forked from a server that has imported the suite; asv measures its time and its
peak memory. Cases run one by one: a cell is finished before the next one begins, and a server failure costs one cell.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import asv.console
import asv.runner
import asv.util
import psutil

from ntkbench import outside, paths
from ntkbench.data import files
from ntkbench.errors import NtkbenchError
from ntkbench.measure import outcomes, plan, watchdog
from ntkbench.measure.limits import Limits
from ntkbench.measure.outcomes import Outcome

SUITE = paths.ROOT / "benchmarks" / "pipeline"
BENCHMARKS = {"memory": "ntk.Memory.peakmem_estimate", "seconds": "ntk.Seconds.time_estimate"}
"""The benchmark of each aspect."""


class Result(NamedTuple):
    """asv's result for one case.

    Attributes:
        value: the benchmark's number; ``None`` where it has samples, or failed.
        samples: samples of a timing benchmark, in seconds per call.
        outcome: how the case ended.
        killed: whether something other than the limits killed it.
    """

    value: float | None
    samples: list[float]
    outcome: Outcome
    killed: bool = False


class Engine:
    """asv's fork server for one plan.

    Args:
        plan_file: file of the plan.
        labels: labels of its cases.
        limits: limits of each case.
        mark: mark of this step's processes; see :func:`ntkbench.measure.watchdog.step`.
        log: file for the output of the server and the cases.
    """

    def __init__(self, plan_file: Path, labels: Sequence[str], limits: Limits, mark: str, log: Path) -> None:
        self._environment = _Environment(plan_file)
        self._params = [[repr(label) for label in labels]]
        self._limits, self._mark, self._log = limits, mark, log
        self._server: Any = None
        asv.console.log.enable()

    def run(self, aspect: str, index: int) -> Result:
        """Measure one aspect of the case with this index."""
        benchmark = {"name": BENCHMARKS[aspect], "params": self._params, "timeout": self._limits.time_s + 30}
        server = self._started()
        first_seen: dict[int, float] = {}

        def watched() -> list[watchdog.Watched]:
            found = []
            for pid in watchdog.children(server.server_proc.pid):
                with contextlib.suppress(psutil.Error):
                    since = first_seen.setdefault(pid, time.monotonic())
                    found.append(watchdog.Watched(psutil.Process(pid), since, self._limits.time_s))
            return found

        try:
            with watchdog.Watch(watched, self._limits.memory_bytes) as watch:
                found = asv.runner.run_benchmark(benchmark, server, profile=False, selected_idx={index})
        except (asv.util.UserError, OSError, RuntimeError, ValueError) as error:
            self.close()
            return Result(None, [], Outcome(outcomes.FAILED, f"its benchmark server ended: {error}"), killed=True)
        finally:
            keep = {server.server_proc.pid} if self._server else set()
            watchdog.end_marked(self._mark, frozenset(keep))
        self._write(f"{aspect} {self._params[0][index]}", found.stderr)
        code = found.errcode
        if watch.verdict:
            return Result(None, [], Outcome(*watch.verdict))
        if code == asv.util.TIMEOUT_RETCODE:
            reason = f"not finished within the limit of {self._limits.time_s:g} s"
            return Result(None, [], Outcome(outcomes.TIMEOUT, reason))
        if code == asv.runner.JSON_ERROR_RETCODE:
            return Result(None, [], outcomes.of_exit(0))
        if code:
            return Result(None, [], outcomes.of_exit(code), killed=code == outcomes.KILLED)
        value = found.result[index]
        samples = found.samples[index] or []
        number = None if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
        return Result(number, samples, Outcome(outcomes.OK))

    def close(self) -> None:
        """End the server and all processes that it started."""
        if self._server is None:
            return
        server, self._server = self._server, None
        watchdog.end_marked(self._mark)
        with contextlib.suppress(OSError, RuntimeError):
            server.interrupt()
            server.close()
            self._write("server", server._server_output or "")

    def _started(self) -> Any:
        if self._server is None:
            self._server = asv.runner.get_spawner(self._environment, str(SUITE), "forkserver")
            imported, output = self._server.preimport()
            self._write("import of the suite", output)
            if not imported or plan.IMPORTED not in output:  # asv ignores an exception of the suite, and prints it
                self.close()
                last = outcomes.one_line(output.strip().rpartition("\n")[2])
                raise NtkbenchError(f"the asv suite cannot be imported, see {self._log}: {last}")
        return self._server

    def _write(self, what: str, output: str) -> None:
        if output:
            with self._log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"--- {what}\n{output.rstrip()}\n")


@contextlib.contextmanager
def started(*arguments: Any) -> Iterator[Engine]:
    """An engine that is closed at the end; see :class:`Engine`."""
    engine = Engine(*arguments)
    try:
        yield engine
    finally:
        engine.close()


class _Environment:
    """This interpreter, in the form that asv's runner expects."""

    def __init__(self, plan_file: Path) -> None:
        folders = paths.python_path()
        # asv removes the folders of PYTHONPATH from its path unless its own variable names them.
        self.env_vars = {
            plan.VARIABLE: str(plan_file),
            "ASV_PYTHONPATH": folders,
            "PYTHONPATH": folders,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            paths.VARIABLE: str(paths.cache()),  # cases run in folders of their own
        }
        if data := files.folder():
            self.env_vars[files.VARIABLE] = str(data)
        if named := os.environ.get(outside.VARIABLE):
            self.env_vars[outside.VARIABLE] = named

    def run(self, arguments: Sequence[str], **options: Any) -> Any:
        return asv.util.check_output([sys.executable, *arguments], **options)
