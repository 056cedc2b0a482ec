"""A kernel from rows of J, computed in blocks, for any network that can be differentiated."""

from __future__ import annotations

import array_api_compat

from ntkbench.operators.arrays import Array, strips
from ntkbench.operators.base import JacobianOperator
from ntkbench.operators.certificate import Uncertified
from ntkbench.operators.ranges import rectangle, within


def explicit_kernel(
    left: JacobianOperator,
    right: JacobianOperator | None,
    directions: Array | None,
    rows: slice | None = None,
    columns: slice | None = None,
    *,
    averaged: bool,
    independent: bool,
) -> Array:
    """The kernel between the samples of two operators of one network, ``[N1 * K, N2 * K]`` with rows sample-major.

    With ``rows`` and ``columns`` it is that rectangle of the kernel.

    Cost: K N1 N2 K P multiplications, and K passes if samples are independent and all rows fit in a quarter of
    ``memory``. Rows that do not fit are recomputed for each block of columns. Rows of interacting samples take a pass
    each.

    Args:
        left: operator of the rows.
        right: operator of the columns; ``None`` for that of the rows.
        directions: output directions ``[K, O]``, arrays of the operators; ``None`` for the O unit vectors.
        rows, columns: whole samples or some directions of one sample (see :mod:`ntkbench.operators.ranges`); ``None``
            for all.
        averaged: whether to take the mean over directions, ``[N1, N2]``, instead of all pairs.
        independent: whether samples are independent, so that gradients can be computed by sample.

    Raises:
        Uncertified: no method for the rows agrees with plain autograd.
    """
    directions = left._eye(left.O, 0, left.O) if directions is None else directions
    K = 1 if averaged else len(directions)
    rows = slice(0, left.N * K) if rows is None else rows
    columns = slice(0, (right or left).N * K) if columns is None else columns
    xp, device = array_api_compat.array_namespace(directions), array_api_compat.device(directions)
    size = (rows.stop - rows.start, columns.stop - columns.start)
    theta = xp.zeros(size, dtype=directions.dtype, device=device)
    for some in directions[:, None] if averaged else [directions]:
        theta = _with_kernel(theta, left, right, some, rows, columns, independent)
    if averaged:
        theta /= len(directions)
    return theta


def _with_kernel(
    theta: Array,
    left: JacobianOperator,
    right: JacobianOperator | None,
    directions: Array,
    rows: slice,
    columns: slice,
    independent: bool,
) -> Array:
    """Add the kernel of some directions to an array, block by block, and return the array."""
    K, columns_of = len(directions), right or left
    symmetric = right is None and rows == columns
    for row in _blocks(left, rows, K, independent):
        one = _rows(left, row, directions, independent)
        for column in _blocks(columns_of, columns, K, independent):
            if symmetric and column.start > row.start:
                break
            same = symmetric and column == row
            other = one if same else _rows(columns_of, column, directions, independent)
            before = _moved(column, -columns.start)
            for strip in strips(len(one), len(other), left.memory / (4 * left.itemsize)):
                block = one[strip] @ other.T
                above = _moved(strip, row.start - rows.start)
                theta = _with_block(theta, above, before, block)
                if symmetric and not same:
                    theta = _with_block(theta, before, above, block.T)
    return theta


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _with_block(theta: Array, rows: slice, columns: slice, block: Array) -> Array:
    """Add a block to an array and return the array, which is a copy if arrays are immutable."""
    if array_api_compat.is_jax_array(theta):
        return theta.at[rows, columns].add(block)
    theta[rows, columns] += block
    return theta


def _blocks(j: JacobianOperator, rows: slice, K: int, independent: bool) -> list[slice]:
    """Rows of the kernel in blocks of a quarter of the memory: whole samples, or some directions of one.

    Gradients of interacting samples have cotangents of the whole batch.
    """
    width = j.P if independent else max(j.P, j.n)
    return within(rows, K, max(1, j.memory // (4 * width * j.itemsize)))


def _rows(j: JacobianOperator, rows: slice, directions: Array, independent: bool) -> Array:
    """Gradients ``[rows, P]`` of some rows, which are whole samples or directions of one."""
    K = len(directions)
    xp = array_api_compat.array_namespace(directions)
    samples, some = rectangle(rows, K)
    u = directions[some]
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
