"""What the three methods by neural-tangents share: from a problem to one compiled program a metric."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ntkbench import metrics
from ntkbench.errors import OverMemory
from ntkbench.estimate import Estimate
from ntkbench.methods.base import Method
from ntkbench.metrics import Moments
from ntkbench.operators.neural_tangents import load
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    import jax


class NeuralTangents(Method):
    """Theta by one of neural-tangents' implementations, in one program from weights to moments.

    Theta ``[N, N, O, O]`` stays on the device; two of them for alignment. The trace is asked for in the way that
    neural-tangents has for it, by traced and diagonal axes, so that an implementation may get away with ``[N]``. The
    program is compiled at the first estimate of a metric and kept; it is refused if it needs more memory than
    :func:`memory_limit` allows.

    Attributes:
        implementation: name in ``neural_tangents.NtkImplementation``.
    """

    kind = "exact"
    backends = ("jax",)
    needs_independent_samples = True
    implementation: ClassVar[str]

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """Theta (and Theta_f); its diagonal blocks' traces alone for the trace."""
        numbers = problem.N if metric == "trace" else len(metrics.parameter_sets(metric)) * problem.n**2
        return numbers * target.itemsize

    def prepare(self, problem: Problem, target: Target) -> Prepared:
        """Weights and inputs on the device, neural-tangents imported.

        Raises:
            BadInput: the problem has no JAX network.
            Unavailable: neural-tangents is not installed, or the device is not there.
        """
        return Prepared(self.implementation, problem, target)

    def estimate(self, prepared: Prepared, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        """The metric; the first call for a metric compiles.

        Raises:
            BadInput: no such metric, or no trained weights to align with.
            OverMemory: the compiled program would need more memory than it may use.
        """
        return Estimate(prepared.moments(metric).metric(metric), None, None, self.name, (), metric)


class Prepared:
    """A problem on the device with a compiled program for each metric that was asked for."""

    def __init__(self, implementation: str, problem: Problem, target: Target) -> None:
        from ntkbench.operators.jax import network

        self._neural_tangents = load()
        self._implementation = self._neural_tangents.NtkImplementation[implementation]
        self._problem = problem
        self._target = target
        self._networks = {"theta_0": network(problem, "theta_0", target)}
        if problem.theta_f is not None:
            self._networks["theta_f"] = network(problem, "theta_f", target)
        self._x = self._networks["theta_0"][2]
        self._programs: dict[str, jax.stages.Compiled] = {}

    def moments(self, metric: str) -> Moments:
        """The moments that ``metric`` is made of, on the host."""
        import jax

        if metric not in self._programs:
            self._programs[metric] = self._compile(metric)
        sums = jax.device_get(self._programs[metric](self._at(metric), self._x))
        return Moments(**{name: float(value) for name, value in sums.items()})

    def _at(self, metric: str) -> list[Any]:
        return [self._networks[end][1] for end in metrics.parameter_sets(metric)]

    def _compile(self, metric: str) -> jax.stages.Compiled:
        import jax

        metrics.check(metric)
        for end in metrics.parameter_sets(metric):
            self._problem.weights(end)  # refuses what is not there
        function = self._trace() if metric == "trace" else self._sums(metrics.parameter_sets(metric))
        # A GPU would do float32 products in TF32 otherwise. Deprecations in an archived package are nobody's to act on.
        with jax.default_matmul_precision("highest"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            program = jax.jit(function).lower(self._at(metric), self._x).compile()
        self._check_memory(program)
        return program

    def _trace(self) -> Callable[..., dict[str, jax.Array]]:
        # Traced axes come as a mean over outputs.
        traces = self._kernel("theta_0", trace_axes=(1,), diagonal_axes=(0,))
        outputs = self._problem.O
        return lambda weights, x: {"trace": outputs * traces(x, None, weights[0]).sum()}

    def _sums(self, ends: Sequence[str]) -> Callable[..., dict[str, jax.Array]]:
        kernels = [self._kernel(end, trace_axes=(), diagonal_axes=()) for end in ends]
        return lambda weights, x: _moments([theta(x, None, w) for theta, w in zip(kernels, weights, strict=True)])

    def _kernel(self, end: str, **axes: tuple[int, ...]) -> Callable[..., jax.Array]:
        """``(x, None, weights) -> kernel`` of the network with its output axes as one; ``None`` is x against itself."""
        forward = self._networks[end][0]
        return self._neural_tangents.empirical_ntk_fn(
            lambda weights, x: forward(weights, x).reshape(x.shape[0], -1),
            vmap_axes=0,
            implementation=self._implementation,
            **axes,
        )

    def _check_memory(self, program: jax.stages.Compiled) -> None:
        sizes = program.memory_analysis()
        needed = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes
        allowed = memory_limit(self._x.device, self._target)
        if needed > allowed:
            raise OverMemory(
                f"neural-tangents' {self._implementation.name} would need {needed / 2**30:.3g} GiB "
                f"for {self._problem.name}; allowed: {allowed / 2**30:.3g} GiB"
            )


def memory_limit(device: jax.Device, target: Target) -> int:
    """Bytes that one program may take: the target's ``program_memory``, else 80 % of what is free on the device."""
    if target.program_memory is not None:
        return target.program_memory
    statistics = device.memory_stats()
    if statistics is None:  # the CPU
        import psutil

        return int(0.8 * psutil.virtual_memory().available)
    return int(0.8 * (statistics["bytes_limit"] - statistics["bytes_in_use"]))


def _moments(kernels: Sequence[jax.Array]) -> dict[str, jax.Array]:
    """Moments of Theta (and Theta_f), each ``[N, N, O, O]``."""
    theta, *at_f = kernels
    sums = {"trace": theta.diagonal().diagonal().sum(), "square": (theta * theta).sum()}
    for theta_f in at_f:
        sums |= {"square_f": (theta_f * theta_f).sum(), "cross": (theta * theta_f).sum()}
    return sums
