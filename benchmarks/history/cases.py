"""The history's cases: their calls, values, errors and memory.

A case is a line of ``cases.txt``, ``network/method/backend/function[/passes]``. asv identifies a case by its place in
that list, so new cases are only added at the end. Cases that a commit does not support are n/a there.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import inspect
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CASES = tuple(Path(__file__).with_name("cases.txt").read_text(encoding="utf-8").split())

LEFT_OUT = {"block_lanczos": "gives metrics of the eigenvalues only, which no function takes a method for"}
"""Methods without a case, and why."""

SEEDS = 20
"""Number of seeds for the median error of a random case; the others take one."""

ROUNDING = 1e-5
"""Relative difference of two values that may be rounding."""


class Absent(NotImplementedError):
    """The commit does not have what a case calls; asv treats it as n/a."""


def one_thread() -> None:
    """Keep this process to one thread: torch by its setting, XLA by the processors that the process may use.

    Python cannot restrict a process to some processors on macOS and Windows; XLA takes all of them there.
    """
    import torch

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])


def import_early() -> None:
    """Import what cases use, so that forked processes find it imported; no backend is started."""
    import torch._dynamo  # noqa: F401 (torch.func imports these two at its first use)

    try:
        import jax.numpy  # noqa: F401

        import ntkbench

        ntkbench.trace  # noqa: B018 (imported when first named)
    except Exception as error:
        print(f"not imported early: {error!r}")  # the case that needs it raises the error again
    gc.freeze()


class Case:
    """A case in this process, called once."""

    def __init__(self, label: str) -> None:
        """Make the network and call the function once, which traces and compiles it.

        Args:
            label: label of the case.

        Raises:
            Absent: the commit lacks the function, an argument of it, or the method.
        """
        import ntkbench

        from . import networks

        self._network, method, backend, function, *passes = label.split("/")
        self._metric = function
        self._takes_passes = bool(passes)
        network = networks.NETWORKS[self._network]()
        model, model_f, x = network
        keywords: dict[str, Any] = {"kernel" if function == "ntk" else "method": method}
        if passes:
            keywords["passes"] = int(passes[0])
        if backend == "jax":
            model, keywords["params"] = networks.in_jax(network.model)
            model_f, x = networks.in_jax(network.model_f)[1], x.numpy()
        inputs = (model, model_f, x) if function == "alignment" else (model, x)
        called = getattr(ntkbench, function, None)
        if called is None:
            raise Absent(f"there is no ntkbench.{function}")
        try:
            inspect.signature(called).bind(*inputs, seed=0, **keywords)
        except TypeError as error:
            raise Absent(f"ntkbench.{function}: {error}") from None
        self.call: Callable[[int], Any] = lambda seed: called(*inputs, seed=seed, **keywords)
        try:
            first = self.call(0)
        except ntkbench.BadInput as error:
            raise Absent(str(error)) from None
        by = getattr(first, "method", method)
        if method not in ("auto", by):
            raise Absent(f"{by} answers for {method}")

    @functools.cached_property
    def random(self) -> bool:
        """Whether the value depends on the seed, as that of an estimate or of a kernel of random outputs."""
        if self._takes_passes:
            return True
        first, second = (self._summary(np.asarray(self._number(self.call(seed)), np.float64)) for seed in range(2))
        return not math.isclose(first, second, rel_tol=ROUNDING)

    def values(self, seeds: Sequence[int]) -> tuple[list[float], list[float]]:
        """The values of calls, one number each, and their errors relative to the exact value."""
        found = [np.asarray(self._number(self.call(seed)), np.float64) for seed in seeds]
        exact = self._exact()
        errors = [np.linalg.norm(self._comparable(value) - exact) / np.linalg.norm(exact) for value in found]
        return [self._summary(value) for value in found], [float(error) for error in errors]

    def error(self) -> float:
        """The median error over the seeds."""
        return float(np.median(self.values(range(SEEDS if self.random else 1))[1]))

    @staticmethod
    def _number(found: Any) -> Any:
        return getattr(found, "value", found)

    @staticmethod
    def _summary(value: np.ndarray) -> float:
        """A number that changes if any entry of a kernel changes."""
        if value.ndim == 0:
            return float(value)
        v = np.random.default_rng(0).standard_normal(len(value))
        return float(v @ value @ v)

    def _exact(self) -> np.ndarray:
        from . import networks

        first = networks.theta(self._network)
        trace, norm = np.trace(first), np.linalg.norm(first)
        match self._metric:
            case "trace":
                return trace
            case "norm":
                return norm
            case "effective_rank":
                return trace**2 / norm**2
            case "alignment":
                second = networks.theta(self._network, "model_f")
                return np.vdot(first, second) / (norm * np.linalg.norm(second))
        return first

    def _comparable(self, value: np.ndarray) -> np.ndarray:
        """The value, with a kernel A ``[N, N]`` as A ⊗ I_O."""
        if value.ndim == 0:
            return value
        outputs = len(self._exact()) // len(value)
        return np.kron(value, np.eye(outputs))


def settled_bytes() -> int | None:
    """Release freed memory and reset the process's peak; returns resident bytes, ``None`` without kernel support."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except (AttributeError, OSError, TypeError):
        return None
    return _status("VmRSS")


def peak_bytes() -> int:
    """Peak resident bytes since :func:`settled_bytes`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))
