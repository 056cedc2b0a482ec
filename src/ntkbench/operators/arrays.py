"""Small helpers for arrays of any library: moving them to the host and back, and cutting them into chunks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import DTypeLike

Array = Any
"""A tensor of an operator's backend (``torch.Tensor`` or ``jax.Array``)."""

TF32 = 2.0**-10
"""Machine epsilon of TF32."""


def to_numpy(array: Any, dtype: DTypeLike | None = None) -> np.ndarray:
    """An array of any library as a NumPy array on the host, in its own precision unless ``dtype`` is given.

    NumPy has no bfloat16: a torch tensor in bfloat16 becomes float32.
    """
    if hasattr(array, "cpu"):
        array = array.cpu().float() if str(array.dtype) == "torch.bfloat16" else array.cpu()
    return np.asarray(array, dtype=dtype)


def on_host(array: Any) -> bool:
    """Whether an array of any library lies in the host's memory, where :func:`to_numpy` is a view."""
    if array_api_compat.is_jax_array(array):
        return all(device.platform == "cpu" for device in array.devices())
    return str(array_api_compat.device(array)) == "cpu"


def gather(blocks: Iterable[Any]) -> np.ndarray:
    """Blocks ``[k, ...]`` of any library concatenated along the first axis, in float64 on the host."""
    return np.concatenate([to_numpy(block, np.float64) for block in blocks])


def asarray_like(array: np.ndarray, like: Any) -> Any:
    """A host array in the library and precision of ``like``, on its device."""
    xp = array_api_compat.array_namespace(like)
    return xp.asarray(array, dtype=like.dtype, device=array_api_compat.device(like))


def squared_norms(rows: Array) -> Array:
    """Squared norms along the last axis, without an array of the squares."""
    norms: Array = array_api_compat.array_namespace(rows).linalg.vector_norm(rows, axis=-1)
    return norms**2


def epsilon(array: Any) -> float:
    """Machine epsilon of products in the array's precision: that of TF32 if torch uses it for them."""
    if array_api_compat.is_torch_array(array) and array.is_cuda and _in_tf32(array):
        return TF32
    return float(array_api_compat.array_namespace(array).finfo(array.dtype).eps)


def _in_tf32(array: Any) -> bool:
    import torch

    return array.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def slices(sizes: Sequence[int]) -> list[slice]:
    """Adjacent slices of the given sizes, the first of which starts at 0."""
    return list(itertools.starmap(slice, itertools.pairwise(itertools.accumulate(sizes, initial=0))))


def chunks(size: int, count: int) -> list[slice]:
    """``range(size)`` in ``count`` adjacent slices of almost equal length."""
    return [slice(size * i // count, size * (i + 1) // count) for i in range(count)]


def strips(rows: int, columns: int, most: float) -> list[slice]:
    """``range(rows)`` in adjacent slices, each of at most ``most`` entries over all ``columns``, or of a single row."""
    return chunks(rows, -(-rows // max(1, int(most / columns))))
