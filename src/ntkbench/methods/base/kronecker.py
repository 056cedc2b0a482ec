"""One Kronecker product for each layer: sizes and moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ntkbench.metrics import Moments

Factors = tuple[Any, Any]
"""A and B of a layer, of its inputs and of its outputs: square arrays of any backend."""


def entries(weights: Mapping[str, np.ndarray]) -> int:
    """Entries of the factors of all layers, which have D + 1 and C rows for D inputs, a bias and C outputs.

    A vector counts as a layer of one input, unless it is the bias of a matrix.
    """

    def is_bias(name: str) -> bool:
        matrix = weights.get(f"{name.removesuffix('bias')}weight") if name.endswith("bias") else None
        return matrix is not None and matrix.ndim > 1

    layers = [w for name, w in weights.items() if w.ndim and not is_bias(name)]
    return sum(len(w) ** 2 + (w.size // len(w) + 1) ** 2 for w in layers)


def moments(first: Sequence[Factors], last: Sequence[Factors]) -> Moments:
    """The moments of ⊕_l A_l ⊗ B_l at two sets of weights, from the factors of each layer."""
    return Moments(
        trace=sum(float(a.trace() * b.trace()) for a, b in first),
        square=_inner(first, first),
        square_f=_inner(last, last),
        cross=_inner(first, last),
    )


def _inner(one: Sequence[Factors], other: Sequence[Factors]) -> float:
    """The trace of the product of two matrices, each given by its factors."""
    return sum(float((a * a_f).sum() * (b * b_f).sum()) for (a, b), (a_f, b_f) in zip(one, other, strict=True))
