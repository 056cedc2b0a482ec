"""One sample's forward pass as a graph of ATen operations.

A single sample is traced, and ``vmap`` adds the other samples afterwards. Whatever the network does to its axes (time
first, flattened sequences, grouped channels), every value of the graph then belongs to one sample, and its axes are
positions and channels.

Values that depend on neither the parameters nor the sample are computed beforehand. A graph refers to them by name and
does not hold them, so that one graph serves all networks of the same structure.
"""

from __future__ import annotations

import contextlib
import operator
import textwrap
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from ntkbench.ambient import uncompiled
from ntkbench.errors import BadInput, Unsupported
from ntkbench.layerwise.recording import SHAPED, DataDependent, as_autograd_sees_it
from ntkbench.layerwise.replacements import DECOMPOSITIONS, REPLACEMENTS
from ntkbench.modules import with_values
from ntkbench.operators.plain_operations import plain_operations, without_shortcuts

aten = torch.ops.aten

TRACING = threading.RLock()
"""Held while anything is traced: tracers keep state that all threads of a process share."""


@dataclass(frozen=True)
class Prelude:
    """The part of a network that depends only on its buffers and frozen parameters.

    Attributes:
        graph: placeholders have the names of buffers and frozen parameters as targets; the outputs are a tuple.
        literals: tensors that are neither, such as those made from Python numbers, by the targets of their nodes.
    """

    graph: fx.Graph
    literals: Mapping[str, Tensor]

    @torch.no_grad()
    def run(self, fixed: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs on the CPU, for buffers and frozen parameters by name."""
        values: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = fixed[node.target].cpu()
            elif node.op == "get_attr":
                values[node] = self.literals[node.target]
            elif node.op == "output":
                return [values[made] for made in node.args[0]]
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
        raise AssertionError("a graph ends with its output")


@dataclass(frozen=True)
class SampleGraph:
    """A network on one sample as ATen operations.

    Attributes:
        graph: placeholders are the parameters, then x with a batch axis of one. No operation works in place.
        parameters: names of the trainable parameters.
        constants: shapes and types of the tensors that the graph refers to by name: buffers, frozen parameters, and
            results computed from them.
        prelude: computes the constants, in this order.
    """

    graph: fx.Graph
    parameters: tuple[str, ...]
    constants: Mapping[str, tuple[torch.Size, torch.dtype]]
    prelude: Prelude

    def placeholders(self) -> dict[str, fx.Node]:
        """The trainable parameters' placeholders by name."""
        return dict(zip(self.parameters, (n for n in self.graph.nodes if n.op == "placeholder"), strict=False))

    def bind(self, module: nn.Module, device: torch.device) -> list[Tensor]:
        """The constants for the buffers and frozen parameters of a module, on a device.

        Raises:
            BadInput: their shapes or types differ from those that were traced.
        """
        found = self.prelude.run(fixed_tensors(module, self.parameters))
        if [(t.shape, t.dtype) for t in found] != list(self.constants.values()):
            raise BadInput("tensors computed from the buffers have other shapes than when the network was traced")
        return [t.to(device) for t in found]

    def run(
        self,
        parameters: Sequence[Tensor],
        constants: Sequence[Tensor],
        x: Tensor,
        tapped: Callable[[fx.Node, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, dict[fx.Node, Any]]:
        """Outputs ``[O]`` of one sample, and the values of all nodes.

        Args:
            parameters: in the order of ``self.parameters``.
            constants: in the order of ``self.constants``.
            x: one sample, without batch axis.
            tapped: replaces the value of a node before it is used.
        """
        by_name = dict(zip(self.constants, constants, strict=True))
        inputs = iter((*parameters, x[None]))
        values: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                value = next(inputs)
            elif node.op == "get_attr":
                value = by_name[node.target]
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], values.__getitem__), values
            else:
                value = _result(node, values)
            values[node] = value if tapped is None else tapped(node, value)
        raise AssertionError("a graph ends with its output")

    def value(self, wanted: fx.Node, parameters: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> Tensor:
        """The value of a node that depends only on some parameters and constants, given by their names."""
        placeholders = self.placeholders()
        values: dict[fx.Node, Any] = {placeholders[name]: w for name, w in parameters.items()}
        needed = upstream(wanted)
        for node in self.graph.nodes:
            if node in needed and node not in values:
                values[node] = constants[node.target] if node.op == "get_attr" else _result(node, values)
        found: Tensor = values[wanted]
        return found


def _result(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """The result of an operation of a graph for the values of its arguments."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    operation: Any = REPLACEMENTS.get(node.target, node.target)
    return operation(*args, **kwargs)


def upstream(node: fx.Node) -> set[fx.Node]:
    """All nodes that a node depends on, and the node itself."""
    found, left = {node}, [node]
    while left:
        new = set(left.pop().all_input_nodes) - found
        found |= new
        left.extend(new)
    return found


def downstream(source: fx.Node) -> set[fx.Node]:
    """All nodes that depend on a node, and the node itself."""
    reached = {source}
    for node in source.graph.nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


def trace(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> SampleGraph:
    """Trace a network on its first sample.

    Tracing runs on the CPU, where recurrent layers and attention decompose into plain operations. Operations that
    depend on neither x nor the parameters go to the prelude.

    Args:
        module: ``x -> [N, ...outputs]``.
        parameters: the trainable parameters by name; they fix the precision.
        x: inputs ``[N, ...]`` on the device where the graph is to run.

    Raises:
        Unsupported: the network cannot be traced.
    """
    names, buffers = tuple(parameters), dict(module.named_buffers())
    fixed = {key: t.cpu() for key, t in fixed_tensors(module, names).items()}
    keys = (*names, *fixed)
    trained = [t.detach().cpu().requires_grad_() for t in parameters.values()]

    def forward(*tensors: Tensor) -> Tensor:
        *_, x = tensors
        network = lambda: with_values(module, dict(zip(keys, tensors, strict=False)), (x,)).reshape(-1)  # noqa: E731
        return as_autograd_sees_it(network, (*tensors[: len(names)], x))

    def inputs() -> list[Tensor]:  # buffers may be written to
        own = (t.clone() if key in buffers else t for key, t in fixed.items())
        return [*trained, *own, x[:1].detach().cpu()]

    # Tensors that the network creates without a device must not go to a GPU meanwhile.
    with TRACING, untraceable("its forward pass"), plain_operations(module), torch.device("cpu"):
        # Twice: in-place changes inside a composite operation only show once it is decomposed.
        with torch.enable_grad():
            try:
                traced = make_fx(forward, decomposition_table=DECOMPOSITIONS)(*inputs())
            except DataDependent:
                with without_shortcuts(module):
                    traced = make_fx(forward, decomposition_table=DECOMPOSITIONS)(*inputs())
        with torch.no_grad():
            traced = make_fx(functionalize(traced))(*inputs())
            graph, prelude = _split(traced, list(fixed), len(names))
            constants = prelude.run(fixed)
    for node in graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", x.device)
        if node.target is aten.as_strided.default and not _fills_its_storage(node.args[0].meta["val"]):
            raise Unsupported("as_strided of a tensor that is itself a view cannot be traced")
    free_layout(graph)
    targets = [node.target for node in graph.nodes if node.op == "get_attr"]
    shapes = [(t.shape, t.dtype) for t in constants]
    return SampleGraph(graph, names, dict(zip(targets, shapes, strict=True)), prelude)


def fixed_tensors(module: nn.Module, parameters: Collection[str]) -> dict[str, Tensor]:
    """Frozen parameters and buffers of a module by name.

    Args:
        module: the module.
        parameters: names of the trainable parameters.
    """
    frozen = {key: w.detach() for key, w in module.named_parameters() if key not in parameters}
    return frozen | dict(module.named_buffers())


def _fills_its_storage(value: Tensor) -> bool:
    return value.is_contiguous() and value.numel() * value.element_size() == value.untyped_storage().nbytes()


def free_layout(graph: fx.Graph) -> None:
    """Replace views by operations that copy if the layout of a value differs from that during tracing."""
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def _merge(graph: fx.Graph) -> None:
    """Merge computations that do not depend on x and that a layer repeats at each of its calls."""
    moving = downstream(next(node for node in reversed(graph.nodes) if node.op == "placeholder"))
    seen: dict[tuple[Any, str], fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node not in moving:
            first = seen.setdefault((node.target, repr((node.args, node.kwargs))), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _split(traced: fx.GraphModule, fixed: Sequence[str], parameters: int) -> tuple[fx.Graph, Prelude]:
    """The operations that depend on the parameters or x, and those that depend on neither.

    The former refer to results of the latter by ``get_attr`` nodes, in the order of the prelude's outputs.

    Args:
        traced: without in-place operations; its placeholders are parameters, ``fixed`` and x.
        fixed: names of the placeholders that are constants.
        parameters: number of parameters.
    """
    for node in list(traced.graph.nodes):
        # Updates of the network's buffers, and warnings about singular matrices.
        if node.target in (aten.copy_.default, aten._linalg_check_errors.default):
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    _merge(traced.graph)
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    names = dict(zip(placeholders[parameters:-1], fixed, strict=True))
    graph, before = fx.Graph(), fx.Graph()
    known: dict[fx.Node, fx.Node] = {}  # to the prelude
    moving: dict[fx.Node, fx.Node] = {}  # to the graph
    constants: dict[fx.Node, fx.Node] = {}  # from those known to the nodes of the graph that refer to them

    def shaped(node: fx.Node) -> fx.Node:
        if node in known:
            return known[node]
        like = node.meta["val"]
        return before.call_function(torch.empty, (list(like.shape),), {"dtype": like.dtype, "device": "cpu"})

    def referred(node: fx.Node) -> fx.Node:
        if node in moving:
            return moving[node]
        if node not in constants:
            constants[node] = graph.create_node("get_attr", f"constant_{len(constants)}")
            constants[node].meta["val"] = node.meta.get("val")
        return constants[node]

    for node in traced.graph.nodes:
        if node in names:
            known[node] = before.placeholder(names[node])
        elif node.op == "get_attr":
            known[node] = before.node_copy(node)
        elif node.op == "call_function" and (node.target in SHAPED or set(node.all_input_nodes) <= known.keys()):
            known[node] = before.node_copy(node, shaped)
        else:
            moving[node] = graph.node_copy(node, referred)
            moving[node].meta = {"val": node.meta.get("val")}
    graph.eliminate_dead_code()
    used = {constant: node for node, constant in constants.items()}
    before.output(tuple(known[used[node]] for node in graph.nodes if node.op == "get_attr"))
    before.eliminate_dead_code()
    for node in list(before.nodes):
        node.meta.clear()
        if node.op == "placeholder" and not node.users:
            before.erase_node(node)
    literals = {node.target: getattr(traced, node.target).detach() for node in before.nodes if node.op == "get_attr"}
    return graph, Prelude(before, literals)


@contextlib.contextmanager
def untraceable(what: str) -> Iterator[None]:
    """Report any error while a network is traced as a fault of the network.

    Functions that the network compiles run as they are.
    """
    try:
        with uncompiled():
            yield
    except BadInput:
        raise
    except Exception as error:
        raise Unsupported(
            f"{what} cannot be traced as a graph of operations, for example because of branches on data; methods that "
            f"call the network as it is are jacobian_contraction and naive_jacobian ({type(error).__name__}: "
            f"{textwrap.shorten(str(error), 160)})"
        ) from error


MOVEMENTS = {
    operator.getitem,
    aten.alias.default,
    aten.clone.default,
    aten.expand.default,
    aten.permute.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.t.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten._unsafe_view.default,
}
"""Operations that rearrange the entries of one tensor without computing anything."""
