"""Weights at both ends of training, made once and kept."""

from __future__ import annotations

import copy
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ntkbench import paths
from ntkbench.errors import DidNotTrain
from ntkbench.problem import Weights
from ntkbench.problems.base import Definition

if TYPE_CHECKING:
    from torch import nn


def initial_and_trained(name: str, definition: Definition) -> tuple[Weights, Weights]:
    """theta_0 and theta_f of a problem, in float32: its parameters with ``requires_grad``, the others stay as they are.

    theta_f is looked up in ``results/reference/weights`` and in the cache, and trained (and cached) when neither has
    one that was trained from this very theta_0 by this recipe. Committing it keeps the exact references valid on
    machines whose kernels round differently.

    Raises:
        DidNotTrain: training did not get where it was to get; nothing is kept.
    """
    theta_0 = _chosen(definition.module)
    cached = paths.cache() / "weights" / f"{name}-{origin(definition)}.npz"
    for path in (committed_file(name), cached):
        stored = _read(path)
        if stored and stored[2] == definition.recipe and _equal(theta_0, stored[0]):
            return theta_0, stored[1]
    try:
        theta_f = train(definition)
    except DidNotTrain as error:
        raise DidNotTrain(f"{name}: {error}") from None
    paths.write_atomically(cached, packed(theta_0, theta_f, definition.recipe))
    return theta_0, theta_f


def train(definition: Definition) -> Weights:
    """theta_f, by training a copy of the network."""
    trained = copy.deepcopy(definition.module)
    definition.train(trained)
    return _chosen(trained)


def origin(definition: Definition) -> str:
    """Hash of what trained weights come from: theta_0 and the recipe."""
    digest = hashlib.sha256(definition.recipe.encode())
    for key, w in _chosen(definition.module).items():
        digest.update(key.encode() + w.tobytes())
    return digest.hexdigest()[:16]


def _chosen(module: nn.Module) -> Weights:
    """The parameters that theta is made of; frozen ones are a part of the function."""
    return {key: w.detach().numpy().copy() for key, w in module.named_parameters() if w.requires_grad}


def committed_file(name: str) -> Path:
    """Where the committed weights of a problem lie."""
    return paths.REFERENCE / "weights" / f"{name}.npz"


def packed(theta_0: Weights, theta_f: Weights, recipe: str = "") -> bytes:
    """Both sets of weights as one ``.npz`` file."""
    arrays = {f"{end}/{key}": w for end, ws in (("theta_0", theta_0), ("theta_f", theta_f)) for key, w in ws.items()}
    if recipe:
        arrays["recipe"] = np.array(recipe)
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def _equal(weights: Weights, others: Weights) -> bool:
    return all(np.array_equal(w, others.get(key)) for key, w in weights.items())


def _read(path: Path) -> tuple[Weights, Weights, str] | None:
    if not path.exists():
        return None
    with np.load(path) as arrays:
        ends = [
            {key.split("/", 1)[1]: arrays[key] for key in arrays.files if key.startswith(f"{end}/")}
            for end in ("theta_0", "theta_f")
        ]
        return *ends, str(arrays["recipe"]) if "recipe" in arrays.files else ""
