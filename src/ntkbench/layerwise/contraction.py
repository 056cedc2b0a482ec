"""From a layer's gradients in factored form to its part of Theta, by the cheaper of two orders of summation.

Theta_(bo)(cp) = sum_{s,t} (a_bs . a_ct) (g_bos . g_cpt), with positions s and t (see ``factors.py``).

- *pairwise* (also called ghost): inner products of inputs and of cotangents first, without any gradient.
- *explicit*: the gradients sum_s g_bos ⊗ a_bs, some channels at a time, then their inner products.

Pairwise is cheaper for few positions and many channels, explicit for many positions. Inputs of an embedding are unit
vectors: the cotangents of a sample's positions with the same row are added up first, and then each row of the table is
at one position of another sample at most. For a symmetric kernel only the lower triangle is computed, by blocks of
samples; entries above the diagonal blocks are not touched.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ntkbench.layerwise.factors import GradientFactors, Lookups, Products, Rows, Tied, Weighted
from ntkbench.layerwise.tuning import Tuning
from ntkbench.operators import arrays

Pairs = TypeVar("Pairs", Products, Lookups)
"""Factors whose inner products can be taken pairwise; rows and columns are of one kind."""


def add(theta: Tensor, left: GradientFactors, right: GradientFactors | None, memory: int, tuning: Tuning) -> None:
    """Add a layer's part of Theta to ``theta [N1, K1, N2, K2]``, in place.

    Args:
        theta: the kernel so far.
        left: gradients of the rows.
        right: gradients of the columns; ``None`` if they are those of the rows. Then only the lower triangle is
            complete.
        memory: bytes that intermediate results may use.
        tuning: costs that choose the order of summation, and sizes of blocks.
    """
    symmetric = right is None
    left = _shortened(left)
    match left, left if right is None else _shortened(right):
        case Rows(one), Rows(other):
            _add_rows(theta, one, other, symmetric, tuning)
        case Lookups() as one, Lookups() as other:
            _add_pairs(theta, one, other, symmetric, memory, tuning)
        case Products() as one, Products() as other:
            if pairwise_is_cheaper(one, other, symmetric, tuning):
                _add_pairs(theta, one, other, symmetric, memory, tuning)
                return
            for rows, columns in _explicit(one, other, symmetric, memory):
                _add_rows(theta, rows, columns, symmetric, tuning)
        case Tied() as one, Tied() as other:
            _add_tied(theta, one, other, symmetric, memory, tuning)
        case Weighted() as one, Weighted() as other:
            add(theta, one.scaled, None if symmetric else other.scaled, memory, tuning)
            _add_rows(theta, one.rows * one.b, other.rows, symmetric, tuning)
        case _:
            raise TypeError(f"rows are {type(left).__name__}, columns are {type(right).__name__}")


def _shortened(factors: GradientFactors) -> GradientFactors:
    """The same gradients, with lookups of distinct rows."""
    if isinstance(factors, Lookups):
        return factors.distinct()
    if isinstance(factors, Tied) and isinstance(factors.one, Lookups):
        return dataclasses.replace(factors, one=factors.one.distinct())
    return factors


def pairwise_is_cheaper(left: Products, right: Products, symmetric: bool, tuning: Tuning) -> bool:
    """Whether the pairwise order costs less than the explicit one, in multiplications and entries moved."""
    return _pairwise_cost(left, right, symmetric, tuning) < _explicit_cost(left, right, symmetric, tuning)


def _pairwise_cost(left: Products, right: Products, symmetric: bool, tuning: Tuning) -> float:
    """Cost of the pairwise order in multiplications; each entry moved counts as ``tuning.entry_cost`` of them."""
    N1, K1, groups, C, D, S1 = left.sizes
    N2, K2, *_, S2 = right.sizes
    if S1 == S2 == 1:
        cost = N1 * N2 * (D + K1 * K2 * (C + tuning.entry_cost))
    else:
        cost = N1 * S1 * N2 * (S2 * (D + K2 * C) + K2 * C * (K1 + tuning.entry_cost))
    return groups * (cost / (1 + symmetric) + tuning.group_cost)


def _explicit_cost(left: Products, right: Products, symmetric: bool, tuning: Tuning) -> float:
    """Cost of the explicit order in multiplications; each entry moved counts as ``tuning.entry_cost`` of them."""
    N1, K1, groups, C, D, S1 = left.sizes
    N2, K2, *_, S2 = right.sizes
    gradients = N1 * K1 * (S1 + tuning.entry_cost) + (0 if symmetric else N2 * K2 * (S2 + tuning.entry_cost))
    return groups * C * D * (gradients + N1 * K1 * N2 * K2 / (1 + symmetric))


def diagonal(factors: GradientFactors, memory: int, tuning: Tuning) -> Tensor:
    """A layer's part of the diagonal of Theta, ``[N, K]``: squared norms of its gradients.

    Args:
        factors: the gradients.
        memory: bytes that intermediate results may fill.
        tuning: costs that choose the order of summation.
    """
    factors = _shortened(factors)
    if isinstance(factors, Rows):
        return arrays.squared_norms(factors.rows)
    if isinstance(factors, Lookups):
        return (factors.g.square().sum(-2) * (factors.rows >= 0)[:, None]).sum(-1)
    if isinstance(factors, Tied):
        return _tied_diagonal(factors, memory, tuning)
    if isinstance(factors, Weighted):
        return diagonal(factors.scaled, memory, tuning) + factors.rows.square() @ factors.b
    N, K, groups, C, D, S = factors.sizes
    if S == 1:
        a, g = factors.a[..., 0], factors.g[..., 0]
        return (arrays.squared_norms(a)[:, None] * arrays.squared_norms(g)).sum(-1)
    if K * C * (D + tuning.entry_cost) <= S * (D + K * C):
        pieces = _pieces(groups * C, N * K * D * factors.g.element_size(), memory)
        squares = factors.g.new_zeros(N, K)
        for some, channels in _channels(groups, C, pieces):
            rows = factors.explicit(some, channels)
            squares += arrays.squared_norms(rows)
        return squares
    size = factors.g[0].numel() * 2 + S**2
    found = []
    for block in _slices(N, _pieces(N, size * factors.g.element_size(), memory)):
        part = factors.samples(block)
        g = part.g.movedim(2, 1).flatten(2, 3)
        seen = (g @ (part.a.mT @ part.a)).reshape(g.shape)
        found.append(torch.linalg.vecdot(seen, g).unflatten(-1, (K, -1)).sum((1, 3)))
    return torch.cat(found)


def _positions(factors: Products | Lookups) -> int:
    return factors.g.shape[-1]


def _add_rows(theta: Tensor, left: Tensor, right: Tensor, symmetric: bool, tuning: Tuning) -> None:
    """Add inner products of explicit gradients, ``[N, K, size]`` each."""
    N1, K1, N2, K2 = theta.shape
    flat = theta.view(N1 * K1, N2 * K2)
    left, right = left.reshape(N1 * K1, -1), right.reshape(N2 * K2, -1)
    for rows in _triangle(N1, K1, symmetric, tuning):
        at = slice(rows.start * K1, rows.stop * K1)
        end = at.stop if symmetric else N2 * K2
        flat[at, :end].addmm_(left[at], right[:end].T)


def _explicit(left: Products, right: Products, symmetric: bool, memory: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Explicit gradients of rows and columns, ``[N, K, size]``, for as many channels at a time as fit."""
    N1, K1, groups, C, D, _ = left.sizes
    N2, K2, *_ = right.sizes
    rows = N1 * K1 + (0 if symmetric else N2 * K2)
    pieces = _pieces(groups * C, rows * D * left.g.element_size(), memory)
    for some, channels in _channels(groups, C, pieces):
        gradients = left.explicit(some, channels)
        yield gradients, gradients if symmetric else right.explicit(some, channels)


