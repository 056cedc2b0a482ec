"""Peak memory of the tensors that a computation allocates."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations inside the context allocate, without those that existed before.

    Attributes:
        now: bytes of the storages that still exist.
        peak: the largest value of ``now``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in self._storages((args, kwargs)):
            self._known.setdefault(storage._cdata, 0)  # allocated before
        made = function(*args, **(kwargs or {}))
        for storage in self._storages(made):
            if storage._cdata not in self._known:
                self._known[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return made

    def _free(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)

    @staticmethod
    def _storages(values: Any) -> list[torch.UntypedStorage]:
        tensors = (t for t in tree_leaves(values) if isinstance(t, torch.Tensor) and not isinstance(t, FakeTensor))
        return [t.untyped_storage() for t in tensors if t.layout == torch.strided and t.device.type != "meta"]
