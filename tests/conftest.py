"""What the tests share: a cache of their own, no network, small problems, and J written out by plain autograd."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from ntkbench import paths, problems
from ntkbench.problem import Problem

# No deadlines: the first example of a test pays for imports and kernels. The same examples every time.
settings.register_profile("ntkbench", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("ntkbench")

SMALL = ("tanh_net", "digits_conv[N=3]", "gru_hazelden[N=2,T=2]", "mlp_hazelden[N=2]")
"""Problems that are small enough to write J out, one of each family."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that the processes that share the tests end together."""
    longest = ("test_kills.py", "test_misbehaviour.py", "test_pipeline.py")
    items.sort(key=lambda item: item.path.name not in longest)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this session's own, so that nothing left over from before can make a test pass."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("NTKBENCH_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module", autouse=True)
def processors() -> Iterator[None]:
    """Those that the process had: a study with one thread keeps it to one, and other files need two."""
    had = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, had)


@pytest.fixture(scope="session", autouse=True)
def offline() -> Iterator[None]:
    """No test may fetch MNIST."""
    import sklearn.datasets

    def refused(*args: object, **kwargs: object) -> None:
        raise OSError("there is no network in the tests")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sklearn.datasets, "fetch_openml", refused)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Problems this small gain nothing from threads, and lose a lot where other processes want the cores."""
    import torch

    torch.set_num_threads(1)


def tanh_network(name: str, N: int, inputs: int, hidden: int, outputs: int) -> Problem:
    """A smooth two-layer network in both backends."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ends = [nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)) for _ in range(2)]
        x = torch.randn(N, inputs)

    def jax_forward(weights, x):
        import jax.numpy as jnp

        hidden = jnp.tanh(x @ weights["0.weight"].T + weights["0.bias"])
        return hidden @ weights["2.weight"].T + weights["2.bias"]

    theta_0, theta_f = ({key: w.detach().numpy().copy() for key, w in end.named_parameters()} for end in ends)
    return Problem(name, ends[0], x.numpy(), theta_0, theta_f, jax_forward)


NETWORKS = {"tanh_net": (3, 3, 4, 2), "wide": (40, 6, 10, 8)}
"""Smooth problems that only the tests have: 6 x 26, and 320 x 158 for what needs many more outputs than probes."""


@functools.cache
def loaded(label: str) -> Problem:
    """A problem from its label, :data:`NETWORKS` included; built once a session."""
    return tanh_network(label, *NETWORKS[label]) if label in NETWORKS else problems.load(label)


@pytest.fixture(scope="session")
def load() -> Callable[[str], Problem]:
    """See :func:`loaded`."""
    return loaded


@pytest.fixture(scope="session")
def tiny() -> Problem:
    """The smallest problem, n = 6 and P = 26."""
    return loaded("tanh_net")


@functools.cache
def _dense(label: str, end: str) -> np.ndarray:
    return written_out(loaded(label), end)


@pytest.fixture(scope="session")
def dense() -> Callable[[str, str], np.ndarray]:
    """J of a problem of a label at an end, in float64."""
    return _dense


def written_out(problem: Problem, end: str = "theta_0") -> np.ndarray:
    """J in float64, ``[n, P]``, by a loop over outputs of plain autograd and none of ntkbench's operators."""
    import torch

    module = copy.deepcopy(problem.module).double()
    weights = problem.weights(end)
    with torch.no_grad():
        for key, w in module.named_parameters():
            if key in weights:
                w.copy_(torch.from_numpy(weights[key]))
    theta = [w for key, w in module.named_parameters() if key in weights]
    x = torch.from_numpy(problem.x)
    outputs = module(x.double() if x.is_floating_point() else x).reshape(-1)
    rows = []
    for output in outputs:
        grads = torch.autograd.grad(output, theta, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows).numpy()


def metrics_of(theta: np.ndarray, theta_f: np.ndarray | None = None) -> dict[str, float]:
    """The metrics by their definitions, from Theta (and Theta_f) written out."""
    norm = np.linalg.norm(theta)
    values = {"trace": np.trace(theta), "norm": norm, "effective_rank": np.trace(theta) ** 2 / norm**2}
    if theta_f is not None:
        values["alignment"] = np.trace(theta @ theta_f) / (norm * np.linalg.norm(theta_f))
    return {key: float(value) for key, value in values.items()}


def checkout(folder: Path) -> Path:
    """A copy of what a run needs, whose files a test may change; the reference is the original one."""
    for name in ("src", "benchmarks", "config", "profiles"):
        shutil.copytree(paths.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("Snakefile", "environment.yml"):
        shutil.copy(paths.ROOT / name, folder)
    (folder / "results").mkdir()
    (folder / "results" / "reference").symlink_to(paths.ROOT / "results" / "reference")
    return folder


def snakemake(folder: Path, *arguments: str, root: Path = paths.ROOT, **options: Any) -> subprocess.Popen[str]:
    """The pipeline of a checkout, begun in a folder of its own."""
    tools = Path(sys.executable).parent
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": f"{root}:{root / 'src'}"}
    command = [str(tools / "snakemake"), *arguments, "--snakefile", str(root / "Snakefile"), "--directory", str(folder)]
    environment |= options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **(pipes | options))


def run_snakemake(folder: Path, *arguments: str, root: Path = paths.ROOT) -> tuple[int, str, str]:
    """Exit status and what was said by a run from start to end."""
    process = snakemake(folder, *arguments, root=root)
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err
