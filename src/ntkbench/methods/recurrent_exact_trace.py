"""The exact trace of a recurrent network's NTK: one backward pass per output of a trial, for all trials at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from ntkbench.methods.base import Deterministic
from ntkbench.metrics import Moments
from ntkbench.operators import JacobianOperator
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from ntkbench.operators.recurrent.base import RecurrentJacobian


class RecurrentExactTrace(Deterministic):
    """tr Theta = sum_(b, t, o) ||J_b^T e_(t, o)||^2, for all trials b in one backward pass from step t.

    Trials do not interact, so T O' backward passes compute all B T O' rows of J, for B trials of T steps with O'
    outputs per step. The backward pass from step t takes the fraction t / T of a pass, which adds up to O' (T + 1) / 2
    passes. Squared norms of gradients are computed from inner products between steps if this takes fewer
    multiplications than the gradients themselves.
    """

    title = "recurrent exact trace"
    kind = "exact"
    source = "this suite; per-sample gradients as in Goodfellow 2015 (arXiv 1510.01799)"
    use_when = "the trace of a network that declares its recurrence must be exact"
    passes_formula = "O * (T + 1) / (2 * T)"
    backends = ("torch", "jax")
    metrics = ("trace",)
    needs_independent_samples = True
    needs_recurrence = True

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        T = problem.x.shape[1]
        return problem.O // T * (T + 1) / 2

    def moments(self, metric: str, jacobians: Sequence[JacobianOperator]) -> Moments:
        (j,) = cast("Sequence[RecurrentJacobian]", jacobians)  # the problem is a recurrent network
        return Moments(trace=float(sum(j.squared_rows(step).sum() for step in range(j.T))))
