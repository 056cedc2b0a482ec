"""From a layer's gradients in factored form to its part of Theta, by whichever order of summation is cheaper.

Theta_(bo)(cp) = sum_{s,t} (a_bs . a_ct) (g_bos . g_cpt), with positions s and t (see ``factors.py``).

- *pairwise* (also called ghost): inner products of inputs and of cotangents first; no gradient is ever written out.
- *explicit*: the gradients sum_s g_bos (x) a_bs written out, some channels at a time, and multiplied.

Pairwise wins where there are few positions and many channels, explicit where there are many positions. Of a kernel that
is symmetric the lower triangle is computed, by blocks of samples; what stands above the diagonal blocks is left alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ntkbench.layerwise.factors import Factors, Lookups, Products, Rows

TRIANGLE_BLOCKS = 8
"""Blocks that a triangle is cut into: 9/16 of the square are computed."""
FEWEST_ROWS = 96
"""Rows of a block of the triangle; below that, matrix products lose more than the triangle saves."""
CACHE = 2**22
"""Bytes that a processor's cache is believed to hold."""
ELEMENTWISE = 8
"""What one entry moved through memory costs, in multiplications of a matrix product."""
CALL = 1e5
"""What a group taken by itself costs on top, in the same unit."""


def add(theta: Tensor, left: Factors, right: Factors | None, memory: int) -> None:
    """Add a layer's part of Theta to ``theta [N1, K1, N2, K2]``.

    Args:
        theta: what is added to, in place.
        left: the rows' gradients.
        right: the columns' gradients; ``None`` for those of the rows, and then only the lower triangle is complete.
        memory: bytes that intermediate results may fill.
    """
    symmetric, right = right is None, left if right is None else right
    if isinstance(left, Rows):
        _add_rows(theta, left.rows, right.rows, symmetric)
    elif isinstance(left, Lookups) or cost_of_pairs(left, right, symmetric) < cost_of_rows(left, right, symmetric):
        _add_pairs(theta, left, right, symmetric, memory)
    else:
        for rows, columns in _written_out(left, right, symmetric, memory):
            _add_rows(theta, rows, columns, symmetric)


def cost_of_pairs(left: Products, right: Products, symmetric: bool) -> float:
    """Multiplications (entries moved counted :data:`ELEMENTWISE` times) of the pairwise order."""
    N1, K1, groups, C, D, S1 = left.sizes
    N2, K2, *_, S2 = right.sizes
    if S1 == S2 == 1:
        cost = N1 * N2 * (D + K1 * K2 * (C + ELEMENTWISE))
    else:
        cost = N1 * S1 * N2 * (S2 * (D + K2 * C) + K2 * C * (K1 + ELEMENTWISE))
    return groups * (cost / (1 + symmetric) + CALL)


def cost_of_rows(left: Products, right: Products, symmetric: bool) -> float:
    """Multiplications (entries moved counted :data:`ELEMENTWISE` times) of the explicit order."""
    N1, K1, groups, C, D, S1 = left.sizes
    N2, K2, *_, S2 = right.sizes
    writing = N1 * K1 * (S1 + ELEMENTWISE) + (0 if symmetric else N2 * K2 * (S2 + ELEMENTWISE))
    return groups * C * D * (writing + N1 * K1 * N2 * K2 / (1 + symmetric))


