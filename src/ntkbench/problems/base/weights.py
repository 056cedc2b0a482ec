"""Weights at initialisation and after training, trained once and stored."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ntkbench import paths
from ntkbench.errors import DidNotTrain, NtkbenchError, summary
from ntkbench.problem import Weights, hash_arrays, signature
from ntkbench.problems.base import Definition, storage

if TYPE_CHECKING:
    from torch import nn


def initial_and_trained(name: str, definition: Definition) -> tuple[Weights, Weights | None]:
    """theta_0 and theta_f of a problem, in float32: its parameters with ``requires_grad``; the others stay unchanged.

    Both include buffers that training changes, such as BatchNorm's statistics. theta_f is ``None`` for a network that
    stays untrained. Weights that a recipe does not keep are made again. Otherwise theta_f is looked up in
    ``results/reference/weights`` and in the cache. If neither has one of this :func:`origin`, it is trained and cached.
    Committed weights keep exact values valid on machines whose kernels round differently.

    Args:
        name: name of the problem, without sizes.
        definition: definition of the problem at the requested sizes.

    Raises:
        DidNotTrain: training failed; nothing is kept.
        Corrupt: the committed file is damaged.
        NtkbenchError: the cache cannot be written.
    """
    if definition.training is None:
        return _trainable(definition.module), None
    theta_f = _found_or_trained(name, definition) if definition.training.kept else train(name, definition)
    return _initial(definition, theta_f), theta_f


def _found_or_trained(name: str, definition: Definition) -> Weights:
    of = origin(name, definition)
    for path in (committed_file(name), _cached_file(name, of)):
        stored = storage.read(path)
        if stored is not None and str(stored.get("origin")) == of:
            return {key.removeprefix("theta_f/"): w for key, w in stored.items() if key.startswith("theta_f/")}
    theta_f = train(name, definition)
    storage.write(_cached_file(name, of), packed(definition, of, theta_f))
    return theta_f


def train(name: str, definition: Definition) -> Weights:
    """Train a copy of the network; returns theta_f and the buffers that training changed.

    Raises:
        DidNotTrain: training failed, or gave weights that are not finite.
    """
    assert definition.training is not None
    trained = copy.deepcopy(definition.module)
    try:
        definition.training.train(trained)
    except NtkbenchError as error:
        raise type(error)(f"{name}: {error}") from None
    except Exception as error:
        raise DidNotTrain(f"{name}: training failed: {summary(error)}") from error
    before = _buffers(definition.module)
    changed = {key: b for key, b in _buffers(trained).items() if not np.array_equal(b, before[key])}
    theta_f = {**_trainable(trained), **changed}
    if broken := [key for key, w in theta_f.items() if not np.isfinite(w).all()]:
        raise DidNotTrain(f"{name}: training gave weights that are not finite ({', '.join(broken)})")
    return theta_f


def origin(name: str, definition: Definition) -> str:
    """Hash of everything that determines theta_f: the network, its initial weights, the training recipe and its data.

    The network and the loss enter by what they compute, as in :meth:`ntkbench.problem.Problem.digest`; the recipe by
    its printed fields; weights and data bit by bit. Data in float64 enter in float32, because the last bits of float64
    results differ between machines.

    Raises:
        DidNotTrain: the loss cannot be computed.
    """
    from ntkbench.modules import values  # imports torch

    assert definition.training is not None
    digest = hashlib.sha256(str(definition.training).encode())
    stored = definition.module.state_dict()
    hash_arrays(digest, {key: w.detach().numpy() for key, w in stored.items()})
    hash_arrays(digest, values(definition.module, stored))  # includes buffers outside the state_dict
    data = definition.training.arrays()
    hash_arrays(digest, {key: a.astype("float32") if a.dtype == "float64" else a for key, a in data.items()})
    network = copy.deepcopy(definition.module).double()
    try:
        loss = definition.training.objective(network)
        digest.update(signature([loss], [w for w in network.parameters() if w.requires_grad]).encode())
    except Exception as error:
        raise DidNotTrain(f"{name}: the training loss cannot be computed: {summary(error)}") from error
    return digest.hexdigest()[:16]


def committed_file(name: str) -> Path:
    """Path of a problem's committed weights."""
    return paths.REFERENCE / "weights" / f"{name}.npz"


def packed(definition: Definition, origin: str, theta_f: Weights) -> dict[str, np.ndarray]:
    """The members of a weights file: both sets of weights, the recipe, and the :func:`origin` of theta_f."""
    ends = {"theta_0": _initial(definition, theta_f), "theta_f": theta_f}
    arrays = {f"{end}/{key}": w for end, weights in ends.items() for key, w in weights.items()}
    return {**arrays, "recipe": np.array(str(definition.training)), "origin": np.array(origin)}


def cached(name: str) -> list[Path]:
    """Files in the cache with trained weights of a problem, whatever their :func:`origin`."""
    file = _cached_file(name, "*")
    return sorted(file.parent.glob(file.name))


def _cached_file(name: str, origin: str) -> Path:
    return paths.cache() / "weights" / f"{name}-{origin}.npz"


def _initial(definition: Definition, theta_f: Weights) -> Weights:
    """Initial values of the parameters and buffers in theta_f."""
    start = {**_trainable(definition.module), **_buffers(definition.module)}
    return {key: start[key] for key in theta_f}


def _buffers(module: nn.Module) -> Weights:
    """Real-valued buffers in a module's state_dict."""
    kept = module.state_dict()
    real = {key: b for key, b in module.named_buffers() if key in kept and b.is_floating_point()}
    return {key: b.detach().numpy().copy() for key, b in real.items()}


def _trainable(module: nn.Module) -> Weights:
    return {key: w.detach().numpy().copy() for key, w in module.named_parameters() if w.requires_grad}
