"""Base classes of projected gradients: features J S with a random S, and what their inner products estimate."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import array_api_compat
import numpy as np

from ntkbench import metrics
from ntkbench.errors import Undefined, Unsupported
from ntkbench.estimate import Estimate
from ntkbench.estimators import accumulators, projections
from ntkbench.estimators.projections import Features, Heaviest
from ntkbench.estimators.standard_errors import PointEstimate, mean
from ntkbench.methods.base.method import PreparedProblem, certificate, notes, rounding
from ntkbench.methods.base.stochastic import Ledger, Stochastic, check_enough
from ntkbench.methods.base.u_statistics import jackknifed_rank
from ntkbench.operators import Array, JacobianOperator, arrays
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.units import counted, percent_label

TABLES = 6
"""Tables of all pairs of replicates that are held for each moment."""
COMBINED = 4
"""Random combinations of the rows of J that show by how much each column differs at two parameter sets."""


class Projected(Stochastic):
    """Metrics from k random features of each row of J, ``Phi = J S``, with the same S at all sets of weights.

    The budget is k for each set of weights. The features take the O passes of the rows of J for any k, so fewer passes
    are spent than budgeted if k > O. A larger k costs multiplications, memory and time instead, as each method states.

    S has R independent parts; see :mod:`ntkbench.estimators.projections`. tr Theta = E mean_i ||Phi_i||_F^2,
    ||Theta||_F^2 = E sum_(i != j) ||Phi_i^T Phi_j||_F^2 / (R (R - 1)), and the cross term is analogous. All are
    unbiased; the square root and the ratios are biased at order 1/k. The standard error is that of
    :class:`ntkbench.estimators.standard_errors.PairSums`, or, for the effective rank, that of a jackknife over the
    parts. The published value is the norm of the Gram matrix, which also includes the pairs i = j. Its square is too
    large by the variance of the matrix, which is about (tr Theta)^2 / k for dense signs.
    """

    needs_one_network = True
    fewest_probes = 4

    @abstractmethod
    def features(
        self, prepared: Any, metric: str, k: int, seed: int, *, replicates: int | None = None
    ) -> tuple[list[Features], Ledger]:
        """Features at each set of weights of a metric, ``[R, n, w]`` with R w <= k, in the order of the rows of J.

        Args:
            prepared: the result of :meth:`prepare`.
            metric: gives the sets of weights.
            k: number of features of a row.
            seed: seed of S.
            replicates: R, by default the method's choice; 1 for a projection as it was published.

        Returns:
            The features, and a ledger of their cost.
        """

    @abstractmethod
    def rounding(self, prepared: Any, metric: str, certified: float | None) -> float:
        """A bound on the rounding error of a metric."""

    @abstractmethod
    def parts(self, k: int) -> int:
        """R for k features of a row."""

    def observed(self, prepared: Any, metric: str, k: int, seed: int) -> tuple[list[Features], Ledger, str]:
        """The result of :meth:`features`, and why its replicates may agree by chance; empty if they do not."""
        return *self.features(prepared, metric, k, seed), ""

    def passes_per_probe(self, metric: str) -> int:
        return len(metrics.parameter_sets(metric))

    def least_passes(self, problem: Problem, metric: str) -> int:
        return self.cost(metric, max(self.fewest_probes, problem.O))

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """The features, in their own precision and in float64, and the tables of pairs of replicates."""
        k = self.probes(metric, self.default_passes if passes is None else passes)
        tables = 0 if metric == "trace" else self.parts(k) ** 2 * len(accumulators.required_moments([metric]))
        return len(metrics.parameter_sets(metric)) * problem.n * k * (target.itemsize + 8) + TABLES * 8 * tables

    def spend(self, prepared: Any, metric: str, passes: int, seed: int) -> Estimate:
        k = self.probes(metric, passes)
        features, ledger, missed = self.observed(prepared, metric, k, seed)
        try:
            point, complement = estimated(metric, features)
        except Undefined:
            if missed:
                raise Undefined(f"the {metrics.words(metric)} cannot be estimated: {missed}") from None
            check_enough((metric,), len(features[0]))
            raise
        value, error, degrees = self.with_unknown_error(
            prepared, metric, point, lambda: len(features[0]) - 1, complement
        )
        spent, remarks, found = ledger()
        if missed:
            error, degrees = math.nan, 0.0
            remarks = (*remarks, f"unknown error: {missed}")
        bound = self.rounding(prepared, metric, found)
        return Estimate(value, error, spent, self.name, remarks, metric, degrees, found, complement, bound)


def estimated(metric: str, features: Sequence[Features]) -> tuple[PointEstimate, float | None]:
    """A metric from the features at each of its sets of weights, and 1 - alignment for an alignment."""
    names, tables, traces = projections.pair_tables(metric, features)
    if metric == "trace":
        return mean(traces), None
    found = projections.moments(names, tables, traces)
    plain = accumulators.delta_method(metric, names, found)
    if metric == "effective_rank":
        without = np.array([projections.left_out(tables[name]) for name in ("squared_trace", "square")])
        return jackknifed_rank(names, found, without) or plain, None
    means = dict(zip(names, found.means.tolist(), strict=True))
    return plain, accumulators.complement(means) if metric == "alignment" else None


Sketch = Callable[[Array], Array]
"""Rows of J, ``[r, P]`` -> their features, ``[r, R, w]``."""


class ProjectedRows(Projected):
    """Features from the rows of J, which are computed in blocks, projected and discarded."""

    needs_independent_samples = True

    def signs(self, problem: Problem, metric: str) -> int:
        return problem.P

    @abstractmethod
    def sketch(self, j: JacobianOperator, k: int, seed: int, replicates: int | None) -> Sketch:
        """A projection of rows of length ``j.P``; equal arguments give the same one at all sets of weights."""

    def features(
        self, prepared: PreparedProblem, metric: str, k: int, seed: int, *, replicates: int | None = None
    ) -> tuple[list[Features], Ledger]:
        return self._projected(prepared.jacobians(metric), k, seed, replicates)

    def _projected(
        self,
        jacobians: Sequence[JacobianOperator],
        k: int,
        seed: int,
        replicates: int | None = None,
        columns: Sequence[_Columns] = (),
    ) -> tuple[list[Features], Ledger]:
        """:meth:`features`, and the columns of each J if they are asked for."""
        if k < jacobians[0].O:
            raise Unsupported(f"{self.name}: k must be at least {jacobians[0].O}, the passes of all rows of J; got {k}")
        found = [
            _project_rows(j, self.sketch(j, k, seed, replicates), columns[i] if columns else None)
            for i, j in enumerate(jacobians)
        ]
        return found, lambda: (sum(j.passes for j in jacobians), notes(jacobians), certificate(jacobians))

    def rounding(self, prepared: PreparedProblem, metric: str, certified: float | None) -> float:
        return rounding(prepared.jacobians(metric), metric, certified)


class HashedRows(ProjectedRows):
    """CountSketches of the rows of J: blocks of features, in each of which a kept parameter has one random sign.

    Blocks are independent, so they serve as replicates for the unbiased estimates and their standard errors.

    Attributes:
        nonzeros: number of blocks.
        kept: number of random parameters kept for each feature of a block; ``None`` to keep all.
    """

    backends = ("torch",)
    nonzeros: ClassVar[int]
    kept: ClassVar[int | None] = None

    def parts(self, k: int) -> int:
        return self.nonzeros

    def observed(self, prepared: PreparedProblem, metric: str, k: int, seed: int) -> tuple[list[Features], Ledger, str]:
        """See :class:`Projected`; masks may all miss parameters that have much of the gradient.

        The sums of squares of all columns of J show this, since a column's share of the trace limits its share of the
        other moments; see :func:`ntkbench.estimators.projections.missed`. They take n P additions for each set of
        weights, and the differences of an alignment take n P :data:`COMBINED`.
        """
        jacobians = prepared.jacobians(metric)
        P = jacobians[0].P
        kept = self._of_all(P, k // self.nonzeros)
        if kept == P:
            return super().observed(prepared, metric, k, seed)
        columns = [_Columns(j, COMBINED if metric == "alignment" else 0) for j in jacobians]
        features, ledger = self._projected(jacobians, k, seed, columns=columns)
        terms = {"the trace": columns[0].squares()}
        if metric == "alignment":
            terms["the other trace"] = columns[1].squares()
            terms["the change of the kernel"] = columns[1].changes(columns[0])
        hits = projections.KEPT_ONCE if metric == "trace" else projections.KEPT_TWICE
        for name, each in terms.items():
            if found := projections.missed(each, kept, self.nonzeros, hits):
                return features, ledger, _missed(name, found, self.nonzeros * kept / P)
        return features, ledger, ""

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """The features, the signs, the indices of the kept parameters, which are drawn from all, and their columns."""
        features = super().bytes_needed(problem, metric, target, passes)
        if self.kept is None:
            return features + self.nonzeros * (2 * problem.P + HASHING * min(problem.P, CHUNK))
        k = self.probes(metric, self.default_passes if passes is None else passes)
        kept = self._of_all(problem.P, k // self.nonzeros)
        columns = 0 if kept == problem.P else 2 * (1 + COMBINED) if metric == "alignment" else 1
        drawn = 10 * self.nonzeros * kept + 8 * problem.P + HASHING * min(kept, CHUNK)
        return features + drawn + columns * problem.P * target.itemsize

    def sketch(self, j: JacobianOperator, k: int, seed: int, replicates: int | None) -> Sketch:
        blocks = replicates or self.nonzeros
        width = k // blocks
        return hashed(j, blocks, width, seed, None if self.kept is None else self._of_all(j.P, width))

    def _of_all(self, P: int, width: int) -> int:
        """Number of parameters that are kept for all features of a block."""
        return min(P, (self.kept or P) * width)


class _Columns:
    """Sums over the rows of J for each parameter, from blocks of rows.

    Args:
        j: the operator.
        combined: number of random combinations of the rows, the same at all parameter sets.
    """

    def __init__(self, j: JacobianOperator, combined: int) -> None:
        zero = j.basis(0, 1)
        self._squares = zero.new_zeros(j.P)
        self._signs = j.rng(0).sign(combined, j.n) if combined else None
        self._combined = zero.new_zeros(combined, j.P)

    def add(self, rows: Array, numbers: np.ndarray) -> None:
        """Add rows ``[r, P]``, given their numbers ``[r]``."""
        import torch

        self._squares += torch.linalg.vector_norm(rows, dim=0) ** 2
        if self._signs is not None:
            self._combined += self._signs[:, torch.from_numpy(numbers).to(rows.device)] @ rows

    def squares(self) -> np.ndarray:
        """Sum of squares of each column, ``[P]``."""
        return arrays.to_numpy(self._squares, np.float64)

    def changes(self, before: _Columns) -> np.ndarray:
        """Effect of each column's change on the kernel, up to a factor: its estimated norm times that of the column."""
        changed = ((self._combined - before._combined) ** 2).mean(0)
        sizes = np.maximum(self.squares(), before.squares())
        return np.sqrt(arrays.to_numpy(changed, np.float64) * sizes)


