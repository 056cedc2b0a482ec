"""The real Snakefile on the smoke configuration: killed half-way, taken up again, and asked once more."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from filelock import FileLock

from ntkbench import figures, paths
from ntkbench.measure import grid, rows

CONFIG = paths.ROOT / "config" / "smoke.yaml"
STUDY = grid.Config.read(CONFIG)
METHODS = sorted({cell.method for cell in grid.cells(STUDY)})


def command(folder, *arguments, root=paths.ROOT, config=CONFIG):
    snakemake = str(Path(sys.executable).with_name("snakemake"))
    files = ["--configfile", str(config)] if config else []
    files += ["--snakefile", str(root / "Snakefile"), "--directory", str(folder)]
    return [snakemake, "--cores", "all", *files, *arguments]


def environment(root=paths.ROOT):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(root / "src")}


def run(folder, *arguments, root=paths.ROOT, **options):
    return subprocess.run(
        command(folder, *arguments, root=root, **options), env=environment(root), capture_output=True, text=True
    )


def shards(folder):
    return {file.stem: file for file in (folder / "results" / "smoke" / "shards").glob("*.csv")}


def begun(folder):
    """Shards that are being measured."""
    work = (folder / "results" / "smoke" / "shards").glob(".*.work")
    return {file.stem.removeprefix(".") for file in work} - set(shards(folder))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A results folder from a run that was killed with kill -9 in its second shard, and a second run."""
    folder = tmp_path_factory.mktemp("pipeline")
    first = subprocess.Popen(
        command(folder), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while first.poll() is None and not (shards(folder) and begun(folder)):
        time.sleep(0.1)
    assert first.poll() is None, "the run ended before it could be killed"
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    survivors = {name: file.stat().st_mtime_ns for name, file in shards(folder).items()}
    second = run(folder)
    assert second.returncode == 0, second.stderr[-4000:]
    return folder, survivors


def test_a_killed_run_keeps_its_finished_shards(finished):
    folder, survivors = finished
    assert 0 < len(survivors) < len(METHODS)
    assert {name: shards(folder)[name].stat().st_mtime_ns for name in survivors} == survivors


def test_the_table_has_one_measured_row_a_cell(finished):
    folder, _ = finished
    table = rows.read(folder / "results" / "smoke" / "table.csv")
    assert len(table) == len(grid.cells(STUDY))
    done = table[table["status"] == "ok"]
    assert set(done["method"]) == set(METHODS)
    assert table.loc[table["status"] != "ok", "reason"].str.len().gt(0).all()
    assert done[["seconds", "error", "memory_bytes", "first_call_seconds", "reference"]].notna().all(axis=None)
    assert (done.loc[done["kind"] == "exact", "error"] < 1e-4).all()
    stochastic = done[done["kind"] == "stochastic"]
    assert len(stochastic) > 0
    assert (stochastic["seeds"] == STUDY.seeds).all()
    assert (stochastic["passes_spent"] <= stochastic["passes"]).all()


def test_every_figure_is_there_in_every_form(finished):
    folder, _ = finished
    drawn = [name for name in figures.names() if figures.study_of(name) in (None, *STUDY.studies)]
    assert {figures.study_of(name) for name in drawn} == {None, *STUDY.studies}
    page = (folder / "results" / "smoke" / "gallery.html").read_text()
    for name in drawn:
        assert f'id="{name}"' in page
        for form in (".png", ".pdf", ".csv", ".txt"):
            assert (folder / "results" / "smoke" / "figures" / f"{name}{form}").stat().st_size > 0


def test_every_study_has_a_table_with_its_provenance(finished):
    folder, _ = finished
    for name in STUDY.studies:
        table = pd.read_csv(folder / "results" / "smoke" / "studies" / f"{name}.csv")
        assert "ok" in set(table["status"]) <= {"ok", "skipped"} and table["git_sha"].notna().all()


def test_a_finished_run_has_nothing_to_do(finished):
    again = run(finished[0])
    assert again.returncode == 0
    assert "Nothing to be done" in again.stdout + again.stderr


@pytest.fixture
def edited(tmp_path):
    """A copy of the checkout that a test may edit."""
    for part in ("Snakefile", "asv.conf.json", "environment.yml", "requirements.txt"):
        shutil.copy(paths.ROOT / part, tmp_path / part)
    for part in ("src", "benchmarks", "config", "profiles"):
        shutil.copytree(paths.ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return tmp_path


def planned(done):
    """Output files that a dry run would make."""
    assert done.returncode == 0, done.stderr[-4000:]
    lines = (done.stdout + done.stderr).splitlines()
    return {line.split("/")[-1].rstrip(",") for line in lines if line.strip().startswith("output:")}


def test_a_changed_method_file_runs_that_method_only(finished, edited):
    file = edited / "src" / "ntkbench" / "methods" / "hutchpp.py"
    file.write_text(file.read_text() + "# changed\n")
    plan = planned(run(finished[0], "--dry-run", root=edited))
    assert {name for name in plan if name.removesuffix(".csv") in METHODS} == {"hutchpp.csv"}
    assert "table.csv" in plan


def test_a_new_method_file_is_one_more_shard(finished, edited):
    source = edited / "src" / "ntkbench" / "methods" / "one_sided_forward.py"
    source.with_name("brand_new.py").write_text(source.read_text().replace("OneSidedForward", "BrandNew"))
    raw = yaml.safe_load(CONFIG.read_text())
    raw["grid"][0]["methods"].append("brand_new")
    config = edited / "config" / "with_new.yaml"
    config.write_text(yaml.safe_dump(raw))
    plan = planned(run(finished[0], "--dry-run", root=edited, config=config))
    assert {name for name in plan if name.removesuffix(".csv") in [*METHODS, "brand_new"]} == {"brand_new.csv"}


def test_a_changed_study_runs_that_study_and_its_figures_only(finished, edited):
    config = edited / "config" / "more.yaml"
    raw = yaml.safe_load(CONFIG.read_text())
    raw["studies"]["mohamadi_drift"]["steps"] = 60
    config.write_text(yaml.safe_dump(raw))
    plan = planned(run(finished[0], "--dry-run", config=config))
    assert {name for name in plan if name.endswith(".csv")} >= {"mohamadi_drift.csv"}
    assert not {f"{name}.csv" for name in [*METHODS, *STUDY.studies] if name != "mohamadi_drift"} & plan
    assert "gallery.html" in plan


def test_figures_of_the_reference_are_drawn_without_measuring(tmp_path):
    default = paths.ROOT / "config" / "default.yaml"
    plan = run(tmp_path, "figures", "--config", "source=reference", "threads=1", "--dry-run", config=default)
    assert planned(plan) and "gallery.html" in planned(plan)
    said = plan.stdout + plan.stderr
    assert not re.search(r"^(local)?rule (measure|problem|study|table):", said, re.MULTILINE)
    none = run(tmp_path, "figures", "--config", "source=reference", config=CONFIG)
    assert none.returncode != 0 and "no measured tables of the profile 'smoke' are kept" in none.stderr


@pytest.mark.parametrize("config", [None, paths.ROOT / "config" / "default.yaml"])
def test_the_papers_figures_are_at_the_papers_sizes_unless_told_otherwise(tmp_path, config):
    plan = run(tmp_path, "paper_figures", "--config", "threads=1", "--dry-run", config=config)
    profile = config.stem if config else "paper"
    said = plan.stdout + plan.stderr
    assert set(re.findall(r"results/(\w+)/", said)) == {profile}
    assert re.search(rf"output: results/{profile}/studies/novak_flops.csv", said)
    assert not re.search(r"^(local)?rule (measure|table|gallery):", said, re.MULTILINE)


def test_bad_input_is_one_line_and_nothing_is_begun(tmp_path):
    config = tmp_path / "typo.yaml"
    config.write_text(CONFIG.read_text().replace("hutchpp", "hutchqq"))
    done = run(tmp_path, config=config)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "ntkbench:" in line]
    assert len(said) == 1
    assert all(part in said[0] for part in (str(config), "grid[0].methods", "hutchqq", "did you mean 'hutchpp'"))
    assert not (tmp_path / "results").exists()


def test_malformed_yaml_is_refused_before_anything_is_begun(tmp_path):
    config = tmp_path / "malformed.yaml"
    config.write_text("grid: [}")
    done = run(tmp_path, config=config)
    assert done.returncode != 0
    assert "not valid JSON or YAML" in done.stderr
    checked = subprocess.run([sys.executable, "-m", "ntkbench", "check", config], capture_output=True, text=True)
    assert checked.returncode == 1
    assert checked.stderr.startswith(f"ntkbench: {config}: line 1, column 8: malformed YAML")
    assert not (tmp_path / "results").exists()


def test_an_unwritable_results_folder_is_refused(tmp_path):
    (tmp_path / "results").write_text("a file in the way")
    done = run(tmp_path)
    assert done.returncode != 0
    assert "results folder results/smoke cannot be written to" in done.stderr


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    folder = tmp_path / "results" / "smoke"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        done = run(tmp_path)
    assert done.returncode != 0
    assert "another run is writing to results/smoke" in done.stderr


def test_without_git_the_provenance_says_so(monkeypatch):
    from ntkbench.measure import provenance

    provenance.provenance.cache_clear()
    monkeypatch.setenv("PATH", "")
    found = provenance.provenance()
    provenance.provenance.cache_clear()
    assert (found.git_sha, found.git_dirty) == ("unknown", None)
    assert "torch 2" in found.versions
