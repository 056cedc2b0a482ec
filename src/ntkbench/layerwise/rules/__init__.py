"""The structure of gradients at the operations that use weights.

Three rules (matrix products, convolutions, table lookups) cover the weights of nearly all networks: linear layers on
vectors and sequences, attention, recurrent layers and cells, grouped, depthwise and transposed convolutions,
embeddings, weights tied between layers or used at many time steps. To add rules, drop a file here, or into ``rules/``
of a folder of plug-ins, with a mapping ``RULES`` from operations to functions like those of :data:`RULES`.
:func:`ntkbench.testing.check_rule` checks them.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from ntkbench import outside, registry
from ntkbench.errors import Unsupported, summary
from ntkbench.layerwise.factors import Lookups, Products
from ntkbench.layerwise.trace import aten
from ntkbench.registry import Fault, Source


@dataclass(frozen=True)
class Use:
    """One operation that uses a weight.

    Attributes:
        node: the operation, whose cotangent the rule needs.
        operand: the other argument of the operation.
        entries: indices of the parameter's entries, arranged as ``[groups, C, D]`` (``[rows, C]`` for a table). Those
            of a layer are on the meta device, without memory, if shape, strides and offset determine them.
        factors: from the operand ``[N, ...]`` and the cotangent ``[N, K, ...]`` to the gradient's factors.
        bias: the argument that adds a bias of C entries per group, if there is one.
    """

    node: fx.Node
    operand: fx.Node
    entries: Tensor
    factors: functools.partial[Products] | functools.partial[Lookups]
    bias: fx.Node | None = None

    @property
    def overlaps(self) -> bool:
        """Whether each result of the operation is a sum over several positions, as in a transposed convolution."""
        return self.factors.func is _transposed_factors

    @property
    def inputs(self) -> int:
        """Number of entries of a sample's inputs a, over all positions."""
        _, C, D = self.entries.shape if self.entries.ndim == 3 else (1, self.entries.shape[1], 1)
        return self.node.meta["val"].numel() // C * D

    @property
    def copied(self) -> int:
        """Number of entries of a sample's cotangents that are copied for one direction, over all positions."""
        if self.entries.ndim == 2:  # those of the same row of a table are added up
            return int(self.node.meta["val"].numel())
        _, C, D = self.entries.shape
        return self.operand.meta["val"].numel() // D * C if self.overlaps else 0


def rule_for(node: fx.Node, argument: fx.Node, entries: Tensor) -> Use | None:
    """The rule for a use; ``None`` if there is none.

    Raises:
        Unsupported: the rule of a plug-in fails.
    """
    rule = RULES.get(node.target) or _of_plugins(tuple(outside.folders("rules"))).get(node.target)
    position = [i for i, value in enumerate(node.args) if value is argument]
    return rule(node, position[0], entries) if rule and len(position) == 1 else None


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """An operation's arguments, whose types depend on the operation."""
    return node.args


