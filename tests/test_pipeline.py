"""The Snakefile on the smoke configuration: a run, a second one, edits, configurations, and refusals."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from conftest import checkout, run_snakemake
from filelock import FileLock

from ntkbench import figures, paths
from ntkbench.cli import main
from ntkbench.errors import BadInput
from ntkbench.measure import cells, fingerprints, rows, shard
from ntkbench.measure.config import Config
from ntkbench.measure.journal import Journal, rows_of
from ntkbench.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CONFIG = paths.ROOT / "config" / "smoke.yaml"
RUN = Config.read(CONFIG)


def ntkbench(root, *arguments):
    """What the command of a checkout says."""
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'src'}"}
    command = [sys.executable, "-m", "ntkbench", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A copy of the checkout, what a run of it said, and the run's working folder; both paths have a space."""
    root, folder = checkout(tmp_path_factory.mktemp("a checkout")), tmp_path_factory.mktemp("a folder")
    configured = ("--configfile", str(root / "config/smoke.yaml"))
    code, out, err = run_snakemake(folder, *configured, "--resources", "mem_mb=90000", root=root)
    assert code == 0, err[-4000:]
    return root, out + err, folder


@pytest.fixture
def results(finished):
    return finished[2] / "results" / "smoke"


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folder of a dry run of every rule, and what it said."""
    folder = tmp_path_factory.mktemp("dry")
    code, out, err = run_snakemake(
        folder, "all", "paper_figures", "--configfile", str(CONFIG), "--dry-run", "--printshellcmds"
    )
    assert code == 0, err[-4000:]
    return folder, out + err


def smoke(finished, *targets):
    """Output files that a dry run would make after the finished run."""
    root, _, folder = finished
    configured = ("--configfile", str(root / "config/smoke.yaml"))
    code, out, err = run_snakemake(folder, *targets, *configured, "--dry-run", root=root)
    assert code == 0, err[-4000:]
    outputs = re.findall(r"^ *output: (.*)$", out + err, re.MULTILINE)
    return {Path(file).name for line in outputs for file in line.split(", ")}


@pytest.fixture
def edited(finished):
    """Changes files of the finished run's checkout, and restores them."""
    root, before = finished[0], {}

    def change(file, text):
        path = root / file
        before.setdefault(path, path.read_text(encoding="utf-8") if path.exists() else None)
        path.write_text(text(before[path]) if callable(text) else text, encoding="utf-8")

    yield change
    for path, text in before.items():
        path.unlink() if text is None else path.write_text(text, encoding="utf-8")


@pytest.fixture
def pending(finished, results, monkeypatch):
    """Counts, by method, the cells that another run of the checkout would measure."""
    root = finished[0]
    monkeypatch.setattr(fingerprints, "PACKAGE", root / "src" / "ntkbench")
    return lambda: Counter(cell.method for cell in shard.pending(Config.read(root / "config/smoke.yaml"), results))


def test_the_table_has_one_measured_row_per_cell(results):
    table = rows.read(results / "table.csv")
    assert len(table) == len(cells.cells(RUN))
    done = table[table["status"] == "ok"]
    assert set(done["method"]) == {cell.method for cell in cells.cells(RUN)}
    assert set(table["status"]) <= {"ok", "skipped"}
    assert table.loc[table["status"] != "ok", "reason"].str.len().gt(0).all()
    stochastic = done[done["kind"] == "stochastic"]
    assert set(stochastic["seeds"]) == {RUN.seeds} and set(done["calls"]) == {RUN.calls}
    assert (done["error"] >= 0).all() and (done["memory_bytes"] >= 0).all() and (done["seconds"] > 0).all()
    assert done["first_call_seconds"].gt(0).all() and done["fingerprint"].str.len().eq(16).all()


