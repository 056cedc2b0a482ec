"""The four metrics, the moments of Theta that they are functions of, and metrics that take all of Theta.

With Theta = J J^T at theta_0 and Theta_f at theta_f:

- trace           tr Theta = ||J||_F^2
- norm            ||Theta||_F
- effective_rank  (tr Theta)^2 / ||Theta||_F^2, the participation ratio
- alignment       tr(Theta Theta_f) / (||Theta||_F ||Theta_f||_F)

Metrics of the eigenvalues lambda, with p_i = lambda_i / tr Theta:

- largest_eigenvalue       lambda_max
- condition_number         lambda_max / lambda_min
- entropy_effective_rank   exp(-sum_i p_i log p_i)

And of kernel regression on half of the samples (see :mod:`ntkbench.estimators.regression`):

- regression_error         relative error of the predicted change of the other samples' outputs by training
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import array_api_compat
import numpy as np

from ntkbench.errors import Undefined, unknown

Array = Any
"""An array of any library."""

METRICS = ("trace", "norm", "effective_rank", "alignment")
SPECTRAL = ("largest_eigenvalue", "condition_number", "entropy_effective_rank")
"""Metrics of the eigenvalues."""
REGRESSION = "regression_error"
OF_KERNEL = (*SPECTRAL, REGRESSION)
"""Metrics that use all of Theta, or of a kernel that approximates it."""
MOMENTS = {
    "trace": ("trace",),
    "norm": ("square",),
    "effective_rank": ("trace", "square"),
    "alignment": ("square", "square_f", "cross", "difference", "difference_cross"),
}
"""Moments that each metric is a function of; the last two of alignment are for 1 - alignment."""

CLOSE = 0.5
"""||Theta_f - Theta||_F^2 relative to ||Theta||_F^2 up to which 1 - alignment is computed from the difference."""
SYMBOLS = {
    "trace": r"$\mathrm{tr}\,\Theta$",
    "norm": r"$\|\Theta\|_F$",
    "effective_rank": "effective rank",
    "alignment": "alignment",
    "largest_eigenvalue": r"$\lambda_{\mathrm{max}}$",
    "condition_number": r"$\lambda_{\mathrm{max}} / \lambda_{\mathrm{min}}$",
    "entropy_effective_rank": "entropy effective rank",
    "regression_error": "regression error",
}


def words(*names: str) -> str:
    """Metrics in words: ``trace``, ``trace and effective rank``, or ``trace, norm and effective rank``."""
    *others, last = (name.replace("_", " ") for name in names)
    return f"{', '.join(others)} and {last}" if others else last


def check(metric: str) -> None:
    """Check that a metric exists.

    Raises:
        BadInput: there is no such metric.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)


def parameter_sets(metric: str) -> tuple[str, ...]:
    """Names of the sets of weights that a metric depends on."""
    return ("theta_0", "theta_f") if metric == "alignment" else ("theta_0",)


def check_any(metric: str) -> None:
    """Check that a metric exists, including those of the whole kernel.

    Raises:
        BadInput: there is no such metric.
    """
    if metric not in (*METRICS, *OF_KERNEL):
        raise unknown("metric", metric, (*METRICS, *OF_KERNEL))


def of_eigenvalues(metric: str, values: np.ndarray, *, copies: int = 1, error: float = 0.0) -> float:
    """A metric of the eigenvalues of A ⊗ I.

    Args:
        metric: one of :data:`SPECTRAL`.
        values: eigenvalues of A in any order; rounding may make them negative.
        copies: size of the identity matrix.
        error: error bound of an eigenvalue.

    Raises:
        Undefined: A is zero, or the condition number is requested and the smallest eigenvalue may be zero.
    """
    values = np.maximum(values, 0.0)
    largest, smallest = float(values.max()), float(values.min())
    if metric == "largest_eigenvalue":
        return largest
    if largest == 0:
        raise Undefined(f"the {words(metric)} is not defined where Theta is zero")
    if metric == "condition_number":
        if smallest <= error:
            raise Undefined(f"the smallest eigenvalue, {smallest:.2g}, may be zero: its rounding is {error:.2g}")
        return largest / smallest
    shares = values[values > 0] / values.sum()
    return copies * math.exp(-float((shares * np.log(shares)).sum()))


