"""Block U-statistics by layers: inner products of per-sample gradients of random outputs, which are never formed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ntkbench import metrics, statistics
from ntkbench.errors import BadInput, OverMemory
from ntkbench.estimate import Estimate
from ntkbench.methods.base import Stochastic
from ntkbench.problems.base import Problem
from ntkbench.sampling import moments_of, products, read_pairs
from ntkbench.target import Target

if TYPE_CHECKING:
    from ntkbench.structured.method import Prepared

WIDEST = 2048
"""Gradients in a group, between all pairs of which the inner products are taken."""


class StructuredBlockUStatistics(Stochastic):
    """The estimator of ``block_u_statistics`` on the engine of ``structured_derivatives``.

    The same mean, variance and passes, 1 a field and 2 for alignment. A gradient of a weight is a sum of outer products
    of inputs and cotangents, and inner products of such gradients come from those of their factors: for a linear layer
    of I inputs and I' outputs they cost I + I' each, and not I I'. Fields beyond some thousand gradients form groups of
    their own. Where a group does not fit in memory its columns are passed through anew, and fewer fields are drawn.
    """

    title = "block U-statistics by layers"
    source = "this suite; structured derivatives of Novak et al. 2022"
    backends = ("torch",)
    needs_independent_samples = True

    def worthwhile_passes(self, problem: Problem) -> int:
        # Beyond a thousand gradients their inner products take most of the time, and its square.
        return max(8, 1024 // problem.N)

    def passes_per_probe(self, metric: str) -> int:
        return 2 if metric == "alignment" else 1

    def bytes_needed(self, problem: Problem, metric: str, target: Target) -> int:
        grams = (2 * problem.N) ** 2 * len(metrics.ends(metric))
        return 0 if metric == "trace" else grams * (target.itemsize + 3 * 8)

    def prepare(self, problem: Problem, target: Target) -> Prepared:
        """See :meth:`ntkbench.structured.method.Layerwise.prepare`."""
        from ntkbench.structured.method import Prepared

        return Prepared(problem, target)

    def estimate(self, prepared: Prepared, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        if passes is None:
            raise BadInput(f"{self.name} is stochastic and needs passes, a positive number; got none")
        before = prepared.engine.directions_taken
        value, error = self._read(prepared, metric, passes // self.passes_per_probe(metric), seed)
        spent = (prepared.engine.directions_taken - before) / len(prepared.x)
        notes = tuple(f"{name} written out: {why}" for name, why in prepared.engine.fallbacks().items())
        return Estimate(value, error, spent, self.name, notes)

    def draw(self, *args: object) -> tuple[float, float]:
        """Not by way of Jacobian operators."""
        raise NotImplementedError

    def _read(self, prepared: Prepared, metric: str, fields: int, seed: int) -> tuple[float, float]:
        from ntkbench.jacobian.torch import Rng

        engine, x, sets = prepared.engine, prepared.x, prepared.parameters(metric)
        N, rng = len(x), Rng(seed, sets[0][0].dtype, x.device)
        names = moments_of((metric,))

        def directions(k: int):
            return rng.sign(k, N * engine.O).reshape(k, N, engine.O).transpose(0, 1).contiguous()

        if metric == "trace":
            return statistics.mean_of_sums(statistics.by_probe([engine.diagonal(sets[0], x, directions(fields)).T]))
        groups = []
        for k in self._groups(prepared, metric, fields):
            v = directions(k)
            grams = [engine.kernel(parameters, x, None, v).reshape(N, k, N, k) for parameters in sets]
            sums = statistics.PairSums(N, k, len(names) - (names[0] == "trace"))
            sums.add(0, 0, [statistics.on_host(table) for table in products(grams)[: len(sums)]])
            traces = statistics.on_host(grams[0].reshape(N * k, N * k).diagonal().reshape(N, k))
            groups.append((k, sums.moments(traces.astype(np.float64) if names[0] == "trace" else None)))
        return read_pairs(names, statistics.Moments2.mean(groups), metric)

    def _groups(self, prepared: Prepared, metric: str, fields: int) -> list[int]:
        """Sizes of groups that together cost no more passes than that many fields when all fits in memory."""
        engine, x, parameters = prepared.engine, prepared.x, prepared.parameters(metric)[0]

        def cost_of(k: int) -> float:
            return engine.passes([parameters], x, parameters[0].new_zeros(len(x), k, engine.O))

        widest = max(4, WIDEST // len(x))
        count = -(-fields // widest)
        size = fields // count
        cost = cost_of(size)
        while cost > fields:
            if size == 2:
                raise OverMemory(f"two fields take {cost:g} passes in memory of {engine.memory}; there are {fields}")
            size = max(4, size // 2) if size > 4 else size - 1  # from four on they tell their own error
            cost = cost_of(size)
        if cost > size:
            count = int(fields / cost)
            return [size] * count
        return [fields // count + (i < fields % count) for i in range(count)]
