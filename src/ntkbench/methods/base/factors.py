"""Metrics of the factors K and P of Theta = P K P*: of recurrent networks, and layer by layer of any traced network.

An *injection* is a perturbation of the result of an operation that uses a weight, at one position of one sample. S maps
a change of the parameters to injections with the inputs of all operations held fixed, and P maps injections to changes
of the outputs, so that J = P S and, with K = S S^T, Theta = P K P*.

- K depends on the inputs of the layers alone. That of a weight with inputs a_s and C outputs at the positions s of all
  samples is (A A^T) (x) I_C, with the a_s as rows of A; a bias appends a 1 to them. K follows from a forward pass, and
  is exact. Different weights are orthogonal blocks of K. A matrix that is used as it is and transposed has a block
  between both uses.
- P depends on the layers' Jacobians alone, and does not mix samples. P* u are the cotangents of a backward pass with u
  at the outputs, so that the metrics of P P* have U-statistics over random signs u.

Parameters whose gradients have no factors (scales and shifts, weights that are computed from parameters) are left out
of S, so that P K P* is Theta without their contribution. If a network declares its recurrence, all terms of a gate
share one injection (see :mod:`ntkbench.operators.recurrent.state_kernel`), and nothing is left out.

Source: Hazelden 2025 (arXiv 2511.10796) and the blog post on recurrent models, for recurrent networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from ntkbench.errors import BadInput, OverMemory
from ntkbench.estimate import Estimate, Estimates
from ntkbench.estimators.accumulators import delta_method, moment_products, required_moments
from ntkbench.estimators.standard_errors import MomentEstimates, PairSums
from ntkbench.metrics import Moments
from ntkbench.operators import arrays
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from ntkbench.layerwise.blocks import Block
    from ntkbench.layerwise.factors import GradientFactors, Lookups, Products, Tied
    from ntkbench.layerwise.layers import Layer
    from ntkbench.methods.base.layerwise import TracedNetwork, TracedProblem

    Inputs = Products | Lookups | Tied

LEAST = 4
"""Probes of a group from which the variance has an unbiased estimate."""


@dataclass(frozen=True, repr=False)
class Factors:
    """Metrics of the factors of Theta = P K P*.

    Attributes:
        K: of K by name, exact.
        P: of P P* by name, with standard errors unless probes are all unit vectors.
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
        problem: its module declares a recurrence.
        target: where to compute.
        names: metrics.
        probes: random signs, at least 2.
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
        probes: random signs for each sample, at least 2.
        seed: of the probes.

    Raises:
        BadInput: no parameter has factors, or the two networks of an alignment have different layers.
        OverMemory: the inputs of all layers, or the cotangents of four probes, do not fit in memory.
        Uncertified: plain autograd gives other gradients.
    """
    from ntkbench.methods.base.layerwise import ledger_of

    ends = prepared.ends("alignment" if "alignment" in names else "trace")
    if not _layers(ends[0]):
        raise BadInput("no parameter that counts is a weight whose gradients have factors")
    # First P: its certificate is of cotangents and inputs alike, and makes another trace where this one fails.
    ledger, moments = ledger_of(ends), required_moments(names)
    found, exact = _moments_of_p(ends, moments, probes, seed)
    spent, _, certificate = ledger()
    P = {}
    for name in names:
        value, error, degrees = delta_method(name, moments, found)
        how, stated = ("unit_cotangents", None) if exact else ("propagated_probes", error)
        P[name] = Estimate(value, stated, spent, how, metric=name, degrees=degrees, certificate=certificate)
    of_k = _moments_of_k(ends)
    K = {
        name: Estimate(of_k.metric(name), None, 0, "inputs_of_layers", metric=name, certificate=certificate)
        for name in names
    }
    kept = {name for layer in _layers(ends[0]).values() for name in layer.parameters}
    every = (name for layer in ends[0].engine.layers for name in layer.parameters)
    return Factors(Estimates(K), Estimates(P), tuple(dict.fromkeys(name for name in every if name not in kept)))


def _layers(end: TracedNetwork) -> dict[int, Layer]:
    """The layers whose gradients have factors, by their numbers."""
    from ntkbench.layerwise.layers import Layer

    numbered = enumerate(end.engine.layers)
    return {number: layer for number, layer in numbered if isinstance(layer, Layer) and layer.computed is None}


def _moments_of_k(ends: Sequence[TracedNetwork]) -> Moments:
    layers = [list(_layers(end).values()) for end in ends]
    names = [[layer.parameters for layer in each] for each in layers]
    if names[0] != names[-1]:
        raise BadInput("the two networks have different layers")
    operands = [_operands(end, each) for end, each in zip(ends, layers, strict=True)]
    sums = dict.fromkeys(("trace", "square", "square_f", "cross"), 0.0)
    for number, pair in enumerate(zip(*layers, strict=True)):
        inputs = [_inputs(layer, each[number]) for layer, each in zip(pair, operands, strict=True)]
        one, other = inputs[0], inputs[-1]
        sums["trace"] += _trace(one)
        sums["square"] += _inner(one, one)
        if len(ends) > 1:
            sums["square_f"] += _inner(other, other)
            sums["cross"] += _inner(one, other)
    return Moments(**sums) if len(ends) > 1 else Moments(sums["trace"], sums["square"])


def _operands(end: TracedNetwork, layers: Sequence[Layer]) -> list[list[Tensor]]:
    """The operands of all uses of some layers, for all samples."""
    uses = [use for layer in layers for use in layer.uses]
    needed = sum(use.operand.meta["val"].numel() for use in uses) * len(end.x) * end.parameters[0].element_size()
    if needed > end.engine.memory:
        raise OverMemory(f"the inputs of all layers take {needed} bytes; memory is {end.engine.memory}")
    found = iter(end.engine.operands(uses, end.parameters, end.x))
    return [[next(found) for _ in layer.uses] for layer in layers]


def _inputs(layer: Layer, operands: Sequence[Tensor]) -> Inputs:
    """The factors of a layer's gradients with cotangents of zero."""
    results = [use.node.meta["val"] for use in layer.uses]
    zeros = [
        a.new_zeros((), dtype=result.dtype).expand(len(a), 1, *result.shape)
        for a, result in zip(operands, results, strict=True)
    ]
    return cast("Inputs", layer.factors(list(operands), zeros))


