"""Estimators against their theory: unbiased, with the variance of the formula, and exact where stated."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import loaded, metrics_of, mostly_slow, written_out
from torch import nn

import ntkbench
from ntkbench import methods, testing
from ntkbench.errors import OverMemory, Undefined
from ntkbench.estimators import standard_errors, state_factors
from ntkbench.methods.base import Accumulating, Incremental
from ntkbench.methods.base.stochastic import _does_not_differ
from ntkbench.methods.group_u_statistics import GroupUStatistics
from ntkbench.operators import Rng
from ntkbench.operators.recurrent.state_kernel import StateKernel
from ntkbench.options import BACKENDS, Target

NEW = (
    "per_sample_trace",
    "block_u_statistics",
    "group_u_statistics",
    "gram_reverse",
    "gram_forward",
    "one_sided_orthonormal",
)
ACCUMULATING = [n for n in methods.names() if isinstance(methods.get(n), Accumulating)]
SEEDS = 400


def prepared(name: str, label: str = "tanh_net", backend: str = "torch", dtype: str = "float64", memory: int = 2**30):
    return methods.get(name).prepare(loaded(label), Target(backend, dtype, "cpu", memory))


@functools.cache
def truth(label: str) -> dict[str, float]:
    J, J_f = written_out(loaded(label)), written_out(loaded(label), "theta_f")
    return metrics_of(J @ J.T, J_f @ J_f.T)


def estimates(name: str, metric: str, probes: int, seeds: int, label: str = "tanh_net", memory: int = 2**30):
    """Values and standard errors over seeds."""
    method, ready = methods.get(name), prepared(name, label, memory=memory)
    passes = probes * method.passes_per_probe(metric)
    found = [method.estimate(ready, metric, passes, seed) for seed in range(seeds)]
    return np.array([(e.value, e.standard_error) for e in found]).T


class Fixed(Rng):
    """The same probes for every backend, those in parameter space in the backend's order of parameters."""

    def __init__(self, make: Any, columns: np.ndarray | None = None) -> None:
        self._make, self._columns, self._generator = make, columns, np.random.default_rng(0)

    def sign(self, k: int, dim: int) -> Any:
        signs = np.sign(self._generator.random((k, dim)) - 0.5)
        return self._make(signs if self._columns is None or dim != len(self._columns) else signs[:, self._columns])

    def normal(self, k: int, dim: int) -> Any:
        return self._make(self._generator.standard_normal((k, dim)))


def accumulated(
    name: str, names: tuple[str, ...], probes: tuple[int, ...], backend: str = "torch", memory: int = 2**30
):
    """An accumulator of fixed probes, and its operators."""
    import jax.numpy as jnp

    method = methods.get(name)
    jacobians = prepared(name, "tanh_net", backend, memory=memory).jacobians(names[-1])
    if backend == "torch":
        rng = Fixed(torch.from_numpy)
    else:  # which takes parameters by name
        weights, start, places = loaded("tanh_net").theta_0, 0, {}
        for key, w in weights.items():
            places[key] = np.arange(start, start + w.size)
            start += w.size
        rng = Fixed(jnp.asarray, np.concatenate([places[key] for key in sorted(weights)]))
    accumulator = method.accumulator(names, jacobians, rng)
    for k in probes:
        accumulator.extend(k)
    return accumulator, jacobians


