"""Where a graph uses its parameters, and what structure the gradients have there.

Two rules (matrix products, convolutions) and one for tables cover the parameters of nearly all networks, whatever the
layers are called: linear layers on vectors and sequences, attention, recurrent layers and cells, grouped, depthwise and
transposed convolutions, embeddings, weights tied between layers or used at many time steps. Scales, shifts and
everything else are written out by automatic differentiation, one gradient for each output of each sample.

A parameter may be transposed, cut and rearranged on its way into an operation. What becomes of its entries is found by
sending their numbers the same way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from ntkbench.structured.factors import Factors, Lookups, Products, Rows, together, with_ones
from ntkbench.structured.trace import MOVEMENTS, SampleGraph, aten


@dataclass(frozen=True)
class Use:
    """One operation that a weight takes part in.

    Attributes:
        node: the operation; the cotangent of its value is what the rule needs.
        operand: the value on the other side of it.
        entries: which entries of the parameter stand where, ``[groups, C, D]`` (``[rows, C]`` for a table).
        factors: from the operand ``[N, ...]`` and the cotangent ``[N, K, ...]`` to the gradient's factors.
        bias: the argument that adds a bias of C entries a group, if there is one.
    """

    node: fx.Node
    operand: fx.Node
    entries: Tensor
    factors: Callable[[Tensor, Tensor], Factors]
    bias: fx.Node | None = None

    @property
    def inputs(self) -> int:
        """Numbers that a sample's inputs take when each stands at every position that it is used at."""
        _, C, D = self.entries.shape if self.entries.ndim == 3 else (1, self.entries.shape[1], 1)
        return self.node.meta["val"].numel() // C * D


@dataclass(frozen=True)
class Layer:
    """Weights with all their uses, and the bias that goes with every one of these.

    Attributes:
        parameters: name of the weight, and of the bias if there is one.
        uses: operations, all with the weights in the same arrangement.
    """

    parameters: tuple[str, ...]
    uses: tuple[Use, ...]

    def factors(self, operands: list[Tensor], cotangents: list[Tensor]) -> Factors:
        """The layer's gradients, from what its uses need in turn."""
        made = together([u.factors(a, g) for u, a, g in zip(self.uses, operands, cotangents, strict=True)])
        return with_ones(made) if len(self.parameters) == 2 else made


@dataclass(frozen=True)
class Written:
    """A parameter whose gradients are written out by automatic differentiation.

    Attributes:
        parameters: its name.
        fallback: why, where it is for want of a rule; empty where there is nothing to gain (scales, shifts, biases).
    """

    parameters: tuple[str]
    fallback: str = ""

    uses = ()

    def factors(self, operands: list[Tensor], cotangents: list[Tensor]) -> Factors:
        """The one "cotangent" is the gradient itself, ``[N, K, ...]``."""
        return Rows(cotangents[0].reshape(*cotangents[0].shape[:2], -1))


SCALES_AND_SHIFTS = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.rsub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.native_layer_norm.default,
    aten.native_group_norm.default,
    aten._fused_rms_norm.default,
}
"""Operations whose other parameters have an entry for each channel (or output), so that nothing beats writing out."""


def find(graph: SampleGraph) -> list[Layer | Written]:
    """Every trainable parameter of a graph, once."""
    arrivals = {name: list(_arrivals(node)) for name, node in graph.placeholders().items()}
    weights: dict[str, list[tuple[Use, ...]]] = {}
    for name, places in arrivals.items():
        uses = [_use(*place) for place in places]
        if uses and None not in uses and (groups := _arranged_alike(uses)):
            weights[name] = groups
    found: list[Layer | Written] = []
    taken = set(weights)
    for name, groups in weights.items():
        for uses in groups:
            bias = _bias(uses, arrivals, taken)
            taken |= {bias} - {None}
            found.append(Layer((name, bias) if bias else (name,), uses))
    moving = _downstream(next(node for node in reversed(graph.graph.nodes) if node.op == "placeholder"))
    found += [Written((name,), _fallback(places, moving)) for name, places in arrivals.items() if name not in taken]
    return found


def _downstream(source: fx.Node) -> set[fx.Node]:
    """What depends on a value."""
    reached = {source}
    for node in source.graph.nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


