"""Accumulators draw probes in batches and estimate any metric, with its standard error, from all probes so far."""

from __future__ import annotations

import bisect
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import array_api_compat
import numpy as np

from ntkbench.errors import OverMemory
from ntkbench.estimate import SCALES
from ntkbench.estimators import standard_errors, strata
from ntkbench.estimators.standard_errors import MomentEstimates, PairSums, PointEstimate
from ntkbench.metrics import MOMENTS, Moments
from ntkbench.operators import Array, JacobianOperator, arrays
from ntkbench.units import bytes_label


def required_moments(metrics: Sequence[str]) -> tuple[str, ...]:
    """Moments that the metrics depend on, in the order of :class:`ntkbench.metrics.Moments`."""
    needed = {moment for metric in metrics for moment in MOMENTS[metric]}
    return tuple(moment for moment in Moments.__dataclass_fields__ if moment in needed)


class Accumulator(ABC):
    """Estimates of metrics from a growing number of probes.

    Attributes:
        least: smallest number of probes that can be added at once.
    """

    least: int = 1

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user on how the probes were drawn."""
        return ()

    @property
    def uneven(self) -> bool:
        """Whether a few strata have most of the estimated quantity, and none of them is treated exactly."""
        return False

    def pairs(self, probes: int) -> float:
        """Effective number of pairs of independent parts of the probes so far, of which there are ``probes``.

        See :data:`ntkbench.estimators.standard_errors.ALIKE`.
        """
        return probes - 1

    @abstractmethod
    def extend(self, probes: int) -> None:
        """Draw this number of further probes."""

    @abstractmethod
    def estimate(self, metric: str) -> PointEstimate:
        """The metric, from all probes so far."""

    def complement(self) -> float | None:
        """1 - alignment without cancellation; ``None`` if the difference of the kernels is not available."""
        return None


class ProbeMeans(Accumulator):
    """Means over independent probes, each of which estimates every moment, with jackknife standard errors.

    Args:
        moments: names of the moments.
        draw: draws a number of probes and returns their estimates, ``[k]`` for each moment.
        blocks: splits a number of probes into sizes of blocks that fit in memory.
    """

    def __init__(
        self,
        moments: Sequence[str],
        draw: Callable[[int], Sequence[Array]],
        blocks: Callable[[int], Sequence[int]],
    ) -> None:
        self._draw, self._blocks = draw, blocks
        self._drawn: dict[str, list[Array]] = {moment: [] for moment in moments}

    def extend(self, probes: int) -> None:
        for k in self._blocks(probes):
            for drawn, column in zip(self._drawn.values(), self._draw(k), strict=True):
                drawn.append(column)

    def estimate(self, metric: str) -> PointEstimate:
        columns = [arrays.gather(self._drawn[moment]) for moment in MOMENTS[metric]]
        if metric == "trace":
            return standard_errors.mean(*columns)
        return standard_errors.jackknife(
            lambda *means: Moments(**dict(zip(MOMENTS[metric], means, strict=True))).metric(metric), *columns
        )

    def complement(self) -> float | None:
        return complement({moment: float(arrays.gather(drawn).mean()) for moment, drawn in self._drawn.items()})


class StratifiedTrace(Accumulator):
    """The trace from probes that estimate the trace of each sample's own block of Theta separately.

    If few samples have most of the trace, :data:`FEWER` degrees of freedom count. A few probes of these samples may
    agree by chance. The other samples then do not show the error, so it is unknown.

    Args:
        draw: draws a number of probes and returns their estimates, ``[k, N]``.
        blocks: splits a number of probes into sizes of blocks that fit in memory.
        of: name of the trace in notes.
    """

    def __init__(
        self, draw: Callable[[int], Array], blocks: Callable[[int], Sequence[int]], of: str = "the trace"
    ) -> None:
        self._draw, self._blocks, self._of = draw, blocks, of
        self._drawn: list[Array] = []

    @property
    def notes(self) -> tuple[str, ...]:
        return strata.Choice(uneven=self.uneven, of=self._of).notes("sample")

    @property
    def uneven(self) -> bool:
        if not self._drawn:
            return False
        table = arrays.gather(self._drawn)
        value, error, _ = standard_errors.stratified_mean(table)
        return strata.are_uneven(table.sum(0)) and not standard_errors.is_rounding(error, value, self._epsilon)

    def pairs(self, probes: int) -> float:
        table = arrays.gather(self._drawn)
        traces = table.sum(0)
        # If all are zero, one of the samples may have all of the trace, and the probes may have missed it.
        return (len(table) - 1) * (strata.effective_number(traces) if traces.any() else 1.0)

    def extend(self, probes: int) -> None:
        self._drawn += map(self._draw, self._blocks(probes))

    def estimate(self, metric: str) -> PointEstimate:
        table = arrays.gather(self._drawn)
        found = standard_errors.stratified_mean(table)
        if not self.uneven:
            return found
        found = found._replace(degrees=FEWER * found.degrees)
        heavy = table[:, table.sum(0) > standard_errors.HEAVY * table.sum()]
        own, pairs = standard_errors.stratified_mean(heavy), (len(table) - 1) * heavy.shape[1]
        alike = heavy.size and math.isnan(standard_errors.unless_alike(own, pairs, self._epsilon).standard_error)
        return found._replace(standard_error=math.nan) if alike else found

    @property
    def _epsilon(self) -> float:
        return arrays.epsilon(self._drawn[0])


Vectors = Callable[[Array, slice], Sequence[Array]]
"""Probes and a slice of strata -> their vectors ``[k, strata, D]``, one array per operator."""

Kernel = Callable[[Sequence[Array], Sequence[Array]], Sequence[Array]]
"""Kernel of a U-statistic of degree 2.

