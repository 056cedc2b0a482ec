"""Where a graph uses its parameters, and the structure of the gradients there.

Weights with a rule for all their uses (see ``rules/``) become layers, and so do normalised weights, which are
computed from parameters (see ``computed.py``). For all other parameters (scales, shifts, and weights without a rule)
the gradient of each output of each sample is computed by automatic differentiation.

A parameter may be transposed, sliced and rearranged before it enters an operation. The position of each of its entries
is found by applying the same operations to the entries' indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ntkbench.errors import BadInput
from ntkbench.layerwise.computed import Computed, Gram, computed
from ntkbench.layerwise.factors import GradientFactors, Lookups, Products, Rows, Tied, Weighted, concatenate, with_ones
from ntkbench.layerwise.rules import Use, rule_for
from ntkbench.layerwise.trace import MOVEMENTS, SampleGraph, aten, downstream, upstream


@dataclass(frozen=True)
class Layer:
    """A weight with all its uses, and the bias that is added at each of them.

    Attributes:
        parameters: name of the weight, and of the bias if there is one; or of the parameters that the weight is
            computed from.
        uses: operations with the weight's entries in one arrangement; those that use it transposed come last.
        transposed: number of operations that use the weight transposed.
        computed: how the weight is computed from parameters, if it is.
    """

    parameters: tuple[str, ...]
    uses: tuple[Use, ...]
    transposed: int = 0
    computed: Computed | None = None

    def factors(self, operands: list[Tensor], cotangents: list[Tensor], gram: Gram | None = None) -> GradientFactors:
        """The layer's gradients, from the operand and the cotangent of each use.

        ``gram`` is that of a weight computed from parameters, at their values.
        """
        each = [u.factors(a, g) for u, a, g in zip(self.uses, operands, cotangents, strict=True)]
        straight = len(each) - self.transposed
        made = concatenate(each[:straight])
        if self.transposed:
            other = concatenate(each[straight:])
            assert isinstance(other, Products)
            return Tied(made, other)
        if self.computed is not None:
            assert isinstance(made, Products) and gram is not None
            return _weighted(made, self.computed, gram, _arranged(gram.q, self.uses[0].entries))
        if len(self.parameters) == 1:
            return made
        assert isinstance(made, Products)  # a table has no bias
        return with_ones(made)

    def add_gradient(self, gradients: Mapping[str, Tensor], factors: GradientFactors, c: Tensor) -> None:
        """Add sum_(b, k) c_bk (gradient of direction k of sample b) to the flat gradients of the layer's parameters."""
        weight, *others = self.parameters
        entries = self.uses[0].entries
        if isinstance(factors, Weighted):
            assert self.computed is not None
            whole = torch.zeros(self.computed.node.meta["val"].shape, dtype=torch.float64, device=c.device)
            _add_arranged(whole.view(-1), entries, factors.gradient(c).double())
            for name, pulled in zip(self.parameters, factors.gram.pull(whole), strict=True):
                gradients[name].add_(pulled.reshape(-1))
            return
        if isinstance(factors, Lookups):
            made = factors.gradient(c, len(entries))
        else:
            assert isinstance(factors, Products | Tied)
            made = factors.gradient(c)
        if others:
            gradients[others[0]].add_(made[..., -1].reshape(-1))
            made = made[..., :-1]
        _add_arranged(gradients[weight], entries, made)


def _pattern(entries: Tensor) -> tuple[torch.Size, tuple[int, ...], int]:
    return entries.shape, entries.stride(), int(entries.storage_offset())


def _arranged(flat: Tensor, entries: Tensor) -> Tensor:
    """Rows of values for all entries of a weight, ``[r, size]``, in the arrangement of ``entries``, ``[r, ...]``."""
    if not entries.is_meta:
        return flat[:, entries.to(flat.device)]
    shape, stride, offset = _pattern(entries)
    return flat.contiguous().as_strided((len(flat), *shape), (flat.shape[1], *stride), offset)