def _arrivals(placeholder: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, Tensor]]:
    """Operations that take in a parameter: the operation, the argument, and the parameter's entries in it."""
    value = placeholder.meta["val"]
    stack: list[tuple[fx.Node, Any]] = [(placeholder, torch.arange(value.numel()).reshape(value.shape))]
    while stack:
        node, entries = stack.pop()
        for user in node.users:
            if user.target in MOVEMENTS and user.all_input_nodes == [node]:
                stack.append((user, user.target(entries, *user.args[1:], **user.kwargs)))
            else:
                yield user, node, entries


def _arranged_alike(uses: list[Use]) -> list[tuple[Use, ...]] | None:
    """Uses by their arrangement of entries; ``None`` where two arrangements share entries without being the same."""
    groups: list[list[Use]] = []
    for use in uses:
        for group in groups:
            if group[0].factors.func is use.factors.func and torch.equal(group[0].entries, use.entries):
                group.append(use)
                break
        else:
            groups.append([use])
    entries = torch.cat([group[0].entries.reshape(-1) for group in groups])
    return [tuple(group) for group in groups] if len(entries.unique()) == len(entries) else None


def _bias(uses: tuple[Use, ...], arrivals: dict[str, list[Any]], taken: set[str]) -> str | None:
    """The parameter that is added wherever these weights are used, entry by entry, and nowhere else."""
    if any(use.bias is None for use in uses):
        return None
    nodes = {(use.node, use.bias) for use in uses}
    size = uses[0].entries.shape[:2].numel()
    for name, places in arrivals.items():
        if name not in taken and len(places) == len(uses) and {place[:2] for place in places} == nodes:
            whole = torch.arange(size)
            if all(entries.shape == whole.shape and torch.equal(entries, whole) for *_, entries in places):
                return name
    return None


def _fallback(places: list[tuple[fx.Node, fx.Node, Tensor]], moving: set[fx.Node]) -> str:
    """Why gradients are written out; empty for vectors, and for what scales and shifts values that depend on x."""
    if not places or sum(size > 1 for size in places[0][2].shape) < 2:
        return ""
    strangers = {
        str(node.target if node.op != "output" else node.op)
        for node, *_ in places
        if node not in moving or node.target not in SCALES_AND_SHIFTS
    }
    return f"no rule for its use in {', '.join(sorted(strangers))}" if strangers else ""


def _use(node: fx.Node, argument: fx.Node, entries: Tensor) -> Use | None:
    """The rule for a use; ``None`` if there is none."""
    rule = RULES.get(node.target)
    position = [i for i, value in enumerate(node.args) if value is argument]
    return rule(node, position[0], entries) if rule and len(position) == 1 else None


def _product(node: fx.Node, position: int, entries: Tensor) -> Use | None:
    """``mm`` and ``bmm``, with or without something added: a [S, D] times w [D, C], or w [C, D] times a [D, S]."""
    first = len(node.args) - 2
    added = node.args[0] if first else None
    if position < first or any(factor != 1 for factor in node.kwargs.values()):
        return None
    right = position > first
    operand = node.args[first if right else position + 1]
    entries = entries[None] if entries.ndim == 2 else entries
    shared = len(entries) > 1 and bool((entries == entries[:1]).all())  # one matrix for the whole batch of a bmm
    entries = entries[:1] if shared else entries
    factors = functools.partial(_product_factors, right=right, shared=shared)
    return Use(node, operand, entries.mT if right else entries, factors, added if right and len(entries) == 1 else None)


def _product_factors(a: Tensor, g: Tensor, *, right: bool, shared: bool) -> Products:
    a, g = (t if t.ndim == batched else t.unsqueeze(-3) for t, batched in ((a, 4), (g, 5)))  # mm is a bmm of one
    if right:
        a, g = a.mT, g.mT  # [N, B, D, S], [N, K, B, C, S]
    if shared:
        a, g = (t.movedim(-3, -2).flatten(-2).unsqueeze(-3) for t in (a, g))
    return Products(a, g)


