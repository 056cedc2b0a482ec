"""Naive: one backward pass for each of the n rows of J, then J J^T."""

from __future__ import annotations

from collections.abc import Sequence

import array_api_compat

from ntkbench import metrics, operations
from ntkbench.estimators.rows import moments_from_rows, rows_computed
from ntkbench.methods.base import Deterministic
from ntkbench.metrics import Moments
from ntkbench.operators import Array, JacobianOperator
from ntkbench.options import Target
from ntkbench.problem import Problem


class NaiveJacobian(Deterministic):
    """J by ``torch.autograd.grad`` or ``jax.vjp`` in a loop over all outputs: n passes for each set of weights.

    If J takes more than half of the memory, blocks of its rows are recomputed for every pair of blocks.
    """

    title = "naive Jacobian"
    kind = "exact"
    source = "folklore; the loop over torch.autograd.grad or jax.vjp"
    use_when = "no other method applies, or as a reference"
    passes_formula = "n"
    backends = ("torch", "jax")

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        n, ends = problem.n, len(metrics.parameter_sets(metric))
        sizes = [len(block) for block in _blocks(n, problem.P, target.memory, target.itemsize)]
        return ends * rows_computed(metric, sizes, ends * n * problem.P * target.itemsize, target.memory)

    def products(self, problem: Problem, metric: str, passes: float) -> float:
        return operations.of_gram(metric, problem.n, problem.P)

    def moments(self, metric: str, jacobians: Sequence[JacobianOperator]) -> Moments:
        j = max(jacobians, key=lambda j: j.P)
        blocks = _blocks(j.n, j.P, j.memory, j.itemsize)

        def rows(jacobian: JacobianOperator, block: range) -> Array:
            found = [jacobian.row(i) for i in block]
            return array_api_compat.array_namespace(found[0]).stack(found)

        return moments_from_rows(metric, jacobians, blocks, rows)


def _blocks(n: int, P: int, memory: int, itemsize: int) -> list[range]:
    """Blocks of rows of at most a quarter of the memory each, as two blocks of each J are held at a time."""
    size = max(1, memory // (4 * P * itemsize))
    return [range(i, min(i + size, n)) for i in range(0, n, size)]
