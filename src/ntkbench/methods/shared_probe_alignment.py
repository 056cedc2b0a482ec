"""Shared-probe alignment: both norms and the cross term from the same Theta-products."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ntkbench.estimators import deflation, standard_errors
from ntkbench.estimators.standard_errors import Reading
from ntkbench.methods.base import FixedBudget
from ntkbench.metrics import Moments
from ntkbench.operators import Array, JacobianOperator, Rng


class SharedProbeAlignment(FixedBudget):
    """<Theta u, Theta_f u> against ||Theta u|| ||Theta_f u|| over m orthonormalised probes u.

    The blog's ``op_alignment``, with its QR of a Gaussian block: 2m Theta-products, 4m passes. The ratio of means is
    biased at order 1/m; the standard error is the jackknife over probes with the correction for a finite population,
    since with n orthonormal probes all three sums are exact.
    """

    title = "shared-probe alignment"
    source = "Hazelden, blog post on recurrent models, op_alignment"
    backends = ("torch", "jax")
    metrics = ("alignment",)

    def passes_per_probe(self, metric: str) -> int:
        return 4

    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> Reading:
        j, n = jacobians[0], jacobians[0].n
        u = deflation.frame(rng, probes, n)
        ends = [*itertools.accumulate(j.blocks(len(u)))]
        columns = zip(*(_sums(jacobians, u[a:b]) for a, b in itertools.pairwise((0, *ends))), strict=True)
        independent = standard_errors.jackknife(
            lambda square, square_f, cross: Moments(square=square, square_f=square_f, cross=cross).metric("alignment"),
            *map(standard_errors.by_probe, columns),
        )
        return standard_errors.orthonormal(independent, len(u), n)


def _sums(jacobians: Sequence[JacobianOperator], u: Array) -> tuple[Array, Array, Array]:
    """||Theta u||^2, ||Theta_f u||^2 and <Theta u, Theta_f u> of each probe."""
    theta_u, theta_f_u = (j.ntk(u) for j in jacobians)
    return (theta_u**2).sum(1), (theta_f_u**2).sum(1), (theta_u * theta_f_u).sum(1)
