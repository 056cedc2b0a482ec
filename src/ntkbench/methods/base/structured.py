"""Base of block U-statistics by layers: inner products of per-sample gradients that are never written out."""

from __future__ import annotations

import bisect
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ntkbench import metrics, operations
from ntkbench.errors import OverMemory
from ntkbench.estimators import strata
from ntkbench.estimators.accumulators import (
    Accumulator,
    PairBytes,
    StratifiedTrace,
    complement,
    delta_method,
    least_probes,
    moment_products,
    required_moments,
)
from ntkbench.estimators.standard_errors import MomentEstimates, PairSums, PointEstimate
from ntkbench.estimators.strata import Choice
from ntkbench.methods.base import Incremental, Ledger
from ntkbench.methods.base.u_statistics import dear, with_notes
from ntkbench.metrics import Moments
from ntkbench.operators import arrays
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from ntkbench.methods.base.layerwise import TracedNetwork


class StructuredUStatistics(Incremental):
    """Block U-statistics of traced networks, in groups of probes; see :class:`GroupedUStatistics`.

    Attributes:
        max_gradients: largest number of gradients in a default budget; beyond about a thousand, their inner products,
            which have quadratic cost, take most of the time.
        max_group: largest number of gradients in a group.
        least_with_pilot: smallest number of probes with which one is spent on the choice of exact samples.
    """

    backends = ("torch",)
    needs_independent_samples = True
    by_layers = True
    first_batch = 4
    order = 1.0
    max_gradients: ClassVar[int] = 1024
    max_group: ClassVar[int] = 2048
    least_with_pilot: ClassVar[int] = 8

    def default_max_passes(self, problem: Problem) -> int:
        return max(16, self.max_gradients // problem.N)

    def passes_per_probe(self, metric: str) -> int:
        return 2 if metric == "alignment" else 1

    def strata(self, problem: Problem, metric: str) -> int:
        return problem.N

    def signs(self, problem: Problem, metric: str) -> int:
        return problem.O

    def probes_to_reach(self, problem: Problem, metric: str, error: float) -> float:
        return least_probes(metric, problem.N, problem.n, error)

    def products(self, problem: Problem, metric: str, passes: float) -> float:
        return operations.by_layers(problem, metric, passes, self.max_group / problem.N)

    def worthwhile_probes(self, problem: Problem) -> float:
        """Smallest K at which the kernel of one group takes over :func:`dear` times the operations of the passes."""
        of_passes = dear(problem.N) * operations.of_pass_by_layers(problem)
        some = range(1, self.max_group // problem.N + 1)
        place = bisect.bisect_left(some, True, key=lambda K: operations.of_kernel(problem, K) > K * of_passes)
        return some[place] if place < len(some) else math.inf

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """The tables of two probes."""
        ends = len(metrics.parameter_sets(metric))
        return pair_bytes(problem.N, ends, required_moments((metric,)), target.itemsize).whole(2)

    @abstractmethod
    def networks(self, prepared: Any, metric: str) -> tuple[Sequence[TracedNetwork], Moments]:
        """The traced networks of a metric, and the moments that are known exactly and add to those of their kernels."""

    def rounding(self, prepared: Any, names: Sequence[str], metric: str, certified: float | None) -> float:
        from ntkbench.methods.base.layerwise import rounding_of

        return rounding_of(prepared.ends(widest(names)), metric, certified)

    def begin(self, prepared: Any, names: Sequence[str], seed: int) -> tuple[Accumulator, Ledger]:
        from ntkbench.methods.base.layerwise import ledger_of

        ends, known = self.networks(prepared, widest(names))
        accumulator = GroupedUStatistics(ends, names, seed, self.max_group, self.least_with_pilot, known)
        return accumulator, with_notes(ledger_of(ends), accumulator)


def pair_bytes(N: int, ends: int, moments: Sequence[str], itemsize: int) -> PairBytes:
    """Bytes of the tables of pairs of probes of N samples, without vectors."""
    return PairBytes(N, ends, len(moments) - (moments[0] == "trace"), itemsize)


PIECES = 4
"""Maximum number of pieces in which further probes for a trace are drawn."""


def widest(names: Sequence[str]) -> str:
    """A metric whose networks and moments serve all of the given metrics."""
    if "alignment" in names:
        return "alignment"
    return "trace" if set(names) == {"trace"} else "norm"


def _split(probes: int, most: int) -> list[int]:
    """Sizes of even groups of at most ``most`` probes, the largest first; too few probes for a group are left out.

    A group has at least four probes, or two if there are fewer, or if ``most`` is smaller than four.
    """
    count = -(-probes // most)
    if count > 1 and probes // count < (4 if most >= 4 else 2):
        count -= 1
        probes = count * most
    return [probes // count + (i < probes % count) for i in range(count)]


class GroupedUStatistics(Accumulator):
    """U-statistics within groups of probes, with some samples treated exactly.

    Args:
        ends: traced networks.
        names: metrics.
        seed: seed of the probes.
        max_gradients: largest number of gradients in a group.
        least_with_pilot: smallest number of probes with which one is spent on the choice of exact samples.
        known: moments that add to those of the networks' kernels.
    """

    def __init__(
        self,
        ends: Sequence[TracedNetwork],
        names: Sequence[str],
        seed: int,
        max_gradients: int,
        least_with_pilot: int,
        known: Moments,
    ) -> None:
        from ntkbench.operators.torch import TorchRng

        self._ends, self._N, self._O = ends, len(ends[0].x), ends[0].engine.O
        self._names = required_moments(names)
        self._known = [getattr(known, name) for name in self._names]
        self._of = "the estimated part of ||Theta||^2" if any(self._known) else "||Theta||^2"
        self._least_with_pilot = least_with_pilot
        memory, itemsize = ends[0].engine.memory, ends[0].parameters[0].element_size()
        self._bytes = pair_bytes(self._N, len(ends), self._names, itemsize)
        wanted = max(4, max_gradients // self._N)
        self._most = max(2, self._bytes.most_probes(memory, wanted))  # probes in a group
        self._max_gradients = max_gradients if self._most == wanted else self._most * self._N
        self._rng = TorchRng(seed, ends[0].parameters[0].dtype, ends[0].x.device)
        self._first = 0  # probes in the first piece of a trace
        self._trace = self._of_trace() if self._names == ("trace",) else None
        self._groups: list[tuple[int, MomentEstimates]] = []
        self._shares: np.ndarray | None = None
        self._choice = Choice()
        self._unspent = 0.0

    def _of_trace(self) -> StratifiedTrace:
        """The trace alone."""
        end = self._ends[0]

        def draw(k: int) -> Tensor:
            return end.engine.diagonal(end.parameters, end.x, self._directions(k)).T

        return StratifiedTrace(
            draw, self._pieces, "the estimated part of the trace" if any(self._known) else "the trace"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        return replace(self._choice, of=self._of).notes("sample") if self._trace is None else self._trace.notes

    @property
    def uneven(self) -> bool:
        return self._choice.uneven and not self._choice if self._trace is None else self._trace.uneven

    def pairs(self, probes: int) -> float:
        return self._moments().pairs if self._trace is None else self._trace.pairs(probes)

    def extend(self, probes: int) -> None:
        if self._trace is not None:
            self._trace.extend(probes)
            return
        passes: float = probes
        if self._choice:
            passes += self._unspent
            sizes = self._sizes_beside(len(self._choice), passes)
        else:
            sizes, passes = self._plan(probes)
        for k in sizes:
            passes -= self._cost(k, len(self._choice))
            self._groups.append((k, self._group(k)))
        self._unspent = passes

    def _pieces(self, probes: int) -> list[int]:
        """Sizes in which probes are drawn; few distinct ones, because the network is traced anew for each size."""
        size = probes
        if self._first:
            size = self._first * 2 ** max(0, math.ceil(math.log2(probes / (PIECES * self._first))))
        signs = 4 * self._N * self._O * self._bytes.itemsize  # of a probe, with intermediate copies
        size = min(size, max(1, self._ends[0].engine.memory // signs))
        self._first = self._first or size
        whole, rest = divmod(probes, size)
        return [size] * whole + [rest] * bool(rest)

    def estimate(self, metric: str) -> PointEstimate:
        if self._trace is not None:
            found = self._trace.estimate(metric)
            return found._replace(value=found.value + self._known[0])
        return delta_method(metric, self._names, self._moments(), single=self._O == 1, uneven=self.uneven)

    def complement(self) -> float | None:
        if self._trace is not None:
            return None
        return complement(dict(zip(self._names, self._moments().means.tolist(), strict=True)))

    def _moments(self) -> MomentEstimates:
        return MomentEstimates.pooled(self._groups).plus(self._known)

    def _plan(self, probes: int) -> tuple[list[int], float]:
        """Choose the exact samples if a probe for this is affordable; return sizes of groups, and their passes."""
        sizes, passes = self._sizes(probes), float(probes)
        if not sizes and not self._groups:
            needed, memory = self._cost(2), self._ends[0].engine.memory
            said = f"two probes take {needed:g} passes with memory={memory}, more than passes={probes}"
            raise OverMemory(f"{said}: raise passes or memory")
        drawn = sum(k for k, _ in self._groups)
        worth = self._N > strata.UNEVEN and drawn + probes >= self._least_with_pilot
        if self._shares is None and worth and sizes and sizes[0] >= 4:
            left = probes - self._cost(1)
            if fewer := self._sizes(int(left)):
                self._shares = strata.shares(self._tables(1)[0])
                sizes, passes = fewer, left
        if self._shares is None:
            return sizes, passes
        choice = strata.choose(
            self._shares,
            passes,
            lambda k: self._repeats(k) * k,
            max_probes=self._most,
            max_exact=self._max_gradients // (2 * self._O),
            drawn=drawn,
        )
        beside = self._sizes_beside(len(choice), passes) if choice else []
        if not beside:
            self._choice = Choice(uneven=choice.uneven)
            return sizes, passes
        self._choice = choice
        self._groups.clear()
        return beside, passes

    def _group(self, k: int) -> MomentEstimates:
        tables, traces = self._tables(k)
        if self._shares is None and not self._groups:
            self._choice = Choice(uneven=strata.are_uneven(strata.shares(tables)))
        first = len(self._choice) * self._repeats(k)  # inputs that are exact samples
        sums = PairSums(self._N - len(self._choice), k, len(tables))
        sums.add(0, 0, [table[first:, :, first:] for table in tables])
        sums.add_singles([2 * table[:first, :, first:].sum((0, 1), dtype=np.float64) for table in tables])
        exact = [float(table[:first, :, :first].sum(dtype=np.float64)) for table in tables]
        if self._names[0] != "trace":
            return sums.moments().plus(exact)
        return sums.moments(traces[first:]).plus([float(traces[:first].sum(dtype=np.float64)), *exact])

    def _tables(self, k: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The pairs' values for each moment except the trace, ``[inputs, k, inputs, k]``, and squares ``[inputs, k]``.

        The inputs are the exact samples, each repeated so that k directions of each hold its O unit vectors, and then
        the others.
        """
        v, (size, xs) = self._directions(k), self._inputs(k)
        pairs = zip(self._ends, xs, strict=True)
        grams = [end.engine.kernel(end.parameters, x, None, v).reshape(size, k, size, k) for end, x in pairs]
        wanted = len(self._names) - (self._names[0] == "trace")
        squares = grams[0].reshape(size * k, size * k).diagonal().reshape(size, k)
        products = moment_products([metrics.double(gram) for gram in grams])[:wanted]
        return [arrays.to_numpy(table) for table in products], arrays.to_numpy(squares)

    def _inputs(self, k: int) -> tuple[int, list[Tensor]]:
        exact = self._choice.exact
        if not len(exact):
            return self._N, [end.x for end in self._ends]
        order = np.concatenate([exact.repeat(self._repeats(k)), np.delete(np.arange(self._N), exact)])
        return len(order), [end.x[order] for end in self._ends]

    def _directions(self, k: int) -> Tensor:
        """``[inputs, k, O]``, unit vectors for exact samples and random signs for the others."""
        count, repeats = len(self._choice), self._repeats(k)
        others = self._N - count
        signs = self._rng.sign(k, others * self._O).reshape(k, others, self._O).transpose(0, 1)
        v = signs.new_zeros(count * repeats + others, k, self._O)
        v[count * repeats :] = signs
        units = v[: count * repeats].view(count, repeats * k, self._O)
        units.diagonal(dim1=1, dim2=2).fill_(1)
        return v

    def _repeats(self, k: int) -> int:
        """Inputs that an exact sample takes, so that k directions of each hold its O unit vectors."""
        return -(-self._O // k)

    def _sizes(self, probes: int) -> list[int]:
        """Sizes of groups that together take at most one pass for each of ``probes``; none if these are too few.

        With four probes or more, the variance has an unbiased estimate. Groups are smaller only if four do not fit.
        """
        if probes < 2:
            return []
        size = _split(probes, self._most)[0]
        cost = self._cost(size)
        while cost > probes:
            if size == 2:
                return []
            size = max(4, size // 2) if size > 4 else size - 1
            cost = self._cost(size)
        return [size] * int(probes / cost) if cost > size else _split(probes, size)

    def _sizes_beside(self, exact: int, passes: float) -> list[int]:
        """Sizes of groups beside a number of exact samples, within the passes; none if these are too few."""
        others = self._N - exact
        if not others:
            k = min(self._O, max(1, self._max_gradients // self._N))
            fits = self._fits(k, exact) and not self._choice
            return [k] if fits and self._cost(k, exact) <= passes else []
        most = max(4, (self._max_gradients - exact * self._O) // others)
        # From O on, the rows grow with the number of probes.
        affordable = range(2, min(int(passes * self._N / others), max(most, self._O) + 1) + 1)
        rows = {k: taken for k in affordable if (taken := self._rows(k, exact)) <= passes * self._N}
        # The fewest groups that leave none too large.
        count = int(passes * self._N / min((rows[k] for k in rows if k > most), default=math.inf)) + 1
        fitting = (k for k in rows if k <= most and count * rows[k] <= passes * self._N and self._fits(k, exact))
        k = max(fitting, default=0)
        while k >= 2:
            if self._fits(k, exact) and (cost := self._cost(k, exact)) <= passes:
                return [k] * int(passes / cost + 1e-9)
            k = k // 2 if k > 4 else k - 1
        return []

    def _fits(self, k: int, exact: int) -> bool:
        """Whether the tables of a group beside a number of exact samples fit in memory."""
        sizes = replace(self._bytes, strata=self._N - exact)
        return sizes.tables(k, self._rows(k, exact)) <= self._ends[0].engine.memory

    def _rows(self, k: int, exact: int) -> int:
        """Rows of a group's kernel."""
        return k * (self._N - exact + self._repeats(k) * exact)

    def _cost(self, k: int, exact: int = 0) -> float:
        """Passes that a group of k probes takes at each end, or at the more expensive one."""
        inputs = self._rows(k, exact) // k
        v = self._ends[0].parameters[0].new_zeros(inputs, k, self._O)
        xs = [end.x[np.arange(inputs) % self._N] if exact else end.x for end in self._ends]
        found = [end.engine.passes([end.parameters], x, v) for end, x in zip(self._ends, xs, strict=True)]
        return max(found) * inputs / self._N
