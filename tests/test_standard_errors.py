"""Standard errors against the formulas they stand for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as extra

from ntkbench.estimators import standard_errors
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


def test_one_probe_says_nothing_about_its_error():
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
