"""Blocks of a kernel: which rows they are, and one block at a time from the programs that pass through them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ntkbench.layerwise import contraction
from ntkbench.layerwise.capture import Parameters, Parts, Program, Sink
from ntkbench.layerwise.layers import Layer, Written

if TYPE_CHECKING:
    from ntkbench.layerwise.kernel import LayerwiseKernel


@dataclass(frozen=True)
class Block:
    """Some rows of the kernel: those of some samples in some output directions."""

    samples: slice
    directions: slice

    @property
    def rows(self) -> int:
        """How many they are."""
        return (self.samples.stop - self.samples.start) * (self.directions.stop - self.directions.start)


@dataclass(frozen=True)
class Task:
    """Blocks of one kernel.

    Attributes:
        engine: whose network it is.
        directions: output directions ``[K, O]``, or each sample's own ``[N, K, O]``.
        layers: whose parameters count.
        fold: whether to sum over directions.
    """

    engine: LayerwiseKernel
    directions: Tensor
    layers: Sequence[Layer | Written]
    fold: bool = False

    def symmetric(self, parameters: Parameters, x: Tensor, block: Block) -> Tensor:
        """The lower triangle of a block on the diagonal; each layer is forgotten as soon as it is added."""
        theta = self._empty(block, block)
        self._run(parameters, x, block, lambda number, parts: self._add(theta, number, parts, None))
        return theta

    def collected(self, parameters: Parameters, x: Tensor, block: Block) -> dict[int, Parts]:
        """The parts of all layers."""
        kept: dict[int, Parts] = {}
        self._run(parameters, x, block, kept.__setitem__)
        return kept

    def own(self, kept: dict[int, Parts], block: Block) -> Tensor:
        """The lower triangle of a block on the diagonal, from what was collected."""
        theta = self._empty(block, block)
        for number, parts in kept.items():
            self._add(theta, number, parts, None)
        return theta

    def between(self, kept: dict[int, Parts], row: Block, parameters: Parameters, x: Tensor, column: Block) -> Tensor:
        """A block off the diagonal: its rows were collected, its columns pass by."""
        theta = self._empty(row, column)
        self._run(parameters, x, column, lambda number, parts: self._add(theta, number, kept[number], parts))
        return theta

    def add_diagonal(self, found: Tensor, parameters: Parameters, x: Tensor, block: Block) -> None:
        """Add the diagonal's entries of a block to ``found [N, K]``."""

        def add(number: int, parts: Parts) -> None:
            found.add_(contraction.diagonal(self.layers[number].factors(*parts), self.engine.memory // 4))

        self._run(parameters, x, block, add)

    def program(self, parameters: Parameters, x: Tensor, block: Block) -> Program:
        """The program that runs a block."""
        return self.engine.program(self.layers, parameters, x[block.samples], self._directions(block))

    def _run(self, parameters: Parameters, x: Tensor, block: Block, sink: Sink) -> None:
        self.engine.directions_taken += block.rows
        self.program(parameters, x, block).run(parameters, x[block.samples], self._directions(block), sink)

    def _directions(self, block: Block) -> Tensor:
        if self.directions.dim() == 3:
            return self.directions[block.samples, block.directions]
        return self.directions[block.directions].expand(_length(block.samples), -1, -1)

    def _add(self, theta: Tensor, number: int, left: Parts, right: Parts | None) -> None:
        factors = [self.layers[number].factors(*parts) for parts in (left, right) if parts is not None]
        one, *other = [f.folded() for f in factors] if self.fold else factors
        contraction.add(theta, one, other[0] if other else None, self.engine.memory // 4)

    def _empty(self, row: Block, column: Block) -> Tensor:
        sizes = [n for b in (row, column) for n in (_length(b.samples), 1 if self.fold else _length(b.directions))]
        return self.directions.new_zeros(sizes)


def _length(part: slice) -> int:
    return part.stop - part.start


def even(size: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut ``size`` into the fewest parts of at most ``most``, as equal as can be: few shapes, few programs."""
    parts = -(-size // most)
    bounds = [size * i // parts for i in range(parts + 1)]
    yield from itertools.pairwise(bounds)
