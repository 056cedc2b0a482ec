"""Moments of Theta from random projections of the rows of J.

A projection gives features Phi_i = J S_i, ``[n, w]``, with E S_i S_i^T = I, so that Phi_i Phi_i^T is unbiased for
Theta. R of them with independent S_i are replicates. The published estimator is their mean, the Gram matrix
(1/R) sum_i Phi_i Phi_i^T of k = R w features, and its norm, the *plug-in* value. The square of that norm is biased: the
pairs i = j add the variance of one replicate. Pairs i != j alone give ||Phi_i^T Phi_j||_F^2, which is unbiased for
||Theta||_F^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ntkbench.estimators.accumulators import required_moments
from ntkbench.estimators.standard_errors import MomentEstimates, PairSums
from ntkbench.metrics import Moments
from ntkbench.operators import arrays

Features = np.ndarray
"""Features of R replicates at one set of weights, ``[R, n, w]`` in float64."""


def gram(features: Features) -> np.ndarray:
    """The Gram matrix that approximates Theta, ``[n, n]``: the mean over replicates."""
    flat = np.concatenate(list(features), axis=1)
    found: np.ndarray = flat @ flat.T / len(features)
    return found


def pair_tables(metric: str, features: Sequence[Features]) -> tuple[tuple[str, ...], dict[str, np.ndarray], np.ndarray]:
    """Estimates of the moments of Theta^2 that a metric depends on, from each pair of replicates.

    Takes R^2 w^2 n multiplications for each pair of sets of weights.

    Args:
        metric: the metric.
        features: at theta_0 (and, by the same projections, at theta_f).

    Returns:
        Names of the moments, the tables ``[R, R]`` of all but the trace, and the traces ``[R]``.
    """
    traces = np.einsum("inw,inw->i", features[0], features[0])
    names = required_moments([metric])
    tables: dict[str, np.ndarray] = {}
    if "square" in names:
        square = _products(features[0], features[0])
        tables["square"] = square
        if len(features) > 1:
            square_f, cross = _products(features[1], features[1]), _products(features[0], features[1])
            cross = (cross + cross.T) / 2
            tables |= {"square_f": square_f, "cross": cross}
            tables |= {"difference": square_f - 2 * cross + square, "difference_cross": cross - square}
    if metric == "effective_rank":
        names, tables["squared_trace"] = (*names, "squared_trace"), np.outer(traces, traces)
    return names, tables, traces


def moments(names: Sequence[str], tables: dict[str, np.ndarray], traces: np.ndarray) -> MomentEstimates:
    """The unbiased moments with their covariances, from :func:`pair_tables`."""
    R = len(traces)
    sums = PairSums(1, R, len(tables))
    sums.add(0, 0, [tables[name][None, :, None, :] for name in names if name != "trace"])
    return sums.moments(traces[None] if "trace" in names else None)


def left_out(table: np.ndarray) -> np.ndarray:
    """The mean over pairs of different replicates without each replicate in turn, ``[R]``."""
    R = len(table)
    rows = table.sum(1) - table.diagonal()
    found: np.ndarray = (rows.sum() - 2 * rows) / ((R - 1) * (R - 2))
    return found


def plug_in(names: Sequence[str], tables: dict[str, np.ndarray], traces: np.ndarray) -> Moments:
    """The moments of the published Gram matrix, over all pairs of replicates; biased except for the trace."""
    means = {name: float(tables[name].mean()) for name in names if name in tables}
    return Moments(trace=float(traces.mean()), **means)


ENTRIES = 2**20
"""Largest number of entries of a product of features, unless a single row has more."""


def _products(one: Features, other: Features) -> np.ndarray:
    """||A_i^T B_j||_F^2 for all replicates, ``[R, R]``."""
    flat = other.transpose(1, 0, 2).reshape(other.shape[1], -1)
    parts = arrays.strips(one.shape[2], flat.shape[1], ENTRIES)

    def squares(features: np.ndarray) -> np.ndarray:
        found: np.ndarray = ((features.T @ flat) ** 2).reshape(features.shape[1], len(other), -1).sum((0, 2))
        return found

    return np.array([sum(squares(each[:, part]) for part in parts) for each in one])


# --- what masks miss

KEPT_ONCE, KEPT_TWICE = 3.0, 5.0
"""Parameters kept on average of which a mask keeps one, or two masks keep one each, with a probability of 95 %."""
MISSED = 1.2
"""Share of a sum, in standard errors due to the rest of it, above which missing it makes an interval too short.

In trials on 47 kinds of J, with 64 to 1024 features and 100 seeds each, at least 89 % of the 95 % intervals of trace
and norm and 82 % of those of the effective rank covered where the share was smaller. With one heavy parameter and a
share of 1.5 to 2, as few as 52 % did.
"""


class Heaviest(NamedTuple):
    """The parameters with the largest terms of a sum.

    Attributes:
        number: how many they are.
        share: their share of the sum.
    """

    number: int
    share: float


def missed(terms: np.ndarray, kept: int, replicates: int, hits: float) -> Heaviest | None:
    """Parameters that random masks are likely to miss, if the scatter of the replicates does not allow for that.

    Each of R masks keeps m of the P parameters, so the mean of their sums times P / m is unbiased for the sum of all
    terms. Its variance is about (P / m - 1) / R times the sum of their squares. If one of the heaviest parameters is in
    a mask, its replicate stands out; if they are in none, all replicates agree without them. The heaviest here are the
    most parameters of which all masks together keep at most ``hits`` on average.

    Takes O(P log P) operations on the host.

    Args:
        terms: a nonnegative term for each parameter, ``[P]``.
        kept: m.
        replicates: R.
        hits: :data:`KEPT_ONCE` if one replicate that stands out is enough, :data:`KEPT_TWICE` for pairs of replicates.

    Returns:
        The heaviest parameters if their share of the sum is above :data:`MISSED` standard errors due to the others,
        else ``None``. There are none to miss if the masks keep every parameter or the sum is zero.
    """
    P = len(terms)
    count = int(hits * P / (replicates * kept))
    total = float(terms.sum())
    if kept >= P or count == 0 or total == 0:
        return None
    if not math.isfinite(total):
        return Heaviest(P, 1.0)
    count = min(count, P)
    ordered = np.sort(terms / total)[::-1]
    share, rest = float(ordered[:count].sum()), float((ordered[count:] ** 2).sum())
    error = math.sqrt((P / kept - 1) / replicates * rest)
    return Heaviest(count, share) if share > MISSED * error else None
