"""The study of the cost of recurrent networks against their sizes, and its figure."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from ntkbench import figures, methods, studies
from ntkbench.errors import BadInput
from ntkbench.measure import journal as journals
from ntkbench.measure.journal import Journal, Rows
from ntkbench.studies import base, recurrent_scaling

TINY = {"kinds": ["rnn"], "H": 4, "N": [2, 3], "T": [2, 4, 8], "probes": [2, 4]}
TINY |= {"middle": {"N": 2, "T": 4, "probes": 4}, "threads": 1, "device": "cpu", "calls": 3}

PROVENANCE = {"device": "cpu", "dtype": "float32", "threads": 1, "git_sha": "0123456789", "git_dirty": False}
PROVENANCE |= {"machine": "a laptop"}


def run(**changes: object) -> pd.DataFrame:
    return studies.run("recurrent_scaling", studies.settings("recurrent_scaling", TINY | changes))


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return run()


def test_one_size_at_a_time_is_varied_for_every_method(table):
    assert (table["status"] == "ok").all() and (table["seconds"] > 0).all()
    assert (table["calls"] == 3).all() and (table["seeds"] == 1).all()
    assert (table["seconds_q25"] <= table["seconds"]).all() and (table["seconds"] <= table["seconds_q75"]).all()
    for (varied, method), line in table.groupby(["varied", "method"]):
        assert line[varied].tolist() == TINY[varied]
        for size in {"N", "T", "probes"} - {varied}:
            assert set(line[size]) == {TINY["middle"][size]}, method
    without = set(recurrent_scaling.METRICS) - set(table.loc[table["varied"] == "probes", "method"])
    assert without == {"recurrent_exact_trace"}, "a method without probes was timed against them"


def test_passes_are_the_stated_costs_of_the_probes(table):
    for row in table.itertuples():
        if row.method != "recurrent_exact_trace":
            assert row.passes == methods.get(row.method).cost(row.metric, row.probes)
    exact = table[table["method"] == "recurrent_exact_trace"]
    np.testing.assert_allclose(exact["passes"], 4 * (exact["T"] + 1) / 2)  # H (T + 1) / 2, one trial's worth


def test_larger_sizes_are_left_out_once_a_method_is_slow():
    table = run(limits={"patience_s": 1e-9})
    for (varied, _), line in table.groupby(["varied", "method"]):
        assert line["status"].tolist() == ["ok"] + ["skipped"] * (len(TINY[varied]) - 1)
        assert "limits.patience_s (1e-09)" in line["reason"].iloc[-1]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"middle": {"N": 5, "T": 4, "probes": 4}}, r"middle: N must be one of those tried \(2, 3\); got 5"),
        ({"middle": {"N": 2, "T": 4}}, r"middle: probes must be one of those tried \(2, 4\); got None"),
        ({"kinds": []}, "kinds"),
    ],
)
def test_impossible_settings_are_refused(wrong, says):
    with pytest.raises(ValidationError, match=says):
        studies.settings("recurrent_scaling", TINY | wrong)


def test_a_size_that_takes_too_long_is_timed_once(monkeypatch):
    """After its first call, which also traces; it takes no more calls in turn."""
    method = type(methods.get("one_sided_reverse"))
    estimate, calls = method.estimate, []
    monkeypatch.setattr(method, "estimate", lambda *given: calls.append(1) or estimate(*given))
    table = run(N=[2], T=[4], probes=[4], limits={"patience_s": 1e-9})
    slow = table[table["method"] == "one_sided_reverse"]
    assert len(calls) == 2 * len(slow) and (slow["status"] == "ok").all() and (slow["calls"] == 1).all()
    assert (slow["seconds"] == slow["seconds_q25"]).all() and (slow["seconds"] == slow["seconds_q75"]).all()


def test_budgets_are_checked_at_the_passes_of_the_probes(monkeypatch):
    """Memory and reasons of a method may depend on the budget."""
    method, asked = type(methods.get("one_sided_reverse")), []

    def bytes_needed(self, problem, metric, target, passes=None):
        asked.append(passes)
        return 2**40 if passes and passes > self.cost(metric, 2) else 0

    def unsupported_reason(self, problem, metric, target, passes=None):
        asked.append(passes)

    monkeypatch.setattr(method, "bytes_needed", bytes_needed)
    monkeypatch.setattr(method, "unsupported_reason", unsupported_reason)
    table = run(N=[2], T=[4])
    rows = table[(table["method"] == "one_sided_reverse") & (table["varied"] == "probes")].set_index("probes")
    assert rows["status"].to_dict() == {2: "ok", 4: "out_of_memory"} and "would hold" in rows.loc[4, "reason"]
    assert None not in asked


def test_too_few_steps_are_refused_before_anything_is_timed():
    with pytest.raises(ValidationError, match=r"task flipflop needs .* T of at least 2"):
        studies.settings("recurrent_scaling", TINY | {"T": [1, 4, 8]})


def test_a_problem_that_cannot_be_made_gives_a_reason_in_each_of_its_rows(monkeypatch):
    made, tried = recurrent_scaling._problem, []

    def problem(settings, kind, N, T):
        if T == 8:
            tried.append((kind, N, T))
            raise BadInput("no trials of so many steps")
        return made(settings, kind, N, T)

    monkeypatch.setattr(recurrent_scaling, "_problem", problem)
    table = run(N=[2], T=[4, 8], probes=[4])
    lost = table[table["T"] == 8]
    assert len(lost) == len(recurrent_scaling.METRICS) and (lost["status"] == "failed").all()
    assert (lost["reason"] == "BadInput: no trials of so many steps").all()
    assert (table.loc[table["T"] != 8, "status"] == "ok").all()
    assert tried == [("rnn", 2, 8)], "what failed is not tried again"


def test_a_call_that_fails_later_is_one_failed_row_and_the_others_are_timed(monkeypatch):
    method = type(methods.get("one_sided_reverse"))
    estimate, calls = method.estimate, []

    def failing(self, prepared, metric, passes=None, seed=0):
        calls.append(prepared.problem.N)
        if prepared.problem.N == 3 and calls.count(3) > 1:
            raise ValueError("broke in its turn")
        return estimate(self, prepared, metric, passes, seed)

    monkeypatch.setattr(method, "estimate", failing)
    table = run(T=[4], probes=[4])
    lost = table["method"].eq("one_sided_reverse") & table["N"].eq(3)
    assert lost.sum() == 1 and calls.count(3) == 2
    assert table.loc[lost, "reason"].tolist() == ["ValueError: broke in its turn"]
    assert table.loc[lost, "seconds"].isna().all()
    assert (table.loc[~lost, "status"] == "ok").all() and (table.loc[~lost, "calls"] == 3).all()


def test_an_interrupted_study_resumes_with_the_same_rows(table, tmp_path, monkeypatch):
    """Interrupted before the turns of the second method; its first calls are known, but it warms up again."""
    whole = table[table["T"].eq(4) & table["probes"].eq(4)].reset_index(drop=True)

    def measured(in_turn):
        monkeypatch.setattr(base, "in_turn", in_turn)
        with Journal(tmp_path / "study.journal") as journal, journals.kept(Rows(journal, "this")):
            return run(T=[4], probes=[4])

    def stopping(case, turns, rounds):
        if case["method"] == "one_sided_reverse":
            raise KeyboardInterrupt
        return in_turn(case, turns, rounds)

    in_turn = base.in_turn
    with pytest.raises(KeyboardInterrupt):
        measured(stopping)
    again = measured(in_turn)
    kept = ["varied", "N", "T", "probes", "method", "status", "reason", "passes", "calls", "seeds"]
    pd.testing.assert_frame_equal(again[kept], whole[kept])
    assert (again["seconds"] > 0).all()
    lines = (tmp_path / "study.journal").read_text()
    assert measured(in_turn).equals(again) and (tmp_path / "study.journal").read_text() == lines


def test_the_figure_states_the_slopes_of_its_lines(table, tmp_path):
    """For seconds that are known powers of the sizes."""
    powers = {"N": 1.0, "T": 2.0, "probes": 0.5}
    known = table.assign(seconds=[row[row["varied"]] ** powers[row["varied"]] for _, row in table.iterrows()])
    known = known.assign(**PROVENANCE)
    made = figures.draw("recurrent_scaling", known, tmp_path)
    plotted = pd.read_csv(made[0])
    np.testing.assert_allclose(plotted["slope"], plotted["varied"].map(powers), rtol=1e-9)
    three = plotted["varied"] == "T"  # two points have no interval
    np.testing.assert_allclose(plotted.loc[three, "slope_interval"], 0, atol=1e-6)
    assert plotted.loc[~three, "slope_interval"].isna().all()
    said = made[1].read_text()
    assert "Exact trace against steps, expected 2 to 3: 2.00 ± 0.00 (RNN)" in said
    assert "median 2.00 (2.00 to 2.00)" in said and "3 of 3 costs surely grow faster than trials, steps" in said
    failed = known.head(1).assign(status="failed", reason="why", seconds=np.nan)
    assert "Nothing to show" in figures.draw("recurrent_scaling", failed, tmp_path / "none")[1].read_text()