@dataclass(frozen=True)
class Moments:
    """Sums over the entries of Theta (and Theta_f) that the metrics are functions of.

    A moment that was not computed is ``nan`` or 0.

    Attributes:
        trace: tr Theta.
        square: ||Theta||_F^2.
        square_f: ||Theta_f||_F^2.
        cross: tr(Theta Theta_f).
        difference: ||D||_F^2 of the difference D = Theta_f - Theta, from its entries.
        difference_cross: tr(Theta D), from the entries of D.
        squared_trace: (tr Theta)^2 if it is estimated separately.
    """

    trace: float = math.nan
    square: float = math.nan
    square_f: float = math.nan
    cross: float = math.nan
    difference: float = math.nan
    difference_cross: float = math.nan
    squared_trace: float = math.nan

    def times(self, factor: float) -> Moments:
        """Moments of Theta ⊗ I, with the identity matrix of size ``factor``; it has no ``squared_trace``."""
        sums = (self.trace, self.square, self.square_f, self.cross, self.difference, self.difference_cross)
        return Moments(*(factor * m for m in sums))

    def plus(self, other: Moments) -> Moments:
        """Moments of the sum of two kernels that act on orthogonal spaces."""
        return Moments(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Moments)))

    def metric(self, name: str) -> float:
        """The value of a metric; an alignment is at most 1 if the difference of the kernels was computed.

        Raises:
            BadInput: no such metric.
            Undefined: the metric is a ratio to the norm of a kernel that is zero.
        """
        check(name)
        if name == "trace":
            return self.trace
        if name == "norm":
            return math.sqrt(self.square)
        if self.square == 0 or (name == "alignment" and self.square_f == 0):
            raise Undefined(
                f"the {words(name)} is not defined where Theta is zero: no parameter in theta affects any output"
            )
        if math.isinf(self.square) or (name == "alignment" and math.isinf(self.square_f)):
            return math.nan  # a finite number over one that overflowed would be 0
        if name == "effective_rank":
            return (self.trace**2 if math.isnan(self.squared_trace) else self.squared_trace) / self.square
        if self._is_close:
            return 1 - self.complement
        value = self.cross / math.sqrt(self.square * self.square_f)
        # Where the difference is of the same entries or probes, only rounding exceeds 1.
        return value if math.isnan(self.difference) else min(value, 1.0)

    @property
    def complement(self) -> float:
        """1 - alignment; ``nan`` if the difference of the kernels was not computed.

        If the kernels are close, it is computed from their difference D and has as many digits as D:
        1 - A^2 = (||Theta||^2 ||D||^2 - tr(Theta D)^2) / (||Theta||^2 ||Theta_f||^2), and 1 - A = (1 - A^2) / (1 + A).

        Raises:
            Undefined: as for the alignment.
        """
        if not self._is_close:
            return math.nan if math.isnan(self.difference) else 1 - self.metric("alignment")
        square, d, e = self.square, self.difference, self.difference_cross
        square_f = square + 2 * e + d
        sine = max(0.0, d - e**2 / square) / square_f
        return sine / (1 + (square + e) / math.sqrt(square * square_f))

    @property
    def _is_close(self) -> bool:
        return 0 <= self.difference < CLOSE * self.square

    def gradient(self, name: str) -> Moments:
        """Partial derivatives of a metric with respect to the moments that its value is computed from.

        Raises:
            BadInput: no such metric.
            Undefined: as for the metric itself.
        """
        value = self.metric(name)
        zero = Moments(*[0.0] * len(fields(Moments)))
        if name == "trace":
            return replace(zero, trace=1.0)
        if name == "norm":
            # The estimate is zero only if Theta is, and then it has no error.
            return replace(zero, square=0.5 / value if value else 0.0)
        if name == "effective_rank":
            slope = -value / self.square
            if not math.isnan(self.squared_trace):
                return replace(zero, squared_trace=1 / self.square, square=slope)
            return replace(zero, trace=2 * value / self.trace, square=slope)
        if self._is_close:
            square, d, e = self.square, self.difference, self.difference_cross
            square_f = square + 2 * e + d
            return replace(
                zero,
                square=(square * d - 2 * e**2 - e * d) / (2 * (square * square_f) ** 1.5),
                difference=-value / (2 * square_f),
                difference_cross=(d + e) / (square**0.5 * square_f**1.5),
            )
        slope = 1 / math.sqrt(self.square * self.square_f)
        return replace(zero, square=-0.5 * value / self.square, square_f=-0.5 * value / self.square_f, cross=slope)


