"""Exact moments of Theta from rows of J."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ntkbench import metrics
from ntkbench.metrics import Moments
from ntkbench.operators import Array, JacobianOperator, arrays


def is_kept(held: float, memory: float) -> bool:
    """Whether :func:`moments_from_rows` keeps rows of ``held`` bytes; computing a block may take the other half."""
    return held <= memory / 2


def rows_computed(metric: str, sizes: Sequence[int], held: float, memory: float) -> int:
    """Number of rows that :func:`moments_from_rows` computes at each set of weights.

    Args:
        metric: name of the metric.
        sizes: rows of each block.
        held: bytes of all rows at all sets of weights.
        memory: bytes.
    """
    if metric == "trace" or is_kept(held, memory):
        return sum(sizes)
    return sum(size * (len(sizes) - i) for i, size in enumerate(sizes))


def moments_from_rows(
    metric: str,
    jacobians: Sequence[JacobianOperator],
    blocks: Sequence[Any],
    rows: Callable[[JacobianOperator, Any], Array],
    count: int | None = None,
) -> Moments:
    """The moments that a metric depends on, from blocks of rows of J.

    The trace takes each block once. The other metrics take the products of all pairs of blocks, of which one triangle
    is computed. The blocks are kept if all of them fit in half of the memory of the operators, since computing one may
    take the other half; otherwise they are recomputed for every pair. Their products take at most a quarter of the
    memory at a time for any size of block.

    Args:
        metric: name of the metric.
        jacobians: J at theta_0 (and at theta_f, for alignment).
        blocks: descriptions of the blocks, which are disjoint and together contain all rows.
        rows: computes the rows of a block, ``(jacobian, block) -> [r, P]``.
        count: number of rows; n by default.
    """
    sums = metrics.MomentSums()
    if metric == "trace":
        for block in blocks:
            sums.trace += metrics.squared_norm(rows(jacobians[0], block))
        return sums.moments()

    j = jacobians[0]
    keep = is_kept(sum((count or j.n) * each.P * j.itemsize for each in jacobians), j.memory)
    kept: dict[int, list[Array]] = {}

    def computed(i: int) -> list[Array]:
        if i in kept:
            return kept[i]
        block = [rows(jacobian, blocks[i]) for jacobian in jacobians]
        if keep:
            kept[i] = block
        return block

    for i in range(len(blocks)):
        left = computed(i)
        sums.trace += metrics.squared_norm(left[0])
        for k in range(i + 1):
            right = left if k == i else computed(k)
            for part in arrays.strips(len(left[0]), len(right[0]), j.memory / (4 * len(jacobians) * j.itemsize)):
                grams = [a[part] @ b.T for a, b in zip(left, right, strict=True)]
                sums.add(*grams, copies=1 if k == i else 2)
    return sums.moments()
