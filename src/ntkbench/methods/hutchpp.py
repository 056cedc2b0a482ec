"""Hutch++: a sketch's exact share of a trace, and Hutchinson on what the sketch left, with Theta as a black box."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import array_api_compat

from ntkbench import statistics
from ntkbench.jacobian import Array, Jacobian, Rng
from ntkbench.methods.base import Stochastic

Operator = Callable[[Array], Array]


class HutchPP(Stochastic):
    """Traces of Theta, Theta^2 and Theta Theta_f by Hutch++ on the composed operator.

    tr A = tr Q^T A Q + 1/k sum_i g_i^T (I - Q Q^T) A (I - Q Q^T) g_i with Q = orth(A S), k columns of random signs in S
    and k in g: unbiased, 3k products with A. A product costs 2 passes for Theta and 4 for Theta^2 and Theta Theta_f.
    Effective rank and alignment take separate traces. The standard error is that of the residual's mean.
    """

    title = "Hutch++"
    source = "Meyer, Musco, Musco, Woodruff 2021, algorithm 1; composed operators as in Hazelden 2025"
    backends = ("torch", "jax")

    def passes_per_probe(self, metric: str) -> int:
        return {"trace": 6, "norm": 12, "effective_rank": 18, "alignment": 36}[metric]

    def draw(self, metric: str, jacobians: Sequence[Jacobian], probes: int, rng: Rng) -> tuple[float, float]:
        theta = [j.ntk for j in jacobians]
        n = jacobians[0].n

        def trace(*factors: Operator) -> tuple[float, float]:
            return _trace(lambda u: _apply(factors, u), min(probes, n), n, rng)

        if metric == "trace":
            return trace(theta[0])
        square, square_error = trace(theta[0], theta[0])
        if metric == "norm":
            return math.sqrt(square), square_error / (2 * math.sqrt(square))
        if metric == "effective_rank":
            first, first_error = trace(theta[0])
            value = first**2 / square
            return value, value * math.hypot(2 * first_error / first, square_error / square)
        square_f, square_f_error = trace(theta[1], theta[1])
        cross, cross_error = trace(theta[0], theta[1])
        scale = math.sqrt(square * square_f)
        value = cross / scale
        spread = math.hypot(square_error / (2 * square), square_f_error / (2 * square_f))
        return value, math.hypot(cross_error / scale, value * spread)


def _apply(factors: Sequence[Operator], u: Array) -> Array:
    for factor in reversed(factors):
        u = factor(u)
    return u


def _trace(product: Operator, k: int, n: int, rng: Rng) -> tuple[float, float]:
    """Hutch++ for a trace of a square operator on rows ``[k, n]``: 3k products."""
    sketch = product(rng.sign(k, n))
    xp = array_api_compat.array_namespace(sketch)
    q = xp.linalg.qr(sketch.T)[0].T
    inside = (q * product(q)).sum()
    g = rng.sign(k, n)
    g = g - (g @ q.T) @ q
    residual, error = statistics.mean(statistics.by_probe([(g * product(g)).sum(1)]))
    return float(inside) + residual, error
