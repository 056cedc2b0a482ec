"""Shared fixtures: a separate cache, no network access, small problems, and explicit Jacobians by plain autograd."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

# Problems this small gain nothing from threads, and idle OpenMP threads spin on cores that other processes need. The
# variable is read when numpy and torch are first imported.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from hypothesis import settings

from ntkbench import outside, paths, problems, registry, testing
from ntkbench.problem import Problem

# No deadlines: the first example of a test pays for imports and kernels. The same examples every time.
settings.register_profile("ntkbench", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("ntkbench")

# JAX tests spend most of their time compiling; XLA's optimisations only affect speed.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# A shell that starts the tests in the background makes them and their child processes ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

written_out, metrics_of = testing.explicit_jacobian, testing.metrics_of

SMALL = ("tanh_net", "digits_conv[N=3]", "gru_hazelden[N=2,T=2]", "mlp_hazelden[N=2]")
"""Problems small enough for an explicit J, one of each family."""


OF_JAX = ("block_u_statistics", "hutchinson", "hutchpp", "one_sided_forward", "per_sample_trace_forward")
"""Stochastic methods that stand for the others in JAX: pairs of probes, single probes, a sketch, and tangents for the
batch and for each sample."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, so that parallel workers finish together.

    Those that start many processes come after the very longest one, beside which they run in turn.
    """
    longest = ("methods", "pipeline", "kills", "misbehaviour", "zoo", "function", "calibration", "working_memory")
    longest += ("figures", "studies", "kernel", "wide_head", "structured", "neural_tangents", "auto")
    rank = {f"test_{name}.py": place for place, name in enumerate(longest)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def mostly_slow(cases: Iterable[Any], quick: int | Collection[Any]) -> list[Any]:
    """Parameters of a test; all but the first ``quick`` of them, or those in ``quick``, are marked slow."""
    every = list(cases)
    if isinstance(quick, int):
        stays = [i < quick for i in range(len(every))]
    else:
        assert all(case in every for case in quick), "a quick case that the test does not have"
        stays = [case in quick for case in every]
    marks = [() if stay else pytest.mark.slow for stay in stays]
    return [pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=m) for c, m in zip(every, marks, strict=True)]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for this session alone, so that files left by earlier runs cannot make a test pass."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("NTKBENCH_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module", autouse=True)
def processors() -> Iterator[None]:
    """Restore the CPU affinity, and set torch back to one thread.

    A study with one thread pins the process to one core, and other files need two. Studies and scripts also set the
    number of torch's threads, which would slow down the small problems of other files.
    """
    had = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None  # not on macOS
    yield
    torch.set_num_threads(1)
    if had is not None:
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
"""Smooth problems that only the tests have: N, inputs, hidden units and outputs of each.

J is 6 x 26 for ``tanh_net``, and 320 x 158 for ``wide``, where tests need many more outputs than probes. ``headed`` and
``wide_headed`` have a head with more outputs than inputs. Activations of ``active`` take more memory than Theta.
"""


@functools.cache
def loaded(label: str) -> Problem:
    """A problem by its label, :data:`NETWORKS` included; built once per session."""
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
    """J by the label of a problem and the set of weights, in float64."""
    return _dense


@pytest.fixture
def outer(tmp_path, monkeypatch) -> Iterator[Callable[[str, str], None]]:
    """Writes a problem of the same name as its file, and its source, into a folder outside of the checkout in use."""
    before, names = os.environ.get(outside.VARIABLE, ""), []

    def use(name: str, source: str) -> None:
        file = tmp_path / "plugins" / "problems" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
        registry.use([str(tmp_path / "plugins")])
        names.append(name)

    monkeypatch.setenv(outside.VARIABLE, before)
    yield use
    monkeypatch.setenv(outside.VARIABLE, before)
    registry.use([])
    problems.load.cache_clear()
    for name in names:
        for known in (problems.base.REGISTRY, problems.REGISTRY._loaded, vars(problems)):
            known.pop(name, None)
        sys.modules.pop(f"ntkbench.problems.{name}", None)


def checkout(folder: Path) -> Path:
    """A copy of what a run needs, whose files a test may change; ``results/reference`` links to the original."""
    for name in ("src", "benchmarks", "config", "profiles", "report"):
        shutil.copytree(paths.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("Snakefile", "environment.yml", "environment.post-deploy.sh"):
        shutil.copy(paths.ROOT / name, folder)
    (folder / "results").mkdir()
    (folder / "results" / "reference").symlink_to(paths.ROOT / "results" / "reference")
    return folder


def snakemake(folder: Path, *arguments: str, root: Path = paths.ROOT, **options: Any) -> subprocess.Popen[str]:
    """Start the pipeline of a checkout in a folder of its own, with an environment that is not activated."""
    tools = Path(sys.executable).parent
    path = os.pathsep.join(each for each in os.environ["PATH"].split(os.pathsep) if Path(each) != tools)
    # As if the package of the tests' checkout were installed; another checkout must run its own.
    environment = os.environ | {"PATH": path, "PYTHONPATH": paths.python_path()}
    command = [sys.executable, "-m", "snakemake", *arguments]
    command += ["--snakefile", str(root / "Snakefile"), "--directory", str(folder)]
    environment |= options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **(pipes | options))


def run_snakemake(folder: Path, *arguments: str, root: Path = paths.ROOT) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a run of the pipeline."""
    process = snakemake(folder, *arguments, root=root)
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


class Squared(torch.autograd.Function):
    """A custom autograd function without forward mode."""

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
