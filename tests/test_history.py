"""The suite that asv runs over commits: cases are only appended, and its measurements are right."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import ntkbench
from benchmarks.history import cases, networks
from benchmarks.history.cases import CASES, Absent, Case
from ntkbench import methods, paths
from ntkbench.measure import compare

LIST = "benchmarks/history/cases.txt"
MEASURED = ("Accuracy.track_error", "Memory.track_peak", "Seconds.time_call")
LEFT = (".asv-machine.json", "asv.conf.json", "results")
EXACT = ("conv/structured_derivatives/torch/norm", "gru/recurrent_exact_trace/torch/trace", "mlp/full/jax/ntk")


def test_cases_are_only_added_at_the_end():
    commits = (paths.git("log", "--first-parent", "--format=%H", "--", LIST) or "").split()
    versions = [(paths.git("show", f"{commit}:{LIST}") or "").split() for commit in commits]
    if not any(versions):
        pytest.skip("there is no history of the list here")
    for commit, version in zip(commits, versions, strict=True):
        assert list(CASES[: len(version)]) == version, f"asv knows a case by its place, which changed since {commit}"


def test_every_case_is_there_once_and_known_to_the_comparison():
    assert len(set(CASES)) == len(CASES) > 60
    assert compare.chosen("") == list(CASES)


def test_every_shipped_method_has_a_case_or_a_reason():
    tried = {label.split("/")[1] for label in CASES if not label.endswith("/ntk")}
    files = paths.git("ls-files", "src/ntkbench/methods")
    shipped = [name for name in methods.names() if files is None or f"/{name}.py" in files]
    assert len(shipped) > 40 and set(shipped) <= tried | set(cases.LEFT_OUT)
    assert not tried & set(cases.LEFT_OUT) and all(cases.LEFT_OUT.values())


@pytest.mark.parametrize("label", EXACT)
@pytest.mark.slow
def test_the_error_of_an_exact_value_is_rounding(label):
    assert Case(label).error() < 1e-5


@pytest.mark.slow
def test_the_error_of_an_estimate_is_that_of_its_values_and_the_same_every_time():
    label = "gru/one_sided_reverse/torch/trace/72"
    case, again = Case(label), Case(label)
    assert case.values(range(2)) == again.values(range(2))
    exact = networks.theta("gru").trace()
    errors = sorted(abs(case.call(seed).value - exact) / exact for seed in range(cases.SEEDS))
    middle, error = cases.SEEDS // 2, case.error()
    assert error == pytest.approx(sum(errors[middle - 1 : middle + 1]) / 2)
    assert 1e-4 < error < 0.2


@pytest.mark.parametrize(
    ("label", "random"),
    [
        ("mlp/random_vector/torch/ntk", True),
        ("mlp/random_vector/torch/trace", True),
        ("mlp/hutchinson/torch/trace/72", True),
        ("mlp/structured_derivatives/torch/norm", False),
        ("mlp/sum_of_logits/torch/ntk", False),
    ],
)
def test_a_case_is_random_if_its_value_depends_on_the_seed(label, random):
    """Whether or not it takes passes; its error is then the median over seeds."""
    case = Case(label)
    assert case.random == random
    asked, call = [], case.call
    case.call = lambda seed: asked.append(seed) or call(seed)
    case.error()
    assert asked == list(range(cases.SEEDS if random else 1))


def test_the_trace_kernel_is_closer_to_theta_than_a_single_logit():
    """The trace kernel is the best kernel between samples."""
    trace, logit = (Case(f"mlp/{kernel}/torch/ntk").error() for kernel in ("trace", "single_logit"))
    assert 0 < trace < logit


@pytest.mark.slow
def test_both_backends_compute_the_same():
    (torch,), (jax,) = (Case(f"mlp/auto/{backend}/trace").values([0])[0] for backend in ("torch", "jax"))
    assert torch == pytest.approx(jax, rel=1e-5)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("gru/no_such_method/torch/trace", "unknown method 'no_such_method'"),
        ("gru/auto/torch/no_such_function", "there is no ntkbench.no_such_function"),
    ],
)
def test_methods_and_functions_that_a_commit_lacks_are_absent(label, said):
    with pytest.raises(Absent, match=said):
        Case(label)


def test_an_argument_that_a_commit_lacks_makes_a_case_absent(monkeypatch):
    def trace(model, x, *, method="auto", passes=None, seed=0):
        raise AssertionError("called")

    monkeypatch.setattr(ntkbench, "trace", trace)
    with pytest.raises(Absent, match="params"):
        Case("mlp/auto/jax/trace")


def test_a_value_of_another_method_makes_a_case_absent(monkeypatch):
    trace = ntkbench.trace
    monkeypatch.setattr(ntkbench, "trace", lambda *a, **k: dataclasses.replace(trace(*a, **k), method="other"))
    with pytest.raises(Absent, match="other answers for recurrent_exact_trace"):
        Case("gru/recurrent_exact_trace/torch/trace")


def test_other_errors_of_a_method_are_not_hidden(monkeypatch):
    def trace(*arguments, **keywords):
        raise RuntimeError("broken")

    monkeypatch.setattr(ntkbench, "trace", trace)
    with pytest.raises(RuntimeError, match="broken"):
        Case("gru/auto/torch/trace")


def test_a_call_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("NTKBENCH_CACHE", str(tmp_path))
    Case("gru/auto/torch/norm").error()
    assert list(tmp_path.iterdir()) == []


def test_one_thread_is_used_on_systems_without_cpu_affinity(monkeypatch):
    threads = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    for name in ("sched_setaffinity", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    cases.one_thread()
    assert threads == [1]


def test_a_measuring_process_has_one_thread_however_early_numpy_is_loaded():
    """asv imports the suite's files in alphabetical order."""
    code = "import history.cases, history.ntk, json, threadpoolctl\n"
    code += "print(json.dumps([pool['num_threads'] for pool in threadpoolctl.threadpool_info()]))"
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    environment = kept | {"PYTHONPATH": str(paths.ROOT / "benchmarks")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found and set(found) == {1}


def test_a_peak_of_memory_is_seen_after_it_is_freed():
    before = cases.settled_bytes()
    held = b"x" * 2**26
    del held
    assert 0.9 * 2**26 < cases.peak_bytes() - before < 1.5 * 2**26


@pytest.fixture(params=["asv.conf.json", "asv.isolated.json"])
def configuration(request):
    """A configuration of asv, without its comments."""
    text = (paths.ROOT / request.param).read_text(encoding="utf-8")
    return json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))