@pytest.mark.parametrize(
    ("name", "probes", "memory"),
    [
        ("block_u_statistics", 2, 2**30),
        ("block_u_statistics", 5, 2**30),
        ("block_u_statistics", 8, 1),
        ("group_u_statistics", 2, 2**30),
        ("group_u_statistics", 5, 2**30),
        ("group_u_statistics", 8, 1),
        ("gram_reverse", 4, 2**30),
        ("gram_reverse", 9, 1),
        ("gram_forward", 5, 2**30),
    ],
)
@pytest.mark.slow
def test_all_moments_are_unbiased(name, probes, memory, monkeypatch):
    """The square of the norm and the cross term, as the accumulator has them."""
    monkeypatch.setattr(GroupUStatistics, "max_groups", 2)  # of three samples
    J, J_f = written_out(loaded("tanh_net")), written_out(loaded("tanh_net"), "theta_f")
    theta, theta_f = J @ J.T, J_f @ J_f.T
    exact = np.array([np.trace(theta), (theta**2).sum(), (theta_f**2).sum(), (theta * theta_f).sum()])
    method, ready, found = methods.get(name), prepared(name, memory=memory), []
    seeds = SEEDS if memory > 1 else SEEDS // 4  # one probe at a time takes long
    for seed in range(seeds):
        jacobians = ready.jacobians("alignment")
        accumulator = method.accumulator(("trace", "norm", "alignment"), jacobians, jacobians[0].rng(seed))
        accumulator.extend(int(probes * accumulator.recompute_factor))
        found.append(accumulator.moments().means[:4])
    found = np.array(found)
    z = (found.mean(0) - exact) / (found.std(0, ddof=1) / math.sqrt(seeds))
    assert np.abs(z).max() < 4


@pytest.mark.parametrize("name", mostly_slow(["per_sample_trace", "per_sample_trace_forward"], 1))
def test_variance_of_the_per_sample_trace_is_that_of_the_formula(name):
    problem = loaded("tanh_net")
    J = written_out(problem).reshape(problem.N, problem.O, problem.P)
    blocks = J.transpose(0, 2, 1) @ J if name.endswith("forward") else J @ J.transpose(0, 2, 1)
    expected = 2 * sum((b**2).sum() - (np.diag(b) ** 2).sum() for b in blocks) / 20_000
    estimate = methods.get(name).estimate(prepared(name), "trace", 20_000, 0)
    assert estimate.standard_error**2 == pytest.approx(expected, rel=0.15)
    assert abs(estimate.value - truth("tanh_net")["trace"]) < 4 * estimate.standard_error
    values, errors = estimates(name, "trace", 2, 1500)
    errors = np.nan_to_num(errors)  # two probes of two outputs are often equal, and their error is then unknown
    assert values.var(ddof=1) == pytest.approx(expected * 10_000, rel=0.2)
    assert (errors**2).mean() == pytest.approx(expected * 10_000, rel=0.2)


@pytest.mark.slow
def test_orthonormal_probes_are_a_finite_population():
    J = written_out(loaded("tanh_net"))
    theta, n = J @ J.T, 6
    for k in (2, 4):
        expected = 2 * n * (n - k) / ((n - 1) * (n + 2)) * ((theta**2).sum() - np.trace(theta) ** 2 / n) / k
        values, errors = estimates("one_sided_orthonormal", "trace", k, 2000)
        assert values.var(ddof=1) == pytest.approx(expected, rel=0.15)
        assert (errors**2).mean() == pytest.approx(expected, rel=0.15)
        assert abs(values.mean() - np.trace(theta)) < 4 * values.std() / math.sqrt(2000)
    exact = methods.get("one_sided_orthonormal").estimate(prepared("one_sided_orthonormal"), "trace", 9, 0)
    assert (exact.passes, exact.standard_error) == (6, 0)
    assert exact.value == pytest.approx(np.trace(theta), rel=1e-12)


def test_variance_of_gram_matrices_is_that_of_the_formula():
    """That of a U-statistic, with the two variances of the square that Gaussian probes would have."""
    J = written_out(loaded("wide"))
    theta = J @ J.T
    k, square = 24, (theta**2).sum()
    off = ((theta @ theta) ** 2).sum() - (np.diag(theta @ theta) ** 2).sum()
    single, both = 2 * off, 2 * square**2 + 6 * off  # Var ||Theta u||^2, about Var (u Theta v)^2
    expected = (4 * (k - 2) * single + 2 * both) / (k * (k - 1)) / (4 * square)
    values, errors = estimates("gram_reverse", "norm", k, 600, "wide")
    assert values.var(ddof=1) == pytest.approx(expected, rel=0.25)
    assert (errors**2).mean() == pytest.approx(values.var(ddof=1), rel=0.25)


