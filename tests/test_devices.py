"""Faults specific to GPUs, tested on a CPU: where tensors are created, what starts a device, and which GPU is used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import ntkbench
from ntkbench import operators, paths
from ntkbench.errors import BadInput, OverMemory
from ntkbench.estimators import lanczos
from ntkbench.layerwise.kernel import Trace
from ntkbench.measure import engine
from ntkbench.measure.config import Config
from ntkbench.operators import arrays
from ntkbench.operators import torch as backend
from ntkbench.operators.plain import PlainNetwork
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.problems.base import source
from ntkbench.problems.base.module import last_layer


class Positions(nn.Module):
    """A network with a normalised weight that creates a tensor without naming its device."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(5, 4)
        self.layer = parametrizations.weight_norm(nn.Linear(4, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(x + self.positions(torch.arange(x.shape[1])))).mean(1)


@pytest.fixture
def model() -> Positions:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Positions()


X = torch.linspace(-1, 1, 60).view(3, 5, 4)


def test_mps_is_refused_in_one_line(model):
    """It has no float64."""
    with pytest.raises(BadInput, match=r"^unknown device 'mps'; allowed: auto, cpu, cuda$"):
        ntkbench.trace(model, X, device="mps")


def test_tracing_on_the_cpu_ignores_the_default_device(model):
    parameters = {key: w.detach() for key, w in model.named_parameters()}
    expected = Trace.of(model, parameters, X).layers
    with torch.device("meta"):
        found = Trace.of(model, parameters, X).layers
    assert [(type(layer), layer.parameters) for layer in found] == [(type(e), e.parameters) for e in expected]
    assert any(layer.computed is not None for layer in found)


@pytest.mark.parametrize("method", ["structured_derivatives", "jacobian_contraction", "naive_jacobian"])
def test_a_kernel_on_the_cpu_ignores_the_default_device(model, method):
    kernel = ntkbench.Kernel(model, X)
    expected = ntkbench.Kernel(model, X, dtype="float64").trace(method="naive_jacobian").value
    with torch.device("meta"):
        assert kernel.trace(method=method).value == pytest.approx(expected, rel=1e-4)
        assert kernel.ntk().device.type == "cpu"


class Elsewhere(Tensor):
    """A tensor that NumPy cannot read on its device."""

    def __array__(self, dtype=None):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self):
        return self.as_subclass(Tensor)


def test_eigenvalues_are_those_of_a_kernel_on_another_device(model, monkeypatch):
    kernel = ntkbench.Kernel(model, X)
    theta = kernel.ntk()
    monkeypatch.setattr(kernel, "_checked", lambda made: made.as_subclass(Elsewhere))
    expected = np.linalg.eigvalsh(theta.double().numpy())[::-1][:3]
    assert kernel.eigenvalues(3).values == pytest.approx(expected, rel=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["structured_derivatives", "jacobian_contraction", "naive_jacobian"])
