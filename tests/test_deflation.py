"""Estimators with deflation, on Jacobians with prescribed spectra."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import array_api_compat
import numpy as np
import pytest
import torch
from conftest import metrics_of, mostly_slow
from scipy import stats

import ntkbench
from ntkbench import methods
from ntkbench.estimators import deflation, standard_errors
from ntkbench.methods.base import Accumulating, FixedBudget, Stochastic
from ntkbench.operators import arrays, base, dense

n, P = 200, 230
i = np.arange(1, n + 1)
SPECTRA = {
    "linear": np.linspace(1, 3, n),
    "square": i**-2.0,
    "0.9^i": 0.9**i,
    "0.7^i": 0.7**i,
    "cliff": np.where(i <= n // 20, 1, 1e-3),
    "deep cliff": np.where(i <= n // 20, 1, 1e-8),
    "1/i": 1 / i,
    "spike": np.where(i == 1, 30, 1 / i),
}
SMOOTH = ("linear", "square", "0.9^i", "0.7^i", "1/i", "spike")
DISTINCT = ("linear", "square", "deep cliff", "spike")
"""A flat spectrum, a smooth decay, a numerical rank below n, and one large eigenvalue."""

LEAVE_ONE_OUT = ("xtrace", "xnystrace", "xnystrace_forward")
TRACES = (
    *LEAVE_ONE_OUT,
    "hutchpp",
    "hutchpp_one_sided",
    "hutchpp_paper",
    "nystrompp",
    "one_sided_paper_forward",
    "one_sided_paper_reverse",
)
DEFLATED = (*LEAVE_ONE_OUT, "hutchpp", "hutchpp_one_sided", "nystrompp", "nystrom_loo")
CASES = [(name, metric) for name in sorted({*TRACES, *DEFLATED}) for metric in methods.get(name).metrics]

STOCHASTIC = [name for name in methods.names() if isinstance(methods.get(name), Accumulating | FixedBudget)]


class Probes(base.Rng):
    """Probes from NumPy, the same for every array library."""

    def __init__(self, seed: int, like: Any) -> None:
        self._generator, self._like = np.random.default_rng(seed), like

    def normal(self, k: int, dim: int) -> Any:
        return arrays.asarray_like(self._generator.standard_normal((k, dim)), self._like)

    def sign(self, k: int, dim: int) -> Any:
        return arrays.asarray_like(self._generator.choice([-1.0, 1.0], (k, dim)), self._like)


class Dense(dense.DenseJacobian):
    """An explicit Jacobian in the array library of ``matrix``, with probes from :class:`Probes`."""

    def __init__(self, matrix: Any) -> None:
        super().__init__(matrix, functools.partial(Probes, like=matrix), memory=2**20)


@functools.cache
def jacobian(spectrum: str | tuple[float, ...], seed: int = 0, parameters: int = P) -> np.ndarray:
    """J with the given eigenvalues of J J^T and random singular vectors."""
    eigenvalues = np.asarray(SPECTRA[spectrum] if isinstance(spectrum, str) else spectrum)
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))[0]
    right = np.linalg.qr(rng.standard_normal((parameters, len(eigenvalues))))[0]
    return (left * np.sqrt(eigenvalues)) @ right.T


def ends(metric: str, spectrum: str | tuple[float, ...]) -> list[np.ndarray]:
    """J, and for the alignment a second one that is correlated with it."""
    J = jacobian(spectrum)
    return [J, 0.6 * J + 0.8 * jacobian(spectrum, 1)] if metric == "alignment" else [J]


@functools.cache
def truth(metric: str, spectrum: str | tuple[float, ...]) -> float:
    return metrics_of(*(J @ J.T for J in ends(metric, spectrum)))[metric]


def estimate(
    name: str, metric: str, spectrum: str | tuple[float, ...], probes: int, seed: int = 0
) -> tuple[float, float]:
    return drawn(methods.get(name), metric, ends(metric, spectrum), probes, seed)[:2]


def drawn(method: Stochastic, metric: str, matrices: list[Any], probes: int, seed: int) -> tuple[float, float, float]:
    """Value, standard error and passes."""
    jacobians = [Dense(matrix) for matrix in matrices]
    if isinstance(method, Accumulating):
        accumulator = method.accumulator((metric,), jacobians, jacobians[0].rng(seed))
        accumulator.extend(probes)
        value, error, _ = accumulator.estimate(metric)
    else:
        value, error, _ = method.draw(metric, jacobians, probes, jacobians[0].rng(seed))
    return value, error, sum(j.passes for j in jacobians)


def table(kind: str, u: np.ndarray, *matrices: np.ndarray) -> np.ndarray:
    """The leave-one-out table of the library for probes ``u [k, n]``."""
    if kind == "xtrace":
        (J,) = matrices
        b = u @ J
        sketch = deflation.Sketch(b @ J.T)
        f = sketch.q @ J
        return deflation.xtrace_table(
            sketch, u.shape[1], f @ f.T, f @ b.T, (b * b).sum(1), sketch.q @ u.T, (u * u).sum(1)
        )
    sketches = [deflation.Sketch(u @ J) for J in matrices]
    images = [sketch.q @ J.T for sketch, J in zip(sketches, matrices, strict=True)]
    normalisation = deflation.Normalisation(u)
    if kind == "trace":
        return deflation.nystrom_trace(sketches[0], normalisation, images[0] @ images[0].T)
    x, y = images[0] @ matrices[-1], images[-1] @ matrices[0]
    return deflation.nystrom_inner_product(
        sketches[0], sketches[-1], normalisation, images[-1] @ images[0].T, x @ x.T, y @ y.T
    )


def by_hand(kind: str, i: int, others: np.ndarray, u: np.ndarray, *matrices: np.ndarray) -> float:
    """Probe i's estimate with a sketch of the probes ``others``, from explicit matrices."""
    thetas = [J @ J.T for J in matrices]
    A, C, omega, size = thetas[0], thetas[-1], u[others].T, u.shape[1]
    if kind == "xtrace":
        q = np.linalg.qr(A @ omega)[0]
        g = u[i] - q @ (q.T @ u[i])
        return np.trace(q.T @ A @ q) + (size - len(others)) / (g @ g) * (g @ A @ g)
    approximations = [T @ omega @ np.linalg.solve(omega.T @ T @ omega, omega.T @ T) for T in thetas]
    g = u[i] - omega @ np.linalg.lstsq(omega, u[i], rcond=None)[0]
    scale = (size - len(others)) / (g @ g)
    E, E_f = A - approximations[0], C - approximations[-1]
    if kind == "trace":
        return np.trace(approximations[0]) + scale * (g @ E @ g)
    return np.trace(A @ C) - np.trace(E @ E_f) + scale * (E @ g) @ (E_f @ g)


