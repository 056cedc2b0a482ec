"""Networks as plain operations: without fused kernels, and without branches that only save time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def plain_operations(module: nn.Module) -> Iterator[None]:
    """Run recurrent layers and attention without fused kernels, which lack forward mode, vmap rules and structure.

    Convolutions keep their kernels: oneDNN and cuDNN are turned off only if the module has recurrent layers.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(layer, nn.RNNBase) for layer in module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False, allow_tf32=False))
            # Not mkldnn.flags(), which warns about Intel GPUs wherever there is none.
            stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
            torch._C._set_mkldnn_enabled(False)
        yield


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
