"""The contract of every registered method: exact values, stated costs, reproducibility and calibrated errors."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import OF_JAX, Squared, loaded, metrics_of, mostly_slow, written_out
from scipy import stats
from torch import nn

import ntkbench
from ntkbench import methods, operators, testing
from ntkbench.errors import BadInput, OverMemory, Unavailable, Undefined, Unsupported
from ntkbench.estimators import solve, spectrum
from ntkbench.measure import outcomes
from ntkbench.methods.base import Incremental, Method
from ntkbench.metrics import METRICS, words
from ntkbench.options import BACKENDS, Target
from ntkbench.problem import Problem
from ntkbench.problems.base import reference

ALL = [methods.get(name) for name in methods.names()]
DETERMINISTIC = [m for m in ALL if not m.takes_passes]
STOCHASTIC = [m for m in ALL if m.takes_passes]

CHECKS = [
    (label, metric, dtype)
    for label in ("digits_mlp[N=4]", "digits_conv[N=4]", "gru_hazelden[N=2,T=2]")
    # Together these have all four moments; each metric by itself is checked on a smaller problem.
    for metric, dtype in (("alignment", "float64"), ("effective_rank", "float32"))
]

SEEDS = {"torch": 200, "jax": 60}
"""The estimators of both backends are the same; only products and probes differ."""
SEEDS_OF_ERRORS = 200


def pairs(chosen: list[Method]) -> list[Any]:
    """Every backend of every method."""
    return [pytest.param(m, backend, id=f"{m.name}-{backend}") for m in chosen for backend in m.backends]


def triples(chosen: list[Method]) -> list[Any]:
    """Every metric of every method in torch, and the last one in JAX; all but the first and the last in torch are slow.

    The last one is the alignment where there is one. Compilation takes most of the time in JAX. Of the stochastic
    methods, only those in ``OF_JAX`` are tried there: ``test_function.py`` estimates all metrics by all methods there,
    and :func:`test_traces_are_unbiased` traces.
    """
    found = []
    for m in chosen:
        for backend in m.backends:
            if backend == "jax" and m.kind == "stochastic" and m.name not in OF_JAX:
                continue
            for metric in m.metrics[-1:] if backend == "jax" else m.metrics:
                mark = pytest.mark.slow if backend == "jax" or metric in m.metrics[1:-1] else ()
                found.append(pytest.param(m, backend, metric, id=f"{m.name}-{backend}-{metric}", marks=mark))
    return found


def crossed(cases: list[Any], others: tuple[Any, ...], in_jax: Any) -> list[Any]:
    """Each case of :func:`triples` with each of the other values, of which only ``in_jax`` is tried in JAX."""
    return [
        pytest.param(*case.values, other, id=f"{case.id}-{other}", marks=case.marks)
        for case in cases
        for other in others
        if case.values[1] != "jax" or other == in_jax
    ]


def doubles(chosen: list[Method]) -> list[Any]:
    """Every metric of every method, in its first backend."""
    return [pytest.param(m, metric, id=f"{m.name}-{metric}") for m in chosen for metric in m.metrics]


@functools.cache
def prepared(method: Method, label: str, backend: str, dtype: str = "float64", memory: int = 2**30) -> Any:
    return method.prepare(loaded(label), Target(backend, dtype, "cpu", memory))


def skip_refused(method: Method, label: str, metric: str, backend: str) -> None:
    reason = method.unsupported_reason(loaded(label), metric, Target(backend, "float64", "cpu"))
    if reason:
        pytest.skip(reason)


def served(method: Method, label: str) -> str:
    """The label, or that of a problem with a wide head if the method does not support the first."""
    target = Target(method.backends[0], "float64", "cpu")
    others = {"tanh_net": "headed", "wide": "wide_headed", "active": "wide_headed"}
    return label if method.unsupported_reason(loaded(label), method.given[0], target) is None else others[label]


@functools.cache
def least(method: Method, metric: str) -> int:
    """The smallest budget that a stochastic method takes: two probes."""
    problem, target = loaded(served(method, "tanh_net")), Target(method.backends[0], "float64", "cpu")
    return next(k for k in range(1, 1000) if method.unsupported_reason(problem, metric, target, k) is None)


@functools.cache
def truth(label: str) -> dict[str, float]:
    J, J_f = written_out(loaded(label)), written_out(loaded(label), "theta_f")
    return metrics_of(J @ J.T, J_f @ J_f.T)


@pytest.mark.parametrize("label", ["small_mlp", "reversing_transformer", "digits_conv[N=4]", "gru_hazelden[N=2,T=2]"])
@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_a_method_that_does_not_apply_is_skipped_and_does_not_fail(method, label):
    skip_refused(method, label, method.given[0], method.backends[0])
    try:
        prepared(method, label, method.backends[0])
    except Unavailable as refusal:
        assert outcomes.of_exception(refusal) == (outcomes.SKIPPED, str(refusal))


@pytest.mark.parametrize(("method", "backend", "metric"), triples(ALL))
@pytest.mark.slow
def test_methods_keep_their_contract(method, backend, metric):
    testing.check_method(method.name, backend, metric)


AS_PER_SAMPLE = ("block_u_statistics", "group_u_statistics")
"""Methods that estimate a trace alone as ``per_sample_trace`` does; see the next test."""


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("name", AS_PER_SAMPLE)
def test_traces_by_inner_products_are_those_per_sample(name, backend):
    found = [
        methods.get(each).estimate(prepared(methods.get(each), "tanh_net", backend), "trace", 6, seed=3)
        for each in (name, "per_sample_trace")
    ]
    for field in ("value", "standard_error", "degrees", "passes"):
        assert getattr(found[0], field) == pytest.approx(getattr(found[1], field), rel=1e-12)


@pytest.mark.parametrize(
    ("method", "metric"),
    [case for case in doubles(STOCHASTIC) if case.values[1] != "trace" or case.values[0].name not in AS_PER_SAMPLE],
)
@pytest.mark.slow
def test_standard_errors_are_calibrated(method, metric):
    # A larger subset of samples is more exact, and soon has all of them; one pass is spent on their shares.
    # Its error counts the interaction of two samples twice, and is 1.2 times too large here.
    given = {"passes": {"alignment": 8}.get(metric, 4), "slack": 0.55} if method.name == "sample_subset" else {}
    testing.check_calibration(method.name, metric, seeds=SEEDS_OF_ERRORS, **given)


MEMORIES = {"wide": (2**10, 2**17, 2**18, 2**19, 2**20), "active": (2**18, 2**20, 2**22, 2**24)}


@pytest.mark.parametrize("label", MEMORIES)
@pytest.mark.parametrize("method", STOCHASTIC, ids=lambda m: m.name)
@pytest.mark.slow
def test_no_method_exceeds_its_budget_whatever_the_memory(method, label):
    """Recomputation counts as passes; a budget that is too small for it is refused in one line.

    A small memory holds few rows of a kernel, or the activations of few samples.
    """
    problem, done = loaded(served(method, label)), 0
    for metric in sorted({"norm", "alignment"} & set(method.metrics)) or method.given:
        for memory in MEMORIES[label]:
            target, probes = Target(method.backends[0], "float64", "cpu", memory), method.fewest_probes
            ready = method.prepare(problem, target)
            for passes in (method.least_passes(problem, metric), 15 * method.cost(metric, probes)):
                if method.bytes_needed(problem, metric, target, passes) > memory:
                    continue
                try:
                    found = [method.estimate(ready, metric, passes)]
                    if isinstance(method, Incremental):  # in batches, to an unreachable tolerance
                        found.append(method.estimates(ready, (metric,), passes, rtol=1e-12)[metric])
                except OverMemory as error:
                    assert len(str(error).splitlines()) == 1
                    continue
                assert all(each.passes <= passes for each in found), (metric, memory)
                done += 1
    assert done > 3


class Squares(torch.nn.Module):
    def forward(self, x):
        return Squared.apply(x)


def squares_in_jax(weights, x):
    import jax

    squared = jax.custom_vjp(lambda h: h * h)
    squared.defvjp(lambda h: (h * h, h), lambda h, g: (2 * g * h,))
    return squared(x @ weights["0.weight"].T + weights["0.bias"]) @ weights["2.weight"].T + weights["2.bias"]


@functools.cache
def narrow(forward_mode: bool) -> Problem:
    """A problem with more outputs than hidden units, whose network has or has no forward mode."""
    smooth = testing.smooth_problem("narrow", 6, 4, 3, 5)
    if forward_mode:
        return smooth
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), Squares(), torch.nn.Linear(3, 5))
    return Problem("reverse_only", module, smooth.x, smooth.theta_0, smooth.theta_f, squares_in_jax)


@pytest.mark.parametrize(
    ("method", "backend", "metric", "forward_mode"), crossed(triples(STOCHASTIC), (True, False), in_jax=False)
)
def test_no_method_exceeds_its_budget_with_or_without_forward_mode(method, backend, metric, forward_mode):
    """A JVP takes two passes without forward mode; a budget that is too small for that is refused in one line.

    :func:`test_methods_keep_their_contract` checks budgets in JAX with forward mode.
    """
    problem, target, done = narrow(forward_mode), Target(backend, "float64", "cpu"), 0
    if method.unsupported_reason(problem, metric, target, 10**6):
        pytest.skip("does not apply")
    try:
        ready = method.prepare(problem, target)
    except BadInput as refusal:  # it cannot be traced, or has no head
        pytest.skip(str(refusal))
    least = method.least_passes(problem, metric)
    budgets = {least, least + 1, 2 * least - 1, 2 * least, 5 * least, 64 + least}
    if backend == "jax":  # which compiles programs for each number of probes
        budgets -= {least + 1, 5 * least}
    for passes in sorted(budgets):
        try:
            found = [method.estimate(ready, metric, passes)]
            if isinstance(method, Incremental):
                found.append(method.estimates(ready, (metric,), passes, rtol=1e-12)[metric])
        except Unsupported as refusal:
            pytest.skip(str(refusal))
        except (BadInput, OverMemory) as error:
            assert len(str(error).splitlines()) == 1 and passes < 2 * least
            continue
        assert all(each.passes <= passes for each in found), passes
        # Less than a probe is left over: a budget is not just halved.
        if not forward_mode and method.name in ("hutchinson", "one_sided_forward", "gram_forward"):
            share = method.jvp_share(metric)
            assert passes - found[0].passes < (1 + share) * (method.passes_per_probe(metric) + 1)
        done += 1
    assert done >= min(3, sum(passes >= 2 * least for passes in budgets))


@pytest.mark.parametrize("backend", mostly_slow(["torch", "jax"], 1))
@pytest.mark.parametrize("forward_mode", [True, False])
def test_spectra_and_solutions_by_products_keep_their_budget(forward_mode, backend):
    problem = narrow(forward_mode)
    y = np.random.default_rng(0).standard_normal(problem.n)
    for passes in (70, 100, 150) if backend == "torch" else (100,):
        j = operators.linearise(problem, "theta_0", Target(backend, "float64", "cpu"))
        assert spectrum.of_operator(j, 2, rtol=1e-12, passes=passes).passes <= passes
        j = operators.linearise(problem, "theta_0", Target(backend, "float64", "cpu"))
        assert solve.of_operator(j, y, ridge=1e3, rtol=1e-3, passes=passes).passes <= passes


@pytest.mark.parametrize(("method", "backend", "metric"), triples(STOCHASTIC))
def test_no_interval_is_narrower_than_rounding(method, backend, metric):
    """With one output per sample some methods have no other error, but they do not reach every tolerance."""
    problem, target = testing.smooth_problem("one_each", 4, 3, 5, 1), Target(backend, "float32", "cpu")
    if method.unsupported_reason(problem, metric, target, 10**6):
        pytest.skip("does not apply")
    ready, passes = method.prepare(problem, target), 8 * method.least_passes(problem, metric)
    found = [method.estimate(ready, metric, passes)]
    if isinstance(method, Incremental):
        found.append(method.estimates(ready, (metric,), passes, rtol=1e-9)[metric])
        assert found[1].relative_width() > 1e-9
        assert any("rounding may exceed rtol=1e-09" in s or "not reach rtol=1e-09" in s for s in found[1].notes)
    for e in found:
        low, high = e.interval()
        assert 1e-6 < e.rounding < 1e-3 and high > low
        assert metric == "alignment" or high - low > e.rounding * e.value


def test_a_tolerance_below_rounding_is_noted():
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)), torch.randn(4, 3)
    found = ntkbench.trace(model, x, method="per_sample_trace", rtol=1e-9)
    assert found.standard_error < 1e-12 and found.relative_width() > 1e-6
    said = "rounding may exceed rtol=1e-09: choose dtype='float64'"
    assert said in found.notes
    assert said not in ntkbench.trace(model, x, method="per_sample_trace", rtol=1e-9, dtype="float64").notes


def test_titles_of_methods_are_unique():
    assert len({method.title for method in ALL}) == len(ALL)


def test_expected_methods_are_registered():
    assert set(methods.names()) >= {
        "direct",
        "hutchinson",
        "hutchpp",
        "jacobian_contraction",
        "naive_jacobian",
        "ntk_vector_products",
        "one_sided_forward",
        "one_sided_reverse",
        "shared_probe_alignment",
        "sum_of_logits",
    }


def exact_cases() -> list[Any]:
    """Every check of every exact method, except those by neural-tangents, which ``test_neural_tangents.py`` has.

    ``test_recurrent.py`` compares all products of recurrent networks in JAX with an explicit J.
    """
    return [
        pytest.param(m, backend, *check, id="-".join((m.name, backend, *check)))
        for m in DETERMINISTIC
        if m.kind == "exact" and not m.name.startswith("nt_")
        for backend in m.backends
        for check in (CHECKS if backend == "torch" or m.name in ("direct", "naive_jacobian") else CHECKS[:4])
    ]


@pytest.mark.parametrize(("method", "backend", "label", "metric", "dtype"), exact_cases())
@pytest.mark.slow
def test_exact_methods_are_exact(method, backend, label, metric, dtype):
    skip_refused(method, label, metric, backend)
    ready = prepared(method, label, backend, dtype)
    estimate = method.estimate(ready, metric)
    exact = reference.exact(loaded(label))[metric]
    assert estimate.value == pytest.approx(exact, rel=1e-9 if dtype == "float64" else 1e-4)
    assert type(estimate.value) is float
    assert estimate.standard_error is None
    assert estimate.method == method.name
    # J fits in memory here, so what is needed is known to the pass.
    needed = method.passes_needed(loaded(label), metric, Target(backend, dtype, "cpu"))
    assert estimate.passes == (None if needed is None else pytest.approx(needed))


@pytest.mark.parametrize(
    ("method", "backend"), pairs([m for m in STOCHASTIC if "trace" in m.metrics and m.name not in AS_PER_SAMPLE])
)
@pytest.mark.slow
def test_traces_are_unbiased(method, backend):
    label = served(method, "tanh_net")
    ready = prepared(method, label, backend)
    budget = least(method, "trace")
    seeds = SEEDS[backend]
    values = np.array([method.estimate(ready, "trace", budget, seed).value for seed in range(seeds)])
    z = (values.mean() - truth(label)["trace"]) / (values.std(ddof=1) / math.sqrt(seeds))
    assert abs(z) < stats.t.isf(stats.norm.sf(4), seeds - 1), "four standard errors, as for many seeds"


@pytest.mark.parametrize(
    ("name", "side"), [("one_sided_reverse", "n"), ("one_sided_forward", "P"), ("hutchinson", "n")]
)
def test_variance_of_a_trace_is_that_of_the_formula(name, side):
    method = methods.get(name)
    J = written_out(loaded("tanh_net"))
    gram = J @ J.T if side == "n" else J.T @ J
    passes_a_probe = method.passes_per_probe("trace")
    estimate = method.estimate(prepared(method, "tanh_net", "torch"), "trace", 20_000 * passes_a_probe, 0)
    assert estimate.passes == 20_000 * passes_a_probe
    expected = 2 * ((gram**2).sum() - (np.diag(gram) ** 2).sum()) / 20_000
    assert estimate.standard_error**2 == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("backend", mostly_slow(BACKENDS, 1))
def test_variance_of_the_per_sample_trace_is_that_of_the_diagonal_blocks(backend):
    method, problem = methods.get("per_sample_trace"), loaded("tanh_net")
    J = written_out(problem).reshape(problem.N, problem.O, -1)
    blocks = J @ J.transpose(0, 2, 1)
    expected = 2 * ((blocks**2).sum() - (blocks.diagonal(axis1=1, axis2=2) ** 2).sum()) / 20_000
    estimate = method.estimate(prepared(method, "tanh_net", backend), "trace", 20_000, 0)
    assert estimate.standard_error**2 == pytest.approx(expected, rel=0.15)
    assert abs(estimate.value - truth("tanh_net")["trace"]) < 4 * estimate.standard_error
    assert estimate.passes == 20_000


@pytest.mark.parametrize("backend", mostly_slow(BACKENDS, 1))
@pytest.mark.parametrize("metric", METRICS)
def test_hutchpp_is_exact_once_the_sketch_spans_theta(backend, metric):
    method = methods.get("hutchpp")
    ready = prepared(method, "tanh_net", backend)
    for probes in (6, 9):  # n and more: a sketch cannot be wider than Theta
        estimate = method.estimate(ready, metric, probes * method.passes_per_probe(metric), 0)
        assert estimate.value == pytest.approx(truth("tanh_net")[metric], rel=1e-9)
        assert estimate.standard_error == pytest.approx(0, abs=1e-9 * estimate.value)
        assert estimate.passes == 6 * method.passes_per_probe(metric)
    few = method.estimate(ready, metric, 2 * method.passes_per_probe(metric), 0)
    assert few.value != pytest.approx(truth("tanh_net")[metric], rel=1e-9)


@pytest.mark.parametrize("backend", mostly_slow(BACKENDS, 1))
def test_shared_probe_alignment_is_exact_with_one_probe_per_output(backend):
    method = methods.get("shared_probe_alignment")
    estimate = method.estimate(prepared(method, "tanh_net", backend), "alignment", 4 * 8, 0)
    assert estimate.value == pytest.approx(truth("tanh_net")["alignment"], rel=1e-9)
    assert estimate.passes == 4 * 6


def test_shared_probe_alignment_has_no_error_when_it_is_exact():
    method = methods.get("shared_probe_alignment")
    estimate = method.estimate(prepared(method, "tanh_net", "torch"), "alignment", 4 * 6, 0)
    assert estimate.standard_error == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("label", "metric", "backend"),
    [
        *((label, metric, "torch") for label in ("tanh_net", "digits_mlp[N=4]") for metric in METRICS),
        *(("tanh_net", metric, "jax") for metric in ("trace", "alignment")),
    ],
)
def test_sum_of_logits_is_the_pntk_times_the_identity(label, metric, backend):
    problem, method = loaded(label), methods.get("sum_of_logits")
    thetas = []
    for end in ("theta_0", "theta_f"):
        g = written_out(problem, end).reshape(problem.N, problem.O, problem.P).sum(1) / math.sqrt(problem.O)
        thetas.append(np.kron(g @ g.T, np.eye(problem.O)))
    expected = metrics_of(*thetas)[metric]
    estimate = method.estimate(prepared(method, label, backend), metric)
    assert estimate.value == pytest.approx(expected, rel=1e-9)
    assert estimate.passes == pytest.approx(2 if metric == "alignment" else 1)
    assert estimate.value != pytest.approx(truth(label)[metric], rel=1e-6)


@pytest.mark.parametrize(("method", "metric"), doubles(STOCHASTIC))
def test_refuses_budgets_that_are_too_small(method, metric):
    label, enough = served(method, "tanh_net"), least(method, metric)
    target = Target(method.backends[0])
    for passes in (0, 1, enough - 1):
        assert f"the {words(metric)} takes at least {enough} passes" in method.unsupported_reason(
            loaded(label), metric, target, passes
        )
    assert method.unsupported_reason(loaded(label), metric, target, enough) is None
    with pytest.raises(BadInput, match=f"{method.name} is stochastic and needs a positive number of passes"):
        method.estimate(prepared(method, label, method.backends[0]), metric)


def test_refuses_metrics_before_budgets(tiny):
    assert "only" in methods.get("shared_probe_alignment").unsupported_reason(tiny, "trace", Target(), 2)
    assert "only" in methods.get("hutchpp").unsupported_reason(tiny, "rank", Target(), 2)


def test_estimates_of_no_probes_are_refused():
    method = methods.get("hutchinson")
    with pytest.raises(BadInput, match="hutchinson: the norm takes at least 4 passes; got passes=1"):
        method.estimate(prepared(method, "tanh_net", "torch"), "norm", 1)


@functools.cache
def one_dimensional(which: str) -> Problem:
    """A kernel with one output in all, or with one parameter."""
    if which == "output":
        return testing.smooth_problem("one_output", 1, 3, 4, 1)
    ends = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
    weights = [{"weight": np.full((1, 1), value, np.float32)} for value in (0.5, 2.0)]
    forward = lambda weights, x: x @ weights["weight"].T  # noqa: E731
    return Problem("one_parameter", ends[0], np.array([[1.0], [-2.0], [0.5]], np.float32), *weights, forward)


@pytest.mark.parametrize(
    ("method", "backend", "metric", "which"),
    crossed(triples(STOCHASTIC), ("output", "parameter"), in_jax="parameter"),
)
def test_errors_are_known_where_one_probe_spans_the_space(method, backend, metric, which):
    """One output is not tried in JAX; in PyTorch all methods are."""
    problem, target, done = one_dimensional(which), Target(backend, "float64", "cpu"), 0
    if method.unsupported_reason(problem, metric, target, 10**6):
        pytest.skip("does not apply")
    J, J_f = written_out(problem), written_out(problem, "theta_f")
    exact = metrics_of(J @ J.T, J_f @ J_f.T)[metric]
    ready, least = method.prepare(problem, target), method.least_passes(problem, metric)
    for passes in (least, least + 1, 10 * least):
        try:
            e = method.estimate(ready, metric, passes)
        except BadInput as error:  # some features need more than others
            assert "must be at least" in str(error)
            continue
        done += 1
        assert math.isfinite(e.standard_error), passes
        if e.standard_error <= 1e-9 * e.value:
            assert e.value == pytest.approx(exact, rel=1e-6), passes
    assert done


def test_exact_methods_support_interacting_samples(tiny):
    """A network that centres each batch: methods that need no independent samples stay exact."""
    from torch import nn

    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    weights = {key: w.detach().numpy().copy() for key, w in module.named_parameters()}
    problem = Problem("batch_norm", module, tiny.x, weights, samples_interact=True)
    J = written_out(problem)
    target = Target("torch", "float64", "cpu")
    served = []
    for method in DETERMINISTIC:
        if method.kind == "exact" and method.unsupported_reason(problem, "norm", target) is None:
            served.append(method.name)
            estimate = method.estimate(method.prepare(problem, target), "norm")
            assert estimate.value == pytest.approx(np.linalg.norm(J @ J.T), rel=1e-9)
    assert {"direct", "naive_jacobian"} <= set(served)


@pytest.mark.parametrize("metric", ["trace", "norm", "alignment"])
@pytest.mark.parametrize("memory", [2**30, 2**18, 2**14, 1])
def test_recomputed_rows_count_as_passes(metric, memory):
    """Where J does not fit, so that the last method that ``auto`` tries keeps its budget, too."""
    problem, target = testing.smooth_problem("rows", 12, 20, 30, 4), Target("torch", "float64", "cpu", memory)
    method = methods.get("naive_jacobian")
    found = method.estimate(method.prepare(problem, target), metric)
    assert found.passes == method.passes_needed(problem, metric, target)


@pytest.mark.parametrize("wishes", [{}, {"rtol": 0.01}], ids=["a few passes", "a tolerance"])
@pytest.mark.parametrize("method", [m for m in STOCHASTIC if isinstance(m, Incremental)], ids=lambda m: m.name)
def test_probes_that_agree_by_chance_do_not_look_exact(method, wishes):
    """Two equal outputs of one sample: a square has two values, and few probes often have the same one."""
    first, last = nn.Linear(3, 1, bias=False), nn.Linear(1, 2, bias=False)
    for layer in (first, last):
        nn.init.ones_(layer.weight)
    last.requires_grad_(False)
    problem = ntkbench.Kernel(nn.Sequential(first, last), torch.ones(1, 3)).problem
    target, exact = Target("torch", "float64", "cpu"), {"trace": 6.0, "norm": 6.0, "effective_rank": 1.0}
    ready = method.prepare(problem, target)
    for metric in sorted(exact.keys() & set(method.metrics)):
        if method.unsupported_reason(problem, metric, target):
            continue
        for seed in range(16):
            passes = 400 if wishes else method.least_passes(problem, metric)
            try:
                found = method.estimates(ready, (metric,), passes, seed, **wishes)[metric]
            except Undefined:  # all probes are orthogonal to the one eigenvector
                continue
            if found.standard_error == 0:
                assert found.value == pytest.approx(exact[metric]), (metric, seed)


SMALLEST = {f"{N} x {outputs}": (N, 3, 4, outputs) for N, outputs in ((1, 1), (6, 1), (1, 3), (2, 2))}


@pytest.mark.parametrize("size", SMALLEST)
@pytest.mark.parametrize("method", [m for m in STOCHASTIC if isinstance(m, Incremental)], ids=lambda m: m.name)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_intervals_cover_on_the_smallest_problems(method, size):
    """With a single output, or more probes than outputs, the error is known and the interval covers."""
    target, problem = Target(method.backends[0], "float64", "cpu"), testing.smooth_problem(size, *SMALLEST[size])
    if reason := method.unsupported_reason(problem, method.given[0], target):
        pytest.skip(reason)
    J, J_f = written_out(problem), written_out(problem, "theta_f")
    exact = metrics_of(J @ J.T, J_f @ J_f.T)
    ready = method.prepare(problem, target)
    for metric in method.metrics:
        least = method.least_passes(problem, metric)
        for passes in (least, 4 * least, 40 * least):
            found = method.estimate(ready, metric, passes, 1)
            if found.degrees == 0 and passes == least and method.name.endswith("u_statistics"):
                assert math.isnan(found.standard_error), metric  # effectively one pair of probes in one stratum
                continue
            assert math.isfinite(found.standard_error), (metric, passes)
            low, high = found.interval(0.9999)
            slack = 1e-6 * exact[metric]
            assert low - slack <= exact[metric] <= high + slack, (metric, passes)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_samples_that_are_all_taken_exactly_leave_no_error():
    """With one output per sample and one large sample; a group of one probe has no pairs, and needs none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 1)), torch.randn(32, 8)
    x[3] *= 100
    for metric in ("norm", "effective_rank"):
        compute = functools.partial(getattr(ntkbench, metric), model, x, dtype="float64")
        exact = compute(method="structured_derivatives")
        for wanted in ({"passes": 16}, {"rtol": 0.01}):
            found = compute(method="structured_block_u_statistics", **wanted)
            assert found.standard_error <= 1e-6 * float(found)
            assert float(found) == pytest.approx(float(exact), rel=1e-9)
            assert found.passes <= 16


@pytest.mark.parametrize("method", DETERMINISTIC, ids=lambda method: method.name)
def test_formulas_of_passes_give_the_passes_needed(method):
    target = Target(method.backends[0], "float64", "cpu")
    small = testing.smooth_problem
    few = (small(), small("other", 4, 3, 5, 3), small("wide_net", hidden=2, outputs=5), testing.recurrent_problem())
    few = [each for each in few if method.unsupported_reason(each, "trace", target) is None]
    assert few
    for problem in few:
        needed = method.passes_needed(problem, "trace", target)
        T = problem.x.shape[1] if problem.x.ndim == 3 else 1
        d = problem.theta_0["2.weight"].shape[1] if "2.weight" in problem.theta_0 else None
        sizes = {"n": problem.n, "N": problem.N, "O": problem.O, "P": problem.P, "T": T, "d": d}
        ways = [eval(way, sizes) for way in method.passes_formula.split(" or ") if way]
        assert needed in ways if needed is not None else not ways, problem.name
