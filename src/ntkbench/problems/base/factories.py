"""Problems from user functions that a configuration names; see :func:`ntkbench.factory.as_problems`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ntkbench import outside, paths
from ntkbench.ambient import own_settings
from ntkbench.errors import BadInput, NtkbenchError
from ntkbench.factory import make
from ntkbench.modules import called, cast, copied, values
from ntkbench.operators.plain import PlainNetwork, flat
from ntkbench.problem import PART, Problem, hashed
from ntkbench.problems.base import Definition
from ntkbench.problems.base.calls import as_module
from ntkbench.problems.base.sequences import wrapped

DIGITS = {"float64": 6, "float32": 4}
"""Decimals of what a network computes, relative to its size, in which runs on one kind of machine agree."""


def definition(factory: str, folder: str, known: Mapping[str, Any]) -> Definition:
    """The untrained problem of a factory.

    Args:
        factory: ``module:function``.
        folder: where its module is looked for.
        known: what :func:`describe` found.

    Raises:
        BadInput: there is no such function, or what it returns cannot be used.
        NtkbenchError: it differs from what is known; says how.
    """
    for file, digest in known["files"].items():
        if _digest(Path(file)) != digest:
            raise NtkbenchError(f"{file} was changed after the configuration was read: start the run again")
    found, now = _made(factory, folder)
    if now["contents"] != known["contents"]:
        what = "other weights or inputs"
    elif _differ(now["computes"], known["computes"]):
        what = "a network that computes something else"
    else:
        return found
    raise NtkbenchError(
        f"{factory} returns {what} than when the configuration was read: "
        "seed its random numbers, or start the run again"
    )


def describe(factory: str, folder: str, output: str) -> None:
    """Write what a factory's rows depend on, as JSON, or an ``error``.

    ``files`` are files with their digests, ``contents`` is a hash of all tensors, and ``computes`` has a few rounded
    numbers of what the network computes from them. Call it in a process of its own. The files are those of the
    factory's module and of all that this process has imported, except from ntkbench, the standard library and
    installed packages.

    Args:
        factory, folder: as in :func:`definition`.
        output: path of the file.
    """
    found: dict[str, Any]
    try:
        _, now = _made(factory, folder)
        own = sys.modules[factory.partition(":")[0]]
        files = {file for module in list(sys.modules.values()) if (file := _file(module)) and outside.is_local(file)}
        files |= {file} if (file := _file(own)) else set()
        found = {"files": {str(file): _digest(file) for file in sorted(files)}, **now}
    except BadInput as error:
        found = {"error": str(error)}
    paths.write_atomically(Path(output), json.dumps(found))


def _made(factory: str, folder: str) -> tuple[Definition, dict[str, Any]]:
    """The problem of a factory, checked as those of :class:`ntkbench.Kernel`, and ``contents`` and ``computes``."""
    made = make(factory, folder)
    module, x = as_module(made.model, made.inputs, made.call)
    p = wrapped(module, x, dtype=_precision(module))
    if p.mixed:
        raise BadInput(
            f"{factory} makes a network that depends on the precision of its inputs, buffers or frozen parameters, "
            "which a grid converts"
        )
    network = p.network.cpu()  # measurements choose the device
    found = Definition(network, p.x, None, samples_interact=p.samples_interact)
    tensors = {f"{'theta' if key in p.theta_0 else 'fixed'} {key}": w for key, w in values(network).items()}
    return found, {"contents": hashed({**tensors, "the inputs": p.x}), "computes": _computes(p)}


def _precision(module: nn.Module) -> str:
    """The least precision that holds all trainable parameters, which may be of several types, or of half precision."""
    return "float64" if any(w.dtype.itemsize > 4 for w in module.parameters() if w.requires_grad) else "float32"


def _computes(problem: Problem) -> dict[str, list[float]]:
    """What a network computes from its tensors: a few numbers, by the precision in which it runs.

    Cost: two forward passes and a backward pass over all samples, in float64 if possible.
    """
    own = str(next(iter(problem.theta_0.values())).dtype)
    sizes = [len(problem.x)] if problem.samples_interact else [PART, len(problem.x)]
    for dtype in dict.fromkeys(("float64", own)):
        for size in sizes:
            # A network may run only in its own precision, or only on all samples; the last failure is the user's.
            with contextlib.suppress(*([] if (dtype, size) == (own, sizes[-1]) else [Exception])):
                return {dtype: _projected(problem, dtype, size)}
    raise AssertionError("the last failure is raised")


def _projected(problem: Problem, dtype: str, size: int) -> list[float]:
    """The sum of all absolute outputs, and a projection of the outputs relative to it; the same of its gradient."""
    digits, real = DIGITS[dtype], getattr(torch, dtype)
    with own_settings(dtype):
        net = cast(copied(problem.network), real)
        theta = {key: w.detach().clone() for key, w in net.named_parameters() if key in problem.theta_0}
        plain, x = PlainNetwork(net, theta, owned=True), torch.from_numpy(problem.x)
        outputs: list[torch.Tensor] = []
        gradient = torch.zeros(sum(w.numel() for w in theta.values()), dtype=torch.float64)
        for part in (x.to(real) if x.is_floating_point() else x).split(size):
            with torch.no_grad():
                outputs.append(called(net, part.clone()).double().reshape(-1))
            v = torch.arange(outputs[-1].numel()).add(1 + sum(map(len, outputs[:-1]))).double().cos()
            gradient += flat(plain.gradient(part.clone(), v.to(real)))
    found = []
    for entries in (torch.cat(outputs), gradient):
        total = float(entries.abs().sum())
        along = float(entries @ torch.arange(1, len(entries) + 1).double().cos())
        found += [float(f"{total:.{digits}e}"), round(along / (total or 1.0), digits)]
    return found


def _differ(now: Mapping[str, list[float]], known: Mapping[str, list[float]]) -> bool:
    """Whether a network computes something else, by more than the rounding of other threads."""
    return now.keys() != known.keys() or any(
        not math.isclose(a, b, rel_tol=(off := 10 * 0.1 ** DIGITS[dtype]), abs_tol=off if i % 2 else 0.0)
        for dtype, numbers in now.items()
        # Sums, each with a relative projection.
        for i, (a, b) in enumerate(zip(numbers, known[dtype], strict=True))
    )


def _file(module: Any) -> Path | None:
    name = getattr(module, "__file__", None)
    return Path(name).resolve() if name and Path(name).is_file() else None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "missing"
