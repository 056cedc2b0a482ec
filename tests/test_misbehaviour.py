"""Plug-ins that misbehave in every known way, in the pipeline: each cell is one row, and all others are measured."""

import shutil

import pandas as pd
import psutil
import pytest
import yaml
from conftest import checkout, run_snakemake
from plugins.misbehaving import FIRST, WAYS

from ntkbench import paths

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PROBLEM = "mlp_hazelden[N=2]"
# Other reasons are in test_seeds.py and test_outcomes.py.
BUDGETS = [FIRST + i for i in range(len(WAYS))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder, exit status and output of a run of all misbehaviours, with neighbours and a study that fails."""
    root = checkout(tmp_path_factory.mktemp("checkout"))
    methods = root / "src" / "ntkbench" / "methods"
    shutil.copy(paths.ROOT / "tests" / "plugins" / "misbehaving.py", methods)
    root.joinpath("src/ntkbench/problems/hopeless.py").write_text(HOPELESS, encoding="utf-8")
    root.joinpath("src/ntkbench/problems/unreadable.py").write_text(UNREADABLE, encoding="utf-8")
    root.joinpath("src/ntkbench/studies/giving_up.py").write_text(GIVING_UP, encoding="utf-8")
    config = {
        "profile": "misbehaving",
        "device": "cpu",
        "threads": 1,
        "seeds": 3,
        "calls": 2,
        "limits": {"time_s": 8, "memory_mb": 1500, "problem_s": 12},
        "grid": [
            {"problems": [PROBLEM], "methods": ["misbehaving"], "metrics": ["trace"], "passes": BUDGETS},
            {
                "problems": [PROBLEM, "raising", "never_ready", "too_large", "zero"],
                "methods": ["one_sided_reverse"],
                "metrics": ["trace"],
                "passes": [12],
            },
        ],
        # Shorter than the imports of a study's process, which count in no row's time.
        "studies": {"giving_up": {"limits": {"time_s": 3, "problem_s": 60}}},
    }
    file = root / "config" / "misbehaving.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    code, out, err = run_snakemake(root, "--configfile", str(file), root=root)
    return root / "results" / "misbehaving", code, out + err


@pytest.fixture(scope="module")
def table(finished):
    return pd.read_csv(finished[0] / "table.csv", keep_default_na=False)


def test_the_run_succeeds_and_every_cell_is_one_row(finished, table):
    folder, code, said = finished
    assert code == 0, said[-3000:]
    assert len(table) == len(BUDGETS) + 5
    assert sorted(table.loc[table["method"] == "misbehaving", "passes"].astype(int)) == BUDGETS
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("budget", BUDGETS)
def test_each_misbehaviour_has_its_status_and_reason(table, budget):
    (row,) = table[(table["method"] == "misbehaving") & (table["passes"].astype(str) == str(budget))].itertuples()
    status, reason, _ = WAYS[budget - FIRST]
    assert row.status == status, row.reason
    assert reason in row.reason and len(row.reason.splitlines()) <= 1
    if status == "ok":
        assert float(row.seconds) > 0 and (int(row.seeds), int(row.calls)) == (3, 2) and row.reason == ""


@pytest.mark.parametrize(
    ("problem", "status", "reason"),
    [
        (PROBLEM, "ok", ""),
        ("raising", "failed", "ValueError: no such network"),
        ("never_ready", "timeout", "not finished within the limit of 12 s"),
        ("too_large", "out_of_memory", "over the limit"),
        ("zero", "failed", "not defined"),
    ],
)
def test_neighbours_are_measured_and_problems_that_fail_are_rows(table, problem, status, reason):
    (row,) = table[(table["method"] == "one_sided_reverse") & (table["problem"] == problem)].itertuples()
    assert row.status == status, row.reason
    assert reason in row.reason


def test_a_failing_study_is_rows_with_reasons(finished):
    rows = pd.read_csv(finished[0] / "studies" / "giving_up.csv")
    assert list(rows["status"]) == ["ok", "failed", "failed", "ok", "ok", "failed"]
    assert list(rows["reason"].fillna("")) == [
        "",
        "ValueError: this row",
        "the process ended with exit status 5 and without a result",
        "",
        "",
        "RuntimeError: between rows",
    ]


def test_nothing_is_left_running(finished):
    left = []
    for process in psutil.process_iter():
        try:
            if str(finished[0].parents[1]) in process.environ().get("PYTHONPATH", ""):
                left.append(process)
        except psutil.Error:
            continue
    assert not left


def test_a_second_run_measures_nothing_again(finished):
    folder, *_ = finished
    before = (folder / "shards" / "shard-0.journal").read_bytes()
    root, config = folder.parents[1], folder.parents[1] / "config" / "misbehaving.yaml"
    code, _, err = run_snakemake(root, "--configfile", str(config), root=root)
    assert code == 0, err
    assert (folder / "shards" / "shard-0.journal").read_bytes() == before


UNREADABLE = '''
"""A file that ends whoever imports it."""

import sys

from ntkbench.problems.base import Definition, problem

sys.exit("no")


@problem
def never_seen(N: int = 2) -> Definition:
    """Nobody comes to it."""
'''

HOPELESS = '''
"""Problems that cannot be made ready."""

import time
from dataclasses import dataclass

import numpy as np

from ntkbench.problems.base import Definition, problem
from ntkbench.problems.base.training import Training

X = np.ones((2, 3), np.float32)


@dataclass(frozen=True)
class Nothing(Training):
    """Leaves the network as it is, after some seconds."""

    seconds: float = 0.0

    def train(self, module):
        time.sleep(self.seconds)

    def arrays(self):
        return {}

    def objective(self, module):
        return next(iter(module.parameters())).double().sum()


@problem
def raising(N: int = 2) -> Definition:
    """Its definition raises."""
    raise ValueError("no such network")


@problem
def never_ready(N: int = 2) -> Definition:
    """Its training does not end."""
    from torch import nn

    return Definition(nn.Linear(3, 2), X, Nothing(1e6))


@problem
def too_large(N: int = 2) -> Definition:
    """Its definition takes more memory than there may be."""
    held = []
    while True:
        held.append(np.ones(2**24))


@problem
def zero(N: int = 2) -> Definition:
    """Its outputs depend on no parameter, so all exact values are zero."""
    import torch
    from torch import nn

    module = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1), nn.Hardtanh())
    with torch.no_grad():
        for w in module.parameters():
            w.fill_(9.0)
    return Definition(module, X, Nothing())
'''

GIVING_UP = '''
"""A study whose rows fail in every way."""

import os
import sys

import pandas as pd

from ntkbench.studies import base

TIMED = False


class Settings(base.Settings):
    """None of its own."""


def run(settings: Settings) -> pd.DataFrame:
    """Rows that fail, and then the study."""
    def fails():
        raise ValueError("this row")

    def leaves_nothing_as_it_was():
        os.chdir("/")
        os.environ.clear()
        sys.stdout.close()
        sys.stderr.close()
        return {"value": 4.0}

    base.row({"case": 1}, lambda: {"value": 1.0})
    base.row({"case": 2}, fails)
    base.row({"case": 3}, lambda: os._exit(5))
    base.row({"case": 4}, leaves_nothing_as_it_was)
    base.row({"case": 5}, lambda: {"value": 5.0})
    raise RuntimeError("between rows")
'''
