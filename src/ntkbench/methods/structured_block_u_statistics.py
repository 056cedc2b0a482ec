"""Block U-statistics by layers: inner products of per-sample gradients of random outputs, which are never formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ntkbench import metrics
from ntkbench.errors import OverMemory
from ntkbench.estimators import standard_errors
from ntkbench.estimators.accumulators import Sample, moments_of, products, read_pairs
from ntkbench.estimators.standard_errors import Reading
from ntkbench.methods.base import Incremental, Ledger
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from ntkbench.methods.base.layerwise import TracedProblem

WIDEST = 2048
"""Gradients in a group, between all pairs of which the inner products are taken."""


class StructuredBlockUStatistics(Incremental):
    """The estimator of ``block_u_statistics`` on the engine of ``structured_derivatives``.

    The same mean, variance and passes, 1 a field and 2 for alignment. A gradient of a weight is a sum of outer products
    of inputs and cotangents, and inner products of such gradients come from those of their factors: for a linear layer
    of I inputs and I' outputs they cost I + I' each, and not I I'. Fields beyond some thousand gradients form groups of
    their own, and so do those that are added later. Where a group does not fit in memory its columns are passed through
    anew, and fewer fields are drawn.
    """

    title = "block U-statistics by layers"
    source = "this suite; structured derivatives of Novak et al. 2022"
    backends = ("torch",)
    needs_independent_samples = True
    first_batch = 4

    def worthwhile_passes(self, problem: Problem) -> int:
        # Beyond a thousand gradients their inner products take most of the time, and its square.
        return max(8, 1024 // problem.N)

    def passes_per_probe(self, metric: str) -> int:
        return 2 if metric == "alignment" else 1

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        grams = (2 * problem.N) ** 2 * len(metrics.ends(metric))
        return 0 if metric == "trace" else grams * (target.itemsize + 3 * 8)

    def prepare(self, problem: Problem, target: Target) -> TracedProblem:
        """See :meth:`ntkbench.methods.base.layerwise.Layerwise.prepare`."""
        from ntkbench.methods.base.layerwise import TracedProblem

        return TracedProblem(problem, target)

    def begin(self, prepared: TracedProblem, names: Sequence[str], seed: int) -> tuple[Sample, Ledger]:
        return _Groups(prepared, names, seed), prepared.ledger()


class _Groups(Sample):
    """Groups of fields; pairs are taken within a group."""

    def __init__(self, prepared: TracedProblem, names: Sequence[str], seed: int) -> None:
        from ntkbench.operators.torch import TorchRng

        self._engine, self._x = prepared.engine, prepared.x
        self._sets = prepared.parameters("alignment" if "alignment" in names else names[0])
        self._names = moments_of(names)
        self._rng = TorchRng(seed, self._sets[0][0].dtype, self._x.device)
        self._traces: list[np.ndarray] = []
        self._groups: list[tuple[int, standard_errors.Moments2]] = []

    def extend(self, probes: int) -> None:
        if self._names == ("trace",):
            said = self._engine.diagonal(self._sets[0], self._x, self._directions(probes))
            self._traces.append(standard_errors.by_probe([said.T]))
            return
        for k in self._sizes(probes):
            self._groups.append((k, self._group(k)))

    def read(self, metric: str) -> Reading:
        if self._names == ("trace",):
            return standard_errors.mean_of_sums(np.concatenate(self._traces))
        return read_pairs(self._names, standard_errors.Moments2.mean(self._groups), metric)

    def _directions(self, k: int) -> Tensor:
        N, O = len(self._x), self._engine.O  # noqa: E741 - the field's symbol
        return self._rng.sign(k, N * O).reshape(k, N, O).transpose(0, 1).contiguous()

    def _group(self, k: int) -> standard_errors.Moments2:
        N, v = len(self._x), self._directions(k)
        grams = [self._engine.kernel(parameters, self._x, None, v).reshape(N, k, N, k) for parameters in self._sets]
        has_trace = self._names[0] == "trace"
        sums = standard_errors.PairSums(N, k, len(self._names) - has_trace)
        sums.add(0, 0, [standard_errors.on_host(table) for table in products(grams)[: len(sums)]])
        traces = grams[0].reshape(N * k, N * k).diagonal().reshape(N, k)
        return sums.moments(standard_errors.on_host(traces).astype(np.float64) if has_trace else None)

    def _sizes(self, fields: int) -> list[int]:
        """Sizes of groups that together cost no more passes than that many fields when all fits in memory."""
        if fields < 2:
            if not self._groups:
                raise OverMemory("pairs take at least two fields")
            return []
        widest = max(4, WIDEST // len(self._x))
        count = -(-fields // widest)
        size = fields // count
        cost = self._cost(size)
        while cost > fields:
            if size == 2:
                if self._groups:
                    return []
                memory = self._engine.memory
                raise OverMemory(f"two fields take {cost:g} passes in memory of {memory}; there are {fields}")
            size = max(4, size // 2) if size > 4 else size - 1  # from four on they tell their own error
            cost = self._cost(size)
        if cost > size:
            count = int(fields / cost)
            return [size] * count
        return [fields // count + (i < fields % count) for i in range(count)]

    def _cost(self, fields: int) -> float:
        parameters = self._sets[0]
        return self._engine.passes([parameters], self._x, parameters[0].new_zeros(len(self._x), fields, self._engine.O))
