"""Standard errors of what probes say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ntkbench.operators.base import on_host


class Reading(NamedTuple):
    """What probes say of a number.

    Attributes:
        value: the estimate.
        error: its standard error; ``nan`` where there are too few probes to tell.
        degrees: degrees of freedom of that error, by which Student's t widens an interval.
    """

    value: float
    error: float
    degrees: float = math.inf


def by_probe(blocks: Iterable[Any]) -> np.ndarray:
    """What the probes of several blocks say, ``[k, ...]`` each, as one float64 array on the host."""
    return np.concatenate([np.asarray(on_host(block), dtype=np.float64) for block in blocks])


def mean(samples: np.ndarray) -> Reading:
    """Mean of independent samples ``[k]`` and its standard error (``nan`` for k = 1)."""
    k = len(samples)
    error = float(samples.std(ddof=1)) / math.sqrt(k) if k > 1 else math.nan
    return Reading(float(samples.mean()), error, k - 1)


def mean_of_sums(table: np.ndarray) -> Reading:
    """Mean over probes of the sum over independent strata, ``[k, strata]``, and its standard error.

    The strata's variances over probes add up, with up to strata * (k - 1) degrees of freedom, where the scatter of the
    k sums alone has k - 1.
    """
    k = len(table)
    if k == 1:
        return Reading(float(table.sum()), math.nan, 0)
    variances = table.var(axis=0, ddof=1)
    return Reading(float(table.sum() / k), math.sqrt(variances.sum() / k), _degrees(variances, k - 1))


def of_sum(parts: Iterable[tuple[float, float]]) -> float:
    """Degrees of freedom of the error of a sum of independent terms, from the error and the degrees of each."""
    errors, degrees = np.array(list(parts), dtype=np.float64).T
    return _degrees(errors**2, degrees)


def _degrees(variances: np.ndarray, degrees: np.ndarray | float) -> float:
    """Degrees of freedom of a sum of estimated variances (Satterthwaite 1946)."""
    squares = (variances**2 / np.maximum(degrees, 1e-9)).sum()
    return float(variances.sum() ** 2 / squares) if squares > 0 else math.inf


def jackknife(statistic: Callable[..., float], *columns: np.ndarray) -> Reading:
    """``statistic`` of the columns' means, and its jackknife standard error over the k rows (``nan`` for k = 1).

    Args:
        statistic: a smooth function of one mean per column.
        columns: what each of the k probes says of each quantity, ``[k]`` each; rows are probes.
    """
    value = float(statistic(*(c.mean() for c in columns)))
    k = len(columns[0])
    if k < 2:
        return Reading(value, math.nan, 0)
    left_out = np.array([statistic(*row) for row in zip(*((c.sum() - c) / (k - 1) for c in columns), strict=True)])
    return Reading(value, math.sqrt((k - 1) / k * float(((left_out - left_out.mean()) ** 2).sum())), k - 1)


def orthonormal(reading: Reading, k: int, n: int) -> Reading:
    """What k orthonormal probes in n dimensions say, from what they would say if they were independent.

    The quadratic forms of a whole orthonormal basis add up to a trace, so k of n are a draw without replacement: the
    finite-population correction is exact for one mean, and holds to first order for smooth functions of means.
    """
    return reading._replace(error=reading.error * math.sqrt(1 - k / n))


@dataclass(frozen=True)
class Moments2:
    """Estimates of some moments by U-statistics of degree 2, and their covariance in three parts.

    Attributes:
        means: the estimates, ``[m]``.
        single: covariance of what single probes contribute, ``[m, m]``; an unbiased estimate, so it may be indefinite.
        double: covariance of what is left of pairs of probes.
        bound: second moments that bound the covariance of a part of which too few probes were drawn to tell.
        degrees: degrees of freedom of these covariances.
    """

    means: np.ndarray
    single: np.ndarray
    double: np.ndarray
    bound: np.ndarray
    degrees: float

    @classmethod
    def mean(cls, groups: Sequence[tuple[int, Moments2]]) -> Moments2:
        """The mean of independent groups, by their numbers of probes."""
        sizes = np.array([size for size, _ in groups], dtype=np.float64)
        shares = sizes / sizes.sum()

        def weighted(name: str, shares: np.ndarray) -> np.ndarray:
            return sum(share * getattr(group, name) for share, (_, group) in zip(shares, groups, strict=True))

        parts = (weighted(part, shares**2) for part in ("single", "double", "bound"))
        return cls(weighted("means", shares), *parts, sum(group.degrees for _, group in groups))

    def error(self, slopes: np.ndarray) -> float:
        """Standard error of a function of the moments that has these slopes (the delta method)."""
        single, double, bound = (float(slopes @ part @ slopes) for part in (self.single, self.double, self.bound))
        # Where the first is small its estimate is often negative; cut off at zero it would be too large on average.
        return math.sqrt(max(single + double, double / 2, 0.0)) + math.sqrt(max(bound, 0.0))


class PairSums:
    """Sums over pairs of probes in N strata, K independent probes in each, for :class:`Moments2`.

    Pair (b, k), (c, l) says y_bc^kl of each moment. The estimate is the sum over b and c of the mean over k and l, over
    k != l where b = c. By Hoeffding's decomposition y_bc^kl = mean + alpha_b^k + beta_c^l + gamma_bc^kl its variance is
    1/K sum_b Var(2 sum_c alpha_bc) + sum_{b != c} 2 Var(gamma_bc) / K^2 + sum_b 2 Var(gamma_bb) / (K (K - 1)), and each
    term has an unbiased estimate from two-way tables. A jackknife over fields would count gamma twice over (Efron and
    Stein 1981), which is most of the variance where there are fewer probes than the effective rank; and it would have
    K - 1 degrees of freedom, where the strata together have N (K - 1).

    Below K = 4 the blocks b = c have no such estimate. Their variance is then bounded by their second moment, and taken
    as if it were fully correlated with the rest.
    """

    def __init__(self, N: int, K: int, moments: int) -> None:
        self._rows = np.zeros((moments, N, K))
        self._diagonal = np.zeros((moments, N, K, K))
        self._means = np.zeros(moments)
        self._squares = np.zeros((moments, moments))

    def __len__(self) -> int:
        return len(self._means)

    def add(self, b: int, c: int, tables: Sequence[np.ndarray]) -> None:
        """What strata from ``b`` on and strata from ``c`` on say, ``[strata, K, strata', K]`` a moment."""
        y = np.array(tables, dtype=np.float64)
        _, count, K, count2, _ = y.shape
        own = np.arange(max(b, c), min(b + count, c + count2))
        self._diagonal[:, own] = np.moveaxis(y[:, own - b, :, own - c, :], 0, 1)
        y[:, own - b, :, own - c, :] = 0.0
        rows = y.mean(4)
        means = rows.mean(2)
        self._rows[:, b : b + count] += rows.sum(3)
        self._means += means.sum((1, 2))
        # Columns mirror rows when all of the table is added up, so theirs count as much as the rows'.
        self._squares += _outer(y) - 2 * K * _outer(rows) + K**2 * _outer(means)

    def moments(self, traces: np.ndarray | None = None) -> Moments2:
        """The estimates; those of the trace first if its parts ``[N, K]`` are given."""
        m, N, K = self._rows.shape
        off = ~np.eye(K, dtype=bool)
        pairs = self._diagonal[..., off].reshape(m, N, K, K - 1)
        at_rows = pairs.mean(3)
        at_means = at_rows.mean(2)
        effects = 2 * (self._rows - self._rows.mean(2, keepdims=True))
        double_off = self._squares / (K - 1) ** 2
        noise = 4 * double_off / K
        double = 2 * double_off / K**2
        bound = np.zeros((m, m))
        if K >= 4:
            alpha = (at_rows - at_means[:, :, None]) * (K - 1) / (K - 2)
            left = self._diagonal - at_means[:, :, None, None] - alpha[..., None] - alpha[:, :, None, :]
            double_own = _outer(left * off) / (K * (K - 3))
            effects = effects + 2 * alpha
            noise = noise + 4 * double_own / (K - 2)
            double = double + 2 * double_own / (K * (K - 1))
        else:
            bound = 2 / K * _outer(pairs) / (K * (K - 1))
        means = self._means + at_means.sum(1)
        if traces is not None:
            traces = np.asarray(traces, dtype=np.float64)
            effects = np.concatenate([(traces - traces.mean(1, keepdims=True))[None], effects])
            means = np.concatenate([[traces.mean(1).sum()], means])
            noise, double, bound = (np.pad(part, ((1, 0), (1, 0))) for part in (noise, double, bound))
        by_stratum = (effects**2).sum(2)
        degrees = min(_degrees(variances, max(K - 1, 1)) for variances in by_stratum)
        return Moments2(means, (_outer(effects) / (K - 1) - noise) / K, double, bound, degrees)


def _outer(y: np.ndarray) -> np.ndarray:
    """Sums over everything but the first axis of all products of two, ``[m, ...] -> [m, m]``."""
    flat = y.reshape(len(y), math.prod(y.shape[1:]))
    return flat @ flat.T
