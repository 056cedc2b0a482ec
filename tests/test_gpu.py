"""The script for GPU machines, tested on a CPU: its cases and their failures, its processes, its measurements."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner

from ntkbench import methods, paths
from ntkbench.estimate import Estimate
from ntkbench.measure import outcomes
from ntkbench.measure import rows as tables
from ntkbench.measure.cells import cells
from ntkbench.measure.config import Config

sys.path.insert(0, str(paths.ROOT / "scripts"))
import gpu
import gpu_correctness
import gpu_large
from gpu_correctness import Case

CONFIG = "config/smoke.yaml"


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return list(gpu_correctness.cases("cpu", gpu_correctness.PROBLEMS[:1]))


@pytest.mark.parametrize(
    ("name", "backend", "status"),
    [
        ("products digits_conv[N=4]", "torch", "ok"),
        ("products digits_conv[N=4]", "jax", "ok"),
        ("hutchinson alignment digits_conv[N=4]", "torch", "ok"),
        ("sum_of_logits effective_rank digits_conv[N=4]", "torch", "ok"),
        ("ntkbench.ntk transformer", "torch", "ok"),
        ("ntkbench.metrics_of BatchNorm in train mode", "torch", "ok"),
        ("block_lanczos largest_eigenvalue digits_conv[N=4]", "torch", "ok"),
        ("out of memory", "torch", "ok"),
        ("out of memory", "jax", "ok"),
        ("allocator's peak", "torch", "skipped"),
        ("memory left to others", "jax", "skipped"),
    ],
)
def test_cases_on_the_cpu(cases, name, backend, status):
    case = next(case for case in cases if (case.case, case.backend) == (name, backend))
    row = gpu_correctness.row(case)
    assert row["status"] == status, row["reason"]
    if status == "ok":
        assert row["error"] <= row["tolerance"] < 0.5


def test_every_method_has_a_case_in_each_of_its_backends(cases):
    given = {(case.case.split()[0], case.backend) for case in cases}
    every = map(methods.get, methods.names())
    assert {(m.name, backend) for m in every if not m.needs_recurrence for backend in m.backends} <= given
    assert len({tuple(case.key.values()) for case in cases}) == len(cases)


@pytest.mark.parametrize(
    ("value", "error", "reason"),
    [
        (1.01, None, "the value is wrong"),
        (float("nan"), None, "the value is wrong"),
        (1.1, 0.01, "the value is wrong"),
        (1.0, 0.2, "the standard error is 0.2"),
        (1.0, float("nan"), "the standard error is nan"),
    ],
)
def test_wrong_values_and_standard_errors_fail(cases, value, error, reason):
    estimate = Estimate(value, error, None, "direct")
    row = gpu_correctness.row(cases[0]._replace(check=lambda: gpu_correctness.trusted(estimate, 1.0)))
    assert row["status"] == "failed"
    assert reason in row["reason"]


def test_one_seed_must_give_one_number(cases):
    case = next(case for case in cases if case.case == "hutchinson alignment digits_conv[N=4]")
    method, *others = case.check.args

    class Restless(type(method)):
        calls = 0

        def estimate(self, *arguments, seed):
            self.calls += 1
            return super().estimate(*arguments, seed=self.calls)

    row = gpu_correctness.row(case._replace(check=lambda: gpu_correctness.of_method(Restless(), *others)))
    assert row["status"] == "failed"
    assert "the same seed gave" in row["reason"]


def test_products_in_float32_pass_and_in_tf32_do_not():
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    # TF32 has ten of the 23 bits of the fraction, rounded to nearest.
    a_tf32, b_tf32 = (((m.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for m in (a, b))
    tolerance, exact = gpu_correctness.TOLERANCE_OF_PRODUCTS["float32"], a.double() @ b.double()
    assert gpu_correctness.entrywise((a @ b).double(), exact, tolerance).error < tolerance / 10
    assert gpu_correctness.entrywise((a_tf32 @ b_tf32).double(), exact, tolerance).error > 10 * tolerance


@pytest.mark.slow
def test_rows_are_added_and_not_repeated(cases, tmp_path, monkeypatch):
    of_one_problem = {("cpu", gpu_correctness.PROBLEMS[:1]): cases}
    monkeypatch.setattr(gpu_correctness, "cases", lambda *given: of_one_problem[given])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # keep that of the tests
    file = tmp_path / "rows.jsonl"
    arguments = [str(file), "--device", "cpu", "--few", "--share", "0", "5"]
    made = []
    for _ in range(2):
        result = CliRunner().invoke(gpu_correctness.main, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        made.append(file.read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in made[0].splitlines()]
    assert len(rows) > 2 and made[0] == made[1]
    assert {row["status"] for row in rows} == {"ok"}


def test_a_lost_device_ends_the_process_after_its_row(tmp_path, monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    case = Case("lost", "torch", "cuda", "float32", lost)
    monkeypatch.setattr(gpu_correctness, "cases", lambda *_: [case, case._replace(case="next")])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # keep that of the tests
    arguments = [str(tmp_path / "rows.jsonl")]
    for rows, status in ((1, gpu.RESTART), (2, gpu.RESTART), (2, 0)):
        assert CliRunner().invoke(gpu_correctness.main, arguments).exit_code == status
        assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == rows


def test_processes_are_restarted_or_killed_and_failures_are_reported(tmp_path):
    def python(program: str) -> list[str]:
        return [sys.executable, "-c", program]

    mark = tmp_path / "mark"
    again = f"import pathlib, sys; p = pathlib.Path({str(mark)!r}); e = p.exists(); p.touch(); sys.exit(not e and 3)"
    assert gpu.run([python(again), python("")], 60)
    assert mark.exists()
    assert not gpu.run([python("raise SystemExit(1)"), python("")], 60)
    child = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    start = time.monotonic()
    assert not gpu.run([python(f"import subprocess; subprocess.run({python(f'import os, time; {child}')})")], 2)
    assert time.monotonic() - start < 60
    assert not _running(int((tmp_path / "pid").read_text()))


def _running(pid: int) -> bool:
    for _ in range(100):
        try:
            if "Z" in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]:
                return False
        except OSError:
            return False
        time.sleep(0.05)
    return True


TERMINATED = """
import signal, sys
sys.path.insert(0, sys.argv[1])
import gpu

