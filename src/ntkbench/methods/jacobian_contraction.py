"""Jacobian contraction: per-sample Jacobians by vmap over one backward pass per output, then J J^T."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench import metrics, operations
from ntkbench.estimators.rows import moments_from_rows, rows_computed
from ntkbench.methods.base import Deterministic
from ntkbench.methods.base.method import PreparedProblem
from ntkbench.metrics import Moments
from ntkbench.operators import JacobianOperator
from ntkbench.options import Target
from ntkbench.problem import Problem


class JacobianContraction(Deterministic):
    """The textbook torch.func kernel: J by per-sample reverse mode, contracted over parameters.

    O passes for each set of weights if J fits in half of the memory; otherwise more, as blocks of J are recomputed for
    every pair of blocks. n^2 P multiplications.
    """

    title = "Jacobian contraction"
    kind = "exact"
    source = "Novak et al. 2022 (arXiv 2206.08720), section 3; PyTorch's tutorial on neural tangent kernels"
    use_when = "samples do not interact, and the network cannot be traced"
    passes_formula = "O"
    backends = ("torch",)
    needs_independent_samples = True

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        return problem.O * len(metrics.parameter_sets(metric))

    def products(self, problem: Problem, metric: str, passes: float) -> float:
        return operations.of_gram(metric, problem.n, problem.P)

    def planned_passes(self, prepared: PreparedProblem, metric: str) -> float:
        jacobians = prepared.jacobians(metric)
        sizes = [(a.stop - a.start) * (b.stop - b.start) for a, b in _blocks(jacobians)]
        held = sum(j.n * j.P * j.itemsize for j in jacobians)
        return len(jacobians) * rows_computed(metric, sizes, held, jacobians[0].memory) / jacobians[0].N

    def moments(self, metric: str, jacobians: Sequence[JacobianOperator]) -> Moments:
        blocks = _blocks(jacobians)
        return moments_from_rows(metric, jacobians, blocks, lambda j, block: j.sample_rows(*block))


def _blocks(jacobians: Sequence[JacobianOperator]) -> list[tuple[slice, slice]]:
    """Samples and outputs whose rows take a quarter of the memory, as two blocks of each J are held at a time."""
    return list(max(jacobians, key=lambda j: j.P).rectangles(1 / 4))