@pytest.mark.parametrize("kind", ["trace", "square", "cross", "xtrace"])
def test_tables_leave_probes_out_as_if_they_had_never_been_drawn(kind):
    rng = np.random.default_rng(0)
    matrices = [rng.standard_normal((30, 40)) for _ in range(2 if kind == "cross" else 1)]
    u = rng.standard_normal((6, 30))
    got = table(kind, u, *matrices)
    for i in range(6):
        for j in range(6):
            others = np.array([k for k in range(6) if k not in (i, j)])
            assert got[i, j] == pytest.approx(by_hand(kind, i, others, u, *matrices), rel=1e-9)


@pytest.mark.parametrize("interaction", [lambda x: x, lambda x: x**2 - 1], ids=["symmetric", "one-sided"])
def test_leave_one_out_is_an_unbiased_estimate_of_the_variance(interaction):
    """U-statistics of degree two have the general structure: h_i = x_i * (1 + mean of the other interaction(x_j)).

    With x_j^2 - 1 the estimates depend on each other but are uncorrelated, since E x_i (x_i^2 - 1) = 0.
    """
    rng = np.random.default_rng(0)
    values, variances = [], []
    for x in rng.standard_normal((4000, 5)):
        y = interaction(x)
        rest = (y.sum() - y)[:, None] - y  # for i without j
        np.fill_diagonal(rest, y.sum() - y)
        value, error, _ = deflation.leave_one_out(x[:, None] * (1 + rest / 4))
        values.append(value)
        variances.append(error**2)
    assert np.mean(values) == pytest.approx(0, abs=4 * np.std(values) / math.sqrt(4000))
    assert np.mean(variances) == pytest.approx(np.var(values), rel=0.1)


