"""Metrics of the whole kernel in the grid, by exact and approximate kernels."""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import pytest
import torch
from conftest import mostly_slow

import ntkbench
from ntkbench import methods, metrics, problems, testing
from ntkbench.errors import BadInput, Unavailable, Undefined
from ntkbench.estimators import regression
from ntkbench.measure import cells
from ntkbench.measure.config import Config
from ntkbench.metrics import OF_KERNEL, REGRESSION, SPECTRAL
from ntkbench.options import Target
from ntkbench.problems.base import reference

TARGET = Target("torch", "float64", "cpu")


def kernel(problem) -> np.ndarray:
    J = testing.explicit_jacobian(problem)
    return J @ J.T


def by_definition(theta: np.ndarray) -> dict[str, float]:
    values = np.linalg.eigvalsh(theta)
    shares = values[values > 1e-12 * values.max()] / values.sum()
    entropy = math.exp(-(shares * np.log(shares)).sum())
    return dict(zip(SPECTRAL, (values.max(), values.max() / values.min(), entropy), strict=True))


def outputs(problem, end) -> np.ndarray:
    module = copy.deepcopy(problem.network).double()
    weights = {key: torch.from_numpy(w).double() for key, w in problem.weights(end).items()}
    found = torch.func.functional_call(module, weights, (torch.from_numpy(problem.x).double(),))
    return found.detach().numpy().reshape(problem.N, problem.O)


def ridge_regression(theta: np.ndarray, change: np.ndarray) -> float:
    """The regression error by its definition, from Theta ``[n, n]``."""
    N, O = change.shape  # noqa: E741 - the field's symbol
    rows, y = (N + 1) // 2 * O, change.reshape(-1)
    among = theta[:rows, :rows]
    among = among + 1e-3 * among.diagonal().mean() * np.eye(rows)
    left = theta[rows:, :rows] @ np.linalg.solve(among, y[:rows]) - y[rows:]
    return float(np.linalg.norm(left) / np.linalg.norm(y[rows:]))


def estimates(method, problem, only=None, **more):
    target = Target(**{"backend": "torch", "dtype": "float64", "device": "cpu"} | more)
    prepared = method.prepare(problem, target)
    return {metric: method.estimate(prepared, metric) for metric in SPECTRAL if only in (None, metric)}


def test_exact_values_match_the_explicit_kernel():
    problem = testing.smooth_problem()
    truth, found = by_definition(kernel(problem)), estimates(methods.get("structured_derivatives"), problem)
    for metric, estimate in found.items():
        assert estimate.value == pytest.approx(truth[metric], rel=1e-8)
        assert estimate.standard_error is None and estimate.metric == metric and estimate.passes == problem.O
        assert estimate.certificate < 1e-10
        low, high = estimate.interval()
        assert low <= truth[metric] <= high
    single = estimates(methods.get("structured_derivatives"), problem, dtype="float32")
    for metric, estimate in single.items():
        low, high = estimate.interval()
        assert low <= truth[metric] <= high


@pytest.mark.parametrize("name", [name for name in methods.names() if name.startswith("nt_")])
def test_neural_tangents_methods_give_spectral_metrics(name):
    problem = testing.smooth_problem()
    truth = by_definition(kernel(problem))
    for dtype in ("float64", "float32"):
        for metric, estimate in estimates(methods.get(name), problem, backend="jax", dtype=dtype).items():
            low, high = estimate.interval()
            assert low <= truth[metric] <= high and high / low < (1.001 if dtype == "float64" else 10)
            assert estimate.certificate < 1e-4 and estimate.metric == metric


@pytest.mark.parametrize("n", [30, 300])
def test_intervals_cover_the_entropy_of_a_kernel_of_rank_one(n):
    x = torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    problem = ntkbench.from_module(torch.nn.Linear(1, 1, bias=False).double(), x)
    for dtype in ("float64", "float32"):
        estimate = estimates(methods.get("structured_derivatives"), problem, only=SPECTRAL[2], dtype=dtype)[SPECTRAL[2]]
        low, high = estimate.interval()
        assert low <= 1 <= high


