"""Standard errors and degrees of freedom against exact formulas, complete enumeration and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as extra
from scipy import stats

from ntkbench.errors import Undefined
from ntkbench.estimate import Estimate
from ntkbench.estimators import accumulators, standard_errors
from ntkbench.metrics import Moments
from ntkbench.operators import arrays

SAMPLES = extra.arrays(np.float64, st.integers(2, 30), elements=st.floats(-1e3, 1e3))


@given(samples=SAMPLES)
def test_mean_and_its_standard_error(samples):
    value, error, _ = standard_errors.mean(samples)
    k = len(samples)
    assert value == pytest.approx(sum(samples) / k, abs=1e-9)
    assert error == pytest.approx(math.sqrt(sum((s - value) ** 2 for s in samples) / (k - 1) / k), abs=1e-9)


@given(samples=SAMPLES)
def test_jackknife_of_a_mean_is_its_standard_error(samples):
    value, error, _ = standard_errors.jackknife(lambda mean: mean, samples)
    assert (value, error, len(samples) - 1) == pytest.approx(standard_errors.mean(samples), abs=1e-9)


def test_jackknife_of_a_ratio_leaves_each_probe_out():
    a, b = np.random.default_rng(0).uniform(1, 2, (2, 9))
    value, error, _ = standard_errors.jackknife(lambda x, y: x / y, a, b)
    without = np.array([np.delete(a, i).mean() / np.delete(b, i).mean() for i in range(9)])
    assert value == pytest.approx(a.mean() / b.mean(), rel=1e-14)
    assert error == pytest.approx(math.sqrt(8 * without.var()), rel=1e-12)


def test_jackknife_of_a_square_root_is_the_delta_method_for_many_probes():
    samples = np.random.default_rng(0).uniform(1, 2, 20_000)
    _, error, _ = standard_errors.jackknife(math.sqrt, samples)
    assert error == pytest.approx(standard_errors.mean(samples)[1] / (2 * math.sqrt(samples.mean())), rel=1e-3)


def test_a_jackknife_that_is_undefined_without_a_probe_has_an_unknown_error():
    """Without the one probe with a nonzero image, nothing shows that Theta is not zero."""

    def effective_rank(trace: float, square: float) -> float:
        return Moments(trace, square).metric("effective_rank")

    traces, squares = np.array([0.0, 4.0, 0.0]), np.array([0.0, 8.0, 0.0])
    value, error, degrees = standard_errors.jackknife(effective_rank, traces, squares)
    assert value == pytest.approx((4 / 3) ** 2 / (8 / 3)) and math.isnan(error) and degrees == 0
    with pytest.raises(Undefined):
        standard_errors.jackknife(effective_rank, 0 * traces, 0 * squares)


def test_one_probe_has_no_standard_error():
    one = np.array([3.0])
    for value, error, degrees in (standard_errors.mean(one), standard_errors.jackknife(lambda mean: mean, one)):
        assert value == 3.0
        assert math.isnan(error)
        assert degrees == 0


def test_equal_probes_have_no_error():
    assert standard_errors.mean(np.full(5, 0.1)) == pytest.approx((0.1, 0, 4))
    assert standard_errors.jackknife(lambda a, b: a / b, np.full(5, 0.1), np.full(5, 0.2)) == pytest.approx((0.5, 0, 4))


def test_gather_brings_blocks_of_any_backend_to_float64_on_the_host():
    import jax.numpy as jnp
    import torch

    blocks = [[1.5, 2.5], [3.5]]
    for make in (lambda b: torch.tensor(b, dtype=torch.float32), lambda b: jnp.asarray(b, "float32"), np.float32):
        column = arrays.gather(make(block) for block in blocks)
        assert column.dtype == np.float64
        np.testing.assert_array_equal(column, [1.5, 2.5, 3.5])


def test_degrees_of_freedom_of_a_variance_follow_from_its_scatter_over_samples():
    """A variance with d degrees of freedom has the relative variance 2 / d: normal, Laplace (excess 3), uniform."""
    draw, k = np.random.default_rng(0), 400
    for values, excess in (
        (draw.standard_normal((1000, k)), 0.0),
        (draw.laplace(size=(1000, k)), 3.0),
        (draw.uniform(size=(1000, k)), 0.0),  # lighter tails count as normal
    ):
        assert np.median(standard_errors.degrees_of_variance(values)) == pytest.approx(
            2 / (2 / (k - 1) + excess / k), rel=0.2
        )
    one = np.zeros(k)
    one[0] = 1.0
    assert standard_errors.degrees_of_variance(one) < 2.5
    assert standard_errors.degrees_of_variance(np.ones(k)) == pytest.approx(k - 1)
    assert standard_errors.degrees_of_variance(np.ones((2, 1))).tolist() == [1, 1]


def test_degrees_of_a_sum_of_equal_variances_add_up_and_a_single_variance_keeps_its_own():
    assert standard_errors.satterthwaite([2.0] * 5, 3) == pytest.approx(15)
    assert standard_errors.satterthwaite([2.0, 0.0, 0.0], 3) == pytest.approx(3)
    assert standard_errors.satterthwaite([1.0, 2.0], [4, 6]) == pytest.approx(9 / (1 / 4 + 4 / 6))
    assert standard_errors.satterthwaite([0.0, 0.0], 3) == math.inf
    assert standard_errors.satterthwaite([1.0, 1.0], [5, 0]) == pytest.approx(0, abs=1e-6)
    assert standard_errors.satterthwaite([1.0, 0.0], [5, 0]) == pytest.approx(5)
    assert standard_errors.satterthwaite([1.0, math.nan], [5, 0]) == 0
    assert standard_errors.satterthwaite([1.0, math.nan], [5, math.inf]) == 0
    assert standard_errors.satterthwaite([1.0, 0.0], [5, math.inf]) == pytest.approx(5)


def test_degrees_of_two_samples_are_those_of_welchs_test():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(7), 3 * rng.standard_normal(12)
    variances = [a.var(ddof=1) / 7, b.var(ddof=1) / 12]
    expected = stats.ttest_ind(a, b, equal_var=False).df
    assert standard_errors.satterthwaite(variances, [6, 11]) == pytest.approx(expected)


def test_a_stratified_mean_adds_the_variances_of_the_strata():
    table = np.random.default_rng(0).standard_normal((4, 6)) * np.arange(1, 7)
    value, error, degrees = standard_errors.stratified_mean(table)
    variances = table.var(axis=0, ddof=1)
    assert value == pytest.approx(table.sum(1).mean())
    assert error == pytest.approx(math.sqrt(variances.sum() / 4))
    assert degrees == pytest.approx(variances.sum() ** 2 / ((variances**2).sum() / 3))


def test_intervals_of_a_stratified_mean_cover_as_often_as_they_say():
    """Two strata of 6 probes have up to 10 degrees of freedom; normal quantiles would cover in 92 % of cases."""
    found = [standard_errors.stratified_mean(table) for table in np.random.default_rng(0).standard_normal((6000, 6, 2))]
    value, error, degrees = np.array(found).T
    assert 0.945 < (np.abs(value) <= stats.t.ppf(0.975, degrees) * error).mean() < 0.97
    assert degrees.min() >= 5
    assert degrees.max() <= 10


def all_outcomes(N: int, K: int, rng: np.random.Generator) -> tuple[list[standard_errors.MomentEstimates], np.ndarray]:
    """Estimates of a trace and two moments for every outcome of K probes, each of N independent fair bits."""
    kernels = rng.standard_normal((2, N, 2, N, 2))
    kernels = kernels + kernels.transpose(0, 3, 4, 1, 2)  # y_bc(x, x') = y_cb(x', x)
    trace = rng.standard_normal((N, 2))
    strata = np.arange(N)[:, None]
    found = []
    for bits in itertools.product((0, 1), repeat=N * K):
        x = np.array(bits).reshape(N, K)
        sums = standard_errors.PairSums(N, K, 2)
        sums.add(0, 0, [y[strata, x][:, :, strata, x] for y in kernels])
        found.append(sums.moments(trace[strata, x]))
    expected = [trace.mean(1).sum()]
    for y in kernels:
        off = sum(y[b, :, c].mean() for b in range(N) for c in range(N))
        expected.append(off)
    return found, np.array(expected)


@pytest.mark.parametrize(("N", "K"), [(1, 4), (1, 5), (2, 4), (3, 4)])
def test_moments_and_their_covariance_are_unbiased_exactly(N, K):
    """Over all outcomes, the mean of the estimates is the moment, and that of their covariance is their covariance."""
    found, expected = all_outcomes(N, K, np.random.default_rng(10 * N + K))
    means = np.array([each.means for each in found])
    assert means.mean(0) == pytest.approx(expected, rel=1e-10)
    estimated = np.mean([each.single + each.double for each in found], axis=0)
    np.testing.assert_allclose(estimated, np.cov(means.T, bias=True), rtol=1e-9, atol=1e-12)
    assert not any(each.bound.any() for each in found)


@pytest.mark.parametrize(("N", "K"), [(1, 2), (1, 3), (3, 2), (2, 3)])
def test_below_four_probes_the_variance_is_bounded_from_above(N, K):
    found, expected = all_outcomes(N, K, np.random.default_rng(10 * N + K))
    means = np.array([each.means for each in found])
    assert means.mean(0) == pytest.approx(expected, rel=1e-10)
    for moment in np.eye(3):
        variance = (means @ moment).var()
        assert np.mean([each.standard_error(moment) ** 2 for each in found]) >= (1 - 1e-12) * variance


@pytest.mark.parametrize(("N", "K", "pairs"), [(1, 2, 1), (1, 3, 3)])
def test_one_stratum_has_one_degree_of_freedom_less_than_pairs(N, K, pairs):
    """Two probes give one pair: an alignment from it is 1 or -1 whatever the kernels are, and its error is unknown."""
    found, _ = all_outcomes(N, K, np.random.default_rng(0))
    assert {each.degrees for each in found} == {pairs - 1}
    names = ("square", "square_f", "cross")
    y = np.random.default_rng(1).standard_normal((3, 1, K, 1, K))
    y = (y + y.transpose(0, 3, 4, 1, 2)) ** 2
    y[2] = np.sqrt(y[0] * y[1])
    sums = standard_errors.PairSums(1, K, 3)
    sums.add(0, 0, y)
    value, error, _ = accumulators.delta_method("alignment", names, sums.moments())
    assert math.isnan(error) == (K == 2) and (value == pytest.approx(1)) == (K == 2)


def alignment_of_blocks(blocks: np.ndarray, blocks_f: np.ndarray, K: int, rng: np.random.Generator) -> Estimate:
    """An alignment from K probes of each sample where Theta is block-diagonal: blocks ``[N, O, O]``."""
    N, outputs, _ = blocks.shape
    u = rng.choice([-1.0, 1.0], (N, K, outputs))
    m, m_f = (np.einsum("bko,bop,blp->bkl", u, each, u) for each in (blocks, blocks_f))
    sums = standard_errors.PairSums(N, K, 3)
    for b in range(N):
        sums.add(b, b, [y[b, None, :, None] for y in (m * m, m_f * m_f, m * m_f)])
    point = accumulators.delta_method("alignment", ("square", "square_f", "cross"), sums.moments())
    return Estimate(point.value, point.standard_error, None, "m", metric="alignment", degrees=point.degrees)


@pytest.mark.parametrize("N", [2, 4, 8])
def test_alignments_of_samples_that_share_no_gradients_are_covered_with_two_probes(N):
    """Only the pairs of probes of one sample count; with infinite degrees of freedom, half of the intervals missed."""
    rng = np.random.default_rng(N)
    J = rng.standard_normal((2, N, 3, 4))
    blocks, blocks_f = J @ J.swapaxes(2, 3)
    exact = (blocks * blocks_f).sum() / np.sqrt((blocks**2).sum() * (blocks_f**2).sum())
    found = [alignment_of_blocks(blocks, blocks_f, 2, rng) for _ in range(200)]
    assert all(each.degrees <= N - 1 for each in found)
    assert sum(each.covers(exact, "float64") for each in found) >= stats.binom.ppf(1e-3, 200, 0.9)


@pytest.mark.parametrize("K", [2, 3])
def test_a_single_sample_with_gradients_has_the_degrees_of_its_own_pairs(K):
    """Two probes of it form one pair, whose alignment is 1 or -1 whatever the kernels are."""
    rng, blocks = np.random.default_rng(0), np.zeros((2, 4, 3, 3))
    J = rng.standard_normal((2, 3, 4))
    blocks[:, 1] = J @ J.swapaxes(1, 2)
    for _ in range(20):
        found = alignment_of_blocks(*blocks, K, rng)
        assert found.degrees <= K * (K - 1) / 2 - 1
        assert math.isnan(found.standard_error) == (K == 2)


@pytest.mark.parametrize(("N", "K", "outputs"), [(3, 6, 2), (6, 5, 10), (12, 3, 4)])
def test_least_probes_for_the_norm_are_those_of_a_kernel_of_identity_blocks(N, K, outputs):
    """The first kernel has blocks I and needs as many as the formula says; the second has other blocks."""
    rng, off = np.random.default_rng(K), ~np.eye(N, dtype=bool)
    probes = rng.choice([-1.0, 1.0], (20_000, N, K, outputs))
    random = rng.standard_normal((outputs, outputs))
    for block, least, most in ((np.eye(outputs), 0.9, 1.03), (random @ random.T, 0.0, 0.9)):
        y = np.einsum("tbko,op,tclp->tbkcl", probes, block, probes, optimize=True) ** 2
        same = y[:, np.arange(N), :, np.arange(N)].sum(0)  # blocks b = c, [trials, K, K]
        between = y.mean((2, 4))[:, off].sum(1)
        found = between + (same.sum((1, 2)) - same.trace(axis1=1, axis2=2)) / (K * (K - 1))
        error = found.std() / (N**2 * (block**2).sum())
        assert least < standard_errors.PairSums.least_probes(N, outputs, error) / K < most


def additive(effects: np.ndarray) -> standard_errors.MomentEstimates:
    """Estimates where y_bc^kl = effects[b, k] + effects[c, l]: the variance is due to single probes alone."""
    N, K = effects.shape
    sums = standard_errors.PairSums(N, K, 1)
    sums.add(0, 0, [effects[:, :, None, None] + effects])
    return sums.moments()


@pytest.mark.parametrize("K", [4, 5])
def test_degrees_of_freedom_of_a_u_statistic_are_those_of_its_strata(K):
    N, pattern = 3, np.arange(K, dtype=float)
    assert additive(np.tile(pattern, (N, 1))).degrees == pytest.approx(N * (K - 1))
    one = np.zeros((N, K))
    one[1] = pattern
    assert additive(one).degrees == pytest.approx(K - 1)
    groups = [(K, additive(one)), (K, additive(np.tile(pattern, (N, 1))))]
    assert standard_errors.MomentEstimates.pooled(groups).degrees == pytest.approx((N + 1) * (K - 1))


def test_an_additive_kernel_has_the_variance_of_a_mean():
    """The estimate is 2 N sum_b mean_k a_b^k, so its variance is 4 N^2 sum_b s_b^2 / K, with no part due to pairs."""
    effects = np.random.default_rng(0).standard_normal((3, 6))
    found = additive(effects)
    assert found.means == pytest.approx([2 * 3 * effects.mean(1).sum()])
    assert found.single == pytest.approx(4 * 9 * effects.var(axis=1, ddof=1).sum() / 6)
    assert found.double == pytest.approx(0, abs=1e-12)


def test_groups_are_pooled_by_their_numbers_of_probes():
    def group(mean: float, variance: float, degrees: float) -> standard_errors.MomentEstimates:
        part = np.array([[variance]])
        return standard_errors.MomentEstimates(np.array([mean]), part, 2 * part, 3 * part, degrees)

    pooled = standard_errors.MomentEstimates.pooled([(3, group(1.0, 0.5, 2)), (1, group(5.0, 2.0, 4))])
    assert pooled.means == pytest.approx([2.0])
    variance = (9 * 0.5 + 1 * 2.0) / 16
    assert (pooled.single[0, 0], pooled.double[0, 0], pooled.bound[0, 0]) == pytest.approx(
        (variance, 2 * variance, 3 * variance)
    )
    assert pooled.degrees == 6


def test_variances_are_at_least_half_of_the_part_due_to_pairs():
    def error(single: float, double: float, bound: float) -> float:
        parts = (np.array([[part]]) for part in (single, double, bound))
        return standard_errors.MomentEstimates(np.zeros(1), *parts, 1).standard_error(np.array([2.0]))

    assert error(3.0, 1.0, 0.0) == pytest.approx(4.0)
    assert error(-0.75, 1.0, 0.0) == pytest.approx(math.sqrt(2.0))
    assert error(-3.0, 0.0, 0.0) == 0
    assert error(3.0, 1.0, 0.25) == pytest.approx(5.0)


def test_orthonormal_probes_have_no_error_once_they_are_a_basis():
    estimate = standard_errors.PointEstimate(3.0, 2.0, 5)
    assert standard_errors.finite_population(estimate, 3, 12) == pytest.approx((3.0, 2 * math.sqrt(0.75), 5))
    assert standard_errors.finite_population(estimate, 12, 12) == (3.0, 0.0, 5)
    alone = standard_errors.mean(np.array([3.0]))
    assert math.isnan(standard_errors.finite_population(alone, 1, 12).standard_error)
    assert standard_errors.finite_population(alone, 1, 1) == (3.0, 0.0, 0)


@pytest.mark.parametrize("groups", [1, 2, 20])
def test_a_heavy_stratum_is_found_however_many_groups_its_probes_are_in(groups):
    """The jackknife of a square exceeds its linear part by as much in one group as in many."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(groups):
        changes = np.zeros((1, 3, 40 // groups))
        changes[0, 0] = 0.5 * rng.standard_normal(40 // groups)
        none = np.zeros((1, 1))
        found = standard_errors.MomentEstimates(np.ones(1), none + 0.1, none, none, 5.0, (changes,))
        made.append((40 // groups, found))
    pooled = standard_errors.MomentEstimates.pooled(made)
    linear = pooled.standard_error(np.array([2.0]))
    assert pooled.standard_error(np.array([2.0]), lambda m: float(m[0] ** 3)) != pytest.approx(linear, rel=1e-6)
