"""Metrics of the factors K and P of Theta = P K P*, for recurrent networks and, by layers, for any traced network.

An *injection* is a perturbation of the result of an operation that uses a weight, at one position of one sample. S maps
a change of the parameters to injections with the inputs of all operations held fixed, and P maps injections to changes
of the outputs, so that J = P S and, with K = S S^T, Theta = P K P*.

- K depends only on the inputs of the layers. For a weight with inputs a_s and C outputs at the positions s of all
  samples it is (A A^T) ⊗ I_C, where the a_s are the rows of A; a bias appends a 1 to them. K follows from a forward
  pass and is exact. Different weights are orthogonal blocks of K. A matrix that is used both as it is and transposed
  has a block between the two uses.
- P depends only on the layers' Jacobians and does not mix samples. P* u are the cotangents of a backward pass with u at
  the outputs, so the metrics of P P* are estimated by U-statistics over random signs u.

S leaves out parameters whose gradients have no factors (scales and shifts, weights that are computed from parameters,
biases without their weight) and transposed convolutions, in which results of several positions overlap. P K P* is then
Theta without their contribution. If a network declares its recurrence, all terms of a gate share one injection (see
:mod:`ntkbench.operators.recurrent.state_kernel`), and nothing is left out.

Source: Hazelden 2025 (arXiv 2511.10796) and the blog post on recurrent models, for recurrent networks; Hazelden,
Driscoll, Shlizerman, Shea-Brown 2026 (arXiv 2605.08746) for transformers, with K from the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from ntkbench.errors import OverMemory, Undefined, Unsupported
from ntkbench.estimate import Estimate, Estimates, rounding_bound
from ntkbench.estimators.accumulators import delta_method, moment_products, required_moments
from ntkbench.estimators.standard_errors import MomentEstimates, PairSums
from ntkbench.metrics import Moments
from ntkbench.operators import arrays
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.units import bytes_label, over_memory

if TYPE_CHECKING:
    from torch import Tensor

    from ntkbench.layerwise.blocks import Block
    from ntkbench.layerwise.factors import GradientFactors, Lookups, Products, Tied
    from ntkbench.layerwise.layers import Layer
    from ntkbench.methods.base.layerwise import TracedNetwork, TracedProblem

    Inputs = Products | Lookups | Tied

LEAST = 4
"""Minimum number of probes in a group for an unbiased estimate of the variance."""


@dataclass(frozen=True, repr=False)
class Factors:
    """Metrics of the factors of Theta = P K P*.

    Attributes:
        K: metrics of K by name, exact.
        P: metrics of P P* by name, with standard errors unless the probes are all of the unit vectors.
        left_out: parameters that are in neither factor.
    """

    K: Estimates
    P: Estimates
    left_out: tuple[str, ...] = ()

    def __repr__(self) -> str:
        lines = ["K", repr(self.K), "", "P P*", repr(self.P)]
        return "\n".join([*lines, *(["", f"left out: {', '.join(self.left_out)}"] if self.left_out else [])])


def of_recurrence(problem: Problem, target: Target, names: Sequence[str], probes: int, seed: int) -> Factors:
    """Metrics of the factors of a recurrent network; see :mod:`ntkbench.operators.recurrent.state_kernel`.

    Cost: one forward pass at each set of weights, and 2 products with P or P* for each probe and metric, 1 for the
    trace and 4 for the alignment.

    Args:
        problem: a problem whose module declares a recurrence.
        target: where to compute.
        names: metrics.
        probes: number of probes of random signs; at least 4.
        seed: of the probes.
    """
    from ntkbench.estimators.state_factors import metric_of_k, metric_of_p
    from ntkbench.operators.recurrent.state_kernel import StateKernel

    kernel = StateKernel(problem, "theta_0", target)
    at_f = StateKernel(problem, "theta_f", target) if "alignment" in names else None
    others = {name: at_f if name == "alignment" else None for name in names}
    K = {name: metric_of_k(kernel, name, other) for name, other in others.items()}
    P = {name: metric_of_p(kernel, name, probes, seed, other) for name, other in others.items()}
    return Factors(Estimates(K), Estimates(P))


def of_layers(prepared: TracedProblem, names: Sequence[str], probes: int, seed: int) -> Factors:
    """Metrics of the factors of a traced network, layer by layer.

    Cost: one forward pass for K, one pass per probe for P P* and one for its certificate; twice that with the
    alignment. With as many probes as outputs, these are the unit vectors, and P P* is exact as well.

    Args:
        prepared: the network.
        names: metrics.
        probes: number of probes of random signs for each sample; at least 4.
        seed: of the probes.

    Raises:
        Unsupported: no parameter has factors, or the two networks of an alignment have different layers.
        OverMemory: the inputs of all layers, or the cotangents of four probes, do not fit in memory.
        Undefined: all inputs of layers are zero.
        Uncertified: plain autograd gives different gradients.
    """
    from ntkbench.methods.base.layerwise import ledger_of

    ends = prepared.ends("alignment" if "alignment" in names else "trace")
    if not _layers(ends[0]):
        raise Unsupported("no parameter that counts is a weight whose gradients have factors")
    if len({tuple(_shapes(end)) for end in ends}) > 1:
        raise Unsupported("the two networks have different layers")
    # P comes first: its certificate covers cotangents and inputs, and traces the network again if this trace fails.
    ledger, moments = ledger_of(ends), required_moments(names)
    found, exact = _moments_of_p(ends, moments, probes, seed)
    spent, _, certificate = ledger()
    notes = tuple(end.engine.note for end in ends[:1] if end.engine.note)
    P = {}
    for name in names:
        value, error, degrees = delta_method(name, moments, found)
        if name == "effective_rank":
            value = min(value, float(len(ends[0].x) * ends[0].engine.O))  # the size of P P*
        how, stated = ("unit_cotangents", None) if exact else ("propagated_probes", error)
        P[name] = Estimate(
            value,
            stated,
            spent,
            how,
            notes,
            name,
            degrees=degrees,
            certificate=certificate,
            rounding=_rounding(name, ends, certificate) if exact else None,
            kernel="P P*",
        )
    of_k = _moments_of_k(ends)
    if not of_k.square or of_k.square_f == 0:
        raise Undefined("K is zero because all inputs of layers are, so its effective rank and alignment are undefined")
    K = {
        name: Estimate(
            of_k.metric(name),
            None,
            0,
            "inputs_of_layers",
            notes,
            name,
            certificate=certificate,
            rounding=_rounding(name, ends, certificate),
            kernel="K",
        )
        for name in names
    }
    kept = {name for layer in _layers(ends[0]).values() for name in layer.parameters}
    every = (name for layer in ends[0].engine.layers for name in layer.parameters)
    return Factors(Estimates(K), Estimates(P), tuple(dict.fromkeys(name for name in every if name not in kept)))


def _rounding(metric: str, ends: Sequence[TracedNetwork], certificate: float | None) -> float:
    """The rounding of an exact metric; see :func:`ntkbench.estimate.rounding_bound`."""
    epsilon = arrays.epsilon(ends[0].parameters[0])
    sizes = (sum(w.numel() for w in end.parameters) for end in ends)
    return rounding_bound(metric, epsilon, max(len(ends[0].x) * ends[0].engine.O, *sizes), certificate)


def _layers(end: TracedNetwork) -> dict[int, Layer]:
    """The layers that have injections, by their numbers."""
    from ntkbench.layerwise.layers import Layer

    return {
        number: layer
        for number, layer in enumerate(end.engine.layers)
        if isinstance(layer, Layer) and layer.computed is None and not any(use.overlaps for use in layer.uses)
    }


class _LayerSums:
    """Inner products of one layer's K at one or two ends, accumulated over samples.

    <K, K'> is C <A A^T, B B^T> = C ||A^T B||^2 for inputs A and B. Products A^T B are added up over samples if inputs
    have no more entries than there are positions; otherwise the inputs are kept. Those of embedding tables are always
    kept, as row indices.
    """

    def __init__(self, layer: Layer, samples: int) -> None:
        self._uses, self._parts = layer.uses, 2 if layer.transposed else 1
        self._kept: list[list[list[Tensor]]] = []
        self._products: dict[tuple[int, int, int], Tensor] = {}
        self._dots: dict[tuple[int, int, int], float] = {}
        self._channels: list[int] = []
        positions = samples * sum(use.node.meta["val"].numel() // use.entries.shape[-2] for use in layer.uses)
        self._adds = all(use.entries.ndim == 3 and use.entries.shape[-1] <= positions for use in layer.uses)

    @property
    def entries(self) -> int:
        """Upper bound on the entries of a product A^T B; 0 if the inputs are kept."""
        each = [use.entries.shape for use in self._uses]
        return self._parts * max(math.prod(shape[:-2]) * shape[-1] ** 2 for shape in each) if self._adds else 0

    def add(self, ends: Sequence[Inputs]) -> None:
        """Add the inputs of some samples, at each end."""
        from ntkbench.layerwise.factors import Lookups

        parts = [_parts(inputs) for inputs in ends]
        self._channels = [part.g.shape[-2] for part in parts[0]]
        # Inputs of a layer: row indices [N S], or [groups, N S, D] in float64.
        values = [
            [
                part.rows.flatten() if isinstance(part, Lookups) else part.a.double().permute(1, 0, 3, 2).flatten(1, 2)
                for part in each
            ]
            for each in parts
        ]
        for number in range(len(parts[0])):
            for i, j in self._pairs(len(ends)):
                one, other = values[i][number], values[j][number]
                self._dots[number, i, j] = self._dots.get((number, i, j), 0.0) + _dot(one, other)
                if self._adds:
                    made = one.mT @ other
                    self._products[number, i, j] = self._products.get((number, i, j), 0) + made
        if not self._adds:
            self._kept.append(values)

    @staticmethod
    def _pairs(ends: int) -> list[tuple[int, int]]:
        return [(0, 0), (1, 1), (0, 1)][: 1 if ends == 1 else 3]

    def trace(self) -> float:
        """tr K at the first end."""
        return sum(C * self._dots[number, 0, 0] for number, C in enumerate(self._channels))

    def inner(self, i: int, j: int) -> float:
        """<K, K'> of two ends."""
        import torch

        found = 0.0
        for number, C in enumerate(self._channels):
            if self._adds:
                found += C * float((self._products[number, i, j] ** 2).sum())
            else:
                along = self._kept[0][i][number].ndim // 2  # of positions
                both = (torch.cat([values[end][number] for values in self._kept], along) for end in (i, j))
                found += C * _inner_of_grams(*both)
        if len(self._channels) > 1:
            # The block between uses of a matrix as it is and transposed, twice: (a_s . a'_s) (b_t . b'_t) over s and t.
            found += 2 * self._dots[0, i, j] * self._dots[1, i, j]
        return found


