"""A small run that is killed at random moments and resumed gives the table of an undisturbed one."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml
from conftest import run_snakemake, snakemake

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = 2
TARGETS = ("results/small/table.csv", "results/small/studies/estimators_on_spectra.csv")
TEST = "NTKBENCH_TEST"
"""Environment variable set in all processes of a test's runs."""
CONFIG = {
    "profile": "small",
    "device": "cpu",
    "threads": 1,
    "seeds": 3,
    "calls": 1,
    "grid": [
        {
            "problems": ["digits_conv[N=3]"],
            "methods": ["one_sided_reverse", "jacobian_contraction"],
            "metrics": ["trace"],
            "passes": [12],
        }
    ],
    "studies": {
        "estimators_on_spectra": {"n": 20, "spectra": ["1/i"], "outputs_per_parameter": [1], "passes": [36], "seeds": 3}
    },
}
SEEDED = ["problem", "method", "passes", "status", "reason", "value", "error", "passes_spent", "seeds", "calls"]
STUDY = ["spectrum", "method", "metric", "status", "error", "passes_spent", "seeds"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    file.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return file


def tables(folder):
    results = folder / "results" / "small"
    return pd.read_csv(results / "table.csv")[SEEDED], pd.read_csv(results / "studies" / "estimators_on_spectra.csv")[
        STUDY
    ]


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    """The folder of a run, and the seconds after which it began to measure and ended."""
    folder = tmp_path_factory.mktemp("undisturbed")
    start = time.monotonic()
    run = snakemake(folder, *TARGETS, "--configfile", str(config))
    while run.poll() is None and not (folder / "results" / "small" / "config.yaml").exists():
        time.sleep(0.05)
    begun = time.monotonic() - start
    _, err = run.communicate(timeout=900)
    assert run.returncode == 0, err[-3000:]
    return folder, begun, time.monotonic() - start


def running(folder: Path) -> list[psutil.Process]:
    """All processes of runs in a folder, including the guardians of their steps."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mine = process.environ().get(TEST) == str(folder)
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_runs_killed_at_random_moments_give_the_same_tables(config, undisturbed, tmp_path):
    """All processes of a run, or one of them, are killed and the run is resumed; a new run follows a finished one.

    No moment is during Snakemake's own start, when there is nothing to resume.
    """
    first, begun, lasted = undisturbed
    chance, kills, finished = random.Random(3), 0, 0
    log = (tmp_path / "log").open("w")
    folder = tmp_path / "0"
    while kills < KILLS:
        folder.mkdir(exist_ok=True)
        run = snakemake(folder, *TARGETS, "--configfile", str(config), stdout=log, stderr=log, env={TEST: str(folder)})
        until = time.monotonic() + chance.uniform(begun, lasted)
        while run.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        victims = running(folder)
        if victims and kills % 2:
            victims = [chance.choice(victims)]
        kills += bool(victims)
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
        run.wait(timeout=600)  # without one of its processes it continues, or ends
        assert nothing_left(folder), running(folder)
        if run.returncode == 0:
            compare(folder, first)
            finished += 1
            folder = tmp_path / str(finished)
    code, _, err = run_snakemake(folder, *TARGETS, "--configfile", str(config))
    assert code == 0, err[-3000:]
    compare(folder, first)


def compare(folder, first):
    for made, expected in zip(tables(folder), tables(first), strict=True):
        pd.testing.assert_frame_equal(made, expected)


def nothing_left(folder: Path, within: float = 10.0) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        if not running(folder):
            return True
        time.sleep(0.1)
    return False
