"""Replacements of ATen operations whose derivatives are missing or wrong where one sample's graph runs under ``vmap``.

Some derivatives depend on the layout of a tensor, which differs between tracing and running. For these the replacement
is f(A) + L(A - A0), with f and its derivative L evaluated at a constant A0 that equals A: the value is exact, and so is
the first derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eval-mode BatchNorm as one scale and one shift per channel: two passes over the values, one over the cotangents.

    Train-mode BatchNorm makes samples interact and is refused before tracing. InstanceNorm, which uses the statistics
    of a single sample, is left as it is.
    """
    if training:
        return NotImplemented
    scale = (variance + eps).rsqrt()
    shift = -mean * scale
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    if bias is not None:
        shift = shift + bias
    to = (1, -1, *[1] * (x.ndim - 2))
    return x * scale.view(to) + shift.view(to), x.new_empty(0), x.new_empty(0)


def _embedding(table: Tensor, numbers: Tensor, padding: int = -1, *rest: Any, **more: Any) -> Tensor:
    """Rows of a table. Under ``vmap``, ATen's derivative ignores the padding of all samples but the first."""
    rows = table[numbers] if numbers.ndim else table[numbers[None]][0]  # torch reads the value of a single index
    return rows if padding < 0 else torch.where((numbers == padding)[..., None], rows.detach(), rows)


def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    """PReLU. ATen's derivative has no vmap rule if weight and x have different batch dimensions."""
    return torch.where(x > 0, x, weight * x)


