"""The contract of every method in the registry: exact, as cheap as it says, reproducible, honest about its error."""

from __future__ import annotations

import functools
import inspect
import math
import types
from typing import Any

import numpy as np
import pytest
from conftest import loaded, metrics_of, written_out

from ntkbench import methods, registry
from ntkbench.errors import BadInput
from ntkbench.methods.base import KINDS, Method
from ntkbench.metrics import METRICS
from ntkbench.options import BACKENDS, Target
from ntkbench.problem import Problem
from ntkbench.problems.base import reference

ALL = [methods.get(name) for name in methods.names()]
DETERMINISTIC = [m for m in ALL if not m.takes_passes]
STOCHASTIC = [m for m in ALL if m.takes_passes]

CHECKS = [
    (label, metric, dtype)
    for label in ("digits_mlp[N=4]", "digits_conv[N=4]", "gru_hazelden[N=2,T=2]")
    # Between them these have all four moments; every metric by itself is checked on a smaller problem.
    for metric, dtype in (("alignment", "float64"), ("effective_rank", "float32"))
]

SEEDS = 400
SEEDS_OF_ERRORS = 200


def pairs(chosen: list[Method]) -> list[Any]:
    """Every backend of every method."""
    return [pytest.param(m, backend, id=f"{m.name}-{backend}") for m in chosen for backend in m.backends]


