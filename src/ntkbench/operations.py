"""Operations of passes and of products, counted on shapes; nothing is computed and no time is measured.

A multiplication with its addition counts as two operations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, NamedTuple

from ntkbench import metrics
from ntkbench.ambient import uncompiled
from ntkbench.operators import declares
from ntkbench.problem import Problem, on_shapes

FORWARD_AND_BACKWARD = 3
"""Operations of a forward and a backward pass, relative to those of the forward pass."""


class Layer(NamedTuple):
    """Sizes of a matrix product or convolution with a weight.

    Attributes:
        groups: of a convolution; 1 for a matrix product.
        C: outputs of a group.
        D: inputs of a group; for a convolution, times the positions of its filter.
        S: positions at which each sample uses the weight, such as those of an image or a sequence.
    """

    groups: float
    C: float
    D: float
    S: float


class Count(NamedTuple):
    """Counts of a forward pass.

    Attributes:
        multiplications: of matrix products and convolutions, for all samples; at least one for each parameter and
            sample.
        layers: those with weights; empty if they cannot be counted.
        tables: entries of a row of each embedding, and the positions at which a sample looks up rows.
        last: rows and columns of the two factors of the last matrix product; empty if the last product is a
            convolution, ``None`` if it is not known.
    """

    multiplications: float
    layers: tuple[Layer, ...]
    last: tuple[tuple[int, int], ...] | None = None
    tables: tuple[tuple[float, float], ...] = ()


def count(problem: Problem) -> Count:
    """Operations of a network at theta_0, from a forward pass on shapes; it is run once for each problem."""
    if not problem._operations:
        problem._operations.append(_counted(problem))
    found: Count = problem._operations[0]
    return found


def of_pass(problem: Problem) -> float:
    """Operations of a JVP or VJP: twice those of a forward pass, and three times on a recurrence, which repeats it."""
    return (6 if declares(problem.module) else 4) * count(problem).multiplications


def of_pass_by_layers(problem: Problem) -> float:
    """Operations of a backward pass that leaves out the gradients of weights."""
    return 2 * count(problem).multiplications


def of_rows(rows: float, columns: float) -> float:
    """Operations of the inner products of some rows: one triangle of their Gram matrix."""
    return rows**2 * columns


def of_kernel(problem: Problem, directions: float, *, shorter: bool = False) -> float:
    """Operations of a kernel between a number of directions of each sample, layer by layer; one triangle.

    For each layer they are those of the cheaper order of summation, see :mod:`ntkbench.layerwise.contraction`. A
    network whose layers cannot be counted counts as rows of J.

    Args:
        problem: the problem.
        directions: number of directions of each sample.
        shorter: whether the last layer is shortened to no more outputs than there are directions.
    """
    N, K = problem.N, directions
    if not (layers := count(problem).layers):
        return of_rows(N * K, problem.P)
    total = 0.0
    for groups, outputs, D, S in layers:
        C = min(outputs, K / S) if shorter and outputs * S == problem.O else outputs
        pairwise = N**2 * (D + K**2 * C if S <= 1 else S * (S * (D + K * C) + K**2 * C))
        explicit = C * D * N * K * (2 * S + N * K)
        total += groups * min(pairwise, explicit)
    return total + sum(N**2 * S * C * (K + K**2) for C, S in count(problem).tables)


def of_diagonal(problem: Problem, directions: float) -> float:
    """Operations of the diagonal of such a kernel, layer by layer, without those of the passes."""
    N, K = problem.N, directions
    total = 0.0
    for groups, C, D, S in count(problem).layers:
        positions = N * S**2 * (D + K * C) if S > 1 else 0.0
        total += 2 * groups * min(N * K * C * D * S, positions + N * (D + K * C))
    return total + sum(2 * N * K * S * C for C, S in count(problem).tables)


def ends(metric: str) -> int:
    """Number of sets of weights of a metric."""
    return len(metrics.parameter_sets(metric))


def of_gram(metric: str, rows: int, columns: int, across: float = 0.0) -> float:
    """Operations of Gram matrices, one for each set of weights and ``across`` between the sets; 0 for the trace."""
    return 0.0 if metric == "trace" else (ends(metric) + across) * of_rows(rows, columns)


def by_layers(problem: Problem, metric: str, passes: float, most: float = math.inf, *, shorter: bool = False) -> float:
    """Operations of kernels by layers at each set of weights, or of their diagonals for the trace.

    Args:
        problem: the problem.
        metric: the metric.
        passes: one for each direction of a sample and set of weights.
        most: largest number of directions of one kernel; more directions are split into several kernels.
        shorter: see :func:`of_kernel`.
    """
    directions = passes / ends(metric)
    if metric == "trace":
        return of_diagonal(problem, directions)
    kernels = math.ceil(max(1.0, directions / max(1.0, most)))
    return ends(metric) * kernels * of_kernel(problem, directions / kernels, shorter=shorter)


def _counted(problem: Problem) -> Count:
    least = float(problem.N * problem.P)
    recurrent = declares(problem.module)
    steps = problem.x.shape[1] if recurrent else 1
    try:
        total, layers, last, tables = _on_shapes(problem)
    except Exception:  # a network that runs, but not while its operations are counted
        return Count(steps * least, ())
    if recurrent:  # each step uses the same weights
        positions: dict[tuple[float, float, float], float] = defaultdict(float)
        for groups, C, D, S in layers:
            positions[groups, C, D] += S
        return Count(steps * least, tuple(Layer(*sizes, S) for sizes, S in positions.items()))
    return Count(max(least, total), tuple(layers), last, tuple(tables))


def _on_shapes(
    problem: Problem,
) -> tuple[float, list[Layer], tuple[tuple[int, int], ...], list[tuple[float, float]]]:
    """Multiplications of a forward pass, its products with weights, the factors of its last product, its embeddings."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    if problem.module is None:
        raise TypeError("no network in torch")
    aten, layers, last = torch.ops.aten, list[Layer](), tuple[tuple[int, int], ...]()
    tables: list[tuple[float, float]] = []

    def add(groups: float, C: float, D: float, S: float) -> int:
        layers.append(Layer(groups, C, D, S))
        return int(2 * problem.N * S * groups * C * D)

    def factors(*shapes: Any) -> None:
        nonlocal last
        last = tuple((shape[-2], shape[-1]) for shape in shapes)

    def mm(a: Any, b: Any, *_: Any, **__: Any) -> int:
        factors(a, b)
        return add(1, b[1], b[0], a[0] / problem.N)

    def bmm(a: Any, b: Any, *_: Any, **__: Any) -> int:
        factors(a, b)
        return int(2 * math.prod(a) * b[-1])

    def addmm(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
        return mm(a, b)

    def convolution(x: Any, w: Any, *more: Any, out_shape: Any, **_: Any) -> int:
        factors()
        transposed, groups, positions = more[4], more[6], math.prod(w[2:])
        if transposed:
            return add(groups, w[1], w[0] // groups * positions, math.prod(x[2:]))
        return add(groups, w[0] // groups, w[1] * positions, math.prod(out_shape[2:]))

    def embedding(table: Any, rows: Any, *_: Any, **__: Any) -> int:
        tables.append((table[1], math.prod(rows) / problem.N))
        return 0

    own = {aten.mm: mm, aten.addmm: addmm, aten.bmm: bmm, aten.convolution: convolution, aten.embedding: embedding}
    with uncompiled(), FlopCounterMode(display=False, custom_mapping=own) as counter:
        on_shapes(problem, problem.module)
    return counter.get_total_flops() / 2, layers, last, tables
