"""Batched Jacobian: J from products with blocks of unit vectors, then the smaller of its two Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence

import array_api_compat

from ntkbench import metrics, operations
from ntkbench.estimators.rows import moments_from_rows, rows_computed
from ntkbench.methods.base import Deterministic
from ntkbench.methods.base.method import PreparedProblem
from ntkbench.metrics import Moments
from ntkbench.operators import JacobianOperator, arrays
from ntkbench.options import Target
from ntkbench.problem import Problem


class BatchedJacobian(Deterministic):
    """J by batched products over the whole batch: min(n, P) passes for each set of weights if J fits in memory.

    J is computed by VJPs with the n unit vectors of output space. If J fits in memory and P < n (2 P < n without
    forward mode, where a JVP takes two passes), it is computed by JVPs with the P unit vectors of parameter space
    instead. If J takes more than half of the memory, VJPs recompute blocks of its rows for every pair of blocks.
    Samples may interact.
    """

    title = "batched Jacobian"
    kind = "exact"
    source = "folklore; torch.func.jacrev and jacfwd, jax.jacrev and jacfwd on the whole batch"
    use_when = "samples interact, and n or P is small"
    passes_formula = "n or P"
    backends = ("torch", "jax")

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        ends = len(metrics.parameter_sets(metric))
        held = ends * problem.n * problem.P * target.itemsize
        by_columns = problem.other is None and held <= target.memory and problem.n > problem.P
        return ends * (problem.P if by_columns else problem.n)

    def products(self, problem: Problem, metric: str, passes: float) -> float:
        return operations.of_gram(metric, min(problem.n, problem.P), max(problem.n, problem.P))

    def planned_passes(self, prepared: PreparedProblem, metric: str) -> float:
        jacobians = prepared.jacobians(metric)
        if _is_by_columns(jacobians):
            return float(sum(j.P * j.passes_per_jvp() for j in jacobians))
        sizes = [block.stop - block.start for block in _blocks(jacobians)]
        return len(jacobians) * rows_computed(metric, sizes, _held(jacobians), jacobians[0].memory)

    def moments(self, metric: str, jacobians: Sequence[JacobianOperator]) -> Moments:
        if _is_by_columns(jacobians):
            return _moments_from_columns(metric, jacobians)
        blocks = _blocks(jacobians)
        return moments_from_rows(metric, jacobians, blocks, lambda each, b: each.vjp(each.basis(b.start, b.stop)))


def _held(jacobians: Sequence[JacobianOperator]) -> int:
    """Bytes of J at all sets of weights."""
    return sum(j.n * j.P * j.itemsize for j in jacobians)


def _is_by_columns(jacobians: Sequence[JacobianOperator]) -> bool:
    j = max(jacobians, key=lambda each: each.P)
    if jacobians[-1].names != jacobians[0].names or _held(jacobians) > j.memory or j.n <= j.P:
        return False
    return j.n > j.P * max(each.passes_per_jvp() for each in jacobians)


def _blocks(jacobians: Sequence[JacobianOperator]) -> list[slice]:
    """Blocks of rows; each takes a quarter of the memory, as do its unit vectors, since two of each J are held."""
    j = max(jacobians, key=lambda each: each.P)
    most = max(1, j.memory // (4 * max(j.P, j.n) * j.itemsize))
    return arrays.chunks(j.n, max(len(j.blocks(j.n)), -(-j.n // most)))


def _moments_from_columns(metric: str, jacobians: Sequence[JacobianOperator]) -> Moments:
    """tr J^T J, ||J^T J||_F^2, and with J_f the inner product of the kernels, ||J_f^T J||_F^2."""
    columns = []
    for j in jacobians:
        blocks = [j.jvp(j.parameter_basis(block.start, block.stop)) for block in arrays.slices(j.blocks(j.P))]
        columns.append(array_api_compat.array_namespace(blocks[0]).concat(blocks))
    trace = metrics.squared_norm(columns[0])
    if metric == "trace":
        return Moments(trace=float(trace))
    pairs = [(0, 0)] if len(columns) == 1 else [(0, 0), (1, 1), (0, 1)]
    return Moments(float(trace), *(float(metrics.squared_norm(columns[a] @ columns[b].T)) for a, b in pairs))
