"""XNysTrace from the other side: leave-one-out Nystrom approximations of J^T J through a QR of J W."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench.estimators import deflation
from ntkbench.estimators.standard_errors import Reading
from ntkbench.methods.base import FixedBudget
from ntkbench.operators import JacobianOperator, Rng


class XNysTraceForward(FixedBudget):
    """``xnystrace`` of J^T J, whose trace is that of Theta: F = J W = Q R for k Gaussian w in parameter space.

    k JVPs, then k VJPs for ||J^T Q||_F^2; n takes P's place and P takes n's. Against ``xnystrace`` the sketch has
    vectors of n and not of P entries but the probes are of P and not of n, which is what decides between them, as
    J J^T and J^T J have one spectrum. Unbiased; standard error as there. Exact once k is over the rank of Theta. Holds
    k vectors of parameters and k gradients.
    """

    title = "XNysTrace (forward)"
    source = "Epperly, Tropp, Webber 2024, section 2.3 (XNysTrace with normalisation), through a QR of J W"
    backends = ("torch", "jax")
    metrics = ("trace",)
    gradients_held = 3

    def passes_per_probe(self, metric: str) -> int:
        return 2

    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> Reading:
        (j,) = jacobians
        return deflation.xnystrace(j.jvp, j.vjp, rng.normal(min(probes, j.P), j.P))