@pytest.mark.parametrize(
    ("name", "spectrum"),
    [(name, s) for name in TRACES for s in (DISTINCT if name in LEAVE_ONE_OUT else DISTINCT[1:])],
)
@pytest.mark.slow
def test_traces_are_unbiased(name, spectrum):
    probes = max(6, methods.get(name).fewest_probes)
    values = np.array([estimate(name, "trace", spectrum, probes, seed)[0] for seed in range(400)])
    z = (values.mean() - truth("trace", spectrum)) / (values.std(ddof=1) / 20)
    assert abs(z) < 4


@pytest.mark.parametrize("spectrum", mostly_slow(DISTINCT, 1))
def test_squared_norms_are_unbiased(spectrum):
    squares = np.array([estimate("nystrom_loo", "norm", spectrum, 6, seed)[0] ** 2 for seed in range(400)])
    z = (squares.mean() - truth("norm", spectrum) ** 2) / (squares.std(ddof=1) / 20)
    assert abs(z) < 4


@pytest.mark.parametrize("spectrum", mostly_slow(["linear", "square", "deep cliff"], 1))
def test_cross_terms_are_unbiased(spectrum):
    J, J_f = ends("alignment", spectrum)
    rng = np.random.default_rng(0)
    crosses = [table("cross", rng.standard_normal((6, n)), J, J_f).diagonal().mean() for _ in range(400)]
    z = (np.mean(crosses) - np.trace(J @ J.T @ J_f @ J_f.T)) / (np.std(crosses, ddof=1) / 20)
    assert abs(z) < 4


@pytest.mark.parametrize(("k", "size"), [(1, 40), (5, 40), (40, 40), (50, 40)])
@pytest.mark.parametrize("max_share", [0.0, 1.0])
def test_random_orthonormal_rows_span_the_gaussian_block(k, size, max_share):
    """By QR, and by a Cholesky factor."""
    rng = Probes(0, np.zeros(0))
    q = deflation.random_orthonormal(rng, k, size, max_share=max_share)
    count = min(k, size)
    assert q.shape == (count, size)
    np.testing.assert_allclose(q @ q.T, np.eye(count), atol=1e-9)
    block = Probes(0, np.zeros(0)).normal(count, size)
    np.testing.assert_allclose((block @ q.T) @ q, block, atol=1e-9)


def test_the_orthonormal_complement_is_orthogonal_to_the_basis():
    rng = np.random.default_rng(0)
    q = deflation.orthonormal(rng.standard_normal((4, 20)))
    rows = q[:3] + 1e-6 * rng.standard_normal((3, 20))  # almost within the basis, so that rounding matters
    found = deflation.orthonormal_complement(rows, q)
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(found @ q.T, 0, atol=1e-12)


def test_squared_norms_do_not_depend_on_the_blocks():
    J, u = jacobian("1/i"), np.random.default_rng(0).standard_normal((7, n))
    for memory in (1, 3 * (n + P) * 8, 2**20):
        j = Dense(J)
        j.memory = memory
        np.testing.assert_allclose(deflation.squared_norms(j, j.vjp, u), ((u @ J) ** 2).sum(1))


FORWARD = {
    "one_sided_forward": "one_sided_reverse",
    "hutchpp_adaptive_forward": "hutchpp_adaptive",
    "one_sided_paper_forward": "one_sided_paper_reverse",
    "xnystrace_forward": "xnystrace",
    "gram_forward": "gram_reverse",
}


@pytest.mark.parametrize(("forward", "reverse"), FORWARD.items())
def test_forward_estimators_are_the_reverse_ones_of_the_transpose(forward, reverse):
    """J J^T and J^T J have the same trace and Frobenius norm, but the alignment's cross terms are different."""
    J, method = jacobian("1/i"), methods.get(forward)
    probes = 40 if "adaptive" in forward else 12  # the sketch grows
    for metric in set(method.metrics) - {"alignment"}:
        found = drawn(method, metric, [J], probes, 3)
        assert found == pytest.approx(drawn(methods.get(reverse), metric, [J.T], probes, 3), rel=1e-12)
        assert found[:2] != pytest.approx(drawn(methods.get(reverse), metric, [J], probes, 3)[:2], rel=1e-3)