def test_the_trace_kernel_may_have_more_rows_than_there_are_parameters():
    class Waves(torch.nn.Module):
        """Three functions of one affine map, so that the trace kernel is a sum of three kernels of rank two."""

        def __init__(self) -> None:
            super().__init__()
            self.map = torch.nn.Linear(1, 1).double()

        def forward(self, x):
            return torch.sin(self.map(x) * torch.arange(1, 4))

    torch.manual_seed(0)
    x = torch.randn(4, 1, dtype=torch.float64)
    problem = ntkbench.from_module(Waves(), x)
    assert problem.P == 2
    truth = by_definition(np.einsum("aibi->ab", kernel(problem).reshape(4, 3, 4, 3)) / 3)["condition_number"]
    method = methods.get("trace_kernel")
    found = method.estimate(method.prepare(problem, TARGET), "condition_number")
    assert found.value == pytest.approx(truth, rel=1e-4)


def test_kernels_between_samples_stand_for_a_kronecker_product():
    problem = testing.smooth_problem(N=4, outputs=3)
    for name in ("trace_kernel", "structured_sum_of_logits"):
        method = methods.get(name)
        found = estimates(method, problem)
        theta = kernel(problem).reshape(4, 3, 4, 3)
        A = np.einsum("aibi->ab", theta) / 3 if name == "trace_kernel" else theta.sum((1, 3)) / 3
        truth = by_definition(np.kron(A, np.eye(3)))
        for metric, estimate in found.items():
            assert estimate.value == pytest.approx(truth[metric], rel=1e-8), (name, metric)


def test_a_condition_number_that_is_not_known_is_refused():
    wide = testing.smooth_problem("singular", N=20, inputs=2, hidden=2, outputs=4)  # n = 80, P = 18
    method = methods.get("structured_derivatives")
    with pytest.raises(Unavailable, match="singular, as there are only 18 parameters"):
        method.estimate(method.prepare(wide, TARGET), "condition_number")
    assert set(reference.of_kernel(wide)) == {"largest_eigenvalue", "entropy_effective_rank", REGRESSION}
    with pytest.raises(Undefined, match="may be zero"):
        metrics.of_eigenvalues("condition_number", np.array([1.0, 1e-9]), error=1e-8)
    with pytest.raises(Undefined, match="not defined where Theta is zero"):
        metrics.of_eigenvalues("entropy_effective_rank", np.zeros(3))


def test_references_are_exact_and_cached(monkeypatch):
    problem = testing.smooth_problem("for_references", N=5)
    truth = by_definition(kernel(problem))
    truth[REGRESSION] = ridge_regression(kernel(problem), outputs(problem, "theta_f") - outputs(problem, "theta_0"))
    assert reference.of_kernel(problem) == pytest.approx(truth, rel=1e-8)
    monkeypatch.setattr(reference, "_jacobians", lambda _: 1 / 0)
    assert reference.of_kernel(problem) == pytest.approx(truth, rel=1e-8), "from the cache"
    monkeypatch.setattr(reference, "MEMORY", 100)
    with pytest.raises(Unavailable, match="exact eigenvalues of for_references take"):
        reference.of_kernel(problem)


def test_the_grid_has_kernel_metrics_only_where_they_are_named():
    block = {"problems": ["digits_mlp[N=4]"], "methods": "all", "passes": [8], "metrics": list(OF_KERNEL)}
    config = Config.model_validate({"profile": "x", "threads": 1, "grid": [block]})
    made = cells.cells(config)
    assert {cell.metric for cell in made} == set(OF_KERNEL)
    assert {cell.method for cell in made} == {name for name in methods.names() if methods.get(name).kernel_metrics}
    everything = Config.model_validate({"profile": "x", "threads": 1, "grid": [block | {"metrics": "all"}]})
    assert {cell.metric for cell in cells.cells(everything)} == set(metrics.METRICS)
    with pytest.raises(ValueError, match="gives largest_eigenvalue"):
        Config.model_validate(
            {"profile": "x", "threads": 1, "grid": [block | {"methods": ["hutchinson"], "metrics": [SPECTRAL[0]]}]}
        )


