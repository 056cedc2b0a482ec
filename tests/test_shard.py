"""A shard's cells: a shard whose sources change ends, and its valid rows are kept. No asv runs here."""

import contextlib

import pytest

from ntkbench.measure import shard
from ntkbench.measure.config import Config
from ntkbench.measure.journal import Journal, rows_of
from ntkbench.measure.outcomes import Outcome
from ntkbench.measure.rows import read

LABEL = "fc_relu[N=2,O=1,width=4,depth=1]"


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Measures two cells of one problem with a fake engine, and returns the calls and the rows."""
    grid = [{"problems": [LABEL], "methods": ["hutchinson"], "metrics": ["trace", "norm"], "passes": [12]}]
    config = Config.model_validate({"profile": "shard", "threads": 1, "grid": grid, "studies": {}})
    problem = {"status": "ok", "reason": "", "exact": {"trace": 1.0, "norm": 1.0}, "N": 2, "O": 1, "P": 9, "n": 2}
    monkeypatch.setattr(shard.facts, "read", lambda config, labels, file: dict.fromkeys(labels, problem))
    monkeypatch.setattr(shard.engine, "started", lambda *_: contextlib.nullcontext())

    def measure(during):
        calls = []

        def one(asv, cell, index, work):
            calls.append(cell.metric)
            found = during(cell)
            return found or (Outcome("ok"), {"value": 3.0, "seeds": 1, "calls": 1})

        monkeypatch.setattr(shard, "_measure", one)
        output = tmp_path / "shards" / "shard-0.csv"
        shard.measure(measure.config, 0, tmp_path / "problems.json", output, tmp_path / "logs" / "cases.log")
        return calls, read(output).set_index("metric")

    measure.config = config
    return measure


def test_rows_are_measured_once(measured):
    calls, rows = measured(lambda cell: None)
    assert calls == ["trace", "norm"] and (rows["status"] == "ok").all() and (rows["value"] == 3).all()
    again, same = measured(lambda cell: None)
    assert not again and same.equals(rows)


DAMAGES = {
    "an edited value": lambda csv, journal: csv.write_text(csv.read_text().replace(",3.0,", ",4.0,", 1)),
    "an edited status": lambda csv, journal: csv.write_text(csv.read_text().replace(",ok,", ",failed,", 1)),
    "a budget that is no whole number": lambda csv, journal: csv.write_text(
        csv.read_text().replace(",12,", ",3.5,", 1)
    ),
    "a missing row": lambda csv, journal: csv.write_text("".join(csv.read_text().splitlines(True)[:-1])),
    "a cut row": lambda csv, journal: csv.write_text(csv.read_text()[:-60]),
    "a row twice": lambda csv, journal: csv.write_text(csv.read_text() + csv.read_text().splitlines(True)[-1]),
    "no table": lambda csv, journal: csv.write_bytes(b"\x00\xff"),
    "an empty file": lambda csv, journal: csv.write_text(""),
    "an edited journal": lambda csv, journal: journal.write_text(journal.read_text().replace("3.0", "4.0")),
    "no journal": lambda csv, journal: journal.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_table_that_is_not_what_the_journal_says_is_made_again(measured, tmp_path, damage):
    _, rows = measured(lambda cell: None)
    csv, journal = tmp_path / "shards" / "shard-0.csv", tmp_path / "shards" / "shard-0.journal"
    assert shard.discard_damaged(measured.config, tmp_path) == [] and csv.exists()
    DAMAGES[damage](csv, journal)
    assert shard.discard_damaged(measured.config, tmp_path) == [csv] and not csv.exists()
    left = [cell.metric for cell in shard.pending(measured.config, tmp_path)]
    assert left == (["trace", "norm"] if "journal" in damage else [])
    again, same = measured(lambda cell: None)
    assert again == left and (same["value"] == rows["value"]).all()
    assert shard.discard_damaged(measured.config, tmp_path) == []


def test_lost_rows_of_a_timeout_are_noticed(measured, tmp_path):
    measured(lambda cell: (Outcome("timeout", "slow"), {}))
    csv = tmp_path / "shards" / "shard-0.csv"
    assert shard.discard_damaged(measured.config, tmp_path) == []
    csv.with_suffix(".journal").unlink()
    assert shard.discard_damaged(measured.config, tmp_path) == [csv]
    assert len(shard.pending(measured.config, tmp_path)) == 2


def test_the_latest_row_of_a_cell_counts(measured, tmp_path):
    """Another shard's journal may have an older row of a cell, if the number of shards has changed."""
    measured(lambda cell: (Outcome("timeout", "slow"), {}))
    own = tmp_path / "shards" / "shard-0.journal"
    old = own.read_bytes()
    own.unlink()
    measured(lambda cell: None)
    for name in ("shard-1.journal", "a.journal", "z.journal"):
        own.with_name(name).write_bytes(old)
    assert shard.discard_damaged(measured.config, tmp_path) == []


def test_rows_that_no_journal_keeps_are_no_damage(measured, tmp_path, monkeypatch):
    failed = {"status": "failed", "reason": "no data", "N": None}
    monkeypatch.setattr(shard.facts, "read", lambda config, labels, file: dict.fromkeys(labels, failed))
    calls, rows = measured(lambda cell: None)
    assert not calls and set(rows["status"]) == {"failed"}
    assert shard.discard_damaged(measured.config, tmp_path) == []


@pytest.mark.parametrize(("during", "measured_then"), [("trace", ["trace"]), ("norm", ["trace", "norm"])])
def test_an_edit_of_a_cells_sources_ends_the_shard_and_the_other_rows_are_kept(
    measured, monkeypatch, during, measured_then
):
    """Of a cell that is not yet measured, and of one that is being measured."""
    made_for, edited, calls = shard.fingerprints.cell, [], []

    def now(config, cell):
        return made_for(config, cell) + "edited" * (cell.metric in edited)

    monkeypatch.setattr(shard.fingerprints, "cell", now)
    with pytest.raises(shard.fingerprints.Edited, match=r"^fc_relu.*/norm/12: .* edited during the run; start the run"):
        measured(lambda cell: calls.append(cell.metric) or (edited.append("norm") if cell.metric == during else None))
    assert calls == measured_then
    edited.clear()
    calls, rows = measured(lambda cell: None)
    assert calls == ["norm"] and (rows["status"] == "ok").all()


def test_failed_cells_of_other_shards_are_left_to_these(measured, tmp_path):
    measured(lambda cell: (Outcome("timeout", "slow"), {}))
    own, other = (tmp_path / "shards" / f"shard-{number}.journal" for number in range(2))
    with Journal(other) as kept:
        kept.finish("a cell of that shard", "this", {"status": "failed", "reason": "no"})
    measured.config = measured.config.model_copy(update={"retry": "failed"})
    calls, rows = measured(lambda cell: None)
    assert calls == ["trace", "norm"] and (rows["status"] == "ok").all()
    assert ("a cell of that shard", "this") in rows_of([other, own])
