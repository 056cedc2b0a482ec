"""Shared-probe alignment: both norms and the cross term from the same products with Theta and Theta_f."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench.estimators import deflation, standard_errors
from ntkbench.estimators.standard_errors import PointEstimate
from ntkbench.methods.base import FixedBudget
from ntkbench.metrics import Moments
from ntkbench.operators import Array, JacobianOperator, Rng, arrays


class SharedProbeAlignment(FixedBudget):
    """Alignment from the means of <Theta u, Theta_f u>, ||Theta u||^2 and ||Theta_f u||^2 over m orthonormal probes u.

    This is ``op_alignment`` of the blog post, whose probes are a Gaussian block after QR: 2m products with Theta or
    Theta_f, 4m passes. The ratio of means is biased at order 1/m. The standard error is that of the jackknife over
    probes with the finite-population correction, since all three sums are exact for n orthonormal probes.
    """

    title = "shared-probe alignment"
    source = "Hazelden, blog post on recurrent models, op_alignment"
    use_when = "you compare with the blog post"
    variance = "of order 1 / m, with the factor 1 - m / n"
    backends = ("torch", "jax")
    metrics = ("alignment",)

    def passes_per_probe(self, metric: str) -> int:
        return 4

    def jvp_share(self, metric: str) -> float:
        return 1 / 2

    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> PointEstimate:
        j, n = jacobians[0], jacobians[0].n
        u = deflation.random_orthonormal(rng, probes, n)
        columns = zip(*(_sums(jacobians, u[block]) for block in arrays.slices(j.blocks(len(u)))), strict=True)
        independent = standard_errors.jackknife(
            lambda square, square_f, cross: Moments(square=square, square_f=square_f, cross=cross).metric("alignment"),
            *map(arrays.gather, columns),
        )
        return standard_errors.finite_population(independent, len(u), n)


def _sums(jacobians: Sequence[JacobianOperator], u: Array) -> tuple[Array, Array, Array]:
    """||Theta u||^2, ||Theta_f u||^2 and <Theta u, Theta_f u> for each probe."""
    theta_u, theta_f_u = (j.ntk(u) for j in jacobians)
    return (theta_u**2).sum(1), (theta_f_u**2).sum(1), (theta_u * theta_f_u).sum(1)
