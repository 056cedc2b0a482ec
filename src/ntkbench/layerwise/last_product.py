"""The linear layer whose results are a network's outputs, read from the last operations of its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ntkbench.errors import Unsupported
from ntkbench.layerwise.trace import MOVEMENTS, SampleGraph, aten

PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)
"""Operations to which linear layers, matrix products and ``einsum`` lower; the factors are the last two arguments."""

SELECTIONS = MOVEMENTS | {aten.index.Tensor, aten.index_select.default}
"""Operations that rearrange or select entries of their first argument."""

CHANGED = "its outputs are not the unchanged results of its last linear layer"


@dataclass(frozen=True)
class LastProduct:
    """A linear layer from d to V > d outputs, whose results are the outputs of a network.

    Attributes:
        weight: the name of its weight.
        bias: the name of its bias, ``[V]``; ``None`` without one.
        V, d: its outputs and inputs.
        turned: whether the weight is ``[d, V]`` instead of ``[V, d]``.
    """

    weight: str
    bias: str | None
    V: int
    d: int
    turned: bool


def last_product(graph: SampleGraph, constants: Sequence[Tensor]) -> LastProduct:
    """The wide linear layer that a network ends with.

    Between the product and the outputs, the graph may rearrange and select its rows, and add one bias.

    Args:
        graph: the network, traced with all weights as parameters.
        constants: in the order of ``graph.constants``, on the CPU.

    Raises:
        Unsupported: the network ends with other operations, the layer is no wider than its inputs, or its weight or
            bias is not a parameter or is used more than once.
    """
    names = {node: name for name, node in graph.placeholders().items()}
    sums: list[tuple[Any, Any, Any]] = []  # nodes of sums, what the bias is added to, and the bias
    node: Any = output(graph.graph)
    while node.target not in PRODUCTS:
        if node.target in SELECTIONS:
            node = node.args[0]
        elif node.target == aten.add.Tensor and not node.kwargs and all(isinstance(t, fx.Node) for t in node.args):
            term, bias = sorted(node.args, key=lambda t: _parameter(t, names) is not None)
            sums.append((node, term, bias))
            node = term
        else:
            raise Unsupported(f"{CHANGED}, but of {node.target}")
    *bias, left, right = node.args
    if bias:
        sums.append((node, node, *bias))
    if len(sums) > 1 or node.kwargs:
        raise Unsupported(f"{CHANGED}: more than a bias is added to them, or a multiple of it")
    found = [(w, factor is left) for factor in (left, right) if (w := _parameter(factor, names))]
    if len(found) != 1:
        raise Unsupported("the weight of its last product is not a parameter, or is used more than once")
    ((weight, at_left),) = found
    own, shape, bias_name = torch.empty(weight.meta["val"].shape, device="meta"), node.meta["val"].shape, None
    if at_left:
        matrices = moved(left, {weight: own}).mT
        entries = numbers((*shape[:-2], shape[-1], shape[-2])).mT
    else:
        matrices, entries = moved(right, {weight: own}), numbers(shape)
    d, V = matrices.shape[-2:]
    if d >= V:
        raise Unsupported(f"its last linear layer, with the weight {names[weight]}, is no wider than its inputs")
    turned = own.shape == (d, V)
    if own.ndim != 2 or not _is_view(matrices, own if turned else own.mT):
        raise Unsupported(f"the weight of its last product, {names[weight]}, is rearranged")
    by_name = dict(zip(graph.constants, constants, strict=True))
    known = {n: by_name[str(n.target)] for n in graph.graph.nodes if n.op == "get_attr"} | {node: entries}
    for total, term, bias in sums:
        added, before = _parameter(bias, names), moved(term, known)
        if added is None or added.meta["val"].shape != (V,) or before.shape != total.meta["val"].shape:
            raise Unsupported(f"{CHANGED}: what is added to them is no bias that is used once")
        if not (moved(bias, {added: numbers((V,))}) == before % V).all():
            raise Unsupported(f"{CHANGED}: the bias that is added to them is rearranged")
        known[total], bias_name = before, names[added]
    rows(moved(output(graph.graph), known), V)
    return LastProduct(names[weight], bias_name, V, d, turned)


def output(graph: fx.Graph) -> fx.Node:
    """The node of the outputs."""
    (found,) = next(iter(reversed(graph.nodes))).all_input_nodes
    return found


def moved(node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """The value of a node that arises from known ones by rearrangement alone.

    Raises:
        Unsupported: it does not.
    """
    if node in known:
        return known[node]
    if node.target not in SELECTIONS:
        raise Unsupported(f"{CHANGED}, but of {node.target}")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: moved(n, known))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def rows(entries: Tensor, V: int) -> Tensor:
    """The rows of a product ``[..., V]`` that are the outputs, in the order of the outputs.

    Args:
        entries: the outputs, with the entries of the product replaced by their indices.
        V: columns of the product.

    Raises:
        Unsupported: the outputs are not whole rows.
    """
    if entries.numel() % V:
        raise Unsupported(CHANGED)
    each = entries.reshape(-1, V)
    if not ((each[:, :1] % V == 0).all() and (each == each[:, :1] + numbers((V,))).all()):
        raise Unsupported(CHANGED)
    return each[:, 0] // V


def numbers(shape: Sequence[int]) -> Tensor:
    """The indices of the entries of a contiguous tensor."""
    made = torch.Size(shape)
    return torch.arange(made.numel(), dtype=torch.int32, device="cpu").reshape(made)


def _is_view(matrices: Tensor, matrix: Tensor) -> bool:
    """Whether matrices ``[..., d, V]`` are all views of one whole matrix ``[d, V]``."""
    same = matrices.untyped_storage()._cdata == matrix.untyped_storage()._cdata and matrices.storage_offset() == 0
    strides = (*(0 for _ in matrices.shape[:-2]), *matrix.stride())
    each = zip(matrices.shape, matrices.stride(), strides, strict=True)
    return same and matrices.shape[-2:] == matrix.shape and all(size == 1 or one == other for size, one, other in each)


def _parameter(node: Any, names: Mapping[fx.Node, str]) -> fx.Node | None:
    """The parameter that a value rearranges, if neither it nor any value between them has another use."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node in names:
            return node
        node = node.args[0] if node.target in MOVEMENTS else None
    return None
