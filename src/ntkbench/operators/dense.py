"""An explicit Jacobian: for kernels with a prescribed spectrum, without a network."""

from __future__ import annotations

from collections.abc import Callable

import array_api_compat

from ntkbench.operators.base import Array, JacobianOperator, Rng


class DenseJacobian(JacobianOperator):
    """J as a matrix, one sample per row (O = 1); see :class:`ntkbench.operators.base.JacobianOperator`.

    Args:
        matrix: J, ``[n, P]``, of any array library; it fixes device and precision.
        rng: makes the generator of probes for a seed.
        memory: bytes that one block of probes may fill.
    """

    O = 1  # noqa: E741 - the field's symbol

    def __init__(self, matrix: Array, rng: Callable[[int], Rng], memory: int = 2**30) -> None:
        self.N, self.P = matrix.shape
        self.memory = memory
        self.itemsize = matrix.dtype.itemsize
        self._matrix, self._rng = matrix, rng

    def rng(self, seed: int) -> Rng:
        return self._rng(seed)

    def bytes_per_probe(self) -> int:
        return (self.n + self.P) * self.itemsize

    def _vjp(self, u: Array) -> Array:
        return u @ self._matrix

    def _jvp(self, w: Array) -> Array:
        return w @ self._matrix.T

    def _row(self, i: int) -> Array:
        return self._matrix[i]

    def _sample_vjp(self, samples: slice, v: Array) -> Array:
        return v * self._matrix[samples]

    def _sample_jvp(self, samples: slice, w: Array) -> Array:
        return (w * self._matrix[samples]).sum(-1)[..., None]

    def _eye(self, size: int, start: int, stop: int) -> Array:
        xp = array_api_compat.array_namespace(self._matrix)
        device = array_api_compat.device(self._matrix)
        return xp.eye(stop - start, size, k=start, dtype=self._matrix.dtype, device=device)
