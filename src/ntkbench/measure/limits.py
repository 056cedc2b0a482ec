"""Limits of a measurement: one object for the grid, the studies and the comparisons."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, PositiveInt

from ntkbench.errors import OverMemory, Unavailable
from ntkbench.measure.schema import Strict

Positive = Annotated[float, Field(gt=0, le=1e12)]
Mebibytes = Annotated[float, Field(ge=1e-6, le=1e12)]
"""At least one byte, and small enough for an integer number of bytes."""


class Limits(Strict):
    """Limits of one measurement: an execution of a cell, or a row of a study.

    Attributes:
        time_s: seconds after which a measurement is terminated, with the status ``timeout``.
        problem_s: the same for a problem's training and exact values.
        memory_mb: MiB that its process may hold; above that it is terminated, with the status ``out_of_memory``. A
            measurement that is known to need more is not started.
        block_mb: MiB that one block of probes or of rows of J may fill; larger computations are split into blocks.
        passes: a deterministic method that is known to take more is skipped.
        gigaflop: floating-point operations, in 10^9, above which a case is skipped, if they are known beforehand.
        patience_s: seconds of one call. A study that increases sizes or budgets step by step stops there with a method
            whose call took longer.
        times_exact: if it is given, the costs of cells are predicted first, in each run. A cell is skipped whose call
            is predicted to take longer than twice ``time_s``; or longer than ``patience_s``, and more than this many
            times as long as the fastest exact method.
    """

    time_s: Positive = 60
    problem_s: Positive = 3600
    memory_mb: Mebibytes = 6144
    block_mb: Mebibytes = 1024
    passes: PositiveInt = 20_000
    gigaflop: Positive = 1e9
    patience_s: Positive = 30
    times_exact: Positive | None = None

    @property
    def memory_bytes(self) -> int:
        """``memory_mb`` in bytes."""
        return int(self.memory_mb * 2**20)

    @property
    def block_bytes(self) -> int:
        """``block_mb`` in bytes."""
        return int(self.block_mb * 2**20)

    def check_memory(self, needed: float) -> None:
        """Check that a computation holds at most ``memory_mb``.

        Raises:
            OverMemory: it needs more.
        """
        if needed > self.memory_bytes:
            raise OverMemory(f"would hold {needed / 2**30:.3g} GiB, over limits.memory_mb ({self.memory_mb:g})")

    def check_passes(self, needed: float | None) -> None:
        """Check that a deterministic method takes at most ``passes`` passes.

        Raises:
            Unavailable: it takes more.
        """
        if needed is not None and needed > self.passes:
            raise Unavailable(f"would take {needed:,.0f} passes, over limits.passes ({self.passes:,})")

    def check_operations(self, needed: float) -> None:
        """Check that a case needs at most ``gigaflop`` GFLOP.

        Raises:
            Unavailable: it needs more.
        """
        if math.isfinite(needed) and needed > 1e9 * self.gigaflop:
            raise Unavailable(f"about {needed / 1e9:.3g} GFLOP, over limits.gigaflop ({self.gigaflop:g})")
