"""Kernel regression as a metric: how well a kernel at theta_0 predicts the change of held-out outputs by training."""

from __future__ import annotations

import math

import numpy as np
import scipy.linalg

from ntkbench.errors import Undefined

RIDGE = 1e-3
"""Ridge, as a share of the mean diagonal of the training samples' kernel."""


def regression_error(kernel: np.ndarray, change: np.ndarray) -> float:
    """||K(x', x) (K(x, x) + ridge)^-1 D(x) - D(x')|| / ||D(x')|| for the change D of a network's outputs by training.

    The first half of the samples are x, the others x'. In the linear regime of training the error is 0 without a ridge;
    it is 1 for a kernel that predicts no change.

    Cost: a Cholesky factor of half of the kernel, (m O)^3 / 3 operations for m training samples.
    Source: Jacot et al. 2018 (arXiv 1806.07572), section 5; Mohamadi et al. 2023 (arXiv 2206.12543), section 4.3, who
    regress on labels.

    Args:
        kernel: K, ``[N, N]`` if it is the same for all outputs, or ``[N O, N O]``; in float64.
        change: D, ``[N, O]``.

    Raises:
        Undefined: there is only one sample, or training does not change the held-out outputs, or the kernel is zero.
    """
    return _solved(kernel, change)[0]


def sensitivity(kernel: np.ndarray, change: np.ndarray, relative: float) -> float:
    """Bound on the change of :func:`regression_error` if entries of the kernel are off by rounding.

    Entries K_ij are off by ``relative`` times (K_ii K_jj)^(1/2), and so are those of the Cholesky factor's product, by
    its rounding in float64 (Higham 2002, theorem 10.3). The bound is infinite if the Neumann series of the inverse may
    diverge.

    Cost: the inverse of half of the kernel.

    Args:
        kernel: as for :func:`regression_error`.
        change: as for :func:`regression_error`.
        relative: rounding of an entry.
    """
    _, train, factor, ridge = _solved(kernel, change)
    size = np.sqrt(np.maximum(kernel.diagonal(), 0.0))
    relative += (train + 1) * float(np.finfo(np.float64).eps)
    targets = _columns(kernel, change)
    inverse = scipy.linalg.cho_solve(factor, np.eye(train))
    weights = abs(inverse @ targets[:train])
    growth = relative * float(size[:train] @ (abs(inverse) @ size[:train]))
    if growth >= 1 / 2:
        return math.inf
    reach = relative * (size[:train] @ weights)  # bound on what the rounding of a row changes, for each column
    onto = abs(kernel[train:, :train] @ inverse)
    moved = np.outer(size[train:] + onto @ size[:train], reach) + relative * ridge * onto @ weights
    return float(np.linalg.norm(moved) / np.linalg.norm(targets[train:])) / (1 - growth)


def _columns(kernel: np.ndarray, change: np.ndarray) -> np.ndarray:
    return change if len(kernel) == len(change) else change.reshape(-1, 1)


def _solved(kernel: np.ndarray, change: np.ndarray) -> tuple[float, int, tuple[np.ndarray, bool], float]:
    """The error, the number of training rows, the Cholesky factor, and the ridge."""
    N = len(change)
    if N < 2:
        raise Undefined("the regression error is not defined for one sample: none can be held out")
    targets = _columns(kernel, change)
    train = (N + 1) // 2 * (len(kernel) // N)
    among = kernel[:train, :train].copy()
    ridge = RIDGE * float(among.trace()) / train
    scale = float(np.linalg.norm(targets[train:]))
    if not ridge > 0 or scale == 0:
        what = "Theta is zero" if scale else "training does not change the outputs of the held-out samples"
        raise Undefined(f"the regression error is not defined where {what}")
    among[np.diag_indices(train)] += ridge
    factor = scipy.linalg.cho_factor(among, lower=True, overwrite_a=True)
    predicted = kernel[train:, :train] @ scipy.linalg.cho_solve(factor, targets[:train])
    return float(np.linalg.norm(predicted - targets[train:])) / scale, train, factor, ridge
