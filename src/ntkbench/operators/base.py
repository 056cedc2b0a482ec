"""The Jacobian as a linear operator, with a counter of what it was asked for."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import array_api_compat
import numpy as np

Array = Any
"""A tensor of the operator's backend (``torch.Tensor`` or ``jax.Array``)."""

CACHE = 2**25
"""Bytes that a turn of :meth:`Jacobian.sample_squares` takes at most."""


class Jacobian(ABC):
    """J = df/dtheta at one set of weights, an n x P matrix that is never written out.

    Rows are sample-major, output-minor: row ``b * O + o`` is output ``o`` of sample ``b``. Blocks of probes are stacked
    as
    rows: k vectors of length n are an array ``[k, n]``. Cost is counted in passes; one pass is one JVP or one VJP over
        the whole batch of N samples, and a VJP of one sample alone is 1/N of a pass.

    Attributes:
        N: samples.
        O: outputs a sample.
        P: parameters.
        memory: bytes that one block may fill; longer blocks are done in turns.
    """

    COMPUTED: tuple[str, ...] = ()
    """Names under which a backend caches what its forward pass made."""

    N: int
    O: int  # noqa: E741 - the field's symbol
    P: int
    memory: int
    itemsize: int
    _sample_passes: int = 0

    @property
    def n(self) -> int:
        """Outputs in all."""
        return self.N * self.O

    @property
    def passes(self) -> float:
        """Passes spent so far."""
        return self._sample_passes / self.N

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how products were made, such as a JVP that costs more than one pass."""
        return ()

    def vjp(self, u: Array) -> Array:
        """J^T u for each row of ``u``: ``[k, n] -> [k, P]``; k passes."""
        return self._in_blocks(self._vjp, u, self.N)

    def jvp(self, w: Array) -> Array:
        """J w for each row of ``w``: ``[k, P] -> [k, n]``; k passes, or 2k where there is no forward mode."""
        return self._in_blocks(self._jvp, w, self.N)

    def ntk(self, u: Array) -> Array:
        """Theta u = J J^T u for each row of ``u``: ``[k, n] -> [k, n]``; 2k passes."""
        xp = array_api_compat.array_namespace(u)
        blocks = [self.jvp(self.vjp(block)) for block in self._split(u)]
        return blocks[0] if len(blocks) == 1 else xp.concat(blocks)

    def row(self, i: int) -> Array:
        """Row i of J by a backward pass of its own, ``[P]``; 1 pass."""
        self._sample_passes += self.N
        return self._row(i)

    def sample_vjp(self, samples: slice, v: Array) -> Array:
        """J_b^T v_b for each sample b of a slice by itself: ``v [k, samples, O] -> [k, samples, P]``.

        One backward pass serves all samples at once and still gives each its own gradient; only right where samples do
        not interact. Costs k * (number of samples) / N passes.
        """
        self._sample_passes += v.shape[0] * v.shape[1]
        return self._sample_vjp(samples, v)

    def group_gradients(self, groups: Sequence[slice], v: Array) -> Array:
        """sum_(b in group) J_b^T v_b for each of some groups of samples: ``v [k, samples, O] -> [k, groups, P]``.

        For inner products: in an orthonormal basis of the space of parameters that is the same for all operators of one
        network. The groups are slices that follow on each other, and ``v`` has the samples of all of them. Costs as
        :meth:`sample_vjp`, under the same condition.
        """
        xp = array_api_compat.array_namespace(v)
        self._sample_passes += v.shape[0] * v.shape[1]
        most = max(group.stop - group.start for group in groups)
        size = max(1, self.memory // (self.bytes_per_probe() + most * self._bytes_per_sample_row()))
        blocks = [self._group_gradients(groups, v[start : start + size]) for start in range(0, v.shape[0], size)]
        return blocks[0] if len(blocks) == 1 else xp.concat(blocks)

    def sample_jvp(self, samples: slice, w: Array) -> Array:
        """J_b w_b for each sample b of a slice by itself: ``w [k, samples, P] -> [k, samples, O]``.

        Each sample has a tangent of its own, which takes no more products than one for all of them. Costs
        k * (number of samples) / N passes, twice that where there is no forward mode; samples may not interact.
        """
        self._sample_passes += w.shape[0] * w.shape[1]
        return self._sample_jvp(samples, w)

    def sample_squares(self, v: Array) -> Array:
        """||J_b^T v_b||^2 for each sample b by itself: ``v [k, N, O] -> [k, N]``; k passes, and the same condition.

        Gradients are summed up in turns that stay in a processor's cache, and never lie side by side in memory.
        """
        xp = array_api_compat.array_namespace(v)
        self._sample_passes += v.shape[0] * v.shape[1]
        budget = min(self.memory, CACHE)
        samples = min(self.N, max(1, budget // self._bytes_per_square()))
        fields = max(1, budget // (samples * self._bytes_per_square()))
        turns = [slice(start, min(start + samples, self.N)) for start in range(0, self.N, samples)]
        rows = [
            xp.concat([self._sample_squares(turn, v[k : k + fields, turn]) for turn in turns], axis=1)
            for k in range(0, v.shape[0], fields)
        ]
        return rows[0] if len(rows) == 1 else xp.concat(rows)

    def sample_rows(self, samples: slice, outputs: slice) -> Array:
        """Rows of J for a rectangle of samples and outputs, ``[outputs * samples, P]`` with samples running fastest.

        Per-sample backward passes: (number of outputs) * (number of samples) / N passes in all, and samples may not
        interact.
        """
        count = samples.stop - samples.start
        units = self._eye(self.O, outputs.start, outputs.stop)[:, None, :]
        xp = array_api_compat.array_namespace(units)
        rows = self.sample_vjp(samples, xp.broadcast_to(units, (units.shape[0], count, self.O)))
        return rows.reshape(-1, self.P)

    def rectangles(self, held: float = 1.0) -> Iterator[tuple[slice, slice]]:
        """Cut the rows of J into rectangles for :meth:`sample_rows` that fill at most ``held`` of the memory budget.

        The cut depends on sizes alone, so two operators of one problem give matching blocks.
        """
        rows = max(1, int(held * self.memory / self._bytes_per_sample_row()))
        samples = min(self.N, max(1, rows // self.O))
        outputs = min(self.O, rows)
        for start in range(0, self.N, samples):
            for first in range(0, self.O, outputs):
                yield slice(start, min(start + samples, self.N)), slice(first, min(first + outputs, self.O))

    def row_numbers(self, samples: slice, outputs: slice) -> np.ndarray:
        """Which rows of J the rows of :meth:`sample_rows` are."""
        first, second = np.mgrid[outputs, samples]
        return (second * self.O + first).reshape(-1)

    def basis(self, start: int, stop: int) -> Array:
        """Unit vectors ``start`` to ``stop`` of output space, ``[stop - start, n]``."""
        return self._eye(self.n, start, stop)

    def fresh(self) -> Jacobian:
        """The same operator before its forward pass and with its counter at zero, on the same device arrays."""
        twin = copy.copy(self)
        twin._sample_passes = 0
        for name in self.COMPUTED:
            twin.__dict__.pop(name, None)
        return twin

    def blocks(self, probes: int) -> list[int]:
        """Sizes of blocks that together are ``probes`` and that each fit in the memory budget."""
        count = -(-probes // max(1, self.memory // self.bytes_per_probe()))
        return [probes // count + (i < probes % count) for i in range(count)]

    @abstractmethod
    def rng(self, seed: int) -> Rng:
        """A fresh generator of probes on this operator's device; one seed, one stream."""

    @abstractmethod
    def bytes_per_probe(self) -> int:
        """Bytes that one probe in flight takes: activations, cotangents, one gradient."""

    def _bytes_per_sample_row(self) -> int:
        """Bytes that one row of J takes while it is made (its sample's share of the activations, its gradient)."""
        return self.bytes_per_probe() // self.N + 2 * self.P * self.itemsize

    def _bytes_per_square(self) -> int:
        """Bytes that the squared norm of one sample's gradient takes while it is made."""
        return self._bytes_per_sample_row()

    def _split(self, rows: Array) -> Iterator[Array]:
        start = 0
        for size in self.blocks(rows.shape[0]):
            yield rows[start : start + size]
            start += size

    def _in_blocks(self, product: Any, rows: Array, cost: int) -> Array:
        xp = array_api_compat.array_namespace(rows)
        self._sample_passes += cost * rows.shape[0]
        blocks = [product(block) for block in self._split(rows)]
        return blocks[0] if len(blocks) == 1 else xp.concat(blocks)

    @abstractmethod
    def _vjp(self, u: Array) -> Array: ...

    @abstractmethod
    def _jvp(self, w: Array) -> Array: ...

    @abstractmethod
    def _row(self, i: int) -> Array: ...

    @abstractmethod
    def _sample_vjp(self, samples: slice, v: Array) -> Array: ...

    @abstractmethod
    def _sample_jvp(self, samples: slice, w: Array) -> Array: ...

    def _group_gradients(self, groups: Sequence[slice], v: Array) -> Array:
        xp, first = array_api_compat.array_namespace(v), groups[0].start
        own = (v[:, group.start - first : group.stop - first] for group in groups)
        return xp.stack([self._sample_vjp(*each).sum(1) for each in zip(groups, own, strict=True)], axis=1)

    def _sample_squares(self, samples: slice, v: Array) -> Array:
        return (self._sample_vjp(samples, v) ** 2).sum(-1)

    @abstractmethod
    def _eye(self, size: int, start: int, stop: int) -> Array:
        """Rows ``start`` to ``stop`` of the identity matrix of a size."""


class Rng(ABC):
    """Seeded random probes, ``[k, dim]`` in the operator's precision and on its device."""

    @abstractmethod
    def normal(self, k: int, dim: int) -> Array:
        """Standard normal entries."""

    @abstractmethod
    def sign(self, k: int, dim: int) -> Array:
        """Entries +1 or -1 with equal probability (Rademacher)."""
