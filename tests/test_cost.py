"""Predicted costs: passes and bytes are those of an estimate, errors of the right size, seconds of a fake clock."""

from __future__ import annotations

import importlib
import itertools
import math
import re

import numpy as np
import pytest
import torch
from conftest import mostly_slow
from torch import nn

import ntkbench
from ntkbench import cost, errors, methods, operations
from ntkbench.cost import samples, stand_in
from ntkbench.cost.costs import Cost, Costs
from ntkbench.cost.pilot import Pilot, pilot
from ntkbench.cost.rates import Rates
from ntkbench.methods.base import PreparedProblem
from ntkbench.metrics import METRICS
from ntkbench.options import Target
from ntkbench.problem import Problem

TARGET = Target(device="cpu")
FIXED = ("one_sided_reverse", "hutchinson", "hutchpp", "xtrace", "per_sample_trace", "nystrompp", "dense_jl")
DETERMINISTIC = ("direct", "naive_jacobian", "jacobian_contraction", "batched_jacobian", "ntk_vector_products")
LAYERWISE = ("structured_derivatives", "structured_block_u_statistics", "structured_sum_of_logits")


@pytest.fixture(scope="module")
def problem() -> Problem:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5))
    return ntkbench.Kernel(network, torch.randn(4, 6)).problem


@pytest.fixture(scope="module")
def predicted(problem) -> dict[str, Cost]:
    names = (*FIXED, *DETERMINISTIC, *LAYERWISE)
    return {each.method: each for each in cost.predict(problem, "trace", TARGET, rtol=0.2, names=names)}


@pytest.mark.parametrize("name", [*FIXED, *DETERMINISTIC, *LAYERWISE])
def test_predicted_passes_and_budgets_are_those_of_an_estimate(problem, predicted, name):
    found, method = predicted[name], methods.get(name)
    assert not found.reason and found.seconds > 0
    estimate = method.estimate(method.prepare(problem, TARGET), "trace", found.budget)
    assert found.passes == pytest.approx(estimate.passes)
    assert (found.budget is None) == (method.kind != "stochastic")
    assert (found.error == 0) == (method.kind == "exact")
    assert found.operations == method.operations(problem, "trace", found.passes) > 0
    assert found.samples == (4 if samples.needs_network(method) else None), "all samples, or a stand-in"


def test_predicted_bytes_are_the_largest_block_or_what_a_method_says(problem, predicted):
    (j,) = PreparedProblem(problem, TARGET).jacobians("trace")
    found = predicted["one_sided_reverse"]
    assert found.bytes == pytest.approx(found.budget * j.bytes_per_probe(), rel=0.01)
    assert predicted["direct"].bytes == pytest.approx(j.n * j.bytes_per_probe(), rel=0.01)
    for name in FIXED:
        needed = methods.get(name).bytes_needed(problem, "trace", TARGET, predicted[name].budget)
        assert predicted[name].bytes >= needed
    small = Target(device="cpu", memory=2**20)
    costs = {each.method: each for each in cost.predict(problem, "trace", small, rtol=0.2, names=("direct", "xtrace"))}
    assert costs["direct"].bytes <= 2**20
    assert "MiB" in costs["xtrace"].reason or costs["xtrace"].bytes <= 2**20


@pytest.mark.parametrize("name", ["gram_reverse", "jacobian_contraction"])
def test_a_smaller_stand_in_gives_the_same_passes_and_bytes(problem, predicted, monkeypatch, name):
    module = importlib.import_module("ntkbench.cost.predict")
    for size, value in {"MOST_COLUMNS": 16, "MOST_ROWS": 10, "FEWEST_SAMPLES": 2}.items():
        monkeypatch.setattr(module, size, value)
    (found,) = cost.predict(problem, "norm", TARGET, rtol=0.2, names=(name,))
    method = methods.get(name)
    estimate = method.estimate(method.prepare(problem, TARGET), "norm", found.budget)
    assert not found.reason and found.passes == pytest.approx(estimate.passes)
    (j,) = PreparedProblem(problem, TARGET).jacobians("norm")
    assert j.bytes_per_probe() <= found.bytes < 2 * found.passes * (j.bytes_per_probe() + 2 * j.N * j.P * j.itemsize)


