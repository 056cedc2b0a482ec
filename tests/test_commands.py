"""Commands that show, list, run, check, draw and report, and the completion of commands by shells."""

import os
import re
import sys

import click
import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

from ntkbench import BadInput, figures, paths
from ntkbench.cli import main
from ntkbench.errors import Unavailable
from ntkbench.figures.plotting import files
from ntkbench.measure import cells, fingerprints, glance, view
from ntkbench.measure.config import Config

TABLE = pd.DataFrame(
    {
        "problem": ["net", "net", "other"],
        "method": ["hutchpp", "direct", "direct"],
        "seconds": [0.25, 2.0, 1.0],
        "error": [0.03, 0.0, None],
        "reason": [None, None, "too long"],
        "git_sha": ["a", "a", "a"],
    }
)


@pytest.fixture
def file(tmp_path):
    TABLE.to_csv(tmp_path / "table.csv", index=False)
    return tmp_path / "table.csv"


def test_rows_are_chosen_sorted_and_counted(file):
    said = view.rows_of(file, "method == 'direct' or error > 0.01", sort="seconds", most=2).splitlines()
    assert [line.split()[0] for line in said] == ["problem", "net", "other", "3"]
    assert said[0].split() == ["problem", "method", "seconds", "error", "reason"] and "0.25" in said[1]
    assert said[-1] == "3 of 3 rows, the first 2"
    assert view.rows_of(file, columns=["git_sha"]).split()[:4] == ["git_sha", "a", "a", "a"]
    assert view.rows_of(file, "seconds > 5") == "0 of 3 rows"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"columns": ["metho"]}, "did you mean 'method'"),
        ({"sort": "secs"}, "unknown column"),
        ({"where": "seconds >"}, "cannot be used"),
        ({"where": "secs > 1"}, "cannot be used"),
        ({"where": "seconds"}, "true or false"),
        ({"where": "seconds + 1"}, "true or false"),
        ({"where": "seconds.max() > 1"}, "true or false"),
    ],
)
def test_bad_input_is_refused(file, asked, said):
    with pytest.raises(BadInput, match=said):
        view.rows_of(file, **asked)


def test_a_file_that_is_not_a_table_is_refused(tmp_path):
    (tmp_path / "empty.csv").touch()
    with pytest.raises(BadInput, match=r"empty\.csv is not a table"):
        view.rows_of(tmp_path / "empty.csv")


def test_show_prints_rows_or_one_line(file):
    done = CliRunner().invoke(main, ["show", str(file), "--columns", "problem,seconds", "--rows", "1"])
    assert done.exit_code == 0 and done.output.splitlines()[-1] == "3 of 3 rows, the first 1"
    refused = CliRunner().invoke(main, ["show", str(file), "--sort", "secs"])
    assert refused.exit_code == 1 and len(refused.output.splitlines()) == 1


def test_methods_are_listed_by_what_they_give():
    done = CliRunner().invoke(main, ["list", "--metric", "alignment", "--kind", "exact", "--backend", "jax"])
    heading, *lines = done.output.splitlines()
    assert heading.split() == ["method", "name", "kind", "backends", "metrics", "passes", "title", "[source]"]
    names = [line.split()[1] for line in lines]
    assert {line.split()[0] for line in lines} == {"method"}
    assert "nt_structured_derivatives" in names and "recurrent_exact_trace" not in names and "hutchpp" not in names


def test_methods_are_listed_with_their_metrics_and_passes():
    def listed(*given):
        done = CliRunner().invoke(main, ["list", *given])
        return {line.split()[1]: " ".join(line.split()) for line in done.output.splitlines() if "method " in line}

    every, norms = listed(), listed("--metric", "norm")
    assert "torch/jax trace, norm, effective_rank, alignment 6/12/18/36 a probe Hutch++" in every["hutchpp"]
    assert "exact torch trace, norm, effective_rank, alignment n + O NTK-vector" in every["ntk_vector_products"]
    assert " norm 12 a probe Hutch++" in norms["hutchpp"] and " trace 1 a probe " in every["one_sided_forward"]


def test_a_study_is_run_with_snakemakes_options(tmp_path, monkeypatch):
    config = paths.ROOT / "config" / "smoke.yaml"
    called = []
    monkeypatch.setattr(os, "execv", lambda program, command: called.append(command))
    CliRunner().invoke(main, ["run", str(config), "--cores", "2", "--dry-run", "--config", "retry=failed"])
    ((program, *command),) = called
    assert program == sys.executable and command[:2] == ["-m", "snakemake"]
    assert command[command.index("--cores") + 1] == "2"
    assert command[-5:] == ["--dry-run", "--config", "retry=failed", "--configfile", str(config)]
    (tmp_path / "broken.yaml").write_text("profile: [", encoding="utf-8")
    for given in ([str(tmp_path / "broken.yaml")], [str(config), "--configfile", "other.yaml"]):
        refused = CliRunner().invoke(main, ["run", *given])
        assert refused.exit_code == 1 and len(called) == 1 and len(refused.output.splitlines()) == 1