def _moments_of_k(ends: Sequence[TracedNetwork]) -> Moments:
    layers = [list(_layers(end).values()) for end in ends]
    N, memory, item = len(ends[0].x), ends[0].engine.memory, ends[0].parameters[0].element_size()
    sums = [_LayerSums(layer, N) for layer in layers[0]]
    pairs = 1 if len(ends) == 1 else 3
    held = 8 * pairs * sum(each.entries for each in sums)
    uses = [use for layer in layers[0] for use in layer.uses]
    operands = item * sum(use.operand.meta["val"].numel() for use in uses)
    widest = max(sum(use.inputs for use in layer.uses) for layer in layers[0])
    of_sample = len(ends) * (operands + (item + 2 * 8) * widest)
    kept = (
        8
        * len(ends)
        * sum(
            N * sum(use.inputs for use in layer.uses)
            for layer, each in zip(layers[0], sums, strict=True)
            if not each.entries
        )
    )
    if (needed := held + kept + of_sample) > memory:
        said = f"the inputs of layers and their products take {over_memory(needed, memory)}"
        raise OverMemory(f"{said}: raise memory, or use fewer inputs")
    size = max(1, (memory - held - kept) // of_sample)
    for start in range(0, N, size):
        chunk = slice(start, start + size)
        each = [iter(end.engine.operands(uses, end.parameters, end.x[chunk])) for end in ends]
        for number, added in enumerate(sums):
            added.add(
                [
                    _inputs(of_end[number], [next(found) for _ in of_end[number].uses])
                    for of_end, found in zip(layers, each, strict=True)
                ]
            )
    trace, square = (sum(s.trace() for s in sums), sum(s.inner(0, 0) for s in sums))
    if len(ends) == 1:
        return Moments(trace, square)
    return Moments(trace, square, sum(s.inner(1, 1) for s in sums), sum(s.inner(0, 1) for s in sums))


def _shapes(end: TracedNetwork) -> list[tuple[object, ...]]:
    """Properties that layers of two networks must share, for their K to be matrices of the same injections."""
    return [
        (
            layer.parameters,
            layer.transposed,
            *((use.factors.func, use.entries.shape, use.node.meta["val"].shape) for use in layer.uses),
        )
        for layer in _layers(end).values()
    ]


def _inputs(layer: Layer, operands: Sequence[Tensor]) -> Inputs:
    """The factors of a layer's gradients with cotangents of zero."""
    results = [use.node.meta["val"] for use in layer.uses]
    zeros = [
        a.new_zeros((), dtype=result.dtype).expand(len(a), 1, *result.shape)
        for a, result in zip(operands, results, strict=True)
    ]
    return cast("Inputs", layer.factors(list(operands), zeros))


def _parts(inputs: Inputs) -> Sequence[Products | Lookups]:
    from ntkbench.layerwise.factors import Tied

    return inputs.parts() if isinstance(inputs, Tied) else (inputs,)


def _dot(one: Tensor, other: Tensor) -> float:
    """The inner product of all inputs of a layer with those at the other end."""
    if one.ndim == 1:  # unit vectors, by their indices
        return float(((one == other) & (one >= 0)).sum())
    return float((one * other).sum())


def _inner_of_grams(one: Tensor, other: Tensor) -> float:
    """<A A^T, B B^T> for inputs A and B of a layer, summed over groups."""
    import torch

    if one.ndim == 1:
        rows = torch.stack([one, other])
        counts = torch.unique(rows[:, (rows >= 0).all(0)], dim=1, return_counts=True)[1]
        return float((counts.double() ** 2).sum())
    return float(((one @ one.mT) * (other @ other.mT)).sum())


def _moments_of_p(
    ends: Sequence[TracedNetwork], names: Sequence[str], probes: int, seed: int
) -> tuple[MomentEstimates, bool]:
    """The moments of P P*, and whether they are exact.

    P P* has a block for each sample. With the cotangents p_k = P* u_k of a sample, <p_k, p_l>^2 for k != l is unbiased
    for the squared norm of its block, and ||p_k||^2 for its trace.
    """
    from ntkbench.operators.torch import TorchRng

    N, outputs = len(ends[0].x), ends[0].engine.O
    exact = probes >= outputs and _at_once(ends, outputs) == outputs
    if exact:
        traces, products = _tables([_grams(end, None, outputs) for end in ends], names)
        values = ([traces.sum()] if names[0] == "trace" else []) + [table.sum() for table in products]
        nothing = np.zeros((len(values), len(values)))
        return MomentEstimates(np.array(values), nothing, nothing, nothing, np.inf), True
    size = _at_once(ends, probes)
    if size < LEAST:
        memory = bytes_label(ends[0].engine.memory)
        raise OverMemory(f"the cotangents of {LEAST} probes do not fit in memory, which is {memory}: raise memory")
    rng = TorchRng(seed, ends[0].parameters[0].dtype, ends[0].x.device)
    groups = []
    for chunk in arrays.chunks(probes, -(-probes // size)):
        k = chunk.stop - chunk.start
        u = rng.sign(k, N * outputs).reshape(k, N, outputs).transpose(0, 1)
        traces, products = _tables([_grams(end, u, k) for end in ends], names)
        sums = PairSums(N, k, len(products))
        for b in range(N):
            sums.add(b, b, [table[b, None, :, None] for table in products])
        groups.append((k, sums.moments(traces if names[0] == "trace" else None)))
    return MomentEstimates.pooled(groups), False


TABLES = 8
"""Number of tables in float64 of all pairs of a sample's directions: one for each end and for each moment."""


def _at_once(ends: Sequence[TracedNetwork], directions: int) -> int:
    """Number of directions, at most ``directions``, for which a sample's cotangents and the tables fit in memory."""
    most = min(directions, math.isqrt(ends[0].engine.memory // (2 * TABLES * 8 * len(ends[0].x))))
    return min(end.engine.directions_at_once(end.parameters, end.x, most) for end in ends)


def _grams(end: TracedNetwork, u: Tensor | None, k: int) -> np.ndarray:
    """Inner products of each sample's cotangents, ``[N, k, k]``, for directions ``u [N, k, O]`` or unit vectors."""
    engine = end.engine

    def visited() -> Tensor:
        layers, found = _layers(end), end.parameters[0].new_zeros(len(end.x), k, k)

        def take(block: Block, number: int, factors: GradientFactors) -> None:
            if number in layers:
                found[block.samples] += _gram(cast("Inputs", factors))

        engine.visit(end.parameters, end.x, take, u)
        return found

    return arrays.to_numpy(engine.certain(visited), np.float64)


def _gram(factors: Inputs) -> Tensor:
    import torch

    from ntkbench.layerwise.factors import Lookups

    # Padding has no injections, because its row of the table does not count.
    each = [
        part.g * (part.rows >= 0)[:, None, None] if isinstance(part, Lookups) else part.g for part in _parts(factors)
    ]
    flat = torch.cat([g.flatten(2) for g in each], 2)
    return flat @ flat.mT


def _tables(grams: Sequence[np.ndarray], names: Sequence[str]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Each probe's traces ``[N, k]``, and products of pairs of probes ``[N, k, k]`` for the other moments."""
    traces = grams[0].diagonal(axis1=1, axis2=2)
    return traces, moment_products(grams)[: len(names) - (names[0] == "trace")]
