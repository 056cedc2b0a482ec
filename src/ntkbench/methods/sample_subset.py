"""Sample subset: estimates from the exact kernel of a random subset of the samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ntkbench import metrics
from ntkbench.estimators.accumulators import Accumulator, moment_products, required_moments
from ntkbench.estimators.standard_errors import PointEstimate
from ntkbench.methods.base import Incremental, Ledger
from ntkbench.metrics import Moments
from ntkbench.operators import arrays
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from ntkbench.methods.base.layerwise import TracedNetwork, TracedProblem


class SampleSubset(Incremental):
    """Blocks Theta_bc between S of N samples, drawn without replacement, by layers as in ``structured_derivatives``.

    ||Theta||_F^2 = E [N (N - 1) / (S (S - 1)) sum_(b != c) ||Theta_bc||_F^2 + N / S sum_b ||Theta_bb||_F^2] over the
    samples drawn, tr(Theta Theta_f) likewise, and tr Theta = E N / S sum_b tr Theta_bb. All are unbiased; the square
    root and the ratios are biased at order 1/S. S O / N passes, and as many at theta_f. The variance is that of the
    samples alone. It is small where samples are alike, and smaller for ratios, which vary little between subsets. A few
    dozen samples often suffice for effective rank and alignment. Exact once S = N.

    The standard error is that of the linearised metric, with the finite-population correction 1 - S / N. Holds
    (S O)^2 numbers for each parameter set.

    Attributes:
        min_samples: S at least, or N if that is smaller; the variance between samples has an estimate from 4 on.
    """

    title = "sample subset"
    source = "this suite; U-statistics of Hoeffding 1948; structured derivatives of Novak et al. 2022"
    backends = ("torch",)
    metrics = ("norm", "effective_rank", "alignment")
    needs_independent_samples = True
    prepares = "trace"
    fewest_probes = 1
    first_batch = 1
    order = 1.0
    min_samples: ClassVar[int] = 8

    def passes_per_probe(self, metric: str) -> int:
        return 1

    def least_passes(self, problem: Problem, metric: str) -> int:
        return self._passes(problem.N, problem.O, len(metrics.parameter_sets(metric)))

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        rows = _samples(problem, metric, self.default_passes if passes is None else passes) * problem.O
        return 2 * len(metrics.parameter_sets(metric)) * rows**2 * target.itemsize

    def prepare(self, problem: Problem, target: Target) -> TracedProblem:
        """See :meth:`ntkbench.methods.base.layerwise.Layerwise.prepare`."""
        from ntkbench.methods.base.layerwise import TracedProblem

        return TracedProblem(problem, target)

    def begin(self, prepared: TracedProblem, names: Sequence[str], seed: int) -> tuple[Accumulator, Ledger]:
        from ntkbench.methods.base.layerwise import ledger_of

        ends = prepared.ends("alignment" if "alignment" in names else names[0])
        subset = _Subset(ends, names, seed)
        subset.least = self._passes(len(prepared.x), prepared.engine.O, len(ends))
        return subset, ledger_of(ends)

    def _passes(self, N: int, O: int, parameter_sets: int) -> int:  # noqa: E741 - the field's symbol
        """Passes of the smallest subset."""
        return math.ceil(min(self.min_samples, N) * O * parameter_sets / N)


def _samples(problem: Problem, metric: str, passes: int) -> int:
    """Samples within a budget."""
    return min(problem.N, int(passes * problem.N / (problem.O * len(metrics.parameter_sets(metric)))))


class _Subset(Accumulator):
    """Moments of the kernel between the samples so far. The number of probes is that of passes."""

    def __init__(self, ends: Sequence[TracedNetwork], names: Sequence[str], seed: int) -> None:
        self._ends, self._N, self._O = ends, len(ends[0].x), ends[0].engine.O
        self._order = np.random.default_rng(seed).permutation(self._N)
        self._moments = [name for name in required_moments([*names, "norm"]) if name != "trace"]
        # Sums over the entries of each block, [S, S] for each moment, and traces of the blocks on the diagonal.
        self._tables = [np.zeros((0, 0)) for _ in self._moments]
        self._traces = np.zeros(0)
        self._passes = 0

    def extend(self, probes: int) -> None:
        self._passes += probes
        N, held = self._N, len(self._traces)
        upto = min(N, int(self._passes * N / (self._O * len(self._ends))))
        if upto == held:
            return
        old, new = self._order[:held], self._order[held:upto]
        own = [self._kernel(end, new, None) for end in self._ends]
        traces = own[0].reshape(len(new) * self._O, -1).diagonal().reshape(len(new), -1).sum(1)
        self._traces = np.concatenate([self._traces, arrays.to_numpy(traces, np.float64)])
        corner = self._sums(own)
        side = self._sums([self._kernel(end, old, new) for end in self._ends]) if held else None
        self._tables = [
            block if side is None else np.block([[table, side[i]], [side[i].T, block]])
            for i, (table, block) in enumerate(zip(self._tables, corner, strict=True))
        ]

    def _kernel(self, end: TracedNetwork, rows: np.ndarray, columns: np.ndarray | None) -> Tensor:
        """``[S, O, S', O]``."""
        x2 = None if columns is None else end.x[columns]
        theta = end.engine.kernel(end.parameters, end.x[rows], x2)
        return theta.reshape(len(rows), self._O, -1, self._O)

    def _sums(self, thetas: Sequence[Tensor]) -> list[np.ndarray]:
        products = moment_products([theta.double() for theta in thetas])[: len(self._moments)]
        return [arrays.to_numpy(product.sum((1, 3)), np.float64) for product in products]

    def _estimated(self) -> Moments:
        """Moments of all samples' kernel."""
        N, S = self._N, len(self._traces)
        pairs = N * (N - 1) / (S * (S - 1)) if S > 1 else 0.0
        own = [table.diagonal().sum() for table in self._tables]
        sums = [pairs * (table.sum() - d) + N / S * d for table, d in zip(self._tables, own, strict=True)]
        return Moments(trace=N / S * self._traces.sum(), **dict(zip(self._moments, map(float, sums), strict=True)))

    def complement(self) -> float | None:
        return self._estimated().complement if "difference" in self._moments else None

    def estimate(self, metric: str) -> PointEstimate:
        N, S, moments = self._N, len(self._traces), self._estimated()
        own = [table.diagonal() for table in self._tables]
        value = float(moments.metric(metric))
        if S == N:
            return PointEstimate(value, 0.0)
        # To first order, the metric is a sum over pairs and a sum over samples.
        gradient = moments.gradient(metric)
        weights = [getattr(gradient, name) for name in self._moments]
        by_pair = N * (N - 1) * sum(w * table for w, table in zip(weights, self._tables, strict=True))
        by_sample = N * (sum(w * d for w, d in zip(weights, own, strict=True)) + gradient.trace * self._traces)
        return PointEstimate(value, _standard_error(by_pair, by_sample, N), S - 1)


def _standard_error(by_pair: np.ndarray, by_sample: np.ndarray, N: int) -> float:
    """Standard error of mean_(b != c) H_bc + mean_b D_b over S samples of a population of N.

    With Hoeffding's decomposition H_bc = mean + alpha_b + alpha_c + gamma_bc, a sample contributes
    L_b = 2 alpha_b + D_b, with the correction 1 - S / N, and a pair contributes gamma_bc, with the correction
    1 - S (S - 1) / (N (N - 1)). The scatter of the estimates of L includes the variance of gamma, which is subtracted.

    Args:
        by_pair: H, ``[S, S]``; the diagonal is ignored.
        by_sample: D, ``[S]``.
        N: size of the population.
    """
    S = len(by_sample)
    off = by_pair - np.diag(by_pair.diagonal())
    means = off.sum(1) / (S - 1)
    alpha = (S - 1) / (S - 2) * (means - means.mean())
    gamma = off - means.mean() - alpha[:, None] - alpha
    np.fill_diagonal(gamma, 0.0)
    of_pairs = (gamma**2).sum() / (S * (S - 3))
    scatter = (2 * means + by_sample).var(ddof=1)
    of_samples = scatter - 4 * of_pairs / (S - 1)
    pairs, all_pairs, share = S * (S - 1), N * (N - 1), (1 - S / N) / S
    variance = share * of_samples + (1 - pairs / all_pairs) * 2 * of_pairs / pairs
    return math.sqrt(max(variance, share * scatter / 4))  # the difference may be negative