def _product(node: fx.Node, position: int, entries: Tensor) -> Use | None:
    """``mm`` and ``bmm``, with or without a summand: a [S, D] times w [D, C], or w [C, D] times a [D, S]."""
    first = len(node.args) - 2
    arguments = _arguments(node)
    added = arguments[0] if first else None
    if position < first or any(factor != 1 for factor in node.kwargs.values()):
        return None
    right = position > first
    operand = arguments[first if right else position + 1]
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
    operand, _, bias, stride, padding, dilation, transposed, _, groups = _arguments(node)
    kernel = tuple(entries.shape[2:])
    entries = entries.reshape(groups, entries.shape[0] // groups, -1)  # [groups, out, in x kernel]
    factors = functools.partial(
        _transposed_factors if transposed else _convolution_factors,
        windows=Windows(kernel, *(_each(v, len(kernel)) for v in (stride, padding, dilation))),
        groups=groups,
    )
    # The weight of a transposed convolution is [groups, in, out x kernel]; its bias has one entry per out.
    return Use(node, operand, entries.mT, factors) if transposed else Use(node, operand, entries, factors, bias)


def _each(value: list[int], dimensions: int) -> tuple[int, ...]:
    return tuple(value) if len(value) == dimensions else tuple(value) * dimensions


@dataclass(frozen=True)
class Windows:
    """The windows of a convolution, dimension by dimension."""

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
    inputs = _positions(windows.of(x))  # [N, in * kernel, S]
    cotangents = _positions(g.flatten(-len(windows.kernel)))  # [N, K, out, S]
    return Products(inputs.unflatten(1, (groups, -1)), cotangents.unflatten(2, (groups, -1)))


def _transposed_factors(x: Tensor, g: Tensor, *, windows: Windows, groups: int) -> Products:
    """Factors of a transposed convolution: windows of the cotangents, single positions of the inputs."""
    d = len(windows.kernel)
    # Output padding may add a window that no input reaches.
    seen = _positions(_cut(windows.of(g), g.shape[-d:], windows, x.shape[-d:]))  # [N, K, out * kernel, S]
    return Products(_positions(x.flatten(-d)).unflatten(1, (groups, -1)), seen.unflatten(2, (groups, -1)))


def _positions(images: Tensor) -> Tensor:
    """The positions of all images of a sample: ``[..., images, channels, space]`` to ``[..., channels, S]``."""
    return images.movedim(-3, -2).flatten(-2)


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
    """Lookups of rows of a table by their indices."""
    _, numbers, padding, *_ = (*_arguments(node), -1)
    if position != 0:
        return None
    return Use(node, numbers, entries, functools.partial(_lookup_factors, padding=padding))


def _lookup_factors(numbers: Tensor, g: Tensor, *, padding: int) -> Lookups:
    g = g.unsqueeze(2).flatten(2, -2).mT  # [N, K, C, S]
    rows = numbers.unsqueeze(1).flatten(1)
    return Lookups(rows.masked_fill(rows == padding, -1), g)


Rule = Callable[[fx.Node, int, Tensor], Use | None]
"""Maps an operation, the position of the weight among its arguments and the indices of its entries to the use."""

RULES: dict[Any, Rule] = {
    aten.mm.default: _product,
    aten.addmm.default: _product,
    aten.bmm.default: _product,
    aten.baddbmm.default: _product,
    aten.convolution.default: _convolution,
    aten.embedding.default: _lookup,
}


@functools.cache
def _of_plugins(folders: tuple[str, ...]) -> dict[Any, Rule]:
    """The rules of all plug-ins, including those in these folders. Broken plug-ins are logged and left out."""
    found: dict[Any, Rule] = {}
    for name in REGISTRY.names():
        for operation, rule in REGISTRY.get(name).items():
            found.setdefault(operation, functools.partial(_guarded, name, rule))
    for broken in REGISTRY.broken():
        logging.getLogger("ntkbench").warning("%s", broken)
    return found


def _guarded(name: str, rule: Rule, node: fx.Node, position: int, entries: Tensor) -> Use | None:
    """The use by the rule of a plug-in, which may fail in any way."""
    try:
        use = rule(node, position, entries)
    except Exception as error:
        raise Unsupported(f"the rule for {node.target} of the plug-in {name!r} failed: {summary(error)}") from error
    if use is None or (isinstance(use, Use) and isinstance(use.factors, functools.partial)):
        return use
    if isinstance(use, Use) and callable(use.factors):
        return replace(use, factors=functools.partial(use.factors))
    raise Unsupported(f"the rule for {node.target} of the plug-in {name!r} returned a {type(use).__name__}, not a Use")


def _checked(source: Source, module: ModuleType, name: str) -> Mapping[Any, Rule]:
    rules = getattr(module, "RULES", None)
    line = source.line("RULES")
    if not isinstance(rules, Mapping) or not rules:
        raise Fault("defines no RULES, a mapping from operations to rules", line)
    for operation, rule in rules.items():
        if not isinstance(operation, torch._ops.OpOverload):
            raise Fault(f"RULES: {operation!r} is not an operation such as torch.ops.aten.mul.Tensor", line)
        if not callable(rule):
            raise Fault(f"RULES: the rule for {operation} is not a function", line)
        if operation in RULES:
            raise Fault(f"RULES: {operation} has a rule of ntkbench", line)
    return rules


REGISTRY: registry.Registry[Mapping[Any, Rule]] = registry.Registry("rule", _checked)