@pytest.mark.parametrize(
    "options", [["--config", "threads=1"], ["-C", "threads=1"], ["--config=threads=1"], ["--workflow-profile", "mine"]]
)
def test_a_run_leaves_to_snakemake_what_its_options_decide(tmp_path, monkeypatch, options):
    """Values of the configuration, and whether this machine measures."""

    def warnings(*_):
        raise Unavailable("no such device")

    called = []
    monkeypatch.setattr(os, "execv", lambda program, command: called.append(command))
    monkeypatch.setattr("ntkbench.ambient.cores", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(glance, "warnings", warnings)
    raw = yaml.safe_load((paths.ROOT / "config" / "smoke.yaml").read_text(encoding="utf-8"))
    raw |= {"threads": 64, "device": "cuda"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    done = CliRunner().invoke(main, ["run", str(tmp_path / "mine.yaml"), *options])
    assert done.exit_code == 0, done.output
    assert called[0][-2 - len(options) :] == [*options, "--configfile", str(tmp_path / "mine.yaml")]


TAKE_A_CONFIGURATION = [
    name
    for name, command in main.commands.items()
    if any(isinstance(given, click.Argument) and given.name == "config_file" for given in command.params)
]


@pytest.mark.parametrize("name", TAKE_A_CONFIGURATION)
def test_every_command_takes_a_configuration_without_a_grid(tmp_path, monkeypatch, name):
    assert {"check", "pending", "run"} <= set(TAKE_A_CONFIGURATION)
    called = []
    monkeypatch.setattr(os, "execv", lambda program, command: called.append(command))
    monkeypatch.setattr(glance, "warnings", lambda *_: [])  # neither is quick for so many cells
    monkeypatch.setattr(fingerprints, "cell", lambda *_: "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "part.yaml").write_text("profile: mine\nseeds: 5\n", encoding="utf-8")
    done = CliRunner().invoke(main, [name, "part.yaml"])
    assert done.exit_code == 0, done.output
    count = len(cells.cells(Config.read(paths.ROOT / "config" / "default.yaml")))
    said = {"check": f"profile mine, cells: {count}, ", "pending": f"{count} of {count} cells"}
    assert said.get(name, "") in done.output and len(called) == (name == "run")


def test_a_check_reports_the_work_left_and_how_long_it_took_before(tmp_path, monkeypatch):
    default = paths.ROOT / "config" / "default.yaml"
    monkeypatch.setattr(glance, "warnings", lambda *_: [])
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(main, ["check", str(default)]).output.splitlines()
    took = pd.read_csv(paths.REFERENCE / "default" / "timings.csv")["seconds"].sum()
    assert said[0].startswith(f"{default}: profile default, ")
    minutes = float(said[1].removesuffix(" min last time").rpartition(" ")[2])
    assert said[1].startswith("steps without output: ") and minutes == pytest.approx(took / 60, rel=0.2)
    done = tmp_path / "results" / "default" / "studies" / "training.csv"
    done.parent.mkdir(parents=True)
    done.touch()
    fewer = CliRunner().invoke(main, ["check", str(default)]).output.splitlines()
    count, one_less = (int(lines[1].split(": ")[1].partition(",")[0]) for lines in (said, fewer))
    assert one_less == count - 1
    timed = tmp_path / "results" / "default" / "timings" / "draw.tsv"
    timed.parent.mkdir()
    timed.write_text("s\tcpu_time\n3600\t1\n", encoding="utf-8")
    again = CliRunner().invoke(main, ["check", str(default)]).output
    assert "never timed" not in again and " h last time" in again, "an hour for the report, and the rest as committed"
    new = CliRunner().invoke(main, ["check", str(paths.ROOT / "config" / "spectra.yaml")]).output
    assert "never timed" in new and "study-spectra" in new


@pytest.mark.slow
def test_the_report_of_a_folder_of_tables(tmp_path):
    (tmp_path / "studies").mkdir()
    table = paths.REFERENCE / "paper_cpu" / "studies" / "novak_flops.csv"
    (tmp_path / "studies" / "novak_flops.csv").write_bytes(table.read_bytes())
    found = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert found.output.splitlines()[-1] == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="novak_flops"' in page and 'href="figures/novak_flops.csv"' in page
    assert (tmp_path / "figures" / "novak_flops.pdf").exists()


def test_a_report_of_several_folders_takes_a_table_from_the_first_that_has_it(tmp_path):
    source = pd.read_csv(paths.REFERENCE / "paper_cpu" / "studies" / "novak_flops.csv")
    for name in ("first", "second"):
        (tmp_path / name / "studies").mkdir(parents=True)
        source.assign(machine=name).to_csv(tmp_path / name / "studies" / "novak_flops.csv", index=False)
    given = [str(tmp_path / name) for name in ("first", "second")]
    output = tmp_path / "report.html"
    done = CliRunner().invoke(main, ["report", *given, "--output", str(output), "--alone"])
    assert done.exit_code == 0 and done.output.splitlines()[:-1] == ["novak_flops: ok"], done.output
    page = output.read_text(encoding="utf-8")
    assert "Machine: first." in page and "Machine: second." not in page
    assert 'href="first/studies/novak_flops.csv"' in page and "second/studies" not in page
    assert "Verdicts are by these tables: " in page and "first: study novak flops" in page
    # It is alone: no folder of figures is kept.
    assert sorted(file.name for file in tmp_path.iterdir()) == ["first", "report.html", "second"]
    assert "figures/" not in page


@pytest.mark.slow
def test_draw_reads_no_other_tables_of_the_folder(tmp_path):
    """The others may be of an earlier run, with other code or another configuration."""
    studies = tmp_path / "studies"
    studies.mkdir()
    kept = studies / "novak_flops.csv"
    kept.write_bytes((paths.REFERENCE / "paper_cpu" / "studies" / "novak_flops.csv").read_bytes())
    for other in (tmp_path / "table.csv", studies / "training.csv"):
        other.write_text("an older table\n", encoding="utf-8")
    page = tmp_path / "elsewhere" / "page.html"
    given = ("--title", "Some", "--figures", str(tmp_path / "figures"), "--output", str(page))
    done = CliRunner().invoke(main, ["draw", str(kept), *given])
    assert done.exit_code == 0 and done.output.splitlines() == ["novak_flops: ok"], done.output
    said = page.read_text(encoding="utf-8")
    assert 'id="novak_flops"' in said and "study novak flops" in said and "study training" not in said
    assert not re.search(r'id="(answer|cells|checks)"', said), "there is no table of the grid"


@pytest.mark.parametrize("page", [None, "elsewhere/page.html"])
def test_a_report_that_cannot_be_written_is_refused_before_a_figure_is_drawn(tmp_path, monkeypatch, page):
    monkeypatch.setattr(figures, "draw_all", lambda *_: pytest.fail("figures are drawn"))
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "novak_flops.csv").write_text("status\n", encoding="utf-8")
    output = tmp_path / (page or "report.html")
    output.parent.mkdir(exist_ok=True)
    (output.parent / "figures").write_text("in the way", encoding="utf-8")
    found = CliRunner().invoke(main, ["report", str(tmp_path), *(["--output", str(output)] if page else [])])
    assert found.exit_code == 1 and len(found.output.splitlines()) == 1, found.output
    assert f"{output.parent / 'figures'} cannot be written: " in found.output


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "table.csv",
            lambda t: pd.concat([t, t]),
            "row 4: problem, method, backend, metric, passes: the same as in row 1",
        ),
        ("table.csv", lambda t: pd.concat([t, t[2:].assign(seconds=9.0)]), "the same as in row 3; allowed: each cell"),
        ("table.csv", lambda t: t.assign(seconds=[1.0, -1.0, 1.0]), "row 2: seconds: -1; allowed: finite numbers"),
        ("table.csv", lambda t: t.assign(seconds_q75=[1.0, 1.0, np.inf]), "row 3: seconds_q75: inf; allowed: finite"),
        ("table.csv", lambda t: t.assign(error=-0.5), "row 1: error: -0.5; allowed: finite numbers"),
        ("table.csv", lambda t: t.assign(status="fine"), "row 1: status: 'fine'; allowed: ok, skipped, failed,"),
        ("studies/novak_flops.csv", lambda t: pd.concat([t, t[1:2]]), "the same as in row 2; allowed: each row once"),
        ("studies/novak_flops.csv", lambda t: t.assign(status=None), "row 1: status: 'nan'; allowed: ok"),
    ],
)
def test_a_report_refuses_rows_that_no_measurement_gives(tmp_path, monkeypatch, name, change, said):
    monkeypatch.setattr(figures, "draw_all", lambda *_: pytest.fail("figures are drawn"))
    source = paths.REFERENCE / "default" / name
    table = pd.read_csv(source, low_memory=False).query("status == 'ok'")[:3]
    (tmp_path / "studies").mkdir()
    table.to_csv(tmp_path / name, index=False)
    pd.testing.assert_frame_equal(files.read(tmp_path / name), pd.read_csv(tmp_path / name))
    change(table).to_csv(tmp_path / name, index=False)
    found = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert found.exit_code == 1 and len(found.output.splitlines()) == 1, found.output
    assert found.output.startswith(f"ntkbench: {tmp_path / name}: row ") and said in found.output


def test_a_folder_without_tables_has_no_report(tmp_path):
    found = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert found.exit_code and "has no table" in found.output and len(found.output.splitlines()) == 1


def test_shells_complete_commands():
    asked = {"_NTKBENCH_COMPLETE": "bash_source"}
    said = CliRunner().invoke(main, [], prog_name="ntkbench", env=asked).output
    assert "complete" in said and "ntkbench" in said
    typed = {"_NTKBENCH_COMPLETE": "bash_complete", "COMP_WORDS": "ntkbench re", "COMP_CWORD": "1"}
    assert "recommend" in CliRunner().invoke(main, [], prog_name="ntkbench", env=typed).output
