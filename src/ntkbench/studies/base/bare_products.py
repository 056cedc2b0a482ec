"""The matrix products and convolutions of a computation, by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default,
    aten.mm.out,
    aten.addmm.default,
    aten.addmm_.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.mv.default,
    aten.convolution.default,
    aten.convolution_backward.default,
}


def bare_products(computation: Callable[[], Any]) -> Callable[[], None]:
    """A function that repeats the matrix products and convolutions of a computation in torch, and nothing else.

    They are recorded as the backend sees them, below ``vmap`` and autograd, with the shapes, strides, precision and
    device of their operands. The operands are new, with the memory layout of the original ones.
    """
    recorder = _Recorder()
    with recorder:
        computation()
    calls = recorder.calls

    def run() -> None:
        for product, args, kwargs in calls:
            product(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []
        self._twins: dict[tuple, torch.Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in PRODUCTS:
            twins = torch.utils._pytree.tree_map_only(torch.Tensor, self._twin, (args, kwargs))
            self.calls.append((function, *twins))
        return function(*args, **kwargs)

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """One tensor for each operand, so that cache hits are no more frequent than in the original."""
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key not in self._twins:
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            entries = 1 + sum((size - 1) * stride for size, stride in steps)  # fewer than numel() where it is expanded
            memory = torch.randn(max(entries, 0), dtype=tensor.dtype, device=tensor.device)
            self._twins[key] = memory.as_strided(tensor.shape, tensor.stride())
        return self._twins[key]
