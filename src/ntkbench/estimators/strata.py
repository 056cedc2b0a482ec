"""Strata that are treated exactly: the few that have most of ||Theta||_F^2, if there are such."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

UNEVEN = 4
"""Strata are uneven if their effective number is smaller than their number by more than this factor."""

GAIN = 2
"""Strata are treated exactly if this reduces the predicted variance by more than this factor."""


@dataclass(frozen=True)
class Choice:
    """The strata that are treated exactly.

    Attributes:
        exact: their indices, in ascending order.
        share: their approximate share of the whole.
        uneven: whether a few strata have most of the whole.
        of: name of the whole.
    """

    exact: np.ndarray = field(default_factory=lambda: np.arange(0))
    share: float = 0.0
    uneven: bool = False
    of: str = "||Theta||^2"

    def __len__(self) -> int:
        return len(self.exact)

    def notes(self, stratum: str) -> tuple[str, ...]:
        """Remarks on the choice; empty if strata are even.

        Args:
            stratum: what a stratum is, in the singular.
        """
        if not self.uneven:
            return ()
        if count := len(self):
            of_all = f"with about {100 * self.share:.0f} % of {self.of}"
            return (f"{count} {stratum}{'s' if count > 1 else ''} {of_all} taken exactly",)
        return (f"few {stratum}s have most of {self.of}, and none is taken exactly: the error may be underestimated",)


def shares(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Each stratum's share of the moments, ``[N]``; they add up to 1.

    Pairs of a probe with itself count as well, although they overestimate the stratum's own block: pairs of different
    probes alone may be almost zero by chance if the block has low rank.

    Args:
        tables: the pairs' values for each moment, ``[N, K, N, K]``, as in
            :class:`ntkbench.estimators.standard_errors.PairSums`.
    """
    rows = [np.abs(table).sum((1, 2, 3), dtype=np.float64) for table in tables]
    return sum((row / row.sum() for row in rows if row.sum() > 0), np.zeros(tables[0].shape[0])) / len(rows)


def effective_number(shares: np.ndarray) -> float:
    """(sum_b r_b)^2 / sum_b r_b^2 for shares r ``[N]``: N if they are equal, 1 if one stratum has all."""
    whole, squares = float(shares.sum()), float((shares * shares).sum())
    return whole * whole / squares if squares > 0 else float(len(shares))


def are_uneven(shares: np.ndarray) -> bool:
    """Whether a few strata have most of the whole."""
    return effective_number(shares) < len(shares) / UNEVEN


def choose(
    shares: np.ndarray, passes: float, rows: Callable[[int], int], *, max_probes: int, max_exact: int, drawn: int = 0
) -> Choice:
    """The strata to treat exactly, for the least predicted variance at equal passes.

    The variance of an estimate from K probes is about proportional to the sum of r_b^2 / K over the strata b that are
    not exact, with shares r. If the strata are even, none is exact.

    Args:
        shares: shares of the strata, ``[N]``; see :func:`shares`.
        passes: remaining passes; K probes of all strata take K.
        rows: number of rows of an exact stratum beside K probes of the others; a probe has one row in each stratum.
        max_probes: probes in a group, each of which takes the exact strata again.
        max_exact: maximum number of exact strata.
        drawn: number of probes so far, which are discarded if any stratum is exact.
    """
    N = len(shares)
    order = np.argsort(-shares, kind="stable")
    left = np.append(np.cumsum(shares[order[::-1]] ** 2)[::-1], 0.0)
    best, count = left[0] / (GAIN * max(passes + drawn, 1)), 0
    uneven = are_uneven(shares)
    if uneven and passes > 0:
        groups = math.ceil(passes / max_probes)
        of_group = passes / groups
        for K in range(max(2, min(4, int(of_group))), int(of_group) + 1):  # fewer than 4 leave no unbiased variance
            more = rows(K) - K
            affordable = N if more <= 0 else int((of_group - K) * N / more + 1e-9)
            number = min(affordable, max_exact, N)
            predicted = float(left[number]) / (K * groups)
            if predicted < best:
                best, count = predicted, number
    exact = np.sort(order[:count])
    return Choice(exact, float(shares[exact].sum()), uneven)