def _copy(written: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """The entries of one tensor in the shape and type of another. ATen has no derivative."""
    return source.to(written.dtype).expand_as(written)


def _solve(A: Tensor, b: Tensor, *, left: bool = True, check_errors: bool = False) -> tuple[Tensor, None, None, None]:
    """A^(-1) b, or the same from the right."""
    if _vectors(A, b):
        return _solved(A, b[..., None], left)[..., 0], None, None, None
    return _solved(A, b, left), None, None, None


def _vectors(A: Tensor, b: Tensor) -> bool:
    """Whether right-hand sides are vectors, by the convention of ``torch.linalg.solve``."""
    return b.ndim == 1 or (A.ndim == b.ndim + 1 and b.shape == A.shape[:-1])


def _solved(A: Tensor, b: Tensor, left: bool) -> Tensor:
    """A^(-1) b with d(A^(-1) b) = A^(-1) (db - dA A^(-1) b), or the same from the right."""
    A0 = A.detach()
    found, inverse = torch.linalg.solve(A0, b.detach(), left=left), torch.linalg.inv(A0)
    return found + (inverse @ (b - A @ found) if left else (b - found @ A) @ inverse)


def _lu_solve(LU: Tensor, pivots: Tensor, b: Tensor, *, left: bool = True, adjoint: bool = False) -> Tensor:
    """A^(-1) b for A = P L U. ATen's kernel is wrong for pivots that several systems share."""
    P, L, U = torch.lu_unpack(LU, pivots)
    A = P @ L @ U
    return _solved(A.mH if adjoint else A, b, left)


def _det(A: Tensor) -> tuple[Tensor, None, None]:
    """det A with d det A = det A tr(A^(-1) dA), which is zero for singular A, as in autograd."""
    A0 = A.detach()
    det, inverse = torch.linalg.det(A0), torch.linalg.inv_ex(A0).inverse
    adjugate = torch.where((det == 0)[..., None, None], 0, det[..., None, None] * inverse)
    return det + _trace(adjugate, A - A0), None, None


def _slogdet(A: Tensor) -> tuple[Tensor, Tensor, None, None]:
    """The sign of det A and log |det A|, with d log det A = tr(A^(-1) dA)."""
    A0 = A.detach()
    sign, logarithm = torch.linalg.slogdet(A0)
    change = _trace(torch.linalg.inv(A0), A - A0)
    return sign * (1 + 1j * change.imag) if A.is_complex() else sign, logarithm + change.real, None, None


def _trace(A: Tensor, B: Tensor) -> Tensor:
    """tr(A B)."""
    return (A.mT * B).sum((-2, -1))


def _lstsq(A: Tensor, b: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, None, None, None]:
    """The least-squares solution by the pseudoinverse. ATen's shapes depend on values."""
    vectors = _vectors(A, b)
    found = torch.linalg.pinv(A) @ (b[..., None] if vectors else b)
    return found[..., 0] if vectors else found, None, None, None


def _cdist(a: Tensor, b: Tensor, p: float, mode: int | None = None) -> Tensor:
    """Distances between rows. ATen's derivative is wrong under ``vmap``."""
    return torch.linalg.vector_norm(a[..., :, None, :] - b[..., None, :, :], p, -1)


def _index(x: Tensor, indices: list[Tensor | None]) -> Tensor:
    """Indexing with boolean masks replaced by positions, which are constant if the masks are."""
    return aten.index.Tensor(x, _positions(indices)) if any(map(_is_mask, indices)) else NotImplemented


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _positions(indices: list[Tensor | None]) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for i in indices:
        found.extend(i.nonzero().unbind(1) if i is not None and _is_mask(i) else (i,))
    return found


def _masked_select(x: Tensor, mask: Tensor) -> Tensor:
    """See :func:`_index`."""
    x, mask = torch.broadcast_tensors(x, mask)
    return aten.index.Tensor(x, _positions([mask]))


def _index_put(x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """A single value at a boolean mask by ``torch.where``, and other values at a mask by positions."""
    if not any(map(_is_mask, indices)):
        return NotImplemented
    *before, mask = indices
    if mask is None or accumulate or values.numel() != 1 or any(i is not None for i in before):
        return aten.index_put.default(x, _positions(indices), values, accumulate)
    chosen = mask.bool().reshape(*mask.shape, *[1] * (x.ndim - len(before) - mask.ndim))
    return torch.where(chosen, values.reshape(()), x)


def _index_put_(x: Tensor, *rest: Any) -> Tensor:
    """See :func:`_index_put`."""
    made = _index_put(x, *rest)
    return made if made is NotImplemented else x.copy_(made)


def _as_strided(x: Tensor, size: list[int], stride: list[int], offset: int | None = None) -> Tensor:
    """Entries by their positions in memory; x is contiguous while it is traced."""
    positions = torch.arange(x.numel(), device=x.device).as_strided(size, stride, offset or 0)
    return x.reshape(-1)[positions]


def _trilinear(
    i1: Tensor,
    i2: Tensor,
    i3: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    """A bilinear layer as a linear layer on products of its inputs, for which there is a rule."""
    if [*map(list, (expand1, expand2, expand3, sumdim))] != [[1, 3], [0], [1, 2], [2, 3]]:
        return NotImplemented  # called by a function other than torch.nn.functional.bilinear
    return (i1[:, :, None] * i3[:, None]).flatten(1) @ i2.flatten(1).t()


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: _batch_norm,
    aten.index.Tensor: _index,
    aten.index_put.default: _index_put,
    aten.index_put_.default: _index_put_,
    aten.masked_select.default: _masked_select,
    aten._trilinear.default: _trilinear,
}
"""Replacements whose operations are recorded in a graph instead of the original one."""

REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    aten.embedding.default: _embedding,
    aten._prelu_kernel.default: _prelu,
    aten.copy.default: _copy,
    aten._linalg_solve_ex.default: _solve,
    aten.linalg_lu_solve.default: _lu_solve,
    aten._linalg_det.default: _det,
    aten._linalg_slogdet.default: _slogdet,
    aten.linalg_lstsq.default: _lstsq,
    aten._cdist_forward.default: _cdist,
    aten.as_strided.default: _as_strided,
}
"""Replacements that run instead of an operation that a graph has recorded."""