Takes two sets of vectors, ``[r, D]`` and ``[r', D]`` for each operator, and returns ``[r, r']`` for each moment except
the trace. Two sets that are the same object may be treated as symmetric.
"""


MIN_GROUP = 4
"""Smallest number of probes in a group: with fewer, the variance has no unbiased estimate."""

SPARE = 1
"""Probes beyond the smallest group that there is room for if a group is processed in chunks."""


@dataclass(frozen=True)
class PairBytes:
    """Bytes that probes and their pairs take, with intermediate copies.

    Attributes:
        strata: N.
        operators: number of networks.
        moments: number of moments with a table of pairs: all but the trace. If 0, no vectors are kept.
        itemsize: bytes of one number of a vector.
        dim: numbers in a vector; 0 if vectors are not written out.
    """

    strata: int
    operators: int
    moments: int
    itemsize: int
    dim: int = 0

    @property
    def entry(self) -> int:
        """Bytes of an entry of the tables of all moments, with intermediate copies."""
        return self.operators * (2 * self.itemsize + 8) + 3 * 8 * self.moments

    def vectors(self, probes: int, strata: int) -> int:
        """Bytes of vectors, and of the blocks that they are copied from."""
        return 2 * self.operators * strata * self.dim * self.itemsize * probes * bool(self.moments)

    def tables(self, probes: int, rows: int) -> int:
        """Bytes of the tables of ``rows`` rows and columns, and of the sums over pairs of probes.

        Inner products of vectors are copied once, and again in float64. Their products are copied when probes are
        added, and when they are summed. :class:`PairSums` takes up to five copies of the strata's own pairs.
        """
        return (self.entry * rows**2 + 5 * 8 * self.moments * self.strata * probes**2) * bool(self.moments)

    def whole(self, probes: int) -> int:
        """Bytes of probes whose vectors and tables are all kept."""
        return self.vectors(probes, self.strata) + self.tables(probes, self.strata * probes)

    def recomputed(self, probes: int, strata: int) -> int:
        """Bytes of two chunks of strata, one of them with the block that it is copied from, and of their tables."""
        return 3 * self.vectors(probes, strata) // 2 + self.tables(probes, strata * probes)

    def least(self, min_group: int = MIN_GROUP) -> int:
        """Fewest bytes that a group of ``min_group`` or more probes can take."""
        return min(self.whole(min_group), self.recomputed(min_group + SPARE, 1))

    def most_probes(self, memory: int, limit: int) -> int:
        """The largest number of probes, up to a limit, that fits in memory as a whole; 0 if none fits."""
        return largest(self.whole, memory, limit)


def largest(needed: Callable[[int], int], memory: int, limit: int) -> int:
    """The largest number from 0 to ``limit`` whose need, which grows with it, is at most ``memory``."""
    return bisect.bisect_right(range(1, limit + 1), memory, key=needed)


class UStatistics(Accumulator):
    """U-statistics of degree 2: any two probes estimate the moments of Theta^2.

    A probe has N independent parts (strata): one for each group of samples, or a single one (N = 1). Part b of probe k
    gives a vector w_b^k of D dimensions with E <w_b^k, w_c^l>^2 = ||Theta_bc||_F^2 unless b = c and k = l. So
    sum_b ||w_b^k||^2 is unbiased for the trace. ||Theta||_F^2 is the sum over b and c of the mean of
    <w_b^k, w_c^l>^2 over all pairs of probes (k, l), over k != l where b = c.

    The vectors and the tables of their pairs are kept, up to ``memory`` bytes of the operators; see :class:`PairBytes`.
    Probes beyond that start a new group, and pairs are taken within a group only. If not even ``min_group`` probes fit,
    each group is processed in pairs of chunks of strata, whose tables are not kept. If its vectors take more than half
    of the memory, or leave no room for tables, they are recomputed for each pair of chunks, which costs passes. The
    trace alone keeps nothing.

    Args:
        moments: names of the moments: some of ``trace`` and ``square``, or all but the trace, or all.
        strata: N.
        dim: D; the largest if operators differ in it.
        jacobians: the operators; one, or two for alignment.
        sign: draws a number of probes.
        vectors: see :data:`Vectors`.
        kernel: see :data:`Kernel`.
        min_group: minimum number of probes in a group.
        max_vectors: maximum number of vectors in a group. The Gram matrix of more vectors costs much more than the
            vectors themselves and gains little.
        stratum: name of a stratum in notes, in the singular.
        beside: rows of J of the samples that are treated exactly, ``[r, D]`` for each operator; the probes do not
            depend on these samples. Not allowed if vectors are processed in chunks.
    """

    def __init__(
        self,
        moments: Sequence[str],
        strata: int,
        dim: int,
        jacobians: Sequence[JacobianOperator],
        sign: Callable[[int], Array],
        vectors: Vectors,
        kernel: Kernel | None = None,
        *,
        min_group: int = MIN_GROUP,
        max_vectors: int = 2048,
        stratum: str = "sample",
        beside: Sequence[Array] = (),
    ) -> None:
        self._names, self._strata, self._jacobians = tuple(moments), strata, jacobians
        self._sign, self._vectors, self._kernel = sign, vectors, kernel or shared_probe_kernel
        self._min_group, self._max_vectors, self._stratum, self._beside = min_group, max_vectors, stratum, beside
        self._bytes = PairBytes(strata, len(jacobians), len(moments) - self._has_trace, jacobians[0].itemsize, dim)
        memory = jacobians[0].memory
        self.max_group = max(min_group, self._bytes.most_probes(memory, max_vectors // strata))
        self._chunks, self._keeps = self._arranged(memory)
        self.least = math.ceil(min_group * self.recompute_factor) if len(self._chunks) > 1 else 1
        self._closed: list[tuple[int, MomentEstimates]] = []
        self._strata_sums = [np.zeros((strata, 1, 1, 1)) for _ in range(self._bytes.moments)]  # of tables not kept
        self._clear()

    def _arranged(self, memory: int) -> tuple[list[slice], bool]:
        """Chunks of strata, and whether the vectors of all of them are kept."""
        if self._bytes.whole(self._min_group) <= memory:
            return [slice(0, self._strata)], True
        probes = self._min_group + SPARE
        held = self._bytes.vectors(probes, self._strata)

        def kept(size: int) -> int:
            return held + self._bytes.tables(probes, size * probes)

        size = largest(kept, memory, self._strata) if 2 * held <= memory else 0
        keeps = size > 0
        if not keeps:
            size = max(1, largest(functools.partial(self._bytes.recomputed, probes), memory, self._strata))
        return arrays.chunks(self._strata, -(-self._strata // size)), keeps

    @property
    def notes(self) -> tuple[str, ...]:
        return strata.Choice(uneven=self.uneven).notes(self._stratum)

    @property
    def uneven(self) -> bool:
        tables = self._table or self._strata_sums
        return bool(tables) and strata.are_uneven(strata.shares(tables))

    @property
    def recompute_factor(self) -> float:
        """Passes per probe, relative to those of a probe whose vectors are kept."""
        if self._keeps:
            return 1.0
        sizes = [chunk.stop - chunk.start for chunk in self._chunks]
        return sum(size * (len(sizes) - i) for i, size in enumerate(sizes)) / self._strata

    def extend(self, probes: int) -> None:
        """Draw probes; if vectors are recomputed, as many as the passes of ``probes`` kept ones allow.

        Raises:
            OverMemory: the vectors have to be recomputed, and the passes are not enough for one group.
        """
        if len(self._chunks) > 1:
            return self._extend_in_chunks(probes)
        if self._count and self._count < self.max_group:
            k = min(probes, self.max_group - self._count)
            self._grow(k)
            probes -= k
        if probes < (self._min_group if self._count or self._closed else 1):
            return None  # too few for a group of their own
        count = -(-probes // self.max_group)
        if count > 1 and probes // count < self._min_group:
            count -= 1
            probes = count * self.max_group
        for i in range(count):
            self._close()
            self._grow(probes // count + (i < probes % count))
        return None

    def _extend_in_chunks(self, probes: int) -> None:
        affordable = int(probes / self.recompute_factor)
        count = affordable // self._min_group
        if not count and not self._closed:
            if not self._keeps:
                whole = bytes_label(self._bytes.whole(self._min_group))
                often = f"each vector is computed {self.recompute_factor:.3g} times on average"
                raise OverMemory(
                    f"{self._min_group} probes and their pairs take {whole}; with memory={self._jacobians[0].memory} "
                    f"{often}, and there are too few passes for that: raise passes or memory"
                )
            count = 1
        for i in range(count):
            self._add_in_chunks(min(affordable // count + (i < affordable % count), self._min_group + SPARE))

    def _add_in_chunks(self, k: int) -> None:
        """Add a group of probes, holding the tables of one pair of chunks at a time."""
        vectors: Callable[[slice], Sequence[Array]]
        if self._keeps:
            vectors = functools.partial(_part, self._drawn(k))
        else:
            vectors = functools.partial(self._vectors, self._sign(k))
        sums = PairSums(self._strata, k, self._bytes.moments)
        traces = []
        for a, chunk in enumerate(self._chunks):
            held = vectors(chunk)
            if self._has_trace:
                traces.append(_squared_norms(held[0]))
            for b, columns in enumerate(self._chunks[: a + 1]):
                tables = self._tables(held, held if a == b else vectors(columns))
                self._add(sums, chunk, columns, tables)
                if a != b:
                    self._add(sums, columns, chunk, [t.transpose(2, 3, 0, 1) for t in tables])
        self._closed.append((k, sums.moments(np.concatenate(traces, axis=1).T if self._has_trace else None)))

    def _add(self, sums: PairSums, rows: slice, columns: slice, tables: Sequence[np.ndarray]) -> None:
        sums.add(rows.start, columns.start, tables)
        for total, table in zip(self._strata_sums, tables, strict=True):
            total[rows] += np.abs(table).sum((1, 2, 3), keepdims=True)

    @property
    def _has_trace(self) -> bool:
        return self._names[0] == "trace"

    def _tables(self, one: Sequence[Array], other: Sequence[Array]) -> list[np.ndarray]:
        """The kernel of all pairs, ``[strata, k, strata', k']`` for each moment except the trace."""
        if not self._bytes.moments:
            return []
        (k, n, _), (k2, n2, _) = one[0].shape, other[0].shape
        flat = [w.reshape(-1, w.shape[-1]) for w in one]
        tables = self._kernel(flat, flat if one is other else [w.reshape(-1, w.shape[-1]) for w in other])
        wanted = tables[: self._bytes.moments]
        return [arrays.to_numpy(t).reshape(k, n, k2, n2).transpose(1, 0, 3, 2) for t in wanted]

    def _clear(self) -> None:
        self._held: list[Sequence[Array]] = []
        self._table: list[np.ndarray] = []
        self._traces: list[np.ndarray] = []
        self._singles: list[np.ndarray] = []
        self._count = 0

    @property
    def in_chunks(self) -> bool:
        """Whether vectors are processed in chunks, as not all of them fit in memory."""
        return len(self._chunks) > 1

    def _blocks(self, k: int) -> Iterator[Sequence[Array]]:
        """The vectors of all strata, of blocks of new probes that fit in memory."""
        for size in self._jacobians[0].blocks(k):
            yield self._vectors(self._sign(size), slice(0, self._strata))

    def _drawn(self, k: int) -> Sequence[Array]:
        """The vectors of all strata, of new probes."""
        blocks = list(self._blocks(k))
        if len(blocks) == 1:
            return blocks[0]
        return [array_api_compat.array_namespace(parts[0]).concat(parts) for parts in zip(*blocks, strict=True)]

    def _grow(self, k: int) -> None:
        """Add probes to the open group."""
        self._count += k
        if not self._bytes.moments:
            self._traces += [_squared_norms(vectors[0]) for vectors in self._blocks(k)]
            return
        new = self._drawn(k)
        own = self._tables(new, new)
        across = [self._tables(held, new) for held in self._held]
        if across:
            sides = [np.concatenate(parts, axis=1) for parts in zip(*across, strict=True)]
            self._table = [
                np.concatenate(
                    [np.concatenate([t, s], axis=3), np.concatenate([s.transpose(2, 3, 0, 1), o], axis=3)], axis=1
                )
                for t, s, o in zip(self._table, sides, own, strict=True)
            ]
        else:
            self._table = own
        self._held.append(new)
        if self._beside:
            sums = self._sums_beside([w.reshape(1, -1, w.shape[-1]) for w in new])
            self._singles.append(2 * sums.reshape(len(sums), k, self._strata).swapaxes(1, 2))
        if self._has_trace:
            self._traces.append(_squared_norms(new[0]))

    def _close(self) -> None:
        if self._count:
            self._closed.append((self._count, self._open()))
        self._clear()

    def _open(self) -> MomentEstimates:
        """The moments from the open group."""
        sums = PairSums(self._strata, self._count, len(self._table))
        step = max(1, self._max_vectors // (4 * self._count))
        for start in range(0, self._strata if self._table else 0, step):
            sums.add(start, 0, [t[start : start + step] for t in self._table])
        if self._singles:
            sums.add_singles(np.concatenate(self._singles, axis=2))
        return sums.moments(np.concatenate(self._traces).T if self._has_trace else None)

    def moments(self) -> MomentEstimates:
        """The moments, in the order of their names, from all probes so far."""
        found = MomentEstimates.pooled(self._closed + ([(self._count, self._open())] if self._count else []))
        return found.plus(self._known) if self._beside else found

    @functools.cached_property
    def _known(self) -> list[float]:
        """The moments of the exact samples' rows."""
        sums = self._sums_beside([w[None] for w in self._beside]).sum(1).tolist()
        return [float(_squared_norms(self._beside[0]).sum()), *sums] if self._has_trace else sums

    def _sums_beside(self, vectors: Sequence[Array]) -> np.ndarray:
        """The kernel of each vector in ``[1, k, D]``, summed over the exact samples' rows, ``[moments, k]``.

        Tables take a quarter of the memory at a time.
        """
        rows, k = self._beside[0].shape[0], vectors[0].shape[1]
        size = max(1, self._jacobians[0].memory // (4 * self._bytes.entry * k))
        total = np.zeros((self._bytes.moments, k))
        for start in range(0, rows, size):
            part = [w[None, start : start + size] for w in self._beside]
            total += np.array([table.sum((0, 1, 3)) for table in self._tables(part, vectors)])
        return total

    def pairs(self, probes: int) -> float:
        return self.moments().pairs

    def estimate(self, metric: str) -> PointEstimate:
        single = self._jacobians[0].n == self._strata
        # If some strata are treated exactly, a few probes also say little about the remaining ones.
        uneven = self.uneven or (len(self._beside) > 0 and self._count < FEW_BESIDE)
        return delta_method(metric, self._names, self.moments(), single=single, uneven=uneven)

    def complement(self) -> float | None:
        return complement(dict(zip(self._names, self.moments().means.tolist(), strict=True)))


def complement(moments: Mapping[str, float]) -> float | None:
    """1 - alignment from moments by name; ``None`` if the difference of the kernels is not among them."""
    return Moments(**moments).complement if "difference" in moments else None


SQUARES = {"norm": 2.0, "effective_rank": 1.0}
"""Relative error of ||Theta||_F^2, as a multiple of the relative error that it causes in a metric."""


def least_probes(metric: str, strata: int, n: int, error: float) -> float:
    """Probes whose pairs give a metric to a relative standard error, at best; 0 if this is not known.

    It is not known for the trace, to which the diagonal of Theta adds no variance, nor for the alignment, whose errors
    cancel.

    Args:
        metric: the metric.
        strata: number of groups of samples that have their own gradients.
        n: total number of outputs.
        error: relative standard error.
    """
    scale = SQUARES.get(metric)
    return 0.0 if scale is None else PairSums.least_probes(strata, n / strata, scale * error)


FEW_BESIDE = 8
"""Smallest number of probes beside exact samples at which :data:`FEWER` does not apply."""
FEWER = 0.5
"""Share of the degrees of freedom that counts if strata are uneven.

A few probes of the stratum that has most of the variance hardly show the tails of their distribution, so their degrees
of freedom are overestimated. With 20 probes, 93 % of the 95 % intervals contained the alignment of two uneven batches
of 12 samples; with half of the degrees, 95 to 96 % did.
"""


def delta_method(
    metric: str, names: Sequence[str], moments: MomentEstimates, *, single: bool = False, uneven: bool = False
) -> PointEstimate:
    """A metric from estimates of its moments, with a standard error as in :class:`MomentEstimates`.

    The second-order bias of the effective rank is subtracted, up to half of its value: beyond that the expansion is
    unreliable. The biases of the norm and of the alignment are small compared with their errors and are kept.

    Args:
        metric: the metric.
        names: names of the moments.
        moments: their estimates.
        single: whether a probe has one sign in each stratum, on which nothing depends.
        uneven: whether a few strata have most of ||Theta||_F^2; see :data:`FEWER`.
    """

    def of(means: np.ndarray) -> Moments:
        return Moments(**dict(zip(names, means.tolist(), strict=True)))

    found = of(moments.means)
    slopes = found.gradient(metric)
    gradient = np.array([getattr(slopes, name) for name in names])
    # The variance of a small difference of moments is known up to the rounding of their covariances.
    rounding = np.finfo(np.float64).eps * (abs(gradient) @ (abs(moments.single) + moments.double) @ abs(gradient))
    value = found.metric(metric)
    if single:
        return PointEstimate(value, 0.0)
    slope = on_scale(metric, found)[1]
    if math.isfinite(slope):
        error = moments.standard_error(slope * gradient, lambda means: on_scale(metric, of(means))[0]) / slope
    else:
        error = moments.standard_error(gradient)
    error = max(error, math.sqrt(rounding))
    if metric == "effective_rank":
        bias = moments.second_order_bias(lambda means: of(means).metric(metric))
        value -= min(max(bias, -value / 2), value / 2)
    # Ratios of the moments of a single pair do not vary at all.
    degrees = moments.degrees * (FEWER if uneven else 1)
    return PointEstimate(value, error if degrees > 0 else math.nan, degrees)


def on_scale(metric: str, moments: Moments) -> tuple[float, float]:
    """A metric on the scale on which its errors are symmetric, and the slope of that scale; ``nan`` outside it."""
    if metric != "trace" and (not moments.square > 0 or moments.square_f <= 0):
        return math.nan, math.nan
    if metric == "alignment" and 0 < (c := moments.complement) < 2:
        return math.log((2 - c) / c) / 2, 1 / (c * (2 - c))  # atanh of 1 - c, with the digits of c
    value = moments.metric(metric)
    transform, slope, _ = SCALES[metric]
    if not (-1 < value < 1 if metric == "alignment" else value > 0):
        return math.nan, math.nan
    return transform(value), slope(value)


def shared_probe_kernel(one: Sequence[Array], other: Sequence[Array]) -> list[Array]:
    """Kernel for probes in output space, which are shared by all networks; see :data:`Kernel`.

    Returns the products of m = <w, w'> from :func:`moment_products`, in float64 on the host.
    """
    pairs = zip(one, other, strict=True)
    grams = [symmetric_gram(a) if one is other else a @ b.T for a, b in pairs]
    return moment_products([arrays.to_numpy(m, np.float64) for m in grams])


def crossed_network_kernel(one: Sequence[Array], other: Sequence[Array]) -> list[Array]:
    """Kernel for probes in parameter space; see :data:`Kernel`.

    It is <w, w'>^2, and with a second network also <w_f, w_f'>^2 and the mean of <w, w_f'>^2 and <w_f, w'>^2: here the
    cross term is the norm of J^T J_f, an inner product between networks. The difference of the kernels is not
    available.
    """
    squares = [(a @ b.T) ** 2 for a, b in zip(one, other, strict=True)]
    if len(one) == 1:
        return squares
    return [*squares, ((one[0] @ other[1].T) ** 2 + (one[1] @ other[0].T) ** 2) / 2]


def with_squared_trace(kernel: Kernel) -> Kernel:
    """A kernel with one more product, ||w||^2 ||w'||^2 of the first network, for (tr Theta)^2; see :data:`Kernel`."""

    def extended(one: Sequence[Array], other: Sequence[Array]) -> list[Array]:
        norms = [arrays.to_numpy(_squared_norms(vectors[0]), np.float64) for vectors in (one, other)]
        return [*kernel(one, other), np.outer(*norms)]

    return extended


def moment_products(grams: Sequence[Array]) -> list[Array]:
    """Entrywise products for the moments of Theta^2, in the order of :data:`ntkbench.metrics.MOMENTS` for alignment.

    They are m^2, and with m_f of a second network also m_f^2, m m_f, d^2 and m d, where d = m_f - m.
    """
    m = grams[0]
    products = [m * m]
    for f in grams[1:]:
        d = f - m
        products += [f * f, m * f, d * d, m * d]
    return products


def symmetric_gram(a: Array, *, chunks: int = 4, min_rows: int = 32) -> Array:
    """``a a^T``, of which only the lower triangle of blocks is multiplied.

    Args:
        a: ``[r, D]``.
        chunks: maximum number of chunks of rows.
        min_rows: minimum number of rows of a chunk; smaller products lose more than the triangle saves.
    """
    count = min(chunks, len(a) // min_rows)
    if count < 2:
        return a @ a.T
    xp = array_api_compat.array_namespace(a)
    parts = arrays.chunks(len(a), count)
    rows = [a[part] @ a[: part.stop].T for part in parts]
    complete = [
        xp.concat([rows[i], *(row[:, part].T for row in rows[i + 1 :])], axis=1) for i, part in enumerate(parts)
    ]
    return xp.concat(complete)


def _squared_norms(w: Array) -> np.ndarray:
    return arrays.to_numpy(arrays.squared_norms(w))


def _part(vectors: Sequence[Array], strata: slice) -> list[Array]:
    """The vectors of some strata."""
    return [w[:, strata] for w in vectors]
