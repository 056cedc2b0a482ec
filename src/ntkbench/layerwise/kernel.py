"""The exact kernel of a network, layer by layer: as a whole, block by block, or its diagonal alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ntkbench.layerwise.blocks import Block, Task, even
from ntkbench.layerwise.capture import ParameterValues, Program, Programs
from ntkbench.layerwise.certificate import Certificate
from ntkbench.layerwise.factors import GradientFactors
from ntkbench.layerwise.layers import ExplicitGradient, Layer, find, last_uses, of_last_module
from ntkbench.layerwise.rules import Use
from ntkbench.layerwise.trace import SampleGraph, trace
from ntkbench.layerwise.tuning import Tuning
from ntkbench.operators import arrays, certificate
from ntkbench.operators.plain import PlainNetwork

T = TypeVar("T")


@dataclass(frozen=True)
class Trace:
    """The trace of a network. It holds no values of parameters or buffers, so that equal networks can share it.

    Attributes:
        graph: the network on one sample.
        layers: the parameters, grouped by the structure of their gradients, weights with a rule first.
        programs: by shape, each traced on first use.
    """

    graph: SampleGraph
    layers: list[Layer | ExplicitGradient]
    programs: dict[tuple[Any, ...], Program] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Trace:
        """The trace of a network; see :class:`LayerwiseKernel` for the arguments.

        Raises:
            BadInput: the network cannot be traced.
        """
        graph = trace(module, parameters, x)
        constants = functools.cache(lambda: graph.bind(module, x.device))
        return cls(graph, find(graph, list(parameters.values()), constants))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that it holds: literals of the forward pass, arrangements and blocks of weights."""
        entries = (use.entries for layer in self.layers for use in layer.uses)
        blocks = (layer.computed.blocks for layer in self.layers if layer.computed)
        return sum(t.nbytes for t in (*self.graph.prelude.literals.values(), *entries, *blocks) if not t.is_meta)