def test_exact_with_one_output_per_sample():
    """With O = 1 the square of a sign is 1: per-sample and block estimates are exact, with standard errors of 0."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double() for _ in range(2)]
    x = torch.randn(6, 4, dtype=torch.float64)
    thetas = []
    for net in nets:
        J = written_out(ntkbench.from_module(net, x, dtype="float64"))
        thetas.append(J @ J.T)
    exact = metrics_of(*thetas)
    found = ntkbench.metrics_of(nets[0], x, nets[1], method="block_u_statistics", passes=8)
    for metric, estimate in found.items():
        assert estimate.value == pytest.approx(exact[metric], rel=1e-5)
        assert estimate.standard_error == pytest.approx(0, abs=1e-5 * exact[metric])
    single = ntkbench.trace(nets[0], x, method="per_sample_trace", passes=2)
    assert single.value == pytest.approx(exact["trace"], rel=1e-5)


class Opposite(nn.Module):
    """Two outputs of opposite sign: Theta = t [[1, -1], [-1, 1]] maps half of all pairs of signs to zero."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight, 1.0], dtype=torch.float64))

    def forward(self, x):
        f = self.weight[0] ** 2 * x + self.weight[1] * x**2
        return torch.cat([f, -f], dim=1)


FAMILIES = {
    "hutchinson",
    "nystrom_loo",
    "block_u_statistics",
    "dense_jl",
    "sample_subset",
    "structured_block_u_statistics",
}
"""One method of each family of estimators."""


@pytest.mark.parametrize(
    "name", mostly_slow((n for n in methods.names() if methods.get(n).kind == "stochastic"), FAMILIES)
)
def test_probes_in_the_null_space_do_not_show_that_theta_is_zero(name):
    method, target = methods.get(name), Target("torch", "float64", "cpu", 2**30)
    if not {"norm", "effective_rank", "alignment"} <= set(method.metrics):
        pytest.skip("has no metric that is a ratio")
    problem = ntkbench.from_module(Opposite(0.5), torch.ones(1, 1), Opposite(2.0), dtype="float64")
    J, J_f = written_out(problem), written_out(problem, "theta_f")
    exact, tried, ready = metrics_of(J @ J.T, J_f @ J_f.T), 0, None
    for metric in ("norm", "effective_rank", "alignment"):
        for probes in (method.fewest_probes, method.fewest_probes + 1):
            passes = max(method.cost(metric, probes), method.least_passes(problem, metric))
            if method.unsupported_reason(problem, metric, target, passes):
                continue
            ready = ready or method.prepare(problem, target)
            for seed in range(12):
                tried += 1
                try:
                    found = method.estimate(ready, metric, passes, seed)
                except Undefined as error:
                    assert "too few to show that Theta is zero" in str(error)
                    continue
                if found.standard_error == 0:
                    assert found.value == pytest.approx(exact[metric], rel=1e-6), (metric, probes, seed)
        if isinstance(method, Incremental) and not method.unsupported_reason(problem, metric, target, 4096):
            ready, missed = ready or method.prepare(problem, target), 0
            for seed in range(24):
                found = method.estimates(ready, (metric,), 4096, seed, 0.5)[metric]
                missed += abs(found.value - exact[metric]) > 0.5 * exact[metric]
            assert missed <= 4  # of 24, where one is expected
    if not tried:
        pytest.skip("does not apply to one sample with two outputs")


def wrong_but_exact(found: Any, exact: float) -> bool:
    """Whether an estimate states no error but that of rounding in float64, and is wrong."""
    return found.standard_error <= 1e-12 * exact and abs(found.value - exact) > 1e-9 * exact


