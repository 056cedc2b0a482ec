"""Stopping at a tolerance: coverage of the intervals, number of looks at the error, and cost."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import mostly_slow
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import chdtri

import ntkbench
from ntkbench import methods
from ntkbench.estimators.accumulators import ProbeMeans, StratifiedTrace
from ntkbench.methods.base import ExactIsCheaper, Incremental, Stopping, stochastic
from ntkbench.options import Target

RTOL, SEEDS = 0.1, 1000


class Drawn(Incremental):
    """The mean of values of a known law around 1, as a method; counts its looks."""

    title, source, backends, metrics, first_batch = "drawn", "", ("torch",), ("trace",), 4

    def __init__(self, law, deviation: float, strata: int) -> None:
        self.law, self.deviation, self.strata, self.looks = law, deviation, strata, 0

    def passes_per_probe(self, metric):
        return 1

    def begin(self, prepared, names, seed):
        rng, spent = np.random.default_rng(seed), []

        def draw(k):
            spent.append(k)
            values = 1 / self.strata + self.deviation / math.sqrt(self.strata) * self.law(rng, (k, self.strata))
            return values if self.strata > 1 else [values[:, 0]]

        def ledger():
            self.looks += 1
            return float(sum(spent)), (), None

        if self.strata > 1:
            return StratifiedTrace(draw, lambda k: [k]), ledger
        return ProbeMeans(("trace",), draw, lambda k: [k]), ledger


LAWS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "chi-squared": lambda rng, shape: (rng.chisquare(1, shape) - 1) / math.sqrt(2),
}


def stopped(law: str, needed: float, strata: int = 1, passes: int = 10**5):
    """Estimates to a tolerance that takes ``needed`` probes on average, and the method."""
    return _stopped(law, needed, strata, passes)


@functools.cache
def _stopped(law: str, needed: float, strata: int, passes: int):
    method = Drawn(LAWS[law], math.log1p(RTOL) * math.sqrt(needed) / 1.96, strata)
    found = [method.estimates(None, ("trace",), passes, seed, RTOL)["trace"] for seed in range(SEEDS)]
    return found, method


@pytest.mark.parametrize(("needed", "strata"), mostly_slow([(10, 1), (10, 12), (100, 1), (4, 2), (40, 12)], 2))
@pytest.mark.parametrize(("law", "least"), [("normal", 0.93), ("chi-squared", 0.90)])
def test_intervals_keep_their_coverage_where_drawing_stops_at_a_tolerance(law, least, needed, strata):
    """Chi-squared probes, as those of a kernel of rank one, are skewed: 64 of them cover 92.5 % without stopping."""
    found, method = stopped(law, needed, strata)
    assert all(e.relative_width() <= RTOL and (not e.notes or e.degrees < 60) for e in found)
    assert least <= np.mean([e.covers(1.0, "float64") for e in found]) <= 0.98
    assert np.mean([abs(e.value - 1) <= RTOL for e in found]) >= 0.95
    assert method.looks <= 8 * SEEDS


def test_a_run_that_is_given_up_for_exact_values_gives_no_estimate():
    """Its error was not what ended it, even if it is within the tolerance by chance."""
    for seed in range(20):
        with pytest.raises(ExactIsCheaper) as stopped:
            Drawn(LAWS["normal"], 0.05, 1).estimates(None, ("trace",), 1000, seed, RTOL, stopping=Stopping(20, 20))
        assert stopped.value.passes == 4


def test_probes_are_drawn_in_few_different_numbers():
    """A network is traced again for each of them."""
    drawn: set[int] = set()
    for seed in range(200):
        method = Drawn(LAWS["normal"], math.log1p(RTOL) * math.sqrt(60) / 1.96, 1)
        begin = method.begin

        def noted(*arguments, begin=begin):
            accumulator, ledger = begin(*arguments)
            extend = accumulator.extend
            accumulator.extend = lambda probes: (drawn.add(probes), extend(probes))
            return accumulator, ledger

        method.begin = noted
        method.estimates(None, ("trace",), 10**5, seed, RTOL)
    assert len(drawn) < 25 and all(probes % 4 == 0 for probes in drawn)


@given(st.integers(1, 10**6), st.sampled_from([1, 2, 4, 16, 40]))
def test_probes_are_rounded_up_by_a_quarter_at_most(probes, first):
    rounded = stochastic._rounded(probes, first)
    assert probes <= rounded < probes + max(4, probes / 4)


@given(st.floats(1, 50), st.floats(1.01, 2), st.floats(1, 10**4), st.floats(0.5, 10**5))
def test_the_first_step_that_is_enough_is_found_without_trying_all(start, ratio, most, least):
    tried: list[float] = []

    def enough(factor):
        tried.append(factor)
        return factor >= least

    expected = start
    while expected < most and expected < least:
        expected *= ratio
    found = stochastic._first(start, ratio, most, enough)
    assert found == pytest.approx(expected, rel=1e-6) or found == pytest.approx(expected * ratio, rel=1e-6)
    assert found >= min(least, most) * (1 - 1e-9) and len(tried) <= 11


@pytest.mark.parametrize(("passes", "turns"), [(39, False), (1000, True)])
def test_a_run_is_given_up_where_it_would_take_half_of_the_exact_values_passes(passes, turns):
    """About 100 probes are needed. There is no point in giving up if the budget does not allow exact values."""
    deviation, given_up = math.log1p(RTOL) * math.sqrt(100) / 1.96, 0
    for seed in range(50):
        method = Drawn(LAWS["normal"], deviation, 1)
        try:
            method.estimates(None, ("trace",), passes, seed, RTOL, stopping=Stopping(40, 40))
        except ExactIsCheaper:
            given_up += 1
    assert given_up > 40 if turns else given_up == 0
    kept = 0
    for seed in range(50):
        found = Drawn(LAWS["normal"], deviation, 1).estimates(
            None, ("trace",), 10**4, seed, RTOL, stopping=Stopping(4000, 4000)
        )
        kept += found["trace"].relative_width() <= RTOL
    assert kept == 50


@pytest.mark.parametrize(("N", "least", "of_groups"), [(1, 91, 91), (4, 24, 24), (45, 3, 5), (1000, 2, 5)])
def test_few_samples_need_many_probes_to_decide(N, least, of_groups):
    """Each sample, or each group of samples, has the degrees of freedom of its own probes."""
    problem = ntkbench.from_module(torch.nn.Linear(2, 3), torch.zeros(N, 2))
    for name in ("structured_block_u_statistics", "per_sample_trace", "block_u_statistics", "group_u_statistics"):
        fewest = max(methods.get(name).first_batch, methods.get(name).fewest_probes)
        assert methods.get(name).probes_to_decide(problem, "trace") == max(least, fewest)
        expected = of_groups if name == "group_u_statistics" else least
        assert methods.get(name).probes_to_decide(problem, "norm") == max(expected, fewest)
    assert methods.get("one_sided_reverse").probes_to_decide(problem, "trace") == 16


@pytest.mark.parametrize("name", ["structured_block_u_statistics", "per_sample_trace", "block_u_statistics"])
def test_the_first_check_decides_on_a_wide_tolerance(name):
    """A look after fewer probes has too few degrees of freedom; for narrow tolerances it only tells what they cost."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(5, 30), torch.nn.Tanh(), torch.nn.Linear(30, 60)), torch.randn(4, 5)
    wide = ntkbench.trace(model, x, method=name, rtol=0.3)
    assert wide.passes == 24 and wide.degrees > 30 and wide.relative_width() < 0.3
    problem = ntkbench.from_module(model, x)
    prepared = methods.get(name).prepare(problem, Target())
    assert methods.get(name)._first_check(prepared, ("trace",), 0.01) == methods.get(name).first_batch


