"""What estimators that deflate share: bases, Hutch++, and leave-one-out sketches with an honest standard error.

Large arrays stay on the device in the operator's precision. What remains of k probes is k x k and goes to the host in
float64, so both backends do the same small linear algebra.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import array_api_compat
import numpy as np

from ntkbench.estimators import standard_errors
from ntkbench.estimators.standard_errors import Reading
from ntkbench.metrics import Moments
from ntkbench.operators import Array, JacobianOperator, Rng

Operator = Callable[[Array], Array]
"""A product with a matrix that takes and gives rows: ``[k, columns] -> [k, rows]``."""

# --- bases and blocks


def orthonormal(rows: Array) -> Array:
    """Orthonormal rows ``[min(k, n), n]`` whose span holds that of ``rows [k, n]``; any rank."""
    return array_api_compat.array_namespace(rows).linalg.qr(rows.T)[0].T


def frame(rng: Rng, k: int, n: int) -> Array:
    """min(k, n) random orthonormal rows ``[k, n]``, all such frames equally likely: a Gaussian block made orthonormal.

    Few rows in many dimensions are nearly orthogonal as they are drawn (their condition number is at most 5/3 or so for
    k = n / 16), and the inverse of a Cholesky factor of their Gram matrix is the quickest way on.
    """
    rows = rng.normal(min(k, n), n)
    if 16 * k > n:
        return orthonormal(rows)
    linalg = array_api_compat.array_namespace(rows).linalg
    return linalg.inv(linalg.cholesky(rows @ rows.T)) @ rows


def beyond(rows: Array, q: Array) -> Array:
    """Orthonormal rows for the part of ``rows [k, n]`` outside the span of the orthonormal rows ``q``."""
    for _ in range(2):  # once leaves what rounding brought back
        rows = orthonormal(without(rows, q))
    return rows


def without(rows: Array, q: Array) -> Array:
    """``rows [k, n]`` less their part in the span of the orthonormal rows ``q``."""
    return rows - (rows @ q.T) @ q


def squared_lengths(j: JacobianOperator, product: Operator, rows: Array) -> np.ndarray:
    """||A u||^2 for each row u; one block of products is held at a time."""
    ends = np.cumsum([0, *j.blocks(len(rows))])
    blocks = (rows[start:stop] for start, stop in itertools.pairwise(ends))
    return standard_errors.by_probe((product(block) ** 2).sum(1) for block in blocks)


def on_host(array: Array) -> np.ndarray:
    """A small array in float64 on the host."""
    return standard_errors.on_host(array).astype(np.float64)


def beside(array: np.ndarray, like: Array) -> Array:
    """A small host array in the precision and on the device of another."""
    xp = array_api_compat.array_namespace(like)
    return xp.asarray(array, dtype=like.dtype, device=array_api_compat.device(like))


def precision(array: Array) -> float:
    """Machine epsilon of an array's entries."""
    return float(array_api_compat.array_namespace(array).finfo(array.dtype).eps)


# --- sketch first, then Hutchinson on what is left


def plus(inside: float, outside: Reading) -> Reading:
    """What a sketch holds for certain and what probes say of the rest."""
    return outside._replace(value=inside + outside.value)


def hutchpp(product: Operator, columns: int, residual: int, n: int, rng: Rng) -> Reading:
    """Hutch++ for the trace of a square operator with random signs: 2 * columns + residual products.

    The standard error is that of the residual's mean. Given the sketch the estimate is unbiased, so no more is needed.
    """
    q = orthonormal(product(rng.sign(columns, n)))
    inside = float((q * product(q)).sum())
    g = without(rng.sign(residual, n), q)
    return plus(inside, standard_errors.mean(standard_errors.by_probe([(g * product(g)).sum(1)])))


