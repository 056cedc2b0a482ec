"""PyTorch layers as the plain operations they are composed of, instead of fused kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