def diagonal(factors: Factors, memory: int) -> Tensor:
    """A layer's part of the diagonal of Theta, ``[N, K]``: squared norms of its gradients."""
    if isinstance(factors, Rows):
        return torch.linalg.vecdot(factors.rows, factors.rows)
    N, K = factors.g.shape[:2]
    if isinstance(factors, Products):
        _, _, groups, C, D, S = factors.sizes
        if S == 1:
            a, g = factors.a[..., 0], factors.g[..., 0]
            return (torch.linalg.vecdot(a, a)[:, None] * torch.linalg.vecdot(g, g)).sum(-1)
        if S * (D + K * C) >= K * C * (D + ELEMENTWISE):
            pieces = _pieces(groups * C, N * K * D * factors.g.element_size(), memory)
            squares = factors.g.new_zeros(N, K)
            for chunk in _channels(groups, C, pieces):
                rows = factors.explicit(*chunk)
                squares += torch.linalg.vecdot(rows, rows)
            return squares
    size = factors.g[0].numel() * 2 + _positions(factors) ** 2
    found = []
    for block in _slices(N, _pieces(N, size * factors.g.element_size(), memory)):
        part = factors.samples(block)
        g = part.g.flatten(1, -2) if isinstance(part, Lookups) else part.g.movedim(2, 1).flatten(2, 3)
        gram = _own_gram(part)
        seen = (g @ gram).reshape(g.shape)
        products = torch.linalg.vecdot(seen, g)
        if isinstance(part, Products):
            products = products.unflatten(-1, (K, -1)).sum((1, 3))
        else:
            products = products.unflatten(-1, (K, -1)).sum(-1)
        found.append(products)
    return torch.cat(found)


def _positions(factors: Products | Lookups) -> int:
    return factors.g.shape[-1]


def _own_gram(factors: Products | Lookups) -> Tensor:
    """Inner products of the inputs at two positions of the same sample, ``[N, (groups,) S, S]``."""
    if isinstance(factors, Products):
        return factors.a.mT @ factors.a
    same = factors.rows[:, :, None] == factors.rows[:, None]
    return (same & (factors.rows >= 0)[:, None]).to(factors.g.dtype)


def _add_rows(theta: Tensor, left: Tensor, right: Tensor, symmetric: bool) -> None:
    """Gradients written out, ``[N, K, size]`` each, on the other's."""
    N1, K1, N2, K2 = theta.shape
    flat = theta.view(N1 * K1, N2 * K2)
    left, right = left.reshape(N1 * K1, -1), right.reshape(N2 * K2, -1)
    for rows in _triangle(N1, K1, symmetric):
        at = slice(rows.start * K1, rows.stop * K1)
        end = at.stop if symmetric else N2 * K2
        flat[at, :end].addmm_(left[at], right[:end].T)


