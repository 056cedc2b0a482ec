"""Budgets that reach an error, and methods at theirs in turn."""

from __future__ import annotations

import pandas as pd
import pytest
from pydantic import ValidationError

from ntkbench import methods, problems, studies
from ntkbench.errors import DidNotTrain
from ntkbench.estimate import Estimate
from ntkbench.measure.seeds import Reruns
from ntkbench.problems.base import reference
from ntkbench.studies import base, time_to_error
from ntkbench.studies.time_to_error import Entrant, Goal, Truth

LABEL = "mlp_hazelden[N=2]"
GIVEN = {"threads": 1, "device": "cpu", "seeds": 9, "calls": 3}


def run(*goals: dict, **changes: object) -> pd.DataFrame:
    return studies.run("time_to_error", studies.settings("time_to_error", GIVEN | {"goals": list(goals)} | changes))


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    goal = {"problem": LABEL, "metric": "trace", "error": 0.1, "patience_seconds": 30}
    return run(goal, limits={"passes": 127}).set_index("method")


def test_every_method_is_a_row_with_a_budget_or_a_reason(table):
    able = {n for n in methods.names() if "torch" in methods.get(n).backends and "trace" in methods.get(n).metrics}
    assert set(table.index) == able
    done = table[table["status"] == "ok"]
    assert (done["error"] <= 0.1).all() and (done["seconds"] > 0).all() and (done["calls"] == 3).all()
    stochastic = done["kind"] == "stochastic"
    assert set(done.loc[stochastic, "seeds"]) == {9} and set(done.loc[~stochastic, "seeds"]) == {1}
    assert (done.loc[stochastic, "passes_spent"] <= done.loc[stochastic, "passes"]).all()
    left = table[table["status"] != "ok"]
    assert set(left["status"]) == {"skipped"} and left["reason"].str.len().all() and left["seconds"].isna().all()
    assert pd.isna(table.loc["structured_derivatives", "passes"])
    assert table.loc["direct", "reason"] == "would take 256 passes, over limits.passes (127)"
    assert table.loc["sum_of_logits", "status"] == "ok" or "over the goal" in table.loc["sum_of_logits", "reason"]


def test_ratios_are_to_the_fastest_published_estimator(table):
    rival = table.loc[table["published"] & table["seconds"].notna(), "seconds"].idxmin()
    assert set(table["rival"].dropna()) == {rival}
    assert table.loc[rival, "ratio"] == 1
    better, plain = table.loc["per_sample_trace"], table.loc["one_sided_reverse"]
    assert better["passes"] <= plain["passes"]


def test_ratios_are_of_the_same_round():
    rows = [{"method": name, "published": name != "ours", "seconds": 1.0} for name in ("hutchpp", "ours", "broken")]
    time_to_error._add_ratios(rows, [[1.0, 2.0, 30.0], [0.5, 1.0, 15.0], []])
    assert [row.get("ratio") for row in rows] == [1.0, 0.5, None]
    assert rows[1]["ratio_q75"] == 0.5 and rows[1]["rival"] == "hutchpp" and "rival" not in rows[2]


class Known:
    """A method whose error is c / passes, and whose calls take a stated time on a clock of its own."""

    def __init__(self, monkeypatch, c=100.0, seconds=lambda passes, call: 0.0):
        self.asked: list[int] = []
        self._c, self._seconds, self._clock = c, seconds, 0.0
        method = methods.get("hutchinson")
        monkeypatch.setattr(type(method), "estimate", lambda _, __, metric, passes, seed: self._estimate(passes))
        monkeypatch.setattr("time.perf_counter", lambda: self._clock)

    def _estimate(self, passes):
        self._clock += self._seconds(passes, len(self.asked))
        self.asked.append(passes)
        return Estimate(1 + self._c / passes, 0.1, passes, "hutchinson", (), "trace")

    def entrant(self, error, patience=1.0, **given):
        settings = time_to_error.Settings(**{"seeds": 5} | given)
        goal = Goal(problem=LABEL, metric="trace", error=error, patience_seconds=patience)
        truth = Truth(settings, goal)
        truth._found = base.Once(lambda: (1.0, 0.0))
        return Entrant(settings, goal, truth, "hutchinson")


def test_the_budget_is_the_smallest_that_is_enough_but_for_a_factor(monkeypatch):
    known = Known(monkeypatch)
    found = known.entrant(0.5).search()
    assert 200 <= found["passes"] <= 200 * time_to_error.CLOSE
    assert found["error"] == pytest.approx(100 / found["passes"])
    assert {known.asked.count(passes) for passes in set(known.asked)} == {5}, "the same seeds at every budget"
    assert max(known.asked) < 4 * 200 * time_to_error.CLOSE


