"""Products on a GPU, replayed as CUDA graphs: loops over time launch many kernels that are shorter than their launches.

The first calls of a function on arrays of given shapes run normally. Then one call is recorded, which takes as long as
several calls. Further calls copy their arrays to the buffers of the recorded kernels and replay them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

LARGEST = 2**30
"""Bytes of arguments beyond which a call is never recorded: its kernels take longer than their launches."""
PLAIN = 2
"""Number of calls before one is recorded."""
NEVER = -(2**62)
"""Count of calls for a function that could not be recorded; it stays below :data:`PLAIN`."""
MOST = 1024
"""Number of kinds of calls that are remembered."""
HELD = 2**32
"""Bytes that all recordings may hold; the least recently used are dropped first."""


class Recording(NamedTuple):
    """A recorded call.

    Attributes:
        arguments: tensors that the kernels read.
        results: tensors that they write.
        replay: runs the kernels.
        held: bytes of all of these tensors and of intermediate results.
    """

    arguments: list[Tensor]
    results: Any
    replay: Callable[[], None]
    held: int


_LOCK = threading.Lock()
_seen: OrderedDict[Hashable, Recording | int] = OrderedDict()
"""Recordings, and the numbers of plain calls of functions that are not recorded yet."""


def call(key: Hashable, function: Callable[..., Any], *arrays: Any) -> Any:
    """``function(*arrays)`` for nested tuples, mappings and tensors on one GPU.

    Args:
        key: identifies the function; equal keys mean the same kernels.
        function: launches the same kernels for all arrays of the same shapes, and draws no random numbers.
        arrays: all of the tensors that it reads.
    """
    leaves, structure = tree_flatten(arrays)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if sum(t.nbytes for t in tensors) > LARGEST:
        return function(*arrays)
    # The TF32 setting selects kernels, and a replay would use that of the recording.
    precision = torch.backends.cuda.matmul.fp32_precision
    whole = (key, precision, str(structure), tuple(_description(leaf) for leaf in leaves))
    with _LOCK:
        found = _seen.pop(whole, 0)
        if isinstance(found, int) and found < PLAIN:
            _seen[whole] = found + 1
            return function(*arrays)
        try:
            recording = _recorded(function, leaves, structure) if isinstance(found, int) else found
        except Exception:  # too little memory for its copies, or an operation that a graph cannot record
            _seen[whole] = NEVER
            return function(*arrays)
        _seen[whole] = recording
        _forget()
        for mine, given in zip(recording.arguments, tensors, strict=True):
            mine.copy_(given)
        recording.replay()
        return tree_map_only(Tensor, torch.clone, recording.results)


def forget() -> None:
    """Drop all recordings, and the memory that they hold."""
    with _LOCK:
        _seen.clear()


def _description(leaf: Any) -> Hashable:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _forget() -> None:
    held = sum(each.held for each in _seen.values() if isinstance(each, Recording))
    while len(_seen) > 1 and (held > HELD or len(_seen) > MOST):
        _, oldest = _seen.popitem(last=False)
        held -= oldest.held if isinstance(oldest, Recording) else 0


def _recorded(function: Callable[..., Any], leaves: list[Any], structure: Any) -> Recording:
    own = [torch.empty_like(leaf).copy_(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    tensors = [leaf for leaf in own if isinstance(leaf, Tensor)]
    # A function may overwrite its arguments, since they are copied again before each replay.
    results, replay, held = _record(lambda: function(*tree_unflatten(own, structure)))
    return Recording(tensors, results, replay, held + sum(t.nbytes for t in tensors))


def _record(run: Callable[[], Any]) -> tuple[Any, Callable[[], None], int]:
    """The result of a run, a function that runs its kernels again, and the bytes that they hold."""
    before = torch.cuda.memory_reserved()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # libraries initialise themselves
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        results = run()
    return results, graph.replay, max(0, torch.cuda.memory_reserved() - before)