def _trace(inputs: Inputs) -> float:
    return sum(_channels(part) * _dot(part, part) for part in _parts(inputs))


def _inner(one: Inputs, other: Inputs) -> float:
    """The inner product of a layer's K with that of another network."""
    parts = list(zip(_parts(one), _parts(other), strict=True))
    found = sum(_inner_of_grams(*pair) for pair in parts)
    # The block between uses of a matrix as it is and transposed, twice: (a_s . a'_s) (b_t . b'_t) over all s and t.
    return found + (2 * _dot(*parts[0]) * _dot(*parts[1]) if len(parts) > 1 else 0.0)


def _parts(inputs: Inputs) -> Sequence[Products | Lookups]:
    from ntkbench.layerwise.factors import Tied

    return inputs.parts() if isinstance(inputs, Tied) else (inputs,)


def _channels(inputs: Products | Lookups) -> int:
    """Outputs of a layer in each group."""
    return inputs.g.shape[-2]


def _dot(one: Products | Lookups, other: Products | Lookups) -> float:
    """The inner product of all inputs of a layer with those of another network."""
    from ntkbench.layerwise.factors import Lookups

    if isinstance(one, Lookups):
        assert isinstance(other, Lookups)
        return float(((one.rows == other.rows) & (one.rows >= 0)).sum())
    assert not isinstance(other, Lookups)
    return float((one.a.double() * other.a.double()).sum())


def _inner_of_grams(one: Products | Lookups, other: Products | Lookups) -> float:
    """C <A A^T, B B^T> for inputs A and B of a layer of C outputs, summed over groups.

    It is C ||A^T B||^2 as well, which is cheaper where inputs have fewer entries than positions.
    """
    import torch

    from ntkbench.layerwise.factors import Lookups

    if isinstance(one, Lookups):
        assert isinstance(other, Lookups)
        rows = torch.stack([one.rows.flatten(), other.rows.flatten()])
        counts = torch.unique(rows[:, (rows >= 0).all(0)], dim=1, return_counts=True)[1]
        return _channels(one) * float((counts.double() ** 2).sum())
    assert not isinstance(other, Lookups)
    A, B = (part.a.double().permute(1, 0, 3, 2).flatten(1, 2) for part in (one, other))  # [groups, N S, D]
    found = ((A @ A.mT) * (B @ B.mT)).sum() if A.shape[1] < A.shape[2] else ((A.mT @ B) ** 2).sum()
    return _channels(one) * float(found)


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
    if size < min(LEAST, probes):
        raise OverMemory(
            f"the cotangents of {min(LEAST, probes)} probes do not fit in memory of {ends[0].engine.memory}"
        )
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


def _at_once(ends: Sequence[TracedNetwork], directions: int) -> int:
    """Directions, at most so many, whose cotangents of a sample fit in memory."""
    return min(end.engine.directions_at_once(end.parameters, end.x, directions) for end in ends)


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

    # Injections at padding, whose row of the table does not count, are none.
    each = [
        part.g * (part.rows >= 0)[:, None, None] if isinstance(part, Lookups) else part.g for part in _parts(factors)
    ]
    flat = torch.cat([g.flatten(2) for g in each], 2)
    return flat @ flat.mT


def _tables(grams: Sequence[np.ndarray], names: Sequence[str]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Each probe's traces ``[N, k]``, and products of pairs of probes ``[N, k, k]`` for the other moments."""
    traces = grams[0].diagonal(axis1=1, axis2=2)
    return traces, moment_products(grams)[: len(names) - (names[0] == "trace")]
