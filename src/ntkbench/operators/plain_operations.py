"""Networks as plain operations: without fused kernels, and without branches that only save time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


@contextlib.contextmanager
def plain_operations(module: nn.Module) -> Iterator[None]:
    """Run recurrent layers and attention without fused kernels, which lack forward mode, vmap rules and structure.

    Convolutions keep their kernels: oneDNN and cuDNN are turned off only if the module has recurrent layers. Inside a
    transform of ``torch.func``, tensors that a function of the user holds are constants.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ATTENTION.used())
        if any(isinstance(layer, nn.RNNBase) for layer in module.modules()):
            stack.enter_context(_RECURRENT.used())
        if torch._C._are_functorch_transforms_active() and _calls_functions(module):
            stack.enter_context(_Constants())
        yield


class _ProcessWide:
    """A setting of the whole process, shared by its threads: the first user makes it, and the last one restores it.

    Args:
        setting: makes it on entry and restores the former one on exit.
    """

    def __init__(self, setting: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
        self._setting, self._lock, self._users = setting, threading.Lock(), 0
        self._made = contextlib.ExitStack()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """A context in which the setting holds."""
        with self._lock:
            if not self._users:
                self._made.enter_context(self._setting())
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._made.close()


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    with sdpa_kernel(SDPBackend.MATH):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _plain_recurrent_layers() -> Iterator[None]:
    enabled = torch._C._get_mkldnn_enabled()
    with torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
        torch._C._set_mkldnn_enabled(False)  # not mkldnn.flags(), which warns about Intel GPUs wherever there is none
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(enabled)


_ATTENTION, _RECURRENT = _ProcessWide(_plain_attention), _ProcessWide(_plain_recurrent_layers)


class _Constants(TorchFunctionMode):
    """Detaches tensors that no transform differentiates with respect to, so that results do not carry their graphs."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given: Any = tree_map_only(Tensor, _constant, (args, kwargs or {}))
        return function(*given[0], **given[1])


def _constant(tensor: Tensor) -> Tensor:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or not tensor.requires_grad:
        return tensor
    return tensor.detach()


def _calls_functions(module: nn.Module) -> bool:
    """Whether a module calls functions of the user, as :class:`ntkbench.problems.base.adapter.Calling` does."""
    functions = (getattr(module, name, None) for name in ("call", "output"))
    return any(callable(function) and not isinstance(function, nn.Module) for function in functions)


@contextlib.contextmanager
def without_shortcuts(module: nn.Module) -> Iterator[None]:
    """Tell a module, while it is called, that ``torch.jit`` traces it.

    Libraries then leave out branches on data that only save time, such as those for masks of ones.
    """
    told = mock.patch.object(torch.jit, "is_tracing", lambda: True)

    def begin(*_: Any) -> None:
        told.start()

    def end(*_: Any) -> None:
        told.stop()

    with _TOLD, module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True):
        yield


_TOLD = threading.Lock()
"""There is one ``torch.jit`` for all threads."""
