"""Seconds of products with the Jacobian of a network, measured in a few sizes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from ntkbench.operators import Array, JacobianOperator, arrays

GRID = (1, 4, 16, 64)
"""Passes in one product; sizes that take too long are not measured."""

LONG = 0.2
"""A product that takes more seconds is not repeated, and no larger one is measured. Products that are expected to take
more are not measured, except for the smallest."""

GROUPS = 24
"""Groups of samples whose gradients are measured together."""


class Rates:
    """Seconds of each kind of product, by its size in passes.

    A kind is measured at its first use. Between the measured sizes times are interpolated by a power law; outside them
    a pass takes as long as at the nearest one.

    Args:
        jacobian: an operator; its products are certified as usual.
        prior: seconds of a product of a number of passes that are expected before any is measured; 0 if not known.
    """

    def __init__(self, jacobian: JacobianOperator, prior: Callable[[float], float] = lambda passes: 0.0) -> None:
        self._j, self._prior = jacobian, prior
        self._curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._forward: float | None = None

    def seconds(self, kind: str, size: float) -> float:
        """Seconds of one product.

        Args:
            kind: name of a method of :class:`ntkbench.operators.JacobianOperator`.
            size: in passes.

        Raises:
            Uncertified: products of this kind are wrong on this network.
        """
        if kind not in self._curves:
            self._curves[kind] = self._measured(kind)
        sizes, times = self._curves[kind]
        if not sizes[0] < size < sizes[-1]:
            nearest = 0 if size <= sizes[0] else -1
            return float(times[nearest] * size / sizes[nearest])
        return math.exp(float(np.interp(math.log(size), np.log(sizes), np.log(times))))

    def forward(self) -> float:
        """Seconds of the forward pass that the products of one operator share."""
        if self._forward is None:
            u = self._j.rng(0).sign(1, self._j.n)
            whole = min(_seconds(lambda: self._j.fresh().vjp(u)) for _ in range(2))
            self._forward = max(0.0, whole - self.seconds("vjp", 1))
        return self._forward

    def _measured(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Sizes and seconds, ascending."""
        points: list[tuple[float, float]] = []
        for wanted in GRID:
            size, product = _product(self._j, kind, wanted)
            if points and (size <= points[-1][0] or self._prior(size) > LONG):
                break
            _seconds(product)  # certified, and compiled where the backend does that
            found = _seconds(product)
            points.append((size, found if found > LONG else min(found, _seconds(product))))
            if found > LONG:
                break
        sizes, times = np.array(points).T
        return sizes, np.maximum.accumulate(times)


def _seconds(product: Callable[[], Array]) -> float:
    """Seconds of a product, up to the arrival of a number on the host."""
    start = time.perf_counter()
    float(product().reshape(-1)[-1])
    return time.perf_counter() - start


def _product(j: JacobianOperator, kind: str, wanted: int) -> tuple[float, Callable[[], Array]]:
    """The number of passes of a product, which memory may limit below the wanted number, and the product."""
    sign, probes = j.rng(0).sign, max(1, min(wanted, j.memory // j.bytes_per_probe()))
    if kind == "row":
        return 1, lambda: j.row(0)
    if kind in ("vjp", "jvp"):
        u = sign(probes, j.n if kind == "vjp" else j.P)
        return probes, lambda: getattr(j, kind)(u)
    if kind in ("sample_squares", "group_gradients"):
        v = sign(probes, j.n).reshape(probes, j.N, j.O)
        groups = arrays.chunks(j.N, min(j.N, GROUPS))
        return probes, lambda: j.sample_squares(v) if kind == "sample_squares" else j.group_gradients(groups, v)
    some, outputs = next(j.rectangles(1 / 4))
    count, most = some.stop - some.start, outputs.stop - outputs.start
    k, dim = max(1, min(wanted, most)), j.O if kind == "sample_vjp" else j.P
    v = sign(k, count * dim).reshape(k, count, dim)
    return k * count / j.N, lambda: getattr(j, kind)(some, v)
