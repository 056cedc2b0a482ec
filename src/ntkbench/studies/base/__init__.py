"""What studies share: settings, and rows that say how their measurement ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from ntkbench.errors import Unavailable
from ntkbench.measure import journal as journals
from ntkbench.measure import outcomes, timing
from ntkbench.measure.limits import Limits
from ntkbench.options import Target


class Settings(BaseModel):
    """Where a study runs: keys that it takes over from the configuration unless it says otherwise itself.

    Attributes:
        device: auto, cpu or cuda.
        dtype: precision of what is timed.
        threads: of every backend.
        limits: of one row.
        seeds: seeds of a stochastic method, each an estimate.
        calls: timed calls, after one that is not timed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    threads: PositiveInt = 2
    limits: Limits = Limits()
    seeds: PositiveInt = 20
    calls: PositiveInt = 5

    def target(self, backend: str = "torch", dtype: str | None = None) -> Target:
        """Where the study runs a backend."""
        return Target(backend, dtype or self.dtype, self.device, self.limits.block_bytes, self.limits.memory_bytes)


def row(case: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]], *, resumable: bool = True) -> dict[str, Any]:
    """A row of a study: what was to be measured, how that ended, and what was found.

    Args:
        case: columns that say what is measured.
        measure: gives the other columns; an exception becomes status and reason.
        resumable: whether the row is complete with that, so that a study that is stopped need not measure it again.
    """
    said = ", ".join(str(value) for value in case.values())
    journal = journals.CURRENT.get() if resumable else None
    if journal:
        if before := journal.before(case):
            print(f"{said}: {before['status']}, from before", flush=True)
            return before
        journal.begin(case)
    start = time.perf_counter()
    try:
        made = {**case, "status": "ok", "reason": "", **measure()}
    except Exception as error:  # whatever it is, the other rows stand
        made = {**case, **outcomes.of_exception(error).columns()}
    if journal:
        journal.finish(case, made)
    print(f"{said}: {made['status']} after {time.perf_counter() - start:.2g} s {made['reason']}", flush=True)
    return made


def check_operations(flop: float, case_gigaflop: float) -> None:
    """That a case needs no more floating-point operations than its settings allow.

    Raises:
        Unavailable: it needs more; its row is skipped and says so.
    """
    if flop > 1e9 * case_gigaflop:
        raise Unavailable(f"about {flop / 1e9:.3g} GFLOP, over case_gigaflop ({case_gigaflop:g})")


def left_out(case: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """A row of what is not measured."""
    return {**case, "status": "skipped", "reason": reason}
