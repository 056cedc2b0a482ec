"""Blocks of a kernel, and the computation of one block at a time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ntkbench.layerwise import contraction
from ntkbench.layerwise.capture import LayerInputs, ParameterValues, Program, Programs
from ntkbench.layerwise.certificate import Certificate
from ntkbench.layerwise.computed import Gram
from ntkbench.layerwise.factors import GradientFactors
from ntkbench.layerwise.layers import ExplicitGradient, Layer
from ntkbench.layerwise.tuning import Tuning


@dataclass(frozen=True)
class Block:
    """Rows of the kernel: a range of samples in a range of output directions."""

    samples: slice
    directions: slice

    @property
    def rows(self) -> int:
        """Number of rows."""
        return _length(self.samples) * self.width

    @property
    def width(self) -> int:
        """Number of directions of each sample."""
        return _length(self.directions)


@dataclass(frozen=True)
class Task:
    """One kernel that is computed block by block.

    Attributes:
        programs: programs of the traced network.
        directions: output directions ``[K, O]``, or one set per sample ``[N, K, O]``; ``None`` for the O unit vectors.
        O: outputs per sample.
        layers: the layers whose parameters count.
        memory: bytes that a contraction's intermediate results may use.
        tuning: how contractions are computed.
        fold: whether to sum over directions.
        certificates: certificates of the sets of weights and inputs that are not certified yet, by identity.
        grams: Gram matrices of weights that are computed from parameters, by the identity of a set of weights and the
            layer number.
    """

    programs: Programs
    directions: Tensor | None
    O: int  # noqa: E741 - the field's symbol
    layers: Sequence[Layer | ExplicitGradient]
    memory: int
    tuning: Tuning
    fold: bool = False
    certificates: Mapping[tuple[int, int], Certificate] = field(default_factory=dict)
    grams: dict[tuple[int, int], Gram] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of directions, K."""
        return self.O if self.directions is None else self.directions.shape[-2]

    def symmetric(self, parameters: ParameterValues, x: Tensor, block: Block) -> Tensor:
        """The lower triangle of a diagonal block; each layer is released as soon as it is added."""
        theta = self.zeros(parameters, block, block)
        self._run(parameters, x, block, lambda number, _, factors: self._add(theta, factors()))
        return theta

    def collected(self, parameters: ParameterValues, x: Tensor, block: Block) -> dict[int, LayerInputs]:
        """The inputs of all layers' gradients, by layer number."""
        kept: dict[int, LayerInputs] = {}
        self._run(parameters, x, block, lambda number, inputs, _: kept.__setitem__(number, inputs))
        return kept

    def own(self, kept: dict[int, LayerInputs], parameters: ParameterValues, block: Block) -> Tensor:
        """The lower triangle of a diagonal block, from :meth:`collected`."""
        theta = self.zeros(parameters, block, block)
        for number, inputs in kept.items():
            self._add(theta, self._factors(number, inputs, parameters))
        return theta

    def between(
        self,
        kept: dict[int, LayerInputs],
        row: Block,
        parameters: ParameterValues,
        x: Tensor,
        column: Block,
        *,
        again: bool,
    ) -> Tensor:
        """An off-diagonal block: rows from :meth:`collected`, columns from a separate run.

        ``again`` tells whether the columns were visited before.
        """
        theta = self.zeros(parameters, row, column)

        def add(number: int, _: LayerInputs, factors: Callable[[], GradientFactors]) -> None:
            self._add(theta, self._factors(number, kept[number], parameters), factors())

        self._run(parameters, x, column, add, again=again)
        return theta

    def add_diagonal(self, found: Tensor, parameters: ParameterValues, x: Tensor, block: Block) -> None:
        """Add the diagonal entries of a block to ``found [N, K]``."""

        def add(number: int, _: LayerInputs, factors: Callable[[], GradientFactors]) -> None:
            found.add_(contraction.diagonal(factors(), self.memory, self.tuning))

        self._run(parameters, x, block, add)

    def visit(
        self,
        parameters: ParameterValues,
        x: Tensor,
        block: Block,
        take: Callable[[int, GradientFactors], None] | None = None,
    ) -> None:
        """Deliver the factors of each layer's gradients in a block to ``take``, with the layer's number.

        Without ``take`` the block is run only for its certificate.
        """
        self._run(parameters, x, block, lambda number, _, factors: take(number, factors()) if take else None)

    def program(self, parameters: ParameterValues, x: Tensor, block: Block) -> Program:
        """The program that runs a block."""
        some = parameters[0].new_empty(_length(block.directions), self.O)  # same layout as at run time; never read
        directions = some.expand(_length(block.samples), -1, -1)
        own = self.directions is not None and self.directions.dim() == 3
        return self.programs.get(
            self.layers, parameters, x[block.samples], directions.contiguous() if own else directions
        )

    def _run(
        self,
        parameters: ParameterValues,
        x: Tensor,
        block: Block,
        take: Callable[[int, LayerInputs, Callable[[], GradientFactors]], None],
        *,
        again: bool = False,
    ) -> None:
        """Deliver a block to ``take``, and to its certificate if it has one and the block is new to it.

        ``take`` gets a layer's number, its inputs, and a function that computes its factors and caches them.
        """
        certificate = None if again else self.certificates.get((id(parameters), id(x)))

        def sink(number: int, inputs: LayerInputs) -> None:
            factors = functools.cache(lambda: self._factors(number, inputs, parameters))
            if certificate is not None:
                certificate.add(block.samples, block.directions, self.layers[number], factors())
            take(number, inputs, factors)

        self.programs.run(self.layers, parameters, x[block.samples], self._directions(parameters, block), sink)

    def _factors(self, number: int, inputs: LayerInputs, parameters: ParameterValues) -> GradientFactors:
        """The factors of a layer's gradients at a set of weights."""
        layer, key = self.layers[number], (id(parameters), number)
        if layer.computed is not None and key not in self.grams:
            self.grams[key] = self.programs.gram(layer.computed, parameters, tested=self.tuning.certified)
        return layer.factors(*inputs, self.grams.get(key))

    def _directions(self, parameters: ParameterValues, block: Block) -> Tensor:
        """``[N, K, O]`` of a block."""
        if self.directions is not None and self.directions.dim() == 3:
            return self.directions[block.samples, block.directions].contiguous()
        if self.directions is not None:
            some = self.directions[block.directions]
        else:
            some = parameters[0].new_zeros(_length(block.directions), self.O)
            some[:, block.directions].fill_diagonal_(1)
        return some.expand(_length(block.samples), -1, -1)

    def _add(self, theta: Tensor, left: GradientFactors, right: GradientFactors | None = None) -> None:
        if self.fold:
            left, right = left.folded(), None if right is None else right.folded()
        contraction.add(theta, left, right, self.memory, self.tuning)

    def zeros(self, parameters: ParameterValues, row: Block, column: Block) -> Tensor:
        """A rectangle of zeros to add to, ``[N1, K1, N2, K2]``; one direction each with ``fold``."""
        sizes = [n for b in (row, column) for n in (_length(b.samples), 1 if self.fold else _length(b.directions))]
        return parameters[0].new_zeros(sizes)


def _length(part: slice) -> int:
    return part.stop - part.start


def even(size: int, most: int) -> Iterator[tuple[int, int]]:
    """Bounds of the fewest parts of ``size``, each at most ``most`` and as equal as possible so that shapes repeat."""
    parts = -(-size // most)
    bounds = [size * i // parts for i in range(parts + 1)]
    yield from itertools.pairwise(bounds)
