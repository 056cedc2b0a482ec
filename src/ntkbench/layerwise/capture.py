"""Inputs of all layers and cotangents of their outputs, for all samples and several output directions, layer by layer.

A program contains the network's forward pass and its backward passes as one graph: one sample's graph, differentiated
with respect to the outputs of the layers, under ``vmap`` over output directions and samples. It is traced once per
shape. Each layer is delivered as soon as its cotangents are computed, and they are released right afterwards. At most
the activations and the cotangents of two layers are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from ntkbench import progress_bar
from ntkbench.layerwise.computed import Computed, Gram
from ntkbench.layerwise.layers import ExplicitGradient, Layer
from ntkbench.layerwise.trace import TRACING, SampleGraph, aten, free_layout, untraceable

ParameterValues = Sequence[Tensor]
"""Values of the trainable parameters, in the order in which the network was traced with them."""

LayerInputs = tuple[list[Tensor], list[Tensor]]
"""A layer's operands and cotangents, use by use, from which it computes the factors of its gradients."""

Sink = Callable[[int, LayerInputs], None]
"""Takes a layer's number and its operands and cotangents."""

MOST_PROGRAMS = 32
"""Maximum number of cached programs of one graph; the least recently used are dropped first."""


class Program:
    """Forward and backward passes for one shape of inputs and directions.

    It holds no values, and serves all networks with the same graph of one sample.

    Attributes:
        peak: peak bytes of a run, including one layer's inputs at all positions; parameters and inputs are not counted.
        held: bytes of the operands and cotangents of all layers.

    Args:
        graph: the network on one sample.
        layers: the layers to differentiate with respect to.
        parameters: in the order of ``graph.parameters``. Only the shapes of these and of the other tensors matter.
        constants: in the order of ``graph.constants``.
        x: inputs ``[N, ...]``.
        directions: cotangents of the outputs ``[N, K, O]``.

    Raises:
        BadInput: the backward passes cannot be traced.
    """

    def __init__(
        self,
        graph: SampleGraph,
        layers: Sequence[Layer | ExplicitGradient],
        parameters: ParameterValues,
        constants: Sequence[Tensor],
        x: Tensor,
        directions: Tensor,
    ) -> None:
        nodes = list(dict.fromkeys(use.node for layer in layers for use in layer.uses))
        names = [layer.parameters[0] for layer in layers if isinstance(layer, ExplicitGradient)]
        taps = [torch.zeros(v.shape, dtype=v.dtype, device=x.device) for v in (node.meta["val"] for node in nodes)]

        def joint(
            parameters: list[Tensor], constants: list[Tensor], x: Tensor, directions: Tensor, taps: list[Tensor]
        ) -> Any:
            def sample(x: Tensor, directions: Tensor) -> Any:
                def outputs(taps: list[Tensor], explicit: list[Tensor]) -> Any:
                    theta = list((by_name | dict(zip(names, explicit, strict=True))).values())
                    tap = dict(zip(nodes, taps, strict=True))
                    tapped = lambda node, value: value + tap[node] if node in tap else value  # noqa: E731
                    f, values = graph.run(theta, constants, x, tapped)
                    return f, [[values[use.operand] for use in layer.uses] for layer in layers]

                # torch declares the result with has_aux as a union of two types.
                _, pull, operands = vjp(outputs, taps, [by_name[name] for name in names], has_aux=True)  # type: ignore[misc]
                return operands, *vmap(pull)(directions)

            by_name = dict(zip(graph.parameters, parameters, strict=True))
            return vmap(sample)(x, directions)

        with TRACING, torch.no_grad(), untraceable("its backward passes"):
            traced = make_fx(functionalize(joint), tracing_mode="fake")(
                list(parameters), list(constants), x, directions, taps
            )
            self._module = _streamed(traced, len(taps), layers, nodes)
            self.peak, self.held = _footprint(self._module.graph, layers, len(x))
        for node in self._module.graph.nodes:
            node.meta.clear()

    def run(
        self, parameters: ParameterValues, constants: Sequence[Tensor], x: Tensor, directions: Tensor, sink: Sink
    ) -> None:
        """Deliver every layer's operands and cotangents to ``sink``, the last layer first."""
        with torch.no_grad():
            self._module(*parameters, *constants, x, directions, sink)


