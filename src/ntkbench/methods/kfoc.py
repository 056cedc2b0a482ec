"""KFOC: J^T J by the nearest Kronecker product for each layer, from its leading singular pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import numpy as np

from ntkbench import metrics
from ntkbench.estimate import STEPS, Estimate
from ntkbench.estimators.deflation import new_directions
from ntkbench.methods.base import Method, PreparedProblem, kronecker
from ntkbench.methods.base.method import certificate, notes
from ntkbench.operators import JacobianOperator, arrays
from ntkbench.options import Target
from ntkbench.problem import Problem


class KFOC(Method):
    """The metrics of ⊕_l A_l ⊗ B_l, where each product is the nearest one to its layer's block of J^T J.

    With the gradients G_r of the n outputs with respect to a layer's weight, the layer's block is sum_r vec(G_r)
    vec(G_r)^T. The nearest B ⊗ A in the Frobenius norm is the leading singular pair of the rearranged block (Van Loan
    and Pitsianis 1993): A = sum_r G_r^T B G_r and B = sum_r G_r A G_r^T up to scale. Symmetric factors suffice, so the
    pair is the leading eigenvector of the product of both maps on symmetric matrices of the smaller side. Block Lanczos
    iteration finds it, from the identity and a random matrix, which shows whether the largest singular value is a
    multiple one. The iteration stops when the direction of the factors is accurate to 1e-10. A note gives the error if
    that is not reached, or if the two largest singular values are so close that rounding in J decides between them.

    A bias is the weight of a constant input of one, and a parameter that is a vector keeps its whole block. KFOC treats
    different layers as orthogonal, so every metric is biased, including the trace. No other Kronecker products are
    closer to J^T J, including those of :mod:`ntkbench.methods.kfac`. The code is our own, as curvlinops 3.0.1 has no
    KFOC.

    O passes for each set of weights. J is held in float64 on the host. A step for a layer of D inputs and C outputs
    takes 4 n C D (C + D) multiplications; there are usually 5 to 10.

    Attributes:
        held: largest number of vectors of the iteration, each with the entries of a factor of the smaller side.
        steps: maximum number of steps.
        tolerance: error of the factors' direction at which the iteration stops.
        accurate: error of their direction above which there is a note.
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
    held: ClassVar[int] = 40
    steps: ClassVar[int] = 200
    tolerance: ClassVar[float] = 1e-10
    accurate: ClassVar[float] = 1e-3

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        return problem.O * len(metrics.parameter_sets(metric))

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """J and the blocks it is made of, or J, copies and products of a layer, the iteration, and all factors.

        In float64, with one entry more for a bias.
        """
        weights = [w for w in problem.theta_0.values() if w.ndim]
        largest = max((w.size for w in weights), default=0)
        side = max((min(len(w), w.size // len(w) + 1) for w in weights), default=0)
        factors = len(metrics.parameter_sets(metric)) * kronecker.entries(problem.theta_0)
        layer = 4 * problem.n * largest + 2 * self.held * side * (side + 1) // 2
        return 8 * (max(2 * problem.n * problem.P, problem.n * problem.P + layer) + factors)

    def estimate(self, prepared: PreparedProblem, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        jacobians, weights = prepared.jacobians(metric), prepared.problem.theta_0
        found: list[list[kronecker.Factors]] = []
        remarks: list[str] = []
        for j in jacobians:
            factors = []
            for name, gradients in _layers(j, weights):
                both, gap, error = self._nearest(gradients, STEPS * j.epsilon)
                if not error <= self.accurate:
                    close = f"its two largest singular values differ by {gap:.1e}"
                    remarks.append(f"{name}: the nearest Kronecker product is known to {error:.1g} only; {close}")
                factors.append(both)
            found.append(factors)
        moments = kronecker.moments(found[0], found[-1])
        spent = sum(j.passes for j in jacobians)
        said = (*remarks, *notes(jacobians))
        return Estimate.of_moments(
            metric, moments, spent, self.name, said, certificate(jacobians), kernel=self.computes
        )

    def _nearest(self, gradients: np.ndarray, rounding: float) -> tuple[kronecker.Factors, float, float]:
        """A and B of a layer from its gradients ``[n, C, D]``; the smaller one has the norm 1.

        Args:
            gradients: the gradients.
            rounding: their relative rounding error.

        Returns:
            A and B; the relative difference of the two largest singular values; and a bound on the error of the
            factors' direction, in radians: the residual of the eigenvector and rounding, divided by the difference.
        """
        n, C, D = gradients.shape
        if D < C:
            (b, a), gap, error = self._nearest(np.ascontiguousarray(gradients.transpose(0, 2, 1)), rounding)
            return (a, b), gap, error
        left, right = gradients.reshape(n * C, D), gradients.transpose(0, 2, 1).reshape(n * D, C)
        matrix, vector = _symmetric(C)

        def a_of(b: np.ndarray) -> np.ndarray:
            found: np.ndarray = left.T @ (b @ gradients).reshape(n * C, D)
            return found

        def product(v: np.ndarray) -> np.ndarray:
            return vector(right.T @ (gradients @ a_of(matrix(v))).transpose(0, 2, 1).reshape(n * D, C))

        v, value, second, residual = self._leading(product, vector(np.eye(C)))
        b = matrix(v)
        if value <= 0:  # the layer has no gradient
            return (a_of(b), b), 1.0, 0.0
        gap = max(value - second, 0.0)
        error = (residual + (rounding * value if C > 1 else 0.0)) / gap if gap else math.inf
        return (a_of(b), b), 1 - math.sqrt(max(second, 0.0) / value), error

    def _leading(
        self, product: Callable[[np.ndarray], np.ndarray], start: np.ndarray
    ) -> tuple[np.ndarray, float, float, float]:
        """The leading eigenvector, its value, the second largest value, and the norm of the residual."""
        other = np.random.default_rng(0).normal(size=start.shape)
        new = np.stack([start, other])[: len(start)]
        new /= np.linalg.norm(new, axis=1, keepdims=True)
        basis, images, vectors = np.empty((0, len(start))), np.empty((0, len(start))), np.empty((0, 0))
        for step in range(self.steps):
            new = new_directions(new, basis)
            if len(new) == 0:  # the Krylov space is exhausted
                break
            if len(basis) + len(new) > self.held:
                basis, images = vectors[:, -2:].T @ basis, vectors[:, -2:].T @ images
            image = np.array([product(v) for v in new])
            basis, images = np.concatenate([basis, new]), np.concatenate([images, image])
            projected = basis @ images.T
            values, vectors = np.linalg.eigh((projected + projected.T) / 2)
            top = vectors[:, -2:].T[::-1]
            pairs, sizes = top @ basis, values[-2:][::-1]
            residuals = np.linalg.norm(top @ images - sizes[:, None] * pairs, axis=1)
            v, value, second, residual = pairs[0], float(sizes[0]), float(sizes[1:].sum()), float(residuals[0])
            known = step + 1 >= FEWEST and residuals[1:].sum() <= max(ROUGHLY * (value - second), EXACT * value)
            if known and residual <= max(self.tolerance * (value - second), EXACT * value):
                break
            new = image / max(float(np.linalg.norm(image)), np.finfo(float).tiny)
        return v / np.linalg.norm(v), value, second, residual


EXACT = 1e-14
"""Residual that is rounding, relative to the eigenvalue."""
FEWEST, ROUGHLY = 4, 0.1
"""Steps after which a random vector shows any other large eigenvalue, and the largest residual of the second one,
relative to its distance from the first one, at which this distance is known."""


def _symmetric(size: int) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """The map from coordinates in an orthonormal basis to symmetric matrices ``[size, size]``, and its inverse."""
    rows, columns = np.triu_indices(size)
    once = rows == columns

    def matrix(v: np.ndarray) -> np.ndarray:
        half = np.zeros((size, size))
        half[rows, columns] = np.where(once, 1 / 2, math.sqrt(1 / 2)) * v
        return half + half.T

    def vector(b: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.where(once, 1.0, math.sqrt(2)) * b[rows, columns]
        return found

    return matrix, vector


def _layers(j: JacobianOperator, weights: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Each layer with the gradients ``[n, C, D]`` of all outputs; those of a bias are the last column."""
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
    yield from parts.items()