def test_predicted_errors_have_the_size_of_those_on_the_network(problem):
    """Within a factor of 3 of the stated ones, for estimators that see different sides of the spectrum."""
    names = ("one_sided_reverse", "one_sided_forward", "per_sample_trace", "hutchinson")
    for found in cost.predict(problem, "trace", TARGET, rtol=0.1, names=names):
        method = methods.get(found.method)
        estimate = method.estimate(method.prepare(problem, TARGET), "trace", found.budget)
        assert 1 / 3 < found.error / (estimate.standard_error / estimate.value) < 3, found


def test_methods_that_do_not_apply_have_a_reason(problem):
    found = cost.predict(
        problem, "norm", TARGET, names=("xtrace", "recurrent_exact_trace", "nt_structured_derivatives")
    )
    assert {each.method: each.reason for each in found} == {
        "xtrace": "computes the trace only",
        "recurrent_exact_trace": "computes the trace only",
        "nt_structured_derivatives": "runs on jax only",
    }
    assert found.best is None and found.code() == ""


def test_a_method_that_fails_is_a_row(problem, monkeypatch):
    def refuse(*_: object) -> None:
        raise ZeroDivisionError("of a test")

    monkeypatch.setattr(methods.get("one_sided_reverse"), "accumulator", refuse)
    (found,) = cost.predict(problem, "trace", TARGET, names=("one_sided_reverse",))
    assert found.reason == "ZeroDivisionError: of a test"


SMALL = {
    "mlp": lambda: (nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(6, 5)),
    "one output": lambda: (nn.Linear(5, 1), torch.randn(6, 5)),
    "interacting": lambda: (nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), torch.randn(6, 5)),
    "recurrent": lambda: (nn.GRU(3, 4, batch_first=True), torch.randn(3, 4, 3)),
}


@pytest.mark.parametrize(
    ("name", "metric"),
    mostly_slow(
        itertools.product(SMALL, METRICS),
        [("mlp", "norm"), ("one output", "norm"), ("interacting", "alignment"), ("recurrent", "effective_rank")],
    ),
)
def test_no_method_fails_unexpectedly_on_a_small_network(name, metric):
    """A reason that begins with the type of an exception is a fault of a method or of its prediction."""
    torch.manual_seed(0)
    (model, x), (other, _) = SMALL[name](), SMALL[name]()
    given = (other.double(),) if metric == "alignment" else ()
    found = ntkbench.recommend(model.double(), x.double(), *given, metric=metric, rtol=0.1)
    assert {each.method for each in found} == set(methods.names())
    unexpected = {each.method: each.reason for each in found if re.match(r"[A-Z]\w*(Error|Exception)\b", each.reason)}
    assert not unexpected


def test_interacting_samples_and_alignment():
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    other = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    found = ntkbench.recommend(network, torch.randn(6, 4), other, metric="alignment", rtol=0.2)
    by_name = {each.method: each for each in found}
    assert "interact" in by_name["structured_derivatives"].reason
    assert by_name["batched_jacobian"].passes == 36 and not by_name["hutchinson"].reason
    assert found.best is not None and found.code().startswith("ntkbench.alignment(model, other, inputs, method=")


def test_recurrent_networks():
    problem = ntkbench.from_recurrent(nn.GRU(3, 4, batch_first=True), torch.randn(3, 5, 3))
    names = ("recurrent_exact_trace", "group_u_statistics")
    found = {each.method: each for each in cost.predict(problem, "trace", TARGET, rtol=0.2, names=names)}
    assert found["recurrent_exact_trace"].passes == 4 * 6 / 2 and found["recurrent_exact_trace"].seconds > 0
    assert not found["group_u_statistics"].reason


def test_functions_in_jax():
    jnp = pytest.importorskip("jax.numpy")
    problem = ntkbench.from_function(lambda w, x: jnp.tanh(x @ w), jnp.ones((4, 3)), jnp.ones((3, 2)))
    (found,) = cost.predict(problem, "trace", Target("jax", device="cpu"), rtol=0.3, names=("one_sided_reverse",))
    assert not found.reason and found.seconds > 0 and found.passes == found.budget


