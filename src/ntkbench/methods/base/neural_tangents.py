"""Base of the methods by neural-tangents: one compiled program per metric."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ntkbench import metrics, operations
from ntkbench.estimate import Estimate, rounding_bound
from ntkbench.methods.base import Method, kernel_metrics
from ntkbench.metrics import Moments
from ntkbench.operators import arrays, certificate, plain_gradient, programs
from ntkbench.operators.neural_tangents import is_installed, load
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.problems.base.outputs import change_by_training

if TYPE_CHECKING:
    import jax


KERNEL = "kernel"
"""What a program computes for metrics of the whole kernel."""
FEW_ROWS, CERTIFIED_ROWS = 16, 64
"""Maximum number of rows of J in the certificate of a trace: of several samples together, and of one sample."""


class NeuralTangents(Method):
    """Theta by one of neural-tangents' implementations, in one program from weights to moments.

    Theta ``[N, N, O, O]`` stays on the device, for alignment together with Theta_f; for metrics of the whole kernel it
    goes to the host and is decomposed in float64. The trace is requested through neural-tangents' trace and diagonal
    axes, so an implementation may hold only ``[N]`` numbers. The program is compiled at the first estimate of a metric
    and kept. It is refused if it takes more memory than :func:`ntkbench.operators.programs.memory_limit` allows.

    Attributes:
        implementation: a name in ``neural_tangents.NtkImplementation``.
    """

    kind = "exact"
    backends = ("jax",)
    needs_independent_samples = True
    prepares = ""
    needs_one_network = True
    kernel_metrics = metrics.OF_KERNEL
    implementation: ClassVar[str]

    def unsupported_reason(
        self, problem: Problem, metric: str, target: Target, passes: int | None = None
    ) -> str | None:
        reason = super().unsupported_reason(problem, metric, target, passes)
        return reason or (None if is_installed() else "neural-tangents is not installed")

    def products(self, problem: Problem, metric: str, passes: float) -> float:
        """Upper bound: the inner products of rows of J."""
        return operations.of_gram(metric, problem.n, problem.P)

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """Theta (and Theta_f), and its decomposition for metrics of the whole kernel; for the trace N numbers.

        The program may take more, which is known only once it is compiled; see
        :func:`ntkbench.operators.programs.memory_limit`.
        """
        if metric in metrics.OF_KERNEL:
            return kernel_metrics.bytes_needed(problem.n, target)
        numbers = problem.N if metric == "trace" else len(metrics.parameter_sets(metric)) * problem.n**2
        return numbers * target.itemsize

    def prepare(self, problem: Problem, target: Target) -> CompiledPrograms:
        """Move weights and inputs to the device and import neural-tangents.

        Raises:
            BadInput: the problem has no JAX network.
            Unavailable: neural-tangents is not installed, or the device is not available.
        """
        return CompiledPrograms(self.implementation, problem, target)

    def estimate(self, prepared: CompiledPrograms, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        """The metric; the first call for a metric compiles.

        Raises:
            BadInput: no such metric, or no trained weights to align with.
            OverMemory: the compiled program would need more memory than allowed.
            Unavailable: the condition number is requested, and Theta is singular or may be.
        """
        metrics.check_any(metric)
        if metric in metrics.OF_KERNEL:
            theta = prepared.kernel()
            found, change = prepared.certificate, prepared.change if metric == metrics.REGRESSION else None
            value, rounding = kernel_metrics.of_kernel(
                metric, theta.astype(np.float64), prepared.P, float(np.finfo(theta.dtype).eps), found, change=change
            )
            return Estimate(value, None, None, self.name, metric=metric, certificate=found, rounding=rounding)
        moments, found = prepared.moments(metric), prepared.certificate
        bound = rounding_bound(metric, prepared.epsilon, max(prepared.n, prepared.P), found)
        return Estimate.of_moments(metric, moments, None, self.name, certificate=found, rounding=bound)


class CompiledPrograms:
    """A problem on the device, with one compiled program for each requested metric.

    A program is certified at its first use by plain autograd. For a kernel Theta, c^T Theta c with random weights c is
    compared with ||J^T c||^2. For the trace, the part of some random samples is compared with the squared norms of
    their rows of J, at most :data:`CERTIFIED_ROWS`. If a sample has more outputs, the part of one is compared with a
    kernel of that sample alone, which is certified like any kernel. J^T c is compared with the sum of the gradients
    of all samples, each alone, since a trace of single samples does not show whether they interact. Programs are shared
    by problems of the same function and shapes; certificates are not.

    Attributes:
        n, P: numbers of outputs and of parameters.
        epsilon: machine epsilon of the target's precision.
        certificate: the largest relative difference found; ``None`` before the first metric.

    Raises:
        BadInput: the problem has no JAX network.
        Unavailable: neural-tangents is not installed, or the device is not present.
    """

    def __init__(self, implementation: str, problem: Problem, target: Target) -> None:
        load()
        from ntkbench.operators.jax import network

        self._implementation, self._problem, self._target = implementation, problem, target
        self.n, self.P, self.epsilon = problem.n, problem.P, float(np.finfo(target.dtype).eps)
        self._networks = {"theta_0": network(problem, "theta_0", target)}
        if problem.theta_f is not None:
            self._networks["theta_f"] = network(problem, "theta_f", target)
        self._x = self._networks["theta_0"][2]
        self._programs: dict[str, jax.stages.Compiled] = {}
        self.certificate: float | None = None

    def moments(self, metric: str) -> Moments:
        """The moments that ``metric`` depends on, on the host; the first call for a metric compiles.

        Raises:
            BadInput: no such metric, or no trained weights to align with.
            OverMemory: the program would take more memory than allowed.
            Uncertified: plain autograd contradicts the kernel.
        """
        metrics.check(metric)
        return Moments(**{name: float(value) for name, value in self._made(metric).items()})

    def kernel(self) -> np.ndarray:
        """Theta ``[N O, N O]`` at theta_0, on the host; the first call compiles.

        Raises:
            OverMemory: the program would take more memory than allowed.
            Uncertified: plain autograd contradicts the kernel.
        """
        theta: np.ndarray = self._made(KERNEL)
        return theta.transpose(0, 2, 1, 3).reshape(self._problem.n, self._problem.n)

    @functools.cached_property
    def change(self) -> np.ndarray:
        """Change of the outputs by training ``[N, O]``, in float64 on the host."""
        return change_by_training(self._problem)

    def _made(self, what: str) -> Any:
        """The moments of a metric, or the kernel, on the host; certified at the first call."""
        import jax

        first = what not in self._programs
        program = self._compiled(what, self._x) if first else self._programs[what]
        made, forms = jax.device_get(program(self._parameter_sets(what), self._x))
        if first:
            for name, form in zip(metrics.parameter_sets(what), forms, strict=True):
                self._certify(float(form), self._trace_of_rows() if what == "trace" else self._form(name))
            if what == "trace":
                self._certify_samples()
        self._programs[what] = program  # one that is contradicted is compared again
        return made

    def _certify(self, found: float, expected: float) -> None:
        self._check(certificate.ratio(abs(found - expected), expected))

    def _check(self, off: float) -> None:
        certificate.check(off, self.epsilon)
        self.certificate = max(off, self.certificate or 0.0)

    def _form(self, name: str) -> float:
        """||J^T c||^2 at one set of weights."""
        g = self._gradient(name)
        return float(g @ g)

    def _gradient(self, name: str) -> Any:
        """J^T c at one set of weights, by plain autograd over the whole batch; 1 pass."""
        c = _weights(self._problem.N, self._problem.O, self._target.dtype)
        return plain_gradient(self._problem, name, self._target, list(self._problem.weights(name)))(c.reshape(-1))

    def _certify_samples(self) -> None:
        """Compare J^T c with the sum of the gradients of all samples, each alone; 2 passes."""
        import jax

        forward, weights, x = self._networks["theta_0"]
        c = _weights(self._problem.N, self._problem.O, self._target.dtype)

        def alone(weights: Any, sample: Any, signs: Any) -> Any:
            return (forward(weights, sample[None]).reshape(-1) * signs).sum()

        found = jax.grad(lambda weights: jax.vmap(alone, (None, 0, 0))(weights, x, c).sum())(weights)
        flat = np.concatenate([np.asarray(found[name]).reshape(-1) for name in self._problem.theta_0])
        self._check(certificate.distance(flat, arrays.to_numpy(self._gradient("theta_0"))))

    def _trace_of_rows(self) -> float:
        """The sum of the squared norms of the certified samples' rows of J."""
        if self._problem.O > CERTIFIED_ROWS:
            return self._trace_of_block()
        from ntkbench.operators.jax import plain_pullback

        few = self._problem.with_inputs(self._problem.x[list(self._certified_samples)])
        pull = plain_pullback(few, "theta_0", self._target, list(few.theta_0))
        rows = map(pull, np.eye(few.n, dtype=self._target.dtype))
        return sum(float(row @ row) for row in rows)

    def _trace_of_block(self) -> float:
        """The trace of one sample's block, by a kernel of that sample alone, which plain autograd certifies."""
        import jax

        one = list(self._certified_samples)
        few = self._problem.with_inputs(self._problem.x[one])
        weights, x = self._parameter_sets("norm"), self._x[np.array(one)]
        sums, (form,) = jax.device_get(self._compiled("norm", x)(weights, x))
        c = _weights(1, self._problem.O, self._target.dtype)
        g = plain_gradient(few, "theta_0", self._target, list(few.theta_0))(c.reshape(-1))
        self._certify(float(form), float(g @ g))
        return float(sums["trace"])

    @property
    def _certified_samples(self) -> tuple[int, ...]:
        """Random samples, the same in every run."""
        N = self._problem.N
        found = np.random.default_rng(20260104).permutation(N)[: max(1, FEW_ROWS // self._problem.O)]
        return tuple(map(int, found))

    def _parameter_sets(self, what: str) -> list[Any]:
        return [self._networks[name][1] for name in metrics.parameter_sets(what)]

    def _compiled(self, what: str, x: jax.Array) -> jax.stages.Compiled:
        import jax

        names = metrics.parameter_sets(what)
        for name in names:
            self._problem.weights(name)  # raises if there are none
        leaves, structure = jax.tree.flatten((self._parameter_sets(what), x))
        shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for leaf in leaves)
        return _compiled(
            tuple(self._networks[name][0] for name in names),
            self._implementation,
            what if what in ("trace", KERNEL) else "moments",
            (self._problem.O, self._certified_samples),
            (shapes, structure),
            self._target,
            self._problem.name,
        )


@functools.lru_cache(maxsize=16)
def _compiled(
    forwards: tuple[Callable[[Any, Any], Any], ...],
    implementation: str,
    what: str,
    sizes: tuple[int, tuple[int, ...]],
    arguments: tuple[tuple[jax.ShapeDtypeStruct, ...], Any],
    target: Target,
    name: str,
) -> jax.stages.Compiled:
    """The program (sets of weights, x) -> (moments or kernel, values to certify) for some shapes.

    Args:
        forwards: the network at each set of weights.
        implementation: implementation of neural-tangents.
        what: ``trace``, which is computed without the kernel, ``moments``, or :data:`KERNEL`.
        sizes: outputs of a sample, and the samples whose part of the trace is certified.
        arguments: shapes of the arguments' arrays, and their structure.
        target: where it runs.
        name: name of the problem.
    """
    import jax

    from ntkbench.operators.jax import device

    shapes, structure = arguments
    weights, x = jax.tree.unflatten(structure, shapes)
    made = (
        _trace(forwards[0], implementation, *sizes)
        if what == "trace"
        else _of_kernels(forwards, implementation, sizes[0], moments if what == "moments" else lambda thetas: thetas[0])
    )
    limit = programs.memory_limit(device(target), target)
    return programs.compile_within(
        limit, programs.lower(made, weights, x), f"neural-tangents' {implementation} for {name}"
    )


def _trace(
    forward: Callable[[Any, Any], Any], implementation: str, outputs: int, certified: tuple[int, ...]
) -> Callable[..., Any]:
    mean = programs.kernel_function(forward, implementation, (1,), (0,))

    def trace(weights: Any, x: Any) -> Any:
        by_sample = outputs * mean(weights[0], x)
        return {"trace": by_sample.sum()}, [by_sample[np.array(certified)].sum()]

    return trace


def _of_kernels(
    forwards: Sequence[Callable[[Any, Any], Any]],
    implementation: str,
    outputs: int,
    made_of: Callable[[Sequence[jax.Array]], Any],
) -> Callable[..., Any]:
    import jax.numpy as jnp

    kernels = [programs.kernel_function(forward, implementation) for forward in forwards]

    def made(weights: Any, x: Any) -> Any:
        thetas = [theta(w, x) for theta, w in zip(kernels, weights, strict=True)]
        c = _weights(len(x), outputs, thetas[0].dtype)
        return made_of(thetas), [jnp.einsum("abij,ai,bj->", theta, c, c) for theta in thetas]

    return made


def _weights(samples: int, outputs: int, dtype: Any) -> np.ndarray:
    """The fixed random weights c, ``[samples, outputs]``."""
    return np.asarray(certificate.random_weights(samples * outputs, np.empty(0, dtype))).reshape(samples, outputs)


def moments(kernels: Sequence[jax.Array]) -> dict[str, jax.Array]:
    """Moments of Theta (and Theta_f), from kernels ``[N, N, O, O]``."""
    theta, *at_f = kernels
    sums = {"trace": theta.diagonal().diagonal().sum(), "square": (theta * theta).sum()}
    for theta_f in at_f:
        sums |= {"square_f": (theta_f * theta_f).sum(), "cross": (theta * theta_f).sum()}
    return sums
