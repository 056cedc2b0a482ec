"""NTK-vector products: rows of Theta as J (J_b^T e), a per-sample VJP and a JVP each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ntkbench import metrics
from ntkbench.methods.base import Deterministic
from ntkbench.metrics import Moments
from ntkbench.operators import Array, JacobianOperator, arrays
from ntkbench.options import Target
from ntkbench.problem import Problem


class NtkVectorProducts(Deterministic):
    """Rows of Theta without J: O passes of per-sample VJPs, then n JVPs, for each set of weights.

    Neither J nor Theta is held.
    """

    title = "NTK-vector products"
    kind = "exact"
    source = "Novak et al. 2022 (arXiv 2206.08720), section 3"
    use_when = "neither J nor Theta fits in memory, and the network cannot be traced"
    passes_formula = "n + O"
    backends = ("torch",)
    needs_independent_samples = True

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        return (problem.n + problem.O) * len(metrics.parameter_sets(metric))

    def moments(self, metric: str, jacobians: Sequence[JacobianOperator]) -> Moments:
        return metrics.from_rows_of_theta(_rows_of_theta(jacobians))


def _rows_of_theta(jacobians: Sequence[JacobianOperator]) -> Iterator[tuple[np.ndarray, list[Array]]]:
    """Indices of some rows, and these rows at each set of weights, within a quarter of the memory."""
    j = jacobians[0]
    for rectangle in j.rectangles(1 / 2):
        numbers = j.row_numbers(*rectangle)
        rows = [jacobian.sample_rows(*rectangle) for jacobian in jacobians]
        for part in arrays.strips(len(numbers), j.n, j.memory / (4 * len(jacobians) * j.itemsize)):
            yield numbers[part], [jacobian.jvp(row[part]) for jacobian, row in zip(jacobians, rows, strict=True)]
