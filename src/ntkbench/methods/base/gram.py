"""The Gram matrix of a head's inputs, and its moments without the matrix itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ntkbench.metrics import Moments

if TYPE_CHECKING:
    from torch import Tensor


class Gram:
    """G = H H^T, with a 1 added to each entry for a bias. It is never written out.

    Attributes:
        H: ``[m, d]``, or ``[m, d + 1]`` with a column of ones for a bias; float64.

    Args:
        hidden: ``[m, d]`` in float64.
        bias: whether the head has a bias that counts.
    """

    def __init__(self, hidden: Tensor, bias: bool) -> None:
        import torch

        self.H = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1) if bias else hidden

    def part(self, rows: Any, columns: Any) -> Tensor:
        """Some rows and columns, given as slices or indices."""
        return self.H[rows] @ self.H[columns].T

    def trace(self) -> float:
        """tr G."""
        return float((self.H**2).sum())


def moments_of_grams(first: Gram, second: Gram | None = None) -> Moments:
    """Moments of G, or of G and G_f, from products of d x d matrices.

    With E = H_f - H, the difference G_f - G is E H_f^T + H E^T, which keeps the digits of a small E.

    Cost: m d^2 multiplications for each of up to four products.
    """
    H = first.H
    S = H.T @ H
    trace, square = first.trace(), _inner(S, S)
    if second is None:
        return Moments(trace, square)
    H_f = second.H
    between = H.T @ H_f
    S_f = H_f.T @ H_f
    square_f, cross = _inner(S_f, S_f), _inner(between, between)
    if H.shape != H_f.shape:  # of different networks, so that G_f is not close to G
        return Moments(trace, square, square_f, cross, square + square_f - 2 * cross, cross - square)
    E = H_f - H
    across, change = H.T @ E, E.T @ E
    difference = max(0.0, _inner(change, S_f) + _inner(S, change) + 2 * _inner(across.T, H_f.T @ E))
    return Moments(trace, square, square_f, cross, difference, _inner(across, between) + _inner(S, across))


def _inner(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum())
