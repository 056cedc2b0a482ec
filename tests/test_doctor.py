"""The doctor: the parts of an installation, and every kind of fault in it."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys

import pytest
from click.testing import CliRunner

from ntkbench import doctor, methods, paths, problems, registry
from ntkbench.cli import main
from ntkbench.errors import NtkbenchError
from ntkbench.problems.base import storage


@pytest.fixture(scope="module")
def found():
    return doctor.diagnose()


@pytest.fixture
def one_kind(monkeypatch):
    """Diagnose methods alone, which is quick."""
    monkeypatch.setattr(registry, "PACKAGES", {"method": "ntkbench.methods"})


def test_a_sound_installation_has_nothing_broken(found):
    assert found.faults == [] and list(found.lines())[-1] == "nothing is broken"


def test_it_lists_the_parts_of_the_installation(found):
    said = "\n".join(found.lines())
    assert f"ntkbench {importlib.metadata.version('ntkbench')} in {paths.ROOT}, Python {sys.version.split()[0]}" in said
    assert f"git: {paths.git('rev-parse', 'HEAD')}, " in said
    assert "torch: cpu" in said and "jax: cpu" in said
    assert f"package numpy {importlib.metadata.version('numpy')}" in said and "package neural-tangents " in said
    assert f"store {paths.REFERENCE}: " in said and f"store {paths.cache()}: " in said
    assert f"plug-ins, method: {len(methods.names())}" in said
    for package in found.packages:
        optional = package.needed_for == "slurm"  # not pinned: needed on a cluster alone
        assert package.installed or optional, f"{package.name} is declared and not installed"
    torch = next(package for package in found.packages if package.name == "torch")
    assert torch.required.startswith(">=") and torch.tested and torch.needed_for == ""


def test_a_broken_plug_in_is_named_with_file_and_line(one_kind, monkeypatch, tmp_path):
    (tmp_path / "torn.py").write_text("x = 1\ndef f(:\n")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    found = doctor.diagnose()
    assert found.faults == [f"method 'torn' is broken: {tmp_path / 'torn.py'}:2: SyntaxError: invalid syntax"]
    assert list(found.lines())[-1] == f"BROKEN: {found.faults[0]}"


def test_the_command_fails_for_a_plug_in_that_ends_whoever_imports_it(monkeypatch, tmp_path):
    head = "from ntkbench.problems.base import problem\n\n@problem\ndef mine(N: int = 4):\n    return None\n\n"
    (tmp_path / "unreadable.py").write_text(f"{head}raise SystemExit('bye')\n")
    monkeypatch.setattr(problems, "__path__", [*problems.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "PACKAGES", {"problem": "ntkbench.problems"})
    monkeypatch.setattr(doctor, "BACKENDS", ())
    done = CliRunner().invoke(main.commands["doctor"])
    assert done.exit_code == 1 and "unreadable.py" in done.output and "SystemExit: bye" in done.output


@pytest.mark.parametrize("name", ["exact/digits_conv.json", "weights/digits_conv.npz"])
@pytest.mark.parametrize("spoil", [lambda data: data[:-20], lambda data: b"", lambda data: data.replace(b"1", b"2", 1)])
def test_a_damaged_file_is_named(one_kind, monkeypatch, tmp_path, name, spoil):
    file = tmp_path / name
    file.parent.mkdir()
    shutil.copy(paths.REFERENCE / name, file)
    monkeypatch.setenv("NTKBENCH_CACHE", str(tmp_path))
    before = doctor.diagnose()
    assert before.faults == [] and (before.stores[1].files, before.stores[1].size) == (1, file.stat().st_size)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(NtkbenchError):
        storage.parse(file)
    (fault,) = doctor.diagnose().faults
    assert fault.startswith(f"{file} is damaged: ") and len(fault.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "version", "fault"),
    [
        ("torch", "1.0", "package torch is 1.0, and must be >=2.11"),
        ("numpy", None, "package numpy is missing"),
        ("jax", None, None),
        ("jax", "0.1", "package jax is 0.1, and must be >=0.10.2"),
        ("torch", "99.0+cu130", None),
    ],
)
def test_versions_are_compared_with_those_that_are_declared(one_kind, monkeypatch, name, version, fault):
    real = importlib.metadata.version

    def other(package):
        if package != name:
            return real(package)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(importlib.metadata, "version", other)
    found = doctor.diagnose()
    assert found.faults == ([fault] if fault else [])
    assert f"package {name} {version or 'missing'}" in "\n".join(found.lines())


def test_the_lowest_versions_are_not_the_tested_ones(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (tmp_path / "requirements.txt").write_text("# numpy==1.0\nnumpy==2.4.6\ntorch==2.13.0 --hash=x\n", encoding="utf-8")
    (tmp_path / doctor.FLOORS).write_text("numpy==2.0\nscipy==1.14\n", encoding="utf-8")
    (tmp_path / "requirements-no-deps.txt").write_text("neural-tangents==0.6.5\n", encoding="utf-8")
    assert doctor._tested() == {"numpy": "2.4.6", "torch": "2.13.0", "neural-tangents": "0.6.5"}
    assert (paths.REFERENCE.parents[1] / doctor.FLOORS).exists()


def test_without_a_checkout_requirements_come_from_the_installed_package(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda _: ["numpy", "torch>=2.11", 'jax>=0.10.2; extra == "jax"']
    )
    found = doctor.diagnose()
    assert [(p.name, p.required, p.needed_for, p.tested) for p in found.packages[:3]] == [
        ("numpy", "", "", None),
        ("torch", ">=2.11", "", None),
        ("jax", ">=0.10.2", "jax", None),
    ]
    assert found.commit is None and "git: none" in found.lines()


def test_kinds_and_backends_with_missing_packages_are_reported(monkeypatch):
    monkeypatch.setattr(registry, "PACKAGES", {"method": "ntkbench.methods", "figure": "ntkbench.no_such_package"})
    monkeypatch.setattr(doctor, "BACKENDS", ("torch", "no_such_backend"))
    monkeypatch.setattr(doctor, "Target", lambda backend: type("Target", (), {"backend": backend, "device": "cpu"})())
    found = doctor.diagnose()
    assert found.plugins["figure"] == "ModuleNotFoundError: No module named 'ntkbench.no_such_package'"
    assert "No module named" in found.devices["no_such_backend"] and found.faults == []
