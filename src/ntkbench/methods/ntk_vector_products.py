"""NTK-vector products: rows of Theta as J (J_b^T e), a per-sample VJP and a JVP each."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench import metrics
from ntkbench.methods.base import Deterministic
from ntkbench.metrics import Moments
from ntkbench.operators import JacobianOperator
from ntkbench.options import Target
from ntkbench.problem import Problem


class NtkVectorProducts(Deterministic):
    """Rows of Theta without J: O passes of per-sample VJPs, then n JVPs, for each parameter set.

    Neither J nor Theta is held.
    """

    title = "NTK-vector products"
    kind = "exact"
    source = "Novak et al. 2022, section 3"
    backends = ("torch",)
    needs_independent_samples = True

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        return (problem.n + problem.O) * len(metrics.parameter_sets(metric))

    def moments(self, metric: str, jacobians: Sequence[JacobianOperator]) -> Moments:
        j = jacobians[0]
        return metrics.from_rows_of_theta(
            (
                j.row_numbers(samples, outputs),
                [jacobian.jvp(jacobian.sample_rows(samples, outputs)) for jacobian in jacobians],
            )
            for samples, outputs in j.rectangles(1 / 2)
        )
