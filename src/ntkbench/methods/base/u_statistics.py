"""Estimators from inner products of J^T u or of J w, and their special case for the trace of each sample's block."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import array_api_compat
import numpy as np

from ntkbench import metrics, operations
from ntkbench.estimators import strata
from ntkbench.estimators.accumulators import (
    Accumulator,
    Kernel,
    PairBytes,
    StratifiedTrace,
    UStatistics,
    crossed_network_kernel,
    delta_method,
    least_probes,
    required_moments,
    shared_probe_kernel,
    with_squared_trace,
)
from ntkbench.estimators.standard_errors import MomentEstimates, PointEstimate
from ntkbench.estimators.strata import Choice
from ntkbench.methods.base.sides import Side, factor
from ntkbench.methods.base.stochastic import Accumulating, Ledger
from ntkbench.operators import Array, JacobianOperator, Rng, arrays
from ntkbench.options import Target
from ntkbench.problem import Problem


class GramMatrix(Accumulating):
    """The Gram matrix of A u over k random signs u, with A = J^T or J: 1 pass per probe, 2 for alignment.

    With y_i = A u_i, tr Theta = E mean_i ||y_i||^2 and ||Theta||_F^2 = E sum_(i != j) <y_i, y_j>^2 / (k (k - 1)). These
    and the cross term are unbiased; the square root and the ratios are biased at order 1/k. The effective rank is the
    ratio of sum_(i != j) ||y_i||^2 ||y_j||^2 to sum_(i != j) <y_i, y_j>^2, over the same pairs, so the weight that a
    pair gives to large eigenvalues cancels. With few probes, intervals contain the alignments of uneven batches too
    rarely.

    Attributes:
        side: ``reverse`` for A = J^T, ``forward`` for A = J.
    """

    source = (
        "this suite; U-statistics of Hoeffding 1948 (doi 10.1214/aoms/1177730196); Kong and Valiant 2017 (arXiv "
        "1602.00061) for spectral moments"
    )
    backends = ("torch", "jax")
    fewest_probes = 4
    few_degrees = 20
    order = 1.0
    side: ClassVar[Side]

    def passes_per_probe(self, metric: str) -> int:
        return 2 if metric == "alignment" else 1

    def jvp_share(self, metric: str) -> float:
        return float(self.side == "forward")

    def signs(self, problem: Problem, metric: str) -> int:
        return problem.n if self.side == "reverse" else problem.P

    def products(self, problem: Problem, metric: str, passes: float) -> float:
        probes = passes / self.passes_per_probe(metric)
        columns = problem.P if self.side == "reverse" else problem.n
        return operations.ends(metric) * operations.of_rows(probes, columns)

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """The smallest group; see :class:`ntkbench.estimators.accumulators.PairBytes`."""
        dim = problem.n if self.side == "forward" else None
        return _least_bytes(problem, metric, target, self._moments((metric,)), 1, dim)

    def accumulator(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> UStatistics:
        factors = [factor(j, self.side) for j in jacobians]

        def products(u: Array, _: slice) -> list[Array]:
            return [A.product(u)[:, None] for A in factors]

        A, dim = factors[0], max(each.image_dim for each in factors)
        kernel: Kernel = crossed_network_kernel if self.side == "forward" else shared_probe_kernel
        if "effective_rank" in names:
            kernel = with_squared_trace(kernel)
        moments = self._moments(names)
        return _GramStatistics(moments, 1, dim, jacobians, lambda k: rng.sign(k, A.dim), products, kernel)

    def _moments(self, names: Sequence[str]) -> tuple[str, ...]:
        moments = required_moments(names)
        if self.side == "forward":
            moments = tuple(moment for moment in moments if "difference" not in moment)
        return (*moments, "squared_trace") if "effective_rank" in names else moments


class _GramStatistics(UStatistics):
    """U-statistics in one stratum, with the effective rank by the jackknife over probes.

    On steep spectra a few pairs dominate the sums, and the delta method's standard error is too small with fewer than
    50 probes: its 95 % intervals have a coverage of 74 to 84 %. The jackknife of the logarithm, which also corrects the
    bias, counts the variance due to pairs twice. This variance is subtracted once, up to half of the jackknife's
    estimate.
    """

    _groups: tuple[np.ndarray, ...] = ()
    """Sums over the pairs of each probe in complete groups; see :meth:`_row_sums`."""

    def estimate(self, metric: str) -> PointEstimate:
        moments = self.moments()
        plain = delta_method(metric, self._names, moments)
        if metric != "effective_rank":
            return plain
        return jackknifed_rank(self._names, moments, self._left_out()) or plain

    def _close(self) -> None:
        if self._held and "squared_trace" in self._names:
            self._groups = (*self._groups, self._row_sums())
        super()._close()

    def _row_sums(self) -> np.ndarray:
        """Sums over the pairs of each probe of the open group, of the squared trace and the square: ``[2, K]``."""
        of = dict(zip((name for name in self._names if name != "trace"), self._table, strict=True))
        tables = [of[name][0, :, 0] for name in ("squared_trace", "square")]
        return np.array([table.sum(1) - table.diagonal() for table in tables])

    def _left_out(self) -> np.ndarray:
        """(tr Theta)^2 and ||Theta||_F^2 without each probe, ``[2, K]``."""
        groups = [*self._groups, *([self._row_sums()] if self._held else [])]
        sizes = [rows.shape[1] for rows in groups]
        # The mean over the pairs of a group of K counts K times.
        sums = [rows.sum(1, keepdims=True) / (size - 1) for rows, size in zip(groups, sizes, strict=True)]
        without = [
            (rows.sum(1, keepdims=True) - 2 * rows) / (size - 2) for rows, size in zip(groups, sizes, strict=True)
        ]
        total = sum(sums)
        return np.concatenate([total - own + rest for own, rest in zip(sums, without, strict=True)], axis=1)


def jackknifed_rank(names: Sequence[str], moments: MomentEstimates, left_out: np.ndarray) -> PointEstimate | None:
    """The effective rank with the jackknife of its logarithm; ``None`` if a leave-one-out estimate is not positive.

    Args:
        names: names of the moments, including ``squared_trace`` and ``square``.
        moments: from all K probes.
        left_out: the squared trace and the square without each probe, ``[2, K]``.
    """
    if not (left_out > 0).all():
        return None
    K = left_out.shape[1]
    logs = np.log(left_out[0] / left_out[1])
    means = dict(zip(names, moments.means.tolist(), strict=True))
    value = math.exp(K * math.log(means["squared_trace"] / means["square"]) - (K - 1) * logs.mean())
    jackknife = (K - 1) / K * ((logs - logs.mean()) ** 2).sum()
    slopes = np.zeros(len(names))
    for name, sign in (("squared_trace", 1), ("square", -1)):
        position = names.index(name)
        slopes[position] = sign / moments.means[position]
    pairs = float(slopes @ moments.double @ slopes)
    return PointEstimate(value, value * math.sqrt(max(jackknife - pairs, jackknife / 2)), K - 1)


class OneSidedPerSample(Accumulating):
    """The mean of sum_b ||A_b u_b||^2 over random signs u, with A_b = J_b^T or J_b: 1 pass per probe; unbiased.

    A one-sided probe takes the squared norm of the sum of all samples' gradients, so its cross-sample terms add noise.
    These have zero mean, and are dropped here: the squared norm of each sample's gradient is taken separately. The
    variance is 2 sum_b (||G_b||_F^2 - sum_i (G_b)_ii^2) / k for k probes, with G_b = A_b^T A_b. For the standard error,
    the variances of the samples are added up.

    Attributes:
        side: ``reverse`` for A_b = J_b^T, ``forward`` for A_b = J_b.
    """

    backends = ("torch", "jax")
    metrics = ("trace",)
    needs_independent_samples = True
    first_batch = 4
    side: ClassVar[Side]

    def passes_per_probe(self, metric: str) -> int:
        return 1

    def strata(self, problem: Problem, metric: str) -> int:
        return problem.N

    def signs(self, problem: Problem, metric: str) -> int:
        return problem.O if self.side == "reverse" else problem.P

    def jvp_share(self, metric: str) -> float:
        return float(self.side == "forward")

    def passes_per_jvp(self, j: JacobianOperator) -> int:
        return j.passes_per_jvp(by_sample=True)

    def accumulator(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> StratifiedTrace:
        (j,) = jacobians
        return per_sample_trace(j, rng) if self.side == "reverse" else _per_sample_trace_forward(j, rng)


def per_sample_trace(j: JacobianOperator, rng: Rng) -> StratifiedTrace:
    """||J_b^T u_b||^2 of each sample b over random signs u."""
    return StratifiedTrace(lambda k: j.sample_squares(rng.sign(k, j.n).reshape(k, j.N, j.O)), j.blocks)


def _per_sample_trace_forward(j: JacobianOperator, rng: Rng) -> StratifiedTrace:
    """||J_b w_b||^2 of each sample b over random signs w, with a tangent for each sample."""

    def squares(k: int) -> Array:
        w = rng.sign(k, j.N * j.P).reshape(k, j.N, j.P)
        return (j.sample_jvp(slice(0, j.N), w) ** 2).sum(-1)

    def blocks(probes: int) -> list[int]:
        size = max(1, j.memory // (j.bytes_per_probe() + 3 * j.N * j.P * j.itemsize))
        return [min(size, probes - start) for start in range(0, probes, size)]

    return StratifiedTrace(squares, blocks)


DEAR = 8.0
"""Operations of inner products, relative to those of passes, above which pooled estimators are faster; measured on
recurrent networks with 4 to 100 trials."""


def dear(strata: int) -> float:
    """:data:`DEAR` for few strata; more for many, as pooled estimators then need many more probes."""
    return max(DEAR, 2.0 * strata)


class StratifiedUStatistics(Accumulating):
    """U-statistics of the gradients of groups of samples: 1 pass per probe, 2 for alignment.

    A probe is a vector of random signs u. Group g of the samples has the gradient w_g^k = sum_(b in g) J_b^T u_b^k in
    probe k, and tr Theta = E mean_k sum_g ||w_g^k||^2. ||Theta||_F^2 = E [mean_(k, l) sum_(g != h) <w_g^k, w_h^l>^2 +
    mean_(k != l) sum_g <w_g^k, w_g^l>^2]; the cross term is analogous. All are unbiased; the square root and the ratios
    are biased at order 1/k. If only the trace is requested, it is estimated by :func:`per_sample_trace`, which takes no
    inner products.

    The variance and its estimate are those of :class:`ntkbench.estimators.standard_errors.PairSums`. Memory is bounded
    as in :class:`ntkbench.estimators.accumulators.UStatistics`.

    Attributes:
        max_gradients: largest number of gradients in a default budget; beyond about a thousand, their inner products,
            which have quadratic cost, take most of the time.
    """

    source = "this suite; U-statistics of Hoeffding 1948 (doi 10.1214/aoms/1177730196)"
    backends = ("torch", "jax")
    needs_independent_samples = True
    order = 1.0
    max_gradients: ClassVar[int] = 1024

    @abstractmethod
    def groups(self, N: int) -> int:
        """Number of groups of N samples."""

    def strata(self, problem: Problem, metric: str) -> int:
        return problem.N if metric == "trace" else self.groups(problem.N)

    def signs(self, problem: Problem, metric: str) -> int:
        return math.ceil(problem.n / self.strata(problem, metric))

    @abstractmethod
    def gradients(self, j: JacobianOperator, groups: Sequence[slice], v: Array) -> Array:
        """Gradients of adjacent groups, ``v [k, samples, O] -> [k, groups, P]``."""

    def default_max_passes(self, problem: Problem) -> int:
        return max(16, self.max_gradients // self.groups(problem.N))

    def passes_per_probe(self, metric: str) -> int:
        return 2 if metric == "alignment" else 1

    def products(self, problem: Problem, metric: str, passes: float) -> float:
        if metric == "trace":
            return 0.0
        gradients = passes / self.passes_per_probe(metric) * self.groups(problem.N)
        return operations.ends(metric) * operations.of_rows(gradients, problem.P)

    def probes_to_reach(self, problem: Problem, metric: str, error: float) -> float:
        return least_probes(metric, self.groups(problem.N), problem.n, error)

    def worthwhile_probes(self, problem: Problem) -> float:
        """K at which inner products, (K g)^2 P operations, take :func:`dear` times the operations of the passes."""
        g = self.groups(problem.N)
        return dear(g) * operations.of_pass(problem) / (g**2 * problem.P)

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """The smallest group; see :class:`ntkbench.estimators.accumulators.PairBytes`."""
        return _least_bytes(problem, metric, target, required_moments((metric,)), self.groups(problem.N))

    def accumulator(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> Accumulator:
        j = jacobians[0]
        if tuple(names) == ("trace",):
            return per_sample_trace(j, rng)
        count = self.groups(j.N)
        groups = arrays.chunks(j.N, count)

        def gradients(u: Array, chosen: slice) -> list[Array]:
            some = groups[chosen]
            v = u.reshape(-1, j.N, j.O)[:, some[0].start : some[-1].stop]
            return [self.gradients(jacobian, some, v) for jacobian in jacobians]

        dim, stratum = max(each.P for each in jacobians), "sample" if count == j.N else "group"
        moments = required_moments(names)

        def made(exact: np.ndarray, rows: Sequence[Array]) -> UStatistics:
            def sign(k: int) -> Array:
                u = rng.sign(k, j.n)
                return u * _elsewhere(exact, j, u) if len(exact) else u

            return UStatistics(moments, count, dim, jacobians, sign, gradients, stratum=stratum, beside=rows)

        def rows(exact: np.ndarray) -> list[Array]:
            like = j.basis(0, 1)
            xp = array_api_compat.array_namespace(like)
            unit = xp.asarray(np.eye(j.O), dtype=like.dtype, device=array_api_compat.device(like))[:, None]
            parts = [slice(b, b + 1) for b in exact.tolist()]
            return [xp.concat([self.gradients(each, [part], unit)[:, 0] for part in parts]) for each in jacobians]

        def shares() -> np.ndarray:
            u = rng.sign(1, j.n).reshape(1, j.N, j.O)
            traces = [arrays.to_numpy(each.sample_squares(u), np.float64)[0] for each in jacobians]
            return np.mean([found / (found.sum() or 1.0) for found in traces], axis=0)

        most = j.memory // (ROWS * len(jacobians) * j.O * dim * j.itemsize)
        return OutliersApart(j.N, j.O, made, shares, rows, min(j.N // 2, most))


ROWS = 8
"""Smallest ratio of the memory to the rows of the exact samples."""


def _elsewhere(exact: np.ndarray, j: JacobianOperator, like: Array) -> Array:
    """``[n]``, 0 for the outputs of some samples and 1 for all others."""
    xp = array_api_compat.array_namespace(like)
    kept = np.repeat(~np.isin(np.arange(j.N), exact), j.O)
    return xp.asarray(kept, dtype=like.dtype, device=array_api_compat.device(like))


class OutliersApart(Accumulator):
    """U-statistics in which the samples that have most of the trace are treated exactly, if these are few.

    If there are at least :data:`LEAST_WITH_PILOT` probes, one is spent on the samples' shares of the trace. An exact
    sample takes O / N of a pass, once. If there are exact samples, probes that were drawn before are discarded.

    Args:
        N: samples.
        O: outputs of a sample.
        made: makes the U-statistics of all samples but the exact ones, from their indices and rows of J.
        shares: estimates the shares of the trace by one probe, ``[N]``.
        rows: computes the rows of J of some samples, for each operator.
        max_exact: maximum number of exact samples.
    """

    def __init__(
        self,
        N: int,
        O: int,  # noqa: E741 - the field's symbol
        made: Callable[[np.ndarray, Sequence[Array]], UStatistics],
        shares: Callable[[], np.ndarray],
        rows: Callable[[np.ndarray], list[Array]],
        max_exact: int,
    ) -> None:
        self._N, self._O, self._made, self._shares, self._rows = N, O, made, shares, rows
        self._max_exact, self._drawn, self._choice = max_exact, 0, Choice()
        self._inner = made(np.arange(0), ())
        self.least = self._inner.least
        self._found: np.ndarray | None = None
        self._left = 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self._choice.notes("sample"), *self._inner.notes) if self._choice else self._inner.notes

    @property
    def uneven(self) -> bool:
        return self._inner.uneven

    def extend(self, probes: int) -> None:
        passes = probes + self._left
        worth = self._N > strata.UNEVEN and self._max_exact > 0 and self._drawn + probes >= LEAST_WITH_PILOT
        if worth and not self._choice and probes > 1 + self.least and not self._inner.in_chunks:
            if self._found is None:
                self._found = self._shares()
                passes -= 1
            chosen = strata.choose(
                self._found,
                passes,
                lambda k: k + self._O,
                max_probes=probes,
                max_exact=self._max_exact,
                drawn=self._drawn,
            )
            if chosen:
                self._choice = replace(chosen, of="the trace")
                passes -= len(chosen) * self._O / self._N
                self._inner = self._made(chosen.exact, self._rows(chosen.exact))
        self._drawn += int(passes)
        self._left = passes - int(passes)
        self._inner.extend(int(passes))

    def pairs(self, probes: int) -> float:
        return self._inner.pairs(probes)

    @property
    def recompute_factor(self) -> float:
        """See :attr:`ntkbench.estimators.accumulators.UStatistics.recompute_factor`."""
        return self._inner.recompute_factor

    def moments(self) -> MomentEstimates:
        """See :meth:`ntkbench.estimators.accumulators.UStatistics.moments`."""
        return self._inner.moments()

    def estimate(self, metric: str) -> PointEstimate:
        return self._inner.estimate(metric)

    def complement(self) -> float | None:
        return self._inner.complement()


LEAST_WITH_PILOT = 8
"""Smallest number of probes with which one is spent on the choice of exact samples."""


def _least_bytes(
    problem: Problem, metric: str, target: Target, moments: Sequence[str], strata: int, dim: int | None = None
) -> int:
    """Bytes of the smallest group of U-statistics of vectors of ``dim`` numbers; ``None`` for gradients."""
    ends = [problem.end(name)[0] for name in metrics.parameter_sets(metric)]
    tables = len(moments) - (moments[0] == "trace")
    return PairBytes(strata, len(ends), tables, target.itemsize, dim or max(each.P for each in ends)).least()


def with_notes(ledger: Ledger, accumulator: Accumulator) -> Ledger:
    """A ledger whose notes are followed by those of an accumulator."""

    def both() -> tuple[float, tuple[str, ...], float | None]:
        spent, notes, certificate = ledger()
        return spent, (*notes, *accumulator.notes), certificate

    return both
