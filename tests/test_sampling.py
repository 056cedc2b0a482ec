"""Samples of fixed size with unequal probabilities, against an enumeration of all samples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ntkbench.estimators import sampling

SIZES = np.random.default_rng(0).lognormal(0, 1.5, 9)


def enumerated(design: sampling.Design) -> tuple[np.ndarray, np.ndarray, dict[tuple[int, ...], float]]:
    """Inclusion probabilities of units and pairs, and the probability of each sample, by their definition."""
    p = design.probabilities
    samples = {}
    for chosen in itertools.combinations(range(len(p)), design.size):
        there = np.isin(np.arange(len(p)), chosen)
        samples[chosen] = float(np.where(there, p, 1 - p).prod())
    total = sum(samples.values())
    single, pair = np.zeros(len(p)), np.zeros((len(p), len(p)))
    for chosen, weight in samples.items():
        single[list(chosen)] += weight / total
        pair[np.ix_(chosen, chosen)] += weight / total
    return single, pair, {chosen: weight / total for chosen, weight in samples.items()}


@pytest.mark.parametrize("size", [4, 5, 6, 7])
def test_inclusion_probabilities_are_those_of_all_samples(size):
    design = sampling.design(SIZES, size, 4)
    single, pair, _ = enumerated(design)
    drawn = design.draw(np.random.default_rng(1))
    found, found_pair = design.inclusion(drawn)
    off = ~np.eye(len(drawn), dtype=bool)
    np.testing.assert_allclose(found, single[drawn], rtol=1e-12)
    np.testing.assert_allclose(found_pair[off], pair[np.ix_(drawn, drawn)][off], rtol=1e-12)
    np.testing.assert_allclose(single, design.probabilities, atol=0.12)


def test_samples_are_drawn_with_their_probabilities():
    design, rng = sampling.design(SIZES, 5, 4), np.random.default_rng(2)
    *_, samples = enumerated(design)
    drawn = [tuple(design.draw(rng)) for _ in range(4000)]
    for chosen, probability in samples.items():
        assert abs(drawn.count(chosen) / 4000 - probability) < 5 * (probability / 4000) ** 0.5 + 1e-3


@pytest.mark.parametrize(("N", "size"), [(96, 30), (300, 290)])
def test_inclusion_probabilities_of_many_units_add_up(N, size):
    """sum_b pi_b = s, and sum_(c != b) pi_bc = (s - 1) pi_b, also where probabilities are close to 1."""
    design = sampling.design(np.random.default_rng(3).lognormal(0, 1, N), size, 8)
    single, pair = design.inclusion(np.arange(len(design.others)))
    np.fill_diagonal(pair, 0.0)
    assert single.sum() == pytest.approx(design.size, rel=1e-12)
    np.testing.assert_allclose(pair.sum(1), (design.size - 1) * single, rtol=1e-10)


def test_large_units_and_all_of_a_complete_sample_are_certain():
    design = sampling.design(np.array([100.0, 1, 1, 1, 50, 1, 1, 1, 1, 1]), 6, 4)
    assert design.certain.tolist() == [0, 4] and design.size == 4
    assert not np.isin(design.certain, design.others).any()
    assert design.probabilities.sum() == pytest.approx(4)
    even = sampling.design(np.ones(10), 6, 4)
    np.testing.assert_allclose(even.probabilities, 0.6)
    single, pair = even.inclusion(np.arange(6))
    np.testing.assert_allclose(single, 0.6)
    np.testing.assert_allclose(pair[~np.eye(6, dtype=bool)], 6 * 5 / (10 * 9))
    whole = sampling.design(SIZES, 9, 4)
    assert len(whole.certain) + whole.size == 9
    np.testing.assert_allclose(whole.inclusion(whole.draw(np.random.default_rng(0)))[0], 1)


@pytest.mark.parametrize("sizes", [np.zeros(6), np.array([1.0, 0, 0, 0, 0, 0])])
def test_units_without_a_size_are_drawn_as_well(sizes):
    design = sampling.design(sizes, 5, 4)
    assert len(design.certain) + len(design.draw(np.random.default_rng(0))) == 5


@pytest.mark.parametrize(("N", "size"), [(1000, 999), (1000, 990), (2000, 1990), (2000, 8)])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
def test_any_number_of_units_is_drawn_in_few_attempts(N, size, spread):
    """The size is the most likely one, even where nearly all units are drawn."""
    design, rng = sampling.design(np.exp(spread * np.random.default_rng(0).standard_normal(N)), size, 8), Counted()
    assert len(np.unique(design.draw(rng))) == design.size and rng.draws < 2000
    assert design.probabilities.sum() == pytest.approx(design.size, rel=1e-9)


class Counted:
    """Uniform numbers that count how often they are drawn."""

    def __init__(self) -> None:
        self.draws, self._rng = 0, np.random.default_rng(1)

    def random(self, size: int) -> np.ndarray:
        self.draws += 1
        return self._rng.random(size)