@pytest.mark.parametrize(("metric", "weights"), [("trace", (1, 0)), ("norm", (0, 1)), ("effective_rank", (1, 1))])
def test_errors_of_independent_traces_add_up_in_quadrature(metric, weights):
    """Each trace is known to 1 % with 4 degrees of freedom, so metrics are to 1 %, 1/2 % and sqrt(5) %."""
    j = Dense(np.eye(3))
    traces = iter([3.0] * weights[0] + [3.0] * weights[1])
    value, error, degrees = deflation.from_separate_traces(
        metric, [j], lambda _: standard_errors.PointEstimate(next(traces), 0.03, 4)
    )
    expected = {"trace": (3, 0.03, 4), "norm": (math.sqrt(3), 0.005 * math.sqrt(3), 4)}
    expected["effective_rank"] = (3, 0.03 * math.sqrt(5), 25 / (16 / 4 + 1 / 4))
    assert (value, error, degrees) == pytest.approx(expected[metric])


def left_over(name: str, J: np.ndarray, probes: int, seed: int) -> tuple[np.ndarray, int]:
    """The matrix that residual probes see, given the sketch of a seed, and the number of these probes."""
    theta = J.T @ J if name.endswith("forward") else J @ J.T
    rng = Probes(seed, J)
    if name == "nystrompp":
        s = rng.normal(probes, n).T
        return theta - theta @ s @ np.linalg.solve(s.T @ theta @ s, s.T @ theta), probes
    columns, residual = {
        "hutchpp_one_sided": (probes, probes),
        "hutchpp_paper": (4, 10),
    }.get(name, (probes // 6, probes - probes // 6))
    s = rng.sign(columns, len(theta)).T
    q = np.linalg.qr(s if name.startswith("one_sided_paper") else theta @ s)[0]
    outside = np.eye(len(theta)) - q @ q.T
    return outside @ theta @ outside, residual


@pytest.mark.parametrize("spectrum", ["linear", "1/i"])
@pytest.mark.parametrize(
    "name", ["hutchpp_one_sided", "hutchpp_paper", "nystrompp", "one_sided_paper_forward", "one_sided_paper_reverse"]
)
@pytest.mark.slow
def test_variance_is_that_of_the_formula(name, spectrum):
    """2 (||A||_F^2 - sum of its squared diagonal) per residual probe with signs, 2 ||A||_F^2 with Gaussians."""
    probes = 24
    formula = []
    for seed in range(20):
        A, count = left_over(name, jacobian(spectrum), probes, seed)
        diagonal = 0 if name == "nystrompp" else (A.diagonal() ** 2).sum()
        formula.append(2 * ((A**2).sum() - diagonal) / count)
    values, errors = np.array([estimate(name, "trace", spectrum, probes, seed) for seed in range(800)]).T
    assert values.var(ddof=1) == pytest.approx(np.mean(formula), rel=0.15)
    assert (errors**2).mean() == pytest.approx(np.mean(formula), rel=0.15)


@pytest.mark.parametrize("spectrum", mostly_slow(SPECTRA, 2))
def test_the_adaptive_sketch_is_unbiased_and_grows_where_that_is_worth_it(spectrum):
    """It is never much worse than the better of no sketch and a sketch that takes half of the passes."""
    methods_ = ("hutchpp_adaptive", "one_sided_reverse", "hutchpp_one_sided")
    probes, exact = {"hutchpp_one_sided": 18}, truth("trace", spectrum)
    found = {
        name: np.array([estimate(name, "trace", spectrum, probes.get(name, 72), s) for s in range(400)])
        for name in methods_
    }
    values = found["hutchpp_adaptive"][:, 0]
    assert abs(values.mean() - exact) < 4 * values.std(ddof=1) / 20
    off = {name: math.sqrt(((v[:, 0] - exact) ** 2).mean()) for name, v in found.items()}
    assert off["hutchpp_adaptive"] < 3 * min(off["one_sided_reverse"], off["hutchpp_one_sided"])


def test_new_directions_leave_out_what_a_basis_already_has():
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((50, 6)))[0].T
    inside, outside = rng.standard_normal((4, 6)) @ q, rng.standard_normal((3, 50))
    for rows, count in ((inside, 0), (outside, 3), (np.concatenate([inside, outside]), 3), (1e-9 * outside, 3)):
        found = deflation.new_directions(rows, q)
        both = np.concatenate([q, found])
        assert len(found) == count
        np.testing.assert_allclose(both @ both.T, np.eye(6 + count), atol=1e-12)


class Repeated(torch.nn.Module):
    """One prediction for the whole batch, repeated for its members; a few outputs that are not zero."""

    def __init__(self, outputs, live):
        super().__init__()
        self.first, self.last = torch.nn.Linear(4, 12), torch.nn.Linear(12, outputs)
        self.register_buffer("live", (torch.arange(outputs) < live).float())

    def forward(self, x):
        return self.live * self.last(torch.tanh(self.first(x)).mean(0, keepdim=True)).expand(len(x), -1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["hutchpp_adaptive", "hutchpp_adaptive_forward"])
@pytest.mark.parametrize(("outputs", "live"), [(1, 1), (5, 1), (5, 4)])
def test_a_sketch_of_a_kernel_of_low_rank_counts_no_direction_twice(outputs, live, name, dtype):
    """Equal and zero outputs: what rounding leaves of a sketch lies inside its basis."""
    torch.manual_seed(0)
    model, x = Repeated(outputs, live), torch.randn(60, 4)
    kernel = ntkbench.Kernel(model, x, dtype=dtype)
    truth = ntkbench.trace(copy.deepcopy(model).double(), x.double(), method="direct").value
    for seed in range(3):
        found = kernel.trace(method=name, passes=100, seed=seed)
        assert found.value == pytest.approx(truth, rel=1e-3), found


@pytest.mark.parametrize("name", ["hutchpp_adaptive", "hutchpp_adaptive_forward"])
def test_the_adaptive_sketch_stops_at_once_on_a_flat_spectrum_and_grows_on_a_steep_one(name):
    for spectrum, columns in (("linear", (4, 4)), ("0.7^i", (8, 40))):
        j = Dense(jacobian(spectrum))
        sketch = methods.get(name).accumulator(("trace",), [j], j.rng(0))
        sketch.extend(72)
        assert j.passes == 72
        assert columns[0] <= len(sketch.q) <= columns[1]
        sketch.extend(72)  # further probes are all used
        assert j.passes == 144
        estimate = sketch.estimate("trace")
        assert abs(estimate.value - truth("trace", spectrum)) < 5 * estimate.standard_error + 1e-9


@pytest.mark.parametrize(("block", "min_residual"), [(1, 2), (3, 8), (8, 8)])
def test_the_adaptive_sketch_grows_by_its_blocks_and_leaves_its_residual(block, min_residual, monkeypatch):
    method = methods.get("hutchpp_adaptive")
    monkeypatch.setattr(type(method), "block", block)
    monkeypatch.setattr(type(method), "min_residual", min_residual)
    j = Dense(jacobian("0.9^i"))
    sketch = method.accumulator(("trace",), [j], j.rng(0))
    sketch.extend(72)
    assert j.passes == 72
    assert len(sketch.q) % block == 0
    assert block <= len(sketch.q) <= (72 - min_residual) / 4
    value, error, degrees = sketch.estimate("trace")
    # As many as the residual probes have, or fewer where the residuals are heavy-tailed.
    assert 1 < degrees <= 72 - 4 * len(sketch.q) - 1
    assert abs(value - truth("trace", "0.9^i")) < 5 * error


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("name", "metric"), [*((name, "trace") for name in LEAVE_ONE_OUT), ("nystrom_loo", "norm")])
@pytest.mark.slow
def test_standard_errors_of_leave_one_out_are_calibrated(name, metric, spectrum):
    """Calibrated to within noise; too large for a sketch that just reaches over a cliff, and somewhat too small for the
    norm of steep spectra, where a few seeds make up most of the variance."""
    values, errors = np.array([estimate(name, metric, spectrum, 11, seed) for seed in range(300)]).T
    ratio = (errors**2).mean() / values.var(ddof=1)
    assert ratio > (0.55 if metric == "norm" else 0.7)
    assert ratio < 1.4 or spectrum not in SMOOTH


