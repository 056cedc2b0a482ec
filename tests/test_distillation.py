"""Kernel distillation: differentiable products, intervals and verdicts, and the study on tiny networks."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from torch import nn

import ntkbench
from ntkbench import figures, studies, testing
from ntkbench.networks.initialisation import seeded
from ntkbench.studies import distillation as study
from ntkbench.studies.base import distilling

TINY = {"weights": [0, 2], "seeds": 3, "teacher": 12, "student": 4, "taught": 40, "images": 20, "steps": 25}
TINY |= {"batch": 8, "seen": 4, "probes": 2, "threads": 1}


def networks():
    make = lambda width: nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()  # noqa: E731
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return seeded(lambda: make(5), 0), seeded(lambda: make(9), 1), x


def test_products_are_those_of_theta_and_the_estimate_converges():
    student, teacher, x = networks()
    u = torch.randint(2, (4000, 4, 2), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    thetas = [ntkbench.ntk(network, x) for network in (student, teacher)]
    both = [distilling.product(each, dict(each.named_parameters()), x, u) for each in (student, teacher)]
    for image, theta in zip(both, thetas, strict=True):
        torch.testing.assert_close(image.reshape(len(u), -1), u.reshape(len(u), -1) @ theta)
    exact = float(distilling.alignment(*thetas))
    assert exact == pytest.approx(float(ntkbench.alignment(student, teacher, x)))
    assert float(distilling.alignment(*both).detach()) == pytest.approx(exact, abs=0.01)


def test_the_gradient_of_the_estimate_is_that_of_finite_differences():
    student, teacher, x = networks()
    u = torch.randint(2, (2, 4, 2), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    there = distilling.product(teacher, dict(teacher.named_parameters()), x, u).detach()
    theta = {name: w.detach() for name, w in student.named_parameters()}
    value = lambda theta: distilling.alignment(distilling.product(student, theta, x, u), there)  # noqa: E731
    gradient = torch.func.grad(value)(theta)
    for name, w in theta.items():
        step = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=w.dtype) * 1e-5
        slope = (value(theta | {name: w + step}) - value(theta | {name: w - step})) / 2
        assert float((gradient[name] * step).sum()) == pytest.approx(float(slope), rel=1e-5)


def test_intervals_and_verdicts():
    values = np.array([1.0, 2.0, 4.0])
    mean, _, high = study.interval(values)
    assert mean == pytest.approx(7 / 3) and high - mean == pytest.approx(4.302653 * values.std(ddof=1) / 3**0.5)
    assert [study.verdict(1, *ends) for ends in ((0.1, 0.2), (-0.1, 0.2), (-0.2, -0.1))] == [
        "better",
        "no difference seen",
        "worse",
    ]
    assert study.verdict(-1, -0.2, -0.1) == "better"
    assert study.verdict(1, math.nan, math.nan) == "not known", "a student that diverged"
    with_, without = ([dict.fromkeys(study.BETTER, v) for v in some] for some in ((1.0, 2.1, 3.0), (0.0, 1.0, 2.0)))
    said = {row["quantity"]: row["verdict"] for row in study.compared(with_, without)}
    assert said == {"loss": "worse", "accuracy": "better", "agreement": "better", "alignment": "better"}


def test_the_study_compares_the_same_students_with_and_without_the_regulariser():
    table = studies.run("distillation", studies.settings("distillation", TINY))
    assert (table["status"] == "ok").all(), table["reason"].unique()
    assert list(zip(table["weight"], table["quantity"], strict=True)) == [(w, q) for w in (0, 2) for q in study.BETTER]
    assert set(table["seeds"]) == {3}
    first, second = (table[table["weight"] == w].set_index("quantity") for w in (0, 2))
    assert (first["difference"] == 0).all() and set(first["verdict"]) == {"reference"}
    np.testing.assert_allclose(second["value"] - first["value"], second["difference"], atol=1e-12)
    assert second.loc["alignment", "difference"] > 0, "the regulariser does what it is made for"
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()


def test_weights_begin_without_the_regulariser():
    with pytest.raises(ValidationError, match="must begin with 0"):
        studies.settings("distillation", TINY | {"weights": [1, 2]})


def differences() -> pd.DataFrame:
    """A table of the study: the reference, and two weights with the same differences from it."""
    row = {"status": "ok", "reason": "", "device": "cpu", "dtype": "float32", "threads": 1, "git_sha": "0" * 10}
    row |= {"git_dirty": False, "machine": "a laptop", "seeds": 6, "value": 0.5, "low": 0.4, "high": 0.6}
    same = {"difference": 0.0, "difference_low": 0.0, "difference_high": 0.0, "verdict": "reference"}
    moved = {"difference": -0.1, "difference_low": -0.15, "difference_high": -0.05}
    rows = [row | same | {"weight": 0.0, "quantity": quantity} for quantity in study.BETTER]
    for weight in (0.1, 1.0):
        for quantity, sign in study.BETTER.items():
            said = study.verdict(sign, moved["difference_low"], moved["difference_high"])
            rows.append(row | moved | {"weight": weight, "quantity": quantity, "verdict": said})
    return pd.DataFrame(rows)


def test_the_figure_has_a_difference_for_each_weight_and_quantity(tmp_path):
    table = differences()
    made = figures.draw("distillation", table, tmp_path)
    caption = made[1].read_text()
    others = table[(table["weight"] > 0) & (table["quantity"] != "alignment")]["verdict"].value_counts()
    assert f"distillation is better in {others['better']} of {others.sum()} comparisons (" in caption
    assert f"), and worse in {others['worse']}" in caption and "over 6 students" in caption
    np.testing.assert_allclose(pd.read_csv(made[0])["difference"], table["difference"])


@pytest.mark.slow
def test_the_figure_keeps_its_contract():
    testing.check_figure("distillation", differences())
