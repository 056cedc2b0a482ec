"""Budgets at a given error: fitted laws against known ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.special import ndtr

from ntkbench.measure import laws

BUDGETS = (8, 16, 32, 64, 128, 256, 512)
GOAL = 0.01


def measured(rng: np.random.Generator, seeds: int, scale=0.1, power=0.5, budgets=BUDGETS, cost=1e-3) -> pd.DataFrame:
    """A table of a method whose median error is ``scale / passes^power``, and whose seconds are linear in passes."""
    rows = []
    for passes in budgets:
        errors = np.abs(rng.standard_normal(seeds)) / 0.67449 * scale / passes**power
        times = cost * (5 + passes) * np.exp(0.05 * rng.standard_normal(seeds))
        row = {"passes": passes, "seeds": seeds, "calls": seeds, "first_seed": passes * seeds}
        for name, values in (("error", errors), ("seconds", times)):
            row |= dict(zip((f"{name}_q25", name, f"{name}_q75"), np.quantile(values, (0.25, 0.5, 0.75)), strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def test_a_law_without_noise_is_found_exactly():
    rng = np.random.default_rng(0)
    table = measured(rng, 5)
    table = table.assign(error=0.3 / table["passes"], seconds=1e-3 * table["passes"])
    law = laws.fit(table)
    assert law.budgets(0.01)[0] == pytest.approx(30)
    assert law.seconds(law.budgets(0.01))[0] == pytest.approx(0.03)
    assert law.error(30)[0] == pytest.approx(0.01)
    assert law.budgets(1.0)[0] == pytest.approx(8), "no smaller budget was measured"
    assert np.isnan(law.budgets(1e-4)[0]) and np.isnan(law.reached(1e-4)[3]), "no larger budget was measured"


@pytest.fixture
def values_alone(monkeypatch):
    """A bootstrap of two reruns, for tests that look at no band; it does not change the values."""
    monkeypatch.setattr(laws, "RERUNS", 2)


@pytest.mark.slow
@pytest.mark.parametrize(("power", "scale"), [(0.5, 0.1), (1.5, 8.0)])
def test_bands_cover_the_true_budget(power, scale):
    """In 95 % of all tables, and in at least 90 % of 200 tables."""
    rng, truth = np.random.default_rng(0), (scale / GOAL) ** (1 / power)
    found = [laws.fit(measured(rng, 20, scale, power), seed=i).reached(GOAL) for i in range(200)]
    for low, right, high in ((1, truth, 2), (4, 1e-3 * (5 + truth), 5)):
        held = [each[low] <= right and not right > each[high] for each in found]
        assert np.mean(held) >= 0.9
    middle = np.exp(np.nanmean([np.log(each.passes) for each in found]))
    assert middle == pytest.approx(truth, rel=0.12)


def test_the_first_budget_within_the_goal_is_biased_and_that_of_the_law_is_not(values_alone):
    """Of many noisy budgets, as in figure 1 of Hazelden's paper, the first that is within the goal is too small."""
    rng, truth = np.random.default_rng(1), 100.0
    budgets = np.unique(np.geomspace(6, 1200, 40).round())
    lucky, fitted = [], []
    for i in range(200):
        table = measured(rng, 5, budgets=budgets)
        lucky.append(np.log(table.loc[table["error"] <= GOAL, "passes"].min() / truth))
        fitted.append(np.log(laws.fit(table, seed=i).budgets(GOAL)[0] / truth))
    assert np.exp(np.mean(lucky)) < 0.5
    assert np.exp(np.mean(fitted)) == pytest.approx(1, abs=0.15)


@pytest.mark.slow
def test_bands_cover_the_budget_where_budgets_share_their_seeds():
    """With the same seeds at all budgets, an error that is low by chance is low at every budget."""
    rng, held = np.random.default_rng(0), []
    for i in range(200):
        table = measured(rng, 20).drop(columns="first_seed")
        luck = np.median(np.abs(rng.standard_normal(20))) / 0.67449
        table[["error", "error_q25", "error_q75"]] = np.outer(luck * 0.1 / table["passes"] ** 0.5, [1, 0.47, 1.7])
        _, low, high, *_ = laws.fit(table, seed=i).reached(GOAL)
        held.append(low <= 100 and not high < 100)
    assert np.mean(held) >= 0.9


def test_the_fastest_of_equal_methods_is_not_too_fast(values_alone):
    """The smallest time of ten equally fast methods is within the noise of one."""
    rng = np.random.default_rng(2)
    least = [
        min(laws.fit(measured(rng, 50), seed=i).reached(GOAL).seconds for i in range(10)) / 0.105 for _ in range(20)
    ]
    assert np.exp(np.mean(np.log(least))) > 0.6


def test_errors_fall_at_least_as_the_inverse_root_and_seconds_grow():
    rng = np.random.default_rng(3)
    law = laws.fit(measured(rng, 3))
    assert (np.diff(np.log(law.errors)) <= -0.5 * np.diff(np.log(law.passes)) + 1e-9).all()
    assert (np.diff(np.log(law.times)) >= -1e-9).all()