@pytest.mark.parametrize(("name", "metric"), [(name, metric) for name, metric in CASES if name in DEFLATED])
def test_exact_once_the_sketch_is_wider_than_the_rank(name, metric):
    spectrum = (*np.linspace(1, 2, 5), *np.zeros(35))
    for probes in (11, 12):  # alignment: the sum of two has twice the rank
        value, error = estimate(name, metric, spectrum, probes)
        assert value == pytest.approx(truth(metric, spectrum), rel=1e-9)
        assert error <= 1e-7 * value


@pytest.mark.parametrize(
    ("name", "metric"), [(name, metric) for name, metric in CASES if not name.endswith(("paper_forward", "x_forward"))]
)
def test_exact_with_a_whole_basis(name, metric):
    spectrum = tuple(np.linspace(1, 2, 12))
    value, error = estimate(name, metric, spectrum, 230 * 6)
    assert value == pytest.approx(truth(metric, spectrum), rel=1e-9)
    assert error <= 1e-7 * value


@pytest.mark.parametrize("name", ["xtrace", "xnystrace", "nystrom_loo"])
def test_exact_with_as_many_probes_as_outputs_and_full_rank(name):
    metric = methods.get(name).metrics[0]
    spectrum = tuple(np.linspace(1, 2, 12))
    value, error = estimate(name, metric, spectrum, 12)
    assert value == pytest.approx(truth(metric, spectrum), rel=1e-7)
    assert error <= 1e-6 * value


