"""Sizes of one Kronecker product for each layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def entries(weights: Mapping[str, np.ndarray]) -> int:
    """Entries of the factors of all layers, which have D + 1 and C rows for D inputs, a bias and C outputs.

    A vector counts as a layer of one input, unless it is the bias of a matrix.
    """

    def is_bias(name: str) -> bool:
        matrix = weights.get(f"{name.removesuffix('bias')}weight") if name.endswith("bias") else None
        return matrix is not None and matrix.ndim > 1

    layers = [w for name, w in weights.items() if w.ndim and not is_bias(name)]
    return sum(len(w) ** 2 + (w.size // len(w) + 1) ** 2 for w in layers)
