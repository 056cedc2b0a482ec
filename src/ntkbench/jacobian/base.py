"""The Jacobian as a linear operator, with a counter of what it was asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import array_api_compat

Array = Any
"""A tensor of the operator's backend (``torch.Tensor`` or ``jax.Array``)."""


class Jacobian(ABC):
    """J = df/dtheta at one set of weights, an n x P matrix that is never written out.

    Rows are sample-major, output-minor: row ``b * O + o`` is output ``o`` of sample ``b``. Blocks of probes are stacked as
    rows: k vectors of length n are an array ``[k, n]``. Cost is counted in passes; one pass is one JVP or one VJP over the
    whole batch of N samples, and a VJP of one sample alone is 1/N of a pass.

    Attributes:
        N: samples.
        O: outputs a sample.
        P: parameters.
        memory: bytes that one block may fill; longer blocks are done in turns.
    """

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

    def vjp(self, u: Array) -> Array:
        """J^T u for each row of ``u``: ``[k, n] -> [k, P]``; k passes."""
        return self._in_blocks(self._vjp, u, self.N)

    def jvp(self, w: Array) -> Array:
        """J w for each row of ``w``: ``[k, P] -> [k, n]``; k passes."""
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

    def sample_rows(self, samples: slice, outputs: slice) -> Array:
        """Rows of J for a rectangle of samples and outputs, ``[outputs * samples, P]`` with samples running fastest.

        One backward pass per output serves all the samples at once, each with its own gradient; only right where samples
        do not interact. Costs (number of outputs) * (number of samples) / N passes.
        """
        count = (samples.stop - samples.start) * (outputs.stop - outputs.start)
        self._sample_passes += count
        return self._sample_rows(samples, outputs).reshape(count, self.P)

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

    @abstractmethod
    def basis(self, start: int, stop: int) -> Array:
        """Unit vectors ``start`` to ``stop`` of output space, ``[stop - start, n]``."""

    @abstractmethod
    def rng(self, seed: int) -> Rng:
        """A fresh generator of probes on this operator's device; one seed, one stream."""

    @abstractmethod
    def bytes_per_probe(self) -> int:
        """Bytes that one probe in flight takes: activations, cotangents, one gradient."""

    def _bytes_per_sample_row(self) -> int:
        """Bytes that one row of J takes while it is made (its sample's share of the activations, its gradient)."""
        return self.bytes_per_probe() // self.N + 2 * self.P * self.itemsize

    def _block(self) -> int:
        return max(1, self.memory // self.bytes_per_probe())

    def _split(self, rows: Array) -> Iterator[Array]:
        """Consecutive blocks of rows of nearly equal size, each within the budget."""
        count = -(-rows.shape[0] // self._block())
        size = -(-rows.shape[0] // count)
        for start in range(0, rows.shape[0], size):
            yield rows[start : start + size]

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
    def _sample_rows(self, samples: slice, outputs: slice) -> Array: ...


class Rng(ABC):
    """Seeded random probes, ``[k, dim]`` in the operator's precision and on its device."""

    @abstractmethod
    def normal(self, k: int, dim: int) -> Array:
        """Standard normal entries."""

    @abstractmethod
    def sign(self, k: int, dim: int) -> Array:
        """Entries +1 or -1 with equal probability (Rademacher)."""
