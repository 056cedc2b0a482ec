"""The moments of Theta against dense NumPy, by every way of computing them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from conftest import metrics_of
from hypothesis import given
from hypothesis import strategies as st

from ntkbench import metrics
from ntkbench.errors import BadInput
from ntkbench.estimators.rows import moments_from_rows
from ntkbench.metrics import METRICS, Moments
from ntkbench.operators import linearise
from ntkbench.options import Target


@pytest.fixture(scope="module")
def truth(dense):
    """J at both ends of the tiny problem, and its metrics."""
    J, J_f = dense("tanh_net", "theta_0"), dense("tanh_net", "theta_f")
    return J, J_f, metrics_of(J @ J.T, J_f @ J_f.T)


def put(backend: str, array: np.ndarray):
    if backend == "torch":
        import torch

        return torch.from_numpy(array)
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    return jnp.asarray(array)


def test_metrics_follow_from_the_moments_by_definition():
    moments = Moments(trace=6.0, square=4.0, square_f=9.0, cross=3.0)
    assert [moments.metric(metric) for metric in METRICS] == [6.0, 2.0, 9.0, 0.5]


def test_metrics_of_missing_moments_are_nan():
    assert all(math.isnan(Moments().metric(metric)) for metric in METRICS)


@pytest.mark.xfail(strict=True, reason="float division by zero where the network does not depend on its parameters")
def test_ratios_of_a_vanishing_theta_are_nan():
    zero = Moments(0.0, 0.0, 0.0, 0.0)
    assert zero.metric("trace") == zero.metric("norm") == 0
    assert math.isnan(zero.metric("effective_rank"))
    assert math.isnan(zero.metric("alignment"))


def turned(angle: float, factor: float, n: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Two symmetric matrices at an angle, the second one times a factor."""
    rng = np.random.default_rng(n)
    one, other = ((m + m.T) / 2 for m in rng.standard_normal((2, n, n)))
    one /= np.linalg.norm(one)
    other -= (one * other).sum() * one
    return one, factor * (math.cos(angle) * one + math.sin(angle) * other / np.linalg.norm(other))


@given(
    angle=st.floats(-7, 0).map(lambda x: 10**x),
    factor=st.sampled_from([1.0, 1.001, 0.9, 1.3, 1e3, 1e-3]),
    backend=st.sampled_from(["torch", "jax"]),
)
@pytest.mark.slow
def test_the_complement_of_an_alignment_is_as_precise_as_the_difference(angle, factor, backend):
    """cos is flat at 0, so the alignment cannot tell angles below 1e-8 apart. A factor costs only its own digits."""
    theta, theta_f = (put(backend, m) for m in turned(angle, factor))
    exact = 2 * math.sin(angle / 2) ** 2
    parts = [slice(0, 2), slice(2, 6)]
    blocks = [
        (a == b, [m[parts[a], parts[b]] for m in (theta, theta_f)]) for a, b in itertools.product(range(2), repeat=2)
    ]
    rows = [(range(6)[part], [m[part] for m in (theta, theta_f)]) for part in parts]
    for moments in (
        metrics.from_gram(theta, theta_f),
        metrics.from_rows_of_theta(rows),
        metrics.from_blocks_of_theta([blocks[i] for i in (0, 2, 3)], tile=1),
    ):
        assert moments.complement == pytest.approx(exact, rel=1e-7, abs=1e-15 * min((factor - 1) ** 2, 1))
        assert moments.metric("alignment") == pytest.approx(math.cos(angle), abs=1e-15)
        assert moments.times(3).complement == pytest.approx(moments.complement, rel=1e-12)


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.1])
def test_an_alignment_never_exceeds_one(factor):
    for seed in range(200):
        theta = np.random.default_rng(seed).standard_normal((7, 7)).astype(np.float32)
        assert metrics.from_gram(theta, np.float32(factor) * theta).metric("alignment") <= 1


def test_without_the_difference_there_is_no_complement():
    assert math.isnan(Moments(square=1.0, square_f=1.0, cross=0.5).complement)
    assert Moments(square=4.0, square_f=1.0, cross=0.5, difference=4.0, difference_cross=-3.5).complement == 0.75


def test_unknown_metrics_are_refused():
    with pytest.raises(
        BadInput, match=r"unknown metric 'allignment' \(did you mean 'alignment'\?\); allowed: alignment"
    ):
        Moments().metric("allignment")
    with pytest.raises(BadInput, match="unknown metric"):
        metrics.check("rank")


