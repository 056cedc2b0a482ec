"""User functions as problems of a configuration."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ntkbench
from ntkbench import factory, methods, outside, problems, registry
from ntkbench.errors import BadInput, NtkbenchError
from ntkbench.measure import fingerprints
from ntkbench.measure.cells import cells
from ntkbench.measure.config import Config
from ntkbench.options import Target
from ntkbench.problems.base import factories, problem, reference

MODULE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Linear(3, 2), torch.ones(4, 3)

def two():
    torch.manual_seed(0)
    return nn.Bilinear(3, 2, 2), {"a": torch.ones(4, 3), "b": torch.ones(4, 2)}, lambda m, x: m(x["a"], x["b"])

def recurrent():
    torch.manual_seed(0)
    return nn.GRU(3, 2), torch.randn(5, 4, 3)

def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), torch.randn(4, 3)

def dropping():
    return nn.Sequential(nn.Linear(3, 2), nn.Dropout()), torch.ones(4, 3)
"""
MINE = "my_networks_of_tests"
_numbers = itertools.count()


@pytest.fixture
def name():
    """A name that no other test uses: plug-ins stay loaded."""
    return f"made_here_{next(_numbers)}"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The current folder, with a module of user functions."""
    modules = [sys.modules[package] for package in registry.PACKAGES.values() if package in sys.modules]
    before = [list(module.__path__) for module in modules]
    monkeypatch.setenv(outside.VARIABLE, os.environ.get(outside.VARIABLE, ""))
    monkeypatch.setenv("NTKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / f"{MINE}.py").write_text(MODULE)
    monkeypatch.chdir(folder)
    yield folder
    for module, found in zip(modules, before, strict=True):
        module.__path__[:] = found
    sys.modules.pop(MINE, None)


def config(factories, *names, **more):
    grid = [{"problems": [name], "methods": ["structured_derivatives"], "metrics": ["trace"]} for name in names]
    return Config.check({"profile": "x", "threads": 1, "factories": factories, "grid": grid, **more}, "test")


def test_a_factory_is_a_problem_of_the_grid(mine, name):
    made = config({name: f"{MINE}:make"}, name)
    assert [cell.problem for cell in cells(made)] == [name]
    problem = problems.load(name)
    assert (problem.N, problem.O, problem.P, problem.theta_f) == (4, 2, 8, None)
    method = methods.get("structured_derivatives")
    found = method.estimate(method.prepare(problem, Target("torch", "float32", "cpu")), "trace")
    assert found.value == pytest.approx(4 * 2 * (3 + 1))
    assert config({name: f"{MINE}:make"}, name).factories, "once is enough"
    with pytest.raises(BadInput, match=rf"{name} has no sizes; allowed: '{name}' alone"):
        problems.load(f"{name}[N=3]")


@pytest.mark.slow
def test_networks_of_factories_are_checked_like_those_of_a_kernel(mine, name):
    config({f"{name}_{kind}": f"{MINE}:{kind}" for kind in ("two", "recurrent", "normed")}, f"{name}_recurrent")
    two, recurrent, normed = (problems.load(f"{name}_{kind}") for kind in ("two", "recurrent", "normed"))
    assert two.O == 2
    assert recurrent.output_shape == (4, 5, 2) and not recurrent.samples_interact
    assert normed.samples_interact
    with pytest.raises(BadInput, match=r"Dropout in train mode \(1\): call model.eval\(\) first"):
        config({name: f"{MINE}:dropping"}, name)


@pytest.mark.slow
def test_child_processes_know_the_problem_in_any_folder(mine, name, tmp_path):
    config({name: f"{MINE}:make"}, name)
    code = f"from ntkbench import problems; print(problems.load({name!r}).P)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "8"


WITH_CHECKPOINT = """
import torch
from torch import nn
from my_layers_of_tests import layer

def make():
    torch.manual_seed(0)
    model = layer()
    model.load_state_dict(torch.load("weights.pt"))
    return model, torch.ones(4, 3)
"""
LAYER = "from torch import nn\n\ndef layer():\n    return nn.Linear(3, 2)\n"


def save_weights(here, scale):
    weights = {"weight": scale * torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}
    torch.save(weights, here / "weights.pt")


CHANGES = {
    "the file": lambda here: (here / f"{MINE}.py").write_text(f"{WITH_CHECKPOINT}\n# changed\n"),
    "a file that it imports": lambda here: (here / "my_layers_of_tests.py").write_text(f"{LAYER}\n# changed\n"),
    "weights that it loads": lambda here: save_weights(here, 2.0),  # last: the others are seen without an import
}


@pytest.fixture
def checkpoint(mine):
    (mine / f"{MINE}.py").write_text(WITH_CHECKPOINT)
    (mine / "my_layers_of_tests.py").write_text(LAYER)
    save_weights(mine, 1.0)
    yield mine
    sys.modules.pop("my_layers_of_tests", None)


@pytest.mark.slow
def test_rows_are_measured_again_if_a_source_of_the_network_changes(checkpoint, name):
    before = factory._plugin(name, f"{MINE}:make")
    assert factory._plugin(name, f"{MINE}:make") == before
    for what, change in CHANGES.items():
        change(checkpoint)
        after = factory._plugin(name, f"{MINE}:make")
        assert after != before, what
        before = after
    config({name: f"{MINE}:make"}, name)
    assert registry.of("problem").file(name) in fingerprints.sources(problems.module_of(name))


def test_installed_packages_are_not_sources_of_a_network(tmp_path):
    assert outside.is_local(tmp_path / "my_layers.py")
    for folder in ("site-packages", "dist-packages"):
        assert not outside.is_local(tmp_path / folder / "torch" / "nn.py")
    assert not outside.is_local(Path(os.__file__)) and not outside.is_local(Path(factories.__file__))


def test_a_network_that_changes_during_a_run_is_refused(checkpoint, name):
    config({name: f"{MINE}:make"}, name)
    whole = {file: file.read_bytes() for file in checkpoint.iterdir() if file.is_file()}
    for change in CHANGES.values():
        change(checkpoint)
        with pytest.raises(NtkbenchError, match=r"start the run again"):
            problems.load(name)
        for file, data in whole.items():
            file.write_bytes(data)


ACTIVATED = """
import json
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    with open("settings.json") as file:  # in the module's folder
        chosen = json.load(file)
    first = nn.Linear(1, 8).requires_grad_(chosen["first"])
    x = torch.linspace(0.0, 60.0, 130).reshape(-1, 1)
    return nn.Sequential(first, getattr(nn, chosen["activation"])(), nn.Linear(8, 2)), x
