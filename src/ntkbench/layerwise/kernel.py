"""The exact kernel of a network, by layers: whole, block by block, or its diagonal alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ntkbench.errors import BadInput
from ntkbench.layerwise.blocks import Block, Task, even
from ntkbench.layerwise.capture import Parameters, Program
from ntkbench.layerwise.layers import Layer, Written, find
from ntkbench.layerwise.trace import trace
from ntkbench.operators.plain_operations import plain_operations

CHECKED = 2
"""Samples on which the traced graph is held against the network itself."""


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
            directions: output directions ``[K, O]``, or each sample's own ``[N1, K, O]`` where there is no ``x2``; all
                O unit vectors if not given.
            layers: whose parameters count; all if not given.
            fold: sum over directions, ``[N1, N2]`` with the entries sum_k Theta_(bk)(ck).
        """
        directions = self.units(parameters) if directions is None else directions
        count = directions.shape[-2]
        shape = [n for x in (x1, x1 if x2 is None else x2) for n in (len(x), 1 if fold else count)]
        theta = None
        for left, right, (part,) in self.blocks([parameters], x1, x2, directions, layers=layers, fold=fold):
            if x2 is None and left == right:
                _mirror(part)
            if theta is None and left.rows == right.rows == len(x1) * count and list(part.shape) == shape:
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

        Without ``x2`` these are the blocks on and below the diagonal, and of those on it the lower triangle counts.
        With ``fold`` they are ``[N1, 1, N2, 1]``, and those of the same samples are to be added up.

        Args:
            sets: one or more sets of parameters.
            x1, x2, directions, layers, fold: see :meth:`kernel`.
        """
        task = Task(self, directions, self.layers if layers is None else layers, fold)
        columns_of = x1 if x2 is None else x2
        rows = self._blocks(task, sets, x1, whole=x2 is None)
        if x2 is None and len(rows) == 1:
            yield rows[0], rows[0], [task.symmetric(parameters, x1, rows[0]) for parameters in sets]
            return
        columns = rows if x2 is None else self._blocks(task, sets, x2, whole=False)
        for i, row in enumerate(rows):
            kept = [task.collected(parameters, x1, row) for parameters in sets]
            if x2 is None:
                yield row, row, [task.own(parts, row) for parts in kept]
            for column in columns[:i] if x2 is None else columns:
                # A sum over directions takes each with itself.
                if not fold or row.directions == column.directions:
                    both = zip(kept, sets, strict=True)
                    yield row, column, [task.between(parts, row, p, columns_of, column) for parts, p in both]

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
        directions = self.units(parameters) if directions is None else directions
        task = Task(self, directions, self.layers if layers is None else layers)
        found = directions.new_zeros(len(x), directions.shape[-2])
        for block in self._blocks(task, [], x, whole=True, parameters=parameters):
            task.add_diagonal(found[block.samples, block.directions], parameters, x, block)
        return found

    def passes(self, sets: Sequence[Parameters], x: Tensor, directions: Tensor) -> float:
        """What :meth:`blocks` will take of passes over the whole batch, without ``x2``, for one set of parameters."""
        rows = self._blocks(Task(self, directions, self.layers), sets, x, whole=True)
        return sum(block.rows * (len(rows) - i) for i, block in enumerate(rows)) / len(x)

    def units(self, parameters: Parameters) -> Tensor:
        """All O unit vectors as directions."""
        return torch.eye(self.O, dtype=parameters[0].dtype, device=parameters[0].device)

    def program(
        self, layers: Sequence[Layer | Written], parameters: Parameters, x: Tensor, directions: Tensor
    ) -> Program:
        """The program of a shape, traced at its first use."""
        key = (tuple(x.shape), directions.shape[1], tuple(layer.parameters for layer in layers))
        if key not in self._programs:
            self._programs[key] = Program(self._graph, layers, parameters, x, directions)
        return self._programs[key]

    def _blocks(
        self,
        task: Task,
        sets: Sequence[Parameters],
        x: Tensor,
        *,
        whole: bool,
        parameters: Parameters | None = None,
    ) -> list[Block]:
        """Rows in blocks that fit, and are at least one sample in one direction.

        Half of the memory is for what a program holds at a time (and for what is collected of its rows), a quarter for
        kernels of blocks, a quarter for the contraction of a layer.

        Args:
            task: what is to be computed.
            sets: parameters for which the rows of a block are collected at the same time.
            x: all inputs of the rows.
            whole: whether all rows may be one block, of which nothing is collected.
            parameters: any, where there are no ``sets``.
        """
        N, K = len(x), task.directions.shape[-2]
        everything = Block(slice(0, N), slice(0, K))
        program = task.program(parameters or sets[0], x, everything)
        if whole and 2 * program.peak <= self.memory:
            return [everything]
        needed = program.peak + len(sets) * program.held
        fits = self.memory // 2 / needed * N  # samples, in all directions
        samples, some = max(1, min(N, int(fits))), K if fits >= 1 else max(1, int(fits * K))
        if sets:
            rows = max(1, int((self.memory / 4 / (len(sets) * task.directions.element_size())) ** 0.5))
            samples, some = max(1, min(samples, rows // some)), min(some, rows)
        return [
            Block(slice(start, stop), slice(first, last))
            for start, stop in even(N, samples)
            for first, last in even(K, some)
        ]

    def _check(self, module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> None:
        """Hold the traced graph against the network on a few samples, in values and in a gradient."""
        some = x[:CHECKED]

        def theirs(theta: list[Tensor]) -> Tensor:
            with plain_operations(module):
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


def _mirror(theta: Tensor) -> None:
    """Copy the lower triangle of ``[N, K, N, K]`` to the upper one, in place."""
    flat = theta.view(theta.shape[0] * theta.shape[1], -1)
    size = 256  # of tiles: a transposed copy of one stays in the cache
    parts = [slice(start, min(start + size, len(flat))) for start in range(0, len(flat), size)]
    for i, rows in enumerate(parts):
        for columns in parts[i + 1 :]:
            flat[rows, columns] = flat[columns, rows].T
        square = flat[rows, rows]
        square.copy_(square.tril() + square.tril(-1).T)
