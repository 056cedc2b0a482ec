"""Probes drawn so far: they grow in batches and are read out for any metric, so that one can add until it is enough."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import array_api_compat
import numpy as np

from ntkbench.errors import OverMemory
from ntkbench.estimators import standard_errors
from ntkbench.estimators.standard_errors import Reading
from ntkbench.metrics import Moments
from ntkbench.operators import Array, JacobianOperator

NEEDS = {
    "trace": ("trace",),
    "norm": ("square",),
    "effective_rank": ("trace", "square"),
    "alignment": ("square", "square_f", "cross"),
}
"""The moments that each metric is made of."""


CUTS, NARROWEST = 4, 32
"""Pieces that the rows of a symmetric product are cut into, and their fewest rows."""


def moments_of(metrics: Sequence[str]) -> tuple[str, ...]:
    """The moments that some metrics are made of, in the order of :class:`ntkbench.metrics.Moments`."""
    needed = {moment for metric in metrics for moment in NEEDS[metric]}
    return tuple(moment for moment in Moments.__dataclass_fields__ if moment in needed)


class Sample(ABC):
    """What a growing number of probes says.

    Attributes:
        least: the fewest probes by which it can grow.
    """

    least: int = 1

    @abstractmethod
    def extend(self, probes: int) -> None:
        """Draw that many more probes."""

    @abstractmethod
    def read(self, metric: str) -> Reading:
        """Value and standard error of a metric from all probes so far."""


class Columns(Sample):
    """Independent probes, each of which says something of each moment: means, with the jackknife over probes.

    Args:
        moments: names of the moments.
        draw: makes a number of probes; returns what each of them says, ``[k]`` a moment.
        blocks: cuts a number of probes into blocks that fit in memory.
    """

    def __init__(
        self,
        moments: Sequence[str],
        draw: Callable[[int], Sequence[Array]],
        blocks: Callable[[int], Sequence[int]],
    ) -> None:
        self._draw, self._blocks = draw, blocks
        self._said: dict[str, list[Array]] = {moment: [] for moment in moments}

    def extend(self, probes: int) -> None:
        for k in self._blocks(probes):
            for said, column in zip(self._said.values(), self._draw(k), strict=True):
                said.append(column)

    def read(self, metric: str) -> Reading:
        columns = [standard_errors.by_probe(self._said[moment]) for moment in NEEDS[metric]]
        if metric == "trace":
            return standard_errors.mean(*columns)
        return standard_errors.jackknife(
            lambda *means: Moments(**dict(zip(NEEDS[metric], means, strict=True))).metric(metric), *columns
        )


class SampleTraces(Sample):
    """Random fields, each of which gives the trace of each sample's own block of Theta by itself.

    Args:
        draw: makes a number of fields; returns what each says of each sample, ``[k, N]``.
        blocks: cuts a number of fields into blocks that fit in memory.
    """

    def __init__(self, draw: Callable[[int], Array], blocks: Callable[[int], Sequence[int]]) -> None:
        self._draw, self._blocks = draw, blocks
        self._said: list[Array] = []

    def extend(self, probes: int) -> None:
        self._said += map(self._draw, self._blocks(probes))

    def read(self, metric: str) -> Reading:
        return standard_errors.mean_of_sums(standard_errors.by_probe(self._said))


Vectors = Callable[[Array, slice], Sequence[Array]]
"""Probes and a slice of strata -> what the operators make of them, ``[k, strata, D]`` an operator."""


class Pairs(Sample):
    """Probes of which any two say something of the moments of Theta^2: U-statistics of degree 2.

    A probe is a field of N independent parts (strata): the samples, or everything at once (N = 1). Part b of field k
    gives a vector w_b^k in some space of D dimensions, for which E <w_b^k, w_c^l>^2 = ||Theta_bc||_F^2 whenever the
    parts are not the same one. So sum_b ||w_b^k||^2 is unbiased for the trace, and ||Theta||_F^2 is the mean over all
    pairs of fields (k, l) of <w_b^k, w_c^l>^2 for b != c, and over k != l for b = c, summed over b and c.

    Vectors of at most ``memory`` bytes are held. Fields beyond that start a group of their own, and only pairs within a
    group are taken. Where not even a group of :data:`LEAST` fields fits, each group is worked through in pairs of
    blocks of strata, whose vectors are made anew, which costs passes.

    Args:
        moments: names of the moments; of ``trace`` and ``square``, or all but the trace, or all.
        strata: N.
        dim: D.
        jacobians: the operators, one, or two for alignment.
        sign: draws fields.
        vectors: see :data:`Vectors`.
        kernels: what two sets of vectors, ``[r, D]`` an operator, say of each moment but the trace, ``[r, r']`` each.
    """

    LEAST = 4
    WIDEST = 2048
    """Vectors in a group: beyond that their Gram matrix costs far more than they do, and gains little."""

    def __init__(
        self,
        moments: Sequence[str],
        strata: int,
        dim: int,
        jacobians: Sequence[JacobianOperator],
        sign: Callable[[int], Array],
        vectors: Vectors,
        kernels: Callable[[Sequence[Array], Sequence[Array]], Sequence[Array]] | None = None,
    ) -> None:
        self._names, self._N, self._jacobians = tuple(moments), strata, jacobians
        self._sign, self._vectors, self._kernels = sign, vectors, kernels or inner_products
        j = jacobians[0]
        self._per_field = 2 * len(jacobians) * strata * dim * j.itemsize  # itself, and the block that it came from
        fit = j.memory // self._per_field
        self.widest = max(self.LEAST, min(fit, self.WIDEST // strata))
        turns = 1 if fit >= self.LEAST else min(strata, -(-2 * self.LEAST * self._per_field // j.memory))
        self._turns = [slice(strata * i // turns, strata * (i + 1) // turns) for i in range(turns)]
        self._closed: list[tuple[int, standard_errors.Moments2]] = []
        self._clear()

    @property
    def least(self) -> int:
        return math.ceil(self.LEAST * self.dearer) if len(self._turns) > 1 else 1

    @property
    def dearer(self) -> float:
        """How many times the passes of a field are spent on it because its vectors have to be made anew."""
        sizes = [turn.stop - turn.start for turn in self._turns]
        return sum(size * (len(sizes) - i) for i, size in enumerate(sizes)) / self._N

    def extend(self, probes: int) -> None:
        if len(self._turns) > 1:
            return self._extend_anew(probes)
        if self._held and self._fields < self.widest:
            k = min(probes, self.widest - self._fields)
            self._grow(k)
            probes -= k
        if probes < (self.LEAST if self._held or self._closed else 1):
            return None  # too few for a group of their own
        count = -(-probes // self.widest)
        if count > 1 and probes // count < self.LEAST:
            count -= 1
            probes = count * self.widest
        for i in range(count):
            self._close()
            self._grow(probes // count + (i < probes % count))
        return None

    def _extend_anew(self, probes: int) -> None:
        fields = int(probes / self.dearer)
        if fields < self.LEAST and not self._closed:
            wanted = self.LEAST * self._per_field
            raise OverMemory(
                f"the vectors of {self.LEAST} probes take {wanted} bytes; with memory of {self._jacobians[0].memory} "
                f"they are made {self.dearer:.3g} times over, for which there are too few passes"
            )
        count = fields // self.LEAST
        for i in range(count):
            k = fields // count + (i < fields % count)
            u = self._sign(k)
            sums = standard_errors.PairSums(self._N, k, len(self._names) - self._has_trace)
            traces = []
            for a, turn in enumerate(self._turns):
                held = self._make(u, turn)
                if self._has_trace:
                    traces.append(_squares(held[0]))
                for b in range(a + 1):
                    other = held if a == b else self._make(u, self._turns[b])
                    tables = self._tables(held, other)
                    sums.add(turn.start, self._turns[b].start, tables)
                    if a != b:
                        sums.add(self._turns[b].start, turn.start, [t.transpose(2, 3, 0, 1) for t in tables])
            self._closed.append((k, sums.moments(np.concatenate(traces, axis=1).T if self._has_trace else None)))

    @property
    def _has_trace(self) -> bool:
        return self._names[0] == "trace"

    def _make(self, u: Array, turn: slice) -> list[Array]:
        return list(self._vectors(u, turn))

    def _tables(self, one: Sequence[Array], other: Sequence[Array]) -> list[np.ndarray]:
        """What pairs say, ``[strata, k, strata', k']`` a moment."""
        if self._names == ("trace",):
            return []
        (k, n, dim), (k2, n2, _) = one[0].shape, other[0].shape
        flat = [w.reshape(-1, dim) for w in one]
        tables = self._kernels(flat, flat if one is other else [w.reshape(-1, dim) for w in other])[
            : len(self._names) - self._has_trace
        ]
        return [standard_errors.on_host(t).reshape(k, n, k2, n2).transpose(1, 0, 3, 2) for t in tables]

    def _clear(self) -> None:
        self._held: list[list[Array]] = []
        self._table: list[np.ndarray] = []
        self._traces: list[np.ndarray] = []
        self._fields = 0

    def _grow(self, k: int) -> None:
        """More fields for the open group."""
        new = self._make(self._sign(k), self._turns[0])
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
        if self._has_trace:
            self._traces.append(_squares(new[0]))
        self._fields += k

    def _close(self) -> None:
        if self._held:
            self._closed.append((self._fields, self._open()))
        self._clear()

    def _open(self) -> standard_errors.Moments2:
        sums = standard_errors.PairSums(self._N, self._fields, len(self._table))
        step = max(1, self.WIDEST // (4 * self._fields))
        for start in range(0, self._N if self._table else 0, step):
            sums.add(start, 0, [t[start : start + step] for t in self._table])
        return sums.moments(np.concatenate(self._traces).T if self._has_trace else None)

    def moments(self) -> standard_errors.Moments2:
        """The moments, in the order of their names, from all probes so far."""
        groups = self._closed + ([(self._fields, self._open())] if self._held else [])
        return standard_errors.Moments2.mean(groups)

    def read(self, metric: str) -> Reading:
        return read_pairs(self._names, self.moments(), metric)


def read_pairs(names: Sequence[str], found: standard_errors.Moments2, metric: str) -> Reading:
    """Value and standard error of a metric from moments of these names."""
    moments = Moments(**dict(zip(names, found.means.tolist(), strict=True)))
    slopes = moments.gradient(metric)
    error = found.error(np.array([getattr(slopes, name) for name in names]))
    return Reading(moments.metric(metric), error, found.degrees)


def inner_products(one: Sequence[Array], other: Sequence[Array]) -> list[Array]:
    """What two sets of vectors, ``[r, D]`` an operator, say of the square of the norm, and with two of all moments."""
    if one is other:
        return products([_gram(a) for a in one])
    return products([a @ b.T for a, b in zip(one, other, strict=True)])


def _gram(a: Array) -> Array:
    """a a^T, of which little more than a triangle is computed."""
    cuts = min(CUTS, len(a) // NARROWEST)
    if cuts < 2:
        return a @ a.T
    xp = array_api_compat.array_namespace(a)
    ends = [len(a) * i // cuts for i in range(cuts + 1)]
    rows = [a[start:stop] @ a[:stop].T for start, stop in itertools.pairwise(ends)]
    mirrored = [
        xp.concat([rows[i], *(row[:, ends[i] : ends[i + 1]].T for row in rows[i + 1 :])], axis=1) for i in range(cuts)
    ]
    return xp.concat(mirrored)


def products(grams: Sequence[Array]) -> list[Array]:
    """m^2, and with the inner products of a second network m_f^2 and m m_f."""
    pairs = [(grams[0], grams[0])] + [pair for f in grams[1:] for pair in ((f, f), (grams[0], f))]
    return [a * b for a, b in pairs]


def _squares(w: Array) -> np.ndarray:
    xp = array_api_compat.array_namespace(w)
    return standard_errors.on_host(xp.linalg.vecdot(w, w))