def _written_out(left: Products, right: Products, symmetric: bool, memory: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Both sides' gradients, ``[N, K, size]``, for as many channels at a time as fit."""
    N1, K1, groups, C, D, _ = left.sizes
    N2, K2, *_ = right.sizes
    rows = N1 * K1 + (0 if symmetric else N2 * K2)
    pieces = _pieces(groups * C, rows * D * left.g.element_size(), memory)
    for chunk in _channels(groups, C, pieces):
        written = left.explicit(*chunk)
        yield written, written if symmetric else right.explicit(*chunk)


def _add_pairs(
    theta: Tensor, left: Products | Lookups, right: Products | Lookups, symmetric: bool, memory: int
) -> None:
    if _positions(left) == _positions(right) == 1:
        _add_single_positions(theta, left, right, symmetric, memory)
        return
    for group in range(left.g.shape[2] if isinstance(left, Products) else 1):
        _add_positions(theta, left, right, group, symmetric, memory)


def _add_single_positions(
    theta: Tensor, left: Products | Lookups, right: Products | Lookups, symmetric: bool, memory: int
) -> None:
    """One position: the products of inputs times the products of cotangents, entry by entry."""
    N1, K1, N2, K2 = theta.shape
    size = K1 * N2 * K2 * theta.element_size()
    # Few enough rows at a time for their products to be in the cache still when they are added.
    pieces = max(_pieces(N1, size, memory), min(_pieces(N1, size, CACHE), N1 * K1 // FEWEST_ROWS))
    for rows in _triangle(N1, K1, symmetric, pieces):
        columns = slice(0, rows.stop if symmetric else N2)
        one, other = left.samples(rows), right.samples(columns)
        view = theta.flatten(2)[rows, :, : columns.stop * K2]
        for a, b, g, h in _groups(one, other):
            inputs = a @ b.T if isinstance(left, Products) else _same(a[:, 0], b[:, 0]).to(theta.dtype)
            cotangents = g.flatten(0, 1) @ h.flatten(0, 1).T
            # Each sample's column K2 times over, so that the sum runs along whole rows.
            view.addcmul_(cotangents.view(view.shape), inputs.repeat_interleave(K2, 1)[:, None])


def _groups(one: Factors, other: Factors) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    if isinstance(one, Lookups):
        yield one.rows, other.rows, one.g[..., 0], other.g[..., 0]
        return
    for group in range(one.g.shape[2]):
        yield one.a[:, group, :, 0], other.a[:, group, :, 0], one.g[:, :, group, :, 0], other.g[:, :, group, :, 0]


def _same(one: Tensor, other: Tensor) -> Tensor:
    return (one[:, None] == other[None]) & (one[:, None] >= 0)


def _add_positions(
    theta: Tensor, left: Products | Lookups, right: Products | Lookups, group: int, symmetric: bool, memory: int
) -> None:
    """Several positions: the columns' cotangents are carried to the rows' positions by the products of inputs."""
    N1, K1, N2, K2 = theta.shape
    g, h = (t if isinstance(left, Lookups) else t[:, :, group] for t in (left.g, right.g))  # [N, K, C, S]
    C, S, T = h.shape[2], g.shape[-1], h.shape[-1]
    g, h = g.reshape(N1, K1, C * S), h.reshape(N2, K2 * C, T)
    if isinstance(left, Products):
        inputs = left.a[:, group].mT.reshape(N1 * S, -1)
        others = right.a[:, group].mT.reshape(N2 * T, -1)
    else:
        inputs, others = left.rows.reshape(-1), right.rows.reshape(-1)
    size = N1 * S * (2 * K2 * C + T) * theta.element_size()
    for columns in _triangle(N2, K2, symmetric, _pieces(N2, size, memory)):
        rows = slice(columns.start if symmetric else 0, N1)
        count = columns.stop - columns.start
        mine, theirs = inputs[rows.start * S :], others[columns.start * T : columns.stop * T]
        gram = theirs @ mine.T if isinstance(left, Products) else _same(theirs, mine).to(theta.dtype)
        carried = h[columns] @ gram.view(count, T, -1)  # [columns, K2 * C, rows * S]
        carried = carried.view(count, K2, C, -1, S).permute(3, 2, 4, 0, 1).reshape(N1 - rows.start, C * S, -1)
        theta[rows, :, columns] += (g[rows] @ carried).view(-1, K1, count, K2)


def _triangle(N: int, K: int, symmetric: bool, pieces: int = 1) -> Iterator[slice]:
    """Blocks of samples: enough of them for the triangle to pay, and for the memory."""
    if symmetric:
        pieces = max(pieces, min(TRIANGLE_BLOCKS, N * K // FEWEST_ROWS))
    yield from _slices(N, min(N, pieces))


def _slices(size: int, pieces: int) -> Iterator[slice]:
    bounds = [size * i // max(1, pieces) for i in range(max(1, pieces) + 1)]
    yield from (slice(start, stop) for start, stop in itertools.pairwise(bounds) if stop > start)


def _pieces(count: int, size: int, memory: int) -> int:
    """Into how many pieces ``count`` things of ``size`` bytes have to be cut."""
    return -(-count // max(1, memory // max(1, size)))


def _channels(groups: int, C: int, pieces: int) -> Iterator[tuple[slice, slice]]:
    """Groups and channels in at least so many pieces, if there are as many: whole groups where those are enough."""
    for some in _slices(groups, min(groups, pieces)):
        for channels in _slices(C, min(C, -(-pieces // groups))):
            yield some, channels