def test_every_figure_is_drawn_and_shown(results):
    drawn = {name for name in figures.names() if figures.study_of(name) in {None, *RUN.studies}}
    page = (results / "report.html").read_text(encoding="utf-8")
    for name in drawn:
        assert f'id="{name}"' in page
        for form in (".png", ".pdf", ".csv", ".txt"):
            assert (results / "figures" / f"{name}{form}").stat().st_size > 0
    assert "could not be drawn" not in page.lower()
    table = pd.read_csv(results / "table.csv")
    assert page.count("<tr><td data-key=") == len(table)
    for section in ("answer", "papers", "figures", "cells", "checks", "provenance"):
        assert f'<h2 id="{section}">' in page
    assert len(page) < 5 * 2**20


def test_every_study_has_a_table_with_its_provenance(results):
    for name in RUN.studies:
        table = pd.read_csv(results / "studies" / f"{name}.csv")
        assert "ok" in set(table["status"]) <= {"ok", "skipped"}
        assert {"reason", "git_dirty"} <= set(table)  # git_dirty is empty: the copy is no repository
        for column in (
            "git_sha",
            "machine",
            "device",
            "dtype",
            "threads",
            "fingerprint",
            "seeds",
            "calls",
        ):
            assert column in table and table.loc[table["status"] == "ok", column].notna().all(), column


def test_a_run_reports_its_progress_and_where_to_look(finished):
    assert re.search(r"ntkbench: +\d+% after \d+ s", finished[1])
    assert finished[1].rstrip().endswith("ntkbench: done, see results/smoke")
    assert "localrule" not in finished[1] and "Job stats" not in finished[1]


def test_timings_list_every_step(results):
    said = CliRunner().invoke(main, ["timings", str(results)]).output
    for step in ("problems", "shard-0", "draw", *(f"study-{name}" for name in RUN.studies)):
        assert re.search(rf"^{step} +\d", said, re.MULTILINE), said
    assert re.search(r"^\d+% of the steps' wall time is inside measured calls$", said, re.MULTILINE)


def test_a_finished_run_has_nothing_to_do_even_with_a_broken_method(finished, results, edited):
    """Neither does a run that would repeat what failed."""
    edited("src/ntkbench/methods/brand_new.py", "def (:")
    assert not smoke(finished, "--config", "retry=failed")
    assert ntkbench(finished[0], "pending", "config/smoke.yaml", "--results", results).stdout.startswith("0 of ")


def test_a_dry_run_writes_nothing(dry):
    assert not [file for file in dry[0].rglob("*") if file.is_file() and ".snakemake" not in file.parts]


def test_a_changed_method_and_a_changed_study_run_again_alone(finished, edited, pending):
    """``estimators_on_spectra`` loads every method, so it runs again as well."""
    edited("src/ntkbench/methods/naive_jacobian.py", lambda text: f"{text}# changed\n")
    edited("config/smoke.yaml", lambda text: text.replace("steps: 40", "steps: 41"))
    studies = {"mohamadi_drift.csv", "estimators_on_spectra.csv"}
    assert smoke(finished) == {"shard-0.csv", "table.csv", *studies, "report.html", "figures"}
    assert pending() == Counter(cell.method for cell in cells.cells(RUN) if cell.method == "naive_jacobian")


def test_a_new_method_measures_its_own_cells_alone(finished, results, edited):
    source = (finished[0] / "src/ntkbench/methods/sum_of_logits.py").read_text(encoding="utf-8")
    edited("src/ntkbench/methods/brand_new.py", source)
    raw = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    raw["grid"][0]["methods"].append("brand_new")
    edited("config/with_new.yaml", yaml.safe_dump(raw))
    said = ntkbench(finished[0], "pending", "config/with_new.yaml", "--results", results).stdout.splitlines()
    assert [line.split()[0] for line in said[1:]] == ["brand_new"]


def test_a_changed_figure_is_drawn_and_nothing_is_measured(finished, edited):
    edited("src/ntkbench/figures/coverage.py", lambda text: f"{text}# changed\n")
    assert smoke(finished) == {"report.html", "figures"}


