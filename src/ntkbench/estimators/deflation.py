"""Deflation: orthonormal bases, Hutch++, and leave-one-out sketches with a calibrated standard error.

Large arrays stay on the device in the operator's precision. The k x k matrices of k probes are moved to the host in
float64, so that all backends share the same small linear algebra.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import array_api_compat
import numpy as np

from ntkbench import metrics
from ntkbench.estimators import standard_errors
from ntkbench.estimators.standard_errors import PointEstimate
from ntkbench.metrics import Moments
from ntkbench.operators import Array, JacobianOperator, Rng, arrays
from ntkbench.operators.arrays import to_numpy

LinearMap = Callable[[Array], Array]
"""Products A u of a matrix A with k vectors, which are rows: ``[k, columns of A] -> [k, rows of A]``."""

ROUNDING = 100
"""Multiple of the machine epsilon, relative to a block of products, below which its directions are rounding."""

# --- bases and blocks


def orthonormal(rows: Array) -> Array:
    """Orthonormal rows ``[min(k, n), n]`` whose span contains that of ``rows [k, n]``, of any rank."""
    return array_api_compat.array_namespace(rows).linalg.qr(rows.T)[0].T


def random_orthonormal(rng: Rng, k: int, n: int, *, max_share: float = 1 / 16) -> Array:
    """min(k, n) random orthonormal rows of length n, from the uniform (Haar) distribution.

    Args:
        rng: generator of the Gaussian block that is made orthonormal.
        k: number of rows.
        n: dimension.
        max_share: largest k / n at which the block is multiplied by the inverse of the Cholesky factor of its Gram
            matrix, which is faster than QR. Its condition number is about (1 + sqrt(k / n)) / (1 - sqrt(k / n)).
    """
    rows = rng.normal(min(k, n), n)
    if k > max_share * n:
        return orthonormal(rows)
    linalg = array_api_compat.array_namespace(rows).linalg
    return linalg.inv(linalg.cholesky(rows @ rows.T)) @ rows


def orthonormal_complement(rows: Array, q: Array) -> Array:
    """Orthonormal rows that span the part of random ``rows [k, n]`` outside the span of the orthonormal rows ``q``.

    The rows must have parts of full rank there; see :func:`new_directions` for others.
    """
    for _ in range(2):  # the second time removes the remainder of rounding
        rows = orthonormal(project_out(rows, q))
    return rows


def new_directions(rows: Array, q: Array, epsilon: float | None = None) -> Array:
    """Orthonormal rows ``[at most k, n]``: the directions of ``rows [k, n]`` outside the span of the orthonormal ``q``.

    Directions that are no larger than the rounding of ``rows`` are left out. They may lie inside the span of ``q``, and
    a basis with them would count it twice.

    Args:
        rows: the block.
        q: the basis.
        epsilon: machine epsilon of ``rows``, if it is not that of their type.
    """
    xp = array_api_compat.array_namespace(rows)
    least = ROUNDING * (epsilon or arrays.epsilon(rows)) * float(xp.linalg.vector_norm(rows))
    for smallest in (least, 0.5):  # the second time removes the remainder of rounding, and what consists of it
        if len(rows):
            basis, r = xp.linalg.qr(project_out(rows, q).T)
            _, sizes, turn = xp.linalg.svd(r.T)
            rows = turn[: int((sizes > smallest).sum())] @ basis.T
    return rows


def project_out(rows: Array, q: Array) -> Array:
    """``rows [k, n]`` less their projection on the span of the orthonormal rows ``q``."""
    return rows - (rows @ q.T) @ q


def squared_norms(j: JacobianOperator, product: LinearMap, rows: Array) -> np.ndarray:
    """||A u||^2 for each row u, ``[k]``; one block of products is held at a time."""
    blocks = (rows[block] for block in arrays.slices(j.blocks(len(rows))))
    return arrays.gather((product(block) ** 2).sum(1) for block in blocks)


def gram(rows: Array, others: Array, *, entries: int = 2**22) -> np.ndarray:
    """``rows others^T`` in float64, on the host; small differences of inner products keep the digits of the vectors.

    Args:
        rows: ``[k, n]``.
        others: ``[r, n]``.
        entries: entries of each array that are copied at a time; at least one column. On the host, a sixteenth of it,
            which stays in the cache.
    """
    same = others is rows
    if arrays.on_host(rows):
        rows, others, entries = to_numpy(rows), to_numpy(others), entries // 16
    found = np.zeros((len(rows), len(others)))
    columns = max(1, entries // max(len(rows), len(others), 1))
    for start in range(0, rows.shape[1], columns):
        one = metrics.double(rows[:, start : start + columns])
        other = one if same else metrics.double(others[:, start : start + columns])
        found += to_numpy(one @ other.T, np.float64)
    return found


# --- a sketch, and Hutchinson on its complement


def mean(values: np.ndarray, dim: int) -> PointEstimate:
    """Mean over probes and its standard error, which is 0 in a space of one dimension: any probe spans it.

    Quadratic forms of a positive matrix that few eigenvalues dominate, as after deflation, are skewed: mean and scatter
    are too small at the same time. If the mean of k has the squared relative error r^2, the chi-squared distribution
    with the same mean and variance has the excess kurtosis 6 k r^2, which reduces the degrees of freedom as in
    :func:`ntkbench.estimators.standard_errors.degrees_of_variance`. The kurtosis of few values is far too small.

    Args:
        values: one for each probe, ``[k]``.
        dim: dimension of the probes.
    """
    if dim == 1:
        return PointEstimate(float(values[0]), 0.0)
    found = standard_errors.mean(values)
    if not found.standard_error > 0 or values.min() < 0:
        return found
    relative = found.standard_error / found.value
    return found._replace(degrees=1 / (1 / found.degrees + 3 * relative**2))


def add(known: float, residual: PointEstimate) -> PointEstimate:
    """The sum of a known number and an estimate."""
    return residual._replace(value=known + residual.value)


def _none() -> int:
    return 0


def with_residual(
    known: float, residual: PointEstimate, probes: int, left: int, epsilon: float, spare: Callable[[], int] = _none
) -> PointEstimate:
    """The sum of a known number and the mean over random signs outside a sketch.

    In a few dimensions, a few random signs often agree by chance, on zero as well. The error is then unknown. Columns
    of the sketch that add nothing to it show, like probes that are zero, that nothing is left. A sum of zero is left to
    the caller.

    Args:
        known: the number.
        residual: the mean.
        probes: number of random sign vectors.
        left: number of dimensions outside the sketch; see :func:`left_outside`.
        epsilon: machine epsilon of products.
        spare: counts the columns of the sketch beyond its rank.
    """
    found = add(known, residual)
    if left == 0 or found.value == 0:
        return found
    zero = standard_errors.is_rounding(abs(residual.value), found.value, epsilon)
    return standard_errors.unless_alike(found, probes + spare() if zero else probes - 1, epsilon)


def spare_columns(sketched: Array, q: Array) -> int:
    """Number of sketched vectors ``[k, n]`` beyond their rank, with their basis ``q``."""
    values = np.linalg.svd(gram(sketched, q), compute_uv=False).tolist()
    return sum(standard_errors.is_rounding(value, values[0], arrays.epsilon(sketched)) for value in values)


def left_outside(columns: int, dim: int, rank: int | None = None, spare: Callable[[], int] = _none) -> int:
    """Dimensions of the range outside a sketch; 0 for probes of a single sign, on which squares do not depend.

    Args:
        columns: number of columns of the sketch.
        dim: size of the matrix.
        rank: its largest possible rank, if it is known.
        spare: as for :func:`with_residual`.
    """
    if dim == 1 or columns >= dim:
        return 0
    return dim - columns if rank is None or columns < rank else max(0, rank - (columns - spare()))


def hutchpp(product: LinearMap, columns: int, residual: int, n: int, rank: int, rng: Rng) -> PointEstimate:
    """Trace of a square matrix by Hutch++ with random signs: ``2 * columns + residual`` products.

    The standard error is that of the residual's mean: given the sketch, the estimate is unbiased. See
    :func:`with_residual`.

    Args:
        product: product with the matrix.
        columns: number of columns of the sketch.
        residual: number of probes for the complement of the sketch.
        n: size of the matrix.
        rank: its largest possible rank.
        rng: generator of both.
    """
    sketched = product(rng.sign(columns, n))
    q = orthonormal(sketched)
    inside = float((q * product(q)).sum())
    g = project_out(rng.sign(residual, n), q)
    outside = mean(arrays.gather([(g * product(g)).sum(1)]), n)
    spare = functools.partial(spare_columns, sketched, q)
    left = left_outside(len(q), n, rank, spare)
    return with_residual(inside, outside, residual, left, arrays.epsilon(g), spare)


def random_subspace(j: JacobianOperator, product: LinearMap, probes: int, dim: int, rng: Rng) -> PointEstimate:
    """||A||_F^2: exact on a random subspace of ``probes // 6`` dimensions, and by Hutchinson on its complement.

    Args:
        j: the operator that ``product`` belongs to, for the sizes of blocks.
        product: product with A.
        probes: number of products.
        dim: number of columns of A.
        rng: generator of the subspace, and of the probes for its complement.
    """
    columns = min(probes // 6, dim)
    q = orthonormal(rng.sign(columns, dim))
    inside = float(squared_norms(j, product, q).sum())
    if columns == dim:
        return PointEstimate(inside, 0.0)
    sizes = j.blocks(probes - columns)
    outside = ((product(project_out(rng.sign(size, dim), q)) ** 2).sum(1) for size in sizes)
    residual = mean(arrays.gather(outside), dim)
    return with_residual(inside, residual, probes - columns, left_outside(columns, dim), j.epsilon)


def from_separate_traces(
    metric: str, jacobians: Sequence[JacobianOperator], trace: Callable[[LinearMap], PointEstimate]
) -> PointEstimate:
    """A metric from independent estimates of the traces of Theta, Theta^2, Theta_f^2 and Theta Theta_f.

    Only the moments that the metric depends on are estimated. Products with a product of two kernels take 4 passes.

    Args:
        metric: name of the metric.
        jacobians: J at theta_0 (and at theta_f, for alignment).
        trace: estimates the trace of a square matrix of size n from products with it.
    """
    theta = [j.ntk for j in jacobians]
    parts: dict[str, PointEstimate] = {}
    if metric in ("trace", "effective_rank"):
        parts["trace"] = trace(theta[0])
    if metric != "trace":
        parts["square"] = trace(lambda u: theta[0](theta[0](u)))
    if metric == "alignment":
        parts["square_f"] = trace(lambda u: theta[1](theta[1](u)))
        parts["cross"] = trace(lambda u: theta[0](theta[1](u)))
    moments = Moments(**{name: part.value for name, part in parts.items()})
    gradient = moments.gradient(metric)
    errors = [getattr(gradient, name) * part.standard_error for name, part in parts.items()]
    degrees = standard_errors.satterthwaite(np.square(errors), [part.degrees for part in parts.values()])
    return PointEstimate(moments.metric(metric), math.hypot(*errors), degrees)


# --- leave-one-out estimates

COVARIANCE_DEGREES = 3
"""Degrees of freedom of the covariance of leave-one-out estimates.

