"""A kernel from rows of J written out in blocks: for every network that can be differentiated at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import array_api_compat

from ntkbench.operators.arrays import Array
from ntkbench.operators.base import JacobianOperator
from ntkbench.operators.certificate import Uncertified


def explicit_kernel(
    left: JacobianOperator,
    right: JacobianOperator | None,
    directions: Array | None,
    *,
    averaged: bool,
    independent: bool,
) -> Array:
    """The kernel between the samples of two operators of one network, ``[N1 * K, N2 * K]`` with rows sample-major.

    Cost: K N1 N2 K P multiplications, and K passes if all rows fit in a quarter of ``memory`` and independent samples
    have their gradients taken together; otherwise rows are taken again for each block of columns. Rows of samples that
    interact take a pass each.

    Args:
        left: of the rows.
        right: of the columns; ``None`` for those of the rows.
        directions: output directions ``[K, O]``, arrays of the operators; ``None`` for the O unit vectors.
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
    total /= len(directions)
    return total


def _kernel(left: JacobianOperator, right: JacobianOperator | None, directions: Array, independent: bool) -> Array:
    K, columns_of = len(directions), right or left
    xp, device = array_api_compat.array_namespace(directions), array_api_compat.device(directions)
    theta = xp.empty((left.N * K, columns_of.N * K), dtype=directions.dtype, device=device)
    for rows in _blocks(left, K):
        one = _rows(left, rows, directions, independent)
        for columns in _blocks(columns_of, K):
            if right is None and columns.start > rows.start:
                break
            same = right is None and columns == rows
            other = one if same else _rows(columns_of, columns, directions, independent)
            block = one @ other.T
            theta = _written(theta, rows, columns, block)
            if right is None and not same:
                theta = _written(theta, columns, rows, block.T)
    return theta


def _written(theta: Array, rows: slice, columns: slice, block: Array) -> Array:
    """The kernel with a block written: in place, or a copy where arrays cannot change."""
    if array_api_compat.is_jax_array(theta):
        return theta.at[rows, columns].set(block)
    theta[rows, columns] = block
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


def _rows(j: JacobianOperator, rows: slice, directions: Array, independent: bool) -> Array:
    """Gradients ``[rows, P]`` of some rows, which are whole samples or directions of one."""
    K = len(directions)
    xp = array_api_compat.array_namespace(directions)
    samples = slice(rows.start // K, -(-rows.stop // K))
    first = rows.start - samples.start * K
    u = directions[first : first + min(K, rows.stop - rows.start)]
    if independent:
        by_sample = xp.broadcast_to(u[:, None], (len(u), samples.stop - samples.start, j.O))
        return xp.permute_dims(j.sample_vjp(samples, by_sample), (1, 0, 2)).reshape(-1, j.P)
    units = j._eye(j.N, samples.start, samples.stop)
    try:
        return j.vjp((units[:, None, :, None] * u[None, :, None, :]).reshape(-1, j.n))
    except Uncertified:  # a backward pass that is not linear still has a gradient of each output
        if not bool(((u == 0) | (u == 1)).all()) or not bool((u.sum(1) == 1).all()):
            raise
        outputs = [int(xp.argmax(direction)) for direction in u]
        return xp.stack([j.row(b * j.O + o) for b in range(samples.start, samples.stop) for o in outputs])
