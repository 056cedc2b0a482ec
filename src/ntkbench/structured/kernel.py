"""The exact kernel of a network, by layers: whole, block by block, or its diagonal alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ntkbench.errors import BadInput
from ntkbench.structured import contraction
from ntkbench.structured.capture import Parts, Program, Sink
from ntkbench.structured.layers import Layer, Written, find
from ntkbench.structured.trace import MOVEMENTS, plain_operations, trace

CHECKED = 2
"""Samples on which the traced graph is held against the network itself."""
LIVE = 4
"""Cotangents of the largest value that are alive at a time: one, the next, and those of a branch."""

Parameters = Sequence[Tensor]


@dataclass(frozen=True)
class Block:
    """Some rows of the kernel: those of some samples in some output directions."""

    samples: slice
    directions: slice

    @property
    def rows(self) -> int:
        """How many they are."""
        return (self.samples.stop - self.samples.start) * (self.directions.stop - self.directions.start)


class LayerwiseKernel:
    """Theta = J J^T of one network by layers, never forming J.

    Rows are pairs of a sample and an output direction, samples first. A direction is a vector u of length O, and its
    row of J is the gradient of u . f(x); with the O unit vectors as directions the kernel is the NTK itself.

    Cost: one forward and K backward passes for K directions, the latter without the products that gradients of weights
    would take, and for each layer the cheaper of two contractions (see ``contraction.py``). Where memory makes blocks
    necessary, the columns are passed through anew for each block of rows. The program is traced anew for each new shape
    of a block.

    Attributes:
        layers: the network's parameters by their structure, weights with a rule first.
        O: outputs a sample.
        memory: bytes that everything but the result may take.
        directions_taken: backward passes so far, each counted once for each sample.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, memory: int) -> None:
        """Trace the network.

        Args:
            module: ``x -> [N, ...outputs]`` on the device of ``x``; samples must not interact.
            parameters: trainable parameters by name; they fix precision and device.
            x: inputs ``[N, ...]``, of which the first is traced.
            memory: bytes that everything but the result may take.

        Raises:
            BadInput: the traced network does not compute, or not differentiate to, what the network itself does.
        """
        self.memory = memory
        self.directions_taken = 0
        self._graph = trace(module, parameters, x)
        self.layers = find(self._graph)
        self._programs: dict[tuple, Program] = {}
        nodes = list(self._graph.graph.nodes)
        self.O = nodes[-1].args[0].meta["val"].numel()
        computed = [n.meta["val"] for n in nodes if n.op == "call_function" and n.target not in MOVEMENTS]
        sizes = [value.numel() for value in computed if isinstance(value, Tensor)]
        self._activations, self._largest = sum(sizes), max(sizes, default=0)
        self._itemsize = next(iter(parameters.values())).element_size()
        self._parameter_sizes = {name: w.numel() for name, w in parameters.items()}
        self._check(module, parameters, x)

    def last_layer(self) -> list[Layer | Written]:
        """The layers whose parameters are in the module that is used last."""
        order = {node: i for i, node in enumerate(self._graph.graph.nodes)}
        used = {
            name: max((order[user] for user in node.users), default=-1)
            for name, node in self._graph.placeholders().items()
        }
        last = _module_of(max(used, key=used.__getitem__))
        return [layer for layer in self.layers if _module_of(layer.parameters[0]) == last]

    def fallbacks(self) -> dict[str, str]:
        """Parameters whose gradients are written out for want of a rule, and why."""
        written = [layer for layer in self.layers if isinstance(layer, Written)]
        return {layer.parameters[0]: layer.fallback for layer in written if layer.fallback}

    def kernel(
        self,
        parameters: Parameters,
        x1: Tensor,
        x2: Tensor | None = None,
        directions: Tensor | None = None,
        *,
        layers: Sequence[Layer | Written] | None = None,
        fold: bool = False,
    ) -> Tensor:
        """The kernel between two sets of inputs, ``[N1 * K, N2 * K]``, rows sample-major.

        Args:
            parameters: trainable parameters, in the order of those that were given first.
            x1: inputs of the rows.
            x2: inputs of the columns; ``None`` for those of the rows, which saves half of the work.
            directions: output directions ``[K, O]``; all O unit vectors if not given.
            layers: whose parameters count; all if not given.
            fold: sum over directions, ``[N1, N2]`` with the entries sum_k Theta_(bk)(ck).
        """
        directions = self.units(parameters) if directions is None else directions
        shape = [n for x in (x1, x1 if x2 is None else x2) for n in (len(x), 1 if fold else len(directions))]
        theta = None
        for left, right, (part,) in self.blocks([parameters], x1, x2, directions, layers=layers, fold=fold):
            if theta is None and left.rows == right.rows == len(x1) * len(directions) and list(part.shape) == shape:
                theta = part  # one block is all
                continue
            theta = part.new_zeros(shape) if theta is None else theta
            at_left, at_right = (slice(None),) * 2 if fold else (left.directions, right.directions)
            theta[left.samples, at_left, right.samples, at_right] += part
            if x2 is None and left != right:
                theta[right.samples, at_right, left.samples, at_left] += part.permute(2, 3, 0, 1)
        return theta.flatten(2).flatten(0, 1)

    def blocks(
        self,
        sets: Sequence[Parameters],
        x1: Tensor,
        x2: Tensor | None,
        directions: Tensor,
        *,
        layers: Sequence[Layer | Written] | None = None,
        fold: bool = False,
    ) -> Iterator[tuple[Block, Block, list[Tensor]]]:
        """The kernel at several sets of parameters in blocks that fit in memory, ``[N1, K1, N2, K2]`` each.

        Without ``x2`` these are the blocks on and below the diagonal. With ``fold`` they are ``[N1, 1, N2, 1]``, and
        those of the same samples are to be added up.

        Args:
            sets: one or more sets of parameters.
            x1, x2, directions, layers, fold: see :meth:`kernel`.
        """
        layers = self.layers if layers is None else layers
        rows = self._blocks(len(x1), len(directions), layers, held=len(sets), whole=x2 is None)
        columns = rows if x2 is None else self._blocks(len(x2), len(directions), layers, held=len(sets), whole=False)
        for i, row in enumerate(rows):
            if x2 is None and len(rows) == 1:
                yield row, row, [self._symmetric(p, x1, directions, row, layers, fold) for p in sets]
                return
            kept = [self._collected(p, x1, directions, row, layers) for p in sets]
            if x2 is None:
                yield row, row, [self._own(k, x1, row, layers, fold) for k in kept]
            for column in columns[:i] if x2 is None else columns:
                if fold and row.directions != column.directions:
                    continue
                x = x1 if x2 is None else x2
                yield (
                    row,
                    column,
                    [
                        self._between(k, p, x, directions, row, column, layers, fold)
                        for k, p in zip(kept, sets, strict=True)
                    ],
                )

    def diagonal(
        self,
        parameters: Parameters,
        x: Tensor,
        directions: Tensor | None = None,
        *,
        layers: Sequence[Layer | Written] | None = None,
    ) -> Tensor:
        """The kernel's diagonal, ``[N, K]``: squared norms of gradients, without any kernel.

        Args:
            parameters, x, directions, layers: see :meth:`kernel`.
        """
        layers = self.layers if layers is None else layers
        directions = self.units(parameters) if directions is None else directions
        found = torch.zeros(len(x), len(directions), dtype=directions.dtype, device=directions.device)
        for block in self._blocks(len(x), len(directions), layers, held=0, whole=True):
            part = found[block.samples, block.directions]

            def add(number: int, parts: Parts, part: Tensor = part) -> None:
                part += contraction.diagonal(layers[number].factors(*parts), self.memory // 4)

            self._run(parameters, x, directions, block, layers, add)
        return found

    def units(self, parameters: Parameters) -> Tensor:
        """All O unit vectors as directions."""
        return torch.eye(self.O, dtype=parameters[0].dtype, device=parameters[0].device)

    def _symmetric(
        self, parameters: Parameters, x: Tensor, directions: Tensor, block: Block, layers: Sequence, fold: bool
    ) -> Tensor:
        """A block on the diagonal, each layer forgotten as soon as it is added."""
        theta = self._empty(block, block, directions, fold)

        def add(number: int, parts: Parts) -> None:
            factors = layers[number].factors(*parts)
            contraction.add(theta, factors.folded() if fold else factors, None, self.memory // 2)

        self._run(parameters, x, directions, block, layers, add)
        return _mirrored(theta)

    def _collected(
        self, parameters: Parameters, x: Tensor, directions: Tensor, block: Block, layers: Sequence
    ) -> dict[int, Parts]:
        kept: dict[int, Parts] = {}
        self._run(parameters, x, directions, block, layers, kept.__setitem__)
        return kept

    def _own(self, kept: dict[int, Parts], x: Tensor, block: Block, layers: Sequence, fold: bool) -> Tensor:
        """A block on the diagonal from what was collected."""
        theta = self._empty(block, block, x, fold)
        for number, parts in kept.items():
            factors = layers[number].factors(*parts)
            contraction.add(theta, factors.folded() if fold else factors, None, self.memory // 4)
        return _mirrored(theta)

    def _between(
        self,
        kept: dict[int, Parts],
        parameters: Parameters,
        x: Tensor,
        directions: Tensor,
        row: Block,
        column: Block,
        layers: Sequence,
        fold: bool,
    ) -> Tensor:
        """A block off the diagonal: rows were collected, columns pass by."""
        theta = self._empty(row, column, directions, fold)

        def add(number: int, parts: Parts) -> None:
            left, right = (layers[number].factors(*p) for p in (kept[number], parts))
            if fold:
                left, right = left.folded(), right.folded()
            contraction.add(theta, left, right, self.memory // 4)

        self._run(parameters, x, directions, column, layers, add)
        return theta

    def _empty(self, row: Block, column: Block, like: Tensor, fold: bool) -> Tensor:
        sizes = [n for b in (row, column) for n in (_length(b.samples), 1 if fold else _length(b.directions))]
        return like.new_zeros(sizes)

    def _run(
        self, parameters: Parameters, x: Tensor, directions: Tensor, block: Block, layers: Sequence, sink: Sink
    ) -> None:
        x = x[block.samples]
        directions = directions[block.directions].expand(len(x), -1, -1)
        key = (tuple(x.shape), len(directions[0]), tuple(layer.parameters for layer in layers))
        if key not in self._programs:
            self._programs[key] = Program(self._graph, layers, parameters, x, directions)
        self.directions_taken += block.rows
        self._programs[key].run(parameters, x, directions, sink)

    def _blocks(self, N: int, K: int, layers: Sequence[Layer | Written], *, held: int, whole: bool) -> list[Block]:
        """Rows in blocks that fit, and are at least one sample in one direction.

        Args:
            N: samples.
            K: directions.
            layers: whose parameters count.
            held: sets of parameters whose kernels are held at the same time; 0 if none is.
            whole: whether all rows may be one block, of which nothing is collected.
        """
        item = self._itemsize
        sample = item * (self._activations + max(map(self._inputs, layers), default=0))
        direction = item * LIVE * max(self._largest, max(map(self._cotangents, layers), default=0))
        if whole and 2 * N * (sample + K * direction) <= self.memory:
            return [Block(slice(0, N), slice(0, K))]
        if held:
            sample += held * item * self._activations
            direction += held * item * sum(map(self._cotangents, layers))
        budget = self.memory // 4
        samples = max(1, min(N, budget // (sample + K * direction)))
        some = K if samples > 1 else max(1, min(K, (budget - sample) // direction))
        if held:  # the kernels themselves are square
            rows = int((budget / (held * item)) ** 0.5)
            samples = max(1, min(samples, rows // some))
            some = min(some, max(1, rows))
        return [
            Block(slice(start, stop), slice(first, last))
            for start, stop in _even(N, samples)
            for first, last in _even(K, some)
        ]

    def _inputs(self, layer: Layer | Written) -> int:
        """Numbers that a sample's inputs of a layer take, each at every position that it is used at."""
        return sum(use.inputs for use in layer.uses)

    def _cotangents(self, layer: Layer | Written) -> int:
        """Numbers that a sample's cotangents of a layer take in one direction; its gradient if that is written out."""
        if isinstance(layer, Written):
            return self._parameter_sizes[layer.parameters[0]]
        return sum(use.node.meta["val"].numel() for use in layer.uses)

    def _check(self, module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> None:
        """Hold the traced graph against the network on a few samples, in values and in a gradient."""
        some = x[:CHECKED]

        def theirs(theta: list[Tensor]) -> Tensor:
            with plain_operations():
                return functional_call(module, dict(zip(parameters, theta, strict=True)), (some,)).reshape(
                    len(some), -1
                )

        def ours(theta: list[Tensor]) -> Tensor:
            return vmap(lambda sample: self._graph.run(theta, list(self._graph.constants.values()), sample)[0])(some)

        found = []
        for f in (theirs, ours):
            theta = [w.detach().requires_grad_() for w in parameters.values()]
            outputs = f(theta)
            v = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype, device=outputs.device)
            grads = torch.autograd.grad((outputs.reshape(-1) * v).sum(), theta, materialize_grads=True)
            found.append((outputs.detach(), torch.cat([g.reshape(-1) for g in grads])))
        for (a, b), what in zip(zip(*found, strict=True), ("outputs", "gradients"), strict=True):
            if a.shape != b.shape or (a - b).abs().max() > torch.finfo(a.dtype).eps ** 0.5 * a.abs().max():
                raise BadInput(
                    f"the network cannot be traced: as a graph of operations it has other {what} than as it is. Is "
                    "there a branch on data, a torch.no_grad() or an autograd.Function in its forward?"
                )


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _length(part: slice) -> int:
    return part.stop - part.start


def _even(size: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut ``size`` into the fewest parts of at most ``most``, as equal as can be: few shapes, few programs."""
    parts = -(-size // most)
    bounds = [size * i // parts for i in range(parts + 1)]
    yield from itertools.pairwise(bounds)


def _mirrored(theta: Tensor) -> Tensor:
    """Copy the lower triangle of ``[N, K, N, K]`` to the upper one, in place."""
    flat = theta.view(theta.shape[0] * theta.shape[1], -1)
    size = 1024
    for start in range(0, len(flat), size):
        stop = min(start + size, len(flat))
        flat[start:stop, stop:] = flat[stop:, start:stop].T
        square = flat[start:stop, start:stop]
        square.copy_(square.tril() + square.tril(-1).T)
    return theta