With 3, the 95 % intervals of XNysTrace with 4 to 32 probes have a coverage of at least 91 % on smooth and steep spectra
and around cliffs, and of 83 to 90 % if the rank equals the number of probes (250 runs each, 200 eigenvalues).
"""


class Sketch:
    """A basis of k sketched vectors F, and the directions that it loses when one or two of them are left out.

    With F = Q R, the span of F without column i is that of Q without the direction s_i = R^{-T} e_i / |R^{-T} e_i|.
    Without columns i and j it lacks the span of s_i and s_j (Epperly, Tropp, Webber 2024, section 2). Directions of Q
    that are only rounding, because F has a lower rank or its spectrum decays fast, are kept: Q is still orthonormal,
    and the estimates are those for the matrix that gives the rounded F. Vanishing singular values of R are replaced by
    a tiny one, so that s_i is in their space. If F has more columns than rows, leaving one out loses nothing, and s_i =
    0.

    Attributes:
        q: the basis as orthonormal rows, ``[r, dim]``, on the device.
        r: coordinates of F in the basis, ``[r, k]``, on the host.
        s: unit vectors s_i as columns, ``[r, k]``.
        overlap: mean of (s_i^T s_j)^2 over all pairs.
    """

    def __init__(self, rows: Array) -> None:
        q, r = array_api_compat.array_namespace(rows).linalg.qr(rows.T)
        self.q, self.r = q.T, to_numpy(r, np.float64)
        rank, k = self.r.shape
        if rank < k:
            self.s, self.overlap = np.zeros((rank, k)), 0.0
            return
        left, values, right = np.linalg.svd(self.r)
        floor = np.finfo(np.float64).eps * values[0] or 1.0
        inverse = (left / np.maximum(values, floor)) @ right
        self.s = inverse / np.linalg.norm(inverse, axis=0)
        self.overlap = float((np.linalg.norm(self.s.T @ self.s) ** 2 - k) / (k * max(k - 1, 1)))

    def pair(self, i: int) -> LinearMap:
        """Orthonormalises every s_j against s_i.

        Returns a map that takes the images A s_j of all j under some matrix A, ``[a, k]``, to the images of the
        normalised components of s_j orthogonal to s_i. Column i is 0.
        """
        along = self.s.T @ self.s[:, i]
        rest = self.s - self.s[:, [i]] * along
        # A second time, since s_i and s_j are nearly parallel where the spectrum decays fast.
        again = self.s[:, i] @ rest
        along, rest = along + again, rest - self.s[:, [i]] * again
        length = np.linalg.norm(rest, axis=0)
        length[i] = 0.0
        scale = np.divide(1.0, length, out=np.zeros_like(length), where=length > 1e-14)
        return lambda images: (images - images[:, [i]] * along) * scale


class Normalisation:
    """Factors that put one probe of a Gaussian block on the sphere in the orthogonal complement of the others.

    Args:
        probes: the block, ``[k, n]``.
    """

    def __init__(self, probes: Array) -> None:
        self.k, self.n = probes.shape
        # In float64: a square Gaussian block has a condition number of about n.
        r = to_numpy(array_api_compat.array_namespace(probes).linalg.qr(metrics.double(probes).T)[1], np.float64)
        inverse = np.linalg.inv(r)
        self._inverse_gram = inverse @ inverse.T

    def scale(self, i: int) -> np.ndarray:
        """(dimension of the complement) / |component of u_i in it|^2, ``[k]``.

        The complement is that of all probes but i and j, at entry j; at entry i it is that of all probes but i.
        """
        g = self._inverse_gram
        scale = (self.n - self.k + 2) * (g[i, i] - g[i] ** 2 / g.diagonal())
        scale[i] = (self.n - self.k + 1) * g[i, i]
        return scale


def nystrom_trace(sketch: Sketch, normalisation: Normalisation, h: np.ndarray) -> np.ndarray:
    """Leave-one-out estimates of tr A for A = B^T B, in the form that :func:`leave_one_out` takes, ``[k, k]``.

    With probes Omega, F = B Omega = Q R, and h = (B^T Q)^T (B^T Q), the Nystrom approximation has the trace tr h.
    Without the probes whose directions are V it has tr h - tr V^T h V, and the residual of probe i is |V^T R e_i|^2.

    Args:
        sketch: sketch of F.
        normalisation: normalisation of the probes.
        h: ``[r, r]``.
    """
    s, r = sketch.s, sketch.r
    hs = h @ s
    table = np.empty((r.shape[1],) * 2)
    for i in range(len(table)):
        pair = sketch.pair(i)
        v = pair(s)
        inside = np.trace(h) - s[:, i] @ hs[:, i] - (v * pair(hs)).sum(0)
        table[i] = inside + normalisation.scale(i) * ((s[:, i] @ r[:, i]) ** 2 + (r[:, i] @ v) ** 2)
    return table


def xnystrace(product: LinearMap, adjoint: LinearMap, probes: Array) -> PointEstimate:
    """||B||_F^2 by leave-one-out Nystrom approximations of B^T B, from k products with B and k with B^T.

    Args:
        product: product with B.
        adjoint: product with B^T.
        probes: Gaussian, ``[k, columns of B]``.
    """
    sketch = Sketch(product(probes))
    b = adjoint(sketch.q)
    table = nystrom_trace(sketch, Normalisation(probes), gram(b, b))
    return leave_one_out(table, min(probes.shape[1], sketch.q.shape[1]), sketch.overlap)


def nystrom_inner_product(
    one: Sketch, other: Sketch, normalisation: Normalisation, z: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Leave-one-out estimates of tr(A C) for A = J J^T and C = J_f J_f^T, for :func:`leave_one_out`.

    A = A' + E and C = C' + E_f with Nystrom approximations A' = B B^T, B = J Q, and C' = B_f B_f^T, from the same
    probes. In tr AC = |J_f^T B|^2 + |J^T B_f|^2 - |B_f^T B|^2 + tr E E_f only the last term is unknown. It is the mean
    of <E u, E_f u> over probes left out. Leaving out the probes whose directions are V removes B V from B and adds it
    to E, whose product with probe i is then B V V^T R e_i.

    Args:
        one: sketch of J^T.
        other: sketch of J_f^T.
        normalisation: normalisation of the probes.
        z: B_f^T B.
        x: (J_f^T B)^T (J_f^T B).
        y: (J^T B_f)^T (J^T B_f).
    """
    s, t = one.s, other.s
    zs, zt, xs, yt = z @ s, z.T @ t, x @ s, y @ t
    table = np.empty((s.shape[1],) * 2)
    for i in range(len(table)):
        pair, pair_f = one.pair(i), other.pair(i)
        v, w = pair(s), pair_f(t)
        zv = pair(zs)
        ss, sv, vs, vv = t[:, i] @ zs[:, i], t[:, i] @ zv, zs[:, i] @ w, (w * zv).sum(0)
        known = np.trace(x) - s[:, i] @ xs[:, i] - (v * pair(xs)).sum(0)
        known = known + np.trace(y) - t[:, i] @ yt[:, i] - (w * pair_f(yt)).sum(0)
        both = (z**2).sum() - (zs[:, i] ** 2).sum() - (zv**2).sum(0) - (zt[:, i] ** 2).sum() - (pair_f(zt) ** 2).sum(0)
        known = known - (both + ss**2 + sv**2 + vs**2 + vv**2)
        a, a_f = s[:, i] @ one.r[:, i], t[:, i] @ other.r[:, i]
        p, p_f = one.r[:, i] @ v, other.r[:, i] @ w
        table[i] = known + normalisation.scale(i) * (a_f * a * ss + a_f * p * sv + p_f * a * vs + p_f * p * vv)
    return table


