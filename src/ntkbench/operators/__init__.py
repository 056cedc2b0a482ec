"""The Jacobian as a linear operator. Each backend is one module, imported when a target first asks for it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ntkbench import errors
from ntkbench.errors import NotFinite, OverMemory
from ntkbench.operators import certificate
from ntkbench.operators.arrays import Array
from ntkbench.operators.base import ChunkBytes, JacobianOperator, Rng
from ntkbench.operators.certificate import PlainGradient, Reference, Uncertified
from ntkbench.options import Target
from ntkbench.problem import Problem

__all__ = [
    "Array",
    "ChunkBytes",
    "JacobianOperator",
    "Rng",
    "check_device",
    "check_result",
    "declares",
    "device_memory",
    "device_name",
    "interact",
    "is_split",
    "linearise",
    "plain_gradient",
    "reset_device_memory",
    "torch_network",
    "working_memory",
]


def linearise(
    problem: Problem, weights: str, target: Target, chunk_bytes: ChunkBytes | None = None
) -> JacobianOperator:
    """The Jacobian of ``problem`` at one set of weights, on the target's backend and device.

    Nothing is computed until the first product. The forward pass then runs once, and all products share it. A module
    that declares a ``recurrence`` gets the explicit derivatives of :mod:`ntkbench.operators.recurrent`; any other is
    differentiated automatically.

    Args:
        problem: network and inputs.
        weights: ``"theta_0"`` or ``"theta_f"``; the latter may be those of another network.
        target: backend, precision, device and memory.
        chunk_bytes: chunk sizes of products, which change results by rounding only; ``None`` for the defaults.

    Raises:
        BadInput: no such weights, or the problem has no network for the backend.
        Unavailable: the device is not present.
    """
    problem, weights = problem.end(weights)
    package = "recurrent." if declares(problem.module) else ""
    j = _backend(package + target.backend).linearise(problem, weights, target)
    j.reference = Reference(lambda: plain_gradient(problem, weights, target, j.names))
    if chunk_bytes is not None:
        j.chunk_bytes = chunk_bytes
    return j


def plain_gradient(problem: Problem, weights: str, target: Target, names: Sequence[str]) -> PlainGradient:
    """The function from v ``[n]`` to J^T v ``[P]`` that certificates compare with: autograd of the unmodified network.

    It is torch's ``backward`` of the module, for every backend, or ``jax.vjp`` if there is no module: over
    the whole batch, without vmap, jit or a trace. The function takes the memory of a pass as a second argument: a batch
    that takes more is then split in torch, and refused if samples of different parts interact; see
    :meth:`ntkbench.operators.plain.PlainNetwork.gradient`.

    Args:
        problem, weights, target: as for :func:`linearise`.
        names: names of the parameters, in the order of their entries.
    """
    backend = _backend("jax" if problem.module is None else "torch")
    found: PlainGradient = backend.plain_gradient(problem, weights, target, names)
    return found


def interact(problem: Problem, target: Target) -> bool:
    """Whether the gradients of samples alone do not add up to that over the whole batch, at theta_0.

    ``problem.samples_interact`` is measured on a few samples of the first inputs; this compares all samples.

    Cost: the operations of two plain passes over all samples, whatever the target's memory; one of them takes the
    samples one by one. In JAX, two passes of per-sample gradients, and a plain one.

    Raises:
        NotFinite: gradients are nan or infinite.
    """
    if problem.module is not None:
        return bool(_backend("torch").interact(problem, target))
    j = linearise(problem, "theta_0", target)
    try:
        j.sample_vjp(slice(0, 1), j.basis(0, 1)[:, : j.O].reshape(1, 1, j.O))
    except Uncertified as error:
        assert j.reference is not None
        if not math.isfinite(certificate.norm(j.reference.cotangent(j.basis(0, 1), j.n, target.memory)[1])):
            raise NotFinite("gradients are nan or infinite") from error
        return True
    return False


def is_split(problem: Problem, target: Target) -> bool:
    """Whether certificates compare with plain passes over parts of the batch, as all of it takes too much memory.

    Interaction between the parts is then seen by the outputs alone, if at all.
    """
    return problem.module is not None and bool(_backend("torch").is_split(problem, target))


def declares(module: Any) -> bool:
    """Whether a module declares a recurrence (see :class:`ntkbench.operators.recurrent.cells.Recurrence`)."""
    found = getattr(module, "recurrence", None)  # the module may use the name for something else
    return found is not None and isinstance(found, _backend("recurrent.cells").Recurrence)


def torch_network(problem: Problem, weights: str, target: Target) -> Any:
    """Module, trainable parameters by name and inputs of ``problem``, on the target's device.

    Raises:
        BadInput: no such weights.
        Unavailable: the device is not present.
    """
    return _backend("torch").network(*problem.end(weights), target)


SMALL_RESULT = 2**24
"""Bytes that every device holds, unchecked: a query of the free memory takes as long as a small kernel."""


def check_result(rows: int, columns: int, target: Target) -> None:
    """Refuse a matrix that the target's device cannot hold.

    Raises:
        OverMemory: it cannot; the message gives the sizes.
        Unavailable: the device is not present.
    """
    needed = rows * columns * target.itemsize
    if needed > SMALL_RESULT and needed > (free := _backend(target.backend).free_memory(target)):
        raise OverMemory(
            f"the result, {rows} x {columns} entries in {target.dtype}, takes {needed / 2**30:.3g} GiB, and "
            f"{free / 2**30:.3g} GiB are free"
        )


def check_device(target: Target) -> None:
    """Refuse a device that torch does not see. Nothing is started on it, so that this process can still be forked.

    Raises:
        Unavailable: the device is not present.
    """
    _backend("torch").check_device(target)


def device_name(target: Target) -> str:
    """Name of the target's device: ``"cpu"`` or the GPU's model.

    Raises:
        Unavailable: the device is not present.
    """
    return _backend(target.backend).device_name(target)


def device_memory(target: Target) -> int | None:
    """Peak bytes allocated on the target's GPU, in this process or since a reset; ``None`` on the CPU.

    Raises:
        Unavailable: the device is not present.
    """
    return _backend(target.backend).device_memory(target)


def reset_device_memory(target: Target) -> None:
    """Let :func:`device_memory` count from now on. JAX cannot: its peak remains that of the process.

    Raises:
        Unavailable: the device is not present.
    """
    _backend(target.backend).reset_device_memory(target)


def working_memory(target: Target) -> int:
    """Default bytes for intermediate results: those of the target, or half of the free memory on a GPU.

    Raises:
        Unavailable: the device is not present.
    """
    return target.memory if device_memory(target) is None else _backend(target.backend).free_memory(target) // 2


def _backend(name: str) -> ModuleType:
    """The module of a backend's operators.

    Raises:
        Unavailable: the backend's library is not installed.
    """
    if name.endswith("jax"):
        errors.need("jax", "the JAX backend", errors.JAX)
    return importlib.import_module(f"ntkbench.operators.{name}")
