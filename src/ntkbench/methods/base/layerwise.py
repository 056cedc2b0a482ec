"""Base of the layerwise methods: from a problem to traced networks, from kernels to moments of Theta."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from ntkbench import metrics, operations
from ntkbench.errors import BadInput
from ntkbench.estimate import Estimate, rounding_bound
from ntkbench.methods.base import Ledger, Method, kernel_metrics
from ntkbench.metrics import Moments
from ntkbench.operators import arrays, torch_network
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.problems.base.outputs import change_by_training

if TYPE_CHECKING:
    from torch import Tensor

    from ntkbench.layerwise.blocks import Block
    from ntkbench.layerwise.kernel import LayerwiseKernel

T = TypeVar("T")


class Layerwise(Method):
    """Moments of Theta, or of A ⊗ I_O for a kernel A between samples, by :class:`LayerwiseKernel`.

    Attributes:
        kernel: a name in ``ntkbench.layerwise.sample_kernels``.
    """

    backends = ("torch",)
    needs_independent_samples = True
    prepares = "trace"
    by_layers = True
    kernel: ClassVar[str] = "full"
    passes_formula = "O"
    kernel_metrics = metrics.OF_KERNEL

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        from ntkbench.layerwise import sample_kernels

        directions = problem.O if sample_kernels.get(self.kernel).directions is None else 1
        return directions * len(metrics.parameter_sets(metric))

    def products(self, problem: Problem, metric: str, passes: float) -> float:
        outputs = problem.O * operations.ends(metric)  # passes that are repeated form no products
        return operations.by_layers(problem, metric, min(passes, outputs))

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """Both kernels and their product if they are of two networks; otherwise kernels are computed in blocks.

        Metrics of the whole kernel take the kernel and its decomposition in float64.
        """
        rows = problem.n if self.kernel == "full" else problem.N
        if metric in metrics.OF_KERNEL:
            return kernel_metrics.bytes_needed(rows, target)
        return 3 * rows**2 * target.itemsize if metric == "alignment" and _two_networks(problem) else 0

    def planned_passes(self, prepared: TracedProblem, metric: str) -> float:
        ends = prepared.ends(metric)
        if metric == "trace" or self.kernel != "full":
            return 0.0
        if any(end.engine is not ends[0].engine for end in ends):  # two networks, each with its own kernel
            return sum(end.engine.passes([end.parameters], end.x) for end in ends)
        sets = [end.parameters for end in ends]
        return sum(end.engine.passes(sets, end.x, kept=False) for end in ends)

    def prepare(self, problem: Problem, target: Target) -> TracedProblem:
        """Move weights and inputs to the device and trace the network.

        Raises:
            BadInput: the network cannot be traced.
            Unavailable: the device is not present.
        """
        return TracedProblem(problem, target)

    def estimate(self, prepared: TracedProblem, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        from ntkbench.layerwise import sample_kernels

        metrics.check_any(metric)
        if metric in metrics.OF_KERNEL:
            return self._of_whole(prepared, metric, seed)
        ends = prepared.ends(metric)
        ledger = ledger_of(ends)
        moments = _moments(sample_kernels.get(self.kernel), ends, metric, seed)
        spent, notes, certificate = ledger()
        rounding = rounding_of(ends, metric, certificate) if self.kind == "exact" else None
        found = notes, certificate, rounding
        return Estimate.of_moments(metric, moments, spent, self.name, *found, kernel=self.computes)

    def _of_whole(self, prepared: TracedProblem, metric: str, seed: int) -> Estimate:
        """A metric of the whole kernel, which is decomposed in float64 on the host.

        Raises:
            Unavailable: the condition number is requested, and Theta is singular or may be; or the regression error is
                not defined.
        """
        from ntkbench.layerwise import sample_kernels

        (end,) = prepared.ends(metric)
        ledger, kernel = ledger_of([end]), sample_kernels.get(self.kernel)
        made = arrays.to_numpy(kernel.compute(end.engine, end.parameters, end.x, seed=seed), np.float64)
        spent, notes, certificate = ledger()
        P = sum(w.numel() for w in end.parameters)
        copies = end.engine.O if kernel.between_samples else 1
        epsilon = arrays.epsilon(end.parameters[0])
        change = prepared.change if metric == metrics.REGRESSION else None
        value, rounding = kernel_metrics.of_kernel(metric, made, P, epsilon, certificate, copies=copies, change=change)
        known = rounding if self.kind == "exact" else None
        return Estimate(
            value,
            None,
            spent,
            self.name,
            notes,
            metric,
            certificate=certificate,
            rounding=known,
            kernel=self.computes,
        )


@dataclass(frozen=True)
class TracedNetwork:
    """A traced network at one set of weights.

    Attributes:
        engine: computes its kernels; two sets of weights of one network share it.
        parameters: the trainable ones, in the order in which the network was traced with them.
        x: inputs on the device.
    """

    engine: LayerwiseKernel
    parameters: list[Tensor]
    x: Tensor


class TracedProblem:
    """A problem on the device, its network traced.

    Attributes:
        problem, target: the problem, and how it is computed.
        engine: computes kernels of the network at theta_0.
        x: inputs on the device.

    Raises:
        BadInput: the network cannot be traced.
        Unavailable: the device is not present.
    """

    def __init__(self, problem: Problem, target: Target) -> None:
        self.problem, self.target = problem, target
        self._ends: dict[str, TracedNetwork] = {}
        (first,) = self.ends("trace")
        self.engine, self.x = first.engine, first.x

    def ends(self, metric: str) -> list[TracedNetwork]:
        """The network at theta_0, and for alignment at theta_f; a second network if more than theta differs.

        Raises:
            BadInput: there are no such weights, or the other network cannot be traced.
        """
        names = metrics.parameter_sets(metric)
        for name in names:
            if name not in self._ends:
                self._ends[name] = self._traced(name)
        return [self._ends[name] for name in names]

    def _traced(self, name: str) -> TracedNetwork:
        from ntkbench.layerwise import reuse

        module, weights, x = torch_network(self.problem, name, self.target)
        if self._ends and not _two_networks(self.problem):
            return TracedNetwork(self.engine, list(weights.values()), self.x)
        return TracedNetwork(reuse.traced(module, weights, x, self.target.memory), list(weights.values()), x)

    @functools.cached_property
    def change(self) -> np.ndarray:
        """Change of the outputs by training ``[N, O]``, in float64 on the host."""
        return change_by_training(self.problem, self.target.device)

    def certify_again(self) -> None:
        """Compare the next kernels with plain autograd, even after an earlier comparison."""
        for end in self._ends.values():
            end.engine.forget_certificates()


def _two_networks(problem: Problem) -> bool:
    """Whether the ends of an alignment differ in more than the values of theta."""
    return problem.other is not None or bool(problem.fixed_f)


Blocks = Iterator[tuple["Block", "Block", "list[Tensor]"]]
"""The rows and the columns of each block of some kernels, and its entries in each of them."""


def over_blocks(networks: Sequence[TracedNetwork], take: Callable[[Blocks], T]) -> T:
    """``take`` of the kernels of networks of equal size, in the same blocks; see :meth:`LayerwiseKernel.blocks`.

    ``take`` is called again if the trace of another network fails; see :meth:`LayerwiseKernel.certain`.

    Raises:
        BadInput: the blocks that fit in memory differ between the networks.
    """

    def once() -> T:
        return take(_blocks_of(networks))

    call: Callable[[], T] = once
    for network in networks:
        call = functools.partial(network.engine.certain, call)
    return call()


def _blocks_of(networks: Sequence[TracedNetwork]) -> Blocks:
    each = (network.engine.blocks([network.parameters], network.x) for network in networks)
    for found in zip(*each, strict=True):
        left, right, _ = found[0]
        if any((left, right) != (one, other) for one, other, _ in found):
            raise BadInput("the blocks of the two networks' kernels differ")
        yield left, right, [part for *_, (part,) in found]


def ledger_of(ends: Sequence[TracedNetwork]) -> Ledger:
    """A counter of the passes spent from now on; notes name parameters without a rule, and what is not certified."""
    before = {end.engine: end.engine.directions_taken for end in ends}
    N = len(ends[0].x)

    def ledger() -> tuple[float, tuple[str, ...], float | None]:
        spent = sum(engine.directions_taken - taken for engine, taken in before.items()) / N
        notes = [f"{name} written out: {why}" for engine in before for name, why in engine.fallbacks().items()]
        notes += [engine.note for engine in before if engine.note]
        found = [engine.certificate for engine in before if engine.certificate is not None]
        return spent, tuple(dict.fromkeys(notes)), max(found, default=None)

    return ledger


def rounding_of(ends: Sequence[TracedNetwork], metric: str, certificate: float | None) -> float:
    """A bound on the rounding error of a metric; see :func:`ntkbench.estimate.rounding_bound`."""
    sizes = [sum(w.numel() for w in end.parameters) for end in ends]
    terms = max(len(ends[0].x) * ends[0].engine.O, *sizes)
    return rounding_bound(metric, arrays.epsilon(ends[0].parameters[0]), terms, certificate)


def _moments(kernel: Any, ends: Sequence[TracedNetwork], metric: str, seed: int) -> Moments:
    engine, x = ends[0].engine, ends[0].x
    if metric == "trace":
        trace = kernel.diagonal(engine, ends[0].parameters, x, seed).sum()
        return Moments(trace=float(trace) * (engine.O if kernel.between_samples else 1))
    if any(end.engine is not engine for end in ends):
        moments = metrics.from_gram(*(kernel.compute(end.engine, end.parameters, end.x, seed=seed) for end in ends))
    else:
        sets = [end.parameters for end in ends]
        moments = engine.certain(lambda: metrics.from_blocks_of_theta(kernel.blocks(engine, sets, x, seed)))
    # tr, squared norm and inner product of A ⊗ I_O are O times those of A
    return moments.times(engine.O) if kernel.between_samples else moments
