"""The installed package: what it declares, where it writes, and what it does not need."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ntkbench
from ntkbench import paths
from ntkbench.registry import PACKAGES

PACKAGE = paths.ROOT / "src" / "ntkbench"
PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]

OUTSIDE = {"neural_tangents": "neural-tangents", "curvlinops": "curvlinops-for-pytorch", "transformers": "transformers"}
"""Modules with instructions to install them in a message, which the library and its extra ``jax`` do not require."""
BY_NAME = {
    "operators": ("torch", "jax", "neural_tangents"),
    "operators.recurrent": ("torch", "jax", "jax_trajectory"),
}
"""Modules of the library that are imported by name at run time."""
RUN = {"snakemake"}
"""Packages that the pipeline runs as programs, and that no module imports."""
IN_CHECKOUT = "'.[{}]' (in ntkbench's checkout)"
"""How an extra is installed, as the README has it; the package is on no index."""
CARRIED = {"frozendict"}
"""Packages that neural-tangents needs, which is installed without its declared dependencies."""


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """Imports, with those inside functions and without those for type checkers; other packages are one node each."""
    return grimp.build_graph(
        "ntkbench", cache_dir=None, exclude_type_checking_imports=True, include_external_packages=True
    )


OWNERS = functools.cache(importlib.metadata.packages_distributions)


def third_party(modules: set[str]) -> set[str]:
    """Distributions of modules that are neither ntkbench's nor Python's."""
    tops = {module.partition(".")[0] for module in modules} - {"ntkbench"} - set(sys.stdlib_module_names)
    return {canonicalize_name(OUTSIDE.get(top) or OWNERS()[top][0]) for top in tops}


def library(graph: grimp.ImportGraph) -> set[str]:
    """All modules that public names reach, with the methods and backends that are loaded by name."""
    new = {f"ntkbench.{home}" for home in ntkbench._HOMES} | {"ntkbench.operators"}
    new |= {f"ntkbench.{room}.{name}" for room, loaded in BY_NAME.items() for name in loaded}
    new |= graph.find_children(PACKAGES["method"])
    found: set[str] = set()
    while new:
        module = new.pop()
        found.add(module)
        more = {module.rpartition(".")[0]} if module.startswith("ntkbench.") else set()
        new |= (graph.find_modules_directly_imported_by(module) | more) - found if module in graph.modules else set()
    return found


def test_the_library_imports_what_it_declares_and_declares_what_it_imports(graph):
    reached = library(graph)
    assert {"ntkbench.ladder", "ntkbench.layerwise.rules", "ntkbench.problems.base.weights", "scipy"} <= reached
    assert not {module for module in reached if module.split(".")[1:2] in (["measure"], ["studies"], ["figures"])}
    optional = names(EXTRAS["jax"]) | {canonicalize_name(name) for name in OUTSIDE.values()} | {"pandas"}
    assert third_party(reached) - optional == names(PROJECT["dependencies"])
    assert third_party(reached) & names(EXTRAS["jax"]) == names(EXTRAS["jax"]) - CARRIED


def test_the_lowest_tested_versions_are_the_lowest_allowed():
    lines = (paths.ROOT / "requirements-floors.txt").read_text(encoding="utf-8").splitlines()
    tried = dict(line.split("==") for line in lines if not line.startswith("#"))
    allowed = dict(line.split(">=") for line in PROJECT["dependencies"])
    assert tried.keys() == allowed.keys()
    different = {name for name in tried if tried[name] != allowed[name]}
    assert different == {"torch"}, "of torch only one build for the CPU is at hand"


def test_no_module_of_an_extra_is_imported_with_the_library(graph):
    """Only inside functions, except in modules of the JAX backend, which are themselves imported inside functions."""
    backend = {f"ntkbench.operators.{name}" for name in ("jax", "jax_kernel", "programs")}
    backend |= {f"ntkbench.operators.recurrent.{name}" for name in ("jax", "jax_trajectory")}
    own = graph.find_descendants("ntkbench") | {"ntkbench"}
    early = []
    for module in library(graph) & own - backend:
        for other in graph.find_modules_directly_imported_by(module) - own:
            if third_party({other}) - names(PROJECT["dependencies"]):
                found = graph.get_import_details(importer=module, imported=other)
                early += [
                    f"{module}:{one['line_number']}" for one in found if not _indented(module, one["line_number"])
                ]
    assert early == []


def _indented(module: str, line: int) -> bool:
    parts = PACKAGE.joinpath(*module.split(".")[1:])
    file = parts / "__init__.py" if parts.is_dir() else parts.with_suffix(".py")
    return file.read_text(encoding="utf-8").splitlines()[line - 1].startswith(" ")


def test_the_pipeline_imports_what_its_extra_declares(graph):
    everything = third_party(graph.modules) - {canonicalize_name(name) for name in OUTSIDE.values()}
    declared = names(PROJECT["dependencies"]) | names(EXTRAS["jax"]) | names(EXTRAS["pipeline"])
    assert everything - names(EXTRAS["zoo"]) == declared - RUN - CARRIED


def test_every_requirement_is_pinned_for_the_tests():
    pins = names(_lines("requirements.txt") + _lines("requirements-no-deps.txt"))
    extras = {name for extra, lines in EXTRAS.items() if extra != "slurm" for name in names(lines)}
    assert names(PROJECT["dependencies"]) | extras <= pins


def _lines(file: str) -> list[str]:
    lines = (paths.ROOT / file).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_citation_is_of_this_version():
    citation = (paths.ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == PROJECT["version"]
    assert ntkbench.__version__ == importlib.metadata.version("ntkbench")


def closure(requirements: list[str]) -> set[str]:
    """Distributions that pip installs for requirements, as far as they are installed here."""
    found: set[str] = set()
    left = [Requirement(line) for line in requirements]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate(default_environment() | {"extra": ""})
        if name in found or not applies:
            continue
        try:
            left += map(Requirement, importlib.metadata.requires(name) or [])
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A folder of installed packages: ntkbench and what its metadata ask for, as a wheel would have them."""
    folder = tmp_path_factory.mktemp("bare") / "site-packages"
    shutil.copytree(PACKAGE, folder / "ntkbench", ignore=shutil.ignore_patterns("__pycache__"))
    for name in closure(PROJECT["dependencies"]):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    return folder


