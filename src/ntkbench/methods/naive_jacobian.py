"""Naive: one backward pass for each of the n rows of J, then J J^T."""

from __future__ import annotations

from collections.abc import Sequence

import array_api_compat

from ntkbench import metrics
from ntkbench.estimators.rows import moments_from_rows
from ntkbench.methods.base import Deterministic
from ntkbench.metrics import Moments
from ntkbench.operators import Array, JacobianOperator
from ntkbench.options import Target
from ntkbench.problem import Problem


class NaiveJacobian(Deterministic):
    """J by ``torch.autograd.grad`` in a loop over all outputs: n passes for each parameter set."""

    title = "naive Jacobian"
    kind = "exact"
    source = "folklore; the loop over torch.autograd.grad"
    backends = ("torch",)

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        return problem.n * len(metrics.parameter_sets(metric))

    def moments(self, metric: str, jacobians: Sequence[JacobianOperator]) -> Moments:
        j = max(jacobians, key=lambda j: j.P)
        # A quarter of the memory for a block, as two blocks of each J are held at a time.
        size = max(1, j.memory // (4 * j.P * j.itemsize))
        blocks = [range(i, min(i + size, j.n)) for i in range(0, j.n, size)]

        def rows(jacobian: JacobianOperator, block: range) -> Array:
            found = [jacobian.row(i) for i in block]
            return array_api_compat.array_namespace(found[0]).stack(found)

        return moments_from_rows(metric, jacobians, blocks, rows)