def xtrace_table(
    sketch: Sketch, n: int, h: np.ndarray, fb: np.ndarray, b2: np.ndarray, w: np.ndarray, u2: np.ndarray
) -> np.ndarray:
    """Estimates of XTrace for Theta = J J^T with probes U, for :func:`leave_one_out`, ``[k, k]``.

    Args:
        sketch: sketch of Theta U, with the basis Q.
        n: dimension of the probes.
        h: F^T F for F = J^T Q.
        fb: F^T B for B = J^T U.
        b2: diagonal of B^T B.
        w: Q^T U.
        u2: diagonal of U^T U.
    """
    s = sketch.s
    k = s.shape[1]
    hs = h @ s
    table = np.empty((k, k))
    for i in range(k):
        pair = sketch.pair(i)
        v, hv = pair(s), pair(hs)
        vhv = (v * hv).sum(0)
        # x: coordinates in Q of the projection of u_i on the sketch without i. Without j too, it is x - a v.
        x = w[:, i] - s[:, i] * (s[:, i] @ w[:, i])
        hx = h @ x
        a = w[:, i] @ v
        residual = b2[i] - 2 * (x @ fb[:, i]) + x @ hx
        residual = residual + 2 * a * ((fb[:, i] - hx) @ v) + a**2 * vhv
        length = u2[i] - x @ x + a**2
        dimension = np.full(k, n - k + 2)
        dimension[i] -= 1
        # The complement of a complete basis is round-off.
        scale = np.divide(dimension, length, out=np.zeros(k), where=length > 1e-14 * u2[i])
        table[i] = np.trace(h) - s[:, i] @ hs[:, i] - vhv + scale * np.maximum(residual, 0.0)
    return table


