"""Predicted costs of cells: they are those of the cells' own budgets, prune the grid with a reason, and add up."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from click.testing import CliRunner

from ntkbench import cost, methods, operators, problems
from ntkbench.cli import main
from ntkbench.measure import fingerprints, forecast, shard
from ntkbench.measure.cells import cells
from ntkbench.measure.config import Config
from ntkbench.measure.forecast import Forecast
from ntkbench.measure.limits import Limits
from ntkbench.measure.outcomes import Outcome
from ntkbench.measure.rows import read
from ntkbench.options import Target

LABEL = "fc_relu[N=4,O=2,depth=1,width=8]"
BROKEN = "gpt2_small[T=3,V=9,d=64,L=1]"
METHODS = ["hutchinson", "structured_block_u_statistics", "structured_derivatives", "naive_jacobian"]


def config(**more):
    grid = [{"problems": [LABEL], "methods": METHODS, "metrics": ["trace", "norm"], "passes": [6, 12]}]
    return Config.model_validate({"profile": "forecast", "threads": 1, "grid": grid} | more)


@pytest.mark.parametrize("name", ["hutchinson", "hutchpp", "one_sided_reverse", "structured_block_u_statistics"])
@pytest.mark.parametrize("passes", [12, 24])
def test_costs_of_a_budget_are_those_of_an_estimate_with_it(name, passes):
    problem, target, method = problems.load(LABEL), Target(device="cpu"), methods.get(name)
    found = cost.of_budgets(problem, "trace", target, [(name, passes)])[name, passes]
    assert not found.reason and found.seconds > 0
    assert found.passes == pytest.approx(method.estimate(method.prepare(problem, target), "trace", passes).passes)
    assert found.budget == passes


def test_methods_that_do_not_apply_have_a_reason_and_no_cost():
    found = cost.of_budgets(problems.load(LABEL), "trace", Target(device="cpu"), [("recurrent_exact_trace", None)])
    (one,) = found.values()
    assert one.reason and one.seconds is None


def test_forecasts_cover_cells_whose_method_applies(tmp_path):
    every = cells(config())
    begun = []
    found = forecast.make(config(), every, tmp_path, begun.append)
    assert begun == [LABEL] and set(found) == set(every)
    assert all(one.seconds > 0 for one in found.values()) and not list(tmp_path.iterdir())
    spectral = [replace(cell, metric="condition_number") for cell in every]
    assert forecast.make(config(), spectral, tmp_path) == {}


def test_cells_of_a_backend_that_lacks_the_device_have_no_forecast(monkeypatch):
    monkeypatch.setattr(operators, "device_name", lambda target: "cpu" if target.backend == "jax" else "a GPU")
    cell = replace(cells(config())[0], backend="jax")
    assert forecast._predict(config(), [cell]) == {"costs": {}}


def test_a_problem_that_fails_has_no_forecasts_and_the_others_do(tmp_path, monkeypatch, capfd):
    load = problems.load
    monkeypatch.setattr(problems, "load", lambda label: 1 / 0 if label == BROKEN else load(label))
    every = cells(config())[:2]
    found = forecast.make(config(), [replace(every[0], problem=BROKEN), *every], tmp_path)
    assert set(found) == set(every)
    assert f"no costs are predicted for {BROKEN}: ZeroDivisionError" in capfd.readouterr().out


def made(seconds):
    """Forecasts of trace cells by method."""
    chosen = {cell.method: cell for cell in cells(config()) if cell.metric == "trace" and cell.passes in (None, 6)}
    return chosen, {chosen[name]: Forecast(each, 1.0) for name, each in seconds.items()}


def test_slow_cells_are_pruned_if_much_slower_than_an_exact_one():
    limits = Limits(time_s=60, patience_s=1, times_exact=10)
    chosen, found = made({"hutchinson": 2.5, "structured_derivatives": 0.2, "naive_jacobian": 1.9})
    reasons = forecast.pruned(found, limits)
    assert set(reasons) == {chosen["hutchinson"]}
    assert "predicted to take 2.5 s, 12 times as long as structured_derivatives" in reasons[chosen["hutchinson"]]
    assert "which is exact (limits.times_exact: 10)" in reasons[chosen["hutchinson"]]
    _, quick = made({"hutchinson": 0.9, "structured_derivatives": 0.001})
    assert forecast.pruned(quick, limits) == {}, "a call within patience_s is measured, however much slower it is"
    _, alone = made({"hutchinson": 100})
    assert forecast.pruned(alone, limits) == {}, "there is no exact method to compare it with"
    chosen, long = made({"hutchinson": 130})
    assert "over limits.time_s (60)" in forecast.pruned(long, limits)[chosen["hutchinson"]]
    chosen, found = made({"structured_derivatives": 0.2, "naive_jacobian": 3})
    assert set(forecast.pruned(found, limits)) == {chosen["naive_jacobian"]}, "exact methods as well"


def test_exact_methods_of_other_shards_are_predicted_as_rivals():
    every = cells(config())
    some = [cell for cell in every if cell.method == "hutchinson" and cell.metric == "norm"]
    assert {(cell.method, cell.metric) for cell in forecast.rivals(some, every)} == {
        ("structured_derivatives", "norm"),
        ("naive_jacobian", "norm"),
    }


def test_pruned_cells_are_rows_with_the_reason_until_they_are_predicted_to_be_fast(tmp_path, monkeypatch):
    given = config(limits={"times_exact": 4, "patience_s": 1})
    problem = {"status": "ok", "reason": "", "exact": {"trace": 1.0, "norm": 1.0}, "N": 4, "O": 2, "P": 9, "n": 8}
    monkeypatch.setattr(shard.facts, "read", lambda config, labels, file: dict.fromkeys(labels, problem))
    monkeypatch.setattr(shard.engine, "started", lambda *_: contextlib.nullcontext())
    ran = []

    def measure(asv, cell, index, work):
        ran.append(cell)
        return Outcome("ok"), {"value": 3.0, "seeds": 1, "calls": 1}

    def costs(config, chosen, work, begin):
        begin(LABEL)
        return {cell: Forecast(9.0 if cell.method == "hutchinson" else 1.0, None) for cell in chosen}

    monkeypatch.setattr(shard, "_measure", measure)
    monkeypatch.setattr(shard.forecast, "make", costs)
    output = tmp_path / "shards" / "shard-0.csv"
    arguments = given, 0, tmp_path / "problems.json", output, tmp_path / "logs" / "cases.log"
    shard.measure(*arguments)
    table = read(output)
    assert len(table) == len(cells(given))
    left_out = table[table["status"] == "skipped"]
    assert set(left_out["method"]) == {"hutchinson"} and len(left_out) == 4
    assert left_out["reason"].str.contains("9 times as long as").all()
    assert {cell.method for cell in ran} == set(METHODS) - {"hutchinson"} and len(ran) == len(table) - 4
    ran.clear()
    fast = lambda config, chosen, *_: dict.fromkeys(chosen, Forecast(1.0, None))  # noqa: E731
    monkeypatch.setattr(shard.forecast, "make", fast)
    shard.measure(*arguments)
    assert {cell.method for cell in ran} == {"hutchinson"} and (read(output)["status"] == "ok").all()


def test_limits_of_forecasts_count_where_costs_are_predicted():
    cell, *_ = cells(config())
    plain, patient = (config(limits={"patience_s": seconds}) for seconds in (1, 2))
    assert fingerprints.cell(plain, cell) == fingerprints.cell(patient, cell)
    of = {
        fingerprints.cell(config(limits={"times_exact": times, "patience_s": seconds}), cell)
        for times in (4, 5)
        for seconds in (1, 2)
    }
    assert len(of | {fingerprints.cell(plain, cell)}) == 5


def test_a_check_predicts_how_long_the_grid_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "some.yaml"
    file.write_text(
        f"profile: some\nthreads: 1\nseeds: 2\ncalls: 2\ngrid:\n  - problems: ['{LABEL}']\n"
        "    methods: [hutchinson, structured_derivatives, recurrent_exact_trace]\n"
        "    metrics: [trace]\n    passes: [6]\n",
        encoding="utf-8",
    )
    found = CliRunner().invoke(main, ["check", "--predict", str(file)])
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert "cells with a prediction: 2, about" in found.stdout and "cells without a prediction: 1 " in lines[-1]
    assert any(line.startswith(f"the slowest is {LABEL}/") for line in lines)


def test_predicted_time_of_a_cell_counts_its_estimates_up_to_the_limit():
    every = cells(config(seeds=5, calls=3))
    cell = next(cell for cell in every if cell.method == "hutchinson")
    assert Forecast(2.0, None).wall(cell) == forecast.BESIDE + 20
