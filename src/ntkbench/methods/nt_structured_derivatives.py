"""neural-tangents' structured derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from ntkbench.methods.base.neural_tangents import NeuralTangents
from ntkbench.options import Target
from ntkbench.problem import Problem


class NtStructuredDerivatives(NeuralTangents):
    """Theta equation by equation of the traced network, by rules for the structure in each equation's own Jacobian.

    Cost: O backward passes to the outputs of those equations that have a parameter as input, and one contraction for
    each pair of equations that have the same one. Loops are unrolled, so a recurrence of T steps compiles O(T^2)
    contractions. A parameter that is transposed before it is multiplied enters by the transpose, which has no structure
    that saves anything.

    Attributes:
        max_scan_length: steps of the longest recurrence that is compiled.
    """

    title = "neural-tangents structured derivatives"
    source = "Novak et al. 2022, section 3; neural-tangents 0.6.5, STRUCTURED_DERIVATIVES"
    implementation = "STRUCTURED_DERIVATIVES"
    max_scan_length: ClassVar[int] = 8

    def unsupported_reason(
        self, problem: Problem, metric: str, target: Target, passes: int | None = None
    ) -> str | None:
        reason = super().unsupported_reason(problem, metric, target, passes)
        if reason:
            return reason
        steps = longest_scan(problem)
        if steps > self.max_scan_length:
            return f"unrolls lax.scan and compiles in O(T^2): T = {steps} here, at most {self.max_scan_length}"
        return None


def longest_scan(problem: Problem) -> int:
    """Steps of the longest ``lax.scan`` in a problem's JAX network (nested ones multiplied), 1 if there is none.

    From shapes alone: the network is traced, and nothing is computed.
    """
    weights = {**problem.fixed_0, **problem.theta_0}
    shapes = tuple((key, w.shape, w.dtype.name) for key, w in weights.items())
    return _longest_scan(problem.jax_forward, shapes, (problem.x.shape, problem.x.dtype.name))


@functools.lru_cache(maxsize=64)
def _longest_scan(
    forward: Callable[[Mapping[str, Any], Any], Any], weights: tuple[Any, ...], x: tuple[Any, ...]
) -> int:
    import jax

    def like(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        # Precision does not change the network, and float64 is not always enabled.
        return jax.ShapeDtypeStruct(shape, "float32" if np.issubdtype(dtype, np.floating) else dtype)

    return _steps(jax.make_jaxpr(forward)({key: like(*array) for key, *array in weights}, like(*x)).jaxpr)


def _steps(jaxpr: Any) -> int:
    from jax.extend.core import jaxprs_in_params

    longest = 1
    for equation in jaxpr.eqns:
        inner = max(map(_steps, jaxprs_in_params(equation.params)), default=1)
        longest = max(longest, inner * (equation.params["length"] if equation.primitive.name == "scan" else 1))
    return longest
