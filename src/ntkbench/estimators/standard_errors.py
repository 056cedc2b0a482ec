"""Point estimates from random probes, with standard errors and their degrees of freedom."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ntkbench.errors import Undefined
from ntkbench.estimators import strata


class PointEstimate(NamedTuple):
    """An estimate of a number.

    Attributes:
        value: the estimate.
        standard_error: its standard error; ``nan`` if there are too few probes to estimate it.
        degrees: degrees of freedom of the standard error, for the quantile of Student's t.
    """

    value: float
    standard_error: float
    degrees: float = math.inf


ALIKE = 12
"""Smallest number of pairs of probes, or of independent parts of probes, whose agreement is not a coincidence.

With two signs, a square takes only two values, so K probes agree with probability 2^(1 - K). A standard error that is
rounding counts as unknown if fewer pairs agree.
"""
EQUAL = 100
"""Relative difference, in machine epsilons, up to which numbers count as equal."""
SINGLE = float(np.finfo(np.float32).eps)


def is_rounding(difference: float, value: float, epsilon: float) -> bool:
    """Whether a difference of numbers is rounding, at most :data:`EQUAL` machine epsilons of their value.

    Args:
        difference: the difference, or a standard error; ``nan`` is not rounding.
        value: the value.
        epsilon: machine epsilon of products. TF32 counts as float32, as most errors are below 100 of its own.
    """
    return difference <= EQUAL * min(epsilon, SINGLE) * abs(value)


def unless_alike(point: PointEstimate, pairs: float, epsilon: float) -> PointEstimate:
    """The estimate, with an unknown error if this is rounding and may be due to chance.

    Args:
        point: the estimate.
        pairs: number of pairs that agree; see :data:`ALIKE`.
        epsilon: machine epsilon of products.
    """
    if pairs >= ALIKE or not is_rounding(point.standard_error, point.value, epsilon):
        return point
    return PointEstimate(point.value, math.nan, min(point.degrees, pairs))


def mean(values: np.ndarray) -> PointEstimate:
    """Mean of k independent values ``[k]`` and its standard error, ``nan`` for k = 1."""
    k = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(k) if k > 1 else math.nan
    return PointEstimate(float(values.mean()), error, k - 1)


def stratified_mean(table: np.ndarray) -> PointEstimate:
    """Mean over k probes of the sum over independent strata, ``[k, strata]``, and its standard error.

    The variances of the strata add up. Their sum has up to ``strata * (k - 1)`` degrees of freedom, whereas the scatter
    of the k sums has only k - 1.
    """
    k = len(table)
    if k == 1:
        return PointEstimate(float(table.sum()), math.nan, 0)
    variances = table.var(axis=0, ddof=1)
    return PointEstimate(float(table.sum() / k), math.sqrt(variances.sum() / k), satterthwaite(variances, k - 1))


def degrees_of_variance(values: np.ndarray) -> np.ndarray:
    """Degrees of freedom of the sample variance of k values ``[..., k]``: fewer than k - 1 if their tails are heavy.

    A sample variance of k values with excess kurtosis e has the relative variance 2 / (k - 1) + e / k, and as many
    degrees of freedom as a normal sample of the same relative variance. The excess of k values is at most about k.
    """
    k = values.shape[-1]
    squares = (values - values.mean(-1, keepdims=True)) ** 2
    second, fourth = squares.mean(-1), (squares**2).mean(-1)
    excess = np.divide(fourth, second**2, out=np.full_like(second, 3.0), where=second > 0) - 3
    return 2 / (2 / max(k - 1, 1) + np.maximum(excess, 0.0) / k)


def satterthwaite(variances: ArrayLike, degrees: ArrayLike) -> float:
    """Degrees of freedom of a sum of independent variance estimates (Satterthwaite 1946).

    Args:
        variances: the estimates, ``[m]``.
        degrees: degrees of freedom of each, ``[m]``, or one number for all. The sum has none if one estimate has none,
            or is ``nan``.
    """
    variances = np.asarray(variances, dtype=np.float64)
    if np.isnan(variances).any():
        return 0.0
    squares = (variances**2 / np.maximum(degrees, 1e-9)).sum()
    return float(variances.sum() ** 2 / squares) if squares > 0 else math.inf


def jackknife(statistic: Callable[..., float], *columns: np.ndarray) -> PointEstimate:
    """A smooth function of means over k probes, with its jackknife standard error.

    The error is ``nan`` for k = 1, and if the function is undefined without one of the probes.

    Args:
        statistic: takes one mean per column.
        columns: one value per probe, ``[k]`` each.

    Raises:
        Undefined: the function is undefined for the means over all probes.
    """
    value = float(statistic(*(c.mean() for c in columns)))
    k = len(columns[0])
    if k < 2:
        return PointEstimate(value, math.nan, 0)
    means = zip(*((c.sum() - c) / (k - 1) for c in columns), strict=True)
    try:
        left_out = np.array([statistic(*row) for row in means])
    except Undefined:
        return PointEstimate(value, math.nan, 0)
    error = math.sqrt((k - 1) / k * float(((left_out - left_out.mean()) ** 2).sum()))
    return PointEstimate(value, error, k - 1)


def finite_population(estimate: PointEstimate, k: int, n: int) -> PointEstimate:
    """The estimate from k orthonormal probes in n dimensions, given the estimate that treats them as independent.

    The quadratic forms of a complete orthonormal basis add up to a trace, so k of n probes are a draw without
    replacement. The finite-population correction is exact for one mean, and holds to first order for smooth functions
    of means. A complete basis has no error, even for n = 1, where a single probe gives no scatter.
    """
    # The scatter of a single probe is unknown, but a probe that spans the space has no error.
    return estimate._replace(standard_error=estimate.standard_error * math.sqrt(1 - k / n) if k < n else 0.0)


@dataclass(frozen=True)
class MomentEstimates:
    """U-statistics of degree 2 for m moments, and their covariance in three parts.

    Attributes:
        means: the estimates, ``[m]``.
        single: covariance due to single probes, ``[m, m]``. The estimate is unbiased, so it may be indefinite.
        double: covariance due to the interaction of pairs of probes, ``[m, m]``.
        bound: upper bound on the covariance of the part for which there are too few probes, ``[m, m]``.
        degrees: degrees of freedom of the covariance.
        left_out: change of each estimate without one of the K probes of one of N strata, ``[m, N, K]`` for each
            independent group of probes; empty if it is not known.
        pairs: effective number of pairs of independent parts of probes; see :data:`ALIKE`.
    """

    means: np.ndarray
    single: np.ndarray
    double: np.ndarray
    bound: np.ndarray
    degrees: float
    left_out: tuple[np.ndarray, ...] = ()
    pairs: float = math.inf

    @classmethod
    def nothing(cls, moments: int) -> MomentEstimates:
        """Moments of nothing: 0, without an error."""
        none = np.zeros((moments, moments))
        return cls(np.zeros(moments), none, none, none, math.inf)

    @classmethod
    def pooled(cls, groups: Sequence[tuple[int, MomentEstimates]]) -> MomentEstimates:
        """The mean of independent groups, weighted by their numbers of probes."""
        sizes = np.array([size for size, _ in groups], dtype=np.float64)
        shares = sizes / sizes.sum()

        def weighted(name: str, weights: np.ndarray) -> np.ndarray:
            return sum(weight * getattr(group, name) for weight, (_, group) in zip(weights, groups, strict=True))

        single, double, bound = (weighted(part, shares**2) for part in ("single", "double", "bound"))
        left_out = [share * part for share, (_, group) in zip(shares, groups, strict=True) for part in group.left_out]
        degrees, pairs = (sum(getattr(group, name) for _, group in groups) for name in ("degrees", "pairs"))
        return cls(weighted("means", shares), single, double, bound, degrees, tuple(left_out), pairs)

    def plus(self, exact: ArrayLike) -> MomentEstimates:
        """The estimates with known numbers ``[m]`` added."""
        return replace(self, means=self.means + np.asarray(exact, dtype=np.float64))

    def standard_error(self, gradient: np.ndarray, function: Callable[[np.ndarray], float] | None = None) -> float:
        """Standard error of a function of the moments, by the delta method and, if it is given, by the jackknife.

        If a few strata have most of the variance, the function is not linear over the spread of their probes, and the
        delta method underestimates the variance. For these strata, the variance due to single probes is that of the
        stratified jackknife, the function without each probe in turn, if this is larger.

        Args:
            gradient: gradient of the function, ``[m]``.
            function: the function; ``nan`` outside its domain.
        """
        single, double, bound = (float(gradient @ part @ gradient) for part in (self.single, self.double, self.bound))
        if function is not None:
            single += self._beyond_linear(gradient, function)
        # A small ``single`` is often estimated as negative. Clipping it at zero would bias the sum upwards.
        return math.sqrt(max(single + double, double / 2, 0.0)) + math.sqrt(max(bound, 0.0))

    def _beyond_linear(self, gradient: np.ndarray, function: Callable[[np.ndarray], float]) -> float:
        """Excess of the jackknife variance of a function over that of its linear part, in the heaviest strata.

        It is 0 if the jackknife's is smaller, as that of a few probes with few distinct values may be far too small. It
        is also 0 for a single stratum, whose pairs of probes the jackknife would count twice.
        """
        value, excess = function(self.means), 0.0
        linear = [np.einsum("m,mbk->bk", gradient, part) for part in self.left_out]
        shares = sum((_jackknife_variances(part) for part in linear), np.zeros(len(linear[0]) if linear else 0))
        (heavy,) = np.nonzero(shares > HEAVY * shares.sum())
        for part, first in zip(self.left_out, linear, strict=True):
            for b in heavy if part.shape[1] > 1 else ():
                changes = np.array([function(self.means + change) - value for change in part[:, b].T])
                if np.isfinite(changes).all():
                    excess += float(_jackknife_variances(changes) - _jackknife_variances(first[b]))
        return max(excess, 0.0)

    def second_order_bias(self, function: Callable[[np.ndarray], float], *, step: float = 1e-3) -> float:
        """Second-order bias of a smooth function of the moments, tr(H C) / 2 with Hessian H and their covariance C.

        The part of C for which there are too few probes is taken as :data:`OF_BOUND` of its bound.

        Args:
            function: function of the moments, ``[m]``.
            step: step of the second differences along the eigenvectors of C, relative to the moments.
        """
        covariance = self.single + self.double + OF_BOUND * self.bound
        scale = np.where(self.means == 0, 1.0, np.abs(self.means))
        variances, directions = np.linalg.eigh(covariance / np.outer(scale, scale))
        steps = step * scale * directions.T
        around = [function(self.means + s) - 2 * function(self.means) + function(self.means - s) for s in steps]
        return float(variances @ around) / (2 * step**2)


OF_BOUND = 2 / 3
"""Variance of the square of a normal variable, relative to its second moment."""
HEAVY = 0.1
"""Share of the variance above which a stratum's part is taken from the jackknife."""