def _add_pairs(theta: Tensor, left: Pairs, right: Pairs, symmetric: bool, memory: int, tuning: Tuning) -> None:
    if _positions(left) == _positions(right) == 1:
        _add_single_positions(theta, left, right, symmetric, memory, tuning)
        return
    for group in range(left.g.shape[2] if isinstance(left, Products) else 1):
        _add_positions(theta, left, right, group, symmetric, memory, tuning)


def _add_single_positions(
    theta: Tensor, left: Pairs, right: Pairs, symmetric: bool, memory: int, tuning: Tuning
) -> None:
    """One position: inner products of inputs times inner products of cotangents, elementwise."""
    N1, K1, N2, K2 = theta.shape
    size = K1 * N2 * K2 * theta.element_size()
    # Few enough rows at a time that their products are still in the cache when they are added.
    pieces = max(_pieces(N1, size, memory), min(_pieces(N1, size, tuning.cache_bytes), N1 * K1 // tuning.block_rows))
    for rows in _triangle(N1, K1, symmetric, tuning, pieces):
        columns = slice(0, rows.stop if symmetric else N2)
        one, other = left.samples(rows), right.samples(columns)
        view = theta.flatten(2)[rows, :, : columns.stop * K2]
        for a, b, g, h in _groups(one, other):
            inputs = a @ b.T if isinstance(left, Products) else _same(a[:, 0], b[:, 0]).to(theta.dtype)
            cotangents = g.flatten(0, 1) @ h.flatten(0, 1).T
            # Each sample's column is repeated K2 times, so that the sum runs along whole rows.
            view.addcmul_(cotangents.view(view.shape), inputs.repeat_interleave(K2, 1)[:, None])


def _groups(one: Pairs, other: Pairs) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    if isinstance(one, Lookups):
        yield one.rows, other.rows, one.g[..., 0], other.g[..., 0]
        return
    for group in range(one.g.shape[2]):
        yield one.a[:, group, :, 0], other.a[:, group, :, 0], one.g[:, :, group, :, 0], other.g[:, :, group, :, 0]


def _same(one: Tensor, other: Tensor) -> Tensor:
    return (one[:, None] == other[None]) & (one[:, None] >= 0)


def _add_positions(
    theta: Tensor, left: Pairs, right: Pairs, group: int, symmetric: bool, memory: int, tuning: Tuning
) -> None:
    """Several positions: inner products of inputs carry the columns' cotangents to the positions of the rows."""
    N1, K1, N2, K2 = theta.shape
    g, h = (t if isinstance(left, Lookups) else t[:, :, group] for t in (left.g, right.g))  # [N, K, C, S]
    C, S, T = h.shape[2], g.shape[-1], h.shape[-1]
    g = g.mT.flatten(2)  # [N1, K1, S * C]
    if isinstance(left, Products):
        inputs = left.a[:, group].mT.reshape(N1 * S, -1)
        others = right.a[:, group].mT.reshape(N2 * T, -1)
        fixed = N1 * S * T * theta.element_size()
    else:
        known, numbers = torch.cat([left.rows.reshape(-1), right.rows.reshape(-1)]).unique(return_inverse=True)
        inputs, others = numbers[: N1 * S], numbers[N1 * S :].view(N2, T)
        fixed = (N1 * S + len(known)) * numbers.element_size()
    per_direction = N1 * (S * C + K1) * theta.element_size()
    for columns in _triangle(N2, K2, symmetric, tuning, _pieces(N2, fixed + per_direction, memory)):
        rows = slice(columns.start if symmetric else 0, N1)
        count = columns.stop - columns.start
        mine = inputs[rows.start * S :]
        if isinstance(left, Products):
            theirs = others[columns.start * T : columns.stop * T]
            met = (theirs @ mine.T).view(count, T, -1).mT  # [columns, rows * S, T]
        else:
            places = _places(others[columns], right.rows[columns], len(known))
            met = places[:, mine]  # [columns, rows * S]
        # With few columns, the second product would read the rows' cotangents for little arithmetic.
        fitting = (memory - count * fixed) // (count * per_direction)
        wide = max(1, min(-(-tuning.columns // count), fitting))
        for some in _slices(K2, -(-K2 // wide)):
            carry = _carried if isinstance(left, Products) else _looked_up
            carried = carry(met, h[columns, some].mT)  # [columns, directions, rows * S, C]
            carried = carried.view(-1, rows.stop - rows.start, S * C).permute(1, 2, 0)
            theta[rows, :, columns, some] += (g[rows] @ carried).unflatten(-1, (count, -1))


def _places(numbers: Tensor, rows: Tensor, count: int) -> Tensor:
    """The position at which each sample looks up each row of a table, ``[N, count]``; T if there is none.

    Args:
        numbers: numbers of the rows that samples look up at T positions, ``[N, T]``.
        rows: these rows, different for each sample; -1 for none.
        count: how many numbers there are.
    """
    N, T = rows.shape
    positions = torch.where(rows < 0, T, torch.arange(T, device=rows.device))
    return numbers.new_full((N, count), T).scatter_(1, numbers, positions)


def _looked_up(places: Tensor, h: Tensor) -> Tensor:
    """The entries of ``h`` ``[count, K, T, C]`` at ``places`` ``[count, rows]``, ``[count, K, rows, C]``; 0 at T."""
    count, K, _, C = h.shape
    padded = functional.pad(h, (0, 0, 0, 1))
    return padded.gather(2, places[:, None, :, None].expand(count, K, -1, C))


def _carried(gram: Tensor, h: Tensor) -> Tensor:
    """Products of ``gram`` ``[count, rows, T]`` with ``h`` ``[count, K, T, C]``, ``[count, K, rows, C]``.

    They are written to their final places, in as few batches as this allows. Rearranging them afterwards would move
    them through memory twice more.
    """
    count, K, T, C = h.shape
    found = h.new_empty(count, K, gram.shape[1], C)
    if count > K:
        for k in range(K):
            torch.bmm(gram, h[:, k], out=found[:, k])
    else:
        for n in range(count):
            torch.bmm(gram[n].expand(K, -1, T), h[n], out=found[n])
    return found


def _add_tied(theta: Tensor, left: Tied, right: Tied, symmetric: bool, memory: int, tuning: Tuning) -> None:
    """Add the parts of both kinds of gradients and their cross terms, or the explicit gradients if that is cheaper."""
    N1, K1, C, D, S, T = left.sizes
    N2, K2, *_, S2, T2 = right.sizes
    half = 1 + symmetric
    crossed = N1 * N2 * (S * T2 * (K2 * D + K1 * C + K1 * K2) + S2 * T * (K1 * D + K2 * C + K1 * K2)) / half
    made = N1 * K1 * (S + T + 2 * tuning.entry_cost) + (0 if symmetric else N2 * K2 * (S2 + T2 + 2 * tuning.entry_cost))
    if crossed > C * D * (made + N1 * K1 * N2 * K2 / half):
        rows = N1 * K1 + (0 if symmetric else N2 * K2)
        for channels in _slices(C, min(C, _pieces(C, 3 * rows * D * theta.element_size(), memory))):
            one = left.explicit(channels)
            _add_rows(theta, one, one if symmetric else right.explicit(channels), symmetric, tuning)
        return
    for part, against in zip(left.parts(), right.parts(), strict=True):
        add(theta, part, None if symmetric else against, memory, tuning)
    sums = SUMMED if left.summed else BETWEEN
    pairs = max(1, memory // (2 * max(S * T2, S2 * T) * (K1 + K2) * theta.element_size()))
    for row in _slices(N1, _pieces(N1, N2, pairs)):
        for column in _slices(row.stop if symmetric else N2, _pieces(N2, row.stop - row.start, pairs)):
            mine, theirs = left.samples(row), right.samples(column)
            own = _crossed(mine, theirs, sums, memory)
            theta[row, :, column] += own + _crossed(theirs, mine, sums, memory).permute(2, 3, 0, 1)


BETWEEN = "msnlt,mksnt->mknl"
SUMMED = "msnkt,mksnt->mn"
OWN = "msnkt,mksnt->mk"
"""Sums of cross terms over positions: for every pair of directions, summed over directions, and for each direction."""


def _crossed(left: Tied, right: Tied, sums: str, memory: int) -> Tensor:
    """Inner products of the gradients of one kind at ``left`` with those of the other kind at ``right``.

    As many positions at a time as fit in memory.
    """
    one, other = left.one, right.other
    S, T = one.g.shape[-1], other.g.shape[-1]
    pair = 2 * len(one.g) * len(other.g) * (one.g.shape[1] + other.g.shape[1]) * other.g.element_size()
    copied = other.g[..., 0].numel() * other.g.element_size()
    found: Tensor | float = 0.0
    for t in _slices(T, _pieces(T, copied + pair, memory // 2)):
        for s in _slices(S, _pieces(S, (t.stop - t.start) * pair, memory // 2)):
            found = found + _crossed_at(one.positions(s), other.positions(t), sums)
    assert isinstance(found, Tensor)  # there is at least one position
    return found[:, None, :, None] if sums == SUMMED else found


def _crossed_at(one: Products | Lookups, other: Products, sums: str) -> Tensor:
    h, b = other.g[:, :, 0], other.a[:, 0]  # [N, K, D, T], [N, C, T]
    if isinstance(one, Lookups):
        inputs = h[:, :, one.rows.clamp(min=0)] * (one.rows >= 0)[..., None]
        inputs, g = inputs.permute(2, 3, 0, 1, 4), one.g
    else:
        inputs, g = torch.einsum("mds,nldt->msnlt", one.a[:, 0], h), one.g[:, :, 0]
    return torch.einsum(sums, inputs, torch.einsum("mkcs,nct->mksnt", g, b))


def _tied_diagonal(factors: Tied, memory: int, tuning: Tuning) -> Tensor:
    """See :func:`diagonal`."""
    N, K, C, D, S, T = factors.sizes
    item = factors.other.g.element_size()
    if (S + T + 2 * tuning.entry_cost) * C * D < S * T * (C + D):
        squares = factors.other.g.new_zeros(N, K)
        for channels in _slices(C, min(C, _pieces(C, 3 * N * K * D * item, memory))):
            rows = factors.explicit(channels)
            squares += arrays.squared_norms(rows)
        return squares
    found = [diagonal(part, memory, tuning) for part in factors.parts()]
    crossed = [factors.samples(slice(n, n + 1)) for n in range(N)]
    return found[0] + found[1] + 2 * torch.cat([_crossed(one, one, OWN, memory) for one in crossed])


def _triangle(N: int, K: int, symmetric: bool, tuning: Tuning, pieces: int = 1) -> Iterator[slice]:
    """Blocks of samples: at least ``pieces``, and enough to save work if the kernel is symmetric."""
    if symmetric:
        pieces = max(pieces, min(tuning.triangle_blocks, N * K // tuning.block_rows))
    yield from _slices(N, min(N, pieces))


def _slices(size: int, pieces: int) -> Iterator[slice]:
    bounds = [size * i // max(1, pieces) for i in range(max(1, pieces) + 1)]
    yield from (slice(start, stop) for start, stop in itertools.pairwise(bounds) if stop > start)


def _pieces(count: int, size: int, memory: int) -> int:
    """Number of pieces into which ``count`` items of ``size`` bytes are split so that each piece fits in ``memory``."""
    return -(-count // max(1, memory // max(1, size)))


def _channels(groups: int, C: int, pieces: int) -> Iterator[tuple[slice, slice]]:
    """Groups and channels in at least ``pieces`` parts, which are whole groups where possible."""
    for some in _slices(groups, min(groups, pieces)):
        for channels in _slices(C, min(C, -(-pieces // groups))):
            yield some, channels
