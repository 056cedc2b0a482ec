"""The study of predicted and measured costs: passes and bytes, not seconds; and its figure."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest
from pydantic import ValidationError

from ntkbench import figures, methods, paths, problems, studies
from ntkbench.errors import BadInput
from ntkbench.figures.plotting import base
from ntkbench.measure import cells
from ntkbench.measure.config import Config
from ntkbench.studies import cost_model

SMALL = "fc_relu[N=8,O=10,width=128,depth=2]"
NAMES = ["direct", "structured_derivatives", "hutchinson", "gram_reverse", "jacobian_contraction", "xtrace"]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    cases = [{"problem": SMALL, "metric": "norm", "rtol": 0.2, "methods": NAMES}]
    given = {"threads": 1, "device": "cpu", "calls": 1, "cases": cases}
    return studies.run("cost_model", studies.settings("cost_model", given))


@pytest.mark.slow
def test_a_row_has_predicted_and_measured_costs(table):
    assert set(table["method"]) == set(NAMES) - {"xtrace"}, "xtrace gives no norm"
    assert set(table["status"]) == {"ok"}, table["reason"].tolist()
    assert table["predicted_passes"].tolist() == pytest.approx(table["passes_spent"].tolist())
    problem = problems.load(SMALL)
    expected = [methods.get(row.method).operations(problem, "norm", row.passes_spent) for row in table.itertuples()]
    assert table["predicted_operations"].tolist() == pytest.approx(expected)
    ran = dict(zip(table["method"], table["samples"], strict=True))
    assert ran["structured_derivatives"] == 8 and pd.isna(ran["hutchinson"]), "traced on all samples; a stand-in"


@pytest.mark.slow
def test_large_predicted_bytes_are_near_the_measured_ones(table):
    """Within a factor of 4, above 4 MiB: smaller peaks are hidden by other memory of the process."""
    large = table[table["memory_bytes"] > 4 * 2**20]
    assert len(large), table[["method", "memory_bytes"]].to_string()
    assert (large["predicted_bytes"] / large["memory_bytes"]).between(1 / 4, 4).all(), large.to_string()


@pytest.mark.parametrize(("error", "value", "relative"), [(0.5, -2.0, 0.25), (None, 2.0, None), (0.5, 0.0, None)])
def test_a_standard_error_is_relative_to_a_value_that_is_not_zero(error, value, relative):
    assert cost_model.relative(error, value) == relative


def test_a_row_with_a_value_of_zero_keeps_its_costs(monkeypatch):
    """The alignment of orthogonal kernels, say."""
    method, predict = type(methods.get("hutchinson")), cost_model.cost.predict
    estimate = method.estimate
    zero = lambda *given: dataclasses.replace(estimate(*given), value=0.0)  # noqa: E731

    def then_zero(*args, **named):
        found = predict(*args, **named)
        monkeypatch.setattr(method, "estimate", zero)
        return found

    monkeypatch.setattr(cost_model.cost, "predict", then_zero)
    cases = [{"problem": SMALL, "metric": "trace", "rtol": 0.5, "methods": ["hutchinson"]}]
    given = {"threads": 1, "device": "cpu", "calls": 1, "cases": cases}
    (row,) = studies.run("cost_model", studies.settings("cost_model", given)).to_dict("records")
    assert row["status"] == "ok", row["reason"]
    assert row["seconds"] > 0 and pd.isna(row["relative_standard_error"]) and "standard_error" not in row


@pytest.mark.parametrize(("seconds", "status"), [(9.0, "ok"), (11.0, "skipped")])
def test_computations_are_left_out_above_twice_the_patience(monkeypatch, seconds, status):
    predict = cost_model.cost.predict

    def slow(*args, **named):
        return [dataclasses.replace(each, seconds=seconds) for each in predict(*args, **named)]

    monkeypatch.setattr(cost_model.cost, "predict", slow)
    cases = [{"problem": SMALL, "metric": "trace", "methods": ["direct"]}]
    given = {"threads": 1, "device": "cpu", "calls": 1, "cases": cases, "limits": {"patience_s": 5}}
    (row,) = studies.run("cost_model", studies.settings("cost_model", given)).to_dict("records")
    said = "" if status == "ok" else "is predicted to take 11 s, over 2 times patience_s (5)"
    assert row["status"] == status and said in row["reason"]


@pytest.mark.parametrize(
    ("given", "said"),
    [({"methods": ["x"]}, "unknown method 'x'"), ({"rtol": 1}, "less than 1"), ({"metric": "rank"}, "rank")],
)
def test_bad_cases_are_refused(given, said):
    with pytest.raises((ValidationError, BadInput), match=said):
        studies.settings("cost_model", {"threads": 1, "cases": [{"problem": SMALL} | given]})


def test_the_default_cases_are_valid():
    for case in cost_model.CASES:
        cost_model.Case.model_validate(case.model_dump())


def test_the_configuration_has_all_problems_and_metrics_of_the_grid():
    chosen = Config.of_run([paths.ROOT / "config" / "cost_model.yaml"]).study("cost_model").cases
    grid = cells.cells(Config.of_run([paths.ROOT / "config" / "default.yaml"]))
    asked = {(problems.check(case.problem), case.metric) for case in chosen}
    assert {(cell.problem, cell.metric) for cell in grid} <= asked


def test_the_title_of_the_figure_is_what_was_found(tmp_path):
    rows = [
        {"problem": "p", "metric": "trace", "method": f"m{i}", "title": f"m{i}", "kind": kind, "status": "ok"}
        | {"reason": "", "predicted_seconds": ratio * 0.1, "seconds": 0.1, "calls": 3, "predicted_bytes": ratio * 4e6}
        | {"memory_bytes": 4e6 if i else 10.0, "predicted_passes": 10, "passes_spent": 10, "device": "cpu"}
        | {"dtype": "float32", "threads": 1, "machine": "a laptop", "git_sha": "0123456789", "git_dirty": False}
        | {"samples": None if kind == "stochastic" else 32, "N": 64}
        for i, (kind, ratio) in enumerate(
            zip(("exact", "stochastic", "approximate", "exact"), (1.2, 1.9, 0.9, 4.0), strict=True)
        )
    ]
    rows += [rows[0] | {"predicted_seconds": 0.1, "samples": 64}]
    rows += [rows[0] | {"status": "skipped", "reason": "is predicted to take 12 s", "seconds": None}] * 2
    files = figures.draw("cost_model", pd.DataFrame(rows), tmp_path)
    drawing = figures.REGISTRY.get("cost_model").draw(base.checked_study(pd.DataFrame(rows), cost_model_columns()))
    texts = [text.get_text() for text in drawing.figure.texts]
    assert "Predicted seconds: 75 % within a factor of 2, median error a factor of 1.5" in texts
    plotted = pd.read_csv(files[0])
    assert plotted["seconds_ratio"].tolist() == pytest.approx([1.2, 1.9, 0.9, 4.0])
    assert plotted["memory_ratio"].tolist() == pytest.approx([1.2 * 4e6 / 2**19, 1.9, 0.9, 4.0]), "at least half a MiB"
    assert "Left out: 1 predicted by running on all samples. Not measured: 2 predicted to take" in drawing.caption
    assert len(drawing.caption.split()) <= 60
    assert "Memory peaks: 50 % of 4 within a factor of 2; those below 0.5 MiB count as 0.5 MiB" in files[1].read_text()
    rows += [rows[0] | {"status": "timeout", "reason": "took 60 s", "method": "late", "seconds": 60.0}]
    rows += [rows[0] | {"status": "failed", "reason": "no prediction", "predicted_seconds": None}]
    drawing = figures.REGISTRY.get("cost_model").draw(base.checked_study(pd.DataFrame(rows), cost_model_columns()))
    assert drawing.title == "Predicted seconds: 60 % within a factor of 2, median error a factor of 1.5"
    assert "1 ended without seconds and count as missed." in drawing.caption and len(drawing.caption.split()) <= 60
    assert len(drawing.plotted) == 5 and "Memory peaks: 50 % of 4" in drawing.caption


def cost_model_columns() -> tuple[str, ...]:
    return figures.REGISTRY.get("cost_model").COLUMNS
