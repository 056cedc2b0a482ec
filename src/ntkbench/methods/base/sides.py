"""The two sides that J can be probed from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from ntkbench.estimators.deflation import LinearMap
from ntkbench.operators import Array, JacobianOperator

Side = Literal["reverse", "forward"]
"""``reverse`` probes output space by VJPs, ``forward`` probes parameter space by JVPs."""


class Factor(NamedTuple):
    """A = J^T or A = J: a factor of Theta = J J^T or of J^T J, which have the same trace and Frobenius norm.

    Attributes:
        product: product with A, from probes ``[k, dim]`` to images ``[k, image_dim]``; k passes.
        adjoint: product with A^T; k passes.
        dim: dimension of the probes.
        image_dim: dimension of their images.
        basis: unit vectors of the space of the probes, from a start to a stop index, as rows.
    """

    product: LinearMap
    adjoint: LinearMap
    dim: int
    image_dim: int
    basis: Callable[[int, int], Array]


def factor(j: JacobianOperator, side: Side) -> Factor:
    """A = J^T for ``reverse``, A = J for ``forward``."""
    if side == "reverse":
        return Factor(j.vjp, j.jvp, j.n, j.P, j.basis)
    return Factor(j.jvp, j.vjp, j.P, j.n, j.parameter_basis)