@pytest.mark.parametrize(
    ("failed", "target"),
    [
        (
            {
                "methods/hutchpp.py": "shards/shard-0.csv",
                "studies/mohamadi_drift.py": "studies/mohamadi_drift.csv",
            },
            "figures",
        ),
        ({"problems/classifiers.py": "problems.json"}, "all"),
    ],
    ids=["shard and study", "problems"],
)
def test_a_failed_step_runs_again_although_later_outputs_exist(finished, results, edited, failed, target):
    """A failed step leaves no output, and what was made from its earlier output is older than the sources."""
    whole = {results / step: (results / step).read_bytes() for step in failed.values()}
    for source in failed:
        edited(f"src/ntkbench/{source}", lambda text: f"{text}# changed\n")
    for step in whole:
        step.unlink()
    try:
        assert {step.name for step in whole} <= smoke(finished, target)
    finally:
        for step, data in whole.items():
            step.write_bytes(data)


def test_the_report_has_figures_with_captions_tables_and_the_text(finished, results, tmp_path):
    root, _, folder = finished
    page = tmp_path / "report.html"
    configured = ("--configfile", str(root / "config/smoke.yaml"))
    code, _, err = run_snakemake(folder, "--report", str(page), *configured, root=root)
    assert code == 0, err[-3000:]
    text = page.read_text(encoding="utf-8")
    names = {name for name in figures.names() if figures.study_of(name) in {None, *RUN.studies}}
    for file in [*(f"{name}.{form}" for name in names for form in ("png", "csv")), "table.csv", "mohamadi_drift.csv"]:
        assert file in text, file
    for said in ("Tables", "The comparison", "Hazelden", "a problem, a method, a backend, a metric"):
        assert said in text, said
    caption = (results / "figures" / "coverage.txt").read_text(encoding="utf-8").splitlines()[-1]
    assert caption in text


def test_failed_cells_are_measured_again_on_request(finished, results, pending):
    """The row says so in the journal and in the table."""
    root, _, folder = finished
    journal, csv = (results / "shards" / f"shard-0.{ending}" for ending in ("journal", "csv"))
    label = next(cell.label for cell in cells.cells(RUN) if cell.method == "jacobian_contraction")
    with Journal(journal) as kept:
        made_for = next(made_for for key, made_for in rows_of([journal]) if key == label)
        kept.finish(label, made_for, kept.row(label, made_for) | {"status": "timeout"})
    table = pd.read_csv(csv, dtype=str, keep_default_na=False)
    table.loc[[one == label for one in rows.labels(rows.read(csv))], "status"] = "timeout"
    table.to_csv(csv, index=False)
    before = journal.read_text(encoding="utf-8")
    table = ("results/smoke/table.csv", "--configfile", str(root / "config/smoke.yaml"))
    code, _, err = run_snakemake(folder, *table, "--config", "retry=failed", root=root)
    assert code == 0, err[-3000:]
    added = journal.read_text(encoding="utf-8")[len(before) :]
    assert added.count('"row": {') == 1 and '"status": "ok"' in added and label in added
    assert not pending()
    assert set(rows.read(results / "table.csv")["status"]) <= {"ok", "skipped"}


def test_touched_outputs_count_as_just_made(finished, results, edited):
    """The last test that uses the finished run: Snakemake then takes its outputs for those of the edited source."""
    root, _, folder = finished
    config, method = root / "config/smoke.yaml", "one_sided_reverse"
    edited(f"src/ntkbench/methods/{method}.py", lambda text: f"{text}# changed\n")
    touch = ("figures", "--touch", "--cores", "1", "--configfile", str(config))
    code, _, err = run_snakemake(folder, *touch, root=root)
    assert code == 0, err[-3000:]
    assert not smoke(finished, "figures")
    count, every = sum(cell.method == method for cell in cells.cells(RUN)), len(cells.cells(RUN))
    said = ntkbench(root, "pending", config, "--results", results).stdout
    assert said.startswith(f"{count} of {every} cells\n")


