"""asv's fork server: a suite that cannot be imported, what measuring processes are given, and a machine without JAX."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from ntkbench import errors, paths
from ntkbench.errors import NtkbenchError
from ntkbench.measure import engine
from ntkbench.measure.limits import Limits


def test_a_suite_that_cannot_be_imported_is_refused(tmp_path, monkeypatch):
    suite, log = tmp_path / "suite", tmp_path / "cases.log"
    suite.mkdir()
    (suite / "__init__.py").touch()
    (suite / "ntk.py").write_text("raise RuntimeError('no suite')\n", encoding="utf-8")
    monkeypatch.setattr(engine, "SUITE", suite)
    said = rf"the asv suite cannot be imported, see {log}: RuntimeError: no suite$"
    with (
        engine.started(tmp_path / "plan.json", ["a"], Limits(), "a mark of no process", log) as asv,
        pytest.raises(NtkbenchError, match=said),
    ):
        asv.run("memory", 0)
    assert "Traceback" in log.read_text(encoding="utf-8")


def test_measuring_processes_get_the_whole_path_of_a_relative_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(paths.VARIABLE, "of_mine")
    given = engine._Environment(Path("plan.json")).env_vars
    assert given[paths.VARIABLE] == str(paths.cache()) == str(Path.cwd() / "of_mine")


WITHOUT_JAX = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "jax" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
"""A module that Python imports at its start, after which JAX is not found."""


@pytest.mark.slow
def test_without_jax_its_cells_are_skipped_and_the_others_measured(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_JAX, encoding="utf-8")
    block = {"problems": ["digits_conv[N=3]"], "methods": ["one_sided_reverse"], "metrics": ["trace"], "passes": [12]}
    raw = {"profile": "x", "device": "cpu", "threads": 1, "seeds": 1, "calls": 1, "grid": [block | {"backends": "all"}]}
    names = {"--config": "config.yaml", "--problems": "problems.json", "--log": "cases.log", "--output": "s/shard.csv"}
    files = {option: tmp_path / name for option, name in names.items()}
    files["--config"].write_text(yaml.safe_dump(raw), encoding="utf-8")
    files["--problems"].write_text("{}", encoding="utf-8")
    command = [sys.executable, "-m", "ntkbench", "measure-shard"]
    command += [str(word) for pair in files.items() for word in pair]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), paths.python_path()])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_csv(files["--output"], keep_default_na=False).set_index("backend")
    assert table["status"].to_dict() == {"torch": "ok", "jax": "skipped"}, table["reason"].to_dict()
    assert errors.JAX in table.loc["jax", "reason"]
