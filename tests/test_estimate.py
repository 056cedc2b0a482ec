"""Estimates as numbers, in print and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch

from ntkbench.estimate import Estimate, Estimates

E = Estimate(12.5, 0.5, 64.0, "hutchinson", ("not by <a>: why",), "trace", certificate=1e-7)


def test_it_computes_and_compares_like_its_value():
    assert (E + 1, 1 + E, E - 1, 1 - E, E * 2, 2 * E, E / 5, 5 / E) == (13.5, 13.5, 11.5, -11.5, 25, 25, 2.5, 0.4)
    assert (E + E, E - E, E * E, E / E, E**2, 2**E, -E, +E, abs(-1 * E)) == (
        25,
        0,
        156.25,
        1,
        156.25,
        2**12.5,
        -12.5,
        12.5,
        12.5,
    )
    assert E < 13 and E <= 12.5 and E > 12 and E >= 12.5 and 12 < E < dataclasses.replace(E, value=13.0)
    assert E == 12.5 and E != 12 and np.float64(12.5) == E and {12.5: "here"}[E] == "here"
    assert E != "12.5"
    assert sum([E, E]) == 25 and max(E, 3.0) is E and round(E) == 12 and math.sqrt(E) == math.sqrt(12.5)
    with pytest.raises(TypeError):
        E + "1"


@pytest.mark.parametrize("array", [np.arange(3.0), torch.arange(3.0)])
def test_it_computes_with_arrays(array):
    for found, expected in ((E * array, 12.5 * array), (array * E, 12.5 * array), (array / E, array / 12.5)):
        assert type(found) is type(array) and (found == expected).all()
    np.testing.assert_array_equal(np.asarray([E, E]), [12.5, 12.5])
    assert np.log(E) == math.log(12.5) and np.float64(2) * E == 25


def test_equal_estimates_are_equal_in_all():
    assert dataclasses.replace(E) == E and hash(dataclasses.replace(E)) == hash(E)
    assert dataclasses.replace(E, method="hutchpp") != E
    assert pickle.loads(pickle.dumps(E)) == E


def test_it_formats_like_its_value():
    assert f"{E:.3f}" == "12.500" and f"{E:8.1e}" == " 1.2e+01"
    assert f"{E}" == str(E)


def test_it_shows_all_that_is_known():
    assert repr(E).splitlines() == [
        "trace = 12.5, 95 % in [11.5574, 13.5194] (hutchinson, 64 passes), certified to 1.0e-07",
        "  not by <a>: why",
    ]
    assert repr(Estimate(1.0, None, None, "direct")) == "value = 1 (direct)"
    page = E._repr_html_()
    assert "<td>[11.5574, 13.5194]</td><td>64</td>" in page and "not by &lt;a&gt;: why" in page and "1.0e-07" in page


def test_several_print_as_a_table():
    both = Estimates(trace=E, norm=Estimate(3.25, None, 64.0, "direct", E.notes, "norm"))
    assert repr(both).splitlines() == [
        "metric  value  95 % interval       passes  method      certificate",
        "trace   12.5   [11.5574, 13.5194]  64      hutchinson  1.0e-07",
        "norm    3.25   -                   64      direct",
        "not by <a>: why",
    ]
    assert both._repr_html_().count("<tr>") == 3
    assert both["trace"] is E and isinstance(both, dict)


@pytest.mark.parametrize(
    "e",
    [
        E,
        Estimate(math.inf, math.nan, None, "m", degrees=0),
        Estimate(-math.inf, None, 3, "m", ("a", "b"), "norm", 4.5, math.inf),
        Estimate(np.float32(0.1), np.float64(0.2), np.int64(3), "m"),
    ],
)
def test_it_is_the_same_after_json(e):
    for again in (Estimate.from_json(e.to_json()), Estimate.from_dict(e.to_dict())):
        assert repr(again) == repr(e)
        assert again.to_json() == e.to_json()
        assert again.interval() == e.interval() or math.isnan(e.value)
    json.loads(e.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
