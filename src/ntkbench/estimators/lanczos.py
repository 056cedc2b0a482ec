"""The spectrum of Theta: density by stochastic Lanczos quadrature, largest eigenvalues by block Lanczos."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln, ndtri

from ntkbench.errors import BadInput, OverMemory
from ntkbench.estimate import rounding_bound
from ntkbench.estimators.deflation import new_directions
from ntkbench.operators import Array, JacobianOperator
from ntkbench.operators.arrays import asarray_like, epsilon, to_numpy
from ntkbench.options import check_confidence


@dataclass(frozen=True, eq=False)
class Density:
    """The spectral density of Theta as a quadrature rule: sum_i f(lambda_i) is about n sum_j weight_j f(node_j).

    A histogram is ``numpy.histogram(density.nodes, weights=density.weights)``; :meth:`shares` has intervals.

    Attributes:
        nodes: Ritz values of each probe in ascending order, ``[probes, steps]``; those below round-off are 0.
        weights: their weights, ``[probes, steps]``; those of one probe add up to 1 / probes.
        radau_nodes: nodes of Gauss-Radau quadrature with one of them at 0, ``[probes, steps]``. Where Gauss quadrature
            is too large, as for a logarithm, this one is too small, and vice versa.
        radau_weights: their weights, ``[probes, steps]``.
        exhausted: whether each probe's Krylov space is exhausted, so that both rules are exact for it, ``[probes]``.
        n: size of Theta.
        passes: passes spent.
        smallest: the smallest Ritz value: up to rounding, an upper bound on lambda_min.
        rounding: largest shift of the nodes by rounding.
        whole: whether the nodes are all n eigenvalues, and not Ritz values of random probes.
    """

    nodes: np.ndarray
    weights: np.ndarray
    radau_nodes: np.ndarray
    radau_weights: np.ndarray
    exhausted: np.ndarray
    n: int
    passes: float
    smallest: float
    rounding: float
    whole: bool = False

    @property
    def largest(self) -> float:
        """The largest Ritz value: a lower bound on lambda_max, close to it after a few steps."""
        return float(self.nodes.max())

    @property
    def trace(self) -> float:
        """tr Theta, Hutchinson's estimate from the same probes."""
        return self.n * float((self.weights * self.nodes).sum())

    @property
    def entropy_effective_rank(self) -> float:
        """exp(-sum_i p_i log p_i) with p_i = lambda_i / tr Theta (Roy, Vetterli 2007); ``nan`` if Theta is zero.

        More steps lower it, but not below :attr:`entropy_lower_bound`.
        """
        trace, moment = self._moments(self.nodes, self.weights).sum(1)
        return math.exp(math.log(trace) - moment / trace) if trace > 0 else math.nan

    @property
    def entropy_lower_bound(self) -> float:
        """Lower bound on the entropy effective rank of the same probes after any number of steps.

        Gauss quadrature is below the integral of x log x, and Gauss-Radau quadrature with a node at 0 above it, by the
        signs of the derivatives (Golub, Meurant 1994, theorems 3.1 and 3.2).
        """
        trace, moment = self._moments(self.nodes, self.weights)
        if not trace.sum() > 0:
            return math.nan
        if self.nodes.shape[1] == 1 and not self.exhausted.all():  # one node at 0 gives no information
            return 1.0
        above = np.maximum(self._moments(self.radau_nodes, self.radau_weights)[1], moment)
        return max(math.exp(math.log(trace.sum()) - float(above.sum() / trace.sum())), 1.0)

    @property
    def entropy_standard_error(self) -> float:
        """Standard error of :attr:`entropy_effective_rank` by the delta method; ``nan`` if Theta is zero."""
        value, (trace, moment) = self.entropy_effective_rank, self._moments(self.nodes, self.weights).sum(1)
        if math.isnan(value):
            return math.nan
        logarithms = np.log(np.where(self.nodes > 0, self.nodes, 1.0))
        change = self.nodes / trace * (1 + moment / trace - logarithms)
        return value * self.n * math.sqrt(self._variance(change, self.weights))

    def shares(self, edges: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The share of eigenvalues in each of the bins ``edges[i] <= lambda < edges[i + 1]``, with an interval.

        They add up to 1 if the bins cover all eigenvalues. Use ``edges = [0, x]`` for the share below x. The interval
        of a bin accounts for further steps, for the choice of probes and for rounding. By Chebyshev's inequalities the
        weight of a probe below a node is correct up to the weight of that node. The share of a random vector in the
        eigenspace of k of n eigenvalues has the distribution Beta(k / 2, (n - k) / 2). Wilson's interval for a binomial
        share in probes * (n + 2) / 2 trials is used, as that share has the same variance.

        Source: Szego 1939, section 3.41; Wilson 1927.

        Args:
            edges: edges of the bins, ascending, ``[bins + 1]``; they may be infinite.
            confidence: confidence level of each interval separately.

        Returns:
            Shares and the lower and upper ends of their intervals, each ``[bins]``.

        Raises:
            BadInput: fewer than two edges, or they do not ascend; or a confidence level that is not allowed.
        """
        check_confidence(confidence)
        edges = np.asarray(edges, np.float64)
        if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
            raise BadInput(f"edges must be at least two numbers in ascending order, got {edges.tolist()}")
        rows = np.array([self._below(probe, edges) for probe in range(len(self.nodes))])
        middle, least, most = rows.transpose(1, 0, 2)
        share = np.diff(middle, axis=1).mean(0)
        low = np.maximum(least[:, 1:] - most[:, :-1], 0.0).mean(0)
        high = np.minimum(most[:, 1:] - least[:, :-1], 1.0).mean(0)
        if not self.whole:
            z = float(ndtri(0.5 + confidence / 2))
            low = np.minimum(low, _wilson(low, self._trials, -z))
            high = np.maximum(high, _wilson(high, self._trials, z))
        return share, low, high

    def log_determinant(self, ridge: float, confidence: float = 0.95) -> tuple[float, float, float]:
        """log det(Theta + ridge I) = sum_i log(lambda_i + ridge), with an interval.

        The interval accounts for rounding. If the spectrum is from products, it also accounts for further steps and for
        the choice of probes. For a logarithm, Gauss quadrature is above the integral and Gauss-Radau quadrature with a
        node at 0 is below it (Golub, Meurant 1994, theorems 3.1 and 3.2). The mean logarithm is a share of the way from
        the smallest to the largest, so its interval is Wilson's, as in :meth:`shares`, with the number of trials that
        gives the variance over probes. Unlike a symmetric interval it covers the value where few eigenvalues exceed the
        ridge, and probes are therefore skewed. From products there is no lower end without a ridge.

        Args:
            ridge: constant added to each eigenvalue; 0 or more.
            confidence: confidence level of the interval.

        Returns:
            The value, and the lower and upper ends of its interval; some are ``-inf`` if an eigenvalue plus ridge may
            be 0.

        Raises:
            BadInput: the confidence level is not between 0 and 1.
        """
        check_confidence(confidence)
        gauss, radau = (self.nodes, self.weights), (self.radau_nodes, self.radau_weights)
        value, below = (self._log_determinant(*rule, ridge) for rule in (gauss, radau))
        if self.whole:
            return value, self._with_rounding(value, ridge, -1), self._with_rounding(value, ridge, 1)
        z = float(ndtri(0.5 + confidence / 2))
        low, high = self._log_determinant(*radau, ridge, -z), self._log_determinant(*gauss, ridge, z)
        value = (value + below) / 2 if math.isfinite(below) else value
        return value, min(low, value), max(high, value)

    def _log_determinant(self, nodes: np.ndarray, weights: np.ndarray, ridge: float, z: float = 0.0) -> float:
        """log det(Theta + ridge I) by a rule, with rounding and the choice of probes allowed for z standard errors.

        A negative z gives the lower end of the interval, a positive one the upper end, and 0 the value.
        """
        sign = float(np.sign(z))
        with np.errstate(divide="ignore"):
            values = np.log(np.maximum(nodes + sign * self.rounding, 0.0) + ridge)
        seen = weights > np.finfo(np.float64).eps ** 2  # the others belong to zero vectors
        least, most = float(values[seen].min()), float(values[seen].max())
        if z == 0 or least == most:
            return self.n * float((weights[seen] * values[seen]).sum())
        if not math.isfinite(least):
            return sign * math.inf
        shares = np.where(seen, (values - least) / (most - least), 0.0)
        share = float((weights * shares).sum())
        trials = share * (1 - share) / self._variance(shares, weights)
        return self.n * (least + (most - least) * float(_wilson(np.asarray(share), trials, z)))

    def _with_rounding(self, value: float, ridge: float, sign: int) -> float:
        """An end of the interval of log det(Theta + ridge I) = ``value`` of all eigenvalues: their possible rounding.

        No eigenvalue moves further than ``rounding``. The root of the sum of squares of all moves is within it too
        (Hoffman, Wielandt 1953), which is tighter for many eigenvalues: a logarithm is below its tangents.
        """
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            moved = np.maximum(self.nodes + sign * self.rounding, 0.0) + ridge
            slopes = 1 / (moved if sign < 0 else self.nodes + ridge)
            ends = float(np.log(moved).sum()), value + sign * self.rounding * float(np.sqrt((slopes**2).sum()))
        return float(np.fmax(*ends) if sign < 0 else np.fmin(*ends))

    @property
    def _trials(self) -> float:
        """Trials of a binomial share that has the variance of the mean share of all probes in an eigenspace."""
        return len(self.nodes) * (self.n + 2) / 2

    def _variance(self, values: np.ndarray, weights: np.ndarray) -> float:
        """Variance of the quadrature of a function with these values at the nodes, over the choice of probes.

        For a random unit vector u, that of u^T F u is 2 / (n + 2) times the variance of the eigenvalues of F.
        """
        return float((weights * (values - (weights * values).sum()) ** 2).sum()) / self._trials

    def _below(self, probe: int, x: np.ndarray) -> np.ndarray:
        """The weight of one probe below each x, and its bounds, ``[3, len(x)]``."""
        nodes, total = self.nodes[probe], np.concatenate([[0.0], np.cumsum(self.weights[probe])]) * len(self.nodes)
        unsure = 0 if self.exhausted[probe] else 1
        least = np.searchsorted(nodes, x - self.rounding) - unsure
        most = np.searchsorted(nodes, x + self.rounding) + unsure
        at = np.array([np.searchsorted(nodes, x), np.maximum(least, 0), np.minimum(most, len(nodes))])
        return np.where(x > 0, total[at], 0.0)  # no eigenvalue is negative

    def _moments(self, nodes: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Every probe's part of tr Theta and of tr(Theta log Theta) by a rule, ``[2, probes]``."""
        logarithms = np.log(np.where(nodes > 0, nodes, 1.0))
        parts: np.ndarray = self.n * (weights * np.stack([nodes, nodes * logarithms])).sum(2)
        return parts


@dataclass(frozen=True)
class Eigenvalues:
    """The largest eigenvalues of Theta.

    Attributes:
        values: in descending order, ``[top]``.
        errors: each value is within this distance of the eigenvalue with the same index, ``[top]``. From products, this
            fails for each index with a probability of at most :data:`MISSED`, unless a note says that larger
            eigenvalues may be missing; some eigenvalue is always that near.
        passes: passes spent.
        notes: a remark if the tolerance was not reached.
    """

    values: np.ndarray
    errors: np.ndarray
    passes: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ritz:
    """The largest eigenvalues of Theta and their eigenvectors, from products.

    Attributes:
        values: in descending order, ``[top]``.
        residuals: ||Theta v - lambda v|| of each, ``[top]``: there is an eigenvalue within that distance.
        errors: distance within which the eigenvalue with the same index is, ``[top]``, except with a probability of
            :data:`MISSED`, and at least the residual; the residual alone if a note says that larger eigenvalues may be
            missing. See :func:`ritz_pairs`.
        vectors: orthonormal rows, ``[top, n]``.
        following: the next smaller Ritz value and its residual; ``None`` if there is none.
        smallest: the smallest Ritz value found: up to rounding, an upper bound on lambda_min.
        whole: whether the Krylov space is all of R^n, so that ``smallest`` is lambda_min up to rounding.
        rounding: upper bound on what rounding of the products adds to a residual.
        passes: passes spent.
        notes: a remark if the tolerance was not reached.
    """

    values: np.ndarray
    residuals: np.ndarray
    errors: np.ndarray
    vectors: np.ndarray
    following: tuple[float, float] | None
    smallest: float
    whole: bool
    rounding: float
    passes: float
    notes: tuple[str, ...]


EXTRA = 4
"""Vectors of a block beyond the requested eigenvalues, which separate these from the rest of the spectrum."""

NOISE = 100
"""Level of rounding, in machine epsilons of the largest eigenvalue or of the length of a vector."""

HELD = 4
"""Host vectors in float64 per vector of the Krylov space: itself, its image, and a copy of both during a move."""

FEWEST = 3
"""Blocks that the Krylov space has before a restart, at least."""

DOUBLINGS = 80
"""Distances to a Ritz value that are tried, each twice the one before."""

MISSED = 1e-3
"""Largest probability, for each index, that an eigenvalue is outside the stated error."""


def largest(j: JacobianOperator, top: int, *, rtol: float = 1e-3, passes: int = 4096, seed: int = 0) -> Eigenvalues:
    """The largest eigenvalues of Theta; see :func:`ritz_pairs`, which also returns their eigenvectors.

    The errors include the rounding of the products.
    """
    found = ritz_pairs(j, top, rtol=rtol, passes=passes, seed=seed)
    return Eigenvalues(found.values, found.errors + found.rounding, found.passes, found.notes)


def most(n: int, memory: int) -> int:
    """The largest ``top`` of :func:`ritz_pairs` whose Krylov space fits in ``memory`` bytes; 0 if there is none."""
    held = memory // (HELD * 8 * n)
    return n if held >= n else max(held // FEWEST - EXTRA, 0)


def first_step(j: JacobianOperator, top: int) -> int:
    """Passes of the first step of :func:`ritz_pairs`, which is the smallest budget."""
    return min(top + EXTRA, j.n) * (1 + j.passes_per_jvp())


def ritz_pairs(j: JacobianOperator, top: int, *, rtol: float = 1e-3, passes: int = 4096, seed: int = 0) -> Ritz:
    """The largest eigenvalues of Theta = J J^T and their eigenvectors by block Lanczos with full reorthogonalisation.

    The block has ``top`` + 4 random vectors, so that multiple eigenvalues are found. The iteration stops when the
    error of each of the ``top`` largest Ritz values is at most ``rtol`` times the value, or when residual and value are
    both within the rounding of the largest value.

    With the residual r = Theta v - lambda v, some eigenvalue is within ||r|| of lambda. A larger eigenvalue may still
    be missing from the Krylov space. Let the rows of Q be its orthonormal basis, H = Q Theta Q^T and F = Q Theta - H Q.
    An eigenpair (x, u) of Theta has (x I - H) Q u = F u, so the part of u in the first block is no longer than
    ||E^T (x I - H)^-1 F||, where E selects the first block. That part is random. With a probability of at most
    ``MISSED`` it is shorter than :func:`_overlap` for some u in the space of the i largest eigenvalues. Values of x for
    which it would have to be shorter are therefore excluded, and the error reaches up to the first excluded value.

    Costs 2 (top + 4) passes per step. The Krylov space and its image are held in float64 on the host. If they would
    take more than ``j.memory``, the iteration restarts from the ``top`` + 4 largest Ritz vectors; at least three blocks
    are held. After a restart the first block is no longer in the Krylov space, so missing eigenvalues are not excluded:
    errors are the residuals, and a note has the values excluded before.

    Source: Cullum, Donath 1974; Golub, Underwood 1977; the residual bound: Parlett 1980, theorem 4.5.1; the restart:
    Wu, Simon 2000; random first vectors: Kuczynski, Wozniakowski 1992, whose bound holds a priori, while the one used
    here takes account of the Ritz values found.

    Args:
        j: J.
        top: number of eigenvalues; at most n.
        rtol: largest error, relative to each value.
        passes: maximum number of passes.
        seed: seed of the first block.

    Raises:
        BadInput: products are not finite, or the first step takes more than ``passes``.
        OverMemory: three blocks do not fit in ``j.memory``.
    """
    before, block, smallest, trace = j.passes, min(top + EXTRA, j.n), math.inf, 0.0
    if passes < (least := first_step(j, top)):
        raise BadInput(f"top={top} takes at least {least} passes, got passes={passes}")
    held, fits = j.memory // (HELD * 8 * j.n), most(j.n, j.memory)
    if top > fits:
        needed = HELD * 8 * j.n * min(FEWEST * block, j.n)
        raise OverMemory(
            f"top={top} needs {needed} bytes for the Krylov space; memory is {j.memory}, enough for "
            + (f"top={fits}" if fits else "none")
        )
    new = to_numpy(j.rng(seed).normal(block, j.n), np.float64)
    like = j.basis(0, 1)
    basis, images, vectors = np.empty((0, j.n)), np.empty((0, j.n)), np.empty((0, 0))
    last, above = 0, None
    while True:
        lengths = np.linalg.norm(new, axis=1, keepdims=True)
        new = new_directions(new / np.where(lengths > 0, lengths, 1.0), basis, epsilon(like) if len(basis) else None)
        if len(new) == 0:  # the Krylov space is exhausted
            break
        if len(basis) + len(new) > held:
            if above is None:
                above = _excluded(basis, images, last, block, top, rtol)
            basis, images = vectors[:, :block].T @ basis, vectors[:, :block].T @ images
        spent, last = j.passes, len(new)
        new_images = _finite(to_numpy(j.ntk(asarray_like(new, like)), np.float64))
        step = j.passes - spent  # 2 for each vector, or 3 without forward mode
        if not len(basis):  # random directions: the mean of v^T Theta v is tr Theta / n
            trace = float((new * new_images).sum()) * j.n / last
        basis, images = np.concatenate([basis, new]), np.concatenate([images, new_images])
        projected = basis @ images.T
        values, vectors = np.linalg.eigh((projected + projected.T) / 2)
        values, vectors = values[::-1], vectors[:, ::-1]
        trace = max(trace, float(values.sum()))
        smallest = min(smallest, float(values[-1]))
        first, chosen = values[: top + 1], vectors[:, : top + 1]
        residuals = np.linalg.norm(chosen.T @ images - first[:, None] * (chosen.T @ basis), axis=1)
        ends = len(basis) == j.n or j.passes - before + step > passes
        errors, tiny = residuals, np.maximum(residuals, first) <= NOISE * epsilon(like) * values[0]
        if above is None and (ends or (tiny | (errors <= rtol * first))[:top].all()):
            errors = np.maximum(errors, _excluded(basis, images, last, block, top, rtol) - first)
        near = (tiny | (errors <= rtol * first))[:top]
        if ends or near.all():
            break
        new = new_images
    spent = j.passes - before
    short = [f"{v:.3g} within {r:.1g}" for v, r, fine in zip(first, errors, near, strict=False) if not fine]
    notes = [f"rtol={rtol:g} was not reached in {spent:g} passes: {', '.join(short)}"] if short else []
    if above is not None:
        notes.append(
            f"memory={j.memory} holds {held} vectors of length {j.n}: errors are those of the eigenvalues found, and "
            f"larger ones may be missing below {above[0]:.3g}"
        )
    return Ritz(
        first[:top].copy(),
        residuals[:top],
        errors[:top],
        vectors[:, :top].T @ basis,
        (float(first[top]), float(errors[top])) if len(first) > top else None,
        smallest,
        len(basis) == j.n,
        rounding(j) * trace,
        spent,
        tuple(notes),
    )


def _excluded(basis: np.ndarray, images: np.ndarray, last: int, block: int, top: int, rtol: float) -> np.ndarray:
    """Values that no eigenvalue of the same index exceeds, ``[top + 1]``, except with a probability of ``MISSED`` each.

    See :func:`ritz_pairs`. Values are tried in steps of a factor of 2 of their distance to the Ritz value.

    Args:
        basis: orthonormal basis of the Krylov space, whose first ``block`` rows are the first block.
        images: their products with Theta.
        last: number of rows of the last block.
        block: size of the first block.
        top: number of eigenvalues; there is one more value if the Krylov space has one.
        rtol: a relative distance that is tried as well.
    """
    n, projected = basis.shape[1], basis @ images.T
    values, vectors = np.linalg.eigh((projected + projected.T) / 2)
    values, vectors = values[::-1], vectors[:, ::-1]
    first = values[: top + 1]
    outside = images - projected @ basis  # F, of which all but the last block is rounding
    if len(basis) == n or not outside.any():
        return first
    rest = float(np.linalg.norm(outside[:-last]))
    triangle = np.asarray(np.linalg.qr(outside[-last:].T, "r")).T
    residuals = np.linalg.norm(vectors[:, : top + 1].T @ outside, axis=1)
    above = np.full(len(first), math.inf)
    for i, (value, residual) in enumerate(zip(first, residuals, strict=True)):
        nearest = max(float(residual), np.finfo(np.float64).eps * abs(values[0]), np.finfo(np.float64).tiny)
        least = _overlap(n, block, i + 1)
        for distance in sorted({max(rtol * value, nearest), *(nearest * 2.0**k for k in range(DOUBLINGS))}):
            if not (value + distance - values).all():
                continue
            part = vectors[:block] / (value + distance - values)
            longest = np.linalg.norm(part @ vectors[-last:].T @ triangle, 2) + np.linalg.norm(part) * rest
            if longest < least:
                above[i] = value + distance
                break
    return above


def _overlap(n: int, block: int, index: int) -> float:
    """Length of the part in a random block of any unit vector of a subspace, except with probability ``MISSED``.

    The least singular value of a Gaussian matrix ``[block, index]`` has the density that is bounded below, and the
    largest one of a Gaussian ``[block, n]`` is at most sqrt(n) + sqrt(block) + sqrt(2 log(1 / p)).

    Source: Edelman 1988, proposition 5.1; Davidson, Szarek 2001, theorem 2.13.

    Args:
        n: dimension of the space.
        block: number of random vectors, orthonormalised.
        index: dimension of the subspace; at most ``block``.
    """
    free, p = block - index + 1, MISSED / 2
    constant = (math.log(math.pi) - free * math.log(2)) / 2 + gammaln((block + 1) / 2)
    constant -= gammaln(index / 2) + gammaln(free / 2) + gammaln((free + 1) / 2)
    least = math.exp((math.log(p * free / 2) - constant) / free)  # the square root of the least eigenvalue
    return least / (math.sqrt(n) + math.sqrt(block) + math.sqrt(2 * math.log(1 / p)))


def density(j: JacobianOperator, *, probes: int = 4, steps: int = 30, seed: int = 0) -> Density:
    """Stochastic Lanczos quadrature on Theta = J J^T with full reorthogonalisation.

    Every probe is a normalised Gaussian vector with its own Krylov space. All probes advance together, so a step is one
    block of products. A probe whose Krylov space is exhausted continues as a zero vector until the others are done. For
    the spectral measure of one probe the quadrature is exact for polynomials of degree 2 * steps - 1. The mean of that
    measure over probes is the density. The nodes are the distinct eigenvalues once there are as many steps.

    Costs at most 2 * probes * steps passes, and holds probes * steps vectors of length n.

    Source: Golub, Welsch 1969; Bai, Fahey, Golub 1996; Ubaru, Chen, Saad 2017, algorithm 1.

    Args:
        j: J.
        probes: number of random starting vectors.
        steps: number of Lanczos steps; at most n are taken.
        seed: seed of the probes.

    Raises:
        BadInput: no probes or no steps, or products are not finite.
    """
    if probes < 1 or steps < 1:
        raise BadInput(f"probes and steps must be positive, got {probes} and {steps}")
    before = j.passes
    steps = min(steps, j.n)
    u = j.rng(seed).normal(probes, j.n)
    u = u * asarray_like(1 / _lengths(u), u)[:, None]
    basis, diagonal, off_diagonal = [u], [], []
    alive = np.ones(probes, bool)
    for step in range(steps):
        w = j.ntk(basis[-1])
        diagonal.append(_finite(to_numpy((w * basis[-1]).sum(1), np.float64)))
        if step + 1 == steps:
            break
        # The three-term recurrence loses orthogonality as soon as a Ritz value converges; two full passes restore it.
        for _ in range(2):
            for q in basis:
                w = w - (w * q).sum(1)[:, None] * q
        length = _finite(_lengths(w))
        alive = alive & (length > NOISE * epsilon(u) * np.max(diagonal, axis=0))
        off_diagonal.append(np.where(alive, length, 0.0))
        if not alive.any():
            break
        w = w * asarray_like(np.where(alive, 1 / np.where(alive, length, 1.0), 0.0), u)[:, None]
        basis.append(w)
    size = len(diagonal)
    matrices = np.zeros((probes, size, size))
    at = np.arange(size)
    matrices[:, at, at] = np.array(diagonal).T
    if size > 1:
        off = np.array(off_diagonal[: size - 1]).T
        matrices[:, at[:-1], at[1:]] = matrices[:, at[1:], at[:-1]] = off
    exhausted = ~alive | (size == j.n)
    noise = size * epsilon(u) * np.linalg.eigvalsh(matrices)[:, -1:]
    nodes, weights = _quadrature(matrices, noise)
    radau = np.array([m if done else _singular(m) for m, done in zip(matrices, exhausted, strict=True)])
    # Zero vectors of exhausted probes do not belong to a Krylov space.
    own = [1 + int(np.argmin([*column, 0.0])) for column in np.array(off_diagonal[: size - 1]).reshape(-1, probes).T]
    smallest = min(float(np.linalg.eigvalsh(m[:k, :k])[0]) for m, k in zip(matrices, own, strict=True))
    return Density(
        nodes,
        weights,
        *_quadrature(radau, noise),
        exhausted,
        j.n,
        j.passes - before,
        smallest,
        rounding(j) * j.n * float((weights * nodes).sum()),
    )


def rounding(j: JacobianOperator, certificate: float | None = None) -> float:
    """The expected rounding error of Theta in the Frobenius norm, relative to its trace.

    An entry <g, g'> is accurate to that share of ||g|| ||g'||, and the squares of these add up to (tr Theta)^2.

    Args:
        j: J.
        certificate: of Theta itself, if it is not from products.
    """
    return rounding_bound("norm", epsilon(j.basis(0, 1)), max(j.n, j.P), larger(j.certificate, certificate))


def larger(certificate: float | None, other: float | None) -> float | None:
    """The larger of two certificates; ``None`` if there is none."""
    return max((each for each in (certificate, other) if each is not None), default=None)


def _quadrature(matrices: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Lanczos matrices ``[probes, k, k]``; nodes up to ``noise [probes, 1]`` are 0."""
    nodes, vectors = np.linalg.eigh(matrices)
    return np.where(nodes > noise, nodes, 0.0), vectors[:, 0, :] ** 2 / len(matrices)


def _singular(matrix: np.ndarray) -> np.ndarray:
    """A Lanczos matrix ``[k, k]``, made singular by its last entry, for Gauss-Radau quadrature with a node at 0.

    In exact arithmetic the new entry is not larger than the old one.

    Source: Golub 1973, section 7.
    """
    moved, column = matrix.copy(), matrix[:-1, -1]
    solved = np.linalg.lstsq(matrix[:-1, :-1], column, rcond=None)[0] if len(column) else column
    moved[-1, -1] = np.clip(column @ solved, 0.0, matrix[-1, -1])
    return moved


def _lengths(rows: Array) -> np.ndarray:
    """Euclidean lengths in float64, in which squares neither overflow nor underflow."""
    return np.linalg.norm(to_numpy(rows, np.float64), axis=1)


def _finite(found: np.ndarray) -> np.ndarray:
    if not np.isfinite(found).all():
        raise BadInput("products with Theta are nan or infinite: gradients are not finite, or overflow")
    return found


def _wilson(share: np.ndarray, trials: float, z: float) -> np.ndarray:
    """An end of Wilson's interval for a binomial share: the lower one for negative z, the upper one for positive z."""
    spread = z * np.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return np.clip((share + z**2 / (2 * trials) + spread) / (1 + z**2 / trials), 0.0, 1.0)
