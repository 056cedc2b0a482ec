"""The Jacobian as a linear operator. Each backend is one module, imported when a target first asks for it."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from ntkbench.errors import OverMemory
from ntkbench.operators.arrays import Array
from ntkbench.operators.base import ChunkBytes, JacobianOperator, Rng
from ntkbench.operators.certificate import Reference
from ntkbench.options import Target
from ntkbench.problem import Problem

__all__ = [
    "Array",
    "ChunkBytes",
    "JacobianOperator",
    "Rng",
    "check_result",
    "declares",
    "device_memory",
    "device_name",
    "linearise",
    "torch_network",
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
        weights: ``"theta_0"`` or ``"theta_f"``.
        target: backend, precision, device and memory.
        chunk_bytes: chunk sizes of products, which change results by rounding only; ``None`` for the defaults.

    Raises:
        BadInput: no such weights, or the problem has no network for the backend.
        Unavailable: the device is not present.
    """
    package = "recurrent." if declares(problem.module) else ""
    j = _backend(package + target.backend).linearise(problem, weights, target)
    j.reference = Reference(lambda: _backend("torch").plain_gradient(problem, weights, target, j.names))
    if chunk_bytes is not None:
        j.chunk_bytes = chunk_bytes
    return j


def declares(module: Any) -> bool:
    """Whether a module declares a recurrence (see :class:`ntkbench.operators.recurrent.cells.Recurrence`)."""
    found = getattr(module, "recurrence", None)  # anything else of that name is the module's own affair
    return found is not None and isinstance(found, _backend("recurrent.cells").Recurrence)


def torch_network(problem: Problem, weights: str, target: Target) -> Any:
    """Module, trainable parameters by name and inputs of ``problem``, on the target's device.

    Raises:
        BadInput: no such weights.
        Unavailable: the device is not present.
    """
    return _backend("torch").network(problem, weights, target)


def check_result(rows: int, columns: int, target: Target) -> None:
    """Refuse a matrix that the target's device cannot hold.

    Raises:
        OverMemory: it cannot; says the sizes.
        Unavailable: the device is not present.
    """
    needed, free = rows * columns * target.itemsize, _backend(target.backend).free_memory(target)
    if needed > free:
        raise OverMemory(
            f"the result, {rows} x {columns} entries in {target.dtype}, takes {needed / 2**30:.3g} GiB, and "
            f"{free / 2**30:.3g} GiB are free"
        )


def device_name(target: Target) -> str:
    """Name of the target's device: ``"cpu"`` or the GPU's model.

    Raises:
        Unavailable: the device is not present.
    """
    return _backend(target.backend).device_name(target)


def device_memory(target: Target) -> int | None:
    """Peak bytes allocated on the target's GPU in this process; ``None`` on the CPU.

    Raises:
        Unavailable: the device is not present.
    """
    return _backend(target.backend).device_memory(target)


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"ntkbench.operators.{name}")