def _add_arranged(flat: Tensor, entries: Tensor, values: Tensor) -> None:
    """Add values in the arrangement of ``entries`` to the values of all entries of a weight, ``[size]``."""
    if entries.is_meta:
        flat.as_strided(*_pattern(entries)).add_(values.reshape(entries.shape))
    else:
        flat.index_add_(0, entries.reshape(-1).to(flat.device), values.reshape(-1))


def _weighted(made: Products, weight: Computed, gram: Gram, q: Tensor) -> Weighted:
    """Gradients with respect to a weight computed from parameters, for directions ``q [r, groups, C, D]``."""
    blocks = weight.blocks.to(q.device)
    found = []
    for direction in q:
        if blocks.shape[2] > 1:
            each = torch.einsum("nkgds,ngds->nkgd", torch.einsum("gcd,nkgcs->nkgds", direction, made.g), made.a)
        else:
            each = torch.einsum("nkgcs,ngcs->nkgc", made.g, torch.einsum("gcd,ngds->ngcs", direction, made.a))
        rows = each.flatten(2)
        found.append(rows.new_zeros(*rows.shape[:2], len(gram.c)).index_add_(2, blocks.reshape(-1), rows))
    rows = torch.cat(found, 2) if found else made.g.new_zeros(*made.g.shape[:2], 0)
    return Weighted(made, gram.c[blocks], rows, gram.b.mT.reshape(-1), gram)


@dataclass(frozen=True)
class ExplicitGradient:
    """A parameter whose per-sample gradients are computed explicitly, by automatic differentiation.

    Attributes:
        parameters: its name.
        fallback: why no rule applies; empty if none would save anything (scales, shifts, biases).
    """

    parameters: tuple[str]
    fallback: str = ""

    uses = ()
    computed = None

    def factors(self, operands: list[Tensor], cotangents: list[Tensor], gram: Gram | None = None) -> GradientFactors:
        """The gradient, ``[N, K, ...]``, is passed as the only cotangent."""
        return Rows(cotangents[0].reshape(*cotangents[0].shape[:2], -1))

    def add_gradient(self, gradients: Mapping[str, Tensor], factors: GradientFactors, c: Tensor) -> None:
        """See :meth:`Layer.add_gradient`."""
        assert isinstance(factors, Rows)
        gradients[self.parameters[0]].add_(factors.gradient(c))


def owner(parameter: str) -> str:
    """Name of the module that a parameter belongs to; if it parametrises a weight, of the module with the weight."""
    path = f".{parameter}"
    before, parametrised, _ = path.partition(".parametrizations.")
    return (before if parametrised else path.rpartition(".")[0])[1:]


def of_last_module(module: nn.Module, used: Mapping[str, int]) -> set[str]:
    """The parameters of the module whose parameters are used last.

    A parameter with several names belongs to several modules. Of modules whose last uses are the same, the one with the
    later uses of its other parameters counts: a head with its own bias, and not the embedding with the same weight.

    Args:
        module: the network.
        used: the position of the last use of each trainable parameter that the outputs depend on.

    Raises:
        BadInput: the outputs depend on no parameter.
    """
    names = {id(w): name for name, w in module.named_parameters()}
    owned: dict[str, set[str]] = {}
    for alias, w in module.named_parameters(remove_duplicate=False):
        if (name := names.get(id(w), "")) in used:
            owned.setdefault(owner(alias), set()).add(name)
    if not owned:
        raise BadInput("there is no last layer, as the outputs depend on no trainable parameter")
    return max(owned.values(), key=lambda own: sorted((used[name] for name in own), reverse=True))


