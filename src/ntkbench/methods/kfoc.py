"""KFOC: J^T J by the nearest Kronecker product for each layer, by power iteration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np

from ntkbench import metrics
from ntkbench.estimate import Estimate
from ntkbench.methods.base import Method, PreparedProblem, kronecker
from ntkbench.methods.base.method import certificate, notes
from ntkbench.operators import JacobianOperator, arrays
from ntkbench.options import Target
from ntkbench.problem import Problem


class KFOC(Method):
    """The metrics of ⊕_l A_l ⊗ B_l, where each product is the nearest one to its layer's block of J^T J.

    With the gradients G_r of the n outputs with respect to a layer's weight, the layer's block is sum_r vec(G_r)
    vec(G_r)^T. The nearest B ⊗ A in the Frobenius norm is the leading singular pair of the rearranged block (Van Loan
    and Pitsianis 1993): A = sum_r G_r^T B G_r and B = sum_r G_r A G_r^T up to scale, computed in turn until they no
    longer change. A bias is the weight of a constant input of one, and a parameter that is a vector keeps its whole
    block. KFOC treats different layers as orthogonal, so every metric is biased, including the trace. No other
    Kronecker products are closer to J^T J, including those of :mod:`ntkbench.methods.kfac`. The code is our own, as
    curvlinops 3.0.1 has no KFOC.

    O passes for each set of weights. J is held in float64 on the host. An iteration for a layer of D inputs and C
    outputs takes 2 n C D (C + D) multiplications.

    Attributes:
        iterations: maximum number of iterations.
        tolerance: relative change of the norm at which the iteration stops.
    """

    title = "KFOC"
    kind = "approximate"
    computes = "KFOC's approximation of J^T J"
    source = (
        "Schnaus, Lee and Triebel 2021 (Kronecker-factored optimal curvature); Van Loan and Pitsianis 1993 (doi "
        "10.1007/978-94-015-8196-7_17)"
    )
    use_when = "the bias of ``kfac`` is too large, and J fits in the memory of the host"
    passes_formula = "O"
    backends = ("torch", "jax")
    needs_independent_samples = True
    needs_one_network = True
    iterations: ClassVar[int] = 100
    tolerance: ClassVar[float] = 1e-10

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        return problem.O * len(metrics.parameter_sets(metric))

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """J and the blocks it is made of, or J and copies and products of a layer, and all factors; in float64."""
        largest = max((w.size for w in problem.theta_0.values()), default=0)
        factors = len(metrics.parameter_sets(metric)) * kronecker.entries(problem.theta_0)
        return 8 * (problem.n * max(2 * problem.P, problem.P + 4 * largest) + factors)

    def estimate(self, prepared: PreparedProblem, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        jacobians, weights = prepared.jacobians(metric), prepared.problem.theta_0
        found = [[self._nearest(layer) for layer in _layers(j, weights)] for j in jacobians]
        moments = kronecker.moments(found[0], found[-1])
        spent = sum(j.passes for j in jacobians)
        said = notes(jacobians), certificate(jacobians)
        return Estimate.of_moments(metric, moments, spent, self.name, *said, kernel=self.computes)

    def _nearest(self, gradients: np.ndarray) -> kronecker.Factors:
        """A and B of a layer from its gradients ``[n, C, D]``; B has the norm 1."""
        n, C, D = gradients.shape
        b, norm = np.eye(C) / np.sqrt(C), 0.0
        left, right = gradients.reshape(n * C, D), gradients.transpose(0, 2, 1).reshape(n * D, C)
        for _ in range(self.iterations):
            a = left.T @ (b @ gradients).reshape(n * C, D)
            before, norm = norm, float(np.linalg.norm(a))
            if norm - before <= self.tolerance * norm:
                break
            b = right.T @ (gradients @ a).transpose(0, 2, 1).reshape(n * D, C)
            b /= np.linalg.norm(b)
        return a, b


def _layers(j: JacobianOperator, weights: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """The gradients ``[n, C, D]`` of all outputs with respect to each layer; those of a bias are its last column."""
    rows = np.concatenate([arrays.to_numpy(j.sample_rows(*block), np.float64) for block in j.rectangles(1 / 2)])
    ends = np.cumsum([weights[name].size for name in j.names])[:-1]
    parts = {
        name: part.reshape(len(rows), *(weights[name].shape[:1] or (1,)), -1)
        for name, part in zip(j.names, np.split(rows, ends, axis=1), strict=True)
    }
    for name in [name for name in j.names if name.endswith("weight") and weights[name].ndim > 1]:
        bias = f"{name.removesuffix('weight')}bias"
        if bias in parts and parts[bias].shape == (len(rows), weights[name].shape[0], 1):
            parts[name] = np.concatenate([parts[name], parts.pop(bias)], axis=2)
    yield from parts.values()
