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
from ntkbench.operators.plain_operations import plain_operations

aten = torch.ops.aten


@dataclass(frozen=True)
class SampleGraph:
    """A network on one sample as ATen operations.

    Attributes:
        graph: placeholders are the parameters, then buffers and frozen parameters, then x with a batch axis of one.
        parameters: names of the trainable parameters.
        constants: buffers and frozen parameters in their order, then tensors that the graph refers to by name.
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
        count = sum(node.op == "placeholder" for node in self.graph.nodes) - len(parameters) - 1
        inputs = iter((*parameters, *list(constants)[:count], x[None]))
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
                value = _REPLACEMENTS.get(node.target, node.target)(*args, **kwargs)
            values[node] = value if tapped is None else tapped(node, value)
        raise AssertionError("a graph ends with its output")


def trace(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> SampleGraph:
    """Trace a network on its first sample.

    Tracing runs on the CPU, where recurrent layers and attention decompose into plain operations. Tensors that the
    network creates are afterwards created on the device of ``x``.

    Args:
        module: ``x -> [N, ...outputs]``.
        parameters: the trainable parameters by name; they fix the precision.
        x: inputs ``[N, ...]`` on the device where the graph is to run.

    Raises:
        BadInput: the network cannot be traced.
    """
    names = tuple(parameters)
    fixed = {key: t for key, t in _named_tensors(module) if key not in parameters}
    keys = (*names, *fixed)

    def forward(*tensors: Tensor) -> Tensor:
        return functional_call(module, dict(zip(keys, tensors, strict=False)), (tensors[-1],)).reshape(-1)

    on_cpu = [t.detach().cpu() for t in (*parameters.values(), *fixed.values(), x[:1])]
    with untraceable("its forward pass"), plain_operations(module), torch.no_grad():
        # Twice: in-place changes inside a composite operation only show once it is decomposed.
        traced = make_fx(forward, decomposition_table={_BATCH_NORM: _batch_norm})(*on_cpu)
        traced = make_fx(functionalize(traced))(*on_cpu)
    traced.graph.eliminate_dead_code()
    for node in traced.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", x.device)
    made = {node.target: getattr(traced, node.target) for node in traced.graph.nodes if node.op == "get_attr"}
    return SampleGraph(traced.graph, names, {key: t.to(x.device) for key, t in (fixed | made).items()})


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((key, w.detach()) for key, w in module.named_parameters())
    yield from module.named_buffers()


@contextlib.contextmanager
def untraceable(what: str) -> Iterator[None]:
    """Report any error while a network is traced as a fault of the network."""
    try:
        yield
    except Exception as error:
        raise BadInput(
            f"{what} cannot be traced as a graph of operations, as branches on data cannot; methods that call the "
            f"network as it is are jacobian_contraction and naive_jacobian ({type(error).__name__}: "
            f"{textwrap.shorten(str(error), 160)})"
        ) from error


_BATCH_NORM = aten.native_batch_norm.default


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eval-mode BatchNorm as one scale and one shift per channel: two passes over the values, one over the cotangents.

    Train-mode BatchNorm makes samples interact and is refused before tracing. InstanceNorm, which uses the statistics
    of a single sample, is left as it is.
    """
    if training:
        return NotImplemented
    scale = (variance + eps).rsqrt()
    shift = -mean * scale
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    if bias is not None:
        shift = shift + bias
    to = (1, -1, *[1] * (x.ndim - 2))
    return x * scale.view(to) + shift.view(to), x.new_empty(0), x.new_empty(0)


def _embedding(table: Tensor, numbers: Tensor, padding: int = -1, *rest: Any, **more: Any) -> Tensor:
    """Rows of a table. ATen's derivative ignores, under vmap, the padding of all samples but the first."""
    rows = table[numbers]
    return rows if padding < 0 else torch.where((numbers == padding)[..., None], rows.detach(), rows)


def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    """PReLU. ATen's derivative has no vmap rule if weight and x have different batch dimensions."""
    return torch.where(x > 0, x, weight * x)


_REPLACEMENTS = {aten.embedding.default: _embedding, aten._prelu_kernel.default: _prelu}
"""Replacements of operations whose derivatives are wrong or missing under ``vmap``."""


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
