"""Theta of a problem as a matrix on the host: the timed reference of the studies of spectra and solutions."""

from __future__ import annotations

from typing import Any

import numpy as np

from ntkbench import methods
from ntkbench.operators import arrays
from ntkbench.options import Target
from ntkbench.problem import Problem

METHOD = "structured_derivatives"


class Theta:
    """Theta of a problem by the layerwise kernel; traced once, and computed again at each call.

    Attributes:
        eps: machine epsilon of its entries.
    """

    def __init__(self, problem: Problem, target: Target) -> None:
        """Trace the network.

        Args:
            problem: a problem whose Theta fits in memory; taken at its initial weights.
            target: where Theta is computed, and in which precision.

        Raises:
            BadInput: the network has no layerwise kernel.
        """
        prepared: Any = methods.get(METHOD).prepare(problem, target)
        (self._end,) = prepared.ends("norm")
        self.eps = float(np.finfo(target.dtype).eps)

    def __call__(self) -> np.ndarray:
        """``[n, n]`` in float64, rows sample-major; O passes."""
        made = self._end.engine.kernel(self._end.parameters, self._end.x)
        return np.array(arrays.to_numpy(made, np.float64))


def pooled(theta: np.ndarray, outputs: int) -> np.ndarray:
    """The pNTK of a kernel between all outputs of all samples ``[n, n]``, ``[N, N]``."""
    return theta.reshape(len(theta) // outputs, outputs, -1, outputs).sum((1, 3)) / outputs
