"""The spectrum of Theta as a result: eigenvalues with bounds, condition number, entropy effective rank, density."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ntkbench import options
from ntkbench.errors import BadInput
from ntkbench.estimate import Estimate
from ntkbench.estimators import lanczos
from ntkbench.operators import JacobianOperator
from ntkbench.operators.arrays import asarray_like, to_numpy
from ntkbench.units import counted

PROBES, STEPS = 8, 25
"""Probes and steps of the density if Theta does not fit. The interval of the entropy effective rank has 7 degrees of
freedom, as it is skewed where few eigenvalues dominate."""

SHARE = 4
"""The density takes at most 1 / ``SHARE`` of the passes."""

SHOWN = 5
"""Number of eigenvalues in a printed spectrum."""


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    """The spectrum of Theta = J J^T.

    The bounds allow for the expected rounding of the network's own passes (see
    :func:`ntkbench.estimate.rounding_bound`).

    >>> import torch, ntkbench
    >>> found = ntkbench.spectrum(torch.nn.Linear(3, 2), torch.eye(3), top=4)
    >>> found.values.round(4).tolist()
    [4.0, 4.0, 1.0, 1.0]

    Attributes:
        values: the largest eigenvalues in descending order, ``[top]``.
        errors: each value is within that distance of the eigenvalue with the same index, ``[top]``. From products this
            fails for each index with a probability of at most :data:`ntkbench.estimators.lanczos.MISSED`, unless a note
            says that larger eigenvalues may be missing; some eigenvalue is always that near.
        vectors: their eigenvectors of length 1, ``[top, n]`` with outputs sample-major. Signs are arbitrary.
        vector_errors: upper bounds on the sine of each vector's angle to an eigenvector, ``[top]``; 1 if the eigenvalue
            is multiple up to its error. From products this assumes that no eigenvalue is missing.
        smallest: the smallest eigenvalue; from products the smallest Ritz value, an upper bound on it.
        smallest_bounds: lower and upper bound on the smallest eigenvalue.
        entropy_effective_rank: exp(-sum_i p_i log p_i) with p_i = lambda_i / tr Theta, with its interval; ``nan`` if
            Theta is zero. Without the whole matrix, the interval accounts for the choice of probes and for further
            steps.
        density: the spectral density as weighted nodes, see :class:`ntkbench.estimators.lanczos.Density`; its
            ``shares(edges)`` are a histogram with intervals. If Theta was decomposed as a whole, the nodes are all n
            eigenvalues.
        n: size of Theta.
        passes: passes spent.
        method: ``"eigh"`` of all of Theta, or ``"block_lanczos"``, matrix-free.
        notes: remarks, such as a tolerance that was not reached.
        certificate: the largest relative difference between a gradient that was used and the same by plain autograd.
    """

    values: np.ndarray
    errors: np.ndarray
    vectors: np.ndarray
    vector_errors: np.ndarray
    smallest: float
    smallest_bounds: tuple[float, float]
    entropy_effective_rank: Estimate
    density: lanczos.Density
    n: int
    passes: float
    method: str
    notes: tuple[str, ...] = ()
    certificate: float | None = None

    @property
    def largest(self) -> float:
        """The largest eigenvalue."""
        return float(self.values[0])

    @property
    def condition_bounds(self) -> tuple[float, float]:
        """Bounds on the condition number lambda_max / lambda_min; infinite where lambda_min may be zero.

        They are ``nan`` if Theta is zero.
        """
        low, high = self.smallest_bounds
        top, error = self.largest, float(self.errors[0])
        if top <= 0:
            return math.nan, math.nan
        return max(_ratio(max(top - error, 0.0), high), 1.0), _ratio(top + error, low)

    @property
    def condition_number(self) -> float:
        """lambda_max / lambda_min; ``nan`` if :attr:`condition_bounds` have no upper end, as from products."""
        low, high = self.condition_bounds
        if math.isinf(low):
            return math.inf
        return self.largest / self.smallest if math.isfinite(high) else math.nan

    def log_determinant(self, ridge: float = 0.0, confidence: float = 0.95) -> tuple[float, float, float]:
        """log det(Theta + ridge I) and the two ends of its interval, for the evidence of a Gaussian process.

        It is exactly ``-inf`` if there are fewer parameters than outputs and no ridge. See
        :meth:`ntkbench.estimators.lanczos.Density.log_determinant`. Costs no passes.

        Args:
            ridge: constant added to each eigenvalue, in their units; 0 or more.
            confidence: confidence level of the interval.

        Raises:
            BadInput: the ridge is negative.
        """
        ridge = options.not_negative("ridge", ridge)
        if ridge == 0 and self.smallest_bounds[1] == 0:
            return -math.inf, -math.inf, -math.inf
        return self.density.log_determinant(ridge, confidence)

    def __repr__(self) -> str:
        more = [f"... ({len(self.values)} values)"] if len(self.values) > SHOWN else []
        pairs = list(zip(self.values, self.errors, strict=True))[:SHOWN]
        low, high = self.condition_bounds
        condition = f"{self.condition_number:.6g}, in [{low:.6g}, {high:.6g}]"
        if math.isinf(high):
            condition = "infinite" if math.isinf(low) else f"at least {low:.3g}"
        elif math.isnan(high):
            condition = "not defined, as Theta is zero"
        certified = "" if self.certificate is None else f", certified to {self.certificate:.1e}"
        rows = (
            ("largest eigenvalues", ", ".join([f"{v:.6g} +- {e:.1g}" for v, e in pairs] + more)),
            ("smallest eigenvalue", "in [{:.3g}, {:.3g}]".format(*self.smallest_bounds)),
            ("condition number", condition),
            ("entropy effective rank", str(self.entropy_effective_rank)),
        )
        cost = counted(self.passes, "pass", "passes")
        head = f"spectrum of Theta, {self.n} x {self.n} ({self.method}, {cost}){certified}"
        return "\n".join([head, *(f"  {name:<24}{said}" for name, said in rows), *(f"  {note}" for note in self.notes)])


def of_matrix(
    theta: np.ndarray, j: JacobianOperator, top: int, passes: float, certificate: float | None = None
) -> Spectrum:
    """The spectrum of a whole Theta ``[n, n]`` by its eigenvalue decomposition in float64 on the host.

    Costs O(n^3) operations and four matrices of Theta's size in float64. Two more passes compare Theta with J J^T at
    the first eigenvector. By Weyl's inequality the error of an eigenvalue is at most the norm that rounding and this
    comparison allow for; eigenvectors follow by Davis and Kahan 1970, the entropy by Audenaert 2007, equation 4.

    Args:
        theta: the matrix.
        j: J, for the comparison.
        top: number of requested eigenvalues.
        passes: passes spent on the matrix.
        certificate: of the matrix.
    """
    before, singular = j.passes, j.n > j.P
    values, columns = np.linalg.eigh(theta)
    values, vectors = values[::-1], columns[:, ::-1][:, :top].T.copy()
    image = to_numpy(j.ntk(asarray_like(vectors[:1], j.basis(0, 1))), np.float64)[0]
    trace = float(abs(values).sum())
    certificate = lanczos.larger(j.certificate, certificate)
    error = max(lanczos.rounding(j, certificate) * trace, float(np.linalg.norm(image - values[0] * vectors[0])))
    angles = _angles(values, np.full(j.n, error), top)
    values, errors = np.maximum(values, 0.0), np.full(j.n, error)
    values[j.P :], errors[j.P :] = 0.0, 0.0  # the rank is at most P
    smallest, spent = float(values[-1]), passes + j.passes - before
    nodes, weights = values[None, ::-1], np.full((1, j.n), 1 / j.n)
    density = lanczos.Density(nodes, weights, nodes, weights, np.array([True]), j.n, spent, smallest, error, whole=True)
    rank = Estimate(
        density.entropy_effective_rank,
        None,
        spent,
        "eigh",
        metric="entropy_effective_rank",
        certificate=certificate,
        rounding=entropy_rounding(j.n, min(error / trace, 1.0) if trace else 0.0),
    )
    return Spectrum(
        values[:top].copy(),
        errors[:top],
        vectors,
        angles,
        smallest,
        (0.0, 0.0) if singular else (max(smallest - error, 0.0), smallest + error),
        rank,
        density,
        j.n,
        spent,
        "eigh",
        j.notes,
        certificate,
    )


def of_operator(j: JacobianOperator, top: int, *, rtol: float = 1e-3, passes: int = 4096, seed: int = 0) -> Spectrum:
    """The spectrum of Theta from products alone: block Lanczos for the top, stochastic Lanczos quadrature for the rest.

    The density has 8 probes of 25 steps, or fewer steps if that would take more than a quarter of ``passes`` or of
    ``j.memory``. See :func:`ntkbench.estimators.lanczos.ritz_pairs` and :func:`ntkbench.estimators.lanczos.density`.

    Args:
        j: J.
        top: number of requested eigenvalues; at most n.
        rtol: largest error, relative to each value.
        passes: maximum number of passes.
        seed: seed of all random vectors.

    Raises:
        BadInput: two steps of the density and one of block Lanczos take more than ``passes``; or as for ``ritz_pairs``.
        OverMemory: as for ``ritz_pairs``.
    """
    product = 1 + j.passes_per_jvp()
    before, least = j.passes, min(2, j.n) * product * PROBES + lanczos.first_step(j, top)
    if passes < least:
        raise BadInput(f"a spectrum with top={top} takes at least {least} passes, got passes={passes}")
    fit = j.memory // (SHARE * PROBES * j.n * j.itemsize)
    steps = max(2, min(STEPS, passes // (SHARE * product * PROBES), fit))
    density = lanczos.density(j, probes=PROBES, steps=steps, seed=seed)
    found = lanczos.ritz_pairs(j, top, rtol=rtol, passes=passes - int(j.passes - before), seed=seed)
    error = max(lanczos.rounding(j) * density.trace, found.rounding)
    ritz, errors = found.values, found.errors + error
    if found.following is not None:
        value, distance = found.following
        ritz, errors = np.append(ritz, value), np.append(errors, distance + error)
    singular = j.n > j.P
    smallest = 0.0 if singular else max(min(found.smallest, density.smallest), 0.0)
    spent = j.passes - before
    middle = math.sqrt(density.entropy_lower_bound * density.entropy_effective_rank)
    rank = Estimate(
        middle,
        density.entropy_standard_error,
        spent,
        "block_lanczos",
        metric="entropy_effective_rank",
        degrees=PROBES - 1,
        certificate=j.certificate,
        rounding=density.entropy_effective_rank / middle - 1 + entropy_rounding(j.n, lanczos.rounding(j)),
    )
    return Spectrum(
        np.maximum(found.values, 0.0),
        errors[:top],
        found.vectors,
        _angles(ritz, errors, top),
        smallest,
        (max(smallest - error, 0.0) if found.whole else 0.0, 0.0 if singular else smallest + error),
        rank,
        density,
        j.n,
        spent,
        "block_lanczos",
        (*found.notes, *j.notes),
        j.certificate,
    )


def _angles(values: np.ndarray, errors: np.ndarray, top: int) -> np.ndarray:
    """Bounds on the sines of angles to eigenvectors: an eigenvalue's error over its distance to the others."""
    bounds = np.ones(top)
    for i in range(top):
        gap = np.delete(abs(values - values[i]) - errors, i).min(initial=math.inf)
        if gap > errors[i]:
            bounds[i] = errors[i] / gap
    return bounds


def entropy_rounding(n: int, share: float) -> float:
    """Bound on the relative change of the entropy effective rank if Theta changes by a share of its trace.

    The change is in the Frobenius norm. By Audenaert 2007, equation 4, as sqrt(n) times this norm bounds the trace
    norm.

    Args:
        n: size of Theta.
        share: the change relative to tr Theta.
    """
    return math.expm1(min(_entropy_change(math.sqrt(n) * share, n), 700.0))


def _entropy_change(distance: float, n: int) -> float:
    """The largest difference of the entropies of two distributions over n with trace distance at most ``distance``."""
    t = min(distance, 1 - 1 / n)
    mixing = -sum(p * math.log(p) for p in (t, 1 - t) if p > 0)
    return t * math.log(max(n - 1, 1)) + mixing


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else math.inf