def python(bare: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with the packages of a folder and no others, in its parent folder."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("NTKBENCH", "XDG", "PYTHON"))}
    home = bare.parent / "home"
    kept |= {
        "PYTHONPATH": str(bare),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "c"),
    }
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=bare.parent, env=kept | environment, capture_output=True, text=True)


STUB = """#!/bin/sh
echo "$PWD: $*" >> '{log}'
case "$1 $2" in
    "--version ") echo "Python 3.99.0" ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_package_installs_outside_of_the_checkout_with_each_python(tmp_path):
    log, stub, folder = tmp_path / "log", tmp_path / "python", tmp_path / "temporary"
    stub.write_text(STUB.format(log=log))
    stub.chmod(0o755)
    folder.mkdir()
    command = ["make", "--silent", "-C", str(paths.ROOT), "package", f"PYTHON={stub}"]
    command.append(f"PYTHONS=python-of-nobody {stub}")
    done = subprocess.run(command, env=os.environ | {"TMPDIR": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "skipped python-of-nobody, which is not on this machine",
        "installing ntkbench with Python 3.99.0 and the versions of requirements.txt",
    ]
    *_, made, installed, ran = log.read_text().splitlines()
    assert made.startswith(f"{paths.ROOT}: -m venv {folder}/")
    assert installed == f"{paths.ROOT}: -m pip install --quiet --constraint requirements.txt ."
    assert re.fullmatch(rf"{folder}/[^/]+: quickstart.py", ran)
    assert not any(folder.iterdir())


def test_a_warning_from_our_own_code_is_an_error():
    code = compile("import warnings; warnings.warn('said')", "example.py", "exec")
    with pytest.raises(UserWarning, match="said"):
        exec(code, {"__name__": "ntkbench.methods.example"})
    with pytest.warns(UserWarning, match="said"):
        exec(code, {"__name__": "another_package"})


LIBRARY = """
import os, pathlib, signal, sys
import numpy as np, psutil, scipy.special, torch

