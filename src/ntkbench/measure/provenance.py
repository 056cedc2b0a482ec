"""The provenance of a number: code, packages, machine."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ntkbench import outside, paths

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = (
    *("torch", "jax", "jaxlib", "neural-tangents", "numpy", "scipy"),
    *("jax-cuda12-plugin", "jax-cuda13-plugin"),  # with which JAX uses a GPU
    *("scikit-learn", "curvlinops-for-pytorch", "matfree"),  # data, and methods that are compared
)
DEVICE = """import sys
from ntkbench import operators
from ntkbench.options import Target
print(operators.device_name(Target(sys.argv[1], device=sys.argv[2])))
"""
"""Program that prints the name of the device of a backend, for a setting."""
CODE = ("src", "benchmarks", "results/reference/exact", "results/reference/weights")
"""Folders of the checkout whose files change what is measured: code, exact values and trained weights."""


@dataclass(frozen=True)
class Provenance:
    """Provenance that every row of the table carries.

    Attributes:
        git_sha: commit of the checkout, ``"unknown"`` without git.
        git_dirty: whether tracked files differ from the commit, or :data:`CODE` has files that are not in it; ``None``
            without git.
        machine: processor model.
        versions: versions of the packages that compute, ``"torch 2.13.0, jax 0.10.2, ..."``, and a hash of the plug-ins
            outside of ntkbench, if there are any.
        python: version of the interpreter.
    """

    git_sha: str
    git_dirty: bool | None
    machine: str
    versions: str
    python: str

    def columns(self) -> dict[str, object]:
        """As columns of the table."""
        return asdict(self)


@functools.cache
def provenance() -> Provenance:
    """The provenance of this process."""
    sha, changes = paths.git("rev-parse", "HEAD"), paths.git("status", "--porcelain", "--untracked-files=no")
    added = paths.git("ls-files", "--others", "--exclude-standard", "--", *CODE)
    return Provenance(
        git_sha=sha or "unknown",
        git_dirty=None if changes is None or added is None else bool(changes or added),
        machine=f"{_processor()} ({os.cpu_count()} cores)",
        versions=", ".join([*packages(), *_outside()]),
        python=platform.python_version(),
    )


@functools.cache
def packages() -> tuple[str, ...]:
    """The packages that compute, each with its version."""
    return tuple(f"{name} {found}" for name in PACKAGES if (found := _version(name)))


@functools.cache
def device(backend: str, asked: str) -> str | None:
    """Name of the device that a setting means for a backend on this machine; ``None`` if the backend has none there.

    Where there may be a GPU, another process finds it: one that has started a GPU cannot be forked.

    Args:
        backend: name of the backend.
        asked: auto, cpu or cuda.
    """
    import torch

    if asked == "cpu" or not (torch.cuda.is_available() or importlib.util.find_spec("jax_plugins")):
        return None if asked == "cuda" else "cpu"
    command = [sys.executable, "-c", DEVICE, backend, asked]
    environment = os.environ | {"PYTHONPATH": paths.python_path(), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip().rpartition("\n")[2] if done.returncode == 0 else None


def several_machines(table: pd.DataFrame) -> str:
    """A warning if rows come from more than one kind of machine; else an empty string.

    Kinds are processors and devices; seconds of different kinds are not comparable. Rows without seconds do not count.

    Args:
        table: with the columns ``status``, ``machine`` and ``device``.
    """
    done = table[table["status"] == "ok"]
    if "seconds" in done:
        done = done[done["seconds"].notna()]
    places = done[["machine", "device"]].fillna("").astype(str).agg(", ".join, axis=1).value_counts().sort_index()
    if max(done["machine"].nunique(), len(set(done["device"].dropna()) - {""})) < 2:
        return ""
    rows = "; ".join(f"{place}: {count}" for place, count in places.items())
    return f"Rows come from several kinds of machines, whose seconds are not comparable (rows of each: {rows})."


def _outside() -> list[str]:
    """The plug-ins outside of ntkbench, as one hash."""
    files = outside.files()
    if not files:
        return []
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return [f"plug-ins {digest.hexdigest()[:12]}"]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
