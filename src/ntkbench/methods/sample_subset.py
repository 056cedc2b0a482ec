"""Sample subset: estimates from the exact kernel of a random subset of the samples."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ntkbench import metrics, operations
from ntkbench.errors import OverMemory
from ntkbench.estimators import sampling, strata
from ntkbench.estimators.accumulators import FEWER, Accumulator, moment_products, on_scale, required_moments
from ntkbench.estimators.standard_errors import PointEstimate, degrees_of_variance, is_rounding
from ntkbench.estimators.strata import Choice
from ntkbench.methods.base import Incremental, Ledger
from ntkbench.methods.base.u_statistics import with_notes
from ntkbench.metrics import Moments
from ntkbench.operators import arrays
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from ntkbench.methods.base.layerwise import TracedNetwork, TracedProblem


FEW = 20
"""Smallest number of drawn samples that show whether the batch is uneven, if shares of the trace are unknown."""
ROUNDING = 1e-9
"""Rounding error allowed for in a sum of fractions of passes."""


class SampleSubset(Incremental):
    """The exact kernel of S of N samples, drawn without replacement, by layers as in ``structured_derivatives``.

    ||Theta||_F^2 = E [sum_(b != c) ||Theta_bc||_F^2 / pi_bc + sum_b ||Theta_bb||_F^2 / pi_b] over the samples drawn,
    where pi_b and pi_bc are the probabilities that sample b and the pair b, c are drawn (Horvitz and Thompson 1952).
    tr(Theta Theta_f) is estimated likewise, and tr Theta = E sum_b tr Theta_bb / pi_b. All are unbiased; the square
    root and the ratios are biased at order 1/S. The variance comes from the choice of samples alone. It is smaller for
    ratios, which vary little between subsets: a few dozen samples often suffice for effective rank and alignment. Exact
    once S = N.

    Takes S O / N passes, and as many at theta_f. If the kernel of the subset does not fit in memory, it is computed in
    blocks, which takes more passes, so S is smaller for the same budget.

    The probabilities are about proportional to the traces of the samples' own blocks, and the samples with the largest
    traces are part of every subset (:mod:`ntkbench.estimators.sampling`). One random probe estimates these traces, for
    1 pass at each set of weights, if the remaining budget allows ``min_samples`` samples; otherwise the probabilities
    are equal. When the subset grows, the kernel of the larger subset is recomputed, within the budget.

    The standard error is that of Hajek 1964 for the metric's jackknife values, with the finite-population corrections
    1 - pi_b. Its degrees of freedom are those of a sample variance, and fewer if the samples' effects have heavy tails.
    Holds (S O)^2 numbers for each set of weights.

    Attributes:
        min_samples: minimum of S, or N if that is smaller. The variance between samples can be estimated from S = 4 on.
        max_entries: entries of the kernel that are copied in float64 at a time; at least the rows of a sample.
    """

    title = "sample subset"
    source = (
        "this suite; U-statistics of Hoeffding 1948 (doi 10.1214/aoms/1177730196); Horvitz and Thompson 1952 (doi "
        "10.1080/01621459.1952.10483446); Hajek 1964 (doi 10.1214/aoms/1177700375); Novak et al. 2022 (arXiv "
        "2206.08720)"
    )
    use_when = "you need effective rank or alignment of many samples with similar diagonal blocks"
    variance = "that of the choice of samples, with the factor 1 - S / N"
    backends = ("torch",)
    metrics = ("norm", "effective_rank", "alignment")
    needs_independent_samples = True
    prepares = "trace"
    by_layers = True
    fewest_probes = 1
    first_batch = 1
    order = 1.0
    min_samples: ClassVar[int] = 8
    max_entries: ClassVar[int] = 2**20

    def passes_per_probe(self, metric: str) -> int:
        return 1

    def least_passes(self, problem: Problem, metric: str) -> int:
        return self._passes(problem.N, problem.O, len(metrics.parameter_sets(metric)))

    def products(self, problem: Problem, metric: str, passes: float) -> float:
        share = min(1.0, passes / (problem.O * operations.ends(metric)))  # of the samples
        return share**2 * operations.by_layers(problem, metric, problem.O * operations.ends(metric))

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """The kernels and the tables of all moments, with the arrays that they are computed from."""
        samples = _samples(problem, metric, self.default_passes if passes is None else passes)
        kernels = 2 * len(metrics.parameter_sets(metric)) * problem.O**2 * target.itemsize
        probabilities = 6 * 8  # of pairs, and the arrays that they are computed from
        return samples**2 * (kernels + 2 * (len(required_moments([metric])) + 2) * 8 + probabilities)

    def prepare(self, problem: Problem, target: Target) -> TracedProblem:
        """See :meth:`ntkbench.methods.base.layerwise.Layerwise.prepare`."""
        from ntkbench.methods.base.layerwise import TracedProblem

        return TracedProblem(problem, target)

    def rounding(self, prepared: TracedProblem, names: Sequence[str], metric: str, certified: float | None) -> float:
        from ntkbench.methods.base.layerwise import rounding_of

        return rounding_of(prepared.ends(metric), metric, certified)

    def begin(self, prepared: TracedProblem, names: Sequence[str], seed: int) -> tuple[Accumulator, Ledger]:
        from ntkbench.methods.base.layerwise import ledger_of

        ends = prepared.ends("alignment" if "alignment" in names else names[0])
        subset = _Subset(ends, names, seed, self.min_samples, self.max_entries)
        subset.least = math.ceil(subset.cost(min(self.min_samples, len(prepared.x))) - ROUNDING)
        return subset, with_notes(ledger_of(ends), subset)

    def _passes(self, N: int, O: int, parameter_sets: int) -> int:  # noqa: E741 - the field's symbol
        """Passes of the smallest subset."""
        return math.ceil(min(self.min_samples, N) * O * parameter_sets / N)


def _samples(problem: Problem, metric: str, passes: int) -> int:
    """Number of samples within a budget."""
    return min(problem.N, int(passes * problem.N / (problem.O * len(metrics.parameter_sets(metric)))))


class _Subset(Accumulator):
    """Moments of the kernel of a subset of the samples. A probe is a pass."""

    def __init__(
        self, ends: Sequence[TracedNetwork], names: Sequence[str], seed: int, min_samples: int, max_entries: int
    ) -> None:
        import torch

        from ntkbench.operators.torch import TorchRng

        self._ends, self._N, self._O = ends, len(ends[0].x), ends[0].engine.O
        self._min_samples, self._max_entries = min_samples, max_entries
        self._draws = np.random.default_rng(seed)
        dtype = ends[0].parameters[0].dtype
        self._rng, self._epsilon = TorchRng(seed, dtype, ends[0].x.device), torch.finfo(dtype).eps
        self._moments = [name for name in required_moments([*names, "norm"]) if name != "trace"]
        # Sums over the entries of each block, [S, S] for each moment, and traces of the blocks on the diagonal.
        self._tables = [np.zeros((0, 0)) for _ in self._moments]
        self._traces = np.zeros(0)
        self._single, self._pair = np.zeros(0), np.zeros((0, 0))  # inclusion probabilities of those drawn
        self._shares: np.ndarray | None = None
        self._choice = Choice()
        self._passes = 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        left_out = self._N - len(self._traces)
        if not left_out:
            return ()
        notes = list(self._choice.notes("sample"))
        if left_out < self._min_samples:
            notes.append(f"only {left_out} of {self._N} samples left out: the interval assumes that effects are normal")
        if self._shares is None and not self._choice.uneven and len(self._traces) < FEW:
            said = "too few to show whether the batch is uneven: the error may be underestimated if it is"
            notes.append(f"{len(self._traces)} of {self._N} samples drawn, {said}")
        return tuple(notes)

    @property
    def uneven(self) -> bool:
        """Whether any sample is left out: drawn samples that are nearly alike say nothing about the others."""
        return len(self._traces) < self._N

    def extend(self, probes: int) -> None:
        self._passes += probes
        N, held, ends = self._N, len(self._traces), len(self._ends)
        if held == N:
            return
        beyond = self._in_one_block(self._passes) < N or self._affordable(0) < N
        if self._shares is None and beyond and self._affordable(ends) >= max(self._min_samples, held):
            self._passes -= ends
            self._shares = np.mean([self._shares_at(end) for end in self._ends], axis=0)
        size = self._affordable(0)
        if not held and size < (least := min(self._min_samples, N)) <= self._in_one_block(self._passes):
            needed, memory = self.cost(least), self._ends[0].engine.memory
            said = f"{least} samples take {needed:g} passes with memory={memory}, more than passes={self._passes:g}"
            raise OverMemory(f"{said}: raise passes or memory")
        if size <= held:
            return
        self._passes -= self.cost(size)
        shares = np.full(N, 1 / N) if self._shares is None else self._shares
        chosen = sampling.design(shares, size, max(4, min(self._min_samples, -(-size // 2))))
        certain, drawn = chosen.certain, chosen.draw(self._draws)
        self._single, self._pair = chosen.inclusion(drawn)
        samples = np.concatenate([certain, chosen.others[drawn]])
        thetas = [self._kernel(end, samples) for end in self._ends]
        traces = thetas[0].reshape(size * self._O, -1).diagonal().reshape(size, -1).sum(1)
        self._traces = arrays.to_numpy(traces, np.float64)
        known = self._traces / (self._traces.sum() or 1.0) if self._shares is None else shares
        self._choice = Choice(certain, float(shares[certain].sum()), strata.are_uneven(known), "the trace")
        step = max(1, self._max_entries // (size * self._O**2))
        tables = [self._sums([theta[i : i + step] for theta in thetas]) for i in range(0, size, step)]
        self._tables = [np.concatenate(rows) for rows in zip(*tables, strict=True)]

    def _sums(self, thetas: Sequence[Tensor]) -> list[np.ndarray]:
        """Sums over the entries of each block of some rows, ``[rows, S]`` for each moment."""
        products = moment_products([theta.double() for theta in thetas])[: len(self._moments)]
        return [arrays.to_numpy(product.sum((1, 3)), np.float64) for product in products]

    def cost(self, samples: int) -> float:
        """Passes that the kernels of a number of samples take, including those of recomputed blocks."""
        each = (end.engine.passes([end.parameters], end.x[:samples]) for end in self._ends)
        return sum(each) * samples / self._N

    def _affordable(self, passes: int) -> int:
        """Number of samples whose kernel the budget allows, after a number of other passes."""
        left = self._passes - passes
        most = self._in_one_block(left)
        if most < 1 or self.cost(most) <= left + ROUNDING:
            return most
        return bisect.bisect(range(1, most), left + ROUNDING, key=self.cost)

    def _in_one_block(self, passes: float) -> int:
        """Largest number of samples whose kernel takes at most these passes if computed in one block."""
        return min(self._N, int((passes + ROUNDING) * self._N / (self._O * len(self._ends))))

    def _shares_at(self, end: TracedNetwork) -> np.ndarray:
        """The samples' shares of the trace, estimated by one probe, ``[N]``."""
        signs = self._rng.sign(1, self._N * self._O).reshape(self._N, 1, self._O)
        traces = arrays.to_numpy(end.engine.diagonal(end.parameters, end.x, signs), np.float64).reshape(-1)
        return traces / (traces.sum() or 1.0)

    def _kernel(self, end: TracedNetwork, samples: np.ndarray) -> Tensor:
        """The kernel of some samples, ``[S, O, S, O]``."""
        return end.engine.kernel(end.parameters, end.x[samples]).reshape(len(samples), self._O, -1, self._O)

    def _estimated(self) -> Moments:
        """Moments of all samples' kernel."""
        count = len(self._choice)
        sums = [
            table[:count, :count].sum() + (own / self._single).sum() + self._of_pairs(rest).sum()
            for table, own, rest in zip(self._tables, *self._drawn(), strict=True)
        ]
        trace = self._traces[:count].sum() + (self._traces[count:] / self._single).sum()
        return Moments(trace=float(trace), **dict(zip(self._moments, map(float, sums), strict=True)))

    def _of_pairs(self, table: np.ndarray) -> np.ndarray:
        """Terms of pairs of drawn samples divided by the pairs' probabilities, ``[S, S]`` with a zero diagonal."""
        off = ~np.eye(len(table), dtype=bool)
        return np.divide(table, self._pair, out=np.zeros_like(table), where=off)

    def _drawn(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Terms of single drawn samples, ``[S]``, and of pairs of drawn samples, ``[S, S]``, for each moment."""
        count = len(self._choice)
        # Single terms: a sample's own block, and its blocks with the samples that are in every subset.
        own = [table.diagonal()[count:] + 2 * table[:count, count:].sum(0) for table in self._tables]
        return own, [table[count:, count:] for table in self._tables]

    def complement(self) -> float | None:
        return self._estimated().complement if "difference" in self._moments else None

    def estimate(self, metric: str) -> PointEstimate:
        count, moments = len(self._choice), self._estimated()
        S = len(self._traces) - count  # drawn
        own, rest = self._drawn()
        value = float(moments.metric(metric))
        if count + S == self._N:
            return PointEstimate(value, 0.0)
        names = [*self._moments, "trace"]
        # Effect of each drawn sample on each moment, relative to a weighted mean (Hajek 1964).
        singles = np.array([*own, self._traces[count:]]) / self._single
        pairs = np.array([*(self._of_pairs(table).sum(1) for table in rest), np.zeros(S)])
        left = 1 - self._single
        effects = S * (singles + 2 * pairs)
        effects -= (effects @ left / left.sum())[:, None]
        error, degrees = self._scatter(metric, moments, names, effects, left)
        if is_rounding(error, value, self._epsilon):  # drawn samples that are alike say nothing about the others
            return PointEstimate(value, math.nan, 0.0)
        return PointEstimate(value, error, degrees)

    def _scatter(
        self, metric: str, moments: Moments, names: Sequence[str], effects: np.ndarray, left: np.ndarray
    ) -> tuple[float, float]:
        """Standard error from the effects of the S drawn samples on each moment, and its degrees of freedom.

        The error is that of the metric itself, from its values without each sample (the jackknife), and not of its
        linear part. The jackknife counts the interaction of pairs of samples up to twice (Efron and Stein 1981), so the
        error is slightly too large if this interaction matters. A few values of a heavy-tailed effect do not show its
        tails, so the degrees of freedom are reduced further (:data:`ntkbench.estimators.accumulators.FEWER`).

        Args:
            metric: the metric.
            moments: estimates of its moments.
            names: names of the moments.
            effects: effects of each sample, ``[moments, S]``, about their mean.
            left: 1 - pi_b of each sample, ``[S]``.
        """
        S = len(left)
        gradient = moments.gradient(metric)
        linear = sum(getattr(gradient, name) * row for name, row in zip(names, effects, strict=True))
        value, slope = on_scale(metric, moments)

        def without(changes: np.ndarray) -> float:
            changed = {name: getattr(moments, name) - c / (S - 1) for name, c in zip(names, changes, strict=True)}
            return on_scale(metric, Moments(**changed))[0]

        found = (S - 1) * (value - np.array([without(column) for column in effects.T])) / slope
        if not np.isfinite(found).all():
            found = linear
        found = found - found @ left / left.sum()
        scatter = float(left @ found**2) / (S - 1)
        degrees = float(degrees_of_variance(np.sqrt(left) * found))
        return math.sqrt(scatter / S), degrees * (FEWER if degrees < (S - 1) / 2 else 1)
