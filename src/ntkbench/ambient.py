"""The settings of PyTorch that public functions work under, whatever the caller's are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def own_settings(dtype: str | None = None) -> Iterator[None]:
    """Switch off what changes derivatives or precision, and restore it at the end.

    Gradients are recorded whatever ``torch.no_grad`` or ``torch.inference_mode`` says outside. Autocast is off. TF32
    flags are restored.

    Args:
        dtype: ``"float32"`` or ``"float64"``: tensors that a network makes without a precision get this one.
    """
    import torch

    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    default = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        if dtype is not None:
            torch.set_default_dtype(getattr(torch, dtype))
        try:
            yield
        finally:
            torch.set_default_dtype(default)
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags
