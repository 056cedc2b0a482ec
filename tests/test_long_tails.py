"""Batches in which a few samples have most of the kernel: exact samples, errors and notes."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from conftest import metrics_of, mostly_slow, written_out
from scipy import stats
from torch import nn

import ntkbench
from ntkbench import methods
from ntkbench.estimate import Estimate
from ntkbench.estimators import accumulators, strata
from ntkbench.estimators.standard_errors import MomentEstimates, PairSums
from ntkbench.options import Target
from ntkbench.problem import Problem

N, OUTPUTS = 32, 16
BATCHES = ("even", "one outlier", "heavy-tailed", "imbalanced")
METRICS = ("norm", "effective_rank", "alignment")
STRUCTURED = "structured_block_u_statistics"


@functools.cache
def problem(batch: str) -> Problem:
    """An MLP at two sets of weights, on one of the batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = (8, 24, OUTPUTS)
        first, second = (
            nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.ReLU(), nn.Linear(sizes[1], sizes[2])) for _ in range(2)
        )
        x = torch.randn(N, sizes[0])
        alike = torch.randn(sizes[0]) + 0.05 * torch.randn(28, sizes[0])
    if batch == "one outlier":
        x[3] *= 100
    elif batch == "heavy-tailed":
        x *= torch.from_numpy(np.random.default_rng(1).standard_cauchy((N, 1))).float()
    elif batch == "imbalanced":
        x[:28] = alike
    weights = [{key: w.detach().numpy().copy() for key, w in net.named_parameters()} for net in (first, second)]
    theta_f = {key: w + weights[1][key] / 2 for key, w in weights[0].items()}
    return Problem(batch, first, x.numpy(), weights[0], theta_f)


@functools.cache
def truth(batch: str) -> dict[str, float]:
    J, J_f = written_out(problem(batch)), written_out(problem(batch), "theta_f")
    return metrics_of(J @ J.T, J_f @ J_f.T)


@functools.cache
def prepared(method: str, batch: str) -> Any:
    return methods.get(method).prepare(problem(batch), Target("torch", "float64", "cpu", 2**30))


@functools.cache
def of_seed(method: str, batch: str, passes: int, seed: int) -> dict[str, Estimate]:
    return methods.get(method).estimates(prepared(method, batch), METRICS, 2 * passes, seed)


def found(method: str, batch: str, passes: int, seeds: int) -> list[dict[str, Estimate]]:
    """Estimates of all metrics from the same probes, by seed; passes for each set of weights."""
    return [of_seed(method, batch, passes, seed) for seed in range(seeds)]


def errors(method: str, batch: str, metric: str, passes: int = 8, seeds: int = 200) -> np.ndarray:
    """Relative errors by seed."""
    exact = truth(batch)[metric]
    return np.array([each[metric].value / exact - 1 for each in found(method, batch, passes, seeds)])


def coverage(method: str, batch: str, metric: str, passes: int = 8, seeds: int = 200) -> float:
    exact = truth(batch)[metric]
    return float(np.mean([each[metric].covers(exact, "float64") for each in found(method, batch, passes, seeds)]))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.slow
def test_block_estimates_are_unbiased_and_covered_for_every_batch(batch, metric):
    off = errors(STRUCTURED, batch, metric)
    assert abs(off.mean()) < 4 * off.std() / len(off) ** 0.5 + off.std() ** 2
    assert 0.90 <= coverage(STRUCTURED, batch, metric) <= 0.995
    for each in found(STRUCTURED, batch, 8, 200):
        assert each[metric].passes <= 16 + 1e-9


@pytest.mark.parametrize(("batch", "most"), [("one outlier", 0.002), ("heavy-tailed", 0.03)])
@pytest.mark.parametrize("method", [STRUCTURED, "sample_subset"])
@pytest.mark.slow
def test_samples_with_most_of_the_kernel_leave_little_error(method, batch, most):
    for metric in METRICS:
        off = errors(method, batch, metric)
        assert np.sqrt((off**2).mean()) < most
    for each in found(method, batch, 8, 200):
        assert "% of" in each["norm"].notes[0]


@pytest.mark.parametrize(
    ("batch", "method"),
    mostly_slow(
        [(batch, m) for batch in ("even", "imbalanced") for m in (STRUCTURED, "block_u_statistics", "sample_subset")],
        {("even", STRUCTURED), ("imbalanced", "block_u_statistics"), ("imbalanced", "sample_subset")},
    ),
)
def test_even_batches_have_no_notes(method, batch):
    for each in found(method, batch, 8, 20):
        assert not each["norm"].notes


@pytest.mark.parametrize(("method", "passes"), [("block_u_statistics", 2), ("group_u_statistics", 2), (STRUCTURED, 2)])
def test_uneven_samples_that_are_not_taken_exactly_are_noted(method, passes):
    for each in found(method, "one outlier", passes, 3):
        assert "have most of ||Theta||^2, and none is taken exactly" in each["norm"].notes[0]


@pytest.mark.parametrize("name", ["per_sample_trace", STRUCTURED])
def test_traces_of_uneven_batches_are_covered_and_noted(name):
    """One of 16 samples has most of the trace, and two probes of its three outputs agree in a quarter of the cases."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()
        x = torch.randn(16, 4, dtype=torch.float64)
    x[5] *= 30
    given = ntkbench.from_module(model, x, dtype="float64")
    exact, method = np.square(written_out(given)).sum(), methods.get(name)
    ready = method.prepare(given, Target("torch", "float64", "cpu", 2**30))
    made = [method.estimate(ready, "trace", 2, seed) for seed in range(60)]
    assert all("few samples have most of the trace" in " ".join(each.notes) for each in made)
    assert sum(each.covers(exact, "float64") for each in made) >= stats.binom.ppf(1e-3, 60, 0.95)
    assert any(each.standard_error > 0 for each in made)


@pytest.mark.parametrize("method", ["block_u_statistics", "group_u_statistics"])
@pytest.mark.parametrize("batch", ["one outlier", "heavy-tailed"])
@pytest.mark.slow
def test_gradients_of_outliers_are_taken_exactly_and_leave_little_error(method, batch):
    for metric in METRICS:
        off = errors(method, batch, metric, seeds=40)
        assert np.sqrt((off**2).mean()) < 0.005
        assert coverage(method, batch, metric, seeds=40) >= 0.85
    for each in found(method, batch, 8, 40):
        assert each["norm"].passes <= 16 + 1e-9
        assert "% of the trace taken exactly" in each["norm"].notes[0]


def test_outliers_are_taken_exactly_in_a_budget_that_comes_in_parts():
    method = methods.get("group_u_statistics")
    ready = method.prepare(problem("one outlier"), Target("torch", "float64", "cpu", 2**30))
    accumulator, ledger = method.begin(ready, ("norm",), 0)
    budget = 0
    for passes in (4, 4, 8):
        accumulator.extend(passes)
        budget += passes
        assert ledger()[0] <= budget + 1e-9
    assert "% of the trace taken exactly" in ledger()[1][0]
    assert accumulator.estimate("norm").value == pytest.approx(truth("one outlier")["norm"], rel=1e-3)


@pytest.mark.parametrize(("method", "few"), [("hutchpp", 40), ("nystrompp", 40), ("gram_forward", 16)])
def test_a_budget_of_few_probes_is_noted(method, few):
    """In the calibration, 11 to 14 % of their intervals missed the value on uneven batches."""
    chosen, target = methods.get(method), Target("torch", "float64", "cpu", 2**30)
    ready = chosen.prepare(problem("imbalanced"), target)
    assert "few probes" in chosen.estimate(ready, "norm", few).notes[0]
    assert not chosen.estimate(ready, "norm", 256).notes


def test_conservative_intervals_of_many_leave_one_out_probes_are_noted():
    """In the calibration, all intervals of 85 probes on the transformer covered the value."""
    method = methods.get("nystrom_loo")
    ready = method.prepare(problem("imbalanced"), Target("torch", "float64", "cpu", 2**30))
    assert "conservative interval" in method.estimate(ready, "norm", 255).notes[0]
    assert "conservative" not in " ".join(method.estimate(ready, "norm", 39).notes)
    assert not method.remarks(0.0, 3.0, 85) and not method.remarks(0.1, 30.0, 85)


def test_an_interval_of_a_subset_that_leaves_few_samples_out_is_noted():
    """A sum over few is not normal: leaving one of 12 samples out, 2 of 12 intervals missed in the calibration."""
    method = methods.get("sample_subset")
    ready = method.prepare(problem("even"), Target("torch", "float64", "cpu", 2**30))
    for passes, left_out in {16: 0, 15: 4, 14: 6, 13: 0, 12: 0}.items():  # 1 pass tells whether samples are even
        accumulator, ledger = method.begin(ready, ("norm",), 0)
        accumulator.extend(passes)
        said = [note for note in ledger()[1] if "left out" in note]
        assert [note.split(" left")[0] for note in said] == [f"only {left_out} of {N} samples"] * (left_out > 0), passes


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.slow
def test_subsets_keep_their_budget_and_state_their_error(batch, metric):
    off = errors("sample_subset", batch, metric)
    stated = np.array([each[metric].standard_error for each in found("sample_subset", batch, 8, 200)])
    assert 0.7 < np.sqrt((stated**2).mean()) / (off.std() * truth(batch)[metric]) < 1.5
    assert all(each[metric].passes <= 16 + 1e-9 for each in found("sample_subset", batch, 8, 200))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.slow
def test_subsets_of_an_imbalanced_batch_are_covered(metric):
    assert 0.9 <= coverage("sample_subset", "imbalanced", metric) <= 0.99


@pytest.mark.slow
def test_subsets_of_an_imbalanced_batch_are_covered_at_a_tolerance():
    """A run stops where its error looks small, but the samples left out may be those that matter."""
    method = methods.get("sample_subset")
    ready = method.prepare(problem("imbalanced"), Target("torch", "float64", "cpu", 2**30))
    made = [method.estimates(ready, ("norm",), 64, seed, rtol=0.05)["norm"] for seed in range(200)]
    exact = truth("imbalanced")["norm"]
    assert np.mean([e.covers(exact, "float64") for e in made]) >= 0.9
    assert np.mean([abs(e.value / exact - 1) < 0.05 for e in made]) >= 0.9


@pytest.mark.parametrize(("metric", "most"), [("norm", 0.06), ("effective_rank", 0.075)])
@pytest.mark.slow
def test_probabilities_by_trace_lower_the_error_of_even_batches(metric, most):
    """With equal probabilities the errors of both metrics were 0.084."""
    assert np.sqrt((errors("sample_subset", "even", metric) ** 2).mean()) < most


@pytest.mark.slow
def test_few_probes_of_an_outlier_do_not_end_a_run_to_a_tolerance():
    """Four probes may agree by chance: one run in thirty stopped there, with errors of 5 % and intervals of 0.1 %."""
    method = methods.get(STRUCTURED)
    ready = method.prepare(problem("one outlier"), Target("torch", "float64", "cpu", 2**30))
    exact = truth("one outlier")["alignment"]
    for seed in range(60):
        estimate = method.estimates(ready, ("alignment",), 64, seed, rtol=0.25)["alignment"]
        assert "none is taken exactly" not in " ".join(estimate.notes)
        assert estimate.value == pytest.approx(exact, rel=0.02)


def test_leave_one_out_changes_are_those_of_the_remaining_probes():
    rng, N, K = np.random.default_rng(0), 3, 6
    w, singles, traces = rng.standard_normal((N, K, 4)), rng.random((1, N, K)), rng.random((N, K))
    table = np.einsum("bkp,clp->bkcl", w, w) ** 2

    def means(left_out: tuple[int, int] | None) -> np.ndarray:
        def pairs(b: int, c: int) -> float:
            keep = [[k for k in range(K) if (s, k) != left_out] for s in (b, c)]
            return float(np.mean([table[b, k, c, other] for k in keep[0] for other in keep[1] if b != c or k != other]))

        def mean(values: np.ndarray, b: int) -> float:
            return float(np.mean([values[b, k] for k in range(K) if (b, k) != left_out]))

        square = sum(pairs(b, c) for b in range(N) for c in range(N)) + sum(mean(singles[0], b) for b in range(N))
        return np.array([sum(mean(traces, b) for b in range(N)), square])

    sums = PairSums(N, K, 1)
    sums.add(0, 0, [table])
    sums.add_singles(singles)
    found = sums.moments(traces)
    np.testing.assert_allclose(found.means, means(None))
    (changes,) = found.left_out
    for b, k in ((0, 0), (1, 3), (2, 5)):
        np.testing.assert_allclose(changes[:, b, k], means((b, k)) - means(None), rtol=1e-9)


def test_the_error_of_a_heavy_stratum_is_the_jackknife_and_that_of_even_ones_linear():
    rng = np.random.default_rng(0)

    def estimates(scale: np.ndarray) -> MomentEstimates:
        sums = PairSums(len(scale), 8, 1)
        sums.add_singles(scale[None, :, None] * rng.random((1, len(scale), 8)))
        return sums.moments()

    def error(found: MomentEstimates, function) -> float:
        return found.standard_error(np.array([1 / found.means[0]]), function)

    def logarithm(means: np.ndarray) -> float:
        return float(np.log(means[0]))

    heavy = estimates(np.array([50.0, *[1.0] * 20]))

    def mirrored(means: np.ndarray) -> float:
        """A function of the same slope and the opposite curvature."""
        return -logarithm(2 * heavy.means - means)

    linear, larger = (heavy.left_out[0][0, 0] / heavy.means[0]).var(), 0
    rest = error(heavy, None) ** 2 - 7 * linear
    for function in (logarithm, mirrored):
        found = np.array([function(heavy.means + c) for c in heavy.left_out[0][:, 0].T]).var()
        larger += found > linear
        assert error(heavy, function) == pytest.approx(np.sqrt(7 * max(found, linear) + rest), rel=1e-9)
    assert larger == 1
    even = estimates(np.ones(40))
    assert error(even, logarithm) == pytest.approx(error(even, None), rel=1e-12)
    assert error(heavy, lambda means: np.nan) == error(heavy, None)


def test_uneven_strata_have_fewer_degrees_of_freedom():
    covariance = np.eye(1) / 100
    moments = MomentEstimates(np.array([4.0]), covariance, covariance, np.zeros((1, 1)), 12)
    even, uneven = (accumulators.delta_method("norm", ("square",), moments, uneven=each) for each in (False, True))
    assert uneven == even._replace(degrees=accumulators.FEWER * 12)


@pytest.mark.slow
def test_the_effective_rank_of_two_probes_is_nearly_unbiased():
    """By the whole method, and by its formula where the bias of the ratio of means is larger."""
    method = methods.get("block_u_statistics")
    ready = method.prepare(problem("even"), Target("torch", "float64", "cpu", 2**30))
    exact = truth("even")["effective_rank"]
    off = [method.estimate(ready, "effective_rank", 2, seed).value / exact - 1 for seed in range(300)]
    assert abs(np.mean(off)) < 0.01

    rng = np.random.default_rng(0)
    J = rng.standard_normal((12, 32, 150)) + rng.standard_normal((1, 32, 150)) / 2
    theta = np.einsum("bop,cqp->bocq", J, J)
    exact = np.einsum("bobo", theta) ** 2 / (theta**2).sum()
    corrected, plain = [], []
    for _ in range(1500):
        w = np.einsum("bko,bop->bkp", rng.choice([-1.0, 1.0], size=(12, 2, 32)), J)
        sums = PairSums(12, 2, 1)
        sums.add(0, 0, [np.einsum("bkp,clp->bkcl", w, w) ** 2])
        found = sums.moments((w**2).sum(2))
        corrected.append(accumulators.delta_method("effective_rank", ("trace", "square"), found).value)
        plain.append(found.means[0] ** 2 / found.means[1])
    assert np.mean(plain) / exact - 1 > 0.015
    assert abs(np.mean(corrected) / exact - 1) < 0.01


@pytest.mark.parametrize("steps", [(4, 4, 8), (16,), (5, 11)])
def test_samples_are_taken_exactly_in_a_budget_that_comes_in_parts(steps):
    method = methods.get(STRUCTURED)
    ready = method.prepare(problem("one outlier"), Target("torch", "float64", "cpu", 2**30))
    accumulator, ledger = method.begin(ready, ("norm",), 0)
    budget = 0
    for passes in steps:
        accumulator.extend(passes)
        budget += passes
        assert ledger()[0] <= budget + 1e-9
    assert "% of" in ledger()[1][0]
    assert accumulator.estimate("norm").value == pytest.approx(truth("one outlier")["norm"], rel=1e-3)


def test_uneven_samples_that_can_all_be_taken_exactly_are():
    estimate = found(STRUCTURED, "heavy-tailed", OUTPUTS + 1, 1)[0]
    for metric in METRICS:
        assert estimate[metric].value == pytest.approx(truth("heavy-tailed")[metric], rel=1e-9)
        assert estimate[metric].standard_error == 0
        assert estimate[metric].passes <= 2 * (OUTPUTS + 1)


def test_strata_are_exact_where_that_reduces_the_predicted_variance():
    shares = np.array([1.0, 100.0, 1.0, 50.0, *[1.0] * 16])
    choice = strata.choose(shares, 8, lambda k: 16, max_probes=16, max_exact=20)
    assert {1, 3} <= set(choice.exact.tolist()) and choice.uneven
    K = (8 * 20 - 16 * len(choice)) / (20 - len(choice))
    assert K >= 4
    assert choice.share == pytest.approx(shares[choice.exact].sum())
    assert len(strata.choose(np.ones(20), 8, lambda k: 16, max_probes=16, max_exact=20)) == 0
    assert len(strata.choose(shares, 1, lambda k: 16, max_probes=16, max_exact=20)) == 0
    assert len(strata.choose(shares, 8, lambda k: 16, max_probes=16, max_exact=1)) == 1
    assert len(strata.choose(shares, 17, lambda k: max(k, 16), max_probes=32, max_exact=20)) == 20


def test_terms_of_single_probes_count_as_effects():
    """Terms of single probes alone form a stratified mean, with its variance."""
    values = np.random.default_rng(0).standard_normal((1, 3, 6))
    sums = PairSums(3, 6, 1)
    sums.add_singles(values)
    found = sums.moments().plus([5.0])
    assert found.means == pytest.approx([5 + values.mean(2).sum()])
    assert found.single == pytest.approx(values[0].var(axis=1, ddof=1).sum() / 6)


def test_the_bias_of_second_order_is_that_of_the_hessian():
    """Of T^2 / S: T^2 / S (R_TT - 2 R_TS + R_SS) with the relative covariance R."""
    covariance = np.array([[0.3, 0.2], [0.2, 0.9]])
    estimates = MomentEstimates(np.array([3.0, 2.0]), covariance / 3, covariance * 2 / 3, np.zeros((2, 2)), 5)
    relative = covariance / np.outer([3, 2], [3, 2])
    expected = 9 / 2 * (relative[0, 0] - 2 * relative[0, 1] + relative[1, 1])
    assert estimates.second_order_bias(lambda m: m[0] ** 2 / m[1]) == pytest.approx(expected, rel=1e-4)
    corrected = accumulators.delta_method("effective_rank", ("trace", "square"), estimates)
    assert corrected.value == pytest.approx(9 / 2 - expected, rel=1e-4)


@pytest.mark.parametrize(
    ("metric", "value", "kept"),
    [("alignment", 1.2, 1.0), ("alignment", -0.3, 0.0), ("effective_rank", 0.5, 1.0), ("trace", -2.0, 0.0)],
)
def test_random_values_stay_in_the_range_of_the_metric(metric, value, kept):
    estimate = Estimate(value, 0.4, 8.0, "m", metric=metric)
    assert estimate.value == kept
    assert estimate.notes == (f"{metric} of {value:.4g} replaced by {kept:g}, the nearest possible value",)
    assert Estimate.from_json(estimate.to_json()) == estimate
    assert Estimate(value, None, 8.0, "m", metric=metric).value == value


@pytest.mark.parametrize(("metric", "value"), [("alignment", 0.9), ("alignment", 0.0), ("effective_rank", 1.1)])
def test_intervals_end_where_the_metric_does(metric, value):
    low, high = Estimate(value, 0.5, 8.0, "m", metric=metric, degrees=3).interval()
    assert (0 if metric == "alignment" else 1) <= low <= value <= high
    assert high <= 1 or metric != "alignment"
