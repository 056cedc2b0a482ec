"""The four metrics, and the moments of Theta that they are functions of.

With Theta = J J^T at theta_0 and Theta_f at theta_f:

- trace           tr Theta = ||J||_F^2
- norm            ||Theta||_F
- effective_rank  (tr Theta)^2 / ||Theta||_F^2, the participation ratio
- alignment       tr(Theta Theta_f) / (||Theta||_F ||Theta_f||_F)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

from ntkbench.errors import Undefined, unknown

Array = Any
"""An array of any library."""

METRICS = ("trace", "norm", "effective_rank", "alignment")
MOMENTS = {
    "trace": ("trace",),
    "norm": ("square",),
    "effective_rank": ("trace", "square"),
    "alignment": ("square", "square_f", "cross"),
}
"""Moments that each metric is a function of."""
SYMBOLS = {
    "trace": r"$\mathrm{tr}\,\Theta$",
    "norm": r"$\|\Theta\|_F$",
    "effective_rank": "effective rank",
    "alignment": "alignment",
}


def check(metric: str) -> None:
    """Check that a metric exists.

    Raises:
        BadInput: it does not.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)


def parameter_sets(metric: str) -> tuple[str, ...]:
    """Names of the parameter sets that a metric depends on."""
    return ("theta_0", "theta_f") if metric == "alignment" else ("theta_0",)


@dataclass(frozen=True)
class Moments:
    """Sums over the entries of Theta (and Theta_f) that the metrics are functions of.

    A moment that was not computed is ``nan`` or 0.

    Attributes:
        trace: tr Theta.
        square: ||Theta||_F^2.
        square_f: ||Theta_f||_F^2.
        cross: tr(Theta Theta_f).
    """

    trace: float = math.nan
    square: float = math.nan
    square_f: float = math.nan
    cross: float = math.nan

    def times(self, factor: float) -> Moments:
        """Moments of Theta (x) I, with the identity matrix of size ``factor``."""
        return Moments(*(factor * m for m in (self.trace, self.square, self.square_f, self.cross)))

    def metric(self, name: str) -> float:
        """The value of a metric.

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
            raise Undefined(f"{name} is not defined where Theta is zero: no parameter that counts moves any output")
        if name == "effective_rank":
            return self.trace**2 / self.square
        return self.cross / math.sqrt(self.square * self.square_f)

    def gradient(self, name: str) -> Moments:
        """Partial derivatives of a metric with respect to the four moments.

        Raises:
            BadInput: no such metric.
            Undefined: as for the metric itself.
        """
        value = self.metric(name)
        if name == "trace":
            return Moments(1.0, 0.0, 0.0, 0.0)
        if name == "norm":
            # The estimate is zero only if Theta is, and then it has no error.
            return Moments(0.0, 0.5 / value if value else 0.0, 0.0, 0.0)
        if name == "effective_rank":
            return Moments(2 * value / self.trace, -value / self.square, 0.0, 0.0)
        slope = 1 / math.sqrt(self.square * self.square_f)
        return Moments(0.0, -0.5 * value / self.square, -0.5 * value / self.square_f, slope)


def from_rows_of_theta(blocks: Iterable[tuple[Array, Sequence[Array]]]) -> Moments:
    """Moments from blocks of rows of Theta (and of Theta_f); one block is held at a time.

    Args:
        blocks: for each block, the indices of its rows, ``[r]``, and the rows of Theta (and of Theta_f), ``[r, n]``.
    """
    sums = MomentSums()
    for indices, (rows, *rows_of_f) in blocks:
        sums.trace += rows[np.arange(len(rows)), np.asarray(indices)].sum()
        sums.square += squared_norm(rows)
        for rows_f in rows_of_f:
            sums.square_f += squared_norm(rows_f)
            sums.cross += (rows * rows_f).sum()
    return sums.moments()


def from_blocks_of_theta(blocks: Iterable[tuple[bool, Sequence[Array]]], *, tile: int = 512) -> Moments:
    """Moments from the blocks of Theta (and of Theta_f) on and below the diagonal; one block is held at a time.

    Args:
        blocks: for each block, whether it is on the diagonal, and its entries in Theta (and in Theta_f),
            ``[rows, columns]``. Only the lower triangle of a block on the diagonal is read.
        tile: rows of a block on the diagonal that are copied at a time.
    """
    sums = MomentSums()
    for on_diagonal, (block, *blocks_of_f) in blocks:
        product = functools.partial(_of_symmetric, tile=tile) if on_diagonal else _of_pair
        sums.square += product(block, block)
        for block_f in blocks_of_f:
            sums.square_f += product(block_f, block_f)
            sums.cross += product(block, block_f)
        if on_diagonal:
            sums.trace += block.diagonal().sum()
    return sums.moments()


def _of_pair(one: Array, other: Array) -> Array:
    """Inner product of two blocks below the diagonal and of their mirror images above it."""
    return 2 * inner_product(one, other)


def _of_symmetric(one: Array, other: Array, tile: int) -> Array:
    """Inner product of two symmetric matrices, from their lower triangles, ``tile`` rows at a time."""
    xp = array_api_compat.array_namespace(one)
    total = 0.0
    for start in range(0, len(one), tile):
        rows = slice(start, start + tile)
        total = total + 2 * inner_product(one[rows, :start], other[rows, :start])
        a, b = (xp.tril(m[rows, rows]) for m in (one, other))
        total = total + 2 * inner_product(a, b) - (a.diagonal() * b.diagonal()).sum()
    return total


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

    def moments(self) -> Moments:
        return Moments(float(self.trace), float(self.square), float(self.square_f), float(self.cross))
