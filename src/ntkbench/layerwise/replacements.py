"""Replacements of ATen operations whose derivatives are missing or wrong where one sample's graph runs under ``vmap``.

Some derivatives ask for the layout of a tensor, which is not the same while they are traced and while they run. For
these the replacement is f(A) + L(A - A0), with f and its derivative L evaluated at a constant A0 that equals A: the
value is exact, and so is the first derivative.
"""

from __future__ import annotations

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
    """Rows of a table. ATen's derivative ignores, under vmap, the padding of all samples but the first."""
    rows = table[numbers]
    return rows if padding < 0 else torch.where((numbers == padding)[..., None], rows.detach(), rows)


def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    """PReLU. ATen's derivative has no vmap rule if weight and x have different batch dimensions."""
    return torch.where(x > 0, x, weight * x)


def _copy(written: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """The entries of one tensor in the shape and type of another. ATen has no derivative."""
    return source.to(written.dtype).expand_as(written)


def _solve(A: Tensor, b: Tensor, *, left: bool = True, check_errors: bool = False) -> tuple[Tensor, None, None, None]:
    """A^(-1) b with d(A^(-1) b) = A^(-1) (db - dA A^(-1) b), or the same from the right."""
    vectors = b.ndim == 1 or (A.ndim == b.ndim + 1 and b.shape == A.shape[:-1])
    b = b[..., None] if vectors else b
    A0 = A.detach()
    found = torch.linalg.solve(A0, b.detach(), left=left)
    inverse = torch.linalg.inv(A0)
    found = found + (inverse @ (b - A @ found) if left else (b - found @ A) @ inverse)
    return found[..., 0] if vectors else found, None, None, None


def _det(A: Tensor) -> tuple[Tensor, None, None]:
    """det A with d det A = tr(adj(A) dA)."""
    A0 = A.detach()
    U, s, V = torch.linalg.svd(A0)
    # The adjugate by the singular values, which singular matrices have as well: products of all values but one.
    others = torch.where(torch.eye(s.shape[-1], dtype=torch.bool, device=s.device), 1, s[..., None, :]).prod(-1)
    adjugate = torch.linalg.det(U @ V)[..., None, None] * (V.mH * others[..., None, :]) @ U.mH
    return torch.linalg.det(A0) + _trace(adjugate, A - A0), None, None


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
    vectors = b.ndim == 1 or (A.ndim == b.ndim + 1 and b.shape == A.shape[:-1])
    found = torch.linalg.pinv(A) @ (b[..., None] if vectors else b)
    return found[..., 0] if vectors else found, None, None, None


def _index(x: Tensor, indices: list[Tensor | None]) -> Tensor:
    """Boolean masks as positions, which are constants where the masks are."""
    if all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in indices):
        return NotImplemented
    return aten.index.Tensor(x, _positions(indices))


def _positions(indices: list[Tensor | None]) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for i in indices:
        masks = i is not None and i.dtype in (torch.bool, torch.uint8)
        found.extend(i.nonzero().unbind(1) if masks else (i,))
    return found


def _masked_select(x: Tensor, mask: Tensor) -> Tensor:
    """See :func:`_index`."""
    x, mask = torch.broadcast_tensors(x, mask)
    return aten.index.Tensor(x, _positions([mask]))


def _as_strided(x: Tensor, size: list[int], stride: list[int], offset: int | None = None) -> Tensor:
    """Entries by their positions in memory, where x is contiguous while it is traced."""
    positions = torch.arange(x.numel(), device=x.device).as_strided(size, stride, offset or 0)
    return x.reshape(-1)[positions]


DECOMPOSITIONS = {
    aten.native_batch_norm.default: _batch_norm,
    aten.index.Tensor: _index,
    aten.masked_select.default: _masked_select,
}
"""Replacements whose parts are recorded in a graph."""

REPLACEMENTS = {
    aten.embedding.default: _embedding,
    aten._prelu_kernel.default: _prelu,
    aten.copy.default: _copy,
    aten._linalg_solve_ex.default: _solve,
    aten._linalg_det.default: _det,
    aten._linalg_slogdet.default: _slogdet,
    aten.linalg_lstsq.default: _lstsq,
    aten.as_strided.default: _as_strided,
}
"""Replacements that run in the place of an operation of a graph."""
