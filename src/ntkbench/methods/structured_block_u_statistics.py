"""Block U-statistics by layers: inner products of per-sample gradients that are never written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ntkbench import metrics
from ntkbench.errors import OverMemory
from ntkbench.estimators import standard_errors
from ntkbench.estimators.accumulators import Accumulator, delta_method, moment_products, required_moments
from ntkbench.estimators.standard_errors import MomentEstimates, PairSums, PointEstimate
from ntkbench.methods.base import Incremental, Ledger
from ntkbench.operators import arrays
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from ntkbench.methods.base.layerwise import TracedProblem


class StructuredBlockUStatistics(Incremental):
    """The estimator of ``block_u_statistics`` on the engine of ``structured_derivatives``.

    It has the same mean, variance and passes: 1 per probe, 2 for alignment. The gradient of a weight is a sum of outer
    products of inputs and cotangents, so inner products of gradients follow from those of their factors. For a linear
    layer of I inputs and I' outputs they take I + I' multiplications instead of I I'. Probes are processed in groups,
    and pairs are taken within a group only. Probes that are added later form groups of their own. If the kernel of a
    group does not fit in memory, the passes of its columns are repeated, and fewer probes are drawn.

    Attributes:
        max_gradients: gradients up to which a default budget goes; beyond about a thousand, their inner products, whose
            cost is quadratic, take most of the time.
        max_group: gradients in a group.
    """

    title = "block U-statistics by layers"
    source = "this suite; structured derivatives of Novak et al. 2022"
    backends = ("torch",)
    needs_independent_samples = True
    first_batch = 4
    max_gradients: ClassVar[int] = 1024
    max_group: ClassVar[int] = 2048

    def default_max_passes(self, problem: Problem) -> int:
        return max(8, self.max_gradients // problem.N)

    def passes_per_probe(self, metric: str) -> int:
        return 2 if metric == "alignment" else 1

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        grams = (2 * problem.N) ** 2 * len(metrics.parameter_sets(metric))
        return 0 if metric == "trace" else grams * (target.itemsize + 3 * 8)

    def prepare(self, problem: Problem, target: Target) -> TracedProblem:
        """See :meth:`ntkbench.methods.base.layerwise.Layerwise.prepare`."""
        from ntkbench.methods.base.layerwise import TracedProblem

        return TracedProblem(problem, target)

    def begin(self, prepared: TracedProblem, names: Sequence[str], seed: int) -> tuple[Accumulator, Ledger]:
        return _GroupedUStatistics(prepared, names, seed, self.max_group), prepared.ledger()


class _GroupedUStatistics(Accumulator):
    """U-statistics within groups of probes."""

    def __init__(self, prepared: TracedProblem, names: Sequence[str], seed: int, max_gradients: int) -> None:
        from ntkbench.operators.torch import TorchRng

        self._engine, self._x = prepared.engine, prepared.x
        self._sets = prepared.parameters("alignment" if "alignment" in names else names[0])
        self._names = required_moments(names)
        self._max_gradients = max_gradients
        self._rng = TorchRng(seed, self._sets[0][0].dtype, self._x.device)
        self._traces: list[np.ndarray] = []
        self._groups: list[tuple[int, MomentEstimates]] = []

    def extend(self, probes: int) -> None:
        if self._names == ("trace",):
            traces = self._engine.diagonal(self._sets[0], self._x, self._directions(probes))
            self._traces.append(arrays.to_numpy(traces.T, np.float64))
            return
        for k in self._sizes(probes):
            self._groups.append((k, self._group(k)))

    def estimate(self, metric: str) -> PointEstimate:
        if self._names == ("trace",):
            return standard_errors.stratified_mean(np.concatenate(self._traces))
        return delta_method(metric, self._names, MomentEstimates.pooled(self._groups))

    def _directions(self, k: int) -> Tensor:
        N, O = len(self._x), self._engine.O  # noqa: E741 - the field's symbol
        return self._rng.sign(k, N * O).reshape(k, N, O).transpose(0, 1).contiguous()

    def _group(self, k: int) -> MomentEstimates:
        N, v = len(self._x), self._directions(k)
        grams = [self._engine.kernel(parameters, self._x, None, v).reshape(N, k, N, k) for parameters in self._sets]
        has_trace = self._names[0] == "trace"
        sums = PairSums(N, k, len(self._names) - has_trace)
        sums.add(0, 0, [arrays.to_numpy(table) for table in moment_products(grams)[: len(sums)]])
        traces = grams[0].reshape(N * k, N * k).diagonal().reshape(N, k)
        return sums.moments(arrays.to_numpy(traces) if has_trace else None)

    def _sizes(self, probes: int) -> list[int]:
        """Sizes of groups that together take at most the passes of so many probes whose group fits in memory."""
        if probes < 2:
            if not self._groups:
                raise OverMemory("pairs take at least two probes")
            return []
        max_group = max(4, self._max_gradients // len(self._x))
        count = -(-probes // max_group)
        size = probes // count
        cost = self._cost(size)
        while cost > probes:
            if size == 2:
                if self._groups:
                    return []
                memory = self._engine.memory
                raise OverMemory(f"two probes take {cost:g} passes in memory of {memory}; there are {probes}")
            size = max(4, size // 2) if size > 4 else size - 1  # the variance has an unbiased estimate from four on
            cost = self._cost(size)
        if cost > size:
            count = int(probes / cost)
            return [size] * count
        return [probes // count + (i < probes % count) for i in range(count)]

    def _cost(self, probes: int) -> float:
        parameters = self._sets[0]
        return self._engine.passes([parameters], self._x, parameters[0].new_zeros(len(self._x), probes, self._engine.O))