def _convolution(node: fx.Node, position: int, entries: Tensor) -> Use | None:
    """Convolutions of any dimension, strided, dilated, grouped and transposed."""
    if position != 1:
        return None
    operand, _, bias, stride, padding, dilation, transposed, _, groups = node.args
    kernel = tuple(entries.shape[2:])
    entries = entries.reshape(groups, entries.shape[0] // groups, -1)  # [groups, out, in x kernel]
    factors = functools.partial(
        _transposed_factors if transposed else _convolution_factors,
        windows=Windows(kernel, *(_each(v, len(kernel)) for v in (stride, padding, dilation))),
        groups=groups,
    )
    # A transposed convolution has its inputs first, [groups, in, out x kernel], and a bias for each out alone.
    return Use(node, operand, entries.mT, factors) if transposed else Use(node, operand, entries, factors, bias)


def _each(value: list[int], dimensions: int) -> tuple[int, ...]:
    return tuple(value) if len(value) == dimensions else tuple(value) * dimensions


@dataclass(frozen=True)
class Windows:
    """The windows that a convolution looks through, dimension by dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def of(self, images: Tensor) -> Tensor:
        """``[..., channels, *space]`` to ``[..., channels * kernel, positions]``."""
        if set(self.kernel) == set(self.stride) == {1} and not any(self.padding):
            return images.flatten(-len(self.kernel))
        sides = [side for p in reversed(self.padding) for side in (p, p)]
        images = (functional.pad(images, sides) if any(sides) else images).contiguous()
        d = len(self.kernel)
        space, steps = images.shape[-d:], images.stride()[-d:]
        count = [
            (size - step * (k - 1) - 1) // stride + 1
            for size, step, k, stride in zip(space, self.dilation, self.kernel, self.stride, strict=True)
        ]
        windows = images.as_strided(
            (*images.shape[:-d], *self.kernel, *count),
            (
                *images.stride()[:-d],
                *(step * dilation for step, dilation in zip(steps, self.dilation, strict=True)),
                *(step * stride for step, stride in zip(steps, self.stride, strict=True)),
            ),
        )
        return windows.reshape(*images.shape[: -d - 1], -1, math.prod(count))


def _convolution_factors(x: Tensor, g: Tensor, *, windows: Windows, groups: int) -> Products:
    d = len(windows.kernel)
    inputs = windows.of(x.squeeze(1))  # [N, in * kernel, S]
    g = g.squeeze(2).flatten(-d)
    return Products(inputs.unflatten(1, (groups, -1)), g.unflatten(2, (groups, -1)))


def _transposed_factors(x: Tensor, g: Tensor, *, windows: Windows, groups: int) -> Products:
    """Here the cotangents go through the windows, and the inputs are taken one by one."""
    d = len(windows.kernel)
    seen = windows.of(g.squeeze(2))  # [N, K, out * kernel, positions]
    # An output padding may make room for one more window, which no input reaches.
    seen = _cut(seen, g.shape[-d:], windows, x.shape[-d:])
    return Products(x.squeeze(1).flatten(-d).unflatten(1, (groups, -1)), seen.unflatten(2, (groups, -1)))


def _cut(seen: Tensor, space: torch.Size, windows: Windows, wanted: torch.Size) -> Tensor:
    count = [
        (size + 2 * pad - dilation * (k - 1) - 1) // stride + 1
        for size, pad, dilation, k, stride in zip(
            space, windows.padding, windows.dilation, windows.kernel, windows.stride, strict=True
        )
    ]
    if tuple(count) == tuple(wanted):
        return seen
    chosen = (..., *(slice(size) for size in wanted))
    return seen.unflatten(-1, count)[chosen].flatten(-len(count))


def _lookup(node: fx.Node, position: int, entries: Tensor) -> Use | None:
    """Rows of a table by their numbers."""
    _, numbers, padding, *_ = (*node.args, -1)
    if position != 0:
        return None
    return Use(node, numbers, entries, functools.partial(_lookup_factors, padding=padding))


def _lookup_factors(numbers: Tensor, g: Tensor, *, padding: int) -> Lookups:
    g = g.flatten(2, -2).mT  # [N, K, C, S]
    return Lookups(numbers.flatten(1).masked_fill(numbers.flatten(1) == padding, -1), g)


RULES: dict[Any, Callable[[fx.Node, int, Tensor], Use | None]] = {
    aten.mm.default: _product,
    aten.addmm.default: _product,
    aten.bmm.default: _product,
    aten.baddbmm.default: _product,
    aten.convolution.default: _convolution,
    aten.embedding.default: _lookup,
}