def last_uses(graph: SampleGraph) -> dict[str, int]:
    """The position of the last operation on x that uses each parameter that the outputs depend on.

    A view of a parameter, or a result computed from parameters alone, is used where it meets a value that depends on x.
    """
    moving = downstream(next(node for node in reversed(graph.graph.nodes) if node.op == "placeholder"))
    found: dict[fx.Node, int] = {}
    for i, node in reversed(list(enumerate(graph.graph.nodes))):
        uses = [found[user] for user in node.users if user in found]
        if node.op == "output" or (uses and node.target is not aten.detach.default):
            found[node] = i if node in moving or node.op == "output" else max(uses)
    return {name: found[node] for name, node in graph.placeholders().items() if node in found}


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
"""Operations whose scales and shifts have one entry per channel or output, so that a rule would save nothing."""


def find(
    graph: SampleGraph, parameters: Sequence[Tensor], constants: Callable[[], Sequence[Tensor]]
) -> list[Layer | ExplicitGradient]:
    """All trainable parameters of a graph: weights with a rule first, then those with explicit gradients.

    Args:
        graph: the network on one sample.
        parameters: any parameter values, in the order of ``graph.parameters``.
        constants: returns the constants, in the order of ``graph.constants``.
    """
    arrivals = {name: list(_arrivals(node)) for name, node in graph.placeholders().items()}
    weights: dict[str, list[tuple[Use, ...]]] = {}
    tied: dict[str, Layer] = {}
    for name, places in arrivals.items():
        uses = [use for place in places if (use := rule_for(*place))]
        if uses and len(uses) == len(places):
            groups = _arranged_alike(uses)
            if _different(torch.cat([group[0].entries.reshape(-1) for group in groups])):
                weights[name] = groups
            elif pair := _transposed(groups):
                straight, transposed = pair
                tied[name] = Layer((name,), _light(straight) + _light(transposed), len(transposed))
    found: list[Layer | ExplicitGradient] = list(tied.values())
    taken = set(weights) | set(tied)
    for name, groups in weights.items():
        for alike in groups:
            bias = _bias(alike, arrivals, taken)
            both = (name, bias) if bias else (name,)
            taken.update(both)
            found.append(Layer(both, _light(alike)))
    moving = downstream(next(node for node in reversed(graph.graph.nodes) if node.op == "placeholder"))
    for node, names, alike in _computed(graph, moving, taken):
        if weight := computed(graph, node, names, alike[0].entries, parameters, constants()):
            taken.update(names)
            found.append(Layer(names, _light(alike), computed=weight))
    explicit = [name for name in arrivals if name not in taken]
    return found + [ExplicitGradient((name,), _fallback(arrivals[name], moving)) for name in explicit]


def _computed(
    graph: SampleGraph, moving: set[fx.Node], taken: set[str]
) -> Iterator[tuple[fx.Node, tuple[str, ...], tuple[Use, ...]]]:
    """Weights with a rule that are computed only from parameters that have no other use.

    Yields:
        The weight, its parameters (all of one module), and its uses, with its entries in one arrangement.
    """
    used = (node for user in graph.graph.nodes if user in moving for node in user.all_input_nodes)
    for node in dict.fromkeys(_origin(node) for node in used if node.op == "call_function" and node not in moving):
        above = upstream(node)
        names = tuple(name for name, placeholder in graph.placeholders().items() if placeholder in above)
        closed = all(set(each.users) <= above for each in above - {node} if each.op != "get_attr")
        if node.op != "call_function" or not closed or not taken.isdisjoint(names) or len({*map(owner, names)}) > 1:
            continue
        uses = [rule_for(*place) for place in _arrivals(node)]
        known = [use for use in uses if use is not None and use.entries.ndim == 3]
        if known and len(known) == len(uses):
            alike, *others = _arranged_alike(known)
            if not others and _different(alike[0].entries.reshape(-1)):
                yield node, names, alike


def _origin(node: fx.Node) -> fx.Node:
    """The value whose entries a node rearranges."""
    while node.target in MOVEMENTS:
        (before,) = node.all_input_nodes
        if before.target not in MOVEMENTS and not isinstance(before.meta["val"], Tensor):
            break  # one of several results
        node = before
    return node


