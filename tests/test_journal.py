"""Rows on disk: interrupted runs resume after their last row, and stale rows do not count."""

import math

import numpy as np
import pytest

from ntkbench.errors import NtkbenchError
from ntkbench.measure import journal as journals
from ntkbench.measure import outcomes
from ntkbench.measure.journal import Journal, Rows
from ntkbench.studies import base

OK = {"status": "ok", "reason": ""}


def measured(path, values, made_for="this", stop_at=None):
    """Rows of cases 0, 1, ... and the values measured; reaching ``stop_at`` raises KeyboardInterrupt."""
    calls = []

    def measure(value):
        calls.append(value)
        if value == stop_at:
            raise KeyboardInterrupt
        return {"seconds": np.float64(value) / 3, "count": np.int64(2), "none": math.nan}

    with Journal(path) as journal, journals.kept(Rows(journal, made_for)):
        try:
            made = [base.row({"m": i}, lambda value=value: measure(value)) for i, value in enumerate(values)]
        except KeyboardInterrupt:
            made = None
    return made, calls


def test_finished_rows_are_not_measured_again(tmp_path):
    path = tmp_path / "study.journal"
    assert measured(path, [1, 2, 3], stop_at=3) == (None, [1, 2, 3])
    made, calls = measured(path, [10, 20, 30])
    assert calls == [30]
    assert [row["seconds"] for row in made] == [1 / 3, 2 / 3, 10.0]
    assert math.isnan(made[0]["none"])


def test_rows_with_another_fingerprint_are_ignored_and_kept(tmp_path):
    path = tmp_path / "study.journal"
    measured(path, [1, 2])
    assert measured(path, [1, 2], made_for="that")[1] == [1, 2]
    assert measured(path, [1, 2])[1] == []


@pytest.mark.parametrize(
    "edit", [(b"0.3333", b"0.8333"), (b'"row": {', b'"row": [1], "x": {'), (b'"key": "', b'"key": 1, "x": "')]
)
def test_a_changed_line_is_not_an_entry(tmp_path, edit):
    path = tmp_path / "study.journal"
    measured(path, [1, 2])
    path.write_bytes(path.read_bytes().replace(*edit))
    made, calls = measured(path, [1, 2])
    assert 1 in calls and made[0]["seconds"] == 1 / 3


def test_rows_of_this_run_can_be_taken_back(tmp_path):
    path = tmp_path / "study.journal"
    measured(path, [1])
    with Journal(path) as journal, journals.kept(rows := Rows(journal, "this")):
        made = [base.row({"m": i}, lambda: {"seconds": 5}) for i in range(2)]
        rows.take_back({"status": "failed", "reason": "edited"})
    assert [row["status"] for row in made] == ["ok", "failed"]
    assert [row["status"] for row in journals.rows_of([path]).values()] == ["ok", "failed"]


