"""Errors over seeds, and what counts as an estimate."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ntkbench.estimate import Estimate
from ntkbench.measure import seeds
from ntkbench.measure.seeds import BadEstimate, Reruns


def estimate(value=1.0, error=0.1, passes=4, notes=(), degrees=5.0):
    return Estimate(value, error, passes, "hutchinson", notes, "trace", degrees)


def test_numpy_scalars_are_numbers():
    found = seeds.checked(estimate(np.float32(2.0), np.float64(0.5), np.int64(5), degrees=np.inf))
    assert [type(v) for v in (found.value, found.standard_error, found.passes, found.degrees)] == [float] * 4
    assert found.value == 2.0


def test_notes_are_single_lines():
    assert seeds.checked(estimate(notes=("note\n\nx", "  y "))).notes == ("note x", "y")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (3.0, "a float, not an Estimate"),
        (None, "returned None"),
        (estimate(math.nan), "value is nan"),
        (estimate(-math.inf), "value is -inf"),
        (estimate("text"), "value is a str"),
        (estimate(1j), "value is a complex"),
        (estimate(True), "value is a bool"),
        (estimate(None), "value is None"),
        (estimate(np.array([1.0, 2.0])), r"value is a ndarray of shape \(2,\)"),
        (estimate(passes=math.nan), "passes is nan"),
        (estimate(error=math.inf), "standard_error is inf"),
        (estimate(error="x"), "standard_error is a str"),
        (estimate(degrees=math.nan), "degrees is nan"),
        (estimate(-5.0, None), "value is -5; possible for trace: 0 to inf"),
        (estimate(error=-1.0), "standard_error is -1; possible: at least 0"),
        (estimate(degrees=0.0), "degrees is 0; possible: more than 0"),
        (estimate(error=math.nan, degrees=-3.0), "degrees is -3; possible: at least 0"),
        (estimate(passes=-7), "passes is -7; possible: at least 0"),
        (replace(estimate(), certificate="x"), "certificate is a str"),
    ],
)
def test_results_that_are_not_estimates_are_refused(found, said):
    with pytest.raises(BadEstimate, match=said):
        seeds.checked(found)


def test_an_estimate_of_another_metric_is_refused():
    assert seeds.checked(estimate(), "trace").value == 1.0
    with pytest.raises(BadEstimate, match="the estimate is of 'trace', not of 'norm'"):
        seeds.checked(estimate(), "norm")


def test_an_unknown_standard_error_is_allowed():
    assert math.isnan(seeds.checked(estimate(error=math.nan)).standard_error)


def test_columns_are_those_of_the_estimates():
    values = [9.0, 10.0, 12.0, 11.0]
    found = Reruns(10.0, "float64").run(lambda seed: estimate(values[seed], 0.5), range(4)).columns()
    assert (found["value"], found["reference"], found["seeds"], found["passes_spent"]) == (10.5, 10.0, 4, 4)
    assert found["error"] == pytest.approx(0.1) and found["error_q25"] == pytest.approx(0.075)
    assert found["error_q75"] == pytest.approx(0.125)
    assert found["covered"] == 3 / 4  # 12 +- 2.57 * 0.5 on the log scale leaves 10 out
    assert found["standard_error"] == 0.5


def test_errors_may_be_those_of_squares():
    found = Reruns(2.0, "float64", power=2).run(lambda seed: estimate(3.0), range(2)).columns()
    assert found["error"] == (9 - 4) / 4


def test_a_deterministic_estimate_has_no_coverage():
    found = Reruns(2.0, "float64").run(lambda seed: estimate(2.0, None, None), [0]).columns()
    assert found["covered"] is None and found["standard_error"] is None and found["error"] == 0.0


def test_an_exact_value_of_zero_has_no_other_relative_error_than_zero():
    assert seeds.relative_error(0.0, 0.0) == 0.0
    with pytest.raises(BadEstimate, match="exact value is 0"):
        seeds.relative_error(1e-9, 0.0)


def test_every_seed_is_run_once_and_in_order():
    seen = []
    reruns = Reruns(1.0, "float32")
    for part in ([0], [1, 2, 5]):
        reruns.run(lambda seed: seen.append(seed) or estimate(), part)
    assert seen == [0, 1, 2, 5] and len(reruns.seconds) == 4
