"""Block U-statistics by layers: inner products of per-sample gradients that are never written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ntkbench import metrics
from ntkbench.errors import OverMemory
from ntkbench.estimators import standard_errors
from ntkbench.estimators.accumulators import Accumulator, complement, delta_method, moment_products, required_moments
from ntkbench.estimators.standard_errors import MomentEstimates, PairSums, PointEstimate
from ntkbench.methods.base import Incremental, Ledger
from ntkbench.operators import arrays
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from ntkbench.methods.base.layerwise import TracedNetwork, TracedProblem


class StructuredBlockUStatistics(Incremental):
    """The estimator of ``block_u_statistics`` on the engine of ``structured_derivatives``.

    It has the same mean, variance and passes: 1 per probe, 2 for alignment. The gradient of a weight is a sum of outer
    products of inputs and cotangents, so inner products of gradients follow from those of their factors. For a linear
    layer of I inputs and I' outputs they take I + I' multiplications instead of I I'. Probes are processed in groups,
    and pairs are taken within a group only. Probes that are added later form groups of their own. If the kernel of a
    group does not fit in memory, the passes of its columns are repeated, and fewer probes are drawn, or groups are
    smaller. The budget is kept in any case.

    Attributes:
        max_gradients: gradients up to which a default budget goes; beyond about a thousand, their inner products, whose
            cost is quadratic, take most of the time.
        max_group: gradients in a group.
    """

    title = "block U-statistics by layers"
    source = "this suite; structured derivatives of Novak et al. 2022"
    backends = ("torch",)
    needs_independent_samples = True
    prepares = "trace"
    first_batch = 4
    order = 1.0
    max_gradients: ClassVar[int] = 1024
    max_group: ClassVar[int] = 2048

    def default_max_passes(self, problem: Problem) -> int:
        return max(16, self.max_gradients // problem.N)

    def passes_per_probe(self, metric: str) -> int:
        return 2 if metric == "alignment" else 1

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        grams = (2 * problem.N) ** 2 * len(metrics.parameter_sets(metric))
        return 0 if metric == "trace" else grams * (target.itemsize + 5 * 8)

    def prepare(self, problem: Problem, target: Target) -> TracedProblem:
        """See :meth:`ntkbench.methods.base.layerwise.Layerwise.prepare`."""
        from ntkbench.methods.base.layerwise import TracedProblem

        return TracedProblem(problem, target)

    def begin(self, prepared: TracedProblem, names: Sequence[str], seed: int) -> tuple[Accumulator, Ledger]:
        from ntkbench.methods.base.layerwise import ledger_of

        ends = prepared.ends("alignment" if "alignment" in names else names[0])
        return _GroupedUStatistics(ends, names, seed, self.max_group), ledger_of(ends)


class _GroupedUStatistics(Accumulator):
    """U-statistics within groups of probes."""

    def __init__(self, ends: Sequence[TracedNetwork], names: Sequence[str], seed: int, max_gradients: int) -> None:
        from ntkbench.operators.torch import TorchRng

        self._ends, self._N, self._O = ends, len(ends[0].x), ends[0].engine.O
        self._names = required_moments(names)
        self._max_gradients = max_gradients
        self._rng = TorchRng(seed, ends[0].parameters[0].dtype, ends[0].x.device)
        self._traces: list[np.ndarray] = []
        self._groups: list[tuple[int, MomentEstimates]] = []

    def extend(self, probes: int) -> None:
        if self._names == ("trace",):
            end = self._ends[0]
            traces = end.engine.diagonal(end.parameters, end.x, self._directions(probes))
            self._traces.append(arrays.to_numpy(traces.T, np.float64))
            return
        for k in self._sizes(probes):
            self._groups.append((k, self._group(k)))

    def estimate(self, metric: str) -> PointEstimate:
        if self._names == ("trace",):
            return standard_errors.stratified_mean(np.concatenate(self._traces))
        return delta_method(metric, self._names, MomentEstimates.pooled(self._groups))

    def complement(self) -> float | None:
        if self._names == ("trace",):
            return None
        return complement(dict(zip(self._names, MomentEstimates.pooled(self._groups).means.tolist(), strict=True)))

    def _directions(self, k: int) -> Tensor:
        return self._rng.sign(k, self._N * self._O).reshape(k, self._N, self._O).transpose(0, 1).contiguous()

    def _group(self, k: int) -> MomentEstimates:
        N, v = self._N, self._directions(k)
        grams = [end.engine.kernel(end.parameters, end.x, None, v).reshape(N, k, N, k) for end in self._ends]
        has_trace = self._names[0] == "trace"
        sums = PairSums(N, k, len(self._names) - has_trace)
        sums.add(
            0,
            0,
            [
                arrays.to_numpy(table)
                for table in moment_products([metrics.double(gram) for gram in grams])[: len(sums)]
            ],
        )
        traces = grams[0].reshape(N * k, N * k).diagonal().reshape(N, k)
        return sums.moments(arrays.to_numpy(traces) if has_trace else None)

    def _sizes(self, probes: int) -> list[int]:
        """Sizes of groups that together take at most the passes of so many probes whose group fits in memory."""
        if probes < 2:
            if not self._groups:
                raise OverMemory("pairs take at least two probes")
            return []
        max_group = max(4, self._max_gradients // self._N)
        size = -(-probes // -(-probes // max_group))
        cost = self._cost(size)
        while cost > probes:
            if size == 2:
                if self._groups:
                    return []
                memory = self._ends[0].engine.memory
                raise OverMemory(f"two probes take {cost:g} passes in memory of {memory}; there are {probes}")
            size = max(4, size // 2) if size > 4 else size - 1  # the variance has an unbiased estimate from four on
            cost = self._cost(size)
        if cost > size:
            return [size] * int(probes / cost)
        count = -(-probes // size)
        return [probes // count + (i < probes % count) for i in range(count)]

    def _cost(self, probes: int) -> float:
        """Passes that a group of probes takes at each end, or at the dearer one."""
        v = self._ends[0].parameters[0].new_zeros(self._N, probes, self._O)
        return max(end.engine.passes([end.parameters], end.x, v) for end in self._ends)
