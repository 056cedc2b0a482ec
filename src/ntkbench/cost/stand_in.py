"""A small dense Jacobian that stands in for a network's and records the requested products."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import brentq

from ntkbench import metrics
from ntkbench.cost.pilot import Pilot
from ntkbench.operators import Array, JacobianOperator, Rng
from ntkbench.operators.dense import DenseJacobian

if TYPE_CHECKING:
    import torch

STEEPEST = 12.0
"""Maximum power with which the spectrum of a stand-in decays."""
TURNED = 512
"""Maximum columns for a rotation to a random basis; wider stand-ins are only timed."""
ALIKE = 0.98
"""Largest common share of the rows of one sample."""


@dataclass
class Asked:
    """The products requested from stand-ins.

    Attributes:
        products: number of products by kind and size, with sizes in passes.
        seconds: their total seconds on stand-ins.
    """

    products: Counter[tuple[str, float]] = field(default_factory=Counter)
    seconds: float = 0.0

    def clear(self) -> None:
        """Forget everything."""
        self.products.clear()
        self.seconds = 0.0


class StandIn(DenseJacobian):
    """A dense J of N samples with O rows each; products are neither certified nor slow.

    Args:
        matrix: ``[N, O, P]``.
        rng: makes the generator of probes for a seed.
        memory: bytes that one block may fill.
        probe_bytes: bytes held for one probe.
        asked: record of all products.
    """

    def __init__(
        self, matrix: torch.Tensor, rng: Callable[[int], Rng], memory: int, probe_bytes: int, asked: Asked
    ) -> None:
        super().__init__(matrix.flatten(0, 1), rng, memory)
        self.N, self.O = matrix.shape[:2]
        self._by_sample, self._probe_bytes, self._asked = matrix, probe_bytes, asked

    def bytes_per_probe(self) -> int:
        return self._probe_bytes

    def vjp(self, u: Array) -> Array:
        return self._noted("vjp", len(u), super().vjp, u)

    def jvp(self, w: Array) -> Array:
        return self._noted("jvp", len(w), super().jvp, w)

    def row(self, i: int) -> Array:
        return self._noted("row", 1, super().row, i)

    def sample_vjp(self, samples: slice, v: Array) -> Array:
        return self._noted("sample_vjp", v.shape[0] * v.shape[1] / self.N, super().sample_vjp, samples, v)

    def sample_jvp(self, samples: slice, w: Array) -> Array:
        return self._noted("sample_jvp", w.shape[0] * w.shape[1] / self.N, super().sample_jvp, samples, w)

    def sample_squares(self, v: Array) -> Array:
        return self._noted("sample_squares", len(v), super().sample_squares, v)

    def group_gradients(self, groups: Sequence[slice], v: Array) -> Array:
        size = v.shape[0] * v.shape[1] / self.N
        return self._noted("group_gradients", size, super().group_gradients, groups, v)

    def _noted(self, kind: str, size: float, product: Callable[..., Array], *arguments: Any) -> Array:
        start = time.perf_counter()
        found = product(*arguments)
        float(found.reshape(-1)[-1])  # waits for a GPU
        self._asked.seconds += time.perf_counter() - start
        self._asked.products[kind, size] += 1
        return found

    def _sample_vjp(self, samples: slice, v: Array) -> Array:
        return (v.movedim(1, 0) @ self._by_sample[samples]).movedim(0, 1)

    def _sample_jvp(self, samples: slice, w: Array) -> Array:
        return (w.movedim(1, 0) @ self._by_sample[samples].mT).movedim(0, 1)


class PreparedStandIn:
    """Stand-ins instead of the operators of :class:`ntkbench.methods.base.PreparedProblem`.

    Attributes:
        N, O, P: sizes.
        asked: products requested from all its operators.

    Args:
        like: an operator of the network.
        shape: N, O and P of the stand-in.
        known: properties of Theta.
        ends: number of sets of weights.
        dtype: dtype of the network.
        device: device of torch.
    """

    def __init__(
        self,
        like: JacobianOperator,
        shape: tuple[int, int, int],
        known: Pilot,
        ends: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        from ntkbench.operators.torch import TorchRng

        self.N, self.O, self.P = shape
        self.asked = Asked()
        # The same share of the rows of J fits in memory as for the network, and the same number of probes.
        scale = self.N * self.O * self.P / (like.n * like.P)
        memory, probe_bytes = (max(1, int(scale * size)) for size in (like.memory, like.bytes_per_probe()))
        self._operators = [
            StandIn(matrix, lambda seed: TorchRng(seed, dtype, device), memory, probe_bytes, self.asked)
            for matrix in matrices(shape, known, ends, dtype, device)
        ]

    def jacobians(self, metric: str) -> list[StandIn]:
        """Operators at each set of weights of a metric."""
        return [j.fresh() for j in self._operators[: len(metrics.parameter_sets(metric))]]


def matrices(
    shape: tuple[int, int, int], known: Pilot, ends: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Random Jacobians ``[N, O, P]`` with given effective ranks and, for two of them, about a given alignment.

    The rows of J are normal and of unit norm on average, with variances that fall as a power of the column's index. The
    two ranks give the mean squares of Theta between samples and within a sample, off its diagonal. If the latter is
    larger, rows of a sample have a part in common. If it is smaller, as in wide networks, whose outputs have almost
    orthogonal gradients, a share of each row is in columns that only the rows of the same output have.
    """
    import torch

    N, O, P = shape  # noqa: E741 - the field's symbol
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int, squares: float) -> torch.Tensor:
        weights = torch.from_numpy(decaying(sizes[-1], squares) ** 0.5).to(dtype)
        return torch.randn(*sizes, generator=generator, dtype=dtype) * weights

    if N == 1 or known.block_rank is None:
        between = within = (N * O / known.effective_rank - 1) / (N * O + 1)
    else:
        between = (1 / known.effective_rank - 1 / (N * known.block_rank)) * N / (N - 1)
        between = max(between, 0.0)
        within = max((O / known.block_rank - 1) / (O - 1), 0.0) if O > 1 else between
    own = P // (2 * O)  # columns of each output
    apart = within < between and own > 0 and N > 1
    ratio = (within / (O * (between - within))) ** 0.5 if apart else 0.0
    together = ratio / (1 + ratio)  # share of a row in columns that all outputs have
    level = O * (between - within) / (1 - together) ** 2 if apart else between
    shared = 0.0 if apart else min(max(within - between, 0.0) ** 0.5, ALIKE)

    def rows() -> torch.Tensor:
        if not apart:
            return shared**0.5 * normal(N, 1, P, squares=level) + (1 - shared) ** 0.5 * normal(N, O, P, squares=level)
        found = torch.zeros(N, O, P, dtype=dtype)
        found[..., O * own :] = together**0.5 * normal(N, O, P - O * own, squares=level)
        alone = (1 - together) ** 0.5 * normal(N, own, squares=level)
        for o in range(O):
            found[:, o, o * own : (o + 1) * own] = alone
        return found

    made = [rows()]
    if ends == 2:
        # J_f = x^(1/2) J + (1 - x)^(1/2) J' with an unrelated J' has the alignment x / (x^2 + (1 - x)^2)^(1/2).
        x = known.alignment / (known.alignment + (1 - known.alignment**2) ** 0.5)
        unrelated = rows()[..., torch.randperm(P, generator=generator)]
        made.append(x**0.5 * made[0] + (1 - x) ** 0.5 * unrelated)
    if P <= TURNED:  # no column stands out, as in a network: random signs have no error on a diagonal J^T J
        basis = torch.linalg.qr(torch.randn(P, P, generator=generator, dtype=dtype))[0]
        made = [matrix @ basis for matrix in made]
    return [matrix.to(device) for matrix in made]


def decaying(size: int, squares: float) -> np.ndarray:
    """Shares that add up to 1 and fall as a power of their index, with the sum of squares ``squares``, or near it."""
    steps = np.log(np.arange(1, size + 1))

    def shares(power: float) -> np.ndarray:
        found = np.exp(-power * steps)
        return np.asarray(found / found.sum())

    def excess(power: float) -> float:
        return float((shares(power) ** 2).sum() - squares)

    if excess(0.0) >= 0 or excess(STEEPEST) <= 0:
        return shares(0.0 if excess(0.0) >= 0 else STEEPEST)
    return shares(float(brentq(excess, 0.0, STEEPEST, xtol=1e-6)))