def _missed(name: str, heaviest: Heaviest, share: float) -> str:
    parameters = counted(heaviest.number, "parameter")
    return (
        f"{percent_label(heaviest.share)} of {name} is due to {parameters}, and the expected number of these in all "
        f"masks is {heaviest.number * share:.1f}"
    )


def _project_rows(j: JacobianOperator, sketch: Sketch, columns: _Columns | None = None) -> Features:
    features: np.ndarray | None = None
    for rectangle in j.rectangles(0.5):
        rows = j.sample_rows(*rectangle)
        if columns is not None:
            columns.add(rows, j.row_numbers(*rectangle))
        made = arrays.to_numpy(sketch(rows), np.float64)
        features = np.empty((j.n, *made.shape[1:])) if features is None else features
        features[j.row_numbers(*rectangle)] = made
    assert features is not None  # there is at least one rectangle
    return features.transpose(1, 0, 2)


def signs(j: JacobianOperator, k: int, seed: int) -> Sketch:
    """A dense projection by k columns of random signs, each a replicate; they are redrawn for each block of rows."""
    size = max(1, j.memory // (4 * j.P * j.itemsize))

    def sketch(rows: Array) -> Array:
        rng, xp = j.rng(seed), array_api_compat.array_namespace(rows)
        sizes = [min(size, k - start) for start in range(0, k, size)]
        return xp.concat([rows @ rng.sign(each, j.P).T for each in sizes], axis=1)[:, :, None]

    return sketch


CHUNK = 2**15
"""Entries that are hashed at a time; the index of an entry and its sign fit in 16 bits."""
HASHING = 56
"""Bytes that are held for an entry while it is hashed."""


def hashed(j: JacobianOperator, replicates: int, width: int, seed: int, kept: int | None = None) -> Sketch:
    """CountSketches: each of the P entries goes with a random sign to one of ``width`` features of each replicate.

    Holds 2 bytes for each entry and replicate.

    If ``kept`` is given, only that many random entries of each replicate are used, multiplied by the square root of
    P / ``kept``.
    """
    import torch

    like = j.basis(0, 1)
    generator = torch.Generator(like.device).manual_seed(seed)
    if kept is None:
        return _count_sketches(j.P, replicates, width, like, generator)
    rng, parts = np.random.default_rng(seed), []
    for _ in range(replicates):
        entries = torch.from_numpy(rng.choice(j.P, kept, replace=False, shuffle=False)).to(like.device)
        parts.append((entries, _count_sketches(kept, 1, width, like, generator)))
    return lambda rows: torch.cat([part(rows[:, some]) for some, part in parts], 1) * math.sqrt(j.P / kept)


def _count_sketches(P: int, replicates: int, width: int, like: Array, generator: Any) -> Sketch:
    import torch

    device, tables = like.device, []
    for start in range(0, P, CHUNK):
        size = (replicates, min(CHUNK, P - start))
        features = torch.randint(width, size, generator=generator, device=device)
        features += width * torch.arange(replicates, device=device)[:, None]
        entries = torch.arange(size[1], device=device)
        signed = torch.where(torch.randint(2, size, generator=generator, device=device) > 0, entries, ~entries)
        # A sparse matrix [R w, entries] by rows: the entries sorted by their feature.
        order = features.reshape(-1).argsort(stable=True)
        ends = torch.bincount(features.reshape(-1), minlength=replicates * width).cumsum(0)
        tables.append((torch.nn.functional.pad(ends, (1, 0)).int(), signed.reshape(-1)[order].short()))

    def sketch(rows: Array) -> Array:
        found = rows.new_zeros(replicates * width, len(rows))
        for part, (ends, signed) in zip(rows.split(CHUNK, 1), tables, strict=True):
            entries, values = torch.where(signed < 0, ~signed, signed).int(), torch.where(signed < 0, -1.0, 1.0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch warns that such matrices are new
                size = (replicates * width, part.shape[1])
                matrix = torch.sparse_csr_tensor(ends, entries, values.to(rows.dtype), size, check_invariants=False)
            found += matrix @ part.T.contiguous()
        return found.T.reshape(len(rows), replicates, width)

    return sketch
