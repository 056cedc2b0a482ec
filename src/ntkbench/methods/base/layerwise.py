"""What methods by layers share: from a problem to a traced network, from kernels to moments of Theta."""

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


ONE_NETWORK = (
    "traces one network, and the weights that this problem does not differentiate by are others after training"
)


class Layerwise(Method):
    """Moments of Theta, or of A (x) I_O for a kernel A between samples, from :class:`LayerwiseKernel`.

    Attributes:
        kernel: name in ``ntkbench.layerwise.sample_kernels``.
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

    def prepare(self, problem: Problem, target: Target) -> Prepared:
        """Weights and inputs on the device, the network traced.

        Raises:
            BadInput: the network cannot be traced.
            Unavailable: the device is not there.
        """
        return Prepared(problem, target)

    def estimate(self, prepared: Prepared, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        from ntkbench.layerwise import sample_kernels

        metrics.check(metric)
        engine, sets, x = prepared.engine, prepared.parameters(metric), prepared.x
        ledger = prepared.ledger()
        moments = _moments(sample_kernels.get(self.kernel), engine, metric, sets, x)
        spent, notes = ledger()
        return Estimate(moments.metric(metric), None, spent, self.name, notes, metric)


class Prepared:
    """A traced network with its weights and inputs on the device."""

    def __init__(self, problem: Problem, target: Target) -> None:
        from ntkbench.layerwise.kernel import LayerwiseKernel

        self._problem, self._target = problem, target
        module, weights, self.x = torch_network(problem, "theta_0", target)
        self._weights = {"theta_0": list(weights.values())}
        self.engine: LayerwiseKernel = LayerwiseKernel(module, weights, self.x, target.memory)

    def ledger(self) -> Ledger:
        """Counts passes from now on, and names the parameters that had no rule."""
        engine, before = self.engine, self.engine.directions_taken
        notes = tuple(f"{name} written out: {why}" for name, why in engine.fallbacks().items())
        return lambda: ((engine.directions_taken - before) / len(self.x), notes)

    def parameters(self, metric: str) -> list[list[Tensor]]:
        """The sets of weights that a metric looks at.

        Raises:
            BadInput: the network is not one network at both ends.
        """
        if metric == "alignment" and self._problem.fixed_f:
            raise BadInput(f"{self._problem.name}: this method {ONE_NETWORK}")
        for end in metrics.parameter_sets(metric):
            if end not in self._weights:
                self._weights[end] = list(torch_network(self._problem, end, self._target)[1].values())
        return [self._weights[end] for end in metrics.parameter_sets(metric)]


def _moments(kernel: Any, engine: LayerwiseKernel, metric: str, sets: Sequence[Sequence[Tensor]], x: Tensor) -> Moments:
    if metric == "trace":
        trace = kernel.diagonal(engine, sets[0], x).sum()
        return Moments(trace=float(trace) * (engine.O if kernel.between_samples else 1))
    if kernel.between_samples:
        moments = metrics.from_gram(*(kernel.compute(engine, parameters, x) for parameters in sets))
        return moments.times(engine.O)  # tr, squared norm and inner product of A (x) I_O are O times those of A
    return metrics.from_blocks_of_theta(
        (left == right, [part.flatten(0, 1).flatten(1) for part in parts])
        for left, right, parts in engine.blocks(sets, x, None, engine.units(sets[0]))
    )
