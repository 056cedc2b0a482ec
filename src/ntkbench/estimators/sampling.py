"""Samples of fixed size with unequal probabilities: conditional Poisson sampling (Hajek 1964).

Independent draws with probabilities p_b are repeated until their number is s. The inclusion probabilities, close to p_b
where these add up to s, follow from the number S of units that independent draws give: pi_b = p_b P(S_(-b) = s - 1) /
P(S = s) without unit b, and pi_bc = p_b p_c P(S_(-b, -c) = s - 2) / P(S = s) without units b and c. Probabilities of S
are Fourier coefficients of its characteristic function, the product of 1 - p_b + p_b exp(i t) over the units
(Fernandez, Williams 2010), in which leaving a unit out is a division.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

UNIFORM = 0.1
"""Share of the probability that all units get equally, in case a size is estimated far too small."""
MOST = 0.95
"""Largest probability of a unit that is not certain to be drawn."""


@dataclass(frozen=True)
class Design:
    """How to draw s of N units.

    Attributes:
        certain: units that are always drawn, in ascending order.
        others: the remaining units, in ascending order.
        size: number of the others that are drawn.
        probabilities: p of the others.
    """

    certain: np.ndarray
    others: np.ndarray
    size: int
    probabilities: np.ndarray

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Indices into ``others``, ``[size]`` in ascending order; ``size`` is the likeliest number of draws."""
        while True:
            (drawn,) = np.nonzero(rng.random(len(self.others)) < self.probabilities)
            if len(drawn) == self.size:
                return drawn

    def inclusion(self, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inclusion probabilities of k of the others, such as those drawn, ``[k]``, and of pairs, ``[k, k]``."""
        p, s, N, k = self.probabilities, self.size, len(self.others), len(drawn)
        if np.ptp(p) == 0:
            return np.full(k, s / N), np.full((k, k), s * (s - 1) / (N * (N - 1)) if s < N else 1.0)
        # An odd number of angles omits the only one at which a factor may be zero. Terms of conjugate angles count
        # twice.
        half = min(N, WINDOW * (s + WINDOW)) // 2 + 1
        total, single, pairs = 0.0, np.zeros(k), np.zeros((k, k))
        for angles in np.array_split(np.arange(half + 1), -(-(half + 1) // CHUNK)):
            turn = np.exp(2j * np.pi * angles / (2 * half + 1))
            off = turn[:, None] - 1
            logs = sum(np.log1p(part * off).sum(1) for part in np.array_split(p, -(-N // CHUNK)))
            of_size = np.where(angles > 0, 2, 1) * np.exp(logs) * turn**-s
            without = 1 / (1 + p[drawn] * off)
            total += of_size.sum().real
            single += (of_size * turn @ without).real
            pairs += ((without.T * (of_size * turn**2)) @ without).real
        return p[drawn] * single / total, np.outer(p[drawn], p[drawn]) * pairs / total


WINDOW = 8
"""There are never more draws than this many times s plus this number: the probability is below 1e-30."""
CHUNK = 256
"""Number of angles, and of units whose factors are held, at a time."""


def design(sizes: np.ndarray, size: int, least: int) -> Design:
    """Probabilities proportional to sizes, except for a small equal part.

    Units whose probability would be 1 or more are certain to be drawn, if enough others are.

    Args:
        sizes: one for each unit, ``[N]``, not negative.
        size: number of units to draw.
        least: smallest number of units whose draw is random, unless all are drawn.
    """
    N, total = len(sizes), float(sizes.sum())
    weights = (1 - UNIFORM) * sizes / total + UNIFORM / N if total > 0 else np.full(N, 1 / N)
    order = np.argsort(-weights, kind="stable")
    left = np.append(np.cumsum(weights[order[::-1]])[::-1], 0.0)
    h = 0
    while h < size - least and size < N and (size - h) * weights[order[h]] >= left[h]:
        h += 1
    # Of the others, the first m would also have large probabilities.
    m = 0
    while m < size - h and (size - h - m) * weights[order[h + m]] > MOST * left[h + m]:
        m += 1
    p = np.empty(N)
    p[order[h : h + m]] = MOST
    if h + m < N:
        rest = order[h + m :]
        p[rest] = (size - h - m) * weights[rest] / left[h + m]
    others = np.sort(order[h:])
    if len(others) == size - h:
        return Design(np.sort(order[:h]), others, size - h, np.ones(len(others)))
    return Design(np.sort(order[:h]), others, size - h, _tilted(p[others], size - h))


def _tilted(p: np.ndarray, size: int) -> np.ndarray:
    """Probabilities that give the same draws of ``size`` units and add up to ``size``, the likeliest number."""
    if np.ptp(p) == 0:
        return np.full(len(p), size / len(p))
    logits = np.log(p / (1 - p))
    shift = brentq(lambda shift: expit(logits + shift).sum() - size, -logits.max() - 40, -logits.min() + 40)
    found: np.ndarray = expit(logits + shift)
    return found