for number in (signal.SIGTERM, signal.SIGHUP):  # whoever started the tests may ignore them
    signal.signal(number, signal.SIG_DFL)

gpu.missing = dict
gpu.correctness = lambda out, tiny, seconds: gpu.run([[sys.executable, "-c", sys.argv[3]]], seconds)
gpu.main(["--parts", "correctness", "--out", sys.argv[2]])
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_script_that_is_terminated_leaves_no_process(tmp_path, name):
    pid, number = tmp_path / "pid", getattr(signal, name)
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    command = [sys.executable, "-c", TERMINATED, str(paths.ROOT / "scripts"), str(tmp_path), child]
    process = subprocess.Popen(command)
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert not _running(int(pid.read_text()))


@pytest.fixture
def handlers():
    """Restores the handlers of signals that the script sets."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_tiny_numbers_have_a_folder_of_their_own(tmp_path, monkeypatch, handlers):
    for name in (*gpu.PINS, "pyproject.toml"):
        shutil.copy(paths.ROOT / name, tmp_path)
    found = []
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "correctness", lambda out, tiny, seconds: found.append(out) or True)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for given in ([], ["--tiny"]):
        assert CliRunner().invoke(gpu.main, ["--parts", "correctness", *given]).exit_code == 0
    assert found == [tmp_path / "results" / "gpu", tmp_path / "results" / "gpu_tiny"]


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A checkout with the smoke configuration, and a table of its cells, all measured."""
    (tmp_path / "config").mkdir()
    shutil.copy(paths.ROOT / "config" / "smoke.yaml", tmp_path / "config")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    keys = [{key: getattr(cell, key) for key in outcomes.KEY} for cell in cells(Config.read(paths.ROOT / CONFIG))]
    return tables.frame(key | {"status": "ok", "reason": "", "kind": "exact", "error": 1e-7} for key in keys)


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),
        ({"status": "skipped", "reason": "no JAX"}, True),
        ({"error": 0.1}, False),
        *(({"status": status, "reason": "no"}, False) for status in outcomes.PASSING),
    ],
)
def test_a_study_succeeds_if_all_cells_are_measured_or_skipped(tmp_path, monkeypatch, study, change, good):
    """A cell whose problem failed is in the table, but in no journal."""
    study.loc[3, list(change)] = list(change.values())
    folder = tmp_path / "results" / "smoke"
    folder.mkdir(parents=True)
    study.to_csv(folder / "table.csv", index=False)
    monkeypatch.setattr(gpu, "run", lambda commands, seconds: True)
    assert gpu.study(tmp_path, True, 1) == good
    assert len(pd.read_csv(tmp_path / "study.csv")) == len(study)


def test_a_study_that_did_not_finish_has_a_row_for_each_cell(tmp_path, monkeypatch, study):
    monkeypatch.setattr(gpu, "run", lambda commands, seconds: False)
    assert not gpu.study(tmp_path, True, 1)
    found = pd.read_csv(tmp_path / "study.csv")
    assert found["method"].tolist() == study["method"].tolist()
    assert set(zip(found["status"], found["reason"], strict=True)) == {gpu.NOT_REACHED}


