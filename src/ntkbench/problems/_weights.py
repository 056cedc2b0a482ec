"""Weights at both ends of training, made once and kept."""

from __future__ import annotations

import copy
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ntkbench import paths
from ntkbench.problems.base import Definition, Weights

if TYPE_CHECKING:
    from torch import nn


def initial_and_trained(name: str, definition: Definition) -> tuple[Weights, Weights]:
    """theta_0 and theta_f of a problem, in float32: its parameters with ``requires_grad``, the others stay as they are.

    theta_f is looked up in ``results/reference/weights`` and in the cache, and trained (and cached) when neither has
    one that was trained from this very theta_0. Committing it keeps the exact references valid on machines whose
    kernels round differently.
    """
    theta_0 = _chosen(definition.module)
    cached = paths.cache() / "weights" / f"{name}-{_digest(theta_0)}.npz"
    for path in (committed_file(name), cached):
        stored = _read(path)
        if stored and all(np.array_equal(theta_0[key], stored[0].get(key)) for key in theta_0):
            return theta_0, stored[1]
    theta_f = train(definition)
    paths.write_atomically(cached, packed(theta_0, theta_f))
    return theta_0, theta_f


def train(definition: Definition) -> Weights:
    """theta_f, by training a copy of the network."""
    trained = copy.deepcopy(definition.module)
    definition.train(trained)
    return _chosen(trained)


def _chosen(module: nn.Module) -> Weights:
    """The parameters that theta is made of; frozen ones are a part of the function."""
    return {key: w.detach().numpy().copy() for key, w in module.named_parameters() if w.requires_grad}


def committed_file(name: str) -> Path:
    """Where the committed weights of a problem lie."""
    return paths.REFERENCE / "weights" / f"{name}.npz"


def packed(theta_0: Weights, theta_f: Weights) -> bytes:
    """Both sets of weights as one ``.npz`` file."""
    arrays = {f"{end}/{key}": w for end, ws in (("theta_0", theta_0), ("theta_f", theta_f)) for key, w in ws.items()}
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def _read(path: Path) -> tuple[Weights, Weights] | None:
    if not path.exists():
        return None
    with np.load(path) as arrays:
        ends = [
            {key.split("/", 1)[1]: arrays[key] for key in arrays.files if key.startswith(f"{end}/")}
            for end in ("theta_0", "theta_f")
        ]
    return ends[0], ends[1]


def _digest(weights: Weights) -> str:
    digest = hashlib.sha256()
    for key, w in weights.items():
        digest.update(key.encode() + w.tobytes())
    return digest.hexdigest()[:16]
