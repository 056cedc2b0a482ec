"""Exact moments from the P x P side: J^T J, accumulated over the rows of J."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

from ntkbench import metrics, operations
from ntkbench.methods.base import Deterministic
from ntkbench.metrics import Moments
from ntkbench.operators import Array, JacobianOperator, arrays
from ntkbench.options import Target
from ntkbench.problem import Problem


class ParameterGram(Deterministic):
    """tr Theta = tr J^T J, ||Theta||_F = ||J^T J||_F and tr(Theta Theta_f) = ||J_f^T J||_F^2, by blocks of rows of J.

    For networks with more outputs than parameters, such as recurrent networks whose outputs are trajectories: n P^2
    multiplications instead of n^2 P. Little more than a triangle of J^T J is computed, which must fit in memory; for
    alignment, so must that of J_f^T J_f and all of J_f^T J. Takes O passes for each set of weights.

    Attributes:
        chunks: number of chunks of parameters; blocks of J^T J above the diagonal are not computed.
    """

    title = "parameter Gram matrix"
    kind = "exact"
    source = "this suite; J^T J is the Gauss-Newton matrix of a squared loss"
    use_when = "there are fewer parameters than outputs, and J^T J fits in memory"
    passes_formula = "O"
    backends = ("torch", "jax")
    needs_independent_samples = True
    needs_one_network = True
    chunks: ClassVar[int] = 4

    def unsupported_reason(
        self, problem: Problem, metric: str, target: Target, passes: int | None = None
    ) -> str | None:
        if reason := super().unsupported_reason(problem, metric, target, passes):
            return reason
        needed = self.bytes_needed(problem, metric, target)
        if needed > target.memory:
            gib, limit = needed / 2**30, target.memory / 2**30
            return f"J^T J with P = {problem.P} takes {gib:.1f} GiB, over the memory of {limit:.1f} GiB"
        return None

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        return problem.O * len(metrics.parameter_sets(metric))

    def products(self, problem: Problem, metric: str, passes: float) -> float:
        across = 2 if metric == "alignment" else 0  # J_f^T J, which is not symmetric
        return operations.of_gram(metric, problem.P, problem.n, across)

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        if metric == "trace":
            return 0
        triangle = (self.chunks + 1) / (2 * self.chunks)
        return int((2 * triangle + 1 if metric == "alignment" else triangle) * problem.P**2) * target.itemsize

    def moments(self, metric: str, jacobians: Sequence[JacobianOperator]) -> Moments:
        j = jacobians[0]
        rectangles = list(j.rectangles(1 / (2 * len(jacobians))))
        if metric == "trace":
            return Moments(trace=float(sum(metrics.squared_norm(j.sample_rows(*r)) for r in rectangles)))
        chunks = arrays.chunks(j.P, self.chunks)
        pairs = [(0, 0)] if len(jacobians) == 1 else [(0, 0), (1, 1), (0, 1)]
        grams: dict[tuple[int, int, int, int], Array] = {}
        for rectangle in rectangles:
            rows = [jacobian.sample_rows(*rectangle) for jacobian in jacobians]
            for (one, two), a, b in itertools.product(pairs, range(self.chunks), range(self.chunks)):
                if one != two or a >= b:
                    product = rows[one][:, chunks[a]].T @ rows[two][:, chunks[b]]
                    key = (one, two, a, b)
                    grams[key] = grams[key] + product if key in grams else product
        squares = dict.fromkeys(pairs, 0.0)
        for (one, two, a, b), gram in grams.items():
            squares[one, two] += (1 if one != two or a == b else 2) * float(metrics.squared_norm(gram))
        trace = sum(float(grams[0, 0, a, a].diagonal().sum()) for a in range(self.chunks))
        return Moments(trace, *(squares[pair] for pair in pairs))