def random_directions(j: JacobianOperator, product: Operator, probes: int, dim: int, rng: Rng) -> Reading:
    """||A||_F^2 by a sixth of the probes as an orthonormal basis, exactly, and Hutchinson on its complement."""
    columns = min(probes // 6, dim)
    q = orthonormal(rng.sign(columns, dim))
    inside = float(squared_lengths(j, product, q).sum())
    if columns == dim:
        return Reading(inside, 0.0)
    sizes = j.blocks(probes - columns)
    lengths = ((product(without(rng.sign(size, dim), q)) ** 2).sum(1) for size in sizes)
    return plus(inside, standard_errors.mean(standard_errors.by_probe(lengths)))


def from_separate_traces(
    metric: str, jacobians: Sequence[JacobianOperator], trace: Callable[[Operator], Reading]
) -> Reading:
    """A metric and its standard error from estimates of tr Theta, tr Theta^2 and tr Theta Theta_f, each by itself.

    Args:
        metric: which metric.
        jacobians: J at theta_0 (and at theta_f, for alignment).
        trace: estimates the trace of a square operator on rows ``[k, n]``, with its standard error.
    """
    theta = [j.ntk for j in jacobians]
    parts: dict[str, Reading] = {}
    if metric in ("trace", "effective_rank"):
        parts["trace"] = trace(theta[0])
    if metric != "trace":
        parts["square"] = trace(lambda u: theta[0](theta[0](u)))
    if metric == "alignment":
        parts["square_f"] = trace(lambda u: theta[1](theta[1](u)))
        parts["cross"] = trace(lambda u: theta[0](theta[1](u)))
    moments = Moments(**{name: part.value for name, part in parts.items()})
    slopes = moments.gradient(metric)
    errors = [getattr(slopes, name) * part.error for name, part in parts.items()]
    degrees = standard_errors.of_sum(zip(errors, (part.degrees for part in parts.values()), strict=True))
    return Reading(moments.metric(metric), math.hypot(*errors), degrees)


# --- leave-one-out


class Sketch:
    """A basis of k sketched vectors, and what of it is lost when one or two of them are left out.

    With F = Q R, the span of F without column i is Q's without the direction s_i = R^{-T} e_i / |R^{-T} e_i|, and
    without columns i and j it lacks the span of s_i and s_j (Epperly, Tropp, Webber 2024, section 2). Where F has
    not full rank numerically no direction is lost by leaving one out, so s_i = 0; this also keeps round-off from
    being inverted.

    Attributes:
        q: the basis as orthonormal rows, ``[r, dim]``, on the device.
        r: coordinates of F in the basis, ``[r, k]``, on the host.
        s: unit vectors s_i as columns, ``[r, k]``.
    """

    def __init__(self, rows: Array) -> None:
        xp = array_api_compat.array_namespace(rows)
        q, r = xp.linalg.qr(rows.T)
        self.q, self.r = q.T, on_host(r)
        left, values, right = np.linalg.svd(self.r, full_matrices=False)
        k = self.r.shape[1]
        rank = max(1, int((values > precision(rows) * max(rows.shape) * values[0]).sum()))
        if rank == k:
            inverse = (left / values) @ right
            self.s = inverse / np.linalg.norm(inverse, axis=0)
        else:
            self.q = beside(left[:, :rank].T, rows) @ self.q
            self.r = values[:rank, None] * right[:rank]
            self.s = np.zeros((rank, k))

    def pair(self, i: int) -> Operator:
        """For i and every j, maps the images A s_j ``[a, k]`` to those of the unit vectors that s_j adds to s_i.

        Column i, where nothing is added, is 0.
        """
        along = self.s.T @ self.s[:, i]
        rest = self.s - self.s[:, [i]] * along
        # Once more: near-parallel s_i and s_j are the rule where a spectrum decays fast.
        again = self.s[:, i] @ rest
        along, rest = along + again, rest - self.s[:, [i]] * again
        length = np.linalg.norm(rest, axis=0)
        length[i] = 0.0
        scale = np.divide(1.0, length, out=np.zeros_like(length), where=length > 1e-14)
        return lambda images: (images - images[:, [i]] * along) * scale


class Complement:
    """Factors that make one probe of a Gaussian block uniform on the sphere outside the others' span."""

    def __init__(self, probes: Array) -> None:
        self.k, self.n = probes.shape
        r = on_host(array_api_compat.array_namespace(probes).linalg.qr(probes.T)[1])
        inverse = np.linalg.inv(r)
        self._inverse_gram = inverse @ inverse.T

    def scale(self, i: int) -> np.ndarray:
        """(dimension of the complement) / |part of u_i in it|^2, for the others but j; at j = i for all others."""
        g = self._inverse_gram
        scale = (self.n - self.k + 2) * (g[i, i] - g[i] ** 2 / g.diagonal())
        scale[i] = (self.n - self.k + 1) * g[i, i]
        return scale


def nystrom_trace(sketch: Sketch, outside: Complement, h: np.ndarray) -> np.ndarray:
    """Estimates ``[k, k]`` of tr A for a Nystrom approximation A<Omega> that leaves probes out, as in :func:`combined`.

    With A = B^T B, F = B Omega = Q R and h = (B^T Q)^T (B^T Q): tr A<Omega> = tr h, and without the probes of a set
    with directions V it is tr h - tr V^T h V, the residual of probe i being |V^T R e_i|^2.
    """
    s, r = sketch.s, sketch.r
    hs = h @ s
    table = np.empty((r.shape[1],) * 2)
    for i in range(len(table)):
        pair = sketch.pair(i)
        v = pair(s)
        inside = np.trace(h) - s[:, i] @ hs[:, i] - (v * pair(hs)).sum(0)
        table[i] = inside + outside.scale(i) * ((s[:, i] @ r[:, i]) ** 2 + (r[:, i] @ v) ** 2)
    return table


def xnystrace(product: Operator, back: Operator, probes: Array) -> Reading:
    """||B||_F^2 by leave-one-out Nystrom approximations of B^T B from k Gaussian probes: k products each way.

    Args:
        product: with B.
        back: with B^T.
        probes: ``[k, dim]``.
    """
    sketch = Sketch(product(probes))
    b = back(sketch.q)
    return combined(nystrom_trace(sketch, Complement(probes), on_host(b @ b.T)))


def nystrom_inner_product(
    one: Sketch, other: Sketch, outside: Complement, z: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Estimates ``[k, k]`` of tr(A C) for A = J J^T, C = J_f J_f^T and shared probes, as in :func:`combined`.

    A = A' + E and C = C' + E_f with Nystrom approximations A' = B B^T, B = J Q, and C' = B_f B_f^T. Of
    tr AC = |J_f^T B|^2 + |J^T B_f|^2 - |B_f^T B|^2 + tr E E_f only the last is not known: it is the mean of
    <E u, E_f u> over probes left out. Leaving probes with directions V out takes B V from B and adds it to E, whose
    product with probe i is B V V^T R e_i.

    Args:
        one, other: sketches of J^T and J_f^T.
        outside: of the probes.
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
        table[i] = known + outside.scale(i) * (a_f * a * ss + a_f * p * sv + p_f * a * vs + p_f * p * vv)
    return table


def combined(table: np.ndarray) -> Reading:
    """Value and standard error of a leave-one-out estimate: the mean of the diagonal.

    ``table[i, j]`` is probe i's estimate with a sketch of the probes other than i and j; the k estimates of the
    diagonal leave out their own probe only, and share their sketches, so their scatter s^2 / k alone (the usual error
    estimate) misses their covariance: it is about half of the variance for typical spectra and a fifth for steep ones.
    (The jackknife over probes errs the other way: 3 times the variance typically, 20 to 60 times for steep spectra.)
    Let d_ij = table[i, i] - table[i, j]. Each estimate has the right mean whatever the other probes are, table[i, j]
    and table[j, i] are independent given the others, so the covariance is E d_ij d_ji, and
    s^2 / k + mean d_ij d_ji is an unbiased estimate of the variance. A sketch of two probes fewer is much worse than
    one of one fewer where the spectrum has a cliff just there; then the second term is all noise, so it is confined to
    -1/2 to 8 times the first. That makes the squared error about 0.8 of the variance for spectra like 0.7^i.
    """
    k = len(table)
    value, error, degrees = standard_errors.mean(table.diagonal())
    gained = table.diagonal()[:, None] - table
    covariance = (gained * gained.T).sum() / (k * (k - 1)) if k > 1 else math.nan
    return Reading(value, math.sqrt(error**2 + float(np.clip(covariance, -0.5 * error**2, 8 * error**2))), degrees)