def test_groups_of_parameters_have_a_table_each():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(3, 3)
    found = ntkbench.recommend(model, x, parameters={"first": "0.*", "last": "1.*"}, rtol=0.3)
    assert set(found) == {"first", "last"} and all(costs.best for costs in found.values())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"metric": "rank"}, "unknown metric 'rank'"),
        ({"rtol": 2}, "rtol must be a number between 0 and 1"),
        ({"metric": "alignment"}, "the alignment needs a second network: give other"),
        ({"other": nn.Linear(3, 2)}, "the trace is of one network: omit other"),
        ({"metric": "alignment", "other": torch.ones(4, 2)}, "between two networks, got a target array"),
        ({"memry": 3}, "unknown keyword 'memry'"),
    ],
)
def test_bad_input_is_one_line(more, said):
    with pytest.raises(errors.BadInput, match=said):
        ntkbench.recommend(nn.Linear(3, 2), torch.ones(4, 3), **more)


# --- the parts


def test_a_pilot_sees_ranks_and_alignment():
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False).double()
    kernel = ntkbench.Kernel(model, torch.randn(40, 5, dtype=torch.float64))
    exact = float(kernel.effective_rank())
    (j,) = PreparedProblem(kernel.problem, Target(dtype="float64", device="cpu")).jacobians("trace")
    found = pilot([j], independent=True)
    assert exact / 2 < found.effective_rank < 2 * exact
    assert found.block_rank == pytest.approx(3, rel=0.01), "outputs of a linear layer have orthogonal gradients"
    assert found.alignment == 1 and found.passes == 16
    assert pilot([j, j], independent=False).alignment == pytest.approx(1)


@pytest.mark.parametrize("ranks", [(4, 1.5), (20, 4), (60, 7.9), (10, 7.5)])
def test_a_stand_in_has_the_given_ranks(ranks):
    rank, block_rank = ranks
    known = Pilot(rank, block_rank, 0.6, 16)
    one, other = stand_in.matrices((24, 8, 512), known, 2, torch.float64, torch.device("cpu"))
    theta, theta_f = (m.flatten(0, 1) @ m.flatten(0, 1).T for m in (one, other))
    blocks = torch.stack([m @ m.T for m in one])
    found = float(theta.trace() ** 2 / (theta**2).sum())
    own = float((blocks.diagonal(dim1=1, dim2=2).sum(1) ** 2).sum() / (blocks**2).sum())
    assert rank / 1.6 < found < 1.6 * rank and block_rank / 1.6 < own < 1.6 * block_rank
    alignment = float((theta * theta_f).sum() / theta.norm() / theta_f.norm())
    assert 0.4 < alignment < 0.85


def test_decaying_shares():
    for size, squares in ((50, 0.1), (50, 0.9), (7, 1 / 7)):
        found = stand_in.decaying(size, squares)
        assert found.sum() == pytest.approx(1) and (found**2).sum() == pytest.approx(squares, rel=1e-3)
        assert (np.diff(found) <= 1e-12).all()
    assert stand_in.decaying(4, 0.01).tolist() == [0.25] * 4


def test_a_stand_in_gives_the_products_of_a_network():
    asked = stand_in.Asked()
    matrix = torch.randn(3, 2, 5)
    j = stand_in.StandIn(matrix, lambda seed: None, 2**20, 100, asked)
    J = matrix.flatten(0, 1)
    v, w = torch.randn(4, 3, 2), torch.randn(4, 3, 5)
    torch.testing.assert_close(j.sample_vjp(slice(0, 3), v), torch.einsum("kbo,bop->kbp", v, matrix))
    torch.testing.assert_close(j.sample_jvp(slice(1, 3), w[:, 1:]), torch.einsum("kbp,bop->kbo", w, matrix)[:, 1:])
    torch.testing.assert_close(j.ntk(J.T[:2]), J.T[:2] @ J @ J.T)
    assert asked.products == {("sample_vjp", 4.0): 1, ("sample_jvp", 8 / 3): 1, ("vjp", 2): 1, ("jvp", 2): 1}


def test_rates_grow_with_the_size(problem):
    (j,) = PreparedProblem(problem, TARGET).jacobians("trace")
    rates = Rates(j)
    for kind in ("vjp", "jvp", "row", "sample_vjp", "sample_jvp", "sample_squares", "group_gradients"):
        small, large = rates.seconds(kind, 1), rates.seconds(kind, 640)
        assert 0 < small < large < math.inf


