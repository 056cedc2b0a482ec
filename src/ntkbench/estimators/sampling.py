"""Samples of fixed size with unequal probabilities: conditional Poisson sampling (Hajek 1964).

Independent draws with probabilities p_b are repeated until their number is s. The inclusion probabilities are close to
p_b where these add up to s. With odds w_b = p_b / (1 - p_b) and r_s = s / sum_b w_b (1 - pi_b^(s-1)), those of samples
of size s follow from those of smaller ones (Chen, Dempster, Liu 1994):

    pi_b^(s) = r_s w_b (1 - pi_b^(s-1)),
    pi_bc^(s) = r_s r_(s-1) w_b w_c (1 - pi_b^(s-2) - pi_c^(s-2) + pi_bc^(s-2)).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNIFORM = 0.1
"""Share of the probabilities that is equal, in case a size is estimated far too small."""
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
        """Indices into ``others``, ``[size]`` in ascending order."""
        while True:
            (drawn,) = np.nonzero(rng.random(len(self.others)) < self.probabilities)
            if len(drawn) == self.size:
                return drawn

    def inclusion(self, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inclusion probabilities of units that were drawn, ``[size]``, and of pairs of them, ``[size, size]``."""
        if self.size == len(self.others):
            return np.ones(self.size), np.ones((self.size, self.size))
        odds = self.probabilities / (1 - self.probabilities)
        single, ratios = [np.zeros(len(odds))], [0.0]
        for s in range(1, self.size + 1):
            rest = odds * (1 - single[-1])
            ratios.append(s / rest.sum())
            single.append(ratios[-1] * rest)
        pair, outer = np.zeros((self.size,) * 2), np.outer(odds[drawn], odds[drawn])
        for s in range(2 + self.size % 2, self.size + 1, 2):
            before = single[s - 2][drawn]
            pair = ratios[s] * ratios[s - 1] * outer * (1 - before[:, None] - before + pair)
        return single[-1][drawn], pair


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
        p[others] = 1.0
    return Design(np.sort(order[:h]), others, size - h, p[others])
