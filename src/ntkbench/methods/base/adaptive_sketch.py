"""Adaptive Hutch++, from either side of J."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import array_api_compat
import numpy as np

from ntkbench.estimators import deflation
from ntkbench.estimators.accumulators import Accumulator
from ntkbench.estimators.standard_errors import PointEstimate
from ntkbench.methods.base.sides import Side, factor
from ntkbench.methods.base.stochastic import Accumulating
from ntkbench.operators import Array, JacobianOperator, Rng, arrays
from ntkbench.problem import Problem

PASSES_PER_COLUMN = 4
"""Two to sketch, G s = A^T A s, and two for G q = A^T A q of the column q that is added to the basis. Half are JVPs."""


class AdaptiveSketch(Accumulating):
    """tr Q^T G Q + mean of ||A (I - Q Q^T) g||^2 with G = A^T A, where Q grows as long as this lowers the variance.

    A is J^T or J, and Q is orthonormal. A column takes 4 passes and a residual probe takes 1. The variance is 2 R / m
    for m residual probes, with R the squared norm of (I - Q Q^T) G (I - Q Q^T), less its diagonal. The random signs s
    of a block of columns are independent of the earlier Q, so they estimate R without bias. G Q gives the decrease of R
    due to each block of columns. Once a block's share of R is smaller than the share of its passes in all residual
    probes, no further block is added. Residual probes are kept, and projected again when Q grows, so no pass is lost.
    They do not affect the decision, so the estimate is unbiased for a given budget. On a flat spectrum it is a
    one-sided estimate without the passes that one block takes; on a steep one, at least half of the passes go into the
    sketch. Without forward mode a column takes 6 passes, and a probe of the forward side 2. Holds 2 vectors in the
    space of the probes for each column, and 1 for each probe as long as Q may grow. Q stops growing once these no
    longer fit in memory.

    Attributes:
        side: ``reverse`` for A = J^T, ``forward`` for A = J.
        block: number of columns by which the sketch grows.
        min_residual: residual probes that remain after the sketch, for the standard error.
    """

    backends = ("torch", "jax")
    metrics = ("trace",)
    first_batch = 40
    side: ClassVar[Side]
    block: ClassVar[int] = 4
    min_residual: ClassVar[int] = 8

    def passes_per_probe(self, metric: str) -> int:
        return 1

    def jvp_share(self, metric: str) -> float:
        return float(self.side == "forward")  # on the reverse side, the sketch accounts for its JVPs itself

    def signs(self, problem: Problem, metric: str) -> int:
        return problem.n if self.side == "reverse" else problem.P

    def accumulator(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> Accumulator:
        (j,) = jacobians
        return GrowingSketch(j, self.side, rng, self.block, self.min_residual)


class GrowingSketch(Accumulator):
    """A sketch and residual probes, both of which grow. The nominal number of probes is that of passes.

    Residual probes are kept as long as the sketch may grow. It stops growing once its vectors and the probes would take
    more than ``memory`` bytes of the operator.

    Attributes:
        q: basis of the sketch, rows.
    """

    def __init__(self, jacobian: JacobianOperator, side: Side, rng: Rng, block: int, min_residual: int) -> None:
        self._j, self._A, self._side, self._rng = jacobian, factor(jacobian, side), side, rng
        self._block, self._min_residual = block, min_residual
        self.q = self._image = self._A.basis(0, 0)  # Q and G Q, rows
        self._norms: list[np.ndarray] = []  # ||A g||^2
        self._kept: list[Array] = []  # g
        self._inside: list[tuple[np.ndarray, np.ndarray]] = []  # see _coordinates, of g that are not kept
        self._growing = True

    def extend(self, probes: int) -> None:
        left, drawn = probes, sum(map(len, self._norms))
        while self._may_grow(drawn + left) and self._affords_columns(left):
            self._grow(drawn + left)
            left -= self._cost
        self._growing = self._may_grow(drawn + left)
        for size in self._j.blocks(left) if left else ():
            g = self._rng.sign(size, self._A.dim)
            self._norms.append(deflation.squared_norms(self._j, self._A.product, g))
            self._kept.append(g)
            if not self._growing:
                self._inside += map(self._coordinates, self._kept)
                self._kept.clear()

    def _may_grow(self, residual: int) -> bool:
        """Whether the sketch may grow by a block beside ``residual`` probes; growing copies its vectors."""
        columns = len(self.q) + self._block
        fits = (4 * columns + residual) * self._A.dim * self._j.itemsize <= self._j.memory
        return self._growing and fits and columns <= self._A.dim

    def _affords_columns(self, passes: int) -> bool:
        """Whether passes pay for a block and the fewest residual probes; a JVP's cost is queried only if needed."""
        least = PASSES_PER_COLUMN * self._block + self._min_residual
        return passes >= least and passes >= self._cost + self._min_residual

    @property
    def _cost(self) -> int:
        """Cost of a block of columns, in residual probes, at most."""
        extra = 0 if self._side == "forward" else self._j.passes_per_jvp() - 1
        return (PASSES_PER_COLUMN + 2 * extra) * self._block

    def _grow(self, probes: int) -> None:
        """Add a block of columns; ``probes`` is the number of residual probes without it."""
        s = self._rng.sign(self._block, self._A.dim)
        xp = array_api_compat.array_namespace(s)
        sketch = self._gram(s)
        before = self._remainder(s, sketch)
        q = deflation.new_directions(sketch, self.q)
        if not len(q):
            self._growing = False
            return
        image = self._gram(q)
        across, own = (arrays.to_numpy(rows @ image.T, np.float64) for rows in (self.q, q))
        decrease = 2 * float((arrays.to_numpy(image, np.float64) ** 2).sum()) - 2 * (across**2).sum() - (own**2).sum()
        self.q, self._image = xp.concat([self.q, q]), xp.concat([self._image, image])
        self._growing = decrease * probes > self._cost * before

    def _gram(self, u: Array) -> Array:
        """G u = A^T A u for each row of ``u``; one block of products is held at a time."""
        blocks = [self._A.adjoint(self._A.product(u[block])) for block in arrays.slices(self._j.blocks(len(u)))]
        return array_api_compat.array_namespace(u).concat(blocks)

    def _remainder(self, s: Array, sketch: Array) -> float:
        """Mean of ||(I - Q Q^T) G (I - Q Q^T) s||^2, with ``sketch`` = G s."""
        residual = deflation.project_out(sketch - (s @ self.q.T) @ self._image, self.q)
        return float((residual**2).sum()) / len(s)

    def estimate(self, metric: str) -> PointEstimate:
        inside = float((self.q * self._image).sum())
        if not self._norms:
            return PointEstimate(inside, 0.0)
        # ||A (g - Q c)||^2 with c = Q^T g
        norms = arrays.gather(self._norms)
        inside_of = [*self._inside, *map(self._coordinates, self._kept)]
        c, crossed = (np.concatenate(parts) for parts in zip(*inside_of, strict=True))
        core = arrays.to_numpy(self.q @ self._image.T, np.float64)
        residual = norms - 2 * (c * crossed).sum(1) + ((c @ core) * c).sum(1)
        left = deflation.left_outside(len(self.q), self._A.dim)
        return deflation.with_residual(
            inside, _skewed_mean(residual, self._A.dim), len(residual), left, self._j.epsilon
        )

    def _coordinates(self, g: Array) -> tuple[np.ndarray, np.ndarray]:
        """g^T Q and g^T G Q."""
        c, crossed = (arrays.to_numpy(g @ rows.T, np.float64) for rows in (self.q, self._image))
        return c, crossed


def _skewed_mean(values: np.ndarray, dim: int) -> PointEstimate:
    """Mean of k values, with the degrees of freedom of its variance reduced by their kurtosis.

    The sample variance of k normal values has a relative variance of 2 / (k - 1); with kurtosis K it is about (K - 1) /
    k. After a sketch of a steep spectrum, the values are squares of a few large numbers, with a kurtosis of up to 15.
    Only half of the degrees of freedom that follow are used, because such values are skewed: mean and variance are too
    small at the same time, and sampling would stop there first.
    """
    found = deflation.mean(values, dim)
    centred = values - found.value
    squares, fourths = (centred**2).mean(), (centred**4).mean()
    excess = fourths - squares**2
    return found._replace(degrees=min(found.degrees, len(values) * squares**2 / excess)) if excess > 0 else found
