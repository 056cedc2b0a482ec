"""XTrace: every probe is both in the sketch and in the residual of the others' sketch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ntkbench.estimators import deflation
from ntkbench.estimators.standard_errors import Reading
from ntkbench.methods.base import FixedBudget
from ntkbench.operators import JacobianOperator, Rng


class XTrace(FixedBudget):
    """Mean over i of tr Q_i^T Theta Q_i + c_i u_i^T (I - Q_i Q_i^T) Theta (I - Q_i Q_i^T) u_i, k Gaussian probes u.

    Q_i = orth(Theta U without u_i), and c_i puts the projected probe on the sphere of radius sqrt(n - k + 1). With
    Theta = J J^T all of it follows from Theta U, J^T U (made on the way) and J^T Q: 3k passes where Theta as a black
    box takes 4k. Unbiased. The standard error counts their covariance too (see
    :func:`ntkbench.estimators.deflation.combined`). Exact once k is over the rank of Theta. Holds 2k gradients.
    """

    title = "XTrace"
    source = "Epperly, Tropp, Webber 2024, section 2.1 and algorithm 2.1 with normalisation; J^T Q in place of Theta Q"
    backends = ("torch", "jax")
    metrics = ("trace",)
    gradients_held = 2

    def passes_per_probe(self, metric: str) -> int:
        return 3

    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> Reading:
        (j,) = jacobians
        k = min(probes, j.n)
        u = rng.normal(k, j.n)
        b = j.vjp(u)
        sketch = deflation.Sketch(j.jvp(b))
        f = j.vjp(sketch.q)
        grams = (f @ f.T, f @ b.T, (b * b).sum(1), sketch.q @ u.T, (u * u).sum(1))
        return deflation.combined(_table(sketch, j.n, *(deflation.on_host(gram) for gram in grams)))


def _table(
    sketch: deflation.Sketch, n: int, h: np.ndarray, fb: np.ndarray, b2: np.ndarray, w: np.ndarray, u2: np.ndarray
) -> np.ndarray:
    """Estimates with probes left out, as in ``deflation.combined``, from F = J^T Q and B = J^T U.

    Args:
        sketch: of Theta U.
        n: dimension.
        h, fb, b2: F^T F, F^T B and the diagonal of B^T B.
        w, u2: Q^T U and the diagonal of U^T U.
    """
    s = sketch.s
    k = s.shape[1]
    hs = h @ s
    table = np.empty((k, k))
    for i in range(k):
        pair = sketch.pair(i)
        v, hv = pair(s), pair(hs)
        vhv = (v * hv).sum(0)
        # u_i's coordinates in Q_i, and what they leave; without j too, a v is taken from them.
        x = w[:, i] - s[:, i] * (s[:, i] @ w[:, i])
        hx = h @ x
        a = w[:, i] @ v
        left = b2[i] - 2 * (x @ fb[:, i]) + x @ hx
        left = left + 2 * a * ((fb[:, i] - hx) @ v) + a**2 * vhv
        length = u2[i] - x @ x + a**2
        dimension = np.full(k, n - k + 2)
        dimension[i] -= 1
        # A whole basis leaves no complement but round-off.
        sphere = np.divide(dimension, length, out=np.zeros(k), where=length > 1e-14 * u2[i])
        table[i] = np.trace(h) - s[:, i] @ hs[:, i] - vhv + sphere * np.maximum(left, 0.0)
    return table