def _jackknife_variances(changes: np.ndarray) -> np.ndarray:
    """Variances of an estimate due to each stratum, from its changes without each of K probes in turn, ``[..., K]``."""
    found: np.ndarray = (changes.shape[-1] - 1) * changes.var(-1)
    return found


class PairSums:
    """Sums over pairs of probes in N strata with K independent probes each, for :class:`MomentEstimates`.

    The pair (b, k), (c, l) of strata b, c and probes k, l gives y_bc^kl for each moment. The estimate is the sum over b
    and c of the mean over k and l, over k != l where b = c. With Hoeffding's decomposition y_bc^kl = mean + alpha_b^k +
    beta_c^l + gamma_bc^kl its variance is 1/K sum_b Var(2 sum_c alpha_bc) + sum_{b != c} 2 Var(gamma_bc) / K^2 + sum_b
    2 Var(gamma_bb) / (K (K - 1)). Each term has an unbiased estimate from two-way tables. A jackknife over probes would
    count gamma twice (Efron and Stein 1981), which is most of the variance if there are fewer probes than the effective
    rank. It would also have K - 1 degrees of freedom, whereas the strata together have N (K - 1).

    Below K = 4 the blocks b = c have no unbiased estimate. Their variance is then bounded by their second moment, and
    treated as fully correlated with the rest. The bound has one degree of freedom less than there are pairs of probes
    in the same stratum, with the effective number of strata. A single pair has none.

    Args:
        N: number of strata.
        K: number of probes.
        moments: number of moments.
    """

    @staticmethod
    def least_probes(N: int, O: float, error: float) -> float:  # noqa: E741 - the field's symbol
        """Probes that a relative standard error of ||Theta||_F^2 takes at best, with N strata of O outputs.

        The square of v^T M w over random signs has at least the relative variance 2 (1 - 1/O), which is that of M = I,
        unless few outputs contribute most of ||M||_F^2. Different pairs are then uncorrelated, and about N^2 K^2 / 2 of
        them contribute, equally at best, so the relative variance is 4 (1 - 1/O) / (N K)^2.
        """
        return 2 * math.sqrt(1 - 1 / O) / (N * error)

    def __init__(self, N: int, K: int, moments: int) -> None:
        self._rows = np.zeros((moments, N, K))
        self._diagonal = np.zeros((moments, N, K, K))
        self._singles = np.zeros((moments, N, K))
        self._means = np.zeros(moments)
        self._squares = np.zeros((moments, moments))

    def __len__(self) -> int:
        return len(self._means)

    def add(self, b: int, c: int, tables: Sequence[np.ndarray]) -> None:
        """Add the pairs of the strata from ``b`` on with the strata from ``c`` on.

        Args:
            b: first stratum of the rows.
            c: first stratum of the columns.
            tables: y_bc^kl, ``[strata, K, strata', K]`` for each moment.
        """
        y = np.array(tables, dtype=np.float64)
        _, count, K, count2, _ = y.shape
        own = np.arange(max(b, c), min(b + count, c + count2))
        self._diagonal[:, own] = np.moveaxis(y[:, own - b, :, own - c, :], 0, 1)
        y[:, own - b, :, own - c, :] = 0.0
        rows = y.mean(4)
        means = rows.mean(2)
        self._rows[:, b : b + count] += rows.sum(3)
        self._means += means.sum((1, 2))
        # In the sum over the complete symmetric table, columns contribute as much as rows.
        self._squares += _outer(y) - 2 * K * _outer(rows) + K**2 * _outer(means)

    def add_singles(self, values: ArrayLike) -> None:
        """Add a term that depends on one probe of one stratum; the estimate includes its mean, summed over strata.

        Args:
            values: ``[moments, N, K]``.
        """
        self._singles += np.asarray(values, dtype=np.float64)

    def moments(self, traces: np.ndarray | None = None) -> MomentEstimates:
        """The estimates from all pairs and all terms of single probes added.

        Args:
            traces: each probe's estimate of the trace of each stratum's own block, ``[N, K]``. The trace is then the
                first moment of the result.
        """
        m, N, K = self._rows.shape
        if not N:  # nothing is left to estimate
            return MomentEstimates.nothing(m + (traces is not None))
        off = ~np.eye(K, dtype=bool)
        pairs = self._diagonal[..., off].reshape(m, N, K, K - 1)
        row_means = pairs.mean(3)
        block_means = row_means.mean(2)
        effects = 2 * self._rows + self._singles
        effects -= effects.mean(2, keepdims=True)
        double_off = self._squares / (K - 1) ** 2
        noise = 4 * double_off / K
        double = 2 * double_off / K**2
        bound = np.zeros((m, m))
        if K >= 4:
            alpha = (row_means - block_means[:, :, None]) * (K - 1) / (K - 2)
            gamma = self._diagonal - block_means[:, :, None, None] - alpha[..., None] - alpha[:, :, None, :]
            double_own = _outer(gamma * off) / (K * (K - 3))
            effects = effects + 2 * alpha
            noise = noise + 4 * double_own / (K - 2)
            double = double + 2 * double_own / (K * (K - 1))
        else:
            bound = 2 / K * _outer(pairs) / (K * (K - 1))
        means = self._means + block_means.sum(1) + self._singles.mean(2).sum(1)
        sizes = np.abs(self._diagonal.diagonal(axis1=2, axis2=3)).sum(2)  # of each stratum's own pairs
        if traces is not None:
            traces = np.asarray(traces, dtype=np.float64)
            sizes = np.concatenate([traces.sum(1)[None], sizes])
            effects = np.concatenate([(traces - traces.mean(1, keepdims=True))[None], effects])
            means = np.concatenate([[traces.mean(1).sum()], means])
            noise, double, bound = (np.pad(part, ((1, 0), (1, 0))) for part in (noise, double, bound))
        degrees = min(map(satterthwaite, (effects**2).sum(2), degrees_of_variance(effects)))
        if K < 4 and m:
            own = min(map(strata.effective_number, (pairs**2).sum((2, 3)))) * K * (K - 1) / 2
            degrees = min(degrees, own - 1 if own > ONE else 0.0)
        single = (_outer(effects) / (K - 1) - noise) / K
        parts = min((strata.effective_number(size) for size in sizes if size.any()), default=1.0)
        return MomentEstimates(means, single, double, bound, degrees, (-effects / (K - 1),), (K - 1) * parts)


ONE = 1.1
"""Effective number of pairs up to which they count as a single one, which has no degrees of freedom."""


def _outer(y: np.ndarray) -> np.ndarray:
    """Products of any two moments, summed over all other axes: ``[m, ...] -> [m, m]``.

    Uses torch, whose threads also run the network. NumPy's BLAS threads spin for about 20 ms after a product, which
    makes the network's next products several times slower on two cores.
    """
    import torch

    flat = torch.from_numpy(np.ascontiguousarray(y.reshape(len(y), math.prod(y.shape[1:]))))
    found: np.ndarray = (flat @ flat.T).numpy()
    return found