def test_a_kernel_on_a_gpu_is_that_on_the_cpu(model, method):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    expected = ntkbench.Kernel(model, X, dtype="float64", device="cpu").norm(method="naive_jacobian").value
    assert ntkbench.norm(model, X, device="cuda", method=method).value == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that torch sees and that must not be started, since a process that has started one cannot be forked."""

    def start():
        raise AssertionError("the device was started")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", start)


def test_a_configuration_is_read_without_starting_the_device(gpu):
    raw = yaml.safe_load((paths.ROOT / "config" / "smoke.yaml").read_text()) | {"device": "cuda"}
    assert Config.check(raw, "smoke.yaml").device == "cuda"
    operators.check_device(Target(device="cuda"))


def test_a_target_uses_the_current_one_of_several_gpus(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert backend.device(Target(device="cuda")) == backend.device(Target()) == torch.device("cuda", 1)
    assert backend.device(Target(device="cpu")) == torch.device("cpu")


def test_memory_cached_by_torch_counts_as_free(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name, size in {"mem_get_info": (10 * 2**30, 80 * 2**30), "memory_reserved": 50 * 2**30}.items():
        monkeypatch.setattr(torch.cuda, name, lambda where, size=size: size)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda where: 20 * 2**30)
    operators.check_result(2**17, 78_000, Target(device="cuda"))
    with pytest.raises(OverMemory, match=r"takes 40\.5 GiB, and 40 GiB are free"):
        operators.check_result(2**17, 83_000, Target(device="cuda"))


def test_processes_of_a_run_inherit_the_callers_python_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/site", "", "here", str(tmp_path / "src")]))
    expected = [str(tmp_path), str(tmp_path / "src"), "/site", os.path.abspath("here")]
    assert paths.python_path(tmp_path).split(os.pathsep) == expected
    given = engine._Environment(Path("plan.json")).env_vars
    assert given["PYTHONPATH"] == given["ASV_PYTHONPATH"] == paths.python_path()
    assert "/site" in given["PYTHONPATH"].split(os.pathsep)
    monkeypatch.delenv("PYTHONPATH")
    assert paths.python_path(tmp_path).split(os.pathsep) == expected[:2]


class Watched(nn.Module):
    """A recurrent layer that records at each call, of copies too, whether cuDNN is enabled."""

    seen: ClassVar[list[bool]] = []

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.backends.cudnn.enabled)
        return self.layer(x)[0]


@pytest.mark.parametrize("training", [True, False])
def test_backward_passes_of_recurrent_layers_in_eval_mode_do_without_cudnn(training):
    Watched.seen.clear()
    network = Watched().train(training)
    parameters = {key: w.detach() for key, w in network.named_parameters()}
    plain = PlainNetwork(network, parameters, owned=True)
    for memory in (None, 1):
        assert len(plain.gradient(X, torch.ones(3 * 5 * 3), memory)) == len(parameters)
    plain.pullback(X)(torch.ones(3 * 5 * 3))
    Problem("watched", network, X.numpy(), {key: w.numpy() for key, w in parameters.items()}).digest()
    assert set(Watched.seen) == {training}
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("method", ["structured_derivatives", "direct", "hutchpp"])
def test_rounding_bounds_follow_the_precision_of_products(monkeypatch, method):
    """As if products were in TF32, which CPUs do not have."""
    model, x = nn.Linear(4, 3), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    passes = {"passes": 30} if method == "hutchpp" else {}
    plain = ntkbench.trace(model, x, method=method, **passes)
    monkeypatch.setattr(arrays, "epsilon", lambda array: arrays.TF32)
    rounded = ntkbench.trace(model, x, method=method, **passes)
    assert plain.rounding < 1e-4 < arrays.TF32 < rounded.rounding
    assert rounded.interval()[1] - rounded.interval()[0] > plain.interval()[1] - plain.interval()[0]


def test_eigenvalues_in_tf32_have_its_errors(monkeypatch):
    """As if products were in TF32, which CPUs do not have."""
    model, x = nn.Linear(4, 3), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    plain = ntkbench.Kernel(model, x).eigenvalues(2).errors
    monkeypatch.setattr(lanczos, "epsilon", lambda array: arrays.TF32)
    rounded = ntkbench.Kernel(model, x).eigenvalues(2).errors
    assert (rounded > 1000 * plain).all()


def test_networks_are_checked_where_their_weights_are(model, monkeypatch):
    """Kernels may be computed elsewhere: tensors that the network creates must meet its weights."""
    kernel = ntkbench.Kernel(model, X)
    monkeypatch.setattr(source.TorchSource, "settings", lambda self, target, index: torch.device("meta"))
    other = Positions()
    assert kernel.at(other).problem.theta_0.keys() == kernel.problem.theta_0.keys()
    assert kernel._beside(other).problem.theta_f is not None
    with kernel._settings():
        assert last_layer(kernel.problem).theta_0
    with kernel._checks():
        assert kernel._source.notes == ()