class Programs:
    """The programs of one network, traced on first use of a shape.

    Attributes:
        constants: constants of the network, in the order of ``graph.constants``.
        directions_run: sum over runs of (samples) x (directions): backward passes, each counted once per sample.

    Args:
        graph: the network on one sample.
        constants: as in the attributes.
        made: programs by shape, which all networks with this graph share.
    """

    def __init__(self, graph: SampleGraph, constants: Sequence[Tensor], made: dict[tuple[Any, ...], Program]) -> None:
        self.directions_run = 0
        self._graph, self.constants, self._made = graph, constants, made

    def get(
        self, layers: Sequence[Layer | ExplicitGradient], parameters: ParameterValues, x: Tensor, directions: Tensor
    ) -> Program:
        """The program for the shapes of ``x [N, ...]`` and ``directions [N, K, O]``.

        Directions that all samples share take less memory, so they have a program of their own.

        Raises:
            BadInput: the backward passes cannot be traced.
        """
        shared = directions.stride(0) == 0
        key = (tuple(x.shape), directions.shape[1], shared, tuple(layer.parameters for layer in layers))
        with TRACING:
            program = self._made.pop(key, None)
            if program is None:
                program = Program(self._graph, layers, parameters, self.constants, x, directions)
            self._made[key] = program
            if len(self._made) > MOST_PROGRAMS:
                del self._made[next(iter(self._made))]
            return program

    def run(
        self,
        layers: Sequence[Layer | ExplicitGradient],
        parameters: ParameterValues,
        x: Tensor,
        directions: Tensor,
        sink: Sink,
    ) -> None:
        """Run the program of a shape; see :meth:`Program.run`."""
        self.get(layers, parameters, x, directions).run(parameters, self.constants, x, directions, sink)
        taken = directions.shape[:2].numel()
        self.directions_run += taken
        progress_bar.advance(taken)

    def gram(self, weight: Computed, parameters: ParameterValues, *, tested: bool) -> Gram:
        """Inner products of gradients by the parameters that a weight is computed from; see :meth:`Computed.gram`."""
        return weight.gram(self._graph, parameters, self.constants, tested=tested)


def _deliver(sink: Sink, number: int, operands: list[Tensor], cotangents: list[Tensor]) -> None:
    sink(number, (operands, cotangents))


def _streamed(
    traced: fx.GraphModule, taps: int, layers: Sequence[Layer | ExplicitGradient], nodes: list[fx.Node]
) -> fx.GraphModule:
    """The traced program without its taps, with a delivery after the last operand or cotangent of each layer."""
    graph = traced.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for tap in placeholders[len(placeholders) - taps :]:
        _take_out(tap)
    (output,) = (node for node in graph.nodes if node.op == "output")
    flat = iter(output.args[0])
    operands = [[next(flat) for _ in layer.uses] for layer in layers]
    cotangents = {node: next(flat) for node in nodes}
    gradients = iter(flat)
    wanted = [[cotangents[use.node] for use in layer.uses] if layer.uses else [next(gradients)] for layer in layers]
    graph.erase_node(output)
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        sink = graph.placeholder("sink")
    order = {node: i for i, node in enumerate(graph.nodes)}
    for number, (left, right) in enumerate(zip(operands, wanted, strict=True)):
        with graph.inserting_after(max((*left, *right), key=order.__getitem__)):
            graph.call_function(_deliver, (sink, number, left, right))
    graph.output(None)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node.target is _deliver)
    for tap in placeholders[len(placeholders) - taps :]:
        if tap.users:  # used by the zero gradient of a layer that no output depends on
            value = tap.meta["val"]
            with graph.inserting_after(sink):
                zero = graph.call_function(
                    aten.zeros.default, (list(value.shape),), {"dtype": value.dtype, "device": value.device}
                )
            zero.meta["val"] = value
            tap.replace_all_uses_with(zero)
        graph.erase_node(tap)
    free_layout(graph)
    graph.set_codegen(fx.graph.CodeGen())  # flat arguments, as the placeholders are
    graph.lint()
    return fx.GraphModule(traced, graph)


def _take_out(tap: fx.Node) -> None:
    """Remove a tap. It is zero, so each sum with it equals the other summand."""
    reached = [tap]
    while reached:
        node = reached.pop()
        for user in list(node.users):
            if user.target is aten.add.Tensor:
                (other,) = (summand for summand in user.all_input_nodes if summand is not node)
                user.replace_all_uses_with(other)
            else:
                reached.append(user)


def _footprint(graph: fx.Graph, layers: Sequence[Layer | ExplicitGradient], samples: int) -> tuple[int, int]:
    """Peak bytes of a program, and bytes of all that it delivers."""
    nodes = list(graph.nodes)
    given = {_storage(value) for node in nodes if node.op == "placeholder" for value in _tensors(node)}
    last = {
        _storage(value): i for i, node in enumerate(nodes) for used in node.all_input_nodes for value in _tensors(used)
    }
    ending: dict[int, list[int]] = {}
    for storage, i in last.items():
        ending.setdefault(i, []).append(storage)
    alive: dict[int, int] = {}
    handed: dict[int, int] = {}
    peak = 0
    for i, node in enumerate(nodes):
        own = {_storage(value): value.untyped_storage().nbytes() for value in _tensors(node)}
        alive |= {storage: size for storage, size in own.items() if storage not in given and storage in last}
        extra = 0
        if node.target is _deliver:
            parts = {_storage(v): v for used in node.all_input_nodes for v in _tensors(used)}
            handed |= {storage: value.untyped_storage().nbytes() for storage, value in parts.items()}
            item = max((v.element_size() for v in parts.values()), default=4)
            layer = layers[node.args[1]]
            directions = node.args[3][0].meta["val"].shape[1]
            extra = item * samples * sum(use.inputs + directions * use.copied for use in layer.uses)
            if layer.computed is not None:  # scaled copies
                extra += sum(value.nbytes for value in parts.values())
                if layer.computed.blocks.shape[2] > 1:  # cotangents carried to the inputs
                    extra += item * samples * directions * sum(use.inputs for use in layer.uses)
        peak = max(peak, sum(alive.values()) + extra)
        for storage in ending.get(i, ()):
            alive.pop(storage, None)
    return peak, sum(handed.values())


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tensor)]


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata
