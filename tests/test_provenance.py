"""Provenance of rows: the commit, and whether there are uncommitted changes."""

import shutil
import subprocess

import pytest

from ntkbench import operators, paths
from ntkbench.measure import provenance
from ntkbench.options import Target


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A checkout with one commit."""
    root = tmp_path_factory.mktemp("committed")
    for folder in (*provenance.CODE, "docs"):
        (root / folder).mkdir(parents=True)
        (root / folder / "committed.py").write_text("1\n", encoding="utf-8")
    (root / ".gitignore").write_text("__pycache__/\nresults/*\n!results/reference/\n", encoding="utf-8")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    for command in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "--message", "first"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root


@pytest.fixture
def repository(committed, tmp_path, monkeypatch):
    """A copy of the checkout, from which ntkbench appears to be imported."""
    root = tmp_path / "copy"
    shutil.copytree(committed, root)
    monkeypatch.setattr(paths, "ROOT", root)
    monkeypatch.setattr(paths, "IN_CHECKOUT", True)
    provenance.provenance.cache_clear()
    yield root
    provenance.provenance.cache_clear()


FILES = [f"{folder}/{name}.py" for folder in provenance.CODE for name in ("committed", "mine")]


@pytest.mark.parametrize("file", FILES)
def test_a_changed_file_and_a_new_one_in_a_folder_of_code_are_uncommitted_changes(repository, file):
    (repository / file).write_text("2\n", encoding="utf-8")
    assert provenance.provenance().git_dirty is True


@pytest.mark.parametrize("file", ["docs/notes.md", "mine.yaml", "src/__pycache__/mine.pyc", "results/mine/table.csv"])
def test_new_files_elsewhere_are_no_uncommitted_changes(repository, file):
    (repository / file).parent.mkdir(parents=True, exist_ok=True)
    (repository / file).write_text("2\n", encoding="utf-8")
    assert provenance.provenance().git_dirty is False


def test_plug_ins_exact_values_and_weights_are_in_folders_of_code():
    from ntkbench.problems.base import reference, weights
    from ntkbench.registry import PACKAGES, files

    read = [file for package in PACKAGES.values() for file in files(package)]
    read += [weights.committed_file("mlp_he"), reference.file_of("mlp_he", paths.REFERENCE)]
    folders = [paths.ROOT / folder for folder in provenance.CODE]
    assert [file for file in read if not any(file.is_relative_to(folder) for folder in folders)] == []


@pytest.fixture
def alone(monkeypatch):
    """A machine without a GPU, where no process may be started."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(provenance.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(provenance.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_without_a_gpu_the_device_is_known(alone, backend):
    device = provenance.device.__wrapped__
    assert [device(backend, asked) for asked in ("auto", "cpu", "cuda")] == ["cpu", "cpu", None]


@pytest.mark.parametrize(("program", "found"), [("print('hello'); print('a GPU')", "a GPU"), ("1 / 0", None)])
def test_where_there_may_be_a_gpu_another_process_finds_the_device(monkeypatch, program, found):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(provenance, "DEVICE", program)
    assert provenance.device.__wrapped__("torch", "auto") == found


@pytest.mark.slow
def test_another_process_finds_the_same_device(monkeypatch):
    found = operators.device_name(Target("torch"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert provenance.device.__wrapped__("torch", "auto") == found


def test_the_plug_in_with_which_jax_uses_a_gpu_is_among_the_packages(monkeypatch):
    monkeypatch.setattr(provenance, "_version", {"jax": "1", "jax-cuda12-plugin": "2"}.get)
    assert provenance.packages.__wrapped__() == ("jax 1", "jax-cuda12-plugin 2")
