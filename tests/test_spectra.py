"""Estimators on the test spectra at their full size, n = 1000, through Jacobians made of fast orthogonal transforms."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import scipy.fft
from test_deflation import Probes

from ntkbench import methods
from ntkbench.operators import dense
from ntkbench.studies.estimators_on_spectra import SPECTRA

N = 1000
SEEDS = 400
METHODS = ("one_sided_reverse", "hutchpp_one_sided", "hutchpp_adaptive", "xtrace", "xnystrace")
FLAT_AND_STEEP = ("linear", "0.7^i")


class Transforms(dense.DenseJacobian):
    """J = D C^T S C D' with the cosine transform C and random signs on the diagonals of D and D', never written out."""

    def __init__(self, eigenvalues: np.ndarray) -> None:
        n = len(eigenvalues)
        unwritten = np.broadcast_to(0.0, (n, n))
        super().__init__(unwritten, functools.partial(Probes, like=np.zeros(1)))
        # Not a seed of probes: a first probe equal to D's signs would be an eigenvector.
        self._left, self._right = np.random.default_rng(2**20).choice([-1.0, 1.0], (2, n))
        self._values = np.sqrt(eigenvalues)

    def _through(self, rows: np.ndarray) -> np.ndarray:
        return scipy.fft.idct(self._values * scipy.fft.dct(rows, norm="ortho"), norm="ortho")

    def _vjp(self, u: np.ndarray) -> np.ndarray:
        return self._right * self._through(self._left * u)

    def _jvp(self, w: np.ndarray) -> np.ndarray:
        return self._left * self._through(self._right * w)

    def jacobians(self, metric: str) -> list[Transforms]:
        """The operator is its own prepared problem."""
        return [self.fresh()]


def estimates(name: str, spectrum: str, passes: int, seeds: int) -> np.ndarray:
    j, method = Transforms(SPECTRA[spectrum](np.arange(1, N + 1))), methods.get(name)
    found = [method.estimate(j, "trace", passes, seed) for seed in range(seeds)]
    assert all(estimate.passes <= passes for estimate in found)
    return np.array([(estimate.value, estimate.standard_error) for estimate in found])


@pytest.mark.parametrize("spectrum", FLAT_AND_STEEP)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_traces_are_unbiased(name, spectrum):
    values = estimates(name, spectrum, 24, SEEDS)[:, 0]
    exact = SPECTRA[spectrum](np.arange(1, N + 1)).sum()
    assert abs(values.mean() - exact) < 4 * values.std(ddof=1) / math.sqrt(SEEDS)


@pytest.mark.parametrize("spectrum", FLAT_AND_STEEP)
def test_one_sided_variance_is_that_of_the_formula(spectrum):
    """2 (||Theta||_F^2 - sum of its squared diagonal) / k, which the standard errors estimate."""
    j = Transforms(SPECTRA[spectrum](np.arange(1, N + 1)))
    theta = j.ntk(j.basis(0, N))
    formula = 2 * ((theta**2).sum() - (theta.diagonal() ** 2).sum()) / 24
    values, errors = estimates("one_sided_reverse", spectrum, 24, 2 * SEEDS).T
    assert values.var(ddof=1) == pytest.approx(formula, rel=0.15)
    assert (errors**2).mean() == pytest.approx(formula, rel=0.15)
