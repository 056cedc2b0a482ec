"""Alignments close to 1, exact values with a bound on their rounding, and intervals from few probes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import OF_JAX, mostly_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from test_deflation import Probes, ends, jacobian, truth
from torch import nn

import ntkbench
from ntkbench import methods, problems, testing
from ntkbench.errors import BadInput
from ntkbench.estimate import Estimate
from ntkbench.methods.base import Method
from ntkbench.metrics import Moments
from ntkbench.operators import JacobianOperator
from ntkbench.operators.dense import DenseJacobian
from ntkbench.options import Target
from ntkbench.problem import Problem

EXACT = ("structured_derivatives", "jacobian_contraction", "naive_jacobian", "ntk_vector_products", "direct")
PAIRED = (
    ("block_u_statistics", 8),
    ("structured_block_u_statistics", 8),
    ("group_u_statistics", 8),
    ("gram_reverse", 48),
    ("hutchinson", 32),
)
"""Methods that use the gradients or images of a probe at both sets of weights, and numbers of probes for them."""


def network(seed: int, depth: int = 2, width: int = 12, outputs: int = 2, activation: type[nn.Module] = nn.Tanh) -> Any:
    """A small network of random weights with unit gain, and inputs for it, in float64."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [5, *[width] * depth, outputs]
    layers: list[nn.Module] = []
    for size, following in itertools.pairwise(sizes):
        layers += [nn.Linear(size, following), activation()]
    model = nn.Sequential(*layers[:-1]).double()
    for w in model.parameters():
        w.data = torch.randn(w.shape, generator=generator, dtype=torch.float64) / w.shape[-1] ** 0.5
    return model, torch.randn(10, 5, generator=generator, dtype=torch.float64)