def test_a_run_that_stops_after_few_probes_states_the_upper_limit_of_its_error():
    """It stops there because its error looks small, so the error itself covers far less often than stated."""
    found, _ = stopped("normal", 0.015)
    early = [each for each in found if each.passes == 4]
    assert 0.3 * SEEDS < len(early) < 0.9 * SEEDS
    assert all("upper 90% limit" in each.notes[-1] for each in early)
    widened = math.sqrt(chdtri(3, 0.9) / 3)
    bare = [replace(each, standard_error=each.standard_error * widened) for each in early]
    covered, without = (np.mean([each.covers(1.0, "float64") for each in some]) for some in (early, bare))
    assert covered > 0.93 and covered > without
    assert all(each.relative_width() < RTOL for each in early)
    late, _ = stopped("normal", 100)
    assert not any(each.notes for each in late)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("needed", [100, 400])
def test_passes_are_about_those_of_a_fixed_budget(law, needed):
    """The error is that of a fixed budget of as many passes, which exceed those needed by at most half."""
    found, method = stopped(law, needed)
    passes = np.mean([e.passes for e in found])
    assert passes <= 1.5 * needed
    square = np.mean([(e.value - 1) ** 2 for e in found])
    assert passes * square <= 1.3 * method.deviation**2


def test_a_tolerance_that_is_not_reached_spends_all_passes_and_says_so():
    found, _ = stopped("normal", 1000, passes=100)
    assert {e.passes for e in found} == {100.0}
    assert all("100 passes did not reach rtol=0.1" in e.notes[0] for e in found)


def test_values_that_do_not_differ_are_looked_at_once():
    method = Drawn(lambda rng, shape: np.zeros(shape), 1.0, 1)
    (found,) = method.estimates(None, ("trace",), 1000, 0, RTOL).values()
    assert (found.value, found.passes, method.looks) == (1.0, 4.0, 1)
