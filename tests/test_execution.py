"""Executions and their records, for every way that they end."""

import os

import pytest

from ntkbench import methods, operators, problems
from ntkbench.errors import NtkbenchError, Unavailable
from ntkbench.measure import execution, timing
from ntkbench.measure.cells import Cell
from ntkbench.measure.config import Config
from ntkbench.measure.execution import Execution
from ntkbench.measure.seeds import BadEstimate

CELL = Cell("digits_conv[N=3]", "one_sided_reverse", "torch", "trace", 8, seeds=7, calls=2)


@pytest.fixture(autouse=True)
def in_the_tests_process(monkeypatch):
    """Executions run in the tests' process, which must keep its CPU affinity and signal handlers."""
    monkeypatch.setattr("os.sched_setaffinity", lambda *cores: None)
    monkeypatch.setattr("signal.signal", lambda *handler: None)


@pytest.fixture
def config():
    block = {"problems": [CELL.problem], "methods": [CELL.method], "metrics": ["trace"], "passes": [8]}
    return Config.check({"profile": "test", "threads": 1, "device": "cpu", "grid": [block]}, "test.yaml")


@pytest.fixture
def record(tmp_path):
    return execution.record_file(tmp_path, 3, "seconds")


def failing(monkeypatch, fail):
    monkeypatch.setattr(type(methods.get(CELL.method)), "estimate", fail)


def test_errors_are_over_the_cells_seeds_with_the_first_call_among_them(config, record):
    made = Execution(CELL, config, record)
    made.first_call()
    made.errors()
    kept = execution.read(record)
    assert kept["seeds"] == 7 and kept["passes_spent"] == 8 and kept["first_call_seconds"] > 0
    values = [made.estimate(seed).value for seed in range(7)]
    assert kept["value"] == sorted(values)[3]
    assert kept["error"] == sorted(abs(v - kept["reference"]) / kept["reference"] for v in values)[3]


def test_given_exact_values_are_used(config, record):
    made = Execution(CELL, config, record)
    made.first_call()
    made.errors({"trace": 1e9, "effective_rank": 2.0})
    kept = execution.read(record)
    assert kept["reference"] == 1e9 and kept["effective_rank"] == 2.0 and kept["error"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("later", "kept"), [(60, 60), (100, None)])
def test_a_peak_on_a_gpu_is_recorded_only_if_it_is_that_of_the_call(config, record, monkeypatch, later, kept):
    """JAX cannot reset its peak, which is then that of the first call."""
    made = Execution(CELL, config, record)
    made.settle()
    peaks = iter([10 if kept else 100, later])
    monkeypatch.setattr(operators, "device_memory", lambda target: next(peaks, later))
    made.call_for_peak()
    assert execution.read(record)["gpu_peak_bytes"] == kept


def test_exact_values_of_other_weights_or_inputs_are_refused(config, record):
    with pytest.raises(
        NtkbenchError, match=r"digits_conv\[N=3\] has other weights or inputs than when its exact values"
    ):
        Execution(CELL, config, record, "of another network")
    assert execution.read(record)["status"] == "failed"
    Execution(CELL, config, record, problems.load(CELL.problem).contents())


def test_memory_notes_the_bytes_held_before_the_call(config, record):
    made = Execution(CELL, config, record)
    made.settle()
    made.call_for_peak()
    kept = execution.read(record)
    assert kept["baseline_bytes"] > 2**20 and kept["memory_seconds"] > 0 and kept["gpu_peak_bytes"] is None


def test_memory_is_that_of_a_later_call(config, record, monkeypatch):
    """Every method has then traced and compiled; peaks of earlier work do not count."""
    done = []
    made = Execution(CELL, config, record)
    estimate = made.estimate
    monkeypatch.setattr(made, "estimate", lambda: done.append("call") or estimate())
    monkeypatch.setattr(timing, "settle_memory", lambda: done.append("settle"))
    monkeypatch.setattr(operators, "reset_device_memory", lambda target: done.append("reset"))
    made.settle()
    made.call_for_peak()
    assert done == ["call", "settle", "reset", "call"]
    assert execution.read(record)["first_call_seconds"] > 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("matrix is odd\nmore"), "failed"),
        (MemoryError("no room"), "out_of_memory"),
        (SystemExit(3), "failed"),
    ],
)
def test_a_failure_is_recorded_at_once(config, record, monkeypatch, error, status):
    def fail(*arguments):
        raise error

    failing(monkeypatch, fail)
    made = Execution(CELL, config, record)
    with pytest.raises(type(error)):
        made.first_call()
    kept = execution.read(record)
    assert kept["status"] == status and kept["reason"].startswith(type(error).__name__)


def test_a_failure_after_the_first_call_is_recorded_too(config, record, monkeypatch):
    made = Execution(CELL, config, record)
    made.first_call()
    failing(monkeypatch, lambda *arguments: 3.0)
    with pytest.raises(BadEstimate):
        made.errors()
    assert execution.read(record)["reason"] == "BadEstimate: the method returned a float, not an Estimate"


def test_a_cell_that_is_left_out_is_recorded_as_skipped(config, record):
    cell = Cell("digits_conv[N=3]", "one_sided_reverse", "torch", "trace", 1)
    with pytest.raises(Unavailable, match="at least"):
        Execution(cell, config, record)
    assert execution.read(record)["status"] == "skipped"


def test_a_missing_problem_is_recorded(config, record, monkeypatch):
    monkeypatch.delenv("NTKBENCH_DATA", raising=False)
    with pytest.raises(Unavailable):
        Execution(Cell("mnist_mlp[N=3]", CELL.method, "torch", "trace", 8), config, record)
    assert execution.read(record)["status"] == "skipped" and "MNIST" in execution.read(record)["reason"]


def test_a_forked_copy_records_nothing(config, record, monkeypatch):
    made = Execution(CELL, config, record)

    def fork(*arguments):
        if os.fork() == 0:
            raise RuntimeError("the twin goes on")
        return made._first

    made.first_call()
    before = execution.read(record)
    failing(monkeypatch, fork)
    with made.recorded():
        made.estimate()
    _, status = os.wait()
    assert os.waitstatus_to_exitcode(status) == 1
    assert execution.read(record) == before


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b"\xff", b'"x"', b"[[1]]"])
def test_a_record_that_cannot_be_read_is_empty(record, content):
    if content is not None:
        record.write_bytes(content)
    assert execution.read(record) == {}
