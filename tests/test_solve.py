"""(Theta + ridge I)^-1 y and kernel regression: from all of Theta and from products, against numpy's solutions."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_deflation import Dense, jacobian
from test_kernel import X2, O, X, net, normed, theta
from test_kernel import jacobian as rows
from test_spectrum import MANY, SCALES, Scaled, wide
from torch import nn

import ntkbench
from ntkbench.estimators import solve

EPS = float(np.finfo(np.float64).eps)

LITTLE = 8 * 60**2
"""Bytes that hold Theta [60, 60] only once."""

Y = torch.randn(20, O, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def exact(model: nn.Module, x: torch.Tensor, y: torch.Tensor, ridge: float) -> np.ndarray:
    matrix = theta(model, x).numpy()
    return np.linalg.solve(matrix + ridge * np.eye(len(matrix)), y.numpy().reshape(-1))


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-9), ("float32", 1e-4)])
@pytest.mark.parametrize("memory", [None, LITTLE])
def test_solutions_for_a_network_match_numpy(dtype, rtol, memory):
    found = ntkbench.solve(wide(), MANY, Y, ridge=0.5, rtol=rtol, dtype=dtype, memory=memory)
    expected = exact(wide(), MANY, Y, 0.5)
    assert found.method == ("cholesky" if memory is None else "conjugate_gradients")
    assert found.values.shape == Y.shape and found.values.dtype == np.float64
    error = np.linalg.norm(found.values.reshape(-1) - expected)
    assert error <= 1.01 * rtol * float(Y.norm()) / 0.5
    matrix = theta(wide(), MANY).numpy() + 0.5 * np.eye(60)
    residual = np.linalg.norm(matrix @ found.values.reshape(-1) - Y.numpy().reshape(-1)) / float(Y.norm())
    assert found.residual <= rtol and found.residual == pytest.approx(residual, rel=0.1, abs=2e-5)
    assert found.notes == () and found.certificate < 1e-5 and found.ridge == 0.5
    assert found.passes >= (5 if memory is None else 2 * found.iterations)
    flat = ntkbench.solve(wide(), MANY, Y.reshape(-1), ridge=0.5, rtol=rtol, dtype=dtype, memory=memory)
    np.testing.assert_array_equal(flat.values, found.values.reshape(-1))


@given(
    spectrum=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12),
    zeros=st.integers(0, 3),
    ridge=st.floats(1e-2, 10),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_solutions_are_within_their_bound_for_any_spectrum(spectrum, zeros, ridge, seed):
    values = (*spectrum, *[0.0] * zeros)
    j = Dense(jacobian(values, seed, len(values) + 2))
    y = np.random.default_rng(seed).standard_normal(j.n)
    matrix = j._matrix @ j._matrix.T
    expected = np.linalg.solve(matrix + ridge * np.eye(j.n), y)
    for found in (
        solve.of_matrix(matrix.copy(), EPS, j, y, ridge, rtol=1e-10, passes=0),
        solve.of_operator(j, y, ridge, rtol=1e-10, seed=seed),
    ):
        assert found.residual <= 1e-10 and found.notes == ()
        assert np.linalg.norm(found.values - expected) <= 1.01e-10 * np.linalg.norm(y) / ridge


@pytest.mark.parametrize("spectrum", ["0.9^i", "1/i", "spike"])
def test_the_preconditioner_saves_iterations(spectrum):
    j, y = Dense(jacobian(spectrum)), np.random.default_rng(0).standard_normal(200)
    found = solve.of_operator(j, y, 1e-3, rtol=1e-8)
    plain = solve.of_operator(j, y, 1e-3, rtol=1e-8, rank=0)
    np.testing.assert_allclose(found.values, plain.values, atol=1e-4 * abs(plain.values).max())
    assert found.iterations < plain.iterations
    assert plain.passes - 2 * plain.iterations in (2, 4)
    assert found.passes - 2 * found.iterations in (66, 68)


def test_a_short_budget_is_kept_and_what_does_not_converge_refused():
    j, y = Dense(jacobian("linear")), np.ones(200)
    with pytest.raises(ntkbench.BadInput, match=r"residual .* after 20 passes, above rtol=1e-12: take more passes"):
        solve.of_operator(j, y, 0.0, rtol=1e-12, passes=20)
    assert j.passes == 20
    found = solve.of_operator(j, y, 0.0, rtol=1e-12)
    np.testing.assert_allclose(found.values, np.linalg.solve(j._matrix @ j._matrix.T, y), rtol=1e-9)
    assert "other solutions" in found.notes[0] and found.notes[0] in repr(found) and found.error == np.inf


@pytest.mark.parametrize("memory", [None, 4000])
def test_theta_of_few_parameters_needs_a_ridge(memory):
    singular = nn.Linear(4, 1).double()
    with pytest.raises(ntkbench.BadInput, match="Theta is singular with 5 parameters for 20 outputs"):
        ntkbench.solve(singular, MANY, torch.ones(20, 1), ridge=0.0, memory=memory)
    assert ntkbench.solve(singular, MANY, torch.ones(20, 1), ridge=1e-3, memory=memory).residual < 1e-5


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("alike", [False, True])
def test_theta_of_a_repeated_sample_needs_a_ridge(dtype, alike):
    """Whether or not equal inputs have equal targets; with these there are solutions, but many."""
    x, y = torch.cat([X, X[:2]]), torch.cat([Y[:5], Y[:2] if alike else Y[5:7]])
    with pytest.raises(ntkbench.BadInput, match=r"not positive definite .* with ridge=0: take .* or more") as caught:
        ntkbench.solve(wide(), x, y, ridge=0.0, dtype=dtype)
    assert ("float64" in str(caught.value)) == (dtype == "float32")
    ridge = float(str(caught.value).partition("take ")[2].partition(" or more")[0])
    found = ntkbench.solve(wide(), x, y, ridge=ridge, dtype=dtype)  # the suggested ridge is enough
    assert found.residual <= 1e-5
    whole, right = theta(wide(), x).numpy(), y.numpy().reshape(-1)
    exact = np.linalg.solve(whole + ridge * np.eye(len(whole)), right)
    assert np.linalg.norm(found.values.reshape(-1) - exact) <= found.error
    assert found.error >= found.residual * float(y.norm()) / ridge


def test_a_factor_of_rounding_is_none_of_theta():
    """LAPACK factors it with a residual of zero, but an eigenvalue of 1e-18 is rounding."""
    y = np.array([1.0, 0.0])
    for smallest, singular in ((1e-9, True), (1e-3, False)):
        j = Dense(np.diag([1.0, smallest]))
        theta = np.asarray(j.ntk(j.basis(0, 2)), np.float64)
        if singular:
            with pytest.raises(ntkbench.BadInput, match=r"not positive definite .* with ridge=0"):
                solve.of_matrix(theta, EPS, j, y, 0.0, rtol=1e-5, passes=0)
        else:
            np.testing.assert_array_equal(solve.of_matrix(theta, EPS, j, y, 0.0, rtol=1e-5, passes=0).values, y)


def test_products_find_that_there_is_no_solution():
    x = torch.cat([MANY, MANY[:2]])
    y = torch.cat([Y, -Y[:2]])
    with pytest.raises(ntkbench.BadInput, match=r"residual .* above rtol=1e-05: take more passes, a larger ridge"):
        ntkbench.solve(wide(), x, y, ridge=0.0, passes=400, memory=LITTLE)


@pytest.mark.parametrize("memory", [None, LITTLE])
def test_a_kernel_of_zero_has_no_solution_without_a_ridge(memory):
    zero, x = nn.Linear(9, 2, bias=False).double(), torch.zeros(9, 9, dtype=torch.float64)
    with pytest.raises(ntkbench.BadInput, match="Theta is zero" if memory is None else "residual .* is 1 "):
        ntkbench.solve(zero, x, torch.ones(9, 2), ridge=0, memory=memory if memory is None else 100)
    found = ntkbench.solve(zero, x, torch.ones(9, 2), ridge=2.0, memory=memory if memory is None else 100)
    np.testing.assert_allclose(found.values, 0.5)


def test_a_tolerance_beyond_the_precision_is_refused():
    with pytest.raises(ntkbench.BadInput, match=r"above rtol=1e-12: take .* a larger rtol, or dtype='float64'"):
        ntkbench.solve(wide(), MANY, Y, ridge=1e-2, rtol=1e-12, dtype="float32", memory=LITTLE, passes=300)


class Branching(nn.Module):
    """A network that is another one in float64."""

    def __init__(self):
        super().__init__()
        self.inner = wide()

    def forward(self, x):
        return self.inner(x) * (1 if x.dtype == torch.float32 else 2)


def test_a_network_that_branches_on_precision_is_solved_in_its_own():
    model, x = Branching().float(), MANY[:6].float()
    found = ntkbench.solve(model, x, Y[:6], ridge=50)
    np.testing.assert_allclose(found.values.reshape(-1), exact(wide(), MANY[:6], Y[:6], 50), rtol=1e-3, atol=1e-5)


def test_a_factor_in_float32_is_refined_in_float64():
    single = wide().float()
    found = ntkbench.solve(single, MANY.float(), Y, ridge=1e-2, rtol=1e-10)
    assert found.residual <= 1e-10 and found.iterations >= 1 and found.certificate < 1e-12
    expected = exact(wide().float().double(), MANY.float().double(), Y, 1e-2)
    np.testing.assert_allclose(found.values.reshape(-1), expected, atol=1e-7 * abs(expected).max())


def test_a_float32_only_network_is_refined_in_float32():
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = wide(torch.float32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.dtype == torch.float32
            return self.net(x)

    kernel = ntkbench.Kernel(Single(), MANY.float())
    found = kernel.solve(Y, ridge=1.0, rtol=1e-3)
    assert 1e-9 < found.residual <= 1e-3 and kernel.regress(MANY[:2].float(), Y, ridge=1.0, rtol=1e-3).values.shape == (
        2,
        3,
    )
    with pytest.raises(ntkbench.BadInput, match="above rtol=1e-12"):
        kernel.solve(Y, ridge=1.0, rtol=1e-12)


@pytest.mark.parametrize("memory", [None, LITTLE])
@pytest.mark.parametrize(("scale", "dtype"), SCALES)
def test_scales_of_theta_do_not_matter(scale, dtype, memory):
    own = getattr(torch, dtype)
    one, found = (
        ntkbench.solve(Scaled(s, own), MANY.to(own), Y, ridge=5 * s**2, rtol=1e-3, memory=memory) for s in (1.0, scale)
    )
    np.testing.assert_allclose(found.values * scale**2, one.values, rtol=1e-3, atol=1e-5 * abs(one.values).max())
    assert found.residual <= 1e-3


@pytest.mark.parametrize("memory", [None, 1])
def test_one_sample_with_one_output_is_solved(memory):
    model = nn.Linear(4, 1).double()
    found = ntkbench.solve(model, X[:1], [[3.0]], ridge=1.0, memory=memory)
    assert found.values == pytest.approx(3 / (2 + float((X[0] ** 2).sum())))


@pytest.mark.parametrize("memory", [None, LITTLE])
def test_right_hand_sides_of_zero_and_of_any_scale_are_solved(memory):
    zero = ntkbench.solve(wide(), MANY, 0 * Y, ridge=0.5, memory=memory)
    assert not zero.values.any() and zero.residual == 0 and zero.notes == ()
    one, tiny = (
        ntkbench.solve(wide(), MANY, scale * Y, ridge=0.5, dtype="float32", memory=memory) for scale in (1, 1e-30)
    )
    np.testing.assert_allclose(tiny.values * 1e30, one.values, rtol=1e-3)


@pytest.mark.parametrize("memory", [None, LITTLE])
@pytest.mark.parametrize("scale", [2.0**520, 2.0**-550, 2.0**1020, 2.0**-960])
def test_right_hand_sides_whose_squares_overflow_or_underflow_are_solved(scale, memory):
    one, found = (ntkbench.Kernel(wide(), MANY, memory=memory).regress(MANY, s * Y, ridge=0.5) for s in (1.0, scale))
    np.testing.assert_allclose(found.solution.values / scale, one.solution.values, rtol=1e-9)
    np.testing.assert_allclose(found.values / scale, one.values, rtol=1e-9)
    assert found.solution.residual == pytest.approx(one.solution.residual) and one.solution.residual > 0
    assert found.solution.error / scale == pytest.approx(one.solution.error)


@pytest.mark.parametrize("memory", [None, 8 * 15**2])
def test_regression_predicts_other_inputs_as_numpy_does(memory):
    y = Y[:5]
    kernel = ntkbench.Kernel(net(), X, memory=memory)
    found = kernel.regress(X2, y, ridge=0.1, rtol=1e-10)
    expected = (rows(net(), X2) @ rows(net(), X).T).numpy() @ exact(net(), X, y, 0.1)
    np.testing.assert_allclose(found.values.reshape(-1), expected, rtol=1e-7)
    assert found.values.shape == (2, O) and found.passes == found.solution.passes + 2
    assert "predictions, 2 x 3, by (Theta + 0.1 I)^-1 y" in repr(found)
    assert found.certificate < 1e-7
    own = kernel.regress(X, y, ridge=1e-9, rtol=1e-8)
    np.testing.assert_allclose(own.values, y.numpy(), atol=1e-5)


@pytest.mark.slow
def test_functions_in_jax_are_solved():
    jnp = pytest.importorskip("jax.numpy")
    weights = {"w": jnp.asarray(np.arange(12.0).reshape(4, 3) / 10, "float32"), "b": jnp.zeros(3, "float32")}
    x, y = np.asarray(X, "float32"), np.asarray(Y[:5], "float32")
    kernel = ntkbench.Kernel(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), x, params=weights)
    matrix = np.asarray(kernel.ntk(), np.float64)
    expected = np.linalg.solve(matrix + np.eye(15), y.reshape(-1))
    np.testing.assert_allclose(kernel.solve(y, ridge=1.0).values.reshape(-1), expected, rtol=1e-3, atol=1e-4)
    between = np.asarray(kernel.ntk(np.asarray(X2, "float32")), np.float64).T
    predicted = kernel.regress(np.asarray(X2, "float32"), y, ridge=1.0).values
    np.testing.assert_allclose(predicted.reshape(-1), between @ expected, rtol=1e-3, atol=1e-4)
    assert kernel.spectrum(2).largest == pytest.approx(np.linalg.eigvalsh(matrix)[-1], rel=1e-4)


def test_groups_of_parameters_are_solved():
    groups = ntkbench.solve(net(), X, Y[:5], ridge=1.0, parameters={"first": "0.*", "last": "2.*"})
    assert list(groups) == ["first", "last"]


@pytest.mark.parametrize(
    ("says", "given"),
    [
        ("ridge must be a finite number that is not negative, got -1", {"ridge": -1}),
        ("ridge must be a finite number that is not negative, got nan", {"ridge": float("nan")}),
        ("rtol must be a number between 0 and 1", {"rtol": 0}),
        ("passes must be a positive whole number", {"passes": -1}),
        (r"y must be shaped like the outputs, \(5, 3\) or \(15,\), got shape \(4, 3\)", {"y": np.ones((4, 3))}),
        ("y has nan or infinite entries: all must be finite", {"y": np.full((5, 3), np.inf)}),
        ("y must hold real numbers", {"y": np.full((5, 3), "a")}),
        ("y must hold real numbers", {"y": None}),
        ("y must be an array", {"y": [[1.0], [1.0, 2.0]]}),
        (r"y must be shaped like the outputs, \(5, 3\) or \(15,\), got shape \(\)", {"y": 1.0}),
        ("unknown keyword 'method'", {"method": "hutchpp"}),
    ],
)
def test_invalid_arguments_are_refused(says, given):
    with pytest.raises(ntkbench.BadInput, match=says) as caught:
        ntkbench.solve(net(), X, **{"y": np.ones((5, 3)), "ridge": 1.0, **given})
    assert "\n" not in str(caught.value)


def test_regression_is_refused_where_samples_interact():
    kernel = ntkbench.Kernel(normed().train(), X)
    for memory in (None, 2000):
        found = ntkbench.solve(normed().train(), X, Y[:5], ridge=1.0, rtol=1e-9, memory=memory)
        np.testing.assert_allclose(found.values.reshape(-1), exact(normed().train(), X, Y[:5], 1.0), rtol=1e-6)
    with pytest.raises(ntkbench.BadInput, match="samples interact"):
        kernel.regress(X2, Y[:5], ridge=1.0)


def images() -> nn.Sequential:
    """BatchNorm that takes a single sample in train mode."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, O)
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), *layers).double()


