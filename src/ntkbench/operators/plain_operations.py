"""Layers as the operations that they are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def plain_operations(module: nn.Module) -> Iterator[None]:
    """Keep recurrent layers and attention off fused kernels, which have neither forward mode, nor vmap, nor structure.

    Convolutions keep theirs: oneDNN and cuDNN are only turned off where the module has recurrent layers.
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
