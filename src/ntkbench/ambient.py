"""Settings of PyTorch and JAX that public functions use, independent of the caller's."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ntkbench.errors import BadInput

if TYPE_CHECKING:
    from multiprocessing.context import ForkContext, SpawnContext

AUTOCAST = ("cpu", "cuda", "xpu", "mps")

_TURN = threading.RLock()
"""Held while a call's settings are in force: all threads share the default precision and most flags."""


def cores() -> int:
    """Number of processors available to this process; all of them if the system does not say (macOS, Windows)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processes() -> ForkContext | SpawnContext:
    """How to start processes: by fork, which keeps imported modules, or by spawn where there is no fork (Windows)."""
    try:
        return multiprocessing.get_context("fork")
    except ValueError:
        return multiprocessing.get_context("spawn")


@contextlib.contextmanager
def own_settings(dtype: str | None = None, device: str | None = None, *, tf32: bool = False) -> Iterator[None]:
    """Switch off what changes derivatives or precision, and restore the caller's settings at the end.

    Gradients are recorded even inside the caller's ``torch.no_grad`` or ``torch.inference_mode``. Autocast, float32
    products of lower precision (TF32 unless requested) and hooks on saved tensors are off. Calls from several
    threads take turns, since most of these settings are process-wide.

    Args:
        dtype: ``"float32"`` or ``"float64"``, for tensors that a network creates without a precision.
        device: device of tensors that a network creates without one; ``None`` leaves the caller's default.
        tf32: whether float32 products on a GPU are in TF32.

    Raises:
        BadInput: the caller is inside a ``FakeTensorMode``, where tensors have no values.
    """
    import torch
    from torch._guards import active_fake_mode

    if active_fake_mode() is not None:
        raise BadInput("inside a FakeTensorMode tensors have no values: call ntkbench outside of it")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_TURN)
        stack.enter_context(_without_saving_hooks())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        stack.enter_context(_precision(tf32))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if dtype is not None:
            torch.set_default_dtype(getattr(torch, dtype))
        if device is not None and torch.device(device) != torch.get_default_device():
            stack.enter_context(torch.device(device))
        yield


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run functions that a network compiles, as ``torch.cond`` does, as they are, for use with dispatch modes.

    Compiled under such a mode, a function stays broken for the rest of the process.
    """
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def _without_saving_hooks() -> Iterator[None]:
    """Save tensors unchanged, without the caller's ``torch.autograd.graph.saved_tensors_hooks``.

    The hooks are removed: transforms of ``torch.func`` refuse to run under any hooks, even those that do nothing.
    """
    import torch

    hooks: Any = torch._C._autograd
    taken: list[Any] = []
    while (pair := hooks._top_saved_tensors_default_hooks(False)) is not None:
        taken.append(pair)
        hooks._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pair in reversed(taken):
            hooks._push_saved_tensors_default_hooks(*pair)


@contextlib.contextmanager
def _precision(tf32: bool) -> Iterator[None]:
    """Compute float32 products in float32, or in TF32 on a GPU, with either of torch's two sets of flags in use.

    torch keeps the two consistent only when a flag is set; reading an old flag fails after a new one was set.
    """
    import torch

    backends: Any = torch.backends
    cuda, cudnn, mkldnn = backends.cuda, backends.cudnn, backends.mkldnn
    new = [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    before = [(flags, flags.fp32_precision) for flags in new]
    old: list[Callable[[], None]] = []
    for flags in (cuda.matmul, cudnn):
        with contextlib.suppress(RuntimeError):
            old.append(functools.partial(setattr, flags, "allow_tf32", flags.allow_tf32))
    with contextlib.suppress(RuntimeError):
        old.append(functools.partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("highest")
    cuda.matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    for flags in new:
        if not (tf32 and flags.fp32_precision == "tf32") and flags.fp32_precision not in ("ieee", "none"):
            flags.fp32_precision = "ieee"
    try:
        yield
    finally:
        for restore in old:
            restore()
        for flags, precision in before:
            if flags.fp32_precision != precision:
                flags.fp32_precision = precision


@contextlib.contextmanager
def own_jax_settings(dtype: str) -> Iterator[None]:
    """The same for JAX: 64-bit numbers if the precision needs them, and JAX's defaults for settings that interfere.

    Args:
        dtype: ``"float32"`` or ``"float64"``, also for arrays that a network creates without a precision.
    """
    import jax

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(dtype == "float64"))
        stack.enter_context(jax.default_matmul_precision("highest"))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(jax.disable_jit(False))
        stack.enter_context(jax.debug_nans(False))
        stack.enter_context(jax.transfer_guard("allow"))
        yield
