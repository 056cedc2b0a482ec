"""Adaptive Hutch++: as many columns in the sketch as pay for themselves, the rest of the passes on the residual."""

from __future__ import annotations

from collections.abc import Sequence

import array_api_compat

from ntkbench.estimators import deflation, standard_errors
from ntkbench.estimators.accumulators import Sample
from ntkbench.estimators.standard_errors import Reading
from ntkbench.methods.base import Sampling
from ntkbench.operators import Array, JacobianOperator, Rng

COLUMNS = 4
"""By which the sketch grows."""

RESIDUAL = 8
"""Probes that are left for the residual, which alone can tell an error."""

PASSES = 4
"""Of one column: J^T s and J J^T s for the span, J^T q and Theta q = J J^T q for what the column takes away."""


class HutchPPAdaptive(Sampling):
    """tr Q^T Theta Q + mean of ||J^T (I - Q Q^T) g||^2 with an orthonormal Q that grows while that is worth it.

    One more column costs 4 passes, one more residual probe 1. The variance is 2 R / m for m residual probes, with R the
    squared norm of (I - Q Q^T) Theta (I - Q Q^T) (less its diagonal). The columns' own random signs s, fresh to the Q
    before them, tell R without bias, and Theta Q tells by how much each block of columns lowered it: after a block that
    took a smaller share off R than its passes are of all residual probes, no further one is made. Residual probes are
    kept and projected anew when Q grows, so no pass is lost, and as they have no part in the decision the estimate is
    unbiased for a given budget. On a flat spectrum it is ``one_sided_reverse`` less one block; on a steep one half of
    the passes and more go into the sketch. Holds 2 vectors of length n for each column and 1 for each probe.
    """

    title = "Hutch++ (adaptive)"
    source = "Persson, Cortinovis, Kressner 2022, section 2 (A-Hutch++), one-sided and with another rule of stopping"
    backends = ("torch", "jax")
    metrics = ("trace",)
    first_batch = 40

    def passes_per_probe(self, metric: str) -> int:
        return 1

    def sample(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> Sample:
        (j,) = jacobians
        return _Growing(j, rng)


class _Growing(Sample):
    """A sketch and residual probes, both of which can be added to; its probes are passes."""

    def __init__(self, jacobian: JacobianOperator, rng: Rng) -> None:
        self._j, self._rng = jacobian, rng
        self._q = self._image = jacobian.basis(0, 0)  # Q and Theta Q, rows
        self._g = jacobian.basis(0, 0)
        self._lengths: list[Array] = []  # ||J^T g||^2
        self._worth_it = True

    def extend(self, probes: int) -> None:
        left = probes
        while self._worth_it and left >= PASSES * COLUMNS + RESIDUAL and len(self._q) + COLUMNS <= self._j.n:
            self._grow(len(self._g) + left)
            left -= PASSES * COLUMNS
        if left:
            g = self._rng.sign(left, self._j.n)
            self._lengths.append(deflation.squared_lengths(self._j, self._j.vjp, g))
            self._g = array_api_compat.array_namespace(g).concat([self._g, g])

    def _grow(self, probes: int) -> None:
        """A block of columns; ``probes`` is how many residual probes there would be without it."""
        s = self._rng.sign(COLUMNS, self._j.n)
        xp = array_api_compat.array_namespace(s)
        theta_s = self._j.ntk(s)
        before = self._remainder(s, theta_s)
        q = deflation.beyond(theta_s, self._q)
        image = self._j.ntk(q)
        across, own = deflation.on_host(self._q @ image.T), deflation.on_host(q @ image.T)
        gained = 2 * float((deflation.on_host(image) ** 2).sum()) - 2 * (across**2).sum() - (own**2).sum()
        self._q, self._image = xp.concat([self._q, q]), xp.concat([self._image, image])
        self._worth_it = gained * probes > PASSES * COLUMNS * before

    def _remainder(self, s: Array, theta_s: Array) -> float:
        """Mean of ||(I - Q Q^T) Theta (I - Q Q^T) s||^2."""
        rest = deflation.without(theta_s - (s @ self._q.T) @ self._image, self._q)
        return float((rest**2).sum()) / len(s)

    def read(self, metric: str) -> Reading:
        inside = float((self._q * self._image).sum())
        if not self._lengths:
            return Reading(inside, 0.0)
        # ||J^T (g - Q c)||^2 with c = Q^T g
        lengths = standard_errors.by_probe(self._lengths)
        c = deflation.on_host(self._g @ self._q.T)
        core = deflation.on_host(self._q @ self._image.T)
        crossed = deflation.on_host(self._g @ self._image.T)
        rest = lengths - 2 * (c * crossed).sum(1) + ((c @ core) * c).sum(1)
        return deflation.plus(inside, standard_errors.mean(rest))
