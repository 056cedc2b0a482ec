"""The largest eigenvalue by block Lanczos, and the entropy effective rank by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from typing import ClassVar

from scipy.special import ndtri

from ntkbench.errors import Undefined
from ntkbench.estimate import Estimate
from ntkbench.estimators import lanczos, spectrum
from ntkbench.methods.base import Stochastic
from ntkbench.methods.base.method import PreparedProblem, notes
from ntkbench.operators import JacobianOperator
from ntkbench.options import Target
from ntkbench.problem import Problem


class BlockLanczos(Stochastic):
    """Metrics of the eigenvalues from products with Theta, as in :func:`ntkbench.spectrum` for a large Theta.

    A probe is one product with Theta = J J^T, 2 passes. The largest eigenvalue is estimated by the largest Ritz value
    from a block of 5 random vectors, which is a lower bound up to rounding. The stated standard error gives an interval
    at 95 % that reaches up to the largest value that is not excluded, see
    :func:`ntkbench.estimators.lanczos.ritz_pairs`; the error itself is usually much smaller. The iteration stops early
    once that distance is at most ``rtol`` of the value.

    The entropy effective rank uses 8 random vectors, with as many Lanczos steps as the budget allows, up to 25. A
    larger budget adds vectors. The standard error is from the variance over vectors. The estimate is the geometric mean
    of Gauss and Gauss-Radau quadrature, which enclose the value after any number of further steps. Half of their
    distance, in the logarithm, is part of ``rounding``.

    The condition number is not available, as products bound the smallest eigenvalue only from above.

    Attributes:
        rtol: distance to the largest value that is not excluded, relative to the eigenvalue.
    """

    title = "block Lanczos"
    source = (
        "Cullum and Donath 1974 (doi 10.1109/CDC.1974.270490); quadrature: Ubaru, Chen and Saad 2017, algorithm 1 (doi "
        "10.1137/16M1104974)"
    )
    use_when = "you need the largest eigenvalue or the entropy effective rank, and Theta does not fit in memory"
    variance = "of the entropy: that of z^T f(Theta) z over the probes z, divided by their number"
    backends = ("torch", "jax")
    metrics = ()
    kernel_metrics = ("largest_eigenvalue", "entropy_effective_rank")
    fewest_probes = 2 * spectrum.PROBES
    rtol: ClassVar[float] = 1e-4

    def passes_per_probe(self, metric: str) -> int:
        return 2

    def jvp_share(self, metric: str) -> float:
        return 0.5

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """Three blocks with their images in float64 on the host, or the Krylov spaces of all probes."""
        if metric == "largest_eigenvalue":
            return lanczos.HELD * 8 * problem.n * min(3 * (1 + lanczos.EXTRA), problem.n)
        products = self.probes(metric, self.default_passes if passes is None else passes)
        return products * problem.n * target.itemsize

    def spend(self, prepared: PreparedProblem, metric: str, passes: int, seed: int) -> Estimate:
        products = self.probes(metric, self.affordable(prepared, (metric,), passes))
        (j,) = prepared.jacobians(metric)
        found = _largest(j, self.rtol, passes, seed) if metric == "largest_eigenvalue" else _entropy(j, products, seed)
        value, error, degrees, rounding, said = found
        said = (*said, *notes([j]))
        spent, certificate = j.passes, j.certificate
        return Estimate(value, error, spent, self.name, said, metric, degrees, certificate, rounding=rounding)


Found = tuple[float, float, float, float, tuple[str, ...]]
"""Value, standard error with its degrees of freedom, relative rounding, and notes."""


def _largest(j: JacobianOperator, rtol: float, passes: int, seed: int) -> Found:
    found = lanczos.ritz_pairs(j, 1, rtol=rtol, passes=passes, seed=seed)
    value = max(float(found.values[0]), 0.0)
    error = float(found.errors[0]) / float(ndtri(0.975))
    return value, error, math.inf, found.rounding / value if value else 0.0, found.notes


def _entropy(j: JacobianOperator, products: int, seed: int) -> Found:
    """The geometric mean of Gauss and Gauss-Radau quadrature.

    Raises:
        Undefined: Theta is zero.
    """
    steps = min(products // spectrum.PROBES, spectrum.STEPS, j.n)
    probes = products // steps
    density = lanczos.density(j, probes=probes, steps=steps, seed=seed)
    high, low = density.entropy_effective_rank, density.entropy_lower_bound
    if math.isnan(high):
        raise Undefined("the entropy effective rank is not defined where Theta is zero")
    middle = math.sqrt(low * high)
    rounding = high / middle - 1 + spectrum.entropy_rounding(j.n, lanczos.rounding(j))
    return middle, density.entropy_standard_error, probes - 1, rounding, ()