class Steps:
    """A clock that advances by the same time whenever it is read."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.mark.parametrize("name", ["one_sided_reverse", "direct"])
def test_seconds_are_those_of_the_products_on_a_clock(problem, monkeypatch, name):
    """Each product takes one step of the clock, so the prediction is a number of steps on any machine."""
    clock = Steps(1e-3)
    for module in ("rates", "stand_in", "predict"):
        monkeypatch.setattr(importlib.import_module(f"ntkbench.cost.{module}").time, "perf_counter", clock)
    (found,) = cost.predict(problem, "trace", TARGET, rtol=0.2, names=(name,))
    sizes = {"one_sided_reverse": [found.passes], "direct": [found.passes / 2] * 2}[name]
    # Blocks of up to 64 passes are measured, at one step each; the time of larger ones is proportional to their passes.
    products = sum(1e-3 * max(1.0, size / 64) for size in sizes)
    assert products <= found.seconds <= products + 4e-3, "and a few steps of the forward pass and of other work"


def test_a_product_that_would_take_too_long_is_not_measured(problem):
    (j,) = PreparedProblem(problem, TARGET).jacobians("trace")
    assert len(Rates(j)._measured("vjp")[0]) == 4
    assert list(Rates(j, lambda passes: passes)._measured("vjp")[0]) == [1]


def test_operations_are_those_of_passes_and_of_products(problem):
    N, n, P = problem.N, problem.n, problem.P
    assert operations.of_pass(problem) == 4 * N * P
    exact = methods.get("jacobian_contraction")
    assert exact.operations(problem, "trace", problem.O) == 4 * N * P * problem.O
    assert exact.operations(problem, "norm", problem.O) == 4 * N * P * problem.O + n**2 * P
    assert exact.operations(problem, "alignment", 10) == 4 * N * P * 10 + 2 * n**2 * P
    pairs = methods.get("block_u_statistics")
    assert pairs.operations(problem, "norm", 6) == 4 * N * P * 6 + (6 * N) ** 2 * P
    by_layers = methods.get("structured_derivatives")
    kernel = sum(N**2 * (D + problem.O**2 * C) for D, C in ((6, 12), (12, 5)))
    assert by_layers.operations(problem, "norm", problem.O) == 2 * N * P * problem.O + kernel
    assert methods.get("hutchinson").operations(problem, "norm", 32) == 32 * 4 * N * P


def test_a_quadratic_is_extrapolated():
    assert samples.extrapolated([(2, 1 + 8.0), (8, 1 + 128.0), (32, 1 + 2048.0)], 64) == pytest.approx(8193, rel=1e-6)
    assert samples.extrapolated([(2, 5.0), (8, 3.0)], 8) == 3.0


def test_a_table_has_the_best_first_and_its_code():
    costs = Costs(
        [
            Cost("slow", "exact", 10, 2.0, 2**20, 0.0, 0.0),
            Cost("rough", "stochastic", 64, 0.1, 2**10, 0.2, 0.4, 64),
            Cost("fast", "stochastic", 640, 1.0, 2**31, 0.004, 0.009, 640, accepts_rtol=True, operations=2.53e9),
            Cost("biased", "approximate", 1, 0.01, None, 0.001, 0.001),
            Cost("none", "exact", reason="samples interact"),
        ],
        "norm",
        0.01,
        ("a note",),
    )
    assert [each.method for each in costs] == ["fast", "slow", "biased", "rough", "none"]
    assert costs.code('device="cpu"') == 'ntkbench.norm(model, inputs, method="fast", rtol=0.01, device="cpu")'
    lines = repr(costs).splitlines()
    assert lines[0].split() == ["method", "kind", "passes", "operations", "seconds", "memory", "error"]
    assert lines[1].split() == ["fast", "stochastic", "640", "2.5e+09", "1", "s", "2", "GiB", "0.4", "%"]
    assert lines[3].endswith("has a bias") and lines[4].endswith("over rtol=0.01")
    assert lines[5].endswith("samples interact") and lines[6] == "a note"
    surer = Costs([*costs], "norm", 0.01, confidence=0.99)
    assert surer.code() == 'ntkbench.norm(model, inputs, method="fast", rtol=0.01, confidence=0.99)'
    fixed = Costs([Cost("hutchpp", "stochastic", 240, 1.0, 1, 0.0, 0.0, 246)], "trace", 0.01)
    assert fixed.code() == 'ntkbench.trace(model, inputs, method="hutchpp", passes=246)'
