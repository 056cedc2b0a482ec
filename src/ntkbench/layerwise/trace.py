"""One sample's forward pass as a graph of ATen operations.

A single sample is traced, and ``vmap`` adds the other samples afterwards. Whatever the network does to its axes (time
first, flattened sequences, grouped channels), every value of the graph then belongs to one sample, and its axes are
positions and channels.
"""

from __future__ import annotations

import contextlib
import operator
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from ntkbench.errors import BadInput
from ntkbench.layerwise.recording import SHAPED, as_autograd_sees_it
from ntkbench.layerwise.replacements import DECOMPOSITIONS, REPLACEMENTS
from ntkbench.operators.plain_operations import plain_operations

aten = torch.ops.aten


@dataclass(frozen=True)
class SampleGraph:
    """A network on one sample as ATen operations.

    Attributes:
        graph: placeholders are the parameters, then x with a batch axis of one. No operation works in place.
        parameters: names of the trainable parameters.
        constants: tensors that the graph refers to by name: buffers, frozen parameters, and what is computed of them.
    """

    graph: fx.Graph
    parameters: tuple[str, ...]
    constants: Mapping[str, Tensor]

    def placeholders(self) -> dict[str, fx.Node]:
        """The trainable parameters' placeholders by name."""
        return dict(zip(self.parameters, (n for n in self.graph.nodes if n.op == "placeholder"), strict=False))

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
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                value = REPLACEMENTS.get(node.target, node.target)(*args, **kwargs)
            values[node] = value if tapped is None else tapped(node, value)
        raise AssertionError("a graph ends with its output")


def trace(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> SampleGraph:
    """Trace a network on its first sample.

    Tracing runs on the CPU, where recurrent layers and attention decompose into plain operations. Values that depend
    on neither x nor the parameters are computed once and kept on the device of ``x``.

    Args:
        module: ``x -> [N, ...outputs]``.
        parameters: the trainable parameters by name; they fix the precision.
        x: inputs ``[N, ...]`` on the device where the graph is to run.

    Raises:
        BadInput: the network cannot be traced.
    """
    names = tuple(parameters)
    frozen = {key: w.detach() for key, w in module.named_parameters() if key not in parameters}
    fixed = {key: t.cpu() for key, t in (*frozen.items(), *module.named_buffers())}
    keys = (*names, *fixed)
    trained = [t.detach().cpu().requires_grad_() for t in parameters.values()]

    def forward(*tensors: Tensor) -> Tensor:
        *_, x = tensors
        network = lambda: functional_call(module, dict(zip(keys, tensors, strict=False)), (x,)).reshape(-1)  # noqa: E731
        return as_autograd_sees_it(network, (*tensors[: len(names)], x))

    def inputs() -> list[Tensor]:  # buffers may be written to
        own = (t if key in frozen else t.clone() for key, t in fixed.items())
        return [*trained, *own, x[:1].detach().cpu()]

    with untraceable("its forward pass"), plain_operations(module):
        # Twice: in-place changes inside a composite operation only show once it is decomposed.
        with torch.enable_grad():
            traced = make_fx(forward, decomposition_table=DECOMPOSITIONS)(*inputs())
        with torch.no_grad():
            traced = make_fx(functionalize(traced))(*inputs())
            constants = _fold(traced, fixed, len(names))
    for node in traced.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", x.device)
        if node.target is aten.as_strided.default and not _fills_its_storage(node.args[0].meta["val"]):
            raise BadInput("as_strided of a tensor that is itself a view cannot be traced")
    free_layout(traced.graph)
    return SampleGraph(traced.graph, names, {key: t.to(x.device) for key, t in constants.items()})


def _fills_its_storage(value: Tensor) -> bool:
    return value.is_contiguous() and value.numel() * value.element_size() == value.untyped_storage().nbytes()


def free_layout(graph: fx.Graph) -> None:
    """Replace views by operations that copy where a value is laid out in another way than while it was traced."""
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def _fold(traced: fx.GraphModule, fixed: Mapping[str, Tensor], parameters: int) -> dict[str, Tensor]:
    """Compute what depends on neither the parameters nor x, in place; the constants that the graph then refers to.

    Args:
        traced: without in-place operations; its placeholders are parameters, ``fixed`` and x.
        fixed: values of the placeholders that are constants.
        parameters: number of parameters.
    """
    graph = traced.graph
    for node in list(graph.nodes):
        # What the network leaves behind in its buffers, and warnings of singular matrices.
        if node.target in (aten.copy_.default, aten._linalg_check_errors.default):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    known: dict[fx.Node, Any] = dict(zip(placeholders[parameters:-1], fixed.values(), strict=True))
    for node in graph.nodes:
        if node.op == "get_attr":
            known[node] = getattr(traced, node.target)
        elif node.op == "call_function" and (node.target in SHAPED or set(node.all_input_nodes) <= known.keys()):
            like = lambda n: known[n] if n in known else _empty(n.meta["val"])  # noqa: E731
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), like)
            known[node] = node.target(*args, **kwargs)
    constants: dict[str, Tensor] = {}
    for node, value in known.items():
        if isinstance(value, Tensor) and any(user not in known for user in node.users):
            name = f"constant_{len(constants)}"
            constants[name] = value
            setattr(traced, name, value)
            with graph.inserting_before(node):
                constant = graph.create_node("get_attr", name)
            constant.meta["val"] = value
            for user in list(node.users):
                if user not in known:
                    user.replace_input_with(node, constant)
    for node in reversed(known):
        graph.erase_node(node)
    graph.eliminate_dead_code()
    return constants


def _empty(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype)


@contextlib.contextmanager
def untraceable(what: str) -> Iterator[None]:
    """Report any error while a network is traced as a fault of the network."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"{what} cannot be traced as a graph of operations, as branches on data cannot; methods that call the "
            f"network as it is are jacobian_contraction and naive_jacobian ({type(error).__name__}: "
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