def _arrivals(source: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, Tensor]]:
    """Uses of a value, except ``detach``: the operation, its argument, and the indices of the argument's entries."""
    value = source.meta["val"]
    stack: list[tuple[fx.Node, Any]] = [(source, torch.arange(value.numel(), device="cpu").reshape(value.shape))]
    while stack:
        node, entries = stack.pop()
        for user in node.users:
            if callable(user.target) and user.target in MOVEMENTS and user.all_input_nodes == [node]:
                stack.append((user, user.target(entries, *user.args[1:], **user.kwargs)))
            elif user.target is not aten.detach.default:
                yield user, node, entries


def _light(alike: Sequence[Use]) -> tuple[Use, ...]:
    """Uses in one arrangement of entries, whose indices take no memory if strides describe them."""
    entries = alike[0].entries
    pattern = entries.shape, entries.stride(), entries.storage_offset()
    size = entries.untyped_storage().nbytes() // entries.element_size()
    if torch.equal(torch.arange(size, device="cpu").as_strided(*pattern), entries):
        entries = torch.empty(size, device="meta").as_strided(*pattern)
    return tuple(replace(use, entries=entries) for use in alike)


def _arranged_alike(uses: list[Use]) -> list[tuple[Use, ...]]:
    """Uses grouped by their arrangement of entries."""
    groups: list[list[Use]] = []
    for use in uses:
        for group in groups:
            if group[0].factors.func is use.factors.func and torch.equal(group[0].entries, use.entries):
                group.append(use)
                break
        else:
            groups.append([use])
    return [tuple(group) for group in groups]


def _transposed(groups: list[tuple[Use, ...]]) -> tuple[tuple[Use, ...], tuple[Use, ...]] | None:
    """The uses of a matrix and those of its transpose, a table first; ``None`` if the groups are not such a pair."""
    if len(groups) != 2:
        return None
    straight, transposed = sorted(groups, key=lambda group: -_is_table(group))
    entries, other = straight[0].entries, transposed[0].entries
    matrix = entries if _is_table(straight) else entries[0].mT
    same = not _is_table(transposed) and len(other) == 1 and torch.equal(other[0], matrix)
    return (straight, transposed) if same and (_is_table(straight) or len(entries) == 1) else None


def _is_table(group: tuple[Use, ...]) -> bool:
    return group[0].entries.ndim == 2


def _different(entries: Tensor) -> bool:
    """Whether there are indices, and all are different; much faster than sorting them."""
    if not len(entries):
        return False
    seen = torch.zeros(int(entries.max()) + 1, dtype=torch.bool, device="cpu")
    seen[entries] = True
    return int(seen.sum()) == len(entries)


def _bias(uses: tuple[Use, ...], arrivals: dict[str, list[Any]], taken: set[str]) -> str | None:
    """The parameter that is added elementwise at all of these uses and is used nowhere else."""
    if any(use.bias is None for use in uses):
        return None
    nodes = {(use.node, use.bias) for use in uses}
    size = uses[0].entries.shape[:2].numel()
    for name, places in arrivals.items():
        if name not in taken and len(places) == len(uses) and {place[:2] for place in places} == nodes:
            whole = torch.arange(size, device="cpu")
            if all(entries.shape == whole.shape and torch.equal(entries, whole) for *_, entries in places):
                return name
    return None


def _fallback(places: list[tuple[fx.Node, fx.Node, Tensor]], moving: set[fx.Node]) -> str:
    """Why no rule applies; empty for vectors, and for parameters that scale or shift values that depend on x."""
    if not places or sum(size > 1 for size in places[0][2].shape) < 2:
        return ""
    without_rule = {
        str(node.target if node.op != "output" else node.op)
        for node, *_ in places
        if node not in moving or node.target not in SCALES_AND_SHIFTS
    }
    return f"no rule for its use in {', '.join(sorted(without_rule))}" if without_rule else ""