def from_rows_of_theta(blocks: Iterable[tuple[Array, Sequence[Array]]]) -> Moments:
    """Moments from blocks of rows of Theta (and of Theta_f); one block is held at a time.

    Args:
        blocks: for each block, the indices of its rows, ``[r]``, and the rows of Theta (and of Theta_f), ``[r, n]``.
    """
    sums = MomentSums()
    for indices, rows in blocks:
        sums.trace += rows[0][np.arange(len(rows[0])), np.asarray(indices)].sum()
        sums.add(*rows)
    return sums.moments()


def from_blocks_of_theta(blocks: Iterable[tuple[bool, Sequence[Array]]], *, tile: int = 512) -> Moments:
    """Moments from the blocks of Theta (and of Theta_f) on and below the diagonal; one block is held at a time.

    Args:
        blocks: for each block, whether it is on the diagonal, and its entries in Theta (and in Theta_f),
            ``[rows, columns]``. Only the lower triangle of a block on the diagonal is read.
        tile: rows of a block that are copied at a time.
    """
    sums = MomentSums()
    for on_diagonal, parts in blocks:
        if on_diagonal:
            sums.trace += parts[0].diagonal().sum()
        for start in range(0, len(parts[0]), tile):
            rows = slice(start, start + tile)
            sums.add(*(part[rows, : start if on_diagonal else None] for part in parts), copies=2)
            if on_diagonal:
                lower = [array_api_compat.array_namespace(part).tril(part[rows, rows]) for part in parts]
                sums.add(*lower, copies=2)
                sums.add(*(part.diagonal()[None] for part in lower), copies=-1)
    return sums.moments()


NOTHING = Moments(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""Moments of a kernel that is zero."""


def from_gram(theta: Array, theta_f: Array | None = None) -> Moments:
    """Moments from Theta (and Theta_f) as a dense matrix, ``[n, n]``."""
    return from_rows_of_theta([(range(len(theta)), [theta] if theta_f is None else [theta, theta_f])])


def squared_norm(block: Array) -> Array:
    """Sum of squares of all entries, on the device of the block."""
    return inner_product(block, block)


def inner_product(one: Array, other: Array) -> Array:
    """Sum of products of corresponding entries, on the device of the arrays."""
    # Row by row, then over rows: a single long dot product loses two digits in float32.
    return array_api_compat.array_namespace(one).linalg.vecdot(one, other).sum()


class MomentSums:
    """Running sums, kept on the device until the moments are taken."""

    def __init__(self) -> None:
        self.trace: Any = 0.0
        self.square: Any = 0.0
        self.square_f: Any = 0.0
        self.cross: Any = 0.0
        self.difference: Any = 0.0
        self.difference_cross: Any = 0.0
        self._pairs = False

    def add(self, theta: Array, theta_f: Array | None = None, *, copies: int = 1, entries: int = 2**20) -> None:
        """Add the squares and products of some entries of Theta (and Theta_f), ``[rows, columns]``.

        Those of two kernels are added up in float64 if the array library has it: 1 - alignment is a small
        difference of the sums.

        Args:
            copies: how often each entry counts.
            entries: number of entries that are copied at a time; at least one row.
        """
        if theta_f is None:
            self.square += copies * squared_norm(theta)
            return
        self._pairs = True
        rows = max(1, entries // max(1, theta.shape[1]))
        for start in range(0, len(theta), rows):
            one, other = (double(part[start : start + rows]) for part in (theta, theta_f))
            difference = other - one
            self.square += copies * inner_product(one, one)
            self.square_f += copies * inner_product(other, other)
            self.cross += copies * inner_product(one, other)
            self.difference += copies * inner_product(difference, difference)
            self.difference_cross += copies * inner_product(one, difference)

    def moments(self) -> Moments:
        """The moments so far; those of a second kernel are ``nan`` if there was none."""
        own = float(self.trace), float(self.square)
        both = self.square_f, self.cross, self.difference, self.difference_cross
        return Moments(*own, *map(float, both)) if self._pairs else Moments(*own)


def double(block: Array) -> Array:
    """An array in float64; a JAX array stays as it is, since JAX has float64 only if the whole program does."""
    if array_api_compat.is_jax_array(block):
        return block
    xp = array_api_compat.array_namespace(block)
    return xp.astype(block, xp.float64, copy=False)
