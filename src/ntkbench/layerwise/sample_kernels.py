"""Kernels between samples that approximate the NTK, and the NTK itself: their directions and layers.

A kernel A between samples approximates Theta by A ⊗ I_O. The trace kernel is the best of them in the Frobenius norm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ntkbench.errors import unknown
from ntkbench.layerwise.blocks import Block
from ntkbench.layerwise.kernel import LayerwiseKernel
from ntkbench.layerwise.parts import KernelParts
from ntkbench.operators import arrays
from ntkbench.operators.arrays import Array


@dataclass(frozen=True)
class SampleKernel:
    """How a kernel is computed from gradients.

    Attributes:
        directions: output directions ``[K, O]`` from O and a seed; ``None`` for the O unit vectors.
        averaged: whether to take the mean over directions, ``[N, N]``, instead of all pairs of directions.
        last_layer: whether only the parameters of the last layer count.
    """

    directions: Callable[[int, int], np.ndarray] | None = None
    averaged: bool = False
    last_layer: bool = False

    @property
    def between_samples(self) -> bool:
        """Whether the kernel has one entry per pair of samples."""
        return self.averaged or self.directions is not None

    def compute(
        self,
        engine: LayerwiseKernel,
        parameters: Sequence[Tensor],
        x1: Tensor,
        x2: Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        """The kernel, ``[N1, N2]``, or ``[N1 * O, N2 * O]`` for the NTK; see :meth:`LayerwiseKernel.kernel`."""
        made = engine.kernel(
            parameters,
            x1,
            x2,
            self.drawn(engine.O, seed, parameters[0]),
            last_layer=self.last_layer,
            fold=self.averaged,
        )
        return made.div_(engine.O) if self.averaged else made

    def parts(
        self,
        engine: LayerwiseKernel,
        parameters: Sequence[Tensor],
        x1: Tensor,
        x2: Tensor | None = None,
        seed: int = 0,
    ) -> Callable[[slice, slice], Tensor]:
        """Rectangles of the kernel by their rows and columns; see :class:`ntkbench.layerwise.parts.KernelParts`."""
        directions = self.drawn(engine.O, seed, parameters[0])
        part = KernelParts(engine, parameters, x1, x2, directions, last_layer=self.last_layer, fold=self.averaged)
        return lambda rows, columns: part(rows, columns).div_(engine.O if self.averaged else 1)

    def blocks(
        self, engine: LayerwiseKernel, sets: Sequence[Sequence[Tensor]], x: Tensor, seed: int = 0
    ) -> Iterator[tuple[bool, list[Tensor]]]:
        """The kernels at several sets of weights in blocks that fit in memory; see :meth:`LayerwiseKernel.blocks`.

        Yields:
            Whether the block is on the diagonal, and its entries at each set of weights, ``[rows, columns]``.
        """
        directions = self.drawn(engine.O, seed, sets[0][0])
        made = engine.blocks(sets, x, None, directions, last_layer=self.last_layer, fold=self.averaged)
        for left, right, parts in _over_directions(made, engine.O) if self.averaged else made:
            flat = [part.flatten(0, 1).flatten(1) for part in parts]
            yield left == right, [part.div_(engine.O) for part in flat] if self.averaged else flat

    def diagonal(self, engine: LayerwiseKernel, parameters: Sequence[Tensor], x: Tensor, seed: int = 0) -> Tensor:
        """The kernel's diagonal, ``[N]`` (``[N * O]`` for the NTK), in as many passes as the kernel."""
        directions = self.drawn(engine.O, seed, parameters[0])
        made = engine.diagonal(parameters, x, directions, last_layer=self.last_layer)
        return made.mean(1) if self.averaged else made.reshape(-1)

    def drawn(self, outputs: int, seed: int, like: Array) -> Array | None:
        """Directions ``[K, outputs]`` for a seed, in the library of ``like``; ``None`` for the unit vectors."""
        if self.directions is None:
            return None
        return arrays.asarray_like(self.directions(outputs, seed), like)


def _over_directions(
    blocks: Iterable[tuple[Block, Block, list[Tensor]]], outputs: int
) -> Iterator[tuple[Block, Block, list[Tensor]]]:
    """Sum blocks of some directions each over all directions; blocks of the same rows are held at the same time."""
    for _, strip in itertools.groupby(blocks, key=lambda block: block[0].samples):
        held: list[tuple[Block, Block, list[Tensor]]] = []
        for left, right, parts in strip:
            same = next((sums for _, column, sums in held if column.samples == right.samples), None)
            if left.directions == slice(0, outputs):
                yield left, right, parts
            elif same is None:
                held.append((left, right, parts))
            else:
                for total, part in zip(same, parts, strict=True):
                    total += part
        yield from held


def _sum_of_logits(outputs: int, seed: int) -> np.ndarray:
    return np.full((1, outputs), outputs**-0.5)


def _single_logit(outputs: int, seed: int) -> np.ndarray:
    return np.eye(1, outputs)


def _random_vector(outputs: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((1, outputs))
    return drawn / np.linalg.norm(drawn)


KERNELS = {
    "full": SampleKernel(),
    "sum_of_logits": SampleKernel(_sum_of_logits),
    "single_logit": SampleKernel(_single_logit),
    "random_vector": SampleKernel(_random_vector),
    "trace": SampleKernel(averaged=True),
    "last_layer": SampleKernel(averaged=True, last_layer=True),
}


def get(name: str) -> SampleKernel:
    """The kernel of this name.

    Raises:
        BadInput: there is none.
    """
    if not isinstance(name, str) or name not in KERNELS:
        raise unknown("kernel", name, KERNELS)
    return KERNELS[name]