def test_figures_of_the_reference_are_drawn_without_measuring(tmp_path):
    default = paths.ROOT / "config" / "default.yaml"
    code, out, err = run_snakemake(
        tmp_path, "figures", "--configfile", str(default), "--config", "source=reference", "threads=1", "--dry-run"
    )
    assert code == 0 and "report.html" in out + err
    assert not re.search(r"^(local)?rule (measure|problems|study|table):", out + err, re.MULTILINE)
    with pytest.raises(BadInput, match="no measured tables of the profile 'smoke' are committed"):
        Run(Config.of_run([CONFIG], {"source": "reference"}))


@pytest.mark.parametrize("config", [None, paths.ROOT / "config" / "default.yaml"])
def test_the_papers_figures_are_at_the_papers_sizes_unless_configured(tmp_path, config):
    files = ["--configfile", str(config)] if config else []
    code, out, err = run_snakemake(tmp_path, "paper_figures", *files, "--config", "threads=1", "--dry-run")
    assert code == 0, err[-3000:]
    profile = config.stem if config else "paper"
    assert set(re.findall(r"results/(\w+)/", out + err)) == {profile}
    assert re.search(rf"output: results/{profile}/studies/novak_flops.csv", out + err)
    assert not re.search(r"^(local)?rule (measure|table):", out + err, re.MULTILINE)


PAPERS = ("paper_figures", "--dry-run", "--config", "threads=1")


@pytest.mark.parametrize(("given", "file"), [(["profile=paper"], ""), ([], "profile: mine\n")])
def test_the_papers_figures_are_not_drawn_from_another_run_of_the_same_profile(tmp_path, given, file):
    (tmp_path / "part.yaml").write_text(file, encoding="utf-8")
    files = ["--configfile", str(tmp_path / "part.yaml")] if file else []
    code, out, err = run_snakemake(tmp_path, *PAPERS, *given, *files)
    said = [line for line in (out + err).splitlines() if line.startswith("ntkbench: ")]
    assert code != 0 and len(said) == 1 and "--configfile config/paper.yaml" in said[0], (out + err)[-3000:]
    assert "Traceback" not in out + err and "rule " not in out + err


def test_the_papers_figures_may_have_another_profile(tmp_path):
    (tmp_path / "part.yaml").write_text("profile: mine\n", encoding="utf-8")
    files = [str(paths.ROOT / "config" / "paper.yaml"), str(tmp_path / "part.yaml")]
    code, out, err = run_snakemake(tmp_path, *PAPERS, "--configfile", *files)
    assert code == 0, err[-3000:]
    assert set(re.findall(r"results/(\w+)/", out + err)) == {"mine"}


def test_a_configuration_without_a_grid_is_the_same_to_snakemake_and_to_the_command(tmp_path):
    (tmp_path / "part.yaml").write_text("profile: mine\nthreads: 1\n", encoding="utf-8")
    target = "results/mine/problems.json"
    code, out, err = run_snakemake(tmp_path, target, "--configfile", str(tmp_path / "part.yaml"), "--dry-run")
    assert code == 0, err[-3000:]
    assert set(re.findall(r"results/(\w+)/", out + err)) == {"mine"}
    assert set(re.findall(r"output: (.*)", out + err)) == {target}
    assert Config.of_run([tmp_path / "part.yaml"]).folder == "mine"  # which the commands read


def test_a_job_step_of_an_executor_has_the_papers_configuration(tmp_path):
    """It is given its job, but neither the target nor a configuration file."""
    step = ("--target-jobs", "study:profile=paper,study=novak_flops", "--allowed-rules", "study", "--mode", "remote")
    code, out, err = run_snakemake(tmp_path, *step, "--config", "threads=1", "--cores", "1", "--dry-run", "--verbose")
    assert code == 0, err[-3000:]
    assert set(re.findall(r"output: (.*)", out + err)) == {"results/paper/studies/novak_flops.csv"}


def test_a_profile_that_is_not_chosen_is_refused(tmp_path):
    code, out, err = run_snakemake(tmp_path, "results/other/table.csv", "--config", "threads=1", "--dry-run")
    assert code != 0 and "no configuration of the profile other is chosen" in out + err


