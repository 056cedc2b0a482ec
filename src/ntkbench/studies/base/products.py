"""Products with Theta on the host, for algorithms of other libraries."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ntkbench.operators import JacobianOperator, arrays


def apply(j: JacobianOperator, columns: np.ndarray) -> np.ndarray:
    """Theta times vectors ``[n]`` or ``[n, k]`` in the precision of J; 2 passes for each.

    The columns are scaled to length 1 for the products, and the results are scaled back.
    """
    rows = columns.reshape(j.n, -1).T
    sizes = np.linalg.norm(rows, axis=1, keepdims=True)
    sizes = np.where(sizes > 0, sizes, 1.0)
    image = arrays.to_numpy(j.ntk(arrays.asarray_like(rows / sizes, j.basis(0, 1)))) * sizes
    found: np.ndarray = image.T.reshape(columns.shape)
    return found


def linear(j: JacobianOperator) -> Any:
    """Theta as a linear operator of SciPy on blocks of vectors, in the precision of J."""
    from scipy.sparse.linalg import LinearOperator

    product = functools.partial(apply, j)
    return LinearOperator((j.n, j.n), matvec=product, matmat=product, dtype=np.dtype(f"f{j.itemsize}"))