@pytest.mark.parametrize("given", [lambda x: x, lambda x: {"input": x}], ids=["a tensor", "a mapping"])
def test_a_batch_of_one_sample_does_not_hide_that_samples_interact(given):
    """Predictions would depend on what else is predicted."""
    y, kernel = Y[:1], ntkbench.Kernel(images(), given(X[:1]))
    assert not kernel.problem.samples_interact, "nothing shows it"
    trace, predictions = (lambda x: kernel.ntk(x, kernel="trace")), (lambda x: kernel.regress(x, y, ridge=1.0))
    for new in (X2, X2[:1], torch.cat([X[:1], X2])):
        for use in (kernel.ntk, trace, predictions):
            with pytest.raises(ntkbench.BadInput, match=r"samples interact in this network, .* call model.eval\(\)"):
                use(given(new))
    for model in (images().eval(), net()):
        kernel, between = ntkbench.Kernel(model, given(X[:1])), rows(model, X2) @ rows(model, X[:1]).T
        for weights in (model, model.state_dict()):
            torch.testing.assert_close(kernel.at(weights).ntk(given(X2)), between.T)
        expected = between.numpy() @ exact(model, X[:1], y, 0.5)
        found = kernel.regress(given(X2), y, ridge=0.5, rtol=1e-9)
        np.testing.assert_allclose(found.values.reshape(-1), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_one_sample_of_a_function_in_jax_does_not_hide_that_samples_interact():
    jnp = pytest.importorskip("jax.numpy")

    def scaled(params, x):
        h = x @ params["w"] + params["b"]
        return jnp.tanh(h / jnp.sqrt((h**2).mean()))

    def plain(params, x):
        return jnp.tanh(x @ params["w"] + params["b"])

    weights = {"w": np.arange(12.0).reshape(4, 3) / 10, "b": np.ones(3)}
    x, x2 = X[:1].numpy(), X2.numpy()
    for new in (x2, x2[:1]):
        with pytest.raises(ntkbench.BadInput, match="samples interact"):
            ntkbench.ntk(scaled, x, new, params=weights)
    whole = np.asarray(ntkbench.ntk(plain, np.concatenate([x, x2]), params=weights))
    np.testing.assert_allclose(ntkbench.ntk(plain, x, x2, params=weights), whole[:3, 3:], rtol=1e-9)


class Centred(nn.Module):
    """Rows less their mean, so that large inputs cancel: the products in float32 are inaccurate."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        y = self.layer(x)
        return torch.tanh(3 * (y - y.mean(1, keepdim=True))).pow(2).sum(1)


@pytest.mark.parametrize("offset", [0, 1000, 3000])
@pytest.mark.parametrize("share", [0.1, 1, 100])
def test_the_error_of_a_solution_covers_the_rounding_of_products(offset, share):
    torch.manual_seed(0)
    model, x = Centred(), torch.randn(12, 20, 6) + offset
    whole = theta(copy.deepcopy(model).double(), x.double()).numpy()
    ridge, n = share * float(np.linalg.eigvalsh(whole)[-1]), len(whole)
    for y in np.random.default_rng(0).normal(size=(3, n)):
        found = ntkbench.solve(model, x, y, ridge=ridge, rtol=1e-3, memory=n * n * 4 + 1000)
        exact = np.linalg.solve(whole + ridge * np.eye(n), y)
        assert found.method == "conjugate_gradients"
        assert np.linalg.norm(found.values.reshape(-1) - exact) <= found.error
