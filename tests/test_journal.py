"""Studies that are stopped: what was measured is kept, and where memory ran out a row says so."""

import math
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml

from ntkbench.errors import OverMemory
from ntkbench.measure import journal as journals
from ntkbench.studies import Journal, base

STUDY = {"widths": [16, 32], "outputs": [1, 4], "samples": [2, 3]}
STOPPED = {"status": "out_of_memory", "reason": "held too much"}


def journal(tmp_path, made_for="this", stopped=None):
    return Journal(tmp_path / "study.journal", made_for, stopped)


def rows(kept, values, fails=None):
    """Rows of cases 0, 1, ...; the one that fails ends the process, as far as the journal can see."""
    calls = []

    def measured(value):
        calls.append(value)
        if value == fails:
            raise KeyboardInterrupt
        return {"seconds": np.float64(value) / 3, "count": np.int64(2), "none": math.nan}

    with journals.kept(kept):
        try:
            made = [base.row({"m": i}, lambda value=value: measured(value)) for i, value in enumerate(values)]
        except KeyboardInterrupt:
            made = None
    return made, calls


def test_rows_that_were_finished_are_not_measured_again(tmp_path):
    assert rows(journal(tmp_path), [1, 2, 3], fails=3) == (None, [1, 2, 3])
    made, calls = rows(journal(tmp_path), [10, 20, 30])
    assert calls == [30]
    expected, _ = rows(None, [1, 2, 30])
    pd.testing.assert_frame_equal(pd.DataFrame(made), pd.DataFrame(expected))


def test_rows_made_for_something_else_do_not_count(tmp_path):
    rows(journal(tmp_path), [1, 2])
    assert rows(journal(tmp_path, "that"), [1, 2])[1] == [1, 2]
    assert rows(journal(tmp_path), [1, 2])[1] == [1, 2]


def test_a_line_that_was_not_written_to_its_end_is_none(tmp_path):
    rows(journal(tmp_path), [1, 2])
    file = tmp_path / "study.journal"
    file.write_text(file.read_text()[:-5])
    assert rows(journal(tmp_path), [1, 2])[1] == [2]


def test_cases_that_are_alike_are_told_apart_by_their_order(tmp_path):
    def twice(kept, values):
        with journals.kept(kept):
            return [base.row({"m": 1}, lambda value=value: {"value": value})["value"] for value in values]

    assert twice(journal(tmp_path), [1, 2]) == [1, 2]
    assert twice(journal(tmp_path), [3, 4]) == [1, 2]


def test_the_row_at_which_memory_ran_out_says_so_and_is_not_tried_again(tmp_path):
    rows(journal(tmp_path), [1, 2, 3], fails=2)
    for kept in (journal(tmp_path, stopped=STOPPED), journal(tmp_path)):
        made, calls = rows(kept, [1, 2, 3])
        assert 2 not in calls
        assert [row["status"] for row in made] == ["ok", "out_of_memory", "ok"]
        assert made[1] == {"m": 1, **STOPPED}


def test_memory_that_runs_out_between_rows_is_an_error(tmp_path):
    with pytest.raises(OverMemory, match="between rows: held too much"):
        journal(tmp_path, stopped=STOPPED)
    rows(journal(tmp_path), [1, 2])
    with pytest.raises(OverMemory, match="between rows: held too much"):
        journal(tmp_path, stopped=STOPPED)


def test_rows_that_are_of_use_together_only_are_measured_again(tmp_path):
    for value in (1, 2):
        with journals.kept(journal(tmp_path)):
            made = base.row({"m": 1}, lambda value=value: {"value": value}, resumable=False)
        assert made["value"] == value


# --- the command


def command(tmp_path, **changes):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"profile": "test", "grid": [], "studies": {"novak_flops": STUDY}} | changes))
    output = tmp_path / "flops.csv"
    return [sys.executable, "-m", "ntkbench", "study", "novak_flops", "--config", str(file), "--output", str(output)]


def test_a_killed_study_goes_on_and_leaves_nobody_measuring(tmp_path):
    first = subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL)
    notes, output = tmp_path / "flops.journal", tmp_path / "flops.csv"
    waited_until(lambda: notes.exists() and notes.read_text().count('"row"') >= 3)
    measuring = psutil.Process(first.pid).children()
    os.kill(first.pid, 9)
    first.wait()
    waited_until(lambda: not any(process.is_running() for process in measuring))
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, check=True)
    assert done.stdout.count("from before") >= 3
    table = pd.read_csv(output)
    assert len(table) == 2 * 2 * 2 * 5 and set(table["status"]) == {"ok"}
    assert not notes.exists()


def test_a_study_that_no_memory_is_enough_for_ends_with_the_reason(tmp_path):
    done = subprocess.run(command(tmp_path, memory_limit_mb=1), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "over the memory limit of 0.0 GiB" in done.stderr and not (tmp_path / "flops.csv").exists()


def waited_until(so, seconds=120):
    end = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < end
        time.sleep(0.05)
