"""J as a linear operator, one file a backend."""

from __future__ import annotations

import importlib
from typing import Any

from ntkbench.operators.base import Array, JacobianOperator, Rng
from ntkbench.options import Target
from ntkbench.problem import Problem

__all__ = ["Array", "Jacobian", "Rng", "device_memory", "device_name", "linearise", "torch_network"]


def linearise(problem: Problem, weights: str, target: Target) -> JacobianOperator:
    """The Jacobian of ``problem`` at ``"theta_0"`` or ``"theta_f"``, on the target's backend and device.

    Nothing is computed until the first product; the forward pass is then run once and shared by all VJPs. A module that
    declares a ``recurrence`` gets the derivatives of :mod:`ntkbench.operators.recurrent`, any other its backend's own.

    Raises:
        BadInput: no such weights, or the backend does not have the problem's network.
        Unavailable: the device is not there.
    """
    package = "operators.recurrent" if hasattr(problem.module, "recurrence") else "operators"
    backend = importlib.import_module(f"ntkbench.{package}.{target.backend}")
    return backend.linearise(problem, weights, target)


def torch_network(problem: Problem, weights: str, target: Target) -> Any:
    """Module, trainable parameters by name and inputs of ``problem``, on the target's device; see :func:`linearise`."""
    return importlib.import_module("ntkbench.operators.torch").network(problem, weights, target)


def device_name(target: Target) -> str:
    """What the target's device calls itself: ``"cpu"`` or the GPU's model."""
    return importlib.import_module(f"ntkbench.operators.{target.backend}").device_name(target)


def device_memory(target: Target) -> int | None:
    """Peak bytes that the target's GPU allocator has held so far, ``None`` on the CPU."""
    return importlib.import_module(f"ntkbench.operators.{target.backend}").device_memory(target)
