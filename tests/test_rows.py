"""From records and asv's results to the table: every cell one row, every row with its status and reason."""

import json

import numpy as np
import pandas as pd
import pytest

from ntkbench import problems
from ntkbench.errors import NtkbenchError
from ntkbench.measure import execution, grid, rows
from ntkbench.measure.grid import Cell, Config

CELL = Cell("digits_conv[N=3]", "hutchpp", "torch", "trace", 36)
CONFIG = Config.check(
    {
        "profile": "test",
        "threads": 1,
        "grid": [{"problems": [CELL.problem], "methods": ["hutchpp"], "metrics": ["trace"], "passes": [36, 72]}],
    },
    "test.yaml",
)


class Asv:
    """Stands for what asv measured."""

    def seconds(self, label):
        return {"seconds": 0.25, "seconds_q25": 0.2, "seconds_q75": 0.3}

    def peak_bytes(self, label):
        return 3000.0


def write(records, aspect, **record):
    execution.record_file(records, CELL, aspect).write_text(json.dumps(record))


def write_all_ok(records):
    write(
        records,
        "accuracy",
        status="ok",
        reference=10.0,
        effective_rank=2.5,
        estimates=[9.0, 10.5, 13.0],
        standard_errors=[1.0, 2.0, 3.0],
        covered=[True, True, False],
        first_call_seconds=1.5,
        notes="",
        passes_spent=36,
    )
    write(records, "memory", status="ok", baseline_bytes=1000, gpu_peak_bytes=None)
    write(records, "seconds", status="ok")


def test_a_measured_cell_becomes_a_full_row(tmp_path):
    write_all_ok(tmp_path)
    found = rows.row(CELL, problems.load(CELL.problem), CONFIG, "abc", rows.outcome(CELL, tmp_path, Asv()))
    assert found["status"] == "ok"
    assert (found["value"], found["reference"], found["seeds"], found["standard_error"]) == (10.5, 10.0, 3, 2.0)
    assert (found["covered"], found["effective_rank"]) == (2 / 3, 2.5)
    assert np.allclose([found[q] for q in ("error_q25", "error", "error_q75")], [0.075, 0.1, 0.2])
    assert found["memory_bytes"] == 2000
    assert (found["n"], found["O"], found["P"]) == (30, 10, 19690)
    assert set(rows.COLUMNS) == set(found)
    assert found["git_sha"]


@pytest.mark.parametrize(
    ("aspect", "record", "status", "reason"),
    [
        ("seconds", {"status": "timeout", "reason": "not done"}, "timeout", "not done (measuring seconds)"),
        (
            "memory",
            {"status": "out_of_memory", "reason": "held 9 GiB"},
            "out_of_memory",
            "held 9 GiB (measuring memory)",
        ),
        ("accuracy", {"status": "started"}, "failed", "the process measuring accuracy died without a word"),
    ],
)
def test_whatever_went_wrong_is_the_rows_status_and_reason(tmp_path, aspect, record, status, reason):
    write_all_ok(tmp_path)
    write(tmp_path, aspect, **record)
    assert rows.outcome(CELL, tmp_path, Asv()) == {"status": status, "reason": reason}


def test_an_execution_that_never_began_is_a_failure(tmp_path):
    assert rows.outcome(CELL, tmp_path, Asv())["reason"] == "measuring accuracy never began"


def test_no_number_from_asv_is_a_failure_even_if_the_record_is_good(tmp_path):
    write_all_ok(tmp_path)
    asv = Asv()
    asv.seconds = lambda label: None
    assert rows.outcome(CELL, tmp_path, asv)["status"] == "failed"


def made(*passes):
    return rows.frame(
        rows.row(
            Cell(CELL.problem, "hutchpp", "torch", "trace", p),
            None,
            CONFIG,
            "abc",
            {"status": "skipped", "reason": "x"},
        )
        for p in passes
    )


def test_shards_are_combined_in_the_grids_order_and_survive_csv(tmp_path):
    table = rows.combine([made(72), made(36)], grid.cells(CONFIG))
    assert table["passes"].tolist() == [36, 72]
    table.to_csv(tmp_path / "t.csv", index=False)
    pd.testing.assert_frame_equal(rows.read(tmp_path / "t.csv")[rows.KEY], table[rows.KEY], check_dtype=False)


@pytest.mark.parametrize(("passes", "said"), [((36,), "missing"), ((36, 36, 72), "twice"), ((36, 72, 99), "no cells")])
def test_anything_but_one_row_a_cell_is_an_error(passes, said):
    with pytest.raises(NtkbenchError, match=said):
        rows.combine([made(*passes)], grid.cells(CONFIG))
