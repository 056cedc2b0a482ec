"""What the tests share: a cache of their own, no network, small problems, and J written out by plain autograd."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# Problems this small gain nothing from threads, and lose a lot where other processes want the cores: idle threads of
# OpenMP spin. It is read when numpy and torch are first imported.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from hypothesis import settings

from ntkbench import paths, problems, testing
from ntkbench.problem import Problem

# No deadlines: the first example of a test pays for imports and kernels. The same examples every time.
settings.register_profile("ntkbench", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("ntkbench")

# Most of a JAX test is compilation; what is optimised there matters to speed alone.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# A shell that starts the tests in the background has them, and the processes that they start, ignore an interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

written_out, metrics_of = testing.explicit_jacobian, testing.metrics_of

SMALL = ("tanh_net", "digits_conv[N=3]", "gru_hazelden[N=2,T=2]", "mlp_hazelden[N=2]")
"""Problems that are small enough to write J out, one of each family."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that the processes that share the tests end together."""
    longest = ("test_kills.py", "test_misbehaviour.py", "test_pipeline.py")
    items.sort(key=lambda item: item.path.name not in longest)


def mostly_slow(cases: Iterable[Any], quick: int) -> list[Any]:
    """Parameters of a test; all but the first few of them are left out of the quick tests."""
    every = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=pytest.mark.slow if i >= quick else ()) for i, case in enumerate(every)]


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
    if not hasattr(os, "sched_getaffinity"):  # macOS
        yield
        return
    had = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, had)


@pytest.fixture(scope="session", autouse=True)
def offline() -> Iterator[None]:
    """No test may fetch data: MNIST by scikit-learn, CIFAR-10 by torchvision, text by torch.hub."""
    import sklearn.datasets
    import torch.hub

    def refused(*args: object, **kwargs: object) -> None:
        raise OSError("there is no network in the tests")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sklearn.datasets, "fetch_openml", refused)
        patch.setattr(torch.hub, "download_url_to_file", refused)
        patch.setattr(urllib.request, "urlopen", refused)
        yield


NETWORKS = {
    "tanh_net": (3, 3, 4, 2),
    "wide": (40, 6, 10, 8),
    "headed": (3, 3, 2, 5),
    "wide_headed": (40, 6, 3, 8),
    "active": (40, 6, 400, 2),
}
"""Smooth problems that only the tests have: 6 x 26, and 320 x 158 for what needs many more outputs than probes; as many
samples for methods that need a head with more outputs than inputs; and activations that take more memory than Theta."""


@functools.cache
def loaded(label: str) -> Problem:
    """A problem from its label, :data:`NETWORKS` included; built once a session."""
    return testing.smooth_problem(label, *NETWORKS[label]) if label in NETWORKS else problems.load(label)


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


def checkout(folder: Path) -> Path:
    """A copy of what a run needs, whose files a test may change; the reference is the original one."""
    for name in ("src", "benchmarks", "config", "profiles", "report"):
        shutil.copytree(paths.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("Snakefile", "environment.yml", "environment.post-deploy.sh"):
        shutil.copy(paths.ROOT / name, folder)
    (folder / "results").mkdir()
    (folder / "results" / "reference").symlink_to(paths.ROOT / "results" / "reference")
    return folder


def snakemake(folder: Path, *arguments: str, root: Path = paths.ROOT, **options: Any) -> subprocess.Popen[str]:
    """The pipeline of a checkout, begun in a folder of its own, by a program whose environment is not activated."""
    tools = Path(sys.executable).parent
    path = os.pathsep.join(each for each in os.environ["PATH"].split(os.pathsep) if Path(each) != tools)
    environment = os.environ | {"PATH": path, "PYTHONPATH": paths.python_path(root)}
    command = [sys.executable, "-m", "snakemake", *arguments]
    command += ["--snakefile", str(root / "Snakefile"), "--directory", str(folder)]
    environment |= options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **(pipes | options))


def run_snakemake(folder: Path, *arguments: str, root: Path = paths.ROOT) -> tuple[int, str, str]:
    """Exit status and what was said by a run from start to end."""
    process = snakemake(folder, *arguments, root=root)
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


class Squared(torch.autograd.Function):
    """A function of the user's own, which has no forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]
