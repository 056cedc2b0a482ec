"""A kernel from rows of J written out in blocks: for every network that can be differentiated at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ntkbench.operators.base import JacobianOperator


def explicit_kernel(
    left: JacobianOperator,
    right: JacobianOperator | None,
    directions: Tensor | None,
    *,
    averaged: bool,
    independent: bool,
) -> Tensor:
    """The kernel between the samples of two operators of one network, ``[N1 * K, N2 * K]`` with rows sample-major.

    Cost: K N1 N2 K P multiplications, and K passes if all rows fit in a quarter of ``memory`` and independent samples
    have their gradients taken together; otherwise rows are taken again for each block of columns. Rows of samples that
    interact take a pass each.

    Args:
        left: of the rows.
        right: of the columns; ``None`` for those of the rows.
        directions: output directions ``[K, O]``; ``None`` for the O unit vectors.
        averaged: whether to take the mean over directions, ``[N1, N2]``, instead of all pairs.
        independent: whether samples are independent, so that gradients may be taken by sample.

    Raises:
        Uncertified: no way of taking rows agrees with plain autograd.
    """
    directions = left._eye(left.O, 0, left.O) if directions is None else directions
    if not averaged:
        return _kernel(left, right, directions, independent)
    parts = (_kernel(left, right, u[None], independent) for u in directions)
    total = next(parts)
    for part in parts:
        total += part
    return total.div_(len(directions))


def _kernel(left: JacobianOperator, right: JacobianOperator | None, directions: Tensor, independent: bool) -> Tensor:
    K, columns_of = len(directions), right or left
    theta = directions.new_empty(left.N * K, columns_of.N * K)
    for rows in _blocks(left, K):
        one = _rows(left, rows, directions, independent)
        for columns in _blocks(columns_of, K):
            if right is None and columns.start > rows.start:
                break
            same = right is None and columns == rows
            other = one if same else _rows(columns_of, columns, directions, independent)
            theta[rows, columns] = one @ other.T
            if right is None and not same:
                theta[columns, rows] = theta[rows, columns].T
    return theta


def _blocks(j: JacobianOperator, K: int) -> Iterator[slice]:
    """Rows of the kernel in blocks of a quarter of the memory: whole samples, or some directions of one."""
    most = max(1, j.memory // (4 * j.P * j.itemsize))
    if most >= K:
        step = most // K * K
        yield from (slice(start, min(start + step, j.N * K)) for start in range(0, j.N * K, step))
    else:
        for b, first in itertools.product(range(j.N), range(0, K, most)):
            yield slice(b * K + first, b * K + min(first + most, K))


def _rows(j: JacobianOperator, rows: slice, directions: Tensor, independent: bool) -> Tensor:
    """Gradients ``[rows, P]`` of some rows, which are whole samples or directions of one."""
    K = len(directions)
    samples = slice(rows.start // K, -(-rows.stop // K))
    first = rows.start - samples.start * K
    u = directions[first : first + min(K, rows.stop - rows.start)]
    count = samples.stop - samples.start
    if independent:
        return j.sample_vjp(samples, u[:, None].expand(len(u), count, j.O)).transpose(0, 1).reshape(-1, j.P)
    v = u.new_zeros(count, len(u), j.N, j.O)
    v[torch.arange(count), :, torch.arange(samples.start, samples.stop)] = u
    return j.vjp(v.reshape(-1, j.n))
