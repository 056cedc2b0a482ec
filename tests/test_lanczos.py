"""Stochastic Lanczos quadrature on Jacobians with a prescribed spectrum."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from test_deflation import SPECTRA, Dense, jacobian, n

from ntkbench import problems, testing
from ntkbench.errors import BadInput
from ntkbench.estimators import lanczos
from ntkbench.operators import linearise
from ntkbench.options import Target


def entropy_rank(eigenvalues: np.ndarray) -> float:
    p = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
    return math.exp(-(p * np.log(p)).sum())


@pytest.mark.parametrize("name", SPECTRA)
def test_largest_eigenvalue_and_entropy_effective_rank(name):
    j = Dense(jacobian(name))
    density = lanczos.density(j, probes=40, steps=25)
    assert density.passes == j.passes <= 2 * 40 * 25
    assert density.weights.sum() == pytest.approx(1)
    largest = SPECTRA[name].max()
    assert 0.97 * largest < density.largest <= largest * (1 + 1e-12)
    assert density.trace == pytest.approx(SPECTRA[name].sum(), rel=0.2)
    assert density.entropy_effective_rank == pytest.approx(entropy_rank(SPECTRA[name]), rel=0.2)


def test_moments_are_unbiased():
    J = jacobian("1/i")
    densities = [lanczos.density(Dense(J), probes=2, steps=4, seed=seed) for seed in range(200)]
    for power in (1, 2, 3):
        moments = [n * (d.weights * d.nodes**power).sum() for d in densities]
        z = (np.mean(moments) - (SPECTRA["1/i"] ** power).sum()) / (np.std(moments, ddof=1) / math.sqrt(200))
        assert abs(z) < 4


def test_nodes_are_the_eigenvalues_after_a_step_for_each_distinct_one():
    eigenvalues = np.repeat([3.0, 1.0, 0.25, 0.0], 5)
    density = lanczos.density(Dense(jacobian(tuple(eigenvalues))), probes=3, steps=12)
    for nodes, weights in zip(density.nodes, density.weights, strict=True):
        for value in nodes[weights > 1e-10]:
            assert np.abs(value - eigenvalues).min() < 1e-9
    assert density.largest == pytest.approx(3)
    assert density.passes <= 2 * 3 * 12


def test_zero_probes_are_refused():
    with pytest.raises(BadInput, match="positive"):
        lanczos.density(Dense(jacobian("1/i")), probes=0)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_backends_agree_with_numpy_in_float32(backend):
    import jax.numpy as jnp
    import torch

    library = {"torch": torch.from_numpy, "jax": jnp.asarray}[backend]
    J = jacobian("1/i").astype("float32")
    here, there = (lanczos.density(Dense(matrix), probes=2, steps=8) for matrix in (J, library(J)))
    assert there.largest == pytest.approx(here.largest, rel=1e-5)
    assert there.entropy_effective_rank == pytest.approx(here.entropy_effective_rank, rel=1e-4)


@functools.cache
def exact_eigenvalues(label: str) -> np.ndarray:
    """Those of Theta from the explicit Jacobian, in ascending order."""
    J = testing.explicit_jacobian(problems.load(label))
    return np.linalg.eigvalsh(J @ J.T)


@pytest.mark.parametrize("passes", [40, 400])
@pytest.mark.parametrize("seed", range(4))
def test_eigenvalues_by_products_in_float32_are_within_their_errors(seed, passes):
    """Once residuals are down to rounding, they alone are smaller than the error."""
    values = exact_eigenvalues("transformer_tiny")
    exact = values[::-1][:5]
    j = linearise(problems.load("transformer_tiny"), "theta_0", Target("torch", "float32", memory=2**30))
    found = lanczos.ritz_pairs(j, 5, rtol=1e-9, passes=passes, seed=seed)
    errors = found.errors + found.rounding
    if seed == 0:
        np.testing.assert_array_equal(lanczos.largest(j, 5, rtol=1e-9, passes=passes, seed=seed).errors, errors)
    # A residual bounds the distance to the nearest eigenvalue, an error that to the one of the same index.
    nearest = np.sort(abs(found.values[:, None] - values), axis=1)[:, 0]
    assert (nearest <= found.residuals + found.rounding).all() and (abs(found.values - exact) <= errors).all()
    known = lanczos.rounding(j) * float(values.sum())  # the trace
    assert known / 2 < found.rounding < 2 * known, "of the whole trace, whatever the Krylov space holds of it"
