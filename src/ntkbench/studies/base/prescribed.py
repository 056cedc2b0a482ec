"""Networks whose NTK is Theta = G ⊗ S, with prescribed parts, and the variances of trace and norm estimators on it.

G is the kernel between N samples, 1 on its diagonal and rho elsewhere, and S is every sample's block. The network is
f(x) = A Q W x with trainable W, frozen A and frozen orthogonal Q, so that G = X X^T and S = A A^T. Three numbers are
prescribed independently:

- O, the outputs of a sample;
- rank = (tr S)^2 / ||S||_F^2, the effective rank of a sample's block, by a geometric spectrum;
- share, the part of ||Theta||_F^2 that lies between samples. From ||Theta||_F^2 = N ||S||_F^2 (1 + (N - 1) rho^2) it
  is (N - 1) rho^2 / (1 + (N - 1) rho^2), which gives rho.

The eigenvectors of S are the columns of a Hadamard matrix, so that all diagonal entries of S are equal, and so are
those of S^2. O is therefore a power of two.

Variances for probes u of random signs, with M_b = (Theta^2)_bb, the part of Theta^2 in sample b:

- Trace, pooled, ||J^T u||^2: 2 (||Theta||_F^2 - sum_i Theta_ii^2) / K after K passes (Hutchinson 1990).
- Trace, per sample, sum_b ||J_b^T u_b||^2: 2 sum_b (||Theta_bb||_F^2 - sum_o Theta_(bo)(bo)^2) / K. Both estimators are
  unbiased, so that the relative variance per sample is 2 (1 / rank - 1 / O) / (N K) here.
- ||Theta||_F^2 by pairs of probes, Hoeffding's two terms (:class:`ntkbench.estimators.standard_errors.PairSums`).
  Single probes: alpha_b(u) = u^T M_b u - tr M_b, so that Var(2 alpha_b) = 8 (||M_b||_F^2 - sum_i (M_b)_ii^2), summed
  over b and divided by K. Pairs: y = (u^T B v)^2 for a block B = Theta_bc, minus its means over u and over v, has the
  variance gamma(B) of :attr:`Sums.pair_variance`; 2 gamma / K^2 for b != c and 2 gamma / (K (K - 1)) for b = c. Pooled,
  all samples are one stratum. The norm's relative error is half that of its square (delta method).

The passes to a relative error eps are therefore proportional to 1 / eps^2, and an exact method takes O passes for any
eps. For the trace per sample, an exact method is cheaper if O < 2 (1 / rank - 1 / O) / (N eps^2), which is about
N O rank < 2 / eps^2. Pooled, the effective rank of Theta, N rank (1 - share), replaces N rank.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from ntkbench.errors import BadInput
from ntkbench.problem import Problem, split


@dataclass(frozen=True)
class Sums:
    """Sums over the entries of a symmetric matrix M that determine variances. Those of M ⊗ M' are products.

    Attributes:
        trace: tr M.
        diagonal: sum_i M_ii^2.
        square: ||M||_F^2.
        fourth: ||M^2||_F^2.
        square_diagonal: sum_i (M^2)_ii^2.
        entries: sum_ij M_ij^4.
    """

    trace: float
    diagonal: float
    square: float
    fourth: float
    square_diagonal: float
    entries: float

    @classmethod
    def of(cls, matrix: np.ndarray) -> Sums:
        """The sums of a symmetric matrix ``[n, n]``, by a product of it with itself."""
        squared = matrix @ matrix
        return cls(
            float(matrix.trace()),
            float((matrix.diagonal() ** 2).sum()),
            float((matrix**2).sum()),
            float((squared**2).sum()),
            float((squared.diagonal() ** 2).sum()),
            float((matrix**4).sum()),
        )

    def kron(self, other: Sums) -> Sums:
        """The sums of the Kronecker product."""
        return Sums(*(a * b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def pair_variance(self) -> float:
        """Variance of (u^T M v)^2, minus its means over u and over v, for independent random signs u and v.

        E (u^T M v)^4 = 3 ((tr A)^2 + 2 (||A||_F^2 - sum_i A_ii^2)) - 6 sum_i A_ii^2 + 4 sum_ij M_ij^4 with A = M M^T,
        from the fourth moments of random signs. (tr A)^2 and twice 2 (||A||_F^2 - sum_i A_ii^2) are subtracted.
        """
        return 2 * self.square**2 + 2 * self.fourth - 8 * self.square_diagonal + 4 * self.entries


@dataclass(frozen=True)
class Kernel:
    """Theta = G ⊗ S.

    Attributes:
        N: samples, at least 2.
        O: outputs of a sample, a power of two, at least 2.
        rank: effective rank of a sample's block, at least 1 and less than O.
        share: part of ||Theta||_F^2 between samples, from 0 to 1 - 1 / N.

    Raises:
        BadInput: an attribute is out of range.
    """

    N: int
    O: int  # noqa: E741 - the field's symbol
    rank: float
    share: float

    def __post_init__(self) -> None:
        if self.N < 2:
            raise BadInput(f"N must be at least 2; got {self.N}")
        if self.O < 2 or self.O & (self.O - 1):
            raise BadInput(f"O must be a power of two, at least 2; got {self.O}")
        if not 1 <= self.rank < self.O:
            raise BadInput(f"rank must be at least 1 and less than O ({self.O}); got {self.rank:g}")
        if not 0 <= self.share <= 1 - 1 / self.N:
            raise BadInput(f"share must be from 0 to 1 - 1 / N ({1 - 1 / self.N:g}); got {self.share:g}")

    @property
    def between(self) -> np.ndarray:
        """G, ``[N, N]``."""
        rho = math.sqrt(self.share / ((1 - self.share) * (self.N - 1)))
        return np.full((self.N, self.N), rho) + (1 - rho) * np.eye(self.N)

    @functools.cached_property
    def eigenvalues(self) -> np.ndarray:
        """Eigenvalues of S, ``[O]``: a geometric sequence with mean 1 and the prescribed effective rank."""
        from scipy.optimize import brentq

        def excess(log_ratio: float) -> float:
            powers = np.exp(log_ratio * np.arange(self.O))
            return math.log(powers.sum() ** 2 / (powers**2).sum() / self.rank)

        powers = np.exp(brentq(excess, -80.0, 0.0) * np.arange(self.O))  # -80 gives a rank of 1 to the last bit
        return powers * self.O / powers.sum()

    @functools.cached_property
    def block(self) -> Sums:
        """The sums of S."""
        values, mean_square = self.eigenvalues, float((self.eigenvalues**2).mean())
        row = _hadamard(self.O) @ values / self.O  # the first row of S; the others hold the same numbers
        return Sums(
            float(values.sum()),
            float(values.sum() ** 2 / self.O),
            self.O * mean_square,
            float((values**4).sum()),
            self.O * mean_square**2,
            float(self.O * (row**4).sum()),
        )

    @functools.cached_property
    def theta(self) -> Sums:
        """The sums of Theta."""
        return Sums.of(self.between).kron(self.block)

    def error(self, metric: str, family: str, passes: float) -> float:
        """Relative root-mean-square error of an estimate of the trace or the norm.

        Args:
            metric: ``trace`` or ``norm``.
            family: ``per-sample`` for a separate probe of each sample, ``pooled`` for one probe of all samples.
            passes: K, more than 1 for the norm.
        """
        theta, block = self.theta, self.block
        if metric == "trace":
            rest = self.N * (block.square - block.diagonal) if family == "per-sample" else theta.square - theta.diagonal
            return math.sqrt(2 * rest / passes) / theta.trace
        own = 2 / (passes * (passes - 1))
        if family == "per-sample":
            samples = Sums.of(self.between)
            single = samples.square_diagonal * (block.fourth - block.square_diagonal)
            pairs = ((samples.entries - self.N) * 2 / passes**2 + self.N * own) * block.pair_variance
        else:
            single = theta.fourth - theta.square_diagonal
            pairs = own * theta.pair_variance
        return math.sqrt(8 * single / passes + pairs) / (2 * theta.square)

    def problem(self, width: int, depth: int) -> Problem:
        """A network with this kernel: a trainable linear layer, frozen orthogonal ones, and a frozen readout.

        The orthogonal layers do not change the kernel, and make a pass as expensive as that of a deep network.

        Args:
            width: inputs, and units of each layer; at least N and O.
            depth: number of orthogonal layers.

        Raises:
            BadInput: ``width`` is less than that.
        """
        from torch import nn

        if width < max(self.N, self.O):
            raise BadInput(f"width must be at least N and O ({max(self.N, self.O)}); got {width}")
        rng = np.random.default_rng(0)
        of_samples, of_outputs, *hidden = (
            np.linalg.qr(rng.standard_normal((width, size)))[0] for size in (self.N, self.O, *[width] * depth)
        )
        x = _root(self.between) @ of_samples.T
        A = _hadamard(self.O) * np.sqrt(self.eigenvalues / self.O) @ of_outputs.T
        W = rng.standard_normal((width, width)) / math.sqrt(width)
        network = nn.Sequential(*(nn.Linear(w.shape[1], len(w), bias=False) for w in (W, *hidden, A)))
        network[1:].requires_grad_(False)
        theta, fixed = split(network, {f"{i}.weight": w for i, w in enumerate((W, *hidden, A))})
        name = f"prescribed[N={self.N},O={self.O},rank={self.rank:g},share={self.share:g}]"
        return Problem(name, network, x, theta, fixed_0=fixed)


def _hadamard(size: int) -> np.ndarray:
    from scipy.linalg import hadamard

    return np.asarray(hadamard(size, dtype=np.float64))


def _root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