@pytest.mark.parametrize("cut", range(2, 40, 3))
def test_an_incomplete_line_is_not_an_entry(tmp_path, cut):
    path = tmp_path / "study.journal"
    measured(path, [1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    made, calls = measured(path, [1, 5])
    assert calls == [5]
    assert measured(path, [7, 7])[0] == made


@pytest.mark.parametrize("content", [b"", b"\x00\xff\n", b"[]\n", b'"text"\n', b"{}\n", b"3\nnull\n"])
def test_a_file_that_is_not_a_journal_counts_as_empty(tmp_path, content):
    path = tmp_path / "study.journal"
    path.write_bytes(content)
    assert measured(path, [1])[1] == [1]
    assert measured(path, [1])[1] == []


def test_equal_cases_are_told_apart_by_their_order(tmp_path):
    path = tmp_path / "study.journal"
    for _ in range(2):
        with Journal(path) as journal, journals.kept(Rows(journal, "this")):
            made = [base.row({"m": 1}, lambda i=i: {"value": i}) for i in range(3)]
        assert [row["value"] for row in made] == [0, 1, 2]


def test_two_processes_do_not_write_to_one_journal(tmp_path):
    path = tmp_path / "study.journal"
    with Journal(path), pytest.raises(NtkbenchError, match="another process is measuring"):
        Journal(path)
    Journal(path).close()


def test_the_unfinished_row_is_known_after_an_interruption(tmp_path):
    path = tmp_path / "study.journal"
    with Journal(path) as journal:
        journal.begin("a", "this")
        journal.finish("a", "this", OK)
        journal.begin("b", "this")
    with Journal(path) as journal:
        assert journal.begun == "b"
        journal.finish("b", "this", OK)
    with Journal(path) as journal:
        assert journal.begun is None


def test_an_unfinished_row_can_be_forgotten_and_finished_ones_stay(tmp_path):
    path = tmp_path / "study.journal"
    with Journal(path) as journal:
        journal.finish("a", "this", OK)
        journal.begin("a", "this")
    with Journal(path) as journal:
        journal.forget_begun()
        assert journal.begun is None
    assert journals.begun(path) is None and journals.rows_of([path]) == {("a", "this"): OK}


@pytest.mark.parametrize(("is_timed", "where"), [(True, "ab"), (False, "a")])
def test_a_row_is_measured_again_in_another_place_if_one_is_given(tmp_path, is_timed, where):
    done = []
    for machine in "abb":
        whence = {"machine": machine, "device": "cpu"}
        rows = {"whence": whence, "place": whence if is_timed else None}
        with Journal(tmp_path / "study.journal") as journal, journals.kept(Rows(journal, "this", **rows)):
            made = base.row({"m": 1}, lambda machine=machine: done.append(machine) or {})
        assert made["machine"] == done[-1]
    assert "".join(done) == where


def test_failed_rows_are_dropped_on_request(tmp_path):
    path = tmp_path / "study.journal"
    with Journal(path) as journal:
        for status in outcomes.STATUSES:
            journal.finish(status, "this", {"status": status, "reason": ""})
        journal.drop(outcomes.PASSING)
    with Journal(path) as journal:
        assert [s for s in outcomes.STATUSES if journal.row(s, "this")] == ["ok", "skipped"]


def test_only_failed_rows_of_given_keys_are_dropped(tmp_path):
    with Journal(tmp_path / "a.journal") as journal:
        for key in "xy":
            journal.finish(key, "this", {"status": "failed", "reason": ""})
        journal.drop(outcomes.PASSING, {"x"})
        assert journal.row("x", "this") is None and journal.row("y", "this") is not None


def test_the_latest_of_what_several_journals_say_counts_in_any_order(tmp_path):
    first, second = tmp_path / "first.journal", tmp_path / "second.journal"
    with Journal(first) as journal:
        journal.finish("x", "this", {"status": "failed", "reason": ""})
        journal.drop(outcomes.PASSING)
    with Journal(second) as journal:
        journal.finish("x", "this", OK)
    assert journals.rows_of([first, second]) == journals.rows_of([second, first]) == {("x", "this"): OK}


def test_a_journal_keeps_its_order_if_the_clock_is_set_back(tmp_path, monkeypatch):
    times = iter([7.0, 5.0])
    monkeypatch.setattr(journals.time, "time", lambda: next(times))
    with Journal(tmp_path / "a.journal") as journal:
        journal.finish("x", "this", {"status": "failed", "reason": ""})
        journal.drop(outcomes.PASSING)
    assert journals.rows_of([journal.path]) == {}


def test_rows_of_other_journals_are_used(tmp_path):
    with Journal(tmp_path / "one.journal") as journal:
        journal.finish("a", "this", OK)
    with Journal(tmp_path / "two.journal", [tmp_path / "one.journal"]) as journal:
        assert journal.row("a", "this") == OK
        assert journal.begun is None
    assert list(journals.rows_of([tmp_path / "one.journal"])) == [("a", "this")]


def test_a_full_disk_is_reported_in_one_line(tmp_path, monkeypatch):
    with Journal(tmp_path / "study.journal") as journal:
        monkeypatch.setattr(journal, "_file", open("/dev/full", "w", encoding="utf-8"))  # noqa: SIM115
        with pytest.raises(NtkbenchError, match=r"study\.journal cannot be written: No space left on device"):
            journal.finish("a", "this", OK)
