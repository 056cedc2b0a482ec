"""Leave-one-out Nystrom: all moments of Theta and Theta_f, deflated, from one block of probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ntkbench.estimators import deflation
from ntkbench.estimators.standard_errors import PointEstimate
from ntkbench.methods.base import FixedBudget
from ntkbench.metrics import Moments
from ntkbench.operators import JacobianOperator, Rng


class NystromLOO(FixedBudget):
    """||Theta||_F^2, tr Theta and tr(Theta Theta_f) with leave-one-out Nystrom approximations as control variates.

    With k Gaussian probes U, let J^T U = Q R, B = J Q and Theta = B B^T + E. Then tr Theta is estimated as in
    ``xnystrace``, ||Theta||_F^2 = 2 ||J^T B||_F^2 - ||B^T B||_F^2 + ||E||_F^2, and with the same at theta_f tr(Theta
    Theta_f) = ||J_f^T B||_F^2 + ||J^T B_f||_F^2 - ||B_f^T B||_F^2 + tr(E E_f). The last terms, ||E||_F^2 and tr(E E_f),
    are estimated by means over i of <E u_i, E_f u_i>, where u_i is left out of the sketch and put on the sphere in the
    orthogonal complement of the other probes. This takes no further products, as E u_i is in the span of B. The cost is
    3k passes for norm and effective rank, and 8k for alignment.

    The moments are unbiased; the square root and the ratios have a bias of the order of the variance. The variance is
    that of Hutchinson for E instead of Theta, so it falls with the tail of the spectrum. On a spectrum that does not
    decay, it is that of Hutchinson with fewer probes. Exact once k exceeds the ranks of Theta and Theta_f. The standard
    error is that of the linearised metric, with the covariance of the leave-one-out estimates (see
    :func:`ntkbench.estimators.deflation.leave_one_out`). This covariance has few degrees of freedom for any k, so
    intervals from many probes are conservative, and a note says so. Holds up to 4k gradients for each set of weights.

    Attributes:
        many: smallest number of probes at which a note calls the interval conservative, if there are fewer than a
            quarter as many degrees of freedom.
    """

    title = "leave-one-out Nystrom"
    source = "this suite; after XNysTrace of Epperly et al. 2024 (doi 10.1137/23M1548323)"
    use_when = "another metric than the trace is needed, samples interact, and the spectrum decays"
    variance = "that of ``hutchinson`` with E for Theta; 0 once k exceeds the ranks of Theta and Theta_f"
    backends = ("torch", "jax")
    metrics = ("norm", "effective_rank", "alignment")
    gradients_held = 4
    many: ClassVar[int] = 24

    def remarks(self, error: float, degrees: float, probes: int) -> tuple[str, ...]:
        if not error > 0 or probes < self.many or degrees >= probes / 4:
            return super().remarks(error, degrees, probes)
        counted = f"{deflation.COVARIANCE_DEGREES} degrees of freedom"
        return (f"conservative interval: the covariance of leave-one-out estimates counts with only {counted}",)

    def passes_per_probe(self, metric: str) -> int:
        return 8 if metric == "alignment" else 3

    def jvp_share(self, metric: str) -> float:
        return 1 / 4 if metric == "alignment" else 1 / 3

    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> PointEstimate:
        n = jacobians[0].n
        u = rng.normal(min(probes, n), n)
        normalisation = deflation.Normalisation(u)
        sketches = [deflation.Sketch(j.vjp(u)) for j in jacobians]
        images = [j.jvp(sketch.q) for j, sketch in zip(jacobians, sketches, strict=True)]

        def inner_product(one: int, other: int) -> np.ndarray:
            back = jacobians[other].vjp(images[one])
            x = y = deflation.gram(back, back)
            if one != other:
                back = jacobians[one].vjp(images[other])
                y = deflation.gram(back, back)
            z = deflation.gram(images[other], images[one])
            return deflation.nystrom_inner_product(sketches[one], sketches[other], normalisation, z, x, y)

        tables = {"square": inner_product(0, 0)}
        if metric == "effective_rank":
            tables["trace"] = deflation.nystrom_trace(sketches[0], normalisation, deflation.gram(images[0], images[0]))
        if metric == "alignment":
            tables["square_f"], tables["cross"] = inner_product(1, 1), inner_product(0, 1)
        moments = Moments(**{name: float(table.diagonal().mean()) for name, table in tables.items()})
        gradient = moments.gradient(metric)
        table = sum(getattr(gradient, name) * table for name, table in tables.items())
        overlap = max(sketch.overlap for sketch in sketches)
        linear = deflation.leave_one_out(table, min(n, jacobians[0].P), overlap, cautious=metric == "alignment")
        return linear._replace(value=moments.metric(metric))