def test_only_alignment_uses_trained_weights():
    assert {metric: metrics.parameter_sets(metric) for metric in METRICS} == {
        "trace": ("theta_0",),
        "norm": ("theta_0",),
        "effective_rank": ("theta_0",),
        "alignment": ("theta_0", "theta_f"),
    }
    assert set(metrics.SYMBOLS) == {*METRICS, *metrics.OF_KERNEL}


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_from_gram(backend, truth):
    J, J_f, values = truth
    both = metrics.from_gram(put(backend, J @ J.T), put(backend, J_f @ J_f.T))
    one = metrics.from_gram(put(backend, J @ J.T))
    for metric in METRICS:
        assert both.metric(metric) == pytest.approx(values[metric], rel=1e-12)
    for metric in METRICS[:-1]:
        assert one.metric(metric) == pytest.approx(values[metric], rel=1e-12)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_from_rows_of_theta_in_any_order_and_blocks(backend, truth):
    J, J_f, values = truth
    numbers = np.random.default_rng(0).permutation(len(J))
    blocks = [
        (part, [put(backend, (A @ A.T)[part]) for A in (J, J_f)]) for part in (numbers[:1], numbers[1:4], numbers[4:])
    ]
    moments = metrics.from_rows_of_theta(iter(blocks))
    for metric in METRICS:
        assert moments.metric(metric) == pytest.approx(values[metric], rel=1e-12)


@given(
    n=st.integers(1, 12),
    cuts=st.sets(st.integers(1, 11)),
    tile=st.integers(1, 14),
    networks=st.sampled_from([1, 2]),
)
def test_from_blocks_on_and_below_the_diagonal(n, cuts, tile, networks):
    """Tiles smaller and larger than the blocks; entries above the diagonal are not read."""
    rng = np.random.default_rng(n)
    thetas = [A @ A.T for A in rng.standard_normal((networks, n, n + 2))]
    expected = metrics_of(*thetas)
    spoiled = [theta + np.triu(np.full((n, n), 1e6), 1) for theta in thetas]
    bounds = [0, *sorted(cut for cut in cuts if cut < n), n]
    parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
    blocks = (
        (rows == columns, [put("torch", theta[rows, columns]) for theta in spoiled])
        for rows, columns in itertools.product(parts, parts)
        if columns.start <= rows.start
    )
    moments = metrics.from_blocks_of_theta(blocks, tile=tile)
    for metric, value in expected.items():
        assert moments.metric(metric) == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize(
    "more", [{}, {"squared_trace": 35.0}, {"difference": 0.5, "difference_cross": 0.3}], ids=["plain", "ranks", "close"]
)
@pytest.mark.parametrize("metric", METRICS)
def test_gradients_are_the_derivatives_of_the_metrics(metric, more):
    """Central differences in every moment, including those that the metric does not depend on."""
    moments = {"trace": 6.0, "square": 4.0, "square_f": 9.0, "cross": 3.0} | more
    gradient = Moments(**moments).gradient(metric)
    for name, value in moments.items():
        above, below = (Moments(**moments | {name: value + step}).metric(metric) for step in (1e-5, -1e-5))
        assert getattr(gradient, name) == pytest.approx((above - below) / 2e-5, abs=1e-8)


@given(cuts=st.sets(st.integers(1, 5)), memory=st.sampled_from([1, 2**30]), metric=st.sampled_from(METRICS))
def test_from_rows_of_jacobian_in_any_blocks_kept_or_not(tiny, truth, cuts, memory, metric):
    *_, values = truth
    bounds = [0, *sorted(cuts), 6]
    blocks = list(itertools.pairwise(bounds))
    target = Target(dtype="float64", device="cpu", memory=memory)
    jacobians = [linearise(tiny, end, target) for end in metrics.parameter_sets(metric)]
    asked = []

    def rows(jacobian, block):
        asked.append(block)
        return jacobian.vjp(jacobian.basis(*block))

    moments = moments_from_rows(metric, jacobians, blocks, rows)
    assert moments.metric(metric) == pytest.approx(values[metric], rel=1e-12)
    # Kept blocks are computed once; otherwise once more for every block below. The trace needs no pairs.
    once = memory > 1 or metric == "trace"
    times = len(blocks) if once else len(blocks) * (len(blocks) + 1) // 2
    assert len(asked) == times * len(jacobians)
    assert sum(j.passes for j in jacobians) == sum(stop - start for start, stop in asked)


def test_whether_rows_are_kept_depends_on_their_number(tiny, truth):
    """A kernel of fewer rows than J, such as the pNTK, is kept where J would not fit."""
    j = linearise(tiny, "theta_0", Target(dtype="float64", device="cpu", memory=4 * tiny.P * 8))
    for count, times in ((2, 2), (None, 3)):
        asked = []
        moments_from_rows(
            "norm", [j], [(0, 1), (1, 2)], lambda j, b, asked=asked: asked.append(b) or j.vjp(j.basis(*b)), count
        )
        assert len(asked) == times


def test_squared_norm_keeps_float32_digits():
    import torch

    block = torch.rand(1000, 4000, generator=torch.Generator().manual_seed(0))
    exact = float((block.double() ** 2).sum())
    assert float(metrics.squared_norm(block)) == pytest.approx(exact, rel=1e-6)
