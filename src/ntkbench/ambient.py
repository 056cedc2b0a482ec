"""The settings of PyTorch that public functions work under, whatever the caller's are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

AUTOCAST = ("cpu", "cuda", "xpu", "mps")


@contextlib.contextmanager
def own_settings(dtype: str | None = None, device: str | None = None) -> Iterator[None]:
    """Switch off what changes derivatives or precision, and restore the caller's settings at the end.

    Gradients are recorded whatever ``torch.no_grad`` or ``torch.inference_mode`` says outside. Autocast, TF32 and
    float32 products of lower precision are off.

    Args:
        dtype: ``"float32"`` or ``"float64"``: tensors that a network makes without a precision get this one.
        device: tensors that a network makes without a device are put there; ``None`` leaves the caller's default.
    """
    import torch

    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    default = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, default)
        stack.callback(setattr, torch.backends.cudnn, "allow_tf32", cudnn)
        stack.callback(torch.set_float32_matmul_precision, precision)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        if dtype is not None:
            torch.set_default_dtype(getattr(torch, dtype))
        if device is not None and torch.device(device) != torch.get_default_device():
            stack.enter_context(torch.device(device))
        yield