def triples(chosen: list[Method]) -> list[Any]:
    """Every metric in every backend of every method."""
    return [
        pytest.param(m, backend, metric, id=f"{m.name}-{backend}-{metric}")
        for m in chosen
        for backend in m.backends
        for metric in m.metrics
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


@functools.cache
def least(method: Method, metric: str) -> int:
    """The smallest budget that a stochastic method takes: two probes."""
    target = Target(method.backends[0], "float64", "cpu")
    return next(k for k in range(1, 1000) if method.unsupported_reason(loaded("tanh_net"), metric, target, k) is None)


@functools.cache
def truth(label: str) -> dict[str, float]:
    J, J_f = written_out(loaded(label)), written_out(loaded(label), "theta_f")
    return metrics_of(J @ J.T, J_f @ J_f.T)


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_says_what_it_is(method):
    assert methods.get(method.name) is method
    assert inspect.getsourcefile(type(method)).endswith(f"methods/{method.name}.py")
    assert method.kind in KINDS
    assert method.takes_passes == (method.kind == "stochastic")
    assert method.title
    assert method.source
    assert inspect.getdoc(type(method))
    assert method.backends
    assert set(method.backends) <= set(BACKENDS)
    assert method.metrics
    assert set(method.metrics) <= set(METRICS)
    assert [m.title for m in ALL].count(method.title) == 1


def test_methods_of_the_design_are_there():
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


@pytest.mark.parametrize(("label", "metric", "dtype"), CHECKS)
@pytest.mark.parametrize(("method", "backend"), pairs([m for m in DETERMINISTIC if m.kind == "exact"]))
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


@pytest.mark.parametrize(("method", "backend", "metric"), triples(DETERMINISTIC))
def test_deterministic_methods_give_the_same_twice_and_exact_ones_the_truth(method, backend, metric):
    skip_refused(method, "tanh_net", metric, backend)
    ready = prepared(method, "tanh_net", backend)
    first, second = (method.estimate(ready, metric, seed=seed) for seed in (0, 1))
    assert first == second
    if method.kind == "exact":
        assert first.value == pytest.approx(truth("tanh_net")[metric], rel=1e-9)


@pytest.mark.parametrize(("method", "backend", "metric"), triples(DETERMINISTIC))
def test_deterministic_methods_do_without_memory(method, backend, metric):
    """Blocks of one row or probe change the cost, perhaps, but not the value."""
    skip_refused(method, "tanh_net", metric, backend)
    tight = method.estimate(prepared(method, "tanh_net", backend, memory=1), metric)
    roomy = method.estimate(prepared(method, "tanh_net", backend), metric)
    assert tight.value == pytest.approx(roomy.value, rel=1e-12)
    assert roomy.passes is None or tight.passes >= roomy.passes


@pytest.mark.parametrize(("method", "backend", "metric"), triples(STOCHASTIC))
def test_stochastic_methods_follow_their_seed_and_keep_to_their_budget(method, backend, metric):
    ready = prepared(method, "tanh_net", backend)
    budget = least(method, metric)
    for passes in (budget, budget + 1, 3 * budget - 1, 40 * budget):
        first, again, other = (method.estimate(ready, metric, passes, seed) for seed in (5, 5, 6))
        assert first == again
        assert 0 < first.passes <= passes
        assert first.method == method.name
        assert math.isfinite(first.value)
        assert first.standard_error >= 0
        if first.standard_error > 1e-6 * abs(first.value):  # with more probes than outputs some methods are exact
            assert first.value != other.value


@pytest.mark.parametrize(("method", "backend", "metric"), triples(STOCHASTIC))
def test_stochastic_methods_work_in_float32_and_little_memory(method, backend, metric):
    """In float32 and one probe at a time, the truth is within six standard errors (and rounding)."""
    budget = 30 * least(method, metric)
    for dtype, memory in (("float32", 2**30), ("float64", 1)):
        estimate = method.estimate(prepared(method, "tanh_net", backend, dtype, memory), metric, budget, 0)
        exact = truth("tanh_net")[metric]
        assert abs(estimate.value - exact) <= 6 * estimate.standard_error + 1e-5 * abs(exact)
        assert estimate.standard_error <= 0.2 * abs(exact)
        assert estimate.passes <= budget


@pytest.mark.parametrize(("method", "backend"), pairs([m for m in STOCHASTIC if "trace" in m.metrics]))
def test_traces_are_unbiased(method, backend):
    ready = prepared(method, "tanh_net", backend)
    budget = least(method, "trace")
    values = np.array([method.estimate(ready, "trace", budget, seed).value for seed in range(SEEDS)])
    z = (values.mean() - truth("tanh_net")["trace"]) / (values.std(ddof=1) / math.sqrt(SEEDS))
    assert abs(z) < 4


@pytest.mark.parametrize(("method", "metric"), doubles(STOCHASTIC))
def test_standard_errors_are_calibrated(method, metric):
    """The mean squared standard error is the variance over seeds, and the mean is right to within that noise."""
    ready = prepared(method, "wide", method.backends[0])
    # A subset of samples is the more exact the more of them it has, and soon has all.
    budget = 5 * least(method, metric) if method.name != "sample_subset" else {"alignment": 6}.get(metric, 3)
    estimates = [method.estimate(ready, metric, budget, seed) for seed in range(SEEDS_OF_ERRORS)]
    values, errors = np.array([(e.value, e.standard_error) for e in estimates]).T
    variance = values.var(ddof=1)
    assert 0.7 * variance < (errors**2).mean() < 1.3 * variance
    # Square roots and ratios are biased at order 1/k: less than the spread, which is all that a user sees.
    assert abs(values.mean() - truth("wide")[metric]) < 0.5 * math.sqrt(variance)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_variance_of_the_per_sample_trace_is_that_of_the_diagonal_blocks(backend):
    method, problem = methods.get("per_sample_trace"), loaded("tanh_net")
    J = written_out(problem).reshape(problem.N, problem.O, -1)
    blocks = J @ J.transpose(0, 2, 1)
    expected = 2 * ((blocks**2).sum() - (blocks.diagonal(axis1=1, axis2=2) ** 2).sum()) / 20_000
    estimate = method.estimate(prepared(method, "tanh_net", backend), "trace", 20_000, 0)
    assert estimate.standard_error**2 == pytest.approx(expected, rel=0.15)
    assert abs(estimate.value - truth("tanh_net")["trace"]) < 4 * estimate.standard_error
    assert estimate.passes == 20_000


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_probe_alignment_is_exact_with_a_probe_an_output(backend):
    method = methods.get("shared_probe_alignment")
    estimate = method.estimate(prepared(method, "tanh_net", backend), "alignment", 4 * 8, 0)
    assert estimate.value == pytest.approx(truth("tanh_net")["alignment"], rel=1e-9)
    assert estimate.passes == 4 * 6


def test_shared_probe_alignment_knows_when_it_is_exact():
    method = methods.get("shared_probe_alignment")
    estimate = method.estimate(prepared(method, "tanh_net", "torch"), "alignment", 4 * 6, 0)
    assert estimate.standard_error == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("label", ["tanh_net", "digits_mlp[N=4]"])
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


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_refuses_what_it_cannot_serve(method, tiny):
    target = Target(method.backends[0])
    if method.needs_recurrence:
        assert "recurrent" in method.unsupported_reason(tiny, method.metrics[0], target)
        tiny = loaded("gru_hazelden[N=2,T=2]")
    without = Problem(tiny.name, tiny.module, tiny.x, tiny.theta_0)
    for metric in METRICS:
        reason = method.unsupported_reason(tiny, metric, target)
        assert reason is None if metric in method.metrics else "only" in reason
        if metric in method.metrics and "jax" in method.backends:
            assert "JAX" in method.unsupported_reason(without, metric, Target("jax"))
    for backend in set(BACKENDS) - set(method.backends):
        assert "only" in method.unsupported_reason(tiny, method.metrics[0], Target(backend))
    if "alignment" in method.metrics:
        assert "trained weights" in method.unsupported_reason(
            Problem(**{**vars(tiny), "theta_f": None}), "alignment", target
        )
    mixed = method.unsupported_reason(Problem(**{**vars(tiny), "samples_interact": True}), method.metrics[0], target)
    assert ("samples interact" in mixed) if method.needs_independent_samples else mixed is None


@pytest.mark.parametrize(("method", "metric"), doubles(STOCHASTIC))
def test_refuses_budgets_that_are_too_small(method, metric, tiny):
    enough = least(method, metric)
    target = Target(method.backends[0])
    for passes in (0, 1, enough - 1):
        assert f"{metric} takes at least {enough} passes" in method.unsupported_reason(tiny, metric, target, passes)
    assert method.unsupported_reason(tiny, metric, target, enough) is None
    with pytest.raises(BadInput, match=f"{method.name} is stochastic and needs passes"):
        method.estimate(prepared(method, "tanh_net", method.backends[0]), metric)


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_memory_is_known_beforehand_for_every_metric(method, tiny):
    for metric in method.metrics:
        passes = least(method, metric) if method.takes_passes else None
        assert method.bytes_needed(tiny, metric, Target(method.backends[0]), passes) >= 0


def test_refuses_metrics_before_budgets(tiny):
    assert "only" in methods.get("shared_probe_alignment").unsupported_reason(tiny, "trace", Target(), 2)
    assert "only" in methods.get("hutchpp").unsupported_reason(tiny, "rank", Target(), 2)


def test_estimates_of_no_probes_are_refused():
    method = methods.get("hutchinson")
    with pytest.raises(BadInput, match="hutchinson: norm takes at least 4 passes; got 1"):
        method.estimate(prepared(method, "tanh_net", "torch"), "norm", 1)


def test_interacting_samples_are_served_by_whole_passes(tiny):
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


def test_unknown_methods_are_refused():
    with pytest.raises(BadInput, match=r"unknown method 'hutch\+\+' \(did you mean 'hutchpp'\?\); allowed: .*direct"):
        methods.get("hutch++")


def test_a_file_must_hold_one_method(monkeypatch):
    empty = types.ModuleType("empty")
    empty.__file__ = "empty.py"
    monkeypatch.setattr(registry, "modules", lambda package: {"empty": empty})
    with pytest.raises(TypeError, match=r"empty\.py must define exactly one Method, found \[\]"):
        methods._all.__wrapped__()