def test_missing_packages_are_named_and_the_rest_runs(tmp_path, monkeypatch, handlers):
    monkeypatch.setattr(gpu, "_installed", lambda name: name not in ("asv", "PyYAML", "frozendict"))
    monkeypatch.setattr(gpu, "correctness", lambda out, tiny, seconds: print("it runs") or True)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    result = CliRunner().invoke(gpu.main, ["--tiny", "--out", str(tmp_path)])
    assert result.exit_code == 1
    missing, jax, ran, large, study = result.output.splitlines()
    assert missing.startswith("missing here: ")
    assert {word.partition("==")[0] for word in missing.split()[2:]} == {"asv", "pyyaml", "frozendict"}
    assert jax.startswith("what needs frozendict is left out")
    assert ran == "it runs"
    assert large == "large: not run, it needs frozendict"
    assert study == "study: not run, it needs asv, frozendict, pyyaml"
    assert "devices" in json.loads((tmp_path / "machine.json").read_text())


def test_a_large_case_is_timed_beside_its_rivals_and_against_the_limit(tmp_path):
    case = next(case for case in gpu_large.cases(gpu_large.TINY) if "fc_relu" in case.name)
    made = gpu_large.row(case, gpu_large.TINY, tmp_path / "profiles.txt")
    assert made["status"] == "ok", made["reason"]
    assert made["times_limit"] == pytest.approx(made["seconds"] * 67e12 / made["operations"])
    assert set(made["ratios"]) == set(made["rival_values"]) == set(gpu_large.NEURAL_TANGENTS)
    for name, value in made["rival_values"].items():
        assert value > 0, name
    assert case.name in (tmp_path / "profiles.txt").read_text()


def test_a_large_case_that_fails_is_a_row_and_a_rival_that_fails_a_reason():
    def broken():
        raise MemoryError("too large")

    case = next(case for case in gpu_large.cases(gpu_large.TINY) if "fc_relu" in case.name)
    made = gpu_large.row(case._replace(make=broken), gpu_large.TINY, None)
    assert (made["status"], made["reason"]) != ("ok", "")
    made = gpu_large.row(case._replace(rivals={"broken": broken}), gpu_large.TINY, None)
    assert made["status"] == "ok"
    assert "too large" in made["rivals_left_out"]["broken"]


def test_a_large_case_that_is_not_reached_is_a_row_with_the_reason(tmp_path, monkeypatch):
    """The first case is measured without its rival, and the process ends in the second one."""
    first, *others = gpu_large.cases(gpu_large.TINY)
    begun = []

    def row(case, sizes, profiles):
        begun.append(case)
        if len(begun) > 1:
            raise SystemExit
        made = {"case": case.name, "device": "cpu", "dtype": case.dtype, "status": "ok", "reason": "", "seconds": 1.0}
        return made | {"times_limit": 2.0, "ratios": {}, "rivals_left_out": {"torch.func": "too large"}}

    def run(commands, seconds):
        CliRunner().invoke(gpu_large.main, [str(tmp_path / "large.jsonl"), "--tiny"])
        return False

    monkeypatch.setattr(gpu_large, "row", row)
    monkeypatch.setattr(gpu, "run", run)
    assert not gpu.large(tmp_path, True, 60)
    table = pd.read_csv(tmp_path / "large.csv")
    made = table.drop_duplicates(["case", "dtype"])
    wanted = [(case.name, case.dtype) for case in (first, *others)]
    assert list(made[["case", "dtype"]].itertuples(index=False, name=None)) == wanted
    assert made["status"].tolist() == ["ok", *["timeout"] * len(others)]
    assert made["reason"].iloc[1:].str.contains("stopped first").all()
    assert table["rival_reason"].iloc[0] == "too large"
    against = table[table["rival"].isin(gpu_large.NEURAL_TANGENTS)]
    assert len(against) == 2 * len(gpu_large.TINY.rivals) and (against["rival_reason"] == gpu_large.CUT.reason).all()


def test_every_package_that_a_part_needs_is_pinned(monkeypatch):
    monkeypatch.setattr(gpu, "_installed", lambda name: False)
    assert set().union(*gpu.needs().values()) <= set(gpu.missing())


def test_unknown_parts_are_refused():
    result = CliRunner().invoke(gpu.main, ["--parts", "profiles"])
    assert result.exit_code == 2
    assert "allowed: correctness, large, study" in result.output


def test_the_configuration_is_valid_but_for_the_device():
    raw = yaml.safe_load((paths.ROOT / "config" / "gpu.yaml").read_text())
    assert (raw["profile"], raw["device"]) == ("gpu", "cuda")
    config = Config.check(raw | {"device": "cpu"}, "gpu.yaml")
    found = cells(config)
    assert {cell.backend for cell in found} == {"torch", "jax"}
    # A cell takes some seconds on a GPU, most of them to start CUDA twice.
    assert len(found) <= 60
