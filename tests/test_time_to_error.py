"""Budgets that reach an error, and methods at theirs in turn."""

import pandas as pd
import pytest
from click.testing import CliRunner

from benchmarks.comparisons import time_to_error
from benchmarks.comparisons.time_to_error import Goal, measure


@pytest.fixture(scope="module")
def rows():
    return pd.DataFrame(measure(Goal("mlp_hazelden[N=2]", "trace", 0.1), 1, 0.01)).set_index("method")


def test_every_method_is_a_row_with_a_budget_or_a_reason(rows):
    from ntkbench import methods

    able = {n for n in methods.names() if "torch" in methods.get(n).backends and "trace" in methods.get(n).metrics}
    assert set(rows.index) == able
    done = rows[rows["reason"] == ""]
    assert (done["error"] <= 0.1).all()
    assert (done["seconds"] > 0).all()
    assert set(rows.index[rows["reason"] != ""]) == set(rows.index[rows["seconds"].isna()])
    assert pd.isna(rows.loc["structured_derivatives", "passes"])
    assert "passes" in rows.loc["direct", "reason"] or rows.loc["direct", "reason"] == ""


def test_ratios_are_to_the_fastest_published_estimator(rows):
    rival = rows.loc[rows["published"] & rows["seconds"].notna(), "seconds"].idxmin()
    assert set(rows["rival"].dropna()) == {rival}
    assert rows.loc[rival, "ratio"] == 1
    better, plain = rows.loc["per_sample_trace"], rows.loc["one_sided_reverse"]
    assert better["passes"] <= plain["passes"]


def test_an_estimate_stands_for_an_exact_value_that_cannot_be_had():
    from ntkbench import problems
    from ntkbench.problems.base import reference

    label, error = "mlp_hazelden[N=8]", 0.3
    assert time_to_error._reference(Goal(label, "norm", error))[1] == 0
    value, uncertainty = time_to_error._reference(Goal(label, "norm", error, exact=False))
    assert 0 < 1.95 * uncertainty <= error / 3
    assert abs(value / reference.exact(problems.load(label))["norm"] - 1) < 4 * uncertainty


def test_goals_exist():
    from ntkbench import methods, metrics, problems

    for goal in time_to_error.GOALS:
        problems.check(goal.problem)
        metrics.check(goal.metric)
    for name in time_to_error.AS_PUBLISHED:
        assert methods.get(name)


def test_an_unknown_problem_is_named(tmp_path):
    done = CliRunner().invoke(time_to_error.main, ["--output", str(tmp_path / "t.csv"), "--problem", "fc"])
    assert done.exit_code == 1
    assert "unknown problem 'fc'" in done.output