def test_bad_input_is_one_line_and_nothing_starts(tmp_path):
    config = tmp_path / "typo.yaml"
    config.write_text(CONFIG.read_text(encoding="utf-8").replace("hutchpp", "hutchqq", 1), encoding="utf-8")
    code, _, err = run_snakemake(tmp_path, "--configfile", str(config))
    said = [line for line in err.splitlines() if "ntkbench:" in line]
    assert code != 0 and len(said) == 1
    assert all(part in said[0] for part in (str(config), "grid[0].methods", "hutchqq", "did you mean 'hutchpp'"))
    assert not (tmp_path / "results").exists()


def test_a_key_given_twice_is_refused_though_snakemake_takes_it(tmp_path):
    """The Snakefile reads the file again, as the command does: see the test above."""
    config = tmp_path / "twice.yaml"
    config.write_text(CONFIG.read_text(encoding="utf-8") + "\nseeds: 3\n", encoding="utf-8")
    checked = CliRunner().invoke(main, ["check", str(config)])
    assert checked.exit_code == 1 and "seeds" in checked.output and str(config) in checked.output


def test_malformed_yaml_is_refused_in_one_line(tmp_path):
    config = tmp_path / "malformed.yaml"
    config.write_text("grid: [}", encoding="utf-8")
    checked = CliRunner().invoke(main, ["check", str(config)])
    assert checked.exit_code == 1 and checked.output.startswith(f"ntkbench: {config}")
    assert len(checked.output.splitlines()) == 1


def test_a_page_is_made_from_the_tables_that_are_inputs_of_its_rule(dry):
    """A table that merely exists may be older than the code, since no rule makes it for this page."""
    for rule, page in (("draw", "report"), ("draw_paper", "paper_figures")):
        inputs = re.search(rf"^(?:local)?rule {rule}:\n    input: (.*)\n", dry[1], re.MULTILINE)[1].split(", ")
        command = re.search(rf"ntkbench draw (.*) --title .* --output \S*/{page}\.html", dry[1])[1].split()
        assert command == inputs and ("results/smoke/table.csv" in command) == (rule == "draw")


def test_no_step_runs_beside_a_timed_one(dry):
    """A timed step takes the whole `timer`, and each other step a part of it."""
    jobs = re.findall(r"^(?:local)?rule (\w+):\n((?: {4}.*\n)+)", dry[1], re.MULTILINE)
    text = (paths.ROOT / "Snakefile").read_text(encoding="utf-8")
    written = re.findall(r"^(?:use rule \w+ as|rule) (\w+)", text, re.MULTILINE)
    assert {rule for rule, _ in jobs} == {*written} - {"figures"}, "the dry run does not have every rule"
    assert {rule for rule, said in jobs if " output:" in said and not re.search(r"\btimer=[12]\b", said)} == set()


def test_the_timer_does_not_depend_on_the_resources_that_are_given(finished):
    logs = [file.read_text(encoding="utf-8") for file in (finished[2] / ".snakemake" / "log").glob("*.log")]
    provided = re.findall(r"^Provided resources: (.*)$", "".join(logs), re.MULTILINE)
    assert any("90000" in each for each in provided)
    assert all(re.search(r"\btimer\D+2\b", each) for each in provided)


def test_an_unwritable_results_folder_is_refused(tmp_path):
    (tmp_path / "results").write_text("a file in the way")
    code, _, err = run_snakemake(tmp_path, "--configfile", str(CONFIG))
    assert code != 0 and "results folder results/smoke cannot be written to" in err


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    folder = tmp_path / "results" / "smoke"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        code, _, err = run_snakemake(tmp_path, "--configfile", str(CONFIG))
    assert code != 0 and "another run is writing to results/smoke" in err


def test_without_git_the_provenance_says_so(monkeypatch):
    from ntkbench.measure import provenance

    provenance.provenance.cache_clear()
    monkeypatch.setenv("PATH", "")
    found = provenance.provenance()
    provenance.provenance.cache_clear()
    assert (found.git_sha, found.git_dirty) == ("unknown", None)
    assert "torch 2" in found.versions
