"""Shared parts of studies: rows that are kept whatever fails, set-ups that are made once, calls that take turns."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys

import numpy as np
import pandas as pd
import psutil
import pytest

from ntkbench.errors import Unavailable
from ntkbench.measure import fingerprints, outcomes
from ntkbench.measure import journal as journals
from ntkbench.measure.config import Config
from ntkbench.measure.journal import Journal, Rows
from ntkbench.measure.limits import Limits
from ntkbench.studies import base
from ntkbench.studies.base import runner


def raising(error):
    def measure():
        raise error

    return measure


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Unavailable("not here"), "skipped", "not here"),
        (MemoryError("many bytes"), "out_of_memory", "MemoryError: many bytes"),
        (ValueError("one\ntwo"), "failed", "ValueError: one"),
        (SystemExit(3), "failed", "SystemExit: 3"),
    ],
)
def test_a_failure_is_a_row_with_its_reason_and_without_counts(error, status, reason):
    made = base.table([base.row({"m": 1}, raising(error)), base.row({"m": 2}, lambda: {"calls": 3})])
    assert made.loc[0, ["m", "status", "reason"]].tolist() == [1, status, reason]
    assert made.loc[0, ["seeds", "calls"]].isna().all()
    assert made.loc[1, ["status", "seeds", "calls"]].tolist() == ["ok", 1, 3]


def test_a_value_that_cannot_be_kept_is_a_failed_row(tmp_path):
    with Journal(tmp_path / "j") as journal, journals.kept(Rows(journal, "this")):
        made = base.row({"m": 1}, lambda: {"x": object()})
    assert (made["status"], made["reason"]) == ("failed", "TypeError: object cannot be kept in a journal")


def test_an_interrupt_is_not_a_row():
    with pytest.raises(KeyboardInterrupt):
        base.row({}, raising(KeyboardInterrupt()))


def test_a_case_that_cannot_be_encoded_is_printed_escaped(capsys):
    base.row({"title": "a\ud800\nb"}, dict)
    assert capsys.readouterr().out.encode("utf-8").startswith(b"a\\ud800: ok after")


def test_rows_of_one_measurement_all_have_its_reason():
    parts = [{"kernel": "a"}, {"kernel": "b"}]
    good = base.rows({"step": 1}, lambda: [{**part, "x": i} for i, part in enumerate(parts)], parts)
    assert [(row["kernel"], row["x"], row["status"]) for row in good] == [("a", 0, "ok"), ("b", 1, "ok")]
    lost = base.rows({"step": 1}, raising(ValueError("no")), parts)
    assert [(row["kernel"], row["reason"]) for row in lost] == [("a", "ValueError: no"), ("b", "ValueError: no")]
    assert base.rows({"step": 1}, raising(ValueError("no")))[0]["reason"] == "ValueError: no"


def test_rows_of_one_measurement_are_kept_together(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return [{"x": np.float64(1.5)}, {"x": np.int64(2)}]

    found = []
    for _ in range(2):
        with Journal(tmp_path / "j") as journal, journals.kept(Rows(journal, "this")):
            found.append(base.rows({"step": 1}, measure))
    assert found[0] == found[1] and len(calls) == 1


def test_a_set_up_is_made_once_and_fails_once():
    calls = []

    def make():
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("no")
        return object()

    good, bad = base.Once(make), base.Once(make)
    assert good() is good()
    reasons = {base.row({"m": m}, lambda: {"x": bad()})["reason"] for m in range(3)}
    assert reasons == {"ValueError: no"} and len(calls) == 2


def test_calls_take_turns_after_their_first_call_and_one_that_fails_leaves_the_others():
    order, rows = [], [{"name": name, "status": "ok", "seconds": 1.0} for name in "abc"]

    def call(name):
        order.append(name)
        if name == "b" and order.count("b") == 2:
            raise MemoryError("full")

    turns = [
        base.Turn(row["name"], row, functools.partial(call, row["name"]), functools.partial(call, row["name"].upper()))
        for row in rows
    ]
    times = base.in_turn({"line": 1}, turns, 3)
    assert "".join(order) == "ABCabcabcac"
    assert [len(own) for own in times] == [3, 0, 3]
    assert [row.get("calls") for row in rows] == [3, None, 3]
    assert rows[1] == {"name": "b", "status": "out_of_memory", "reason": "MemoryError: full"}
    assert rows[0]["seconds_q25"] <= rows[0]["seconds"] <= rows[0]["seconds_q75"]


def test_turns_are_kept_and_warm_up_only_where_they_are_measured(tmp_path):
    def once(warmed):
        row = {"status": "ok"}
        with Journal(tmp_path / "j") as journal, journals.kept(Rows(journal, "this")):
            return base.in_turn({"line": 1}, [base.Turn("one", row, int, lambda: warmed.append(1))], 2), row

    warmed: list[int] = []
    assert once(warmed) == once(warmed) and warmed == [1]
    with (tmp_path / "j").open() as file:
        kept = [json.loads(line.partition(" ")[2]) for line in file]
    assert [bool(line.get("row")) for line in kept] == [False, True]


def test_turns_that_were_ended_from_outside_give_a_reason_in_each_row(tmp_path):
    """The runner writes the row of the turns in their place."""
    path, ended = tmp_path / "j", {"status": "timeout", "reason": "not done"}
    rows = [{"status": "ok", "seconds": 1.0} for _ in range(2)]
    never = lambda: pytest.fail("called")  # noqa: E731
    turns = [base.Turn(name, row, never, never) for name, row in zip("ab", rows, strict=True)]
    with Journal(path) as journal:
        kept = Rows(journal, "this")
        case = {"line": 1, "turns": ["a", "b"]}
        kept.finish(kept.key(case), {**case, **ended}, 0.0)
    with Journal(path) as journal, journals.kept(Rows(journal, "this")):
        assert base.in_turn({"line": 1}, turns, 3) == [[], []]
    assert rows == [ended] * 2


def timed_in_turn(path, names, failing=None, drop=()):
    """The calls made for some turns, with their rows; those in ``failing`` raise an exception."""
    made, rows = [], [{"name": name, "status": "ok"} for name in names]

    def call(name):
        made.append(name)
        if error := (failing or {}).get(name):
            raise error

    turns = [base.Turn(row["name"], row, lambda row=row: call(row["name"]), int) for row in rows]
    with Journal(path) as journal:
        journal.drop(drop)
        with journals.kept(Rows(journal, "this")):
            base.in_turn({"line": 1}, turns, 1)
    return "".join(made), rows


def test_turns_of_which_one_failed_are_timed_again_if_that_is_asked_for(tmp_path):
    path = tmp_path / "j"
    made, rows = timed_in_turn(path, "abc", {"b": ValueError("no")})
    assert made == "abc" and [row["status"] for row in rows] == ["ok", "failed", "ok"]
    made, again = timed_in_turn(path, "abc")
    assert made == "" and again == rows, "resumed with the times of the others"
    made, again = timed_in_turn(path, "abc", drop=outcomes.PASSING)
    assert made == "abc" and {row["status"] for row in again} == {"ok"} and all(row["calls"] == 1 for row in again)
    assert timed_in_turn(path, "abc", drop=outcomes.PASSING)[0] == "", "none has failed"


@pytest.mark.parametrize(
    ("failing", "again"),
    [({"a": Unavailable("not here")}, ""), ({"a": Unavailable("not here"), "b": ValueError("no")}, "ab")],
)
def test_turns_are_timed_again_only_if_an_outcome_may_change(tmp_path, failing, again):
    timed_in_turn(tmp_path / "j", "ab", failing)
    assert timed_in_turn(tmp_path / "j", "ab", drop=outcomes.PASSING)[0] == again


def test_times_of_other_calls_are_not_taken_by_their_place(tmp_path):
    assert timed_in_turn(tmp_path / "j", "abc")[0] == "abc"
    assert timed_in_turn(tmp_path / "j", "abx")[0] == "abx"
    assert timed_in_turn(tmp_path / "j", "abc")[0] == ""


def test_times_that_were_taken_back_are_not_used(tmp_path):
    path, row = tmp_path / "j", {"status": "ok"}
    with Journal(path) as journal, journals.kept(rows := Rows(journal, "this")):
        base.in_turn({"line": 1}, [base.Turn("a", row, int, int)], 2)
        rows.take_back(outcomes.EDITED.columns())
    with Journal(path) as journal, journals.kept(Rows(journal, "this")):
        assert base.in_turn({"line": 1}, [base.Turn("a", row, int, int)], 2) == [[]]
    assert row["reason"] == outcomes.EDITED.reason


def test_a_set_up_that_ends_the_process_is_the_reason_in_each_row():
    ready = base.Once(lambda: sys.exit("no"))
    rows = [base.row({"m": m}, lambda: {"x": ready()}) for m in range(2)]
    assert [row["reason"] for row in rows] == ["SystemExit: no"] * 2


# --- entries of the journal as rows of a table


def test_rows_of_one_measurement_stay_in_the_journal_when_they_are_taken_back(tmp_path):
    path = tmp_path / "j"
    with Journal(path) as journal, journals.kept(rows := Rows(journal, "this")):
        base.rows({"step": 1}, lambda: [{"x": 1}, {"x": 2}])
        rows.take_back({"status": "failed", "reason": "edited"})
    (entry,) = journals.rows_of([path]).values()
    assert entry["rows"] == [{"x": 1}, {"x": 2}]
    found = base.unfolded(entry)
    assert [(row["step"], row["x"], row["reason"]) for row in found] == [(1, 1, "edited"), (1, 2, "edited")]


def test_columns_that_are_named_like_those_of_the_journal_are_kept():
    assert base.unfolded({"rows": 7, "turns": 2}) == [{"rows": 7, "turns": 2}]


@pytest.fixture
def study(monkeypatch):
    """Measures a study with the given function in its place, in this process."""
    monkeypatch.setattr(runner.watchdog, "end_with_parent", lambda: None)
    monkeypatch.setattr(runner.timing, "use_threads", lambda *_, **__: None)
    given = {"profile": "test", "threads": 1, "device": "cpu", "grid": [], "studies": {"training": {}}}

    def measured(run, output):
        monkeypatch.setattr(runner.studies, "run", lambda name, chosen: base.table(run()))
        runner.measure_rows(Config.check(given, "test.yaml"), "training", output)
        return pd.read_csv(output)

    return measured


def rows_and_turns():
    yield from base.rows({"step": 1}, lambda: [{"x": 1.0}, {"x": 2.0}])
    row = base.row({"step": 2}, lambda: {"x": 3.0})
    base.in_turn({"line": 1}, [base.Turn("a", row, int, int)], 2)
    yield row


def test_a_study_that_fails_between_rows_keeps_the_values_of_its_rows(study, tmp_path):
    def run():
        yield from rows_and_turns()
        raise RuntimeError("between rows")

    whole = study(rows_and_turns, tmp_path / "studies" / "whole.csv")
    table = study(run, tmp_path / "studies" / "part.csv")
    assert table["x"].tolist()[:3] == [1.0, 2.0, 3.0] == whole["x"].tolist()
    assert not {"rows", "turns", "times"} & set(table) and len(table) == 4
    assert table["status"].tolist() == ["ok"] * 3 + ["failed"] and table["calls"].tolist()[2] == 2
    assert table["reason"].tolist()[3] == "RuntimeError: between rows"


def test_a_study_whose_process_dies_between_rows_goes_on_as_long_as_rows_are_finished(tmp_path, monkeypatch):
    output, start = tmp_path / "studies" / "training.csv", psutil.Popen
    given = {"profile": "test", "threads": 1, "device": "cpu", "grid": [], "studies": {"training": {}}}
    config = Config.check(given, "test.yaml")
    ok = {"status": "ok", "reason": ""}
    left = [[{"step": 1, **ok, "rows": [{"x": 1.0}, {"x": 2.0}]}], [{"turns": ["a"], **ok, "times": [[1.0]]}], []]

    def process(command):
        with Journal(output.with_suffix(".journal")) as journal:
            for entry in left.pop(0):
                journal.finish(json.dumps(entry), fingerprints.study(config, "training"), entry)
        return start([sys.executable, "-c", "raise SystemExit(3)"])

    monkeypatch.setattr(psutil, "Popen", process)
    monkeypatch.setattr(runner.watchdog, "step", lambda: contextlib.nullcontext("no mark"))
    runner.measure(config, tmp_path / "test.yaml", "training", output)
    table = pd.read_csv(output)
    assert left == [] and table["x"].tolist()[:2] == [1.0, 2.0] and not {"rows", "turns", "times"} & set(table)
    assert table["reason"].tolist()[2:] == ["the process ended with exit status 3 and without a result"]


def test_an_empty_table_has_columns_of_counts():
    assert list(base.table([])) == ["seeds", "calls"]
    assert base.table([{"seeds": 2}])["seeds"].dtype == pd.Int64Dtype()


def test_rows_have_their_time_limit_and_the_time_between_rows_that_of_a_problem(tmp_path):
    """Even where entries are written at the same moment."""
    file, limits = tmp_path / "study.journal", Limits(time_s=5, problem_s=50)
    with Journal(file) as journal:
        clock = runner._Clock(psutil.Process(), file, limits)
        (before,) = clock()
        assert before.seconds == 50
        moment = file.stat().st_mtime_ns
        for write, seconds in (
            (lambda: journal.begin("row", "this"), 5),
            (lambda: journal.finish("row", "this", {"status": "ok"}), 50),
            (lambda: journal.begin("another", "this"), 5),
        ):
            write()
            os.utime(file, ns=(moment, moment))
            (now,) = clock()
            assert now.seconds == seconds and now.since > before.since and clock() == [now]
            before = now


def test_an_unfinished_row_of_an_earlier_run_is_not_blamed_for_a_process_that_dies(tmp_path, monkeypatch):
    output, start = tmp_path / "studies" / "training.csv", psutil.Popen
    with Journal(output.with_suffix(".journal")) as journal:
        journal.begin(json.dumps({"gain": 1.0}), "of other settings")
    monkeypatch.setattr(psutil, "Popen", lambda command: start([sys.executable, "-c", "raise SystemExit(3)"]))
    monkeypatch.setattr(runner.watchdog, "step", lambda: contextlib.nullcontext("no mark"))
    given = {"profile": "test", "threads": 1, "device": "cpu", "grid": [], "studies": {"training": {}}}
    runner.measure(Config.check(given, "test.yaml"), tmp_path / "test.yaml", "training", output)
    (row,) = pd.read_csv(output).to_dict("records")
    assert (row["status"], row["reason"]) == ("failed", "the process ended with exit status 3 and without a result")
    assert "gain" not in row


def test_rows_of_a_study_with_seconds_are_of_one_machine_and_device():
    whence = {"machine": "a laptop", "device": "cpu", "python": "3.13"}
    assert runner._place("novak_time", whence) == {"machine": "a laptop", "device": "cpu"}
    assert runner._place("training", whence) == {}
