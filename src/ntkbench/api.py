"""What a researcher types: a metric of the NTK of any ``nn.Module``, as an :class:`~ntkbench.estimate.Estimate`.

>>> ntkbench.trace(model, x)                                    # doctest: +SKIP
>>> ntkbench.alignment(model_0, model_f, x, passes=1024)        # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import numbers
import re
from typing import TYPE_CHECKING

from ntkbench import methods, metrics
from ntkbench.errors import BadInput, OverMemory
from ntkbench.estimate import Estimate
from ntkbench.problems.base import Problem
from ntkbench.target import Target

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["alignment", "effective_rank", "norm", "trace"]

EXACT_PASSES = 64
"""Passes for each set of weights that ``method="auto"`` spends on an exact value when no budget is given."""

PASSES = 256
"""Passes of a stochastic method when no budget is given."""

STOCHASTIC = {
    "trace": "one_sided_reverse",
    "norm": "hutchinson",
    "effective_rank": "hutchinson",
    "alignment": "shared_probe_alignment",
}
"""What ``method="auto"`` falls back on."""


def trace(
    model: nn.Module,
    x: torch.Tensor,
    *,
    method: str = "auto",
    passes: int | None = None,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    memory: int = 2**30,
) -> Estimate:
    """tr Theta of a network at its present weights, Theta = J J^T with J the Jacobian of all outputs.

    theta is every parameter with ``requires_grad=True``: freeze parameters to leave them out; a tensor tied under
    several names counts once. The model is copied, never changed, and taken in the mode it is in; train-mode BatchNorm
    is fine (its samples interact, which rules some methods out), train-mode Dropout is not.

    ``method="auto"`` takes the exact method that needs the fewest passes, if those are at most ``passes`` (64 when no
    ``passes`` are given; twice that for alignment) and, for all metrics but the trace, J fits in ``memory``. That is
    Jacobian contraction for independent samples with at most 64 outputs each, and the naive Jacobian for interacting
    samples with at most 64 outputs in all. Otherwise it estimates: ``one_sided_reverse`` for the trace,
    ``shared_probe_alignment`` for the alignment, ``hutchinson`` for the others. ``Estimate.method`` says which it was.

    Cost: that of the method, after at most three forward passes of checks (five for alignment).

    Args:
        model: ``x -> [N, ...outputs]``; everything after the first axis counts as the O outputs of a sample.
        x: inputs ``[N, ...]``, real or integer.
        method: a file name in ``ntkbench/methods``, or ``"auto"``.
        passes: the most Jacobian passes to spend, 256 if not given. Exact and approximate methods asked for by name
            take none.
        seed: of the random probes; the same seed gives the same estimate.
        dtype: ``"float32"`` or ``"float64"``; that of the parameters if not given.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``; that of the parameters if not given.
        memory: bytes that blocks of passes and of rows may fill.

    Raises:
        BadInput: something about the arguments, or the method cannot serve this network; says what, and what is
            allowed.
        OverMemory: the method would need more than ``memory`` at once.
        Unavailable: the device is not there.
    """
    return _estimate("trace", model, None, x, method, passes, seed, dtype, device, memory)


def norm(
    model: nn.Module,
    x: torch.Tensor,
    *,
    method: str = "auto",
    passes: int | None = None,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    memory: int = 2**30,
) -> Estimate:
    """||Theta||_F (not its square) of a network at its present weights. Arguments and errors as for :func:`trace`."""
    return _estimate("norm", model, None, x, method, passes, seed, dtype, device, memory)


def effective_rank(
    model: nn.Module,
    x: torch.Tensor,
    *,
    method: str = "auto",
    passes: int | None = None,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    memory: int = 2**30,
) -> Estimate:
    """(tr Theta)^2 / ||Theta||_F^2 of a network at its present weights. Arguments and errors as for :func:`trace`."""
    return _estimate("effective_rank", model, None, x, method, passes, seed, dtype, device, memory)


def alignment(
    model_0: nn.Module,
    model_f: nn.Module,
    x: torch.Tensor,
    *,
    method: str = "auto",
    passes: int | None = None,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    memory: int = 2**30,
) -> Estimate:
    """tr(Theta_0 Theta_f) / (||Theta_0||_F ||Theta_f||_F) of one network with two sets of weights, on the same inputs.

    ``model_0`` and ``model_f`` are one network, in one mode, that differs in the values of its trainable parameters
    alone: buffers (BatchNorm's running statistics) and frozen parameters must be equal. Precision and device default to
    those of ``model_0``. Other arguments and errors as for :func:`trace`.
    """
    return _estimate("alignment", model_0, model_f, x, method, passes, seed, dtype, device, memory)


def _estimate(
    metric: str,
    model: nn.Module,
    model_f: nn.Module | None,
    x: torch.Tensor,
    method: str,
    passes: int | None,
    seed: int,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    memory: int,
) -> Estimate:
    from ntkbench.problems._module import from_module

    chosen = None if method == "auto" else methods.get(method)
    _check_whole("seed", seed)
    if passes is not None:
        _check_whole("passes", passes)
        if passes <= 0:
            raise BadInput(f"passes must be a positive number, got {passes}")
        if chosen is not None and not chosen.takes_passes:
            raise BadInput(f"{method} is {chosen.kind} and takes no passes: it spends what it needs; leave passes out")
    if metric == "alignment" and model_f is None:
        raise BadInput("model_f must be a torch.nn.Module, got None")
    dtype = None if dtype is None else str(dtype).removeprefix("torch.")
    problem = from_module(model, x, model_f, dtype=dtype)

    kind, index = _device(model, device)
    target = Target("torch", dtype or str(problem.theta_0[next(iter(problem.theta_0))].dtype), kind, memory)
    chosen = chosen or methods.get(choose(problem, metric, target, passes))
    budget = (PASSES if passes is None else passes) if chosen.takes_passes else None
    reason = chosen.refusal(problem, metric, target, budget)
    if reason:
        raise BadInput(f"{chosen.name} cannot give the {metric} of this network: {reason}")
    needed = chosen.bytes_needed(problem, metric, target)
    if needed > memory:
        raise OverMemory(f"{chosen.name} needs {needed} bytes at once for the {metric}; memory is {memory}")
    with _on_device(index):
        return chosen.estimate(chosen.prepare(problem, target), metric, budget, seed)


def choose(problem: Problem, metric: str, target: Target, passes: int | None = None) -> str:
    """The method that ``method="auto"`` stands for; the rule is in :func:`trace`.

    Args:
        passes: the most passes to spend; ``None`` for the defaults.
    """
    ends = len(metrics.ends(metric))
    limit = EXACT_PASSES * ends if passes is None else passes
    # The trace takes every row of J once; the others would make J anew for every pair of blocks that do not fit.
    fits = metric == "trace" or ends * problem.n * problem.P * target.itemsize <= target.memory
    cost = {}
    for name in methods.names():
        method = methods.get(name)
        if method.kind == "exact" and fits and method.refusal(problem, metric, target) is None:
            needed = method.passes_needed(problem, metric, target)
            if needed is not None and needed <= limit:
                cost[name] = needed
    return min(cost, key=cost.__getitem__) if cost else STOCHASTIC[metric]


def _check_whole(what: str, value: object) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise BadInput(f"{what} must be a whole number, got {value!r}")


def _device(model: nn.Module, device: str | torch.device | None) -> tuple[str, int | None]:
    """Kind of device, as a target names it, and which of several GPUs."""
    name = str(next(model.parameters()).device if device is None else device)
    match = re.fullmatch(r"(cpu|cuda):([0-9]+)", name)
    if not match:
        return name, None
    return match[1], int(match[2]) if match[1] == "cuda" else None


def _on_device(index: int | None) -> contextlib.AbstractContextManager[object]:
    import torch

    return contextlib.nullcontext() if index is None else torch.cuda.device(index)