def seeded(*layers: Any, size: tuple[int, ...]) -> tuple[nn.Module, torch.Tensor]:
    """A network in float64 with inputs of a size; layers are functions that make them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(make() for make in layers)).double(), torch.randn(size, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("per_sample_trace", ("trace",)),
        ("structured_block_u_statistics", ("trace",)),
        ("structured_block_u_statistics", ("trace", "norm")),
        ("block_u_statistics", ("trace", "norm")),
    ],
)
def test_samples_without_gradients_are_no_evidence(name, names):
    """15 of 16 images are zero, and two probes of the two outputs of the other one agree half of the time."""
    layers = lambda: nn.Linear(3, 4, bias=False), nn.Tanh, lambda: nn.Linear(4, 2, bias=False)
    model, x = seeded(*layers, size=(16, 3))
    x[:15] = 0
    problem = ntkbench.from_module(model, x, dtype="float64")
    exact = np.square(written_out(problem)).sum()
    method = methods.get(name)
    ready = method.prepare(problem, Target("torch", "float64", "cpu", 2**30))
    found = [method.estimates(ready, names, 2, seed)["trace"] for seed in range(24)]
    assert not any(wrong_but_exact(each, exact) for each in found)
    many = method.estimates(ready, names, 40, 0)["trace"]
    assert many.standard_error < exact and many.covers(exact, "float64", 0.9999)


def test_rounding_does_not_hide_that_probes_agree():
    """Three probes of two outputs agree in a quarter of the cases, but their mean is often off by one unit."""
    model, x = seeded(lambda: nn.Linear(3, 4), nn.Tanh, lambda: nn.Linear(4, 2), size=(1, 3))
    problem = ntkbench.from_module(model, x, dtype="float64")
    exact = np.square(written_out(problem)).sum()
    method = methods.get("hutchinson")
    ready = method.prepare(problem, Target("torch", "float64", "cpu", 2**30))
    found = [method.estimate(ready, "trace", 6, seed) for seed in range(150)]
    assert not any(wrong_but_exact(each, exact) for each in found)
    assert any(math.isnan(each.standard_error) for each in found)
    assert any(each.standard_error > 0 for each in found)


def test_a_ratio_that_depends_on_a_single_probe_is_not_refused():
    """Of two equal samples, half of the probes have an image of zero."""
    model, x = seeded(lambda: nn.Linear(3, 1), size=(1, 3))
    problem = ntkbench.from_module(model, x.repeat(2, 1), dtype="float64")
    method, refused = methods.get("hutchinson"), 0
    ready = method.prepare(problem, Target("torch", "float64", "cpu", 2**30))
    for seed in range(40):
        try:
            found = method.estimate(ready, "effective_rank", 4, seed)
        except Undefined as error:
            refused += 1
            assert "all products of 2 probes are zero" in str(error)
        else:
            assert not wrong_but_exact(found, 1.0)
    assert 0 < refused < 20, "a quarter of the pairs of probes have images of zero"


def test_few_probes_of_the_propagation_that_agree_have_an_unknown_error():
    kernel = StateKernel(testing.recurrent_problem(N=1, T=2, hidden=1), "theta_0", Target("torch", "float64", "cpu"))
    P = kernel.P.to_scipy() @ np.eye(kernel.K.shape[0])
    found = [state_factors.metric_of_p(kernel, "trace", 2, seed) for seed in range(20)]
    assert len(P) == 2 and not any(wrong_but_exact(each, (P**2).sum()) for each in found)
    assert state_factors.metric_of_p(kernel, "trace", 32).standard_error > 0


def test_networks_that_differ_in_buffers_differ():
    same = dataclasses.replace(loaded("tanh_net"), theta_f=loaded("tanh_net").theta_0)
    assert _does_not_differ(same)
    for fixed_f in ({"mean": np.ones(2)}, {}):
        assert not _does_not_differ(dataclasses.replace(same, fixed_0={"mean": np.zeros(2)}, fixed_f=fixed_f))


@pytest.mark.parametrize("name", ["block_u_statistics", "gram_reverse", "gram_forward"])
def test_equal_networks_are_aligned_for_any_probes(name):
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    estimate = ntkbench.alignment(model, model, x, method=name, passes=16)
    assert estimate.value == pytest.approx(1, rel=1e-5)
    assert estimate.standard_error == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    "name", mostly_slow((n for n in NEW if n in methods.names()), {"block_u_statistics", "gram_forward"})
)
def test_backends_agree_on_the_same_probes(name):
    names = tuple(methods.get(name).metrics)
    ours, theirs = (accumulated(name, names, (5,), backend)[0] for backend in BACKENDS)
    for metric in names:
        assert ours.estimate(metric) == pytest.approx(theirs.estimate(metric), rel=1e-9)


@pytest.mark.parametrize("name", ACCUMULATING)
def test_probes_in_batches_equal_one_block(name):
    names = tuple(methods.get(name).metrics)
    (whole, j), (grown, j2) = (accumulated(name, names, probes) for probes in ((6,), (4, 1, 1)))
    for metric in names:
        assert grown.estimate(metric) == pytest.approx(whole.estimate(metric), rel=1e-9)
    assert sum(x.passes for x in j) == sum(x.passes for x in j2)
    assert sum(x.passes for x in j) == 6 * max(methods.get(name).passes_per_probe(metric) for metric in names)


def test_pair_sums_match_their_definition():
    """Sums over pairs by their definition, on an explicit table."""
    N, K = 3, 5
    w = np.random.default_rng(0).standard_normal((N, K, 7))
    y = np.einsum("bkd,cld->bkcl", w, w) ** 2
    expected = sum(
        y[b, :, c, :].mean() if b != c else y[b, :, b, :][~np.eye(K, dtype=bool)].mean()
        for b in range(N)
        for c in range(N)
    )
    whole, parts = standard_errors.PairSums(N, K, 1), standard_errors.PairSums(N, K, 1)
    whole.add(0, 0, [y])
    for b in range(N):
        for c in range(N):
            parts.add(b, c, [y[b : b + 1, :, c : c + 1]])
    assert whole.moments().means == pytest.approx([expected])
    for part in ("means", "single", "double"):
        assert getattr(parts.moments(), part) == pytest.approx(getattr(whole.moments(), part), rel=1e-9)


@pytest.mark.parametrize("name", ["block_u_statistics", "group_u_statistics"])
@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.slow
def test_standard_errors_of_few_probes_are_calibrated(name, K):
    """Unbiased from four probes on; with fewer an upper bound that is not absurd."""
    values, errors = estimates(name, "norm", K, 200, "wide")
    known = np.isfinite(errors)  # two probes of strata of which one has most of the norm are effectively a single pair
    assert known.mean() > (0.99 if K >= 4 else 0.9)
    ratio = (errors[known] ** 2).mean() / values.var(ddof=1)
    assert 0.75 < ratio < (1.35 if K >= 4 else 3)


def test_as_many_groups_as_samples_are_block_u_statistics_and_one_is_a_gram_matrix(monkeypatch):
    for groups, name in ((40, "block_u_statistics"), (1, "gram_reverse")):
        monkeypatch.setattr(GroupUStatistics, "max_groups", groups)
        # Gram matrices have an effective rank of their own.
        for metric in ("norm", "alignment") if name == "gram_reverse" else ("norm", "effective_rank", "alignment"):
            passes = 12 if metric == "alignment" else 6  # with 8 probes, one is spent on the shares of the samples
            one, other = (
                methods.get(each).estimate(prepared(each, "wide"), metric, passes, 3)
                for each in ("group_u_statistics", name)
            )
            assert one.value == pytest.approx(other.value, rel=1e-9)
            assert one.standard_error == pytest.approx(other.standard_error, rel=1e-6)
            assert one.passes == pytest.approx(other.passes) == passes


@pytest.mark.slow
def test_more_groups_mean_less_variance_at_the_same_passes(monkeypatch):
    spread = []
    for groups in (1, 8, 40):
        monkeypatch.setattr(GroupUStatistics, "max_groups", groups)
        spread.append(estimates("group_u_statistics", "norm", 4, 50, "wide")[0].std())
    assert spread[0] > 1.5 * spread[1] > 1.5 * spread[2]


def test_vectors_that_do_not_fit_are_recomputed_within_the_budget():
    ready = prepared("block_u_statistics", "wide", memory=200_000)
    method = methods.get("block_u_statistics")
    estimate = method.estimate(ready, "norm", 40, 0)
    assert 30 < estimate.passes <= 40
    assert abs(estimate.value - truth("wide")["norm"]) < 6 * estimate.standard_error
    with pytest.raises(OverMemory, match="too few passes"):
        method.estimate(prepared("block_u_statistics", "wide", memory=1), "norm", 40, 0)


def net(outputs: int = 3, hidden: int = 8) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def data(N: int = 12) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return torch.randn(N, 4)


def exact_metrics(model: nn.Module, x: torch.Tensor) -> dict[str, float]:
    J = written_out(ntkbench.from_module(model, x))
    return metrics_of(J @ J.T)


@pytest.mark.parametrize(
    "method",
    mostly_slow(
        [
            "hutchinson",
            "block_u_statistics",
            "group_u_statistics",
            "structured_block_u_statistics",
            "gram_reverse",
            "gram_forward",
        ],
        {"hutchinson", "structured_block_u_statistics"},
    ),
)
def test_a_tolerance_is_reached(method):
    model, x = net(), data()
    exact = exact_metrics(model, x)
    rtol = 0.1
    met = 0
    for seed in range(12):
        found = ntkbench.metrics_of(model, x, method=method, rtol=rtol, passes=20_000, seed=seed, memory=2**24)
        assert len({e.passes for e in found.values()}) == 1
        for metric, e in found.items():
            assert not e.notes
            assert e.relative_width() <= rtol
            met += abs(e.value - exact[metric]) <= rtol * exact[metric]
    assert met >= 0.85 * 36


def test_a_tolerance_costs_no_more_than_it_needs():
    model, x = net(), data()
    loose, tight = (ntkbench.trace(model, x, method="one_sided_reverse", rtol=rtol) for rtol in (0.2, 0.05))
    assert 32 <= loose.passes < tight.passes < 4096
    assert ntkbench.trace(model, x, method="one_sided_reverse", rtol=0.9).passes == 96
    assert ntkbench.norm(model, x, rtol=0.01).standard_error is None  # exact is cheap here


def test_an_unreachable_tolerance_is_noted():
    estimate = ntkbench.trace(net(), data(), method="one_sided_reverse", rtol=1e-4, passes=50)
    assert estimate.passes == 50
    assert "50 passes did not reach rtol=0.0001 at confidence 0.95" in estimate.notes[0]


@pytest.mark.parametrize(
    ("says", "how"),
    [
        ("rtol must be a number between 0 and 1, both excluded, got 0", {"rtol": 0}),
        ("rtol must be a number between 0 and 1, both excluded, got -0.1", {"rtol": -0.1}),
        ("rtol must be .* got 1", {"rtol": 1}),
        ("rtol must be .* got 'small'", {"rtol": "small"}),
        ("rtol must be .* got nan", {"rtol": math.nan}),
        ("rtol must be .* got True", {"rtol": True}),
        ("confidence must be .* got 95", {"rtol": 0.1, "confidence": 95}),
        ("confidence must be .* got None", {"confidence": None}),
        (
            "hutchpp takes no rtol, because it cannot add probes; allowed: .*gram_reverse.*hutchinson",
            {"rtol": 0.1, "method": "hutchpp"},
        ),
        ("direct is exact and takes no rtol: omit rtol", {"rtol": 0.1, "method": "direct"}),
    ],
)
def test_invalid_tolerances_are_refused(says, how):
    for f in (ntkbench.norm, ntkbench.metrics_of):
        with pytest.raises(ntkbench.BadInput, match=says):
            f(net(), data(), **how)


def test_many_statistics_from_one_block_of_probes():
    model, x = net(88, 60), data()  # exact values take 88 passes, and 60 by the head
    exact = exact_metrics(model, x)
    found = ntkbench.metrics_of(model, x)
    assert list(found) == ["trace", "norm", "effective_rank"]
    for metric, e in found.items():
        assert e.method == "structured_block_u_statistics"
        assert e.passes == 1024 // 12  # beyond which the inner products take over
        assert abs(e.value - exact[metric]) < 6 * e.standard_error
    ratio = found["trace"].value ** 2 / found["norm"].value ** 2
    assert found["effective_rank"].value == pytest.approx(ratio, rel=0.01)  # up to its bias
    assert all(e.standard_error is None for e in ntkbench.metrics_of(net(), data()).values())
    with_f = ntkbench.metrics_of(model, x, net(88, 60), method="gram_reverse", passes=41)
    assert list(with_f) == ["trace", "norm", "effective_rank", "alignment"]
    assert {e.passes for e in with_f.values()} == {40}


def test_interacting_samples_use_passes_over_the_whole_batch():
    model, x = nn.Sequential(nn.Linear(4, 700), nn.BatchNorm1d(700)), data(4)  # n = 2800, P = 4900
    assert {e.method for e in ntkbench.metrics_of(model, x, rtol=0.5).values()} == {"hutchinson"}
    assert ntkbench.trace(model, x).method == "hutchpp_adaptive"
    assert ntkbench.norm(model, x).method == "nystrom_loo"
    for name in ("per_sample_trace", "block_u_statistics", "structured_block_u_statistics"):
        with pytest.raises(ntkbench.BadInput, match="samples interact"):
            ntkbench.trace(model, x, method=name)
        tiny = loaded("tanh_net")
        mixed = dataclasses.replace(tiny, samples_interact=True)
        assert "samples interact" in methods.get(name).unsupported_reason(mixed, "trace", Target())


@pytest.mark.parametrize("metric", mostly_slow(["norm", "effective_rank", "alignment"], 1))
def test_a_subset_of_samples_stands_for_all_of_them(metric):
    """Squares are unbiased over subsets, errors are those of a finite population, and all samples are exact."""
    ready, method, exact = prepared("sample_subset", "wide"), methods.get("sample_subset"), truth("wide")[metric]
    ends = 2 if metric == "alignment" else 1
    found = [method.estimate(ready, metric, 5 * ends, seed) for seed in range(200)]
    assert {e.passes for e in found} == {5 * ends}  # 20 of 40 samples in 8 outputs, and a probe
    values, errors = np.array([(e.value, e.standard_error) for e in found]).T
    assert 0.7 < (errors**2).mean() / values.var(ddof=1) < 1.5  # the jackknife is conservative
    if metric == "norm":
        z = ((values**2).mean() - exact**2) / ((values**2).std(ddof=1) / math.sqrt(200))
        assert abs(z) < 4
    everything = method.estimate(ready, metric, 8 * ends, 0)
    assert everything.value == pytest.approx(exact, rel=1e-10)
    assert everything.standard_error == 0


def test_a_subset_grows_within_its_budget_until_it_is_exact():
    ready, method = prepared("sample_subset", "wide"), methods.get("sample_subset")
    subset, ledger = method.begin(ready, ["norm", "effective_rank", "alignment"], 3)
    budget = 0
    for passes in (6, 3, 13):
        subset.extend(passes)
        budget += passes
        assert ledger()[0] <= budget
    for metric in ("norm", "effective_rank", "alignment"):
        assert subset.estimate(metric) == pytest.approx((truth("wide")[metric], 0.0, math.inf), rel=1e-10)
    assert "takes at least 4 passes" in method.unsupported_reason(loaded("wide"), "alignment", Target(), 3)


def test_a_subset_that_is_computed_in_blocks_keeps_its_budget():
    """Columns are recomputed for each block of rows, so fewer samples are affordable."""
    method, label, memory, sizes = methods.get("sample_subset"), "active", 2**18, []
    for metric, budget in (("norm", 2), ("alignment", 3), ("norm", 1000)):
        ready = prepared("sample_subset", label, memory=memory)
        assert ready.engine.passes([ready.ends("norm")[0].parameters], ready.x) > 2, "a pass for each output is enough"
        subset, ledger = method.begin(ready, [metric], 0)
        subset.extend(budget)
        assert 0 < ledger()[0] <= budget
        sizes.append(len(subset._traces))
    assert 8 <= sizes[0] < 40 and 8 <= sizes[1] < 40 and sizes[2] == 40
    with pytest.raises(
        OverMemory, match=r"^8 samples take [\d.]+ passes with memory=1, more than passes=2: raise passes or memory$"
    ):
        method.estimate(prepared("sample_subset", label, memory=1), "norm", 2, 0)
    found = method.estimates(prepared("sample_subset", label, memory=memory), ("norm",), 100, rtol=1e-12)["norm"]
    assert found.standard_error == 0 and found.passes <= 100
    assert found.value == pytest.approx(method.estimate(prepared("sample_subset", label), "norm", 2, 0).value)


@pytest.mark.parametrize("chunks", [1, 2, 5, 26, 30])
@pytest.mark.parametrize("metric", ["norm", "effective_rank", "alignment"])
def test_the_parameter_gram_matrix_in_any_chunks(chunks, metric, monkeypatch):
    method = methods.get("parameter_gram")
    monkeypatch.setattr(type(method), "chunks", chunks)
    estimate = method.estimate(prepared("parameter_gram"), metric)
    assert estimate.value == pytest.approx(truth("tanh_net")[metric], rel=1e-12)


@pytest.mark.parametrize(("max_group", "sizes"), [(12, [4, 4]), (15, [5, 4]), (2048, [9])])
def test_groups_of_structured_probes_are_bounded_and_unbiased(max_group, sizes, monkeypatch):
    """No group has more gradients than allowed or fewer than four probes, and estimates are unbiased for any groups."""
    method, ready = methods.get("structured_block_u_statistics"), prepared("structured_block_u_statistics")
    monkeypatch.setattr(type(method), "max_group", max_group)
    kernel, groups, squares = ready.engine.kernel, [], []
    monkeypatch.setattr(ready.engine, "kernel", lambda *args: groups.append(args[3].shape[1]) or kernel(*args))
    for seed in range(100):
        estimate = method.estimate(ready, "norm", 9, seed)
        squares.append(estimate.value**2)
    assert groups == 100 * sizes
    assert estimate.passes == sum(sizes)
    assert abs(np.mean(squares) - truth("tanh_net")["norm"] ** 2) < 4 * np.std(squares, ddof=1) / 10


@pytest.mark.parametrize("min_samples", [4, 8, 100])
def test_a_subset_has_at_least_its_fewest_samples(min_samples, monkeypatch):
    method, problem = methods.get("sample_subset"), loaded("wide")
    monkeypatch.setattr(type(method), "min_samples", min_samples)
    least = math.ceil(min(min_samples, problem.N) * problem.O / problem.N)
    assert method.least_passes(problem, "norm") == least
    estimate = method.estimate(prepared("sample_subset", "wide"), "norm", least, 0)
    assert estimate.passes <= least
    assert estimate.degrees == math.inf if least == problem.O else 3 <= estimate.degrees < least * problem.N / problem.O


def test_default_budgets_bound_the_number_of_gradients(monkeypatch):
    problem = loaded("wide")  # 40 samples
    for name, groups in (("block_u_statistics", 40), ("group_u_statistics", 24), ("structured_block_u_statistics", 40)):
        method = methods.get(name)
        assert method.default_max_passes(problem) == 1024 // groups
        monkeypatch.setattr(type(method), "max_gradients", 100)
        assert method.default_max_passes(problem) == 16
    assert methods.get("hutchinson").default_max_passes(problem) is None


def test_a_subset_of_equal_samples_does_not_claim_to_represent_the_others():
    """10 of 200 samples differ from the others, and most subsets have none of them."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 50), torch.zeros(200, 3)
    x[:190, 0], x[190:, 1] = 1, 1
    exact = float(ntkbench.effective_rank(model, x))
    unknown = 0
    for seed in range(8):
        found = ntkbench.effective_rank(model, x, method="sample_subset", passes=4, seed=seed)
        low, high = found.interval()
        assert math.isnan(found.standard_error) or low <= exact <= high, seed
        unknown += math.isnan(found.standard_error)
    assert unknown


def test_a_subset_without_a_pilot_notes_uneven_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    x = torch.randn(40, 8) * torch.exp(2.5 * torch.randn(40, 1))
    found = ntkbench.norm(model, x, method="sample_subset", passes=1)
    assert any("error may be underestimated" in note for note in found.notes)