@pytest.mark.parametrize("parameters", [1, P])
@pytest.mark.parametrize(("name", "metric"), [(name, m) for name in STOCHASTIC for m in methods.get(name).metrics])
def test_one_output_is_exact_with_any_number_of_probes(name, metric, parameters):
    """One probe is a basis of a space of one dimension, and shows no scatter."""
    method = methods.get(name)
    matrices = [jacobian((1.7,), seed, parameters) for seed in range(2 if metric == "alignment" else 1)]
    value, error, _ = drawn(method, metric, matrices, method.fewest_probes, 0)
    assert math.isfinite(error)
    assert abs(value - metrics_of(*(J @ J.T for J in matrices))[metric]) <= 6 * error + 1e-7


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "metric"), CASES)
def test_spectra_that_decay_to_zero_are_handled(name, metric, dtype):
    """Sketches far wider than the numerical rank, a network of rank one, and one that does not depend on theta."""
    method = methods.get(name)
    for base_of in (0.3, 0.7):
        spectrum = tuple(base_of ** np.arange(n))
        matrices = [J.astype(dtype) for J in ends(metric, spectrum)]
        for probes in (12, 60):
            value, error, _ = drawn(method, metric, matrices, probes, 0)
            assert math.isfinite(error)
            assert abs(value - truth(metric, spectrum)) <= 6 * error + 2e-5 * value
    ones = np.ones((n, P), dtype)
    value, error, _ = drawn(method, metric, [ones] * len(matrices), 12, 0)
    few = name == "hutchpp_paper"  # its two columns and five probes do not show that nothing is left
    assert math.isnan(error) == few
    exact = metrics_of(ones @ ones.T, ones @ ones.T)[metric]
    assert abs(value - exact) <= (0 if few else 6 * error) + 2e-5 * value
    if metric == "trace":
        assert drawn(method, metric, [np.zeros((n, P), dtype)], 12, 0)[:2] == (0, 0)


@pytest.mark.parametrize("name", ["hutchpp", "hutchpp_one_sided", "hutchpp_paper", "one_sided_paper_reverse"])
def test_few_residual_probes_that_agree_have_an_unknown_error(name):
    """A residual of one to four dimensions has few distinct values over random signs; if Theta is I, one is zero."""
    method, rng = methods.get(name), np.random.default_rng(0)
    for size in (3, 4, 5, 6):
        for J in (rng.standard_normal((size, 10)), np.eye(size, 10)):
            exact = (J**2).sum()
            for seed in range(40):
                value, error, _ = drawn(method, "trace", [J], method.fewest_probes, seed)
                assert not error <= 1e-12 * exact or value == pytest.approx(exact, rel=1e-9), (size, seed)


def test_residual_probes_of_a_complete_sketch_have_no_error():
    J = np.random.default_rng(0).standard_normal((2, 10))
    for name in ("hutchpp", "hutchpp_one_sided"):
        value, error, _ = drawn(methods.get(name), "trace", [J], 2, 0)
        assert value == pytest.approx((J**2).sum(), rel=1e-9) and error <= 1e-12 * value


COSTS = {
    ("hutchpp", "trace"): 6,
    ("hutchpp_one_sided", "trace"): 4,
    ("nystrompp", "trace"): 4,
    ("nystrompp", "norm"): 8,
    ("nystrompp", "effective_rank"): 12,
    ("one_sided_paper_forward", "trace"): 1,
    ("one_sided_paper_reverse", "trace"): 1,
    ("xtrace", "trace"): 3,
    ("xnystrace", "trace"): 2,
    ("xnystrace_forward", "trace"): 2,
    ("nystrom_loo", "norm"): 3,
    ("nystrom_loo", "effective_rank"): 3,
    ("nystrom_loo", "alignment"): 8,
}


