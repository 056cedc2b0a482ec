"""Effective ranks and alignment of a kernel, on which errors of estimators depend, from a few probes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ntkbench.errors import NtkbenchError
from ntkbench.operators import Array, JacobianOperator, arrays

PROBES = 8


@dataclass(frozen=True)
class Pilot:
    """Rough properties of Theta.

    Attributes:
        effective_rank: of Theta, from 1 to the smaller of n and P.
        block_rank: effective rank of a sample's own block, from 1 to O; ``None`` where samples interact.
        alignment: with Theta_f; 1 if there is none.
        passes: passes spent.
    """

    effective_rank: float
    block_rank: float | None
    alignment: float
    passes: float

    def __str__(self) -> str:
        of_blocks = "unknown" if self.block_rank is None else f"{self.block_rank:.3g}"
        ranks = f"effective rank {self.effective_rank:.3g}, of a sample's block {of_blocks}"
        return f"errors from {self.passes:g} pilot passes: {ranks}"


def pilot(jacobians: Sequence[JacobianOperator], *, independent: bool, seed: int = 0) -> Pilot:
    """Effective ranks and alignment by :data:`PROBES` probes at each set of weights, or by fewer if memory is short.

    With y_i = J^T u_i over random signs u_i: tr Theta = E ||y_i||^2 and ||Theta||_F^2 = E <y_i, y_j>^2. The variance
    over probes of ||J_b^T u_b||^2 is 2 (||Theta_bb||_F^2 - sum of its squared diagonal). The diagonal is
    assumed to be constant.

    Args:
        jacobians: J at theta_0, and at theta_f for alignment.
        independent: whether samples do not interact.
        seed: seed of the probes.
    """
    j = jacobians[0]
    probes = max(2, min(PROBES, j.memory // j.bytes_per_probe()))
    u = j.rng(seed).sign(probes, j.n)
    grams = [_gram(each.vjp(u)) for each in jacobians]
    trace, square = float(grams[0].diagonal().mean()), _pairs(grams[0], grams[0])
    most = min(j.n, j.P)
    rank = min(max(trace**2 / square, 1.0), most) if square > 0 else float(most)
    block_rank = None
    if independent and j.N > 1:
        with contextlib.suppress(NtkbenchError):  # methods that use per-sample gradients give the reason
            squares = arrays.to_numpy(j.sample_squares(u.reshape(probes, j.N, j.O)), np.float64)
            means = (squares.mean(0) ** 2).sum()
            blocks = squares.var(0, ddof=1).sum() / 2 + means / j.O
            block_rank = float(min(max(means / blocks, 1.0), j.O)) if blocks > 0 else None
    scale = square * _pairs(grams[-1], grams[-1])
    alignment = _pairs(grams[0], grams[-1]) / scale**0.5 if scale > 0 else 1.0
    return Pilot(rank, block_rank, min(max(alignment, 0.0), 1.0), sum(each.passes for each in jacobians))


def _gram(rows: Array) -> np.ndarray:
    return arrays.to_numpy(rows @ rows.T, np.float64)


def _pairs(one: np.ndarray, other: np.ndarray) -> float:
    """Mean product of two Gram matrices over pairs of different probes."""
    k = len(one)
    products = one * other
    return float(products.sum() - products.trace()) / (k * (k - 1))
