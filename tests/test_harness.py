"""Executions and their records, whatever becomes of them."""

import json

import pytest

from ntkbench import methods
from ntkbench.measure import execution
from ntkbench.measure.execution import Execution, Refused
from ntkbench.measure.grid import Cell, Config

CELL = Cell("digits_conv[N=3]", "one_sided_reverse", "torch", "trace", 8)


@pytest.fixture(autouse=True)
def unwatched(monkeypatch):
    """These executions share the tests' process, which is not to be killed, nor kept to fewer cores from then on."""
    monkeypatch.setattr("ntkbench.measure.watchdog.guard", lambda *limits: None)
    monkeypatch.setattr("os.sched_setaffinity", lambda *cores: None)
    monkeypatch.setenv("NTKBENCH_MEMORY_LIMIT", "0")


@pytest.fixture
def config():
    block = {"problems": [CELL.problem], "methods": [CELL.method], "metrics": ["trace"], "passes": [8]}
    return Config.check({"profile": "test", "threads": 1, "seeds": 7, "device": "cpu", "grid": [block]}, "test.yaml")


def recorded(records, aspect, cell=CELL):
    return execution.read(execution.record_file(records, cell, aspect))


def test_accuracy_keeps_every_seed_and_returns_the_median_error(tmp_path, config):
    execution = Execution.begin(CELL, config, "accuracy", tmp_path)
    assert recorded(tmp_path, "accuracy")["status"] == "started"
    error = execution.error()
    execution.end()
    record = recorded(tmp_path, "accuracy")
    assert record["status"] == "ok"
    assert len(record["estimates"]) == len(record["standard_errors"]) == len(set(record["estimates"])) == 7
    assert error == sorted(abs(e - record["reference"]) / record["reference"] for e in record["estimates"])[3]
    assert record["passes_spent"] == execution.passes == 8
    assert record["first_call_seconds"] == execution.first_call_seconds > 0
    assert record["gpu_peak_bytes"] is None


def test_fewer_seeds_where_they_take_long_but_never_under_five(tmp_path, config):
    execution = Execution.begin(CELL, config.model_copy(update={"error_seconds": 1e-9}), "accuracy", tmp_path)
    execution.error()
    execution.end()
    assert len(recorded(tmp_path, "accuracy")["estimates"]) == 5


def test_memory_notes_the_baseline_before_anything_is_computed(tmp_path, config):
    execution = Execution.begin(CELL, config, "memory", tmp_path)
    execution.recorded_estimate()
    execution.end()
    assert recorded(tmp_path, "memory")["baseline_bytes"] > 2**20


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("matrix is odd\nmore"), "failed", "ValueError: matrix is odd"),
        (MemoryError("no room"), "out_of_memory", "MemoryError: no room"),
        (RuntimeError("CUDA out of memory. Tried"), "out_of_memory", "RuntimeError: CUDA out of memory. Tried"),
    ],
)
def test_a_failure_is_recorded_with_its_reason_and_stops_later_aspects(
    tmp_path, config, monkeypatch, error, status, reason
):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(methods.get(CELL.method).__class__, "estimate", fail)
    with pytest.raises(type(error)):
        Execution.begin(CELL, config, "accuracy", tmp_path)
    assert recorded(tmp_path, "accuracy") == {"status": status, "reason": reason}
    with pytest.raises(Refused, match=f"accuracy ended with {status}"):
        Execution.begin(CELL, config, "memory", tmp_path)


def test_a_refused_cell_is_recorded_as_skipped(tmp_path, config):
    with pytest.raises(Refused, match="over max_passes"):
        Execution.begin(CELL, config.model_copy(update={"max_passes": 4}), "accuracy", tmp_path)
    assert recorded(tmp_path, "accuracy")["status"] == "skipped"


def test_the_watchdogs_verdict_comes_before_the_record(tmp_path):
    file = execution.record_file(tmp_path, CELL, "seconds")
    file.write_text(json.dumps({"status": "started"}))
    file.with_suffix(".verdict").write_text(json.dumps({"status": "timeout", "reason": "too long"}))
    assert execution.read(file) == {"status": "timeout", "reason": "too long"}
