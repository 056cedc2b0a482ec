"""Base of the methods by neural-tangents: one compiled program per metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ntkbench import metrics
from ntkbench.estimate import Estimate
from ntkbench.methods.base import Method
from ntkbench.metrics import Moments
from ntkbench.operators import certificate, plain_gradient, programs
from ntkbench.operators.neural_tangents import is_installed, load
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    import jax


CERTIFIED_ROWS = 64
"""Rows of J that the certificate of a trace takes at most."""


class NeuralTangents(Method):
    """Theta by one of neural-tangents' implementations, in one program from weights to moments.

    Theta ``[N, N, O, O]`` stays on the device, for alignment together with Theta_f. The trace is requested by traced
    and diagonal axes, so that an implementation may hold ``[N]`` numbers only. The program is compiled at the first
    estimate of a metric and kept. It is refused if it takes more memory than
    :func:`ntkbench.operators.programs.memory_limit` allows.

    Attributes:
        implementation: a name in ``neural_tangents.NtkImplementation``.
    """

    kind = "exact"
    backends = ("jax",)
    needs_independent_samples = True
    prepares = ""
    needs_one_network = True
    implementation: ClassVar[str]

    def unsupported_reason(
        self, problem: Problem, metric: str, target: Target, passes: int | None = None
    ) -> str | None:
        reason = super().unsupported_reason(problem, metric, target, passes)
        return reason or (None if is_installed() else "neural-tangents is not installed")

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """Theta (and Theta_f); its diagonal blocks' traces alone for the trace."""
        numbers = problem.N if metric == "trace" else len(metrics.parameter_sets(metric)) * problem.n**2
        return numbers * target.itemsize

    def prepare(self, problem: Problem, target: Target) -> CompiledPrograms:
        """Move weights and inputs to the device and import neural-tangents.

        Raises:
            BadInput: the problem has no JAX network.
            Unavailable: neural-tangents is not installed, or the device is not there.
        """
        return CompiledPrograms(self.implementation, problem, target)

    def estimate(self, prepared: CompiledPrograms, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        """The metric; the first call for a metric compiles.

        Raises:
            BadInput: no such metric, or no trained weights to align with.
            OverMemory: the compiled program would need more memory than it may use.
        """
        moments = prepared.moments(metric)
        return Estimate.of_moments(metric, moments, None, self.name, certificate=prepared.certificate)


class CompiledPrograms:
    """A problem on the device, with one compiled program for each metric that was asked for.

    A program is certified at its first use by plain autograd. Of a kernel Theta, c^T Theta c for random signs c is
    compared with ||J^T c||^2. Of the trace, the part of the first samples is compared with the squared norms of their
    rows of J, :data:`CERTIFIED_ROWS` at most. Where a sample has more outputs, the part of the first one is compared
    with a kernel of that sample alone, which is certified as kernels are.

    Attributes:
        certificate: the largest relative difference found; ``None`` before the first metric.

    Raises:
        BadInput: the problem has no JAX network.
        Unavailable: neural-tangents is not installed, or the device is not present.
    """

    def __init__(self, implementation: str, problem: Problem, target: Target) -> None:
        from ntkbench.operators.jax import network

        load()
        self._implementation, self._problem, self._target = implementation, problem, target
        self._networks = {"theta_0": network(problem, "theta_0", target)}
        if problem.theta_f is not None:
            self._networks["theta_f"] = network(problem, "theta_f", target)
        self._x = self._networks["theta_0"][2]
        self._programs: dict[str, jax.stages.Compiled] = {}
        self.certificate: float | None = None

    def moments(self, metric: str) -> Moments:
        """The moments that ``metric`` is a function of, on the host; the first call for a metric compiles.

        Raises:
            BadInput: no such metric, or no trained weights to align with.
            OverMemory: the program would take more memory than it may.
            Uncertified: plain autograd contradicts the kernel.
        """
        import jax

        first = metric not in self._programs
        if first:
            self._programs[metric] = self._compiled(metric)
        sums, forms = jax.device_get(self._programs[metric](self._parameter_sets(metric), self._x))
        if first:
            for name, form in zip(metrics.parameter_sets(metric), forms, strict=True):
                self._certify(float(form), self._trace_of_rows() if metric == "trace" else self._form(name))
        return Moments(**{name: float(value) for name, value in sums.items()})

    def _certify(self, found: float, expected: float) -> None:
        off = certificate.ratio(abs(found - expected), expected)
        certificate.check(off, float(np.finfo(self._target.dtype).eps))
        self.certificate = max(off, self.certificate or 0.0)

    def _form(self, name: str) -> float:
        """||J^T c||^2 at one parameter set."""
        parameters = list(self._problem.weights(name))
        g = plain_gradient(self._problem, name, self._target, parameters)(self._signs().reshape(-1))
        return float(g @ g)

    def _trace_of_rows(self) -> float:
        """The sum of the squared norms of the first samples' rows of J."""
        if self._problem.O > CERTIFIED_ROWS:
            return self._trace_of_block()
        few = self._problem.with_inputs(self._problem.x[: self._certified_samples])
        gradient = plain_gradient(few, "theta_0", self._target, list(few.theta_0))
        rows = map(gradient, np.eye(few.n, dtype=self._target.dtype))
        return sum(float(row @ row) for row in rows)

    def _trace_of_block(self) -> float:
        """The trace of the first sample's block, by a kernel of that sample alone, which plain autograd certifies."""
        import jax
        import jax.numpy as jnp

        kernel = programs.kernel_function(self._networks["theta_0"][0], self._implementation)
        c, weights, x = self._signs()[:1], self._parameter_sets("trace"), self._x[:1]

        def block(weights: Any, x: Any) -> tuple[jax.Array, jax.Array]:
            theta = kernel(weights[0], x)
            return jnp.einsum("abij,ai,bj->", theta, c, c), jnp.einsum("aaii->", theta)

        form, trace = jax.device_get(self._within_memory(programs.lower(block, weights, x))(weights, x))
        few = self._problem.with_inputs(self._problem.x[:1])
        g = plain_gradient(few, "theta_0", self._target, list(few.theta_0))(c.reshape(-1))
        self._certify(float(form), float(g @ g))
        return float(trace)

    @property
    def _certified_samples(self) -> int:
        return max(1, min(self._problem.N, CERTIFIED_ROWS // self._problem.O))

    def _signs(self) -> np.ndarray:
        """The fixed random signs c, ``[N, O]``."""
        like = np.empty(0, self._target.dtype)
        return np.asarray(certificate.random_signs(self._problem.n, like)).reshape(self._problem.N, -1)

    def _parameter_sets(self, metric: str) -> list[Any]:
        return [self._networks[name][1] for name in metrics.parameter_sets(metric)]

    def _compiled(self, metric: str) -> jax.stages.Compiled:
        metrics.check(metric)
        names = metrics.parameter_sets(metric)
        for name in names:
            self._problem.weights(name)  # raises where there are none
        lowered = programs.lower(
            self._trace() if metric == "trace" else self._sums(names), self._parameter_sets(metric), self._x
        )
        return self._within_memory(lowered)

    def _within_memory(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        limit = programs.memory_limit(self._x.device, self._target)
        return programs.compile_within(
            limit, lowered, f"neural-tangents' {self._implementation} for {self._problem.name}"
        )

    def _trace(self) -> Callable[..., Any]:
        outputs = self._problem.O
        mean = programs.kernel_function(self._networks["theta_0"][0], self._implementation, (1,), (0,))
        few = self._certified_samples

        def trace(weights: Any, x: Any) -> Any:
            by_sample = outputs * mean(weights[0], x)
            return {"trace": by_sample.sum()}, [by_sample[:few].sum()]

        return trace

    def _sums(self, names: Sequence[str]) -> Callable[..., Any]:
        import jax.numpy as jnp

        kernels = [programs.kernel_function(self._networks[name][0], self._implementation) for name in names]
        c = self._signs()

        def sums(weights: Any, x: Any) -> Any:
            thetas = [theta(w, x) for theta, w in zip(kernels, weights, strict=True)]
            return moments(thetas), [jnp.einsum("abij,ai,bj->", theta, c, c) for theta in thetas]

        return sums


def moments(kernels: Sequence[jax.Array]) -> dict[str, jax.Array]:
    """Moments of Theta (and Theta_f), from kernels ``[N, N, O, O]``."""
    theta, *at_f = kernels
    sums = {"trace": theta.diagonal().diagonal().sum(), "square": (theta * theta).sum()}
    for theta_f in at_f:
        sums |= {"square_f": (theta_f * theta_f).sum(), "cross": (theta * theta_f).sum()}
    return sums
