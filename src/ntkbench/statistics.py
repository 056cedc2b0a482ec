"""Standard errors of what probes say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np


def by_probe(blocks: Iterable[Any]) -> np.ndarray:
    """What the probes of several blocks say, ``[k, ...]`` each, as one float64 array on the host."""
    return np.concatenate([np.asarray(_on_host(block), dtype=np.float64) for block in blocks])


def _on_host(array: Any) -> Any:
    return array.cpu() if hasattr(array, "cpu") else array


def mean(samples: np.ndarray) -> tuple[float, float]:
    """Mean of independent samples ``[k]`` and its standard error (``nan`` for k = 1)."""
    k = len(samples)
    error = float(samples.std(ddof=1)) / math.sqrt(k) if k > 1 else math.nan
    return float(samples.mean()), error


def mean_of_sums(table: np.ndarray) -> tuple[float, float]:
    """Mean over probes of the sum over independent strata, ``[k, strata]``, and its standard error.

    The strata's variances over probes add up, with strata * (k - 1) degrees of freedom, where the scatter of the k sums
    alone has k - 1.
    """
    k = len(table)
    error = math.sqrt(table.var(axis=0, ddof=1).sum() / k) if k > 1 else math.nan
    return float(table.sum() / k), error


def jackknife(statistic: Callable[..., float], *columns: np.ndarray) -> tuple[float, float]:
    """``statistic`` of the columns' means, and its jackknife standard error over the k rows (``nan`` for k = 1).

    Args:
        statistic: a smooth function of one mean per column.
        columns: what each of the k probes says of each quantity, ``[k]`` each; rows are probes.
    """
    value = statistic(*(c.mean() for c in columns))
    k = len(columns[0])
    if k < 2:
        return value, math.nan
    left_out = np.array([statistic(*row) for row in zip(*((c.sum() - c) / (k - 1) for c in columns), strict=True)])
    return value, math.sqrt((k - 1) / k * float(((left_out - left_out.mean()) ** 2).sum()))


def orthonormal(error: float, k: int, n: int) -> float:
    """The standard error of k orthonormal probes in n dimensions, from the one that takes them for independent.

    The quadratic forms of a whole orthonormal basis add up to a trace, so k of n are a draw without replacement: the
    finite-population correction is exact for one mean, and holds to first order for smooth functions of means.
    """
    return error * math.sqrt(1 - k / n)