def test_a_budget_that_cannot_be_enough_is_given_up_before_all_seeds_are_drawn(monkeypatch):
    known = Known(monkeypatch)
    found = known.entrant(0.5, seeds=51).search()
    drawn = {passes: known.asked.count(passes) for passes in set(known.asked)}
    assert found["seeds"] == 51 and drawn[found["passes"]] == 51
    assert {count for passes, count in drawn.items() if 100 / passes > 0.5} == {1 + time_to_error.LOOK}


def test_a_budget_is_not_given_up_for_what_chance_may_do():
    entrant = Entrant(time_to_error.Settings(), Goal(problem=LABEL, metric="trace", error=0.5), None, "hutchinson")
    tried = Reruns(1.0, "float64")
    for value in [2.0] * 9 + [1.0] * 42:
        tried.estimates.append(Estimate(value, 0.1, 1, "hutchinson", (), "trace"))
        tried.seconds.append(0.0)
        assert not entrant._is_hopeless(tried)


def test_a_budget_that_is_never_enough_says_what_was_tried(monkeypatch):
    row = base.row({}, Known(monkeypatch).entrant(0.01, most_passes=512).search)
    assert (row["status"], row["reason"]) == ("skipped", "error 0.2 with 512 passes, and no more than 512 are tried")


def test_a_method_whose_calls_take_too_long_is_given_up_after_two(monkeypatch):
    known = Known(monkeypatch, seconds=lambda passes, call: 0.1 if passes < 50 else 6.0)
    row = base.row({}, known.entrant(0.5).search)
    largest = max(known.asked)
    assert row["reason"] == f"{largest} passes take 6 s, over 5 times the goal's patience (1 s)"
    assert known.asked.count(largest) == 2


def test_a_method_that_compiles_at_its_first_call_is_not_given_up(monkeypatch):
    known = Known(monkeypatch, seconds=lambda passes, call: 60.0 if call == 0 else 0.1)
    assert known.entrant(0.5).search()["error"] <= 0.5


def test_a_method_that_takes_longer_than_the_patience_gets_no_larger_budget(monkeypatch):
    known = Known(monkeypatch, seconds=lambda passes, call: passes / 100)
    row = base.row({}, known.entrant(0.5).search)
    assert "over the goal's patience (1 s)" in row["reason"] and row["status"] == "skipped"
    assert max(known.asked) < 400


def test_an_estimate_stands_for_an_exact_value_that_cannot_be_had():
    label, error, settings = "mlp_hazelden[N=8]", 0.3, time_to_error.Settings()
    assert Truth(settings, Goal(problem=label, metric="norm", error=error)).columns()["reference_error"] == 0
    found = Truth(settings, Goal(problem=label, metric="norm", error=error, exact=False)).columns()
    assert 0 < 1.95 * found["reference_error"] <= error / 3
    exact = reference.exact(problems.load(label))["norm"]
    assert abs(found["reference"] / exact - 1) < 4 * found["reference_error"]


def test_a_reference_that_is_not_precise_enough_is_a_reason_in_each_row(monkeypatch):
    monkeypatch.setattr(time_to_error, "REFERENCE_PASSES", 4)
    table = run({"problem": LABEL, "metric": "alignment", "error": 1e-4, "exact": False})
    tried = table[table["status"] != "skipped"]
    assert len(tried) > 5 and tried["reason"].str.contains(r"no reference for mlp_hazelden\[N=2\]: 4 passes did").all()


def test_a_problem_that_does_not_train_is_a_reason_in_each_row(monkeypatch):
    tried = []

    def load(label):
        tried.append(label)
        raise DidNotTrain("not there yet")

    monkeypatch.setattr(problems, "load", load)
    table = run({"problem": LABEL, "metric": "trace", "error": 0.1})
    assert set(table["reason"]) == {"DidNotTrain: not there yet"} and len(table) > 20 and tried == [LABEL]


def test_every_goal_can_be_asked_for_in_a_configuration():
    given = [goal.model_dump() for goal in time_to_error.GOALS]
    assert studies.settings("time_to_error", {"goals": given}).goals == time_to_error.GOALS
    assert set(time_to_error.AS_PUBLISHED) <= set(methods.names())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"problem": "fc", "metric": "trace", "error": 1}, "unknown problem 'fc'"),
        ({"problem": LABEL, "metric": "tracer", "error": 1}, "did you mean 'trace'"),
        ({"problem": LABEL, "metric": "trace", "error": 0}, "greater than 0"),
        ({"problem": LABEL, "metric": "trace"}, "error"),
    ],
)
def test_goals_that_cannot_be_are_refused(wrong, says):
    with pytest.raises(ValidationError, match=says):
        run(wrong)