class LayerwiseKernel:
    """Theta = J J^T of one network, layer by layer and without J.

    Rows are pairs of a sample and an output direction, sample-major. A direction is a vector u of length O; its row of
    J is the gradient of u . f(x). With the O unit vectors as directions the kernel is the NTK itself.

    Cost for K directions: one forward and K backward passes, the latter without the weights' gradients, and for each
    layer the cheaper of two contractions (see ``contraction.py``). If the kernel is computed in blocks, the columns are
    run again for each block of rows. Each new shape of a block is traced once. The first kernel at each set of weights,
    set of inputs and number of directions is certified by one more plain backward pass (see ``certificate.py``).

    Attributes:
        trace: the trace of the network.
        O: outputs per sample.
        memory: bytes that everything except the result may use.
        certificate: the largest relative difference from plain autograd in a gradient so far; ``None`` before the
            first kernel.

    Args:
        module: ``x -> [N, ...outputs]`` on the device of ``x``; samples must not interact.
        parameters: trainable parameters by name; they fix precision and device.
        x: inputs ``[N, ...]``; the first sample is traced.
        memory: bytes that everything except the result may use.
        tuning: sizes and costs that affect only speed; ``None`` for the device's defaults.
        trace: trace of a network with the same operations; ``None`` to trace this one.
        retrace: traces this network if the computation fails with ``trace``, or if plain autograd contradicts it.

    Raises:
        BadInput: the network cannot be traced.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, Tensor],
        x: Tensor,
        memory: int,
        tuning: Tuning | None = None,
        *,
        trace: Trace | None = None,
        retrace: Callable[[], Trace] | None = None,
    ) -> None:
        self.memory = memory
        self._tuning = tuning or Tuning.on(x.device)
        self._module, self._device, self._retrace = module, x.device, retrace
        self._plain = functools.cache(lambda: PlainNetwork(module, parameters))
        self._certified: list[tuple[_Values, int, frozenset[str]]] = []
        self.certificate: float | None = None
        self._bind(trace or Trace.of(module, parameters, x))

    def _bind(self, trace: Trace) -> None:
        """Use a trace from now on, with the values of this network."""
        self.trace = trace
        self._programs = Programs(trace.graph, trace.graph.bind(self._module, self._device), trace.programs)
        self.O = next(iter(reversed(trace.graph.graph.nodes))).args[0].meta["val"].numel()

    @property
    def layers(self) -> list[Layer | ExplicitGradient]:
        """The network's parameters, grouped by the structure of their gradients, weights with a rule first."""
        return self.trace.layers

    @property
    def directions_taken(self) -> int:
        """Backward passes so far, each counted once per sample."""
        return self._programs.directions_run

    @property
    def note(self) -> str:
        """What certificates leave open; see :class:`ntkbench.operators.plain.PlainNetwork`."""
        return self._plain().note

    def last_layer(self) -> list[Layer | ExplicitGradient]:
        """The layers with parameters of the module whose parameters are used last.

        Raises:
            BadInput: the outputs depend on no parameter.
        """
        last = of_last_module(self._module, last_uses(self.trace.graph))
        return [layer for layer in self.layers if not last.isdisjoint(layer.parameters)]

    def fallbacks(self) -> dict[str, str]:
        """Parameters with explicit gradients because no rule applies, and the reason for each."""
        explicit = [layer for layer in self.layers if isinstance(layer, ExplicitGradient)]
        return {layer.parameters[0]: layer.fallback for layer in explicit if layer.fallback}

    def difference(self, parameters: ParameterValues, x: Tensor) -> float:
        """The relative difference between the trace and plain autograd, in a gradient of one sample; 2 passes over it.

        Args:
            parameters: values of the trainable parameters, in the constructor's order.
            x: one sample, without batch axis.
        """
        leaves = [w.detach().requires_grad_() for w in parameters]
        with torch.enable_grad():
            f, _ = self.trace.graph.run(leaves, self._programs.constants, x)
            v = certificate.random_weights(len(f), f.detach())
            found = torch.autograd.grad(f, leaves, v, materialize_grads=True, allow_unused=True)
        plain = self._plain()
        plain.load(parameters)
        return certificate.distance_of_parts(zip(found, plain.gradient(x[None], v), strict=True))

    def certain(self, compute: Callable[[], T]) -> T:
        """``compute()``, repeated with a trace of this network if it fails with the trace of another."""
        try:
            return compute()
        except Exception:  # the trace of another network may fail in any way
            if self._retrace is None:
                raise
            retrace, self._retrace = self._retrace, None
            taken = self.directions_taken
            self._bind(retrace())
            self._programs.directions_run = taken
            self.forget_certificates()
        return compute()

    def kernel(
        self,
        parameters: ParameterValues,
        x1: Tensor,
        x2: Tensor | None = None,
        directions: Tensor | None = None,
        *,
        last_layer: bool = False,
        fold: bool = False,
    ) -> Tensor:
        """The kernel between two sets of inputs, ``[N1 * K, N2 * K]``, rows sample-major.

        Args:
            parameters: values of the trainable parameters, in the constructor's order.
            x1: inputs of the rows.
            x2: inputs of the columns; ``None`` for those of the rows, which halves the work.
            directions: output directions ``[K, O]``, or without ``x2`` one set per sample ``[N1, K, O]``; ``None`` for
                the O unit vectors.
            last_layer: whether only the parameters of :meth:`last_layer` count.
            fold: whether to sum over directions: ``[N1, N2]`` with the entries sum_k Theta_(bk)(ck).

        Raises:
            Uncertified: plain autograd gives other gradients.
        """
        return self.certain(lambda: self._kernel(parameters, x1, x2, directions, last_layer, fold))

    def _kernel(
        self,
        parameters: ParameterValues,
        x1: Tensor,
        x2: Tensor | None,
        directions: Tensor | None,
        last_layer: bool,
        fold: bool,
    ) -> Tensor:
        count = self.O if directions is None else directions.shape[-2]
        shape = [n for x in (x1, x1 if x2 is None else x2) for n in (len(x), 1 if fold else count)]
        theta = None
        made = self.blocks([parameters], x1, x2, directions, last_layer=last_layer, fold=fold, kept=True)
        for left, right, (part,) in made:
            if x2 is None and left == right:
                mirror(part, self._tuning.tile)
            if theta is None and left.rows == right.rows == len(x1) * count and list(part.shape) == shape:
                theta = part  # a single block
                continue
            theta = part.new_zeros(shape) if theta is None else theta
            at_left, at_right = (slice(None),) * 2 if fold else (left.directions, right.directions)
            theta[left.samples, at_left, right.samples, at_right] += part
            if x2 is None and left != right:
                theta[right.samples, at_right, left.samples, at_left] += part.permute(2, 3, 0, 1)
        assert theta is not None  # there is at least one block
        return theta.flatten(2).flatten(0, 1)

    def blocks(
        self,
        sets: Sequence[ParameterValues],
        x1: Tensor,
        x2: Tensor | None = None,
        directions: Tensor | None = None,
        *,
        last_layer: bool = False,
        fold: bool = False,
        kept: bool = False,
    ) -> Iterator[tuple[Block, Block, list[Tensor]]]:
        """The kernels at several sets of weights in blocks that fit in memory, ``[N1, K1, N2, K2]`` each.

        Without ``x2`` only blocks on and below the diagonal are computed, and of a block on the diagonal only its lower
        triangle. With ``fold`` a block is ``[N1, 1, N2, 1]``, and blocks of the same samples add up. The caller
        iterates within :meth:`certain`.

        Args:
            sets: one or more sets of weights.
            x1, x2, directions, last_layer, fold: see :meth:`kernel`.
            kept: whether all blocks are kept, so that a single one may be larger than the memory.

        Yields:
            The block's rows, its columns, and its entries at each set of weights.

        Raises:
            Uncertified: plain autograd gives other gradients; after the last block.
        """
        inputs = [x1] if x2 is None else [x1, x2]
        task = self._task(directions, last_layer, fold, [(parameters, x) for parameters in sets for x in inputs])
        yield from self._all_blocks(task, sets, x1, x2, kept)
        self._certify(task, sets, inputs)

    def _all_blocks(
        self, task: Task, sets: Sequence[ParameterValues], x1: Tensor, x2: Tensor | None, kept: bool
    ) -> Iterator[tuple[Block, Block, list[Tensor]]]:
        columns_of = x1 if x2 is None else x2
        if x2 is None:
            rows = columns = self._blocks(task, sets, x1, whole=kept or self._fits(task, sets, x1))
        else:
            rows, columns = self._rectangle(task, sets, x1, x2)
        if x2 is None and len(rows) == 1:
            yield rows[0], rows[0], [task.symmetric(parameters, x1, rows[0]) for parameters in sets]
            return
        seen: list[Block] = []
        for i, row in enumerate(rows):
            held = [task.collected(parameters, x1, row) for parameters in sets]
            if x2 is None:
                yield row, row, [task.own(parts, p, row) for parts, p in zip(held, sets, strict=True)]
            for column in columns[:i] if x2 is None else columns:
                # A sum over directions pairs each direction with itself only.
                if not task.fold or row.directions == column.directions:
                    again = x2 is None or column in seen
                    seen.append(column)
                    both = zip(held, sets, strict=True)
                    found = [task.between(parts, row, p, columns_of, column, again=again) for parts, p in both]
                    yield row, column, found

    def diagonal(
        self,
        parameters: ParameterValues,
        x: Tensor,
        directions: Tensor | None = None,
        *,
        last_layer: bool = False,
    ) -> Tensor:
        """The kernel's diagonal, ``[N, K]``: squared norms of gradients, without the kernel.

        Args:
            parameters, x, directions, last_layer: see :meth:`kernel`.

        Raises:
            Uncertified: plain autograd gives other gradients.
        """
        return self.certain(lambda: self._diagonal(parameters, x, directions, last_layer))

    def _diagonal(self, parameters: ParameterValues, x: Tensor, directions: Tensor | None, last_layer: bool) -> Tensor:
        task = self._task(directions, last_layer, certified=[(parameters, x)])
        found = parameters[0].new_zeros(len(x), task.count)
        for block in self._blocks(task, [], x, whole=True, parameters=parameters):
            task.add_diagonal(found[block.samples, block.directions], parameters, x, block)
        self._certify(task, [parameters], [x])
        return found

    def certify(
        self,
        parameters: ParameterValues,
        inputs: Sequence[Tensor],
        directions: Tensor | None = None,
        *,
        last_layer: bool = False,
    ) -> None:
        """Certify all rows of the kernels at a set of weights without computing them; K + 1 passes over new inputs.

        Args:
            parameters, directions, last_layer: see :meth:`kernel`.
            inputs: inputs of the rows, and of the columns if these differ.

        Raises:
            Uncertified: plain autograd gives other gradients.
        """
        task = self._task(directions, last_layer, certified=[(parameters, x) for x in inputs])
        for x in inputs:
            if (id(parameters), id(x)) in task.certificates:
                for block in self._blocks(task, [], x, whole=True, parameters=parameters):
                    task.visit(parameters, x, block)
        self._certify(task, [parameters], inputs)

    def visit(
        self,
        parameters: ParameterValues,
        x: Tensor,
        take: Callable[[Block, int, GradientFactors], None],
        directions: Tensor | None = None,
    ) -> None:
        """Deliver the gradients of all rows in factored form, layer by layer; K passes. Called within :meth:`certain`.

        Args:
            parameters, x, directions: see :meth:`kernel`.
            take: gets some rows, the number of a layer in ``layers``, and the factors of that layer's part of the rows.

        Raises:
            Uncertified: plain autograd gives other gradients.
        """
        task = self._task(directions, certified=[(parameters, x)])
        for block in self._blocks(task, [], x, whole=True, parameters=parameters):
            task.visit(parameters, x, block, functools.partial(take, block))
        self._certify(task, [parameters], [x])

    def directions_at_once(self, parameters: ParameterValues, x: Tensor, most: int) -> int:
        """The number of directions, at most ``most``, that :meth:`visit` delivers of each sample in one block."""
        for count in (most // 2**halvings for halvings in range(most.bit_length())):
            # Same layout as random directions; never read.
            directions = None if count == self.O else parameters[0].new_empty(1).expand(len(x), count, self.O)
            blocks = self._blocks(self._task(directions), [], x, whole=True, parameters=parameters)
            if all(block.directions == slice(0, count) for block in blocks):
                return count
        return 0

    def operands(self, uses: Sequence[Use], parameters: ParameterValues, x: Tensor) -> list[Tensor]:
        """The operand of a weight at each of some uses, for each sample: ``[N, ...]``; one forward pass.

        Args:
            uses: uses of layers in ``layers``.
            parameters, x: see :meth:`kernel`.
        """
        with torch.no_grad():
            runs = (self.trace.graph.run(parameters, self._programs.constants, sample)[1] for sample in x)
            found = [[values[use.operand] for use in uses] for values in runs]
            return [torch.stack(column) for column in zip(*found, strict=True)]

    def forget_certificates(self) -> None:
        """Certify the next kernel even if it was certified before."""
        self._certified.clear()

    def passes(
        self, sets: Sequence[ParameterValues], x: Tensor, directions: Tensor | None = None, *, kept: bool = True
    ) -> float:
        """Passes over the whole batch that :meth:`blocks` takes per set of weights without ``x2``, for this
        ``kept``."""
        task = self._task(directions)
        rows = self._blocks(task, sets, x, whole=kept or self._fits(task, sets, x))
        return sum(block.rows * (len(rows) - i) for i, block in enumerate(rows)) / len(x)

    def program(
        self, layers: Sequence[Layer | ExplicitGradient], parameters: ParameterValues, x: Tensor, directions: Tensor
    ) -> Program:
        """The program for the shapes of ``x [N, ...]`` and ``directions [N, K, O]``, traced on first use."""
        return self._programs.get(layers, parameters, x, directions)

    def _task(
        self,
        directions: Tensor | None,
        last_layer: bool = False,
        fold: bool = False,
        certified: Sequence[tuple[ParameterValues, Tensor]] = (),
    ) -> Task:
        """What is to be computed, with certificates of the sets of weights and inputs that have none."""
        layers = self.last_layer() if last_layer else self.layers
        task = Task(self._programs, directions, self.O, layers, self.memory // 4, self._tuning, fold)
        names, needed = list(self.trace.graph.parameters), _names(layers)
        return dataclasses.replace(
            task,
            certificates={
                (id(parameters), id(x)): Certificate(names, parameters, x, directions, task.count, needed)
                for parameters, x in certified
                if self._tuning.certified and not self._is_certified(task, parameters, x)
            },
        )

    def _is_certified(self, task: Task, parameters: ParameterValues, x: Tensor) -> bool:
        """Whether a kernel of these layers with as many directions was certified on the same values."""
        wanted = _names(task.layers)
        return any(
            values.are((*parameters, x)) and count == task.count and wanted <= names
            for values, count, names in self._certified
        )

    def _certify(self, task: Task, sets: Sequence[ParameterValues], inputs: Sequence[Tensor]) -> None:
        """Compare the gradients accumulated by a task with plain autograd.

        Raises:
            Uncertified: they differ.
        """
        for parameters, x in itertools.product(sets, inputs):
            if gathered := task.certificates.get((id(parameters), id(x))):
                off = gathered.difference(self._plain(), self.memory)
                certificate.check(off, arrays.epsilon(parameters[0]))
                self._certified = [entry for entry in self._certified if entry[0].alive()]
                self._certified.append((_Values((*parameters, x)), task.count, _names(task.layers)))
                self.certificate = max(off, self.certificate or 0.0)

    def _fits(self, task: Task, sets: Sequence[ParameterValues], x: Tensor) -> bool:
        """Whether the kernels at all sets of weights fit as a whole in the memory that a run leaves."""
        rows = len(x) * (1 if task.fold else task.count)
        return len(sets) * rows**2 * sets[0][0].element_size() <= self.memory // 4

    def _rectangle(
        self,
        task: Task,
        sets: Sequence[ParameterValues],
        x1: Tensor,
        x2: Tensor,
        row: Block | None = None,
        column: Block | None = None,
    ) -> tuple[list[Block], list[Block]]:
        """Blocks of the rows and of the columns of a rectangle; with ``fold``, both in the same ranges of directions.

        Args:
            task, sets: see :meth:`_blocks`.
            x1, x2: inputs of all rows and of all columns.
            row, column: the rectangle; all rows and columns if not given.
        """
        both = ((x1, row), (x2, column))
        rows, columns = (self._blocks(task, sets, x, whole=False, within=part) for x, part in both)
        if task.fold and {block.directions.start for block in rows} != {block.directions.start for block in columns}:
            most = min(max(block.width for block in blocks) for blocks in (rows, columns))
            rows, columns = (self._blocks(task, sets, x, whole=False, within=part, most=most) for x, part in both)
        return rows, columns

    def _blocks(
        self,
        task: Task,
        sets: Sequence[ParameterValues],
        x: Tensor,
        *,
        whole: bool,
        parameters: ParameterValues | None = None,
        within: Block | None = None,
        most: int | None = None,
    ) -> list[Block]:
        """Blocks of rows that fit in memory, each of at least one sample in one direction.

        Half of the memory is for a program and for the collected inputs of its rows, a quarter for the blocks of the
        kernel, and a quarter for the contraction of a layer.

        Args:
            task: what is computed.
            sets: sets of weights for which the rows of a block are collected at the same time.
            x: inputs of all rows.
            whole: whether all rows may form one block, for which nothing is collected.
            parameters: any set of weights, if ``sets`` is empty.
            within: the rows; all if not given.
            most: largest number of directions of a block, if there is one.
        """
        everything = within or Block(slice(0, len(x)), slice(0, task.count))
        (N, first_sample), (K, first_direction) = (
            (part.stop - part.start, part.start) for part in (everything.samples, everything.directions)
        )
        item = (parameters or sets[0])[0].element_size()
        # The unit vectors that fit in memory give the cost of a direction; all of them are O x O.
        tried = K if task.directions is not None else min(K, max(1, self.memory // (self.O * item)))
        trial = Block(everything.samples, slice(first_direction, first_direction + tried))
        program = task.program(parameters or sets[0], x, trial)
        units = K * self.O * item if task.directions is None else 0  # made for each block
        if whole and tried == K and 2 * program.peak + 8 * units <= self.memory:
            return [everything]
        needed = program.peak + len(sets) * program.held
        fits = self.memory // 2 / needed * N  # samples, in all the directions that were tried
        samples, some = max(1, min(N, int(fits))), tried if fits >= 1 else max(1, int(fits * tried))
        if units:
            some = max(1, min(some, self.memory // (8 * self.O * item)))
        if sets:
            rows = max(1, int((self.memory / 4 / (len(sets) * item)) ** 0.5))
            samples, some = max(1, min(samples, rows // some)), min(some, rows)
        some = min(some, most or some)
        return [
            Block(
                slice(first_sample + start, first_sample + stop), slice(first_direction + first, first_direction + last)
            )
            for start, stop in even(N, samples)
            for first, last in even(K, some)
        ]


class _Values:
    """Identifies tensors and their current entries, without keeping them in memory."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._held = [(weakref.ref(t), t._version) for t in tensors]

    def alive(self) -> bool:
        """Whether all of the tensors still exist."""
        return all(ref() is not None for ref, _ in self._held)

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, and nothing was written to them since."""
        return all(ref() is t and version == t._version for (ref, version), t in zip(self._held, tensors, strict=True))


def _names(layers: Sequence[Layer | ExplicitGradient]) -> frozenset[str]:
    return frozenset(name for layer in layers for name in layer.parameters)


def mirror(theta: Tensor, tile: int) -> None:
    """Copy the lower triangle of ``[N, K, N, K]`` to the upper one, in place.

    Args:
        theta: the kernel.
        tile: rows and columns that are transposed at a time, so that they stay in the cache.
    """
    flat = theta.view(theta.shape[0] * theta.shape[1], -1)
    parts = [slice(start, min(start + tile, len(flat))) for start in range(0, len(flat), tile)]
    for i, rows in enumerate(parts):
        for columns in parts[i + 1 :]:
            flat[rows, columns] = flat[columns, rows].T
        square = flat[rows, rows]
        square.copy_(square.tril() + square.tril(-1).T)
