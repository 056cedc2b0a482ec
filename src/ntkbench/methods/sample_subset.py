"""Sample subset: the exact kernel of some of the samples, drawn at random, and what it says of all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ntkbench import metrics
from ntkbench.estimators import standard_errors
from ntkbench.estimators.accumulators import Sample, moments_of, products
from ntkbench.estimators.standard_errors import Reading
from ntkbench.methods.base import Incremental, Ledger
from ntkbench.metrics import Moments
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from ntkbench.methods.base.layerwise import TracedProblem

FEWEST = 8
"""Samples that tell how much samples differ; all, where there are fewer."""


class SampleSubset(Incremental):
    """Blocks Theta_bc between S of N samples, drawn without replacement, by layers as in ``structured_derivatives``.

    ||Theta||_F^2 = E [N (N - 1) / (S (S - 1)) sum_(b != c) ||Theta_bc||_F^2 + N / S sum_b ||Theta_bb||_F^2] over the
    samples drawn, tr(Theta Theta_f) likewise, and tr Theta = E N / S sum_b tr Theta_bb: unbiased; the root and the
    ratios are biased at order 1/S. S O / N passes, and as many at theta_f. No probe adds to the variance, which is that
    of samples alone: small where they are alike, and smaller still for ratios, to which they all say much the same.
    Effective rank and alignment of many samples are often known from a few dozen of them. Exact once S = N.

    The standard error is that of the linearised metric, with the correction for a finite population, 1 - S / N. Holds
    (S O)^2 numbers for each set of weights.
    """

    title = "sample subset"
    source = "this suite; U-statistics of Hoeffding 1948; structured derivatives of Novak et al. 2022"
    backends = ("torch",)
    metrics = ("norm", "effective_rank", "alignment")
    needs_independent_samples = True
    fewest_probes = 1
    first_batch = 1

    def passes_per_probe(self, metric: str) -> int:
        return 1

    def least_passes(self, problem: Problem, metric: str) -> int:
        return _least(problem.N, problem.O, len(metrics.ends(metric)))

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        rows = _samples(problem, metric, self.default_passes if passes is None else passes) * problem.O
        return 2 * len(metrics.ends(metric)) * rows**2 * target.itemsize

    def prepare(self, problem: Problem, target: Target) -> TracedProblem:
        """See :meth:`ntkbench.methods.base.layerwise.Layerwise.prepare`."""
        from ntkbench.methods.base.layerwise import TracedProblem

        return TracedProblem(problem, target)

    def begin(self, prepared: TracedProblem, names: Sequence[str], seed: int) -> tuple[Sample, Ledger]:
        return _Subset(prepared, names, seed), prepared.ledger()


def _least(N: int, O: int, ends: int) -> int:  # noqa: E741 - the field's symbol
    """Passes of the smallest subset."""
    return math.ceil(min(FEWEST, N) * O * ends / N)


def _samples(problem: Problem, metric: str, passes: int) -> int:
    """How many samples a budget pays for."""
    return min(problem.N, int(passes * problem.N / (problem.O * len(metrics.ends(metric)))))


class _Subset(Sample):
    """Blocks between the samples so far; its probes are passes."""

    def __init__(self, prepared: TracedProblem, names: Sequence[str], seed: int) -> None:
        self._engine, self._x = prepared.engine, prepared.x
        self._sets = prepared.parameters("alignment" if "alignment" in names else names[0])
        self._order = np.random.default_rng(seed).permutation(len(self._x))
        self._moments = [name for name in moments_of([*names, "norm"]) if name != "trace"]
        # Sums over the entries of each block, [S, S] a moment, and traces of those on the diagonal.
        self._tables = [np.zeros((0, 0)) for _ in self._moments]
        self._traces = np.zeros(0)
        self._paid = 0
        self.least = _least(len(self._x), self._engine.O, len(self._sets))

    def extend(self, probes: int) -> None:
        self._paid += probes
        N, held = len(self._x), len(self._traces)
        upto = min(N, int(self._paid * N / (self._engine.O * len(self._sets))))
        if upto == held:
            return
        old, new = self._order[:held], self._order[held:upto]
        own = [self._kernel(parameters, new, None) for parameters in self._sets]
        traces = own[0].reshape(len(new) * self._engine.O, -1).diagonal().reshape(len(new), -1).sum(1)
        self._traces = np.concatenate([self._traces, standard_errors.on_host(traces).astype(np.float64)])
        corner = self._sums(own)
        side = self._sums([self._kernel(parameters, old, new) for parameters in self._sets]) if held else None
        self._tables = [
            block if side is None else np.block([[table, side[i]], [side[i].T, block]])
            for i, (table, block) in enumerate(zip(self._tables, corner, strict=True))
        ]

    def _kernel(self, parameters: Sequence[Tensor], rows: np.ndarray, columns: np.ndarray | None) -> Tensor:
        """``[S, O, S', O]``."""
        x2 = None if columns is None else self._x[columns]
        theta = self._engine.kernel(parameters, self._x[rows], x2)
        return theta.reshape(len(rows), self._engine.O, -1, self._engine.O)

    def _sums(self, thetas: Sequence[Tensor]) -> list[np.ndarray]:
        found = products(thetas)[: len(self._moments)]
        return [standard_errors.on_host(product.sum((1, 3))).astype(np.float64) for product in found]

    def read(self, metric: str) -> Reading:
        N, S = len(self._x), len(self._traces)
        pairs = N * (N - 1) / (S * (S - 1)) if S > 1 else 0.0
        own = [table.diagonal() for table in self._tables]
        off = [pairs * (table.sum() - d.sum()) for table, d in zip(self._tables, own, strict=True)]
        sums = [o + N / S * d.sum() for o, d in zip(off, own, strict=True)]
        moments = Moments(trace=N / S * self._traces.sum(), **dict(zip(self._moments, sums, strict=True)))
        value = float(moments.metric(metric))
        if S == N:
            return Reading(value, 0.0)
        # To first order the metric is a sum over pairs and a sum over samples.
        slopes = moments.gradient(metric)
        weights = [getattr(slopes, name) for name in self._moments]
        by_pair = N * (N - 1) * sum(w * table for w, table in zip(weights, self._tables, strict=True))
        by_sample = N * (sum(w * d for w, d in zip(weights, own, strict=True)) + slopes.trace * self._traces)
        return Reading(value, _error_of_pairs(by_pair, by_sample, N), S - 1)


def _error_of_pairs(by_pair: np.ndarray, by_sample: np.ndarray, N: int) -> float:
    """Standard error of mean_(b != c) H_bc + mean_b D_b over S samples of a population of N.

    With H_bc = mean + a_b + a_c + rest_bc (Hoeffding's decomposition) a sample contributes L_b = 2 a_b + D_b, whose
    variance counts with the correction 1 - S / N, and a pair its rest, with 1 - S (S - 1) / (N (N - 1)). The scatter of
    L over samples, as they are seen here, has the rests of their pairs in it, which are taken out first.
    """
    S = len(by_sample)
    off = by_pair - np.diag(by_pair.diagonal())
    means = off.sum(1) / (S - 1)
    effects = (S - 1) / (S - 2) * (means - means.mean())
    rest = off - means.mean() - effects[:, None] - effects
    np.fill_diagonal(rest, 0.0)
    of_pairs = (rest**2).sum() / (S * (S - 3))
    seen = (2 * means + by_sample).var(ddof=1)
    of_samples = seen - 4 * of_pairs / (S - 1)
    pairs, all_pairs, share = S * (S - 1), N * (N - 1), (1 - S / N) / S
    variance = share * of_samples + (1 - pairs / all_pairs) * 2 * of_pairs / pairs
    return math.sqrt(max(variance, share * seen / 4))  # a difference of estimates may be anything