@functools.cache
def decaying():
    """A problem with n = 120 and a spectrum of several decades."""
    return testing.smooth_problem("decaying", N=40, inputs=8, hidden=16, outputs=3)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_intervals_of_the_largest_eigenvalue_by_products_reach_it(backend):
    problem, method = decaying(), methods.get("block_lanczos")
    truth = by_definition(kernel(problem))["largest_eigenvalue"]
    prepared = method.prepare(problem, Target(backend, "float64", "cpu"))
    found = [method.estimate(prepared, "largest_eigenvalue", 32, seed) for seed in range(20)]
    assert all(each.value <= truth * (1 + 1e-9) and each.interval()[1] >= truth for each in found)
    assert all(0 < each.standard_error < 0.6 * truth and each.passes <= 32 for each in found)
    more = method.estimate(prepared, "largest_eigenvalue", 4096)
    assert more.value == pytest.approx(truth, rel=1e-7) and more.passes < 100, "it ends at a small error"
    assert more.standard_error <= method.rtol * truth and more.interval()[1] >= truth


@pytest.mark.parametrize("passes", mostly_slow([32, 640], 1))
def test_intervals_of_the_entropy_effective_rank_by_products_cover_it(passes):
    problem, method = decaying(), methods.get("block_lanczos")
    truth = by_definition(kernel(problem))["entropy_effective_rank"]
    prepared = method.prepare(problem, TARGET)
    found = [method.estimate(prepared, "entropy_effective_rank", passes, seed) for seed in range(40)]
    inside = [low <= truth <= high for low, high in (each.interval() for each in found)]
    assert np.mean(inside) > 0.8 and {each.degrees for each in found} == {11 if passes == 640 else 7}
    assert max(each.passes for each in found) <= passes
    errors = [abs(each.value / truth - 1) for each in found]
    assert np.median(errors) < {32: 0.2, 640: 0.06}[passes]


def test_products_give_no_condition_number_and_no_moment():
    problem, method = testing.smooth_problem(), methods.get("block_lanczos")
    said = "computes the largest eigenvalue and entropy effective rank only"
    assert method.unsupported_reason(problem, "condition_number", TARGET, 64) == said
    with pytest.raises(BadInput, match=said):
        ntkbench.trace(torch.nn.Linear(2, 1), torch.ones(3, 2), method="block_lanczos", passes=64)


def test_estimates_and_rows_say_which_kernel_they_are_of():
    problem = testing.smooth_problem()
    for name, kernel_of in (("trace_kernel", "trace kernel ⊗ I_O"), ("structured_derivatives", "Theta")):
        method = methods.get(name)
        assert method.computes == kernel_of
        for metric in ("norm", "largest_eigenvalue"):
            assert method.estimate(method.prepare(problem, TARGET), metric).kernel == kernel_of
    for name in methods.names():
        method = methods.get(name)
        assert (method.computes != "Theta") == (method.kind == "approximate"), name
    model, x = torch.nn.Linear(2, 2), torch.ones(3, 2)
    found = ntkbench.norm(model, x, method="sum_of_logits")
    assert repr(found).startswith("norm of pNTK ⊗ I_O = ") and repr(ntkbench.norm(model, x)).startswith("norm = ")
    assert type(found).from_json(found.to_json()) == found
    several = ntkbench.metrics_of(model, x, method="sum_of_logits")
    assert "trace of pNTK ⊗ I_O" in repr(several) and "trace of pNTK ⊗ I_O" in several._repr_html_()


def test_other_methods_refuse_spectral_metrics():
    problem = problems.load("digits_mlp[N=4]")
    assert "computes the trace" in methods.get("xtrace").unsupported_reason(problem, SPECTRAL[0], TARGET, 8)
    with pytest.raises(BadInput, match="unknown metric"):
        metrics.check(SPECTRAL[0])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["structured_derivatives", "nt_structured_derivatives", "nt_jacobian_contraction"])
