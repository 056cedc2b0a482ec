"""Records a forward pass so that the derivative of the record is the one that autograd computes.

A tracer records operations below autograd. It does not see ``torch.no_grad``, mistakes the copies that autograd saves
for ``detach``, replaces a custom ``autograd.Function`` by its forward pass, and turns values into constants wherever
they leave PyTorch. The modes here record the first two as autograd treats them and refuse the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointFunction

from ntkbench.errors import Unsupported

aten = torch.ops.aten


class DataDependent(Unsupported):
    """A forward pass reads the value of a tensor that depends on x or the parameters."""


SHAPED = {
    aten.empty_like.default,
    aten.full_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.ones_like.default,
    aten.zeros_like.default,
}
"""Operations with a result that depends only on the shape and the type of the argument."""


def as_autograd_sees_it(forward: Callable[[], Tensor], moving: Iterable[Tensor]) -> Tensor:
    """The outputs of a forward pass, while a tracer runs.

    Args:
        forward: the forward pass.
        moving: the parameters, which require gradients, and x.

    Raises:
        DataDependent: the forward pass branches on data.
        Unsupported: it cannot be recorded for another reason.
    """
    operations = _Operations(moving)
    with mock.patch.object(CheckpointFunction, "apply", _run_now), operations, _Calls(operations):
        outputs = forward()
    for node in _backward_nodes(outputs):
        if isinstance(node, BackwardCFunction) or node.name().startswith("torch::autograd::CppNode"):
            raise Unsupported(f"the backward pass of a custom autograd.Function ({node.name()}) cannot be traced")
    return outputs


def _run_now(function: Callable[..., Any], preserve_state: bool, *inputs: Any) -> Any:
    """Run a checkpointed function directly, without activation checkpointing."""
    return function(*inputs)


def _backward_nodes(outputs: Tensor) -> set[torch.autograd.graph.Node]:
    found: set[torch.autograd.graph.Node] = set()
    left = [outputs.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left.extend(before for before, _ in node.next_functions)
    return found


class _Operations(TorchDispatchMode):
    """ATen operations, one level below autograd.

    Attributes:
        stopping: whether the user calls ``detach``; autograd calls it as well, for values that it saves.
    """

    def __init__(self, moving: Iterable[Tensor]) -> None:
        super().__init__()
        self.stopping = False
        self._moving: dict[int, torch.UntypedStorage] = {}  # by address; holding them keeps addresses unique
        self._carrying: set[int] = set()  # of these, what autograd differentiates
        self._aliased: set[int] = set()  # of these, what has detached aliases
        self._add(moving, carrying=True)

    def moves(self, values: Any) -> bool:
        """Whether a value depends on x or the parameters."""
        return any(_address(t) in self._moving for t in _tensors(values))

    def _add(self, tensors: Iterable[Tensor], *, carrying: bool) -> None:
        for t in tensors:
            self._moving[_address(t)] = t.untyped_storage()
            if carrying:
                self._carrying.add(_address(t))

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        moving = self.moves((args, kwargs))
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise Unsupported(f"the network draws random numbers ({function})")
        if torch.Tag.data_dependent_output in function.tags:
            if moving:
                raise DataDependent(
                    f"the forward pass reads a value that depends on x or the parameters ({function}), for example to "
                    "branch on data, and cannot be traced"
                )
            with disable_proxy_modes_tracing():
                return function(*args, **kwargs)
        if not moving or function in SHAPED:
            return function(*args, **kwargs)
        written = _written(function, args, kwargs)
        off = not torch.is_grad_enabled()
        saving = function is aten.detach.default and not self.stopping
        if saving:
            function = aten.alias.default
        if any(
            _address(t) in self._carrying and (not t.requires_grad or (off and _address(t) in self._aliased))
            for t in written
        ):
            raise Unsupported("the forward pass writes into a detached alias of what autograd differentiates")
        before = [t.clone() if off and _address(t) in self._carrying else None for t in written]
        if off and written:
            args, kwargs = tree_map_only(
                Tensor, lambda t: t if any(t is w for w in written) else aten.detach.default(t), (args, kwargs)
            )
        with _below_autograd() if saving else contextlib.nullcontext():
            made = function(*args, **kwargs)
        for t, old in zip(written, before, strict=True):
            if old is not None:  # a new value with the old derivative
                t.copy_(old + (t - old).detach())
        if (off and not written) or function is aten.detach.default:
            self._aliased.update(_address(t) for t in _tensors(made))
        if off and not written:
            made = tree_map_only(Tensor, aten.detach.default, made)
        carrying = not off and any(t.requires_grad for t in _tensors((args, kwargs)))
        self._add([*_tensors(made), *written], carrying=carrying)
        return made


@contextlib.contextmanager
def _below_autograd() -> Iterator[None]:
    """Give results no derivative and no base: values that a graph saves would keep the graph alive forever."""
    views = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(views):
        yield


class _Calls(TorchFunctionMode):
    """Calls of the user, one level above autograd."""

    def __init__(self, operations: _Operations) -> None:
        super().__init__()
        self._operations = operations

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _READS and self._operations.moves(args):
            raise Unsupported(
                "the forward pass converts a value that depends on x or the parameters to Python or NumPy and cannot "
                "be traced"
            )
        if function is torch.Tensor.register_hook:
            raise Unsupported("a hook on a gradient cannot be traced")
        if function == _DATA.__get__:
            function = torch.Tensor.detach
        if function not in _STOPS:
            return function(*args, **(kwargs or {}))
        self._operations.stopping = True
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self._operations.stopping = False


_STOPS = {torch.Tensor.detach, torch.Tensor.detach_, torch.detach, torch.detach_}
_DATA: Any = torch.Tensor.data
_READS = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, _DATA.__set__}


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation changes in place."""
    if not function._schema.is_mutable:
        return []
    declared = function._schema.arguments
    given = {argument.name: value for argument, value in zip(declared, args, strict=False)} | kwargs
    names = [a.name for a in declared if a.alias_info is not None and a.alias_info.is_write]
    return _tensors([given.get(name) for name in names])


def _address(t: Tensor) -> int:
    return t.untyped_storage()._cdata