def test_asv_runs_the_version_that_is_pinned(configuration):
    pins = (paths.ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert f"asv_runner=={configuration['matrix']['req']['pip+asv_runner']}" in pins


@pytest.mark.slow
def test_asv_measures_a_case(tmp_path):
    if not paths.git("rev-parse", "HEAD"):
        pytest.skip("asv keeps the results of commits alone")
    text = (paths.ROOT / "asv.conf.json").read_text(encoding="utf-8")
    own = {"repo": paths.ROOT, "benchmark_dir": paths.ROOT / "benchmarks/history", "results_dir": tmp_path / "results"}
    for key, value in own.items():
        text = re.sub(rf'("{key}": )"[^"]*"', rf'\1"{value}"', text)
    (tmp_path / "asv.conf.json").write_text(text, encoding="utf-8")
    environment = os.environ | {"HOME": str(tmp_path), "ASV_PYTHONPATH": str(paths.ROOT / "src")}
    for line in ("machine --yes", "run --python=same --set-commit-hash HEAD --bench gru/recurrent_exact_trace"):
        command = [sys.executable, "-m", "asv", *line.split(), "--config", str(tmp_path / "asv.conf.json")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (file for file in (tmp_path / "results").glob("*/*.json") if file.name != "machine.json")
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    at = CASES.index("gru/recurrent_exact_trace/torch/trace")
    error, peak, seconds = (results[f"ntk.{name}"][0][at] for name in MEASURED)
    assert error < 1e-5 and 0 <= peak < 2**30 and 0 < seconds < 10
    assert sorted(tmp_path.iterdir()) == sorted(tmp_path / name for name in LEFT), "asv's suite left something behind"


def test_a_virtualenv_sees_the_prepared_environment_and_the_commit(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    python, step = str(tmp_path / "env" / "bin" / "python"), str(paths.ROOT / "benchmarks" / "prepared.py")
    refused = subprocess.run([python, step, str(tmp_path), str(paths.ROOT)], capture_output=True, text=True)
    assert refused.returncode == 1 and "run make once" in refused.stderr
    commit = tmp_path / "commit"
    (commit / "src" / "ntkbench").mkdir(parents=True)
    (commit / "src" / "ntkbench" / "__init__.py").write_text("commit = 1", encoding="utf-8")
    subprocess.run([python, step, sys.prefix, str(commit)], check=True)
    shutil.rmtree(commit)  # asv may put another one there
    code = "import ntkbench, numpy; assert ntkbench.commit == 1; print(ntkbench.__file__, numpy.__file__)"
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, env=bare).stdout.split()
    assert found[0].startswith(str(tmp_path / "env")) and found[1].startswith(sys.prefix)
