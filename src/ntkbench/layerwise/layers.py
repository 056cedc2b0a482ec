"""Where a graph uses its parameters, and what structure the gradients have there.

Weights with a rule for all their uses (see ``rules.py``) become layers. Scales, shifts and everything else are written
out by automatic differentiation, one gradient for each output of each sample.

A parameter may be transposed, cut and rearranged on its way into an operation. What becomes of its entries is found by
sending their numbers the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ntkbench.layerwise.factors import Factors, Rows, together, with_ones
from ntkbench.layerwise.rules import Use, rule_for
from ntkbench.layerwise.trace import MOVEMENTS, SampleGraph, aten


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
        uses = [rule_for(*place) for place in places]
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