def moved(model: nn.Module, step: float, seed: int = 0) -> nn.Module:
    """The network after a relative step of its weights."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    for w in model.parameters():
        w.data *= 1 + step * torch.randn(w.shape, generator=generator, dtype=torch.float64)
    return model


def angle(complement: float) -> float:
    return 2 * math.asin(math.sqrt(complement / 2))


@pytest.mark.parametrize("method", EXACT)
def test_rounding_stays_below_its_bound_and_the_bound_is_not_far_above(method):
    check_rounding(1, 2, 12, 2, nn.Tanh, 1e-2, method)


@given(
    seed=st.integers(0, 10_000),
    depth=st.integers(0, 5),
    width=st.integers(1, 40),
    outputs=st.integers(1, 3),
    activation=st.sampled_from([nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid]),
    step=st.floats(-6, 0).map(lambda x: 10**x),
    method=st.sampled_from(EXACT),
)
@settings(max_examples=40)
@pytest.mark.slow
def test_rounding_in_networks_of_all_sizes_stays_below_its_bound(seed, depth, width, outputs, activation, step, method):
    check_rounding(seed, depth, width, outputs, activation, step, method)


def check_rounding(seed, depth, width, outputs, activation, step, method):
    model, x = network(seed, depth, width, outputs, activation)
    model_f = moved(model, step)
    exact = ntkbench.metrics_of(model, x, model_f, method="naive_jacobian")
    found = ntkbench.metrics_of(copy.deepcopy(model).float(), x.float(), copy.deepcopy(model_f).float(), method=method)
    # Rounding a network to float32 also rounds its weights and inputs; the bound includes this.
    for metric, e in found.items():
        if metric == "alignment":
            off = abs(angle(e.complement) - angle(exact[metric].complement))
        else:
            off = abs(e.value / exact[metric].value - 1)
        assert off <= e.rounding
        assert 1e-6 < e.rounding < 1e-4
        low, high = e.interval()
        assert low <= exact[metric].value <= high


def test_the_bound_is_within_a_thousand_typical_errors():
    ratios = []
    for seed in range(20):
        model, x = network(seed)
        exact = ntkbench.trace(model, x, method="naive_jacobian").value
        e = ntkbench.trace(copy.deepcopy(model).float(), x.float(), method="structured_derivatives")
        ratios.append(abs(e.value / exact - 1) / e.rounding)
    assert 1e-3 < np.median(ratios) < 0.1


@pytest.mark.parametrize("method", EXACT)
def test_exact_alignments_resolve_one_minus_alignment_in_both_precisions(method):
    """1 - alignment falls with the square of the step, and float32 resolves it down to about 1e-13."""
    model, x = network(1)
    for step in (1e-2, 1e-4, 1e-6):
        model_f = moved(model, step)
        exact = ntkbench.alignment(model, model_f, x, method="naive_jacobian").complement
        assert 1e-3 < exact / step**2 < 10
        double = ntkbench.alignment(model, model_f, x, method=method)
        assert double.complement == pytest.approx(exact, rel=1e-7)
        single = ntkbench.alignment(
            copy.deepcopy(model).float(), copy.deepcopy(model_f).float(), x.float(), method=method
        )
        assert single.value <= 1
        assert angle(single.complement) == pytest.approx(angle(exact), abs=1e-6)
        low, high = single.complement_interval()
        assert low <= exact <= high


@functools.cache
def lazily_trained(step: float) -> Problem:
    """A network whose weights have moved by a relative step."""
    problem = testing.smooth_problem("lazy", N=10, inputs=4, hidden=8, outputs=2)
    rng = np.random.default_rng(0)
    theta_0 = {name: w.astype(np.float64) for name, w in problem.theta_0.items()}
    theta_f = {name: w * (1 + step * rng.standard_normal(w.shape)) for name, w in theta_0.items()}
    return dataclasses.replace(problem, theta_0=theta_0, theta_f=theta_f)


@functools.cache
def exact_complement(step: float) -> float:
    method = methods.get("naive_jacobian")
    prepared = method.prepare(lazily_trained(step), Target(dtype="float64", device="cpu"))
    return method.estimate(prepared, "alignment").complement


def from_probes(method: Any, prepared: Any, probes: int, seed: int) -> Estimate:
    """An estimate of the alignment, with 1 - alignment computed separately."""
    accumulator, _ = method.begin(prepared, ("alignment",), seed)
    accumulator.extend(probes)
    value, error, degrees = accumulator.estimate("alignment")
    return Estimate(value, error, None, "m", (), "alignment", degrees, complement=accumulator.complement())


@pytest.mark.parametrize(("name", "probes"), mostly_slow(PAIRED, 1))
def test_probes_shared_by_both_parameter_sets_resolve_one_minus_alignment(name, probes):
    """With the same relative error at any distance from 1, in float32 as in float64."""
    method = methods.get(name)
    widths = []
    for step in (1e-2, 1e-6):
        exact = exact_complement(step)
        prepared = method.prepare(lazily_trained(step), Target(dtype="float64", device="cpu"))
        found = [from_probes(method, prepared, probes, seed) for seed in range(60)]
        intervals = np.array([e.complement_interval() for e in found])
        assert np.mean((intervals[:, 0] <= exact) & (exact <= intervals[:, 1])) >= 0.85
        assert np.mean([e.complement for e in found]) == pytest.approx(exact, rel=0.25)
        widths.append(np.median(intervals[:, 1] - intervals[:, 0]) / exact)
        assert widths[-1] < 3
    assert widths[0] == pytest.approx(widths[1], rel=0.2)
    single = method.prepare(lazily_trained(1e-4), Target(dtype="float32", device="cpu"))
    double = method.prepare(lazily_trained(1e-4), Target(dtype="float64", device="cpu"))
    for seed in range(3):
        one, other = (from_probes(method, prepared, probes, seed) for prepared in (single, double))
        assert one.complement == pytest.approx(other.complement, rel=0.02)
        assert one.standard_error == pytest.approx(other.standard_error, rel=0.05)


def test_no_metric_is_a_finite_number_over_an_overflowed_square():
    """Entries of 1e20 have squares beyond float32; 0 is no effective rank."""
    layer, x = torch.nn.Linear(3, 2), 1e10 * torch.eye(3)
    for method in ("jacobian_contraction", "direct", "parameter_gram"):
        with pytest.raises(BadInput, match="dtype='float64' has a wider range"):
            ntkbench.effective_rank(layer, x, method=method)
    expected = ntkbench.effective_rank(layer.double(), x.double()).value
    low, high = ntkbench.effective_rank(layer.float(), x).interval()
    assert low <= expected <= high
    overflowed = Moments(trace=1.0, square=math.inf, square_f=1.0, cross=1.0)
    assert math.isnan(overflowed.metric("effective_rank")) and math.isnan(overflowed.metric("alignment"))


def test_a_subset_of_the_samples_gives_one_minus_alignment():
    method = methods.get("sample_subset")
    exact = exact_complement(1e-5)
    prepared = method.prepare(lazily_trained(1e-5), Target(dtype="float64", device="cpu"))
    assert from_probes(method, prepared, 4, 0).complement == pytest.approx(exact, rel=1e-4)
    assert from_probes(method, prepared, 3, 0).complement == pytest.approx(exact, rel=1)


def test_kernels_that_differ_by_a_factor_are_aligned_and_their_error_is_that_of_rounding():
    J = jacobian("1/i")
    method = methods.get("gram_reverse")
    for factor in (1.0, 1.01, 30.0, 1e-3):
        e = from_probes(method, Ends(J, factor * J), 12, 0)
        assert e.complement < 1e-12
        low, high = e.complement_interval()
        assert low <= 1e-16 and high < 1e-5
        assert e.standard_error == 0 if factor == 1 else e.standard_error < 3e-8


def test_methods_that_do_not_estimate_the_difference_give_no_complement():
    assert from_probes(methods.get("gram_forward"), Ends(*ends("alignment", "1/i")), 12, 0).complement is None


class Ends:
    """Jacobians instead of a prepared problem."""

    def __init__(self, *matrices: np.ndarray) -> None:
        self._jacobians = [DenseJacobian(m, functools.partial(Probes, like=m)) for m in matrices]

    def jacobians(self, metric: str) -> list[JacobianOperator]:
        return [j.fresh() for j in self._jacobians[: 1 + (metric == "alignment")]]


def coverage(name: str, metric: str, prepared: Any, exact: float, passes: int, seeds: int, **options: Any) -> float:
    method = methods.get(name)
    found = [
        method.estimates(prepared, (metric,), passes, seed, **options)[metric]
        if options
        else method.estimate(prepared, metric, passes, seed)
        for seed in range(seeds)
    ]
    return float(np.mean([e.covers(exact, "float64") for e in found]))


GRAMS = [("gram_reverse", spectrum) for spectrum in ("spike", "1/i", "0.7^i", "linear")]
GRAMS += [("gram_forward", "1/i")]  # the same estimator for J^T J


@pytest.mark.parametrize(("name", "spectrum"), mostly_slow(GRAMS, 1))
@pytest.mark.parametrize("passes", [8, 24])
def test_the_effective_rank_of_gram_matrices_is_covered_on_steep_spectra(name, spectrum, passes):
    """The weight of large eigenvalues cancels in ratios over the same pairs; the delta method covered 0.6 to 0.8."""
    found = coverage(
        name,
        "effective_rank",
        Ends(jacobian(spectrum)),
        truth("effective_rank", spectrum),
        passes,
        300,
    )
    assert 0.88 <= found <= 0.995


def test_the_effective_rank_is_a_jackknife_over_probes_of_all_groups():
    """The jackknife of the logarithm over two groups of 6 and 5 probes, against sums over pairs by the definition."""
    J = jacobian("1/i")
    drawn: list[np.ndarray] = []

    class Recorded(Probes):
        def sign(self, k: int, dim: int) -> Any:
            drawn.append(super().sign(k, dim))
            return drawn[-1]

    j = DenseJacobian(J, functools.partial(Recorded, like=J))
    accumulator = methods.get("gram_reverse").accumulator(("effective_rank",), [j], j.rng(0))
    accumulator.max_group = 6
    for k in (4, 2, 5):
        accumulator.extend(k)
    w = np.concatenate(drawn) @ J

    def logarithm(left_out: int | None) -> float:
        sums = np.zeros(2)
        for group in (range(6), range(6, 11)):
            v = w[[i for i in group if i != left_out]]
            lengths, off = (v**2).sum(1), ~np.eye(len(v), dtype=bool)
            sums += [len(v) * m[off].mean() for m in (np.outer(lengths, lengths), (v @ v.T) ** 2)]
        return math.log(sums[0] / sums[1])

    value, error, degrees = accumulator.estimate("effective_rank")
    logs = np.array([logarithm(i) for i in range(11)])
    assert math.log(value) == pytest.approx(11 * logarithm(None) - 10 * logs.mean(), rel=1e-9)
    jackknife = 10 / 11 * ((logs - logs.mean()) ** 2).sum()
    assert value * math.sqrt(jackknife / 2) * (1 - 1e-9) <= error <= value * math.sqrt(jackknife)
    assert degrees == 10


@pytest.mark.parametrize("spectrum", mostly_slow(["square", "spike", "1/i", "linear"], 1))
@pytest.mark.parametrize("probes", [4, 9])
def test_leave_one_out_alignments_of_few_probes_are_covered(spectrum, probes):
    matrices, exact = ends("alignment", spectrum), truth("alignment", spectrum)
    assert 0.88 <= coverage("nystrom_loo", "alignment", Ends(*matrices), exact, 8 * probes, 300) <= 0.99


@pytest.mark.parametrize(
    ("spectrum", "rtol"), mostly_slow([("spike", 0.03), ("1/i", 0.03), ("1/i", 0.01), ("square", 0.01)], 1)
)
def test_the_adaptive_sketch_covers_at_a_tolerance(spectrum, rtol):
    prepared, exact = Ends(jacobian(spectrum)), truth("trace", spectrum)
    assert 0.92 <= coverage("hutchpp_adaptive", "trace", prepared, exact, 4096, 300, rtol=rtol) <= 0.985


@pytest.mark.parametrize(
    ("name", "metric"),
    [("xtrace", "trace"), ("xnystrace", "trace"), ("nystrom_loo", "norm"), ("nystrom_loo", "alignment")],
)
@pytest.mark.parametrize("spectrum", ["1/i", "0.7^i", "linear"])
def test_a_complete_sketch_is_exact_in_float32(name, metric, spectrum):
    """With a fast decay most directions of a sketch are rounding, and a square block of probes is ill-conditioned."""
    matrices = [J.astype(np.float32) for J in ends(metric, spectrum)]
    method = methods.get(name)
    for probes in (200, 260):
        e = method.estimate(Ends(*matrices), metric, probes * method.passes_per_probe(metric), 0)
        assert e.value == pytest.approx(truth(metric, spectrum), rel=1e-5)
        assert e.standard_error <= 1e-5 * e.value


@pytest.mark.parametrize(("name", "metric"), [("xtrace", "trace"), ("xnystrace", "trace"), ("nystrom_loo", "norm")])
@pytest.mark.parametrize("probes", [4, 16])
@pytest.mark.parametrize("decay", [0, 1])
@pytest.mark.slow
def test_a_rank_equal_to_the_number_of_probes_is_covered(name, metric, probes, decay):
    """All leave-one-out sketches lose almost the same direction there, and the estimates agree with each other."""
    eigenvalues = tuple(np.append(1 / np.arange(1, probes + 1) ** decay, np.zeros(200 - probes)))
    passes = probes * methods.get(name).passes_per_probe(metric)
    found = coverage(name, metric, Ends(jacobian(eigenvalues)), truth(metric, eigenvalues), passes, 300)
    assert 0.78 <= found <= 0.99


@pytest.mark.parametrize("name", ["xtrace", "xnystrace"])
@pytest.mark.parametrize("short", [1, 3, 8])
def test_sketches_that_lack_a_few_directions_are_covered(name, short):
    """All leave-one-out estimates are almost the same there, and only show the directions that are left."""
    eigenvalues = tuple(1 / np.arange(1, 41))
    method = methods.get(name)
    passes = (40 - short) * method.passes_per_probe("trace")
    found = coverage(name, "trace", Ends(jacobian(eigenvalues)), truth("trace", eigenvalues), passes, 200)
    assert 0.87 <= found <= 1


SINGLE = [
    (m.name, metric, backend)
    for m in map(methods.get, methods.names())
    if m.kind == "stochastic"
    for backend in m.backends
    if backend != "jax" or m.name in OF_JAX
    for metric in (m.metrics if backend != "jax" else m.metrics[-1:])
]
"""Stochastic methods and their metrics; in JAX a few methods and the last metric, as ``test_function.py`` has all."""
SKETCHES = (
    *("xtrace", "xnystrace", "xnystrace_forward", "nystrompp", "nystrom_loo"),
    *("hutchpp", "hutchpp_paper", "hutchpp_one_sided", "hutchpp_adaptive", "hutchpp_adaptive_forward"),
)
"""Methods whose sketch can reach the rank of Theta; its further directions are rounding."""


def trusted(e: Estimate, exact: float) -> bool:
    """Whether the error is within six standard errors (more, if they have few degrees of freedom) and rounding."""
    low, high = e.interval(0.999)
    within = low <= exact <= high
    return within or abs(e.value - exact) <= 6 * (e.standard_error or 0.0) + 1e-4 * abs(exact)


LOW_RANK = [(name, metric) for name, metric, backend in SINGLE if name in SKETCHES and backend == "torch"]
LEAVE_ONE_OUT = [(name, metric) for name, metric in LOW_RANK if name.startswith("x") or name == "nystrom_loo"]


@pytest.mark.parametrize("tail", ["none", "of rounding", "flat"])
@pytest.mark.parametrize(("name", "metric"), LOW_RANK)
def test_sketches_at_and_beyond_a_low_rank_have_a_valid_error_in_float32(name, metric, tail):
    """Directions that are rounding must not be dropped, nor make the result count as exact."""
    eigenvalues = low_rank(tail)
    exact = truth(metric, eigenvalues)
    prepared = Ends(*(J.astype(np.float32) for J in ends(metric, eigenvalues)))
    at_rank = () if (name, metric) in LEAVE_ONE_OUT else (12,)
    for probes, seed in itertools.product((*at_rank, 13, 14, 20, 39, 40, 41, 80), range(3)):
        e = sketched(name, metric, prepared, probes, seed)
        assert trusted(e, exact), (probes, seed, e.value, e.standard_error, exact)


@pytest.mark.parametrize("tail", ["none", "of rounding", "flat"])
@pytest.mark.parametrize(("name", "metric"), LEAVE_ONE_OUT)
def test_leave_one_out_estimates_at_a_low_rank_are_those_of_float64(name, metric, tail):
    """With as many probes as the rank, float32 loses no digits of the estimate or of its error.

    Leave-one-out estimates all lack nearly the same direction there, and their error is too small in either precision.
    """
    matrices = ends(metric, low_rank(tail))
    for seed in range(3):
        one, other = (
            sketched(name, metric, Ends(*(J.astype(dtype) for J in matrices)), 12, seed)
            for dtype in (np.float32, np.float64)
        )
        assert one.value == pytest.approx(other.value, rel=1e-4)
        assert one.standard_error == pytest.approx(other.standard_error, rel=1e-2, abs=1e-5 * abs(other.value))


def low_rank(tail: str) -> tuple[float, ...]:
    """40 eigenvalues, of which 12 are large."""
    i = np.arange(1, 41)
    tails = {"none": 0.0 * i, "of rounding": 1e-7 / i, "flat": 1e-3 + 0.0 * i}
    return tuple(np.where(i <= 12, 1 / i, tails[tail]))


def sketched(name: str, metric: str, prepared: Any, probes: int, seed: int) -> Estimate:
    method = methods.get(name)
    return method.estimate(prepared, metric, method.cost(metric, max(probes, method.fewest_probes)), seed)


READY: dict[tuple[str, Target], Any] = {}
"""Prepared problems, kept since JAX compiles again for each preparation."""


def ready(method: Method, target: Target) -> Any:
    key = method.prepares or method.name, target
    if key not in READY:
        READY[key] = method.prepare(problems.load("digits_conv[N=4]"), target)
    return READY[key]


@functools.cache
def convolutions(metric: str) -> float:
    method = methods.get("naive_jacobian")
    problem = problems.load("digits_conv[N=4]")
    return method.estimate(method.prepare(problem, Target(dtype="float64", device="cpu")), metric).value


@pytest.mark.parametrize(("name", "metric", "backend"), SINGLE)
@pytest.mark.slow
def test_stochastic_methods_have_valid_errors_in_float32_with_as_many_probes_as_outputs(name, metric, backend):
    """On a network, with 40 outputs; a standard error of 0 means that the value is exact."""
    method, problem = methods.get(name), problems.load("digits_conv[N=4]")
    target = Target(backend, "float32", "cpu")
    budgets = {400, method.cost(metric, problem.n), method.cost(metric, problem.n + 1)}
    budgets = {passes for passes in budgets if method.unsupported_reason(problem, metric, target, passes) is None}
    if not budgets:
        pytest.skip(f"{name} does not compute {metric} here")
    for passes in budgets:
        e = method.estimate(ready(method, target), metric, passes, 0)
        assert trusted(e, convolutions(metric)), (passes, e.value, e.standard_error, convolutions(metric))
