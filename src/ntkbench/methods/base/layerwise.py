"""Base of the layerwise methods: from a problem to a traced network, from kernels to moments of Theta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ntkbench import metrics
from ntkbench.errors import BadInput
from ntkbench.estimate import Estimate
from ntkbench.methods.base import Ledger, Method
from ntkbench.metrics import Moments
from ntkbench.operators import torch_network
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from ntkbench.layerwise.kernel import LayerwiseKernel


ONE_NETWORK = "traces one network, but parameters of this problem that are not differentiated change in training"


class Layerwise(Method):
    """Moments of Theta, or of A (x) I_O for a kernel A between samples, by :class:`LayerwiseKernel`.

    Attributes:
        kernel: a name in ``ntkbench.layerwise.sample_kernels``.
    """

    backends = ("torch",)
    needs_independent_samples = True
    kernel: ClassVar[str] = "full"

    def unsupported_reason(
        self, problem: Problem, metric: str, target: Target, passes: int | None = None
    ) -> str | None:
        reason = super().unsupported_reason(problem, metric, target, passes)
        return reason or (ONE_NETWORK if metric == "alignment" and problem.fixed_f else None)

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        from ntkbench.layerwise import sample_kernels

        directions = problem.O if sample_kernels.get(self.kernel).directions is None else 1
        return directions * len(metrics.parameter_sets(metric))

    def prepare(self, problem: Problem, target: Target) -> TracedProblem:
        """Move weights and inputs to the device and trace the network.

        Raises:
            BadInput: the network cannot be traced.
            Unavailable: the device is not present.
        """
        return TracedProblem(problem, target)

    def estimate(self, prepared: TracedProblem, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        from ntkbench.layerwise import sample_kernels

        metrics.check(metric)
        engine, sets, x = prepared.engine, prepared.parameters(metric), prepared.x
        ledger = prepared.ledger()
        moments = _moments(sample_kernels.get(self.kernel), engine, metric, sets, x)
        spent, notes, certificate = ledger()
        return Estimate(moments.metric(metric), None, spent, self.name, notes, metric, certificate=certificate)


class TracedProblem:
    """A problem on the device, its network traced.

    Attributes:
        engine: computes kernels of the network.
        x: inputs on the device.

    Raises:
        BadInput: the network cannot be traced.
        Unavailable: the device is not present.
    """

    def __init__(self, problem: Problem, target: Target) -> None:
        from ntkbench.layerwise.kernel import LayerwiseKernel

        self._problem, self._target = problem, target
        module, weights, self.x = torch_network(problem, "theta_0", target)
        self._weights = {"theta_0": list(weights.values())}
        self.engine: LayerwiseKernel = LayerwiseKernel(module, weights, self.x, target.memory)

    def ledger(self) -> Ledger:
        """A counter of the passes spent from now on; its notes name the parameters that have no rule."""
        engine, before = self.engine, self.engine.directions_taken
        notes = tuple(f"{name} written out: {why}" for name, why in engine.fallbacks().items())
        return lambda: ((engine.directions_taken - before) / len(self.x), notes, engine.certificate)

    def certify_again(self) -> None:
        """Compare the next kernel with plain autograd, whatever was compared before."""
        self.engine.forget_certificates()

    def parameters(self, metric: str) -> list[list[Tensor]]:
        """The parameter sets that a metric needs: theta_0, and theta_f for alignment.

        Raises:
            BadInput: parameters that are not differentiated differ between the two sets.
        """
        if metric == "alignment" and self._problem.fixed_f:
            raise BadInput(f"{self._problem.name}: this method {ONE_NETWORK}")
        names = metrics.parameter_sets(metric)
        for name in names:
            if name not in self._weights:
                self._weights[name] = list(torch_network(self._problem, name, self._target)[1].values())
        return [self._weights[name] for name in names]


def _moments(kernel: Any, engine: LayerwiseKernel, metric: str, sets: Sequence[Sequence[Tensor]], x: Tensor) -> Moments:
    if metric == "trace":
        trace = kernel.diagonal(engine, sets[0], x).sum()
        return Moments(trace=float(trace) * (engine.O if kernel.between_samples else 1))
    if kernel.between_samples:
        moments = metrics.from_gram(*(kernel.compute(engine, parameters, x) for parameters in sets))
        return moments.times(engine.O)  # tr, squared norm and inner product of A (x) I_O are O times those of A
    return metrics.from_blocks_of_theta(
        (left == right, [part.flatten(0, 1).flatten(1) for part in parts])
        for left, right, parts in engine.blocks(sets, x)
    )