"""


def test_what_a_network_computes_is_part_of_its_identity(mine, tmp_path, monkeypatch):
    """ReLU and ReLU6 are equal on the first samples, and no tensor differs."""
    (mine / f"{MINE}.py").write_text(ACTIVATED)
    monkeypatch.chdir(tmp_path)

    def made(**settings):
        (mine / "settings.json").write_text(json.dumps({"first": True, "activation": "ReLU"} | settings))
        return factories._made(f"{MINE}:make", str(mine))[1]

    known = {"files": {}, **made()}
    assert {"files": {}, **made()} == known
    for changed in ({"activation": "ReLU6"}, {"activation": "Tanh"}, {"first": False}):
        assert made(**changed) != {key: known[key] for key in ("contents", "computes")}, changed
        with pytest.raises(NtkbenchError, match=r"than when the configuration was read"):
            factories.definition(f"{MINE}:make", str(mine), known)
    made()
    factories.definition(f"{MINE}:make", str(mine), known)


def test_rounding_changes_neither_rows_nor_the_network(mine):
    known = factories._made(f"{MINE}:make", str(mine))[1]["computes"]
    noisy = {dtype: [number * (1 + 1e-12) for number in numbers] for dtype, numbers in known.items()}
    assert not factories._differ(noisy, known)
    other = {dtype: [number * (1 + 1e-3) for number in numbers] for dtype, numbers in known.items()}
    assert factories._differ(other, known)


UNUSUAL = """
import torch
from torch import nn

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.scale = nn.Linear(3, 2), torch.full((2,), 2.0)  # no buffer

    def forward(self, x):
        return self.scale * self.linear(x)

def scaled():
    return Scaled(), torch.ones(4, 3)

def half():
    return nn.Linear(3, 2).to(getattr(torch, "bfloat16")), torch.ones(4, 3)

def mixed():
    return nn.Sequential(nn.Linear(3, 2).double(), nn.Linear(2, 2)), torch.ones(4, 3)
"""


@pytest.mark.parametrize(
    ("kind", "P", "dtype"), [("scaled", 8, "float32"), ("half", 8, "float32"), ("mixed", 14, "float64")]
)
def test_networks_that_the_library_measures_can_be_problems(mine, monkeypatch, kind, P, dtype):
    (mine / f"{MINE}.py").write_text(UNUSUAL)
    torch.manual_seed(0)
    found, _ = factories._made(f"{MINE}:{kind}", str(mine))
    monkeypatch.setitem(problems.base.REGISTRY, f"unusual_{kind}", problem(lambda: found))
    made = problems.load(f"unusual_{kind}")
    assert (made.output_shape, made.P) == ((4, 2), P)
    assert {w.dtype.name for w in made.theta_0.values()} == {dtype}
    exact = reference.compute(made)["metrics"]["trace"]
    assert exact == pytest.approx(float(ntkbench.trace(made.module.double(), torch.ones(4, 3).double())))


def test_a_random_network_without_a_seed_is_refused(mine, name):
    (mine / f"{MINE}.py").write_text(MODULE.replace("torch.manual_seed(0)", "torch.seed()"))
    config({name: f"{MINE}:make"}, name)
    with pytest.raises(NtkbenchError, match=r"seed its random numbers, or start the run again"):
        problems.load(name)


@pytest.mark.parametrize(
    ("factories", "said"),
    [
        ({"digits_mlp": f"{MINE}:make"}, "digits_mlp is already a problem; choose another name"),
        ({"not a name": f"{MINE}:make"}, "not a name: not a valid problem name"),
        ({"class": f"{MINE}:make"}, "class: not a valid problem name"),
        ({"never_made": MINE}, "never_made: a factory is named module:function"),
        ({"never_made": "no_such_module_here:make"}, "never_made: there is no module 'no_such_module_here'"),
    ],
)
def test_bad_factories_are_named_in_one_line(mine, factories, said):
    with pytest.raises(BadInput, match=said) as refused:
        config(factories, "digits_mlp")
    assert "factories" in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_what_a_factory_returns_is_checked_before_anything_is_measured(mine, name):
    (mine / f"{MINE}.py").write_text("def make():\n    return 1\n")
    with pytest.raises(BadInput, match=r"must return \(model, inputs\)"):
        config({name: f"{MINE}:make"}, name)


def test_a_factory_that_ends_its_process_is_one_line(mine, name):
    (mine / f"{MINE}.py").write_text("import os\ndef make():\n    os._exit(3)\n")
    with pytest.raises(BadInput, match=f"{MINE}:make ended its process: exit status 3"):
        config({name: f"{MINE}:make"}, name)