def leave_one_out(
    table: np.ndarray, n: float = math.inf, overlap: float = 0.0, *, cautious: bool = False
) -> PointEstimate:
    """Mean of k leave-one-out estimates, with a standard error that includes their covariance.

    The k estimates on the diagonal share their sketches, so their scatter s^2 / k, the usual error estimate, misses
    their covariance. It amounts to about half of the variance for typical spectra, and to a fifth for steep ones. (The
    jackknife over probes is too large: 3 times the variance typically, 20 to 60 times for steep spectra.) Let d_ij =
    table[i, i] - table[i, j]. Each estimate is unbiased whatever the other probes are, and table[i, j] and table[j, i]
    are independent given the others. So the covariance is E d_ij d_ji, and s^2 / k + mean d_ij d_ji is an unbiased
    estimate of the variance. If the spectrum has a cliff just below k, a sketch with one probe fewer is much worse and
    the second term is mostly noise. It is therefore clipped to between -1/2 and 8 times the first, which makes the
    squared error about 0.8 of the variance for spectra like 0.7^i. The upper limit is larger if the estimates are
    almost the same. It grows with n / (n - k + 1) if few dimensions are left outside the sketch. If all sketches lose
    almost the same direction, as with a rank of k, it is the ratio of the two terms for estimates whose correlation is
    ``overlap``. The second term varies as much as a mean of a few squares, and counts with :data:`COVARIANCE_DEGREES`
    degrees of freedom.

    Args:
        table: entry (i, j) is probe i's estimate with a sketch of the probes other than i and j, ``[k, k]``.
        n: the largest rank that the matrix may have. There are at most n - k degrees of freedom. A single probe of a
            matrix of rank 1 counts as exact: methods draw two or more unless their space has one dimension.
        overlap: the mean squared cosine between the directions that two sketches lose (:attr:`Sketch.overlap`).
        cautious: whether the covariance counts with its absolute value, and up to 30 times the first term. For ratios
            of moments of steep spectra, whose errors have long tails, this raises the coverage with a few probes from
            0.82 to 0.90.
    """
    k = len(table)
    if k == n == 1:
        return PointEstimate(float(table[0, 0]), 0.0)
    value, error, degrees = standard_errors.mean(table.diagonal())
    gained = table.diagonal()[:, None] - table
    covariance = (gained * gained.T).sum() / (k * (k - 1)) if k > 1 else math.nan
    most = max((30 if cautious else 8) / max(1 - (k - 1) / n, 1 / n), k * overlap / max(1 - overlap, 1e-9))
    added = min(abs(covariance) if cautious else max(covariance, -0.5 * error**2), most * error**2)
    together = standard_errors.satterthwaite([error**2, added], [degrees, COVARIANCE_DEGREES])
    return PointEstimate(value, math.sqrt(error**2 + added), min(degrees, together, max(1.0, n - k)))