def test_the_regression_error_matches_the_explicit_kernel(name, dtype):
    problem, method = testing.smooth_problem("regressed", N=5), methods.get(name)
    change = outputs(problem, "theta_f") - outputs(problem, "theta_0")
    truth = ridge_regression(kernel(problem), change)
    prepared = method.prepare(problem, Target(method.backends[0], dtype, "cpu"))
    found = method.estimate(prepared, REGRESSION)
    low, high = found.interval()
    assert low <= truth <= high and 0 < truth < 10 and found.metric == REGRESSION
    assert high / low < (1 + 1e-6 if dtype == "float64" else 10)


def test_the_regression_error_of_a_kernel_between_samples_is_that_of_a_kronecker_product():
    problem = testing.smooth_problem("between", N=6, outputs=3)
    theta = kernel(problem).reshape(6, 3, 6, 3)
    change = outputs(problem, "theta_f") - outputs(problem, "theta_0")
    for name, A in (
        ("trace_kernel", np.einsum("aibi->ab", theta) / 3),
        ("structured_sum_of_logits", theta.sum((1, 3)) / 3),
    ):
        method = methods.get(name)
        found = method.estimate(method.prepare(problem, TARGET), REGRESSION)
        assert found.value == pytest.approx(ridge_regression(np.kron(A, np.eye(3)), change), rel=1e-8), name


def test_a_linear_network_is_predicted_up_to_the_ridge(monkeypatch):
    torch.manual_seed(0)
    linear = torch.nn.Linear(3, 2, bias=False).double()
    x = torch.randn(12, 3, dtype=torch.float64)
    trained = copy.deepcopy(linear)
    with torch.no_grad():
        trained.weight += torch.arange(6.0).reshape(2, 3)
    problem = ntkbench.from_module(linear, x, trained)
    method = methods.get("structured_derivatives")
    prepared = method.prepare(problem, TARGET)
    small = method.estimate(prepared, REGRESSION).value
    assert 0 < small < 1e-2
    monkeypatch.setattr(regression, "RIDGE", 1e-6)
    assert method.estimate(prepared, REGRESSION).value < 2e-3 * small


@pytest.mark.parametrize("relative", [1e-12, 1e-8])
def test_the_bound_on_the_regression_error_holds_for_rounded_kernels(relative):
    rng = np.random.default_rng(3)
    worst = 0.0
    for _ in range(40):
        J, change = rng.normal(size=(8, 5)) * np.logspace(0, -2, 5), rng.normal(size=(8, 1))
        theta = J @ J.T
        size = np.sqrt(theta.diagonal())
        noise = rng.choice([-1, 1], size=theta.shape)
        rounded = theta + relative * np.outer(size, size) * (np.triu(noise) + np.triu(noise, 1).T)
        moved = abs(regression.regression_error(rounded, change) - regression.regression_error(theta, change))
        bound = regression.sensitivity(theta, change, relative)
        assert moved <= bound
        worst = max(worst, moved / bound)
    assert worst > 0.01, "the bound is of the right size"
    assert regression.sensitivity(theta, change, 0.1) == math.inf


def test_an_undefined_regression_error_is_refused():
    with pytest.raises(Undefined, match="one sample"):
        regression.regression_error(np.ones((1, 1)), np.ones((1, 1)))
    with pytest.raises(Undefined, match="Theta is zero"):
        regression.regression_error(np.zeros((4, 4)), np.ones((4, 1)))
    with pytest.raises(Undefined, match="training does not change"):
        regression.regression_error(np.eye(4), np.array([1.0, 1, 0, 0])[:, None])
    untrained = ntkbench.from_module(torch.nn.Linear(2, 1), torch.randn(4, 2))
    method = methods.get("structured_derivatives")
    assert "no trained weights" in method.unsupported_reason(untrained, REGRESSION, Target(device="cpu"))
