"""Metrics of a kernel that is written out, with bounds on their rounding."""

from __future__ import annotations

import numpy as np

from ntkbench import metrics
from ntkbench.errors import Unavailable, Undefined
from ntkbench.estimate import rounding_bound
from ntkbench.estimators.regression import regression_error, sensitivity
from ntkbench.estimators.spectrum import entropy_rounding
from ntkbench.options import Target

DECOMPOSED = 2
"""Number of float64 matrices that an eigenvalue decomposition holds, the kernel included."""


def bytes_needed(rows: int, target: Target) -> int:
    """The kernel, and its decomposition in float64."""
    return rows**2 * (target.itemsize + DECOMPOSED * 8)


def of_kernel(
    metric: str,
    kernel: np.ndarray,
    P: int,
    epsilon: float,
    certificate: float | None,
    *,
    copies: int = 1,
    change: np.ndarray | None = None,
) -> tuple[float, float]:
    """A metric of A ⊗ I, and a bound on its relative rounding.

    By Weyl's inequality no eigenvalue changes by more than the norm of the kernel's rounding.

    Args:
        metric: one of :data:`ntkbench.metrics.OF_KERNEL`.
        kernel: A, in float64 on the host.
        P: number of parameters that A is a sum over.
        epsilon: relative rounding of the numbers that A was computed with.
        certificate: relative difference from plain autograd.
        copies: size of the identity matrix.
        change: change of the outputs by training ``[N, O]``, for the regression error.

    Raises:
        Unavailable: the condition number is requested, and the kernel is singular or may be; or the kernel is zero; or
            the regression error is not defined.
    """
    rows = len(kernel)
    share = rounding_bound("trace", epsilon, max(rows, P), certificate)
    if metric == metrics.REGRESSION and change is not None:
        try:
            value = regression_error(kernel, change)
        except Undefined as undefined:
            raise Unavailable(str(undefined)) from None
        bound = sensitivity(kernel, change, share)
        return value, bound / value if value else 0.0
    if metric == "condition_number" and copies == 1 and rows > P:
        raise Unavailable(f"the kernel of {rows} rows is singular, as there are only {P} parameters")
    values = np.linalg.eigvalsh(kernel)
    largest, smallest, trace = float(values.max()), float(values.min()), float(abs(values).sum())
    # The rounding of the kernel, and that of the decomposition.
    error = share * trace + rows * float(np.finfo(np.float64).eps) * float(abs(values).max())
    try:
        value = metrics.of_eigenvalues(metric, values, copies=copies, error=2 * error)
    except Undefined as undefined:
        raise Unavailable(str(undefined)) from None
    if metric == "largest_eigenvalue":
        return value, error / largest if largest else 0.0
    if metric == "condition_number":
        return value, (largest + error) / (smallest - error) / value - 1
    return value, entropy_rounding(rows, min(error / trace, 1.0))