@pytest.mark.parametrize(("case", "passes"), COSTS.items(), ids=str)
def test_counters_match_the_documented_costs(case, passes):
    name, metric = case
    for probes in (6, 13):
        assert drawn(methods.get(name), metric, ends(metric, "1/i"), probes, 0)[2] == passes * probes


@pytest.mark.parametrize(("m", "columns", "residual"), [(5, 1, 2), (6, 2, 2), (7, 1, 3), (50, 8, 21), (100, 16, 42)])
def test_the_papers_budget_is_that_of_its_script(m, columns, residual):
    method = methods.get("hutchpp_paper")
    for metric, product in (("trace", 2), ("norm", 4), ("effective_rank", 6), ("alignment", 12)):
        passes = (2 * columns + residual) * product
        assert method.cost(metric, m) == passes
        assert drawn(method, metric, ends(metric, "1/i"), m, 0)[2] == passes
        assert method.probes(metric, passes) >= m
        assert method.cost(metric, method.probes(metric, passes)) <= passes


def test_the_papers_script_multiplies_the_identity_once_that_is_cheaper():
    method, spectrum = methods.get("hutchpp_paper"), tuple(np.linspace(1, 2, 12))
    for metric in method.metrics:
        value, error, passes = drawn(method, metric, ends(metric, spectrum), 18, 0)
        assert value == pytest.approx(truth(metric, spectrum), rel=1e-12)
        assert error == 0
        assert passes == 12 * method.passes_per_probe(metric)


@pytest.mark.parametrize(
    ("name", "metric", "dtype"),
    mostly_slow(
        [(*case, dtype) for case in CASES for dtype in ("float32", "float64")],
        # The first and the last metric of each method.
        {(name, metric, "float64") for name, metric in CASES if metric not in methods.get(name).metrics[1:-1]},
    ),
)
def test_backends_agree_on_the_same_probes(name, metric, dtype):
    import jax
    import jax.numpy as jnp
    import torch

    jax.config.update("jax_enable_x64", True)
    method = methods.get(name)
    exact = truth(metric, "1/i")
    answers = []
    for library in (np.asarray, torch.from_numpy, jnp.asarray):
        matrices = [library(J.astype(dtype)) for J in ends(metric, "1/i")]
        assert array_api_compat.array_namespace(*matrices)
        answers.append(drawn(method, metric, matrices, 12, 0))
        assert answers[-1] == drawn(method, metric, matrices, 12, 0)
    for value, error, passes in answers[1:]:
        close = 1e-10 if dtype == "float64" else 2e-5
        assert value == pytest.approx(answers[0][0], abs=close * exact)
        assert error == pytest.approx(answers[0][1], abs=close * exact)
        assert passes == answers[0][2]


@pytest.mark.parametrize(("rank", "widest"), [(1, 5), (3, 1.6), (100, 1.02)])
def test_intervals_of_skewed_means_cover_and_others_are_hardly_wider(rank, widest):
    """Probes of a matrix with equal eigenvalues; with k - 1 degrees of freedom, 86 and 91 % cover for ranks 1 and 3."""
    rng, k = np.random.default_rng(0), 10
    found = [deflation.mean((rng.standard_normal((k, rank)) ** 2).mean(1), 1000) for _ in range(2000)]
    reach = np.array([stats.t.ppf(0.975, each.degrees) * each.standard_error for each in found])
    plain = stats.t.ppf(0.975, k - 1) * np.array([each.standard_error for each in found])
    covered = abs(np.array([each.value for each in found]) - 1) <= reach
    assert 0.935 <= covered.mean() <= 0.965
    assert reach.mean() / plain.mean() < widest


def test_means_of_values_of_both_signs_have_all_degrees_of_freedom():
    assert deflation.mean(np.array([-1.0, 2.0, 0.5]), 9).degrees == 2
    assert deflation.mean(np.array([0.0, 0.0, 0.0]), 9).standard_error == 0
    assert deflation.mean(np.array([1.0, 1.0, 1.0]), 9).degrees == 2
