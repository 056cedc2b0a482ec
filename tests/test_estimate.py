"""Estimates as numbers, in print and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch

import ntkbench
from ntkbench.errors import BadInput
from ntkbench.estimate import RANGES, Estimate, Estimates, rounding_bound
from ntkbench.metrics import Moments
from ntkbench.options import Options

E = Estimate(12.5, 0.5, 64.0, "hutchinson", ("passed over <a>: why",), "trace", certificate=1e-7)


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


def test_equal_estimates_are_equal_in_all_fields():
    assert dataclasses.replace(E) == E and hash(dataclasses.replace(E)) == hash(E)
    assert dataclasses.replace(E, method="hutchpp") != E
    assert pickle.loads(pickle.dumps(E)) == E


def test_it_formats_like_its_value():
    assert f"{E:.3f}" == "12.500" and f"{E:8.1e}" == " 1.2e+01"
    assert f"{E}" == str(E)


def test_its_representations_show_all_fields():
    assert repr(E).splitlines() == [
        "trace = 12.5, 95 % in [11.5574, 13.5194] (hutchinson, 64 passes), certified to 1.0e-07",
        "  passed over <a>: why",
    ]
    assert repr(Estimate(1.0, None, None, "direct")) == "value = 1 (direct)"
    page = E._repr_html_()
    assert "<td>[11.5574, 13.5194]</td><td>64</td>" in page and "1.0e-07" in page
    assert "passed over &lt;a&gt;: why" in page


def test_several_print_as_a_table():
    both = Estimates(trace=E, norm=Estimate(3.25, None, 64.0, "direct", E.notes, "norm"))
    assert repr(both).splitlines() == [
        "metric  value  95 % interval       passes  method      certificate",
        "trace   12.5   [11.5574, 13.5194]  64      hutchinson  1.0e-07",
        "norm    3.25   -                   64      direct",
        "passed over <a>: why",
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


def aligned(complement: float, error: float | None, **more: object) -> Estimate:
    return Estimate(1 - complement, error, 8, "m", metric="alignment", complement=complement, **more)


@pytest.mark.parametrize("rounding", [None, 1e-3])
@pytest.mark.parametrize("error", [None, 0.0, 1e-12, 0.02, 0.5])
@pytest.mark.parametrize("offset", [-0.3, -1e-9, 0.0, 1e-9, 0.3])
@pytest.mark.parametrize(("metric", "end"), [(metric, end) for metric, ends in RANGES.items() for end in ends])
def test_an_interval_contains_its_value_and_is_within_the_range_of_the_metric(metric, end, offset, error, rounding):
    """A deterministic value may be outside, such as the alignment with a matrix that is not positive semidefinite."""
    given = (end if math.isfinite(end) else 5.0) + offset
    (least, most), known = RANGES[metric], {None, 1 - given} if metric == "alignment" else {None}
    for complement in known:
        e = Estimate(given, error, 8, "m", metric=metric, degrees=4, complement=complement, rounding=rounding)
        low, high = e.interval()
        assert low <= e.value <= high
        if error is not None or complement is not None:
            assert least <= low and high <= most
        else:
            assert e.value == given
        if complement is not None:
            low, high = e.complement_interval()
            assert 0 <= low <= e.complement <= high <= 1
            assert e.value == pytest.approx(1 - e.complement, abs=1e-15)


@pytest.mark.parametrize("complement", [1e-14, 1e-10, 1e-3, 0.3, 0.6])
def test_an_interval_near_one_is_that_of_one_minus_alignment(complement):
    e = aligned(complement, 0.1 * complement * (2 - complement))
    low, high = e.complement_interval()
    assert low < complement < high
    # on the scale of atanh A = log((2 - c) / c) / 2
    logit = [math.log((2 - c) / c) for c in (low, complement, high)]
    assert logit[0] - logit[1] == pytest.approx(logit[1] - logit[2]) == pytest.approx(2 * 0.19600, rel=1e-4)
    assert e.interval() == (1 - high, 1 - low)
    if complement > 1e-3:
        plain = dataclasses.replace(e, complement=None)
        assert e.interval() == pytest.approx(plain.interval(), rel=1e-9)


def test_an_interval_of_a_complement_far_below_its_error_stays_in_proportion_to_the_error():
    for complement in (0.0, 1e-20, 1e-17):
        low, high = aligned(complement, 1e-8).complement_interval()
        assert 0 <= low <= complement and 1e-8 < high < 3e-6
    assert aligned(0.0, 0.0).interval() == (1, 1)
    assert aligned(0.1, math.nan).complement_interval() == (-math.inf, math.inf)
    with pytest.raises(BadInput, match=r"m does not compute 1 - alignment separately; use interval\(\)"):
        Estimate(0.9, 0.1, 8, "m", metric="alignment").complement_interval()


def test_rounding_widens_an_interval_and_turns_the_angle_of_an_alignment():
    assert Estimate(5.0, None, 8, "m", metric="trace", rounding=1e-3).interval() == pytest.approx((4.995, 5.005))
    low, high = Estimate(5.0, 0.1, 8, "m", metric="trace").interval()
    wider = Estimate(5.0, 0.1, 8, "m", metric="trace", rounding=1e-3).interval()
    assert wider == pytest.approx((low - 0.005, high + 0.005))
    angle = 1e-4
    for rounding in (1e-5, 1e-3):
        low, high = aligned(2 * math.sin(angle / 2) ** 2, None, rounding=rounding).complement_interval()
        assert high == pytest.approx(2 * math.sin((angle + rounding) / 2) ** 2)
        assert low == pytest.approx(2 * math.sin(max(angle - rounding, 0) / 2) ** 2)
    low, high = aligned(1.0, None, rounding=0.1).complement_interval()
    assert low == pytest.approx(1 - math.sin(0.1)) and high == 1
    assert Estimate(math.inf, None, 8, "m", metric="trace").interval() == (math.inf, math.inf)


@pytest.mark.parametrize("value", [1.0, 0.9, 0.02, 0.0, -0.5])
def test_rounding_of_an_alignment_without_its_complement_is_absolute(value):
    """It is relative to the norms of the kernels, whatever their inner product is, and does not vanish near 1.

    The alignment with a matrix that is not positive semidefinite may be negative.
    """
    found = Estimate(value, None, 8, "m", metric="alignment", rounding=1e-3).interval()
    low, high = value - 1e-3, min(value + 1e-3, 1.0)
    assert found == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize("confidence", [95, 0, -0.5, 1, 1e-17, 1 - 1e-16, math.nan, "0.9"])
def test_invalid_confidence_levels_are_refused(confidence):
    e = aligned(0.1, 0.01)
    for what in (e.interval, e.complement_interval, e.relative_width):
        with pytest.raises(BadInput, match=r"^confidence must be "):
            what(confidence)
    with pytest.raises(BadInput, match=r"^confidence must be "):
        Options(confidence=confidence)


def test_the_interval_of_the_requested_level_is_printed():
    surer = dataclasses.replace(E, confidence=0.99)
    assert surer.interval() == E.interval(0.99) != E.interval() == surer.interval(0.95)
    low, high = surer.interval()
    assert str(surer) == f"12.5, 99 % in [{low:.6g}, {high:.6g}] (hutchinson, 64 passes)"
    head, row, *_ = repr(Estimates(trace=surer)).splitlines()
    assert "99 % interval" in head and f"12.5   [{low:.6g}, {high:.6g}]" in row
    assert Estimate.from_json(surer.to_json()) == surer
    e = dataclasses.replace(aligned(2.5e-10, 1e-11), confidence=0.5)
    assert "50 % within" in str(e) and "1 - alignment = 2.5e-10, 50 % in [" in str(e)


def test_a_requested_level_reaches_the_estimate():
    for more in ({}, {"rtol": 0.5}, {"method": "hutchinson", "passes": 20}):
        found = ntkbench.norm(torch.nn.Linear(3, 2), torch.ones(4, 3), confidence=0.8, **more)
        assert found.confidence == 0.8, more
    kernel = ntkbench.Kernel(torch.nn.Linear(3, 2), torch.randn(4, 3))
    assert {each.confidence for each in kernel.metrics(np.eye(8), confidence=0.8).values()} == {0.8}
    assert "80 % in [" in str(found)


@pytest.mark.parametrize(("dtype", "said"), [("float32", "choose dtype='float64'"), ("float64", "no precision is as")])
@pytest.mark.parametrize("method", ["auto", "hutchinson"])
def test_notes_on_rounding_know_the_precision(method, dtype, said):
    tight = {"float32": 1e-8, "float64": 1e-300}[dtype]
    model, x = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)  # probes agree
    found = ntkbench.trace(model, x, rtol=tight, dtype=dtype, method=method)
    assert any(f"rounding may exceed rtol={tight:g}: {said}" in note for note in found.notes), found.notes


def test_one_minus_alignment_is_shown_near_one():
    e = aligned(2.5e-10, 1e-11)
    assert str(e) == "1, 95 % within 2.0e-11, 1 - alignment = 2.5e-10, 95 % in [2.31149e-10, 2.70388e-10] (m, 8 passes)"
    assert repr(Estimates(alignment=e)).endswith("\n1 - alignment = 2.5e-10, 95 % in [2.31149e-10, 2.70388e-10]")
    assert "1 - alignment" not in str(aligned(0.02, 1e-3))
    assert Estimate.from_json(e.to_json()) == e


def test_exact_values_are_shown_with_their_rounding():
    """The ends of their intervals have the same digits."""
    exact = Estimate(12.5, None, 1, "direct", metric="trace", rounding=2e-7)
    assert str(exact) == "12.5 (direct, 1 pass)"
    assert repr(exact) == "trace = 12.5, rounding up to 2.5e-06 (direct, 1 pass)"
    assert "12.5   rounding up to 2.5e-06  1" in repr(Estimates(trace=exact))
    settled = dataclasses.replace(exact, standard_error=0.0)
    assert repr(settled) == repr(exact)
    assert repr(dataclasses.replace(settled, rounding=None)) == "trace = 12.5 (direct, 1 pass)"
    near = repr(aligned(1e-5, None, rounding=1e-6))
    assert near == "alignment = 0.99999, rounding up to 4.5e-09, 1 - alignment = 1e-05 (m, 8 passes)"
    assert "95 % within 9.8e-10" in str(Estimate(12.5, 5e-10, 8, "m"))


def test_metrics_of_moments_are_estimates_without_a_standard_error():
    moments = Moments(6.0, 4.0, 4.0, 3.9, 0.2, -0.1)
    trace = Estimate.of_moments("trace", moments, 2, "m", ("note",), 1e-7, 1e-5)
    assert trace == Estimate(6.0, None, 2, "m", ("note",), "trace", certificate=1e-7, rounding=1e-5)
    found = Estimate.of_moments("alignment", moments, None, "m")
    assert found.complement == pytest.approx(0.025) and found.value == pytest.approx(0.975)
    assert Estimate.of_moments("alignment", Moments(6.0, 4.0, 4.0, 3.0), None, "m").complement is None


def test_a_rounding_bound_grows_with_the_sums_and_the_certificate():
    first = rounding_bound("trace", 2**-52, 100, None)
    assert 1e-15 < first < 1e-13
    assert rounding_bound("trace", 2**-23, 100, None) == pytest.approx(2**29 * first)
    assert first < rounding_bound("trace", 2**-52, 10_000, None) < rounding_bound("trace", 2**-52, 10_000, 1e-12)
    assert rounding_bound("effective_rank", 2**-52, 100, 1e-12) == 3 * rounding_bound("norm", 2**-52, 100, 1e-12)