def test_budgets_with_more_seeds_weigh_more():
    table = measured(np.random.default_rng(0), 5, budgets=(100, 101)).assign(error=[0.005, 0.02], seeds=[1, 1000])
    assert laws.fit(table).error(100)[0] > 0.019


def test_a_deterministic_method_has_one_error_and_its_seconds_vary():
    row = measured(np.random.default_rng(0), 9, budgets=(1,)).assign(passes=np.nan, seeds=1, error=0.004)
    found = laws.fit(row).reached(0.01)
    assert found.seconds_low < found.seconds < found.seconds_high and found.seconds == pytest.approx(row["seconds"][0])
    assert np.isnan(laws.fit(row).reached(0.003)).all()


def test_the_error_of_a_method_without_passes_varies_over_its_seeds():
    """A kernel of random vectors: no passes, and another error for each seed."""
    row = measured(np.random.default_rng(0), 5, budgets=(1,)).assign(passes=np.nan)
    row = row.assign(error=0.01, error_q25=0.005, error_q75=0.02)
    errors = laws.fit(row).errors
    assert errors[0, 0] == pytest.approx(0.01) and np.log(errors[1:, 0]).std() > 0.3
    assert 0.3 < np.isnan(laws.fit(row).budgets(0.01)[1:]).mean() < 0.7
    assert np.ptp(laws.fit(row.assign(seeds=1)).errors) == 0


def test_a_budget_measured_twice_has_the_mean_of_both():
    table = measured(np.random.default_rng(0), 5, budgets=(100, 100)).assign(error=[0.02, 0.005])
    assert laws.fit(table).error(100)[0] == pytest.approx(0.01)


def timed(seconds: float, calls: int, spread: float = 0.0) -> pd.DataFrame:
    """A deterministic method; without a spread both quartiles are the value."""
    row = {"passes": np.nan, "seeds": 1, "calls": calls, "error": 0.0, "error_q25": 0.0, "error_q75": 0.0}
    row |= {"seconds": seconds, "seconds_q25": seconds * (1 - spread), "seconds_q75": seconds * (1 + spread)}
    return pd.DataFrame([row])


def width(law: laws.Law) -> float:
    found = law.reached(0.01)
    return np.log(found.seconds_high / found.seconds_low)


@pytest.mark.parametrize("calls", [1, 2, 1000])
def test_seconds_are_never_certain(calls):
    """Even where the quartiles of few calls are equal or many calls agree: machines drift between rows."""
    found = width(laws.fit(timed(1.0, calls)))
    assert 2 * 1.96 * laws.DRIFT * 0.7 < found < 2 * 1.96 * laws.DRIFT * 1.4
    assert width(laws.fit(timed(1.0, calls), drift=0.0)) == 0, "a cost that is counted"
    assert width(laws.fit(timed(1.0, calls).assign(seconds_q25=np.nan, seconds_q75=np.nan))) > 0


def test_few_calls_have_the_typical_spread_of_their_table():
    rows = [timed(1.0, 1), timed(2.0, 9, 0.3), timed(3.0, 9, 0.4), timed(3.0, 9, 0.5), timed(4.0, 2)]
    table = pd.concat(rows, ignore_index=True)
    typical = laws.typical_spread(table)
    assert typical == pytest.approx(np.log(1.4 / 0.6) / 1.349)
    one_call, nine_calls, *_ = map(width, laws.fits(table.assign(method=range(5)), ["method"]).values())
    assert one_call == pytest.approx(2 * 1.96 * typical * np.sqrt(np.pi / 2), rel=0.4)
    assert one_call > nine_calls
    assert laws.typical_spread(timed(1.0, 2, 0.5)) == 0, "of no row with enough calls"


def test_a_smallest_budget_that_is_far_too_large_gives_an_upper_bound():
    table = measured(np.random.default_rng(0), 5)
    law = laws.fit(table.assign(error=0.2 / table["passes"] ** 0.5))  # 0.07 at the smallest budget
    assert law.at_most(0.25) and not law.at_most(0.2) and not law.at_most(0.01)


def test_the_smallest_of_some_numbers_is_certain_only_where_they_are_far_apart():
    shares = laws.smallest(np.array([0.0, 0.1, 5.0]), np.array([0.1, 0.1, 0.1]))
    assert shares.sum() == pytest.approx(1) and shares[2] == 0
    assert shares[0] == pytest.approx(ndtr(0.1 / np.hypot(0.1, 0.1)), abs=0.03)
    assert laws.smallest(np.array([1.0, 0.0]), np.zeros(2)).tolist() == [0, 1]


def test_median_seconds_of_many_calls_vary_by_the_drift_and_of_few_by_the_typical_spread():
    points = pd.DataFrame(
        {
            "seconds": [1.0, 2.0],
            "seconds_q25": [1.0, 1.0],
            "seconds_q75": [1.0, 4.0],
            "calls": [2, 100],
            "seeds": [1, 1],
        }
    )
    middle, deviations = laws.median_seconds(points)
    spread = np.log(4) / 1.3490  # of the second; the first has too few calls to show its own
    assert middle == pytest.approx(np.log([1, 2]))
    assert deviations == pytest.approx([spread * np.sqrt(np.pi / 4), max(spread * np.sqrt(np.pi / 200), laws.DRIFT)])
