"""Forecasts of a grid without running it: from passes, shapes and committed rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from click.testing import CliRunner

from ntkbench import operators, problems
from ntkbench.cli import main
from ntkbench.measure import glance
from ntkbench.measure.cells import Cell, cells
from ntkbench.measure.config import Config
from ntkbench.operators.base import JacobianOperator


def config(methods, **more):
    block = {"problems": ["gru_hazelden[N=4,T=5]"], "methods": methods, "metrics": ["trace", "norm"], "passes": [64]}
    return Config.check({"profile": "test", "threads": 1, "grid": [block], **more}, "test.yaml")


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """No problem is loaded with its trained weights, and no product is computed."""
    refuse = lambda *_, **__: pytest.fail("something is computed")  # noqa: E731
    monkeypatch.setattr(problems, "load", refuse)
    monkeypatch.setattr(JacobianOperator, "fresh", refuse)


def test_a_short_grid_within_the_limits_has_no_warning():
    some = config(["naive_jacobian", "hutchinson"])
    assert set(glance.costs(some, cells(some))) == set(cells(some))
    assert glance.warnings(some, cells(some)) == []


def test_a_long_grid_and_cells_over_the_limits_are_named(monkeypatch):
    some = config(["kfoc", "naive_jacobian", "hutchinson"], limits={"memory_mb": 100, "time_s": 1e-4})
    monkeypatch.setattr(glance, "LONG", 1e-3)
    long, heavy, slow = glance.warnings(some, cells(some))
    assert long.startswith("this grid takes about ") and "for 6 cells with a forecast" in long
    assert heavy.startswith("over limits.memory_mb (100), so skipped: kfoc on gru_hazelden[N=4,T=5] needs ")
    assert slow.startswith("over limits.time_s (0.0001): ") and slow.count(" takes about ") == 3
    assert slow.endswith("; 6 cells in all")


def test_the_command_warns(tmp_path, monkeypatch):
    file = tmp_path / "some.yaml"
    file.write_text(
        "profile: some\nthreads: 1\nlimits: {memory_mb: 100}\ngrid:\n  - problems: ['gru_hazelden[N=4,T=5]']\n"
        "    methods: [kfoc]\n    metrics: [trace]\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(main, ["check", str(file)])
    assert found.exit_code == 0 and "kfoc on gru_hazelden[N=4,T=5] needs " in found.output, found.output


def test_unknown_costs_have_no_forecast(monkeypatch):
    some = config(["naive_jacobian"])
    (data,) = problems.get("resnet18_cifar").data
    monkeypatch.setattr(type(data), "here", lambda self: None)
    monkeypatch.setattr(problems, "define", lambda label: pytest.fail("data may be downloaded"))
    glance._shapes.cache_clear()
    assert glance.costs(some, [Cell("resnet18_cifar", "naive_jacobian", "torch", "trace", None)]) == {}
    monkeypatch.setattr(operators, "device_memory", lambda target: 2**30)
    assert glance.warnings(some, cells(some)) == [], "the rates are those of a processor"


def test_cells_of_a_backend_that_lacks_the_device_have_no_forecast(monkeypatch):
    monkeypatch.setattr(operators, "device_name", lambda target: "cpu" if target.backend == "jax" else "a GPU")
    cell = Cell("gru_hazelden[N=4,T=5]", "hutchinson", "jax", "trace", 64)
    assert glance.costs(config(["hutchinson"]), [cell]) == {}


def test_forecasts_are_of_the_right_size_on_problems_that_gave_no_rates():
    rates = glance._rates()
    assert len(rates) > 50
    name = rates["problem"].str.partition("[")[0]
    ratios = []
    for (_, row), own in zip(rates.iterrows(), name, strict=True):
        cell = Cell(row["problem"], row["method"], row["backend"], "trace", None)
        predicted = glance._seconds(rates[name != own], cell, row["operations"])
        assert predicted is not None
        ratios.append(abs(math.log(predicted / row["seconds"])))
    assert np.median(ratios) < math.log(4)