for name in ("sched_getaffinity", "fork", "forkpty", "killpg", "pwrite", "posix_fallocate", "sysconf", "O_DIRECTORY"):
    delattr(os, name)
for name in ("SIGKILL", "SIGALRM", "SIGHUP", "setitimer", "alarm"):
    delattr(signal, name)
for name in ("fcntl", "resource"):
    sys.modules[name] = None

import ntkbench
from ntkbench import ambient, methods, operators, paths
from ntkbench.options import Target
from ntkbench.problems.base import reference

here = pathlib.Path(ntkbench.__file__).parent
assert here.parent.name == "site-packages", here
assert ambient.cores() == os.cpu_count()
before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}

opened, rename = os.open, os.rename

def no_folders(path, *arguments, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)  # as Windows does
    return opened(path, *arguments, **more)

def closed_alone(old, new):
    assert os.path.abspath(old) not in [file.path for file in psutil.Process().open_files()]
    rename(old, new)

os.open, os.rename = no_folders, closed_alone

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
x = torch.randn(6, 3, dtype=torch.float64)
theta = ntkbench.ntk(net, x)
J = torch.stack([torch.cat([g.reshape(-1) for g in torch.autograd.grad(net(x).reshape(-1)[i], net.parameters())])
                 for i in range(12)])
torch.testing.assert_close(theta, J @ J.T)
np.testing.assert_allclose(ntkbench.trace(net, x).value, float(theta.trace()))
np.testing.assert_allclose(ntkbench.metrics_of(net, x)["norm"].value, float(theta.norm()))
assert 0 < ntkbench.norm(net, x, method="hutchinson", passes=40).value
kept = ntkbench.ntk(net, x, file="theta.npy", memory=2000)
np.testing.assert_allclose(kept, theta.numpy(), rtol=1e-9, atol=1e-12)
assert ntkbench.from_recurrent(torch.nn.GRU(3, 4), torch.randn(5, 4, 3)).N == 4
for name in methods.names():
    assert methods.get(name).title
assert methods.REGISTRY.broken() == []

tracker = ntkbench.Tracker(net, x, metrics=["trace"])
tracker(0)
asked = {
    "pandas": tracker.table,
    "transformers": tracker.trainer_callback,
    "jax": lambda: ntkbench.ntk(lambda p, x: x @ p, np.ones((3, 2)), params=np.ones((2, 2))),
    "jax backend": lambda: operators.device_name(Target(backend="jax")),
    "neural_tangents": lambda: methods.get("nt_structured_derivatives").prepare(None, None),
    "checkout": lambda: reference.commit(["mlp"]),
}
for name, call in asked.items():
    try:
        call()
    except ntkbench.NtkbenchError as error:
        print(name, "|", error)

assert paths.git("rev-parse", "HEAD") is None
print("cache |", paths.cache())
assert before == {path: path.stat().st_mtime_ns for path in here.rglob("*")}
"""


@pytest.mark.slow
def test_the_library_works_with_its_requirements_alone_and_without_posix(bare):
    """A missing extra is reported in one line, and nothing is written into the package."""
    done = python(bare, "-c", LIBRARY)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" | ", 1) for line in done.stdout.splitlines())
    assert said.pop("cache") == str(bare.parent / "home" / "c" / "ntkbench")
    for asked, name, install in (
        ("pandas", "pandas", "pandas"),
        ("transformers", "transformers", "transformers"),
        ("jax", "jax", IN_CHECKOUT.format("jax")),
        ("jax backend", "jax", IN_CHECKOUT.format("jax")),
        ("neural_tangents", "neural_tangents", f"--no-deps neural-tangents==0.6.5, after {IN_CHECKOUT.format('jax')}"),
    ):
        needed = f" needs {name}, which is not installed; install it with: pip install {install}"
        assert said.pop(asked).endswith(needed)
    assert said.pop("checkout").startswith("ntkbench reference needs a checkout of ntkbench's repository, and ")
    assert said == {}


def test_the_command_without_its_extra_fails_in_one_line(bare):
    done = python(bare, "-m", "ntkbench", "methods")
    said = "ntkbench: the ntkbench command needs click, which is not installed; install it with: pip install"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{said} {IN_CHECKOUT.format('pipeline')}\n")
