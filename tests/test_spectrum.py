"""The spectrum of Theta as a result: from all of Theta and from products, against numpy and prescribed spectra."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_deflation import SPECTRA, Dense, jacobian
from test_kernel import X, net, normed, theta
from torch import nn

import ntkbench
from ntkbench.estimators import lanczos, spectrum

MANY = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def little(n: int) -> int:
    """Bytes that hold the Krylov space of a Theta ``[n, n]``, but not its decomposition."""
    return 34 * n**2


LITTLE = little(60)


def entropy_rank(values: np.ndarray) -> float:
    p = values[values > 0] / values[values > 0].sum()
    return math.exp(-(p * np.log(p)).sum())


def wide(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return net(width=30, dtype=dtype)


def check(found: spectrum.Spectrum, exact: np.ndarray, top: int) -> None:
    """Check the bounds on the ends of the spectrum and on eigenvectors against the exact matrix."""
    values, columns = np.linalg.eigh(exact)
    values, columns = values[::-1], columns[:, ::-1]
    assert found.values.shape == found.errors.shape == (top,) and found.vectors.shape == (top, len(exact))
    assert (abs(found.values - values[:top]) <= found.errors).all()
    np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(top), atol=1e-5)
    sines = np.sqrt(np.maximum(1 - (found.vectors * columns[:, :top].T).sum(1) ** 2, 0.0))
    simple = found.vector_errors < 1
    assert (sines[simple] <= found.vector_errors[simple] + 1e-7).all()
    low, high = found.smallest_bounds
    assert low - 1e-13 * values[0] <= max(values[-1], 0.0) <= high + 1e-13 * values[0]
    if values[-1] > 1e-12 * values[0]:
        low, high = found.condition_bounds
        assert low * (1 - 1e-9) <= values[0] / values[-1] <= high * (1 + 1e-9)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("memory", [None, LITTLE])
def test_the_spectrum_of_a_network_matches_numpy(dtype, memory):
    exact = theta(wide(), MANY).numpy()
    found = ntkbench.spectrum(wide(), MANY, 4, rtol=1e-4, dtype=dtype, memory=memory)
    check(found, exact, 4)
    assert found.method == ("eigh" if memory is None else "block_lanczos")
    assert (found.errors < 1e-3 * found.values).all()
    assert (found.vector_errors < 0.1).all()
    assert 0 < found.passes <= 4096 and found.certificate < 1e-5 and found.notes == ()
    rank, low, high = found.entropy_effective_rank, *found.entropy_effective_rank.interval(0.999)
    assert low <= entropy_rank(np.linalg.eigvalsh(exact)) <= high
    assert (rank.standard_error is None) == (memory is None)
    assert found.density.trace == pytest.approx(np.trace(exact), rel=1e-5 if memory is None else 0.5)


@given(
    spectrum=st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=12),
    zeros=st.integers(0, 3),
    top=st.integers(1, 12),
    single=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_bounds_hold_for_any_spectrum(spectrum, zeros, top, single, seed):
    exact = np.array([*spectrum, *[0.0] * zeros])
    J = jacobian(tuple(exact), seed, len(exact) + 2)
    j = Dense(J.astype(np.float32) if single else J)
    matrix, top = np.asarray(j._matrix, np.float64), min(top, len(exact))
    matrix = matrix @ matrix.T
    check(of_matrix(j, top), matrix, top)
    check(of_products(j, top, seed=seed), matrix, top)


def of_matrix(j: Dense, top: int) -> spectrum.Spectrum:
    return spectrum.of_matrix(np.asarray(j.ntk(j.basis(0, j.n)), np.float64), j, top, 2.0 * j.n)


def of_products(j: Dense, top: int, **given: int) -> spectrum.Spectrum:
    return spectrum.of_operator(j, top, **given)


def test_missing_steps_are_within_the_bounds_of_the_entropy():
    whole = lanczos.density(Dense(jacobian("1/i")), probes=3, steps=60)
    for steps in range(2, 12):
        short = lanczos.density(Dense(jacobian("1/i")), probes=3, steps=steps)
        low, high = short.entropy_lower_bound, short.entropy_effective_rank
        assert low <= whole.entropy_effective_rank * (1 + 1e-12) <= high * (1 + 2e-12)
        assert low < high * (1 - 1e-6)


@pytest.mark.parametrize("name", ["1/i", "linear", "0.7^i", "spike"])
def test_intervals_of_the_entropy_cover_it(name):
    exact = entropy_rank(SPECTRA[name])
    j = Dense(jacobian(name))
    low, high = np.array(
        [of_products(j, 1, seed=seed, passes=500).entropy_effective_rank.interval() for seed in range(30)]
    ).T
    assert ((low <= exact) & (exact <= high)).mean() >= 0.8
    assert np.median(high - low) < 2 * exact


@functools.cache
def densities(name: str, steps: int) -> list[lanczos.Density]:
    """Densities of 8 probes for 30 seeds."""
    j = Dense(jacobian(name))
    return [lanczos.density(j, probes=8, steps=steps, seed=seed) for seed in range(30)]


def intervals(name: str, of: Callable[[lanczos.Density], object], steps: int) -> np.ndarray:
    """Values and the two ends of their intervals for 30 seeds, ``[30, 3, ...]``."""
    return np.array([of(density) for density in densities(name, steps)])


@pytest.mark.parametrize("name", ["1/i", "linear", "0.7^i", "spike"])
def test_intervals_of_the_density_cover_it(name):
    edges = np.array([0, 1e-6, 0.021, 0.11, 1.5, 2.2, 40])
    exact = np.histogram(SPECTRA[name], edges)[0] / 200
    value, low, high = intervals(name, lambda density: density.shares(edges), 12).transpose(1, 0, 2)
    np.testing.assert_allclose(value.sum(1), 1)
    assert ((low <= value) & (value <= high)).all()
    assert ((low <= exact) & (exact <= high)).mean() >= 0.95
    assert (high - low).mean() < 0.5


def test_without_bounds_of_missing_steps_the_density_would_not_be_covered():
    """A few Ritz values stand for all eigenvalues of a flat spectrum, for every probe alike."""
    edges = np.array([0, 1.15, 4])
    exact = np.histogram(SPECTRA["linear"], edges)[0] / 200
    value, low, high = intervals("linear", lambda density: density.shares(edges), 3).transpose(1, 0, 2)
    assert (abs(value - exact) > 0.05).mean() > 0.5
    assert ((low <= exact) & (exact <= high)).all()


@pytest.mark.parametrize("name", ["1/i", "linear", "0.7^i", "spike"])
@pytest.mark.parametrize("ridge", [1e-4, 0.1])
def test_intervals_of_the_determinant_cover_it(name, ridge):
    exact = float(np.log(SPECTRA[name] + ridge).sum())
    for steps in (3, 12):
        value, low, high = intervals(name, lambda density: density.log_determinant(ridge), steps).T
        assert ((low <= value) & (value <= high)).all()
        assert ((low <= exact) & (exact <= high)).mean() >= 0.8
    assert (high - low).mean() < 200


SKEWED = {
    "one": np.where(np.arange(60) < 1, 1.0, 1e-6),
    "three": np.where(np.arange(60) < 3, 1.0, 1e-6),
    "all but two": np.where(np.arange(60) < 2, 1e-6, 1.0),
}
"""Few eigenvalues far above or below the others: quadrature by a probe is skewed."""


@pytest.mark.parametrize("name", SKEWED)
def test_intervals_from_skewed_probes_cover_what_they_say(name):
    """Symmetric intervals from the scatter of 8 probes cover as little as 85 %."""
    values = SKEWED[name]
    j = Dense(jacobian(tuple(values)))
    volume, rank = float(np.log(values + 1e-3).sum()), entropy_rank(values)
    found = [of_products(j, 1, seed=seed, passes=200) for seed in range(1, 201)]  # jacobian() draws with seed 0
    volumes = np.array([each.log_determinant(1e-3)[1:] for each in found])
    ranks = np.array([each.entropy_effective_rank.interval() for each in found])
    for (low, high), exact in ((volumes.T, volume), (ranks.T, rank)):
        assert ((low <= exact) & (exact <= high)).mean() >= 0.93


def test_the_variance_over_probes_is_that_of_random_unit_vectors():
    exact = SPECTRA["1/i"]
    found = [lanczos.density(Dense(jacobian("1/i")), probes=4, steps=12, seed=seed) for seed in range(1, 151)]
    shifted = np.log(exact + 0.1)
    stated = [density._variance(np.log(density.nodes + 0.1), density.weights) for density in found]
    assert np.mean(stated) == pytest.approx(2 / 202 / 4 * shifted.var(), rel=0.05)
    ranks = [density.entropy_effective_rank for density in found]
    assert np.mean([density.entropy_standard_error for density in found]) == pytest.approx(np.std(ranks), rel=0.2)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_density_and_determinant_of_a_whole_theta(dtype):
    exact = theta(wide(), MANY).numpy()
    found = ntkbench.spectrum(wide(), MANY, dtype=dtype)
    values = np.linalg.eigvalsh(exact)
    edges = np.array([0, 0.3, 3, 1000])
    share, low, high = found.density.shares(edges)
    np.testing.assert_allclose(share, np.histogram(values, edges)[0] / 60)
    assert (low <= share).all() and (share <= high).all()
    for ridge in (0.0, 1e-3, 1.0):
        value, low, high = found.log_determinant(ridge)
        assert low <= np.log(values + ridge).sum() <= high and low <= value <= high
    assert high - low < (1e-8 if dtype == "float64" else 1)
    assert found.log_determinant(1e300)[0] == pytest.approx(60 * math.log(1e300))
    with pytest.raises(ntkbench.BadInput, match="ridge must be"):
        found.log_determinant(-1.0)
    for edges in ([1], [1, 1], [2, 1], [[1, 2]]):
        with pytest.raises(ntkbench.BadInput, match="edges must be"):
            found.density.shares(edges)


def test_products_do_not_bound_the_determinant_without_a_ridge():
    found = ntkbench.spectrum(wide(), MANY, 2, memory=LITTLE)
    value, low, high = found.log_determinant()
    assert low == -math.inf and value < high < math.inf


class Scaled(nn.Module):
    """A network with scaled outputs."""

    def __init__(self, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.scale = wide(dtype), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.net(x)


SCALES = [(2.0**-100, "float64"), (2.0**100, "float64"), (2.0**-20, "float32"), (2.0**40, "float32")]
"""Powers of two, which round nothing."""


@pytest.mark.parametrize("memory", [None, LITTLE])
@pytest.mark.parametrize(("scale", "dtype"), SCALES)
def test_scales_do_not_matter(scale, dtype, memory):
    own = getattr(torch, dtype)
    one, found = (ntkbench.spectrum(Scaled(s, own), MANY.to(own), 3, memory=memory) for s in (1.0, scale))
    np.testing.assert_allclose(found.values / scale**2, one.values, rtol=1e-5)
    np.testing.assert_allclose(found.errors / scale**2, one.errors, rtol=0.1)
    assert found.entropy_effective_rank.value == pytest.approx(one.entropy_effective_rank.value, rel=1e-4)
    assert found.condition_bounds[0] == pytest.approx(one.condition_bounds[0], rel=0.1)
    of_one, shift = one.log_determinant(1.0), 120 * math.log(scale)
    np.testing.assert_allclose(np.subtract(found.log_determinant(scale**2), shift), of_one, atol=1e-2)
    edges = np.array([0, 0.1, 1.0, 10, math.inf])
    np.testing.assert_allclose(found.density.shares(edges * scale**2), one.density.shares(edges), atol=1e-2)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("memory", [None, LITTLE])
def test_what_float32_cannot_hold_is_refused(scale, memory):
    for use in (ntkbench.spectrum, lambda *a, **k: ntkbench.solve(*a, torch.ones(20, 3), ridge=1.0, **k)):
        with pytest.raises(ntkbench.BadInput) as caught:
            use(Scaled(scale, torch.float32), MANY.float(), memory=memory)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("memory", [None, little(15)])
def test_interacting_samples_have_a_spectrum(memory):
    found = ntkbench.spectrum(normed().train(), X, 3, rtol=1e-6, memory=memory)
    assert found.method == ("eigh" if memory is None else "block_lanczos")
    check(found, theta(normed().train(), X).numpy(), 3)


def test_eigenvalues_of_zero_are_not_noted():
    """10 eigenvalues of a matrix of rank 5: the last ones are rounding, as are their residuals."""
    model = nn.Linear(4, 1).double()
    found = ntkbench.spectrum(model, MANY, 10, memory=little(20))
    assert found.method == "block_lanczos" and found.notes == ()
    assert (abs(found.values - np.linalg.eigvalsh(theta(model, MANY).numpy())[::-1][:10]) <= found.errors).all()
    whole = ntkbench.spectrum(model, MANY, 20)
    assert not whole.values[5:].any() and not whole.errors[5:].any() and whole.log_determinant()[0] == -math.inf


def test_products_that_overflow_are_refused():
    J = jacobian("1/i") * 1e200
    for use in (lanczos.density, functools.partial(lanczos.ritz_pairs, top=2)):
        with np.errstate(all="ignore"), pytest.raises(ntkbench.BadInput, match="nan or infinite"):
            use(Dense(J))


def test_all_eigenvalues_by_one_square_block():
    """Random directions that are almost dependent, as with these seeds, are kept: the block spans the whole space."""
    exact = np.linspace(1, 2, 40)
    j = Dense(jacobian(tuple(exact)).astype(np.float32))
    for seed in (0, 30, 75, 77):
        found = lanczos.ritz_pairs(j, 40, seed=seed, passes=80)
        np.testing.assert_allclose(found.values, exact[::-1], rtol=1e-4)
        assert found.notes == () and found.passes == 80


def test_the_krylov_space_restarts_in_little_memory():
    J = jacobian("1/i")
    whole, little = Dense(J), Dense(J)
    little.memory = 24 * lanczos.HELD * 8 * len(J)
    expected = lanczos.ritz_pairs(whole, 4, rtol=1e-6)
    found = lanczos.ritz_pairs(little, 4, rtol=1e-6)
    assert found.passes >= expected.passes
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-9)
    assert (found.residuals <= 1e-6 * found.values).all() and (found.errors == found.residuals).all()
    (note,) = found.notes
    assert "larger ones may be missing below" in note
    with pytest.raises(ntkbench.OverMemory, match=r"top=5 .* enough for top=4"):
        lanczos.ritz_pairs(little, 5)


def test_budgets_below_the_first_step_are_refused():
    for use, least in ((lanczos.ritz_pairs, 14), (lanczos.largest, 14), (spectrum.of_operator, 46)):
        use(Dense(jacobian("1/i")), 3, passes=least)
        with pytest.raises(ntkbench.BadInput, match=f"top=3 takes at least {least} passes, got passes={least - 1}"):
            use(Dense(jacobian("1/i")), 3, passes=least - 1)


def diagonal(eigenvalues: np.ndarray) -> Dense:
    j = Dense(np.diag(np.sqrt(eigenvalues)))
    j.memory = 2**30
    return j


def hidden(n: int, bulk: str) -> np.ndarray:
    """Eigenvalues, descending, whose largest one has little weight in random vectors beside the others."""
    others = {"equal": np.ones(n - 1), "uniform": np.linspace(1, 0, n - 1), "edge": np.linspace(1, 0.97, n - 1)}[bulk]
    return np.concatenate([[1.1], others])


@pytest.mark.parametrize("rtol", [0.1, 1e-3])
@pytest.mark.parametrize("top", [1, 3])
@pytest.mark.parametrize("bulk", ["equal", "uniform", "edge"])
def test_no_large_eigenvalue_is_missed_among_many(bulk, top, rtol):
    """The Ritz values of the first steps have small residuals, and none is near the largest eigenvalue."""
    exact = hidden(1000, bulk)
    j = diagonal(exact)
    for seed in range(10):
        found = lanczos.ritz_pairs(j, top, rtol=rtol, seed=seed)
        assert (abs(found.values - exact[:top]) <= found.errors + 1e-12).all()
        assert found.notes == () and (found.errors <= rtol * found.values).all()


@given(
    spectrum=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    often=st.lists(st.integers(1, 40), min_size=5, max_size=5),
    top=st.integers(1, 4),
    steps=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_eigenvalues_are_within_their_errors_after_any_number_of_steps(spectrum, often, top, steps, seed):
    exact = np.sort(np.repeat([1.0, *spectrum], [1, *often[: len(spectrum)]]))[::-1]
    top = min(top, len(exact))
    j = diagonal(exact)
    found = lanczos.ritz_pairs(j, top, rtol=1e-9, passes=steps * lanczos.first_step(j, top), seed=seed)
    assert (abs(found.values - exact[:top]) <= found.errors + found.rounding).all()
    assert (found.errors >= found.residuals).all()


def test_the_whole_krylov_space_bounds_both_ends_of_the_spectrum():
    exact = np.linspace(1, 2, 12)
    found = of_products(Dense(jacobian(tuple(exact))), 3)
    assert found.method == "block_lanczos" and found.condition_number == pytest.approx(2)


def test_fewer_parameters_than_outputs_make_theta_singular():
    model = nn.Linear(4, 1).double()
    for memory in (None, little(20)):
        found = ntkbench.spectrum(model, MANY, 3, memory=memory)
        check(found, theta(model, MANY).numpy(), 3)
        assert found.smallest == 0 and found.smallest_bounds == (0, 0)
        assert found.condition_number == math.inf and "infinite" in repr(found)


@pytest.mark.parametrize("memory", [None, little(20)])
def test_kernels_of_zero_and_of_one_output_have_a_spectrum(memory):
    zero = nn.Linear(4, 2, bias=False).double()
    found = ntkbench.spectrum(zero, torch.zeros(10, 4, dtype=torch.float64), 2, memory=memory)
    assert not found.values.any() and math.isnan(found.condition_number)
    assert math.isnan(found.entropy_effective_rank.value) and "nan" in repr(found)
    one = ntkbench.spectrum(nn.Linear(4, 1).double(), X[:1], memory=None if memory is None else little(1))
    assert one.largest == pytest.approx(1 + float((X[0] ** 2).sum()))
    assert one.condition_bounds[0] == pytest.approx(1) and one.entropy_effective_rank.value == pytest.approx(1)
    assert memory is not None or one.condition_number == pytest.approx(1)


def test_a_spectrum_prints_its_values_and_has_groups():
    said = repr(ntkbench.spectrum(net(), X)).splitlines()
    assert said[0].startswith("spectrum of Theta, 15 x 15 (eigh, 5 passes), certified to ")
    assert [line[2:26].strip() for line in said[1:]] == [
        "largest eigenvalues",
        "smallest eigenvalue",
        "condition number",
        "entropy effective rank",
    ]
    assert "... (10 values)" in said[1]
    groups = ntkbench.spectrum(net(), X, 2, parameters={"first": "0.*", "last": "2.*"})
    assert list(groups) == ["first", "last"] and groups["first"].largest != groups["last"].largest
    short = ntkbench.spectrum(wide(), MANY, 3, rtol=1e-9, passes=60, memory=LITTLE)
    assert "at least" in repr(short) and math.isnan(short.condition_number)
    assert "rtol=1e-09 was not reached" in short.notes[0] and short.notes[0] in repr(short)
    exact = np.linalg.eigvalsh(theta(wide(), MANY).numpy())
    assert (abs(short.values[:, None] - exact).min(1) <= short.errors).all()  # of some eigenvalue
    assert short.condition_bounds[0] <= exact[-1] / exact[0] and math.isinf(short.condition_bounds[1])


@pytest.mark.parametrize(
    ("says", "given"),
    [
        ("top must be at most n = 15", {"top": 16}),
        ("top must be a positive whole number", {"top": 0}),
        ("rtol must be a number between 0 and 1", {"rtol": 2}),
        ("passes must be a positive whole number", {"passes": 0}),
        ("seed must be a whole number", {"seed": 0.5}),
        ("unknown keyword 'method'", {"method": "hutchpp"}),
    ],
)
def test_spectra_that_cannot_be_computed_are_refused(says, given):
    with pytest.raises(ntkbench.BadInput, match=says) as caught:
        ntkbench.spectrum(net(), X, **given)
    assert "\n" not in str(caught.value)
