"""Copies of modules, in another precision, on another device or with other values."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from ntkbench.errors import BadInput, summary


def copied(module: nn.Module, role: str = "the model") -> nn.Module:
    """A deep copy that keeps the hooks on parameters, which copied tensors lose.

    Tensors that belong to a graph or to inference mode become ordinary ones with the same ``requires_grad``.

    Raises:
        BadInput: an attribute cannot be copied, or a ``__deepcopy__`` makes no copy; says which.
    """
    with _OrdinaryTensors(), torch.no_grad():  # parameters of a copied scripted module would belong to a graph
        try:
            made = copy.deepcopy(module)
        except Exception as error:  # whatever the attributes' own code raises
            where = next(_uncopyable(module), "") or _by_own_code(module)
            raise BadInput(f"{role} cannot be copied{where}: {summary(error)}") from error
    if wrong := _no_copy(module, made):
        raise BadInput(f"{role} cannot be copied{_by_own_code(module)}: {wrong}")
    for own, parameter in zip(made.parameters(), module.parameters(), strict=True):
        for hook in (parameter._backward_hooks or {}).values():
            own.requires_grad_(True).register_hook(hook)
        own.requires_grad_(parameter.requires_grad)
    return made


def beside(module: nn.Module) -> nn.Module:
    """A copy that shares parameters and buffers, but not other attributes, which a call may change."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    with _OrdinaryTensors(), torch.no_grad():
        return copy.deepcopy(module, shared)


def cast(module: nn.Module, dtype: torch.dtype | None, device: torch.device | None = None) -> nn.Module:
    """Convert a module to a real precision, in place; complex tensors become complex ones of that precision.

    With ``dtype=None`` all tensors keep their precision.
    """

    def to(tensor: Tensor) -> Tensor:
        if dtype is None:
            return tensor.to(device)
        if tensor.is_complex():
            return tensor.to(device, dtype.to_complex())
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    return module._apply(to)


def called(module: nn.Module, x: Tensor) -> Any:
    """``module(x)``, with cuDNN off for recurrent layers in eval mode, whose backward pass it refuses."""
    refused = any(isinstance(layer, nn.RNNBase) and not layer.training for layer in module.modules())
    with torch.backends.cudnn.flags(enabled=False, allow_tf32=False) if refused else contextlib.nullcontext():
        return module(x)


def with_values(module: nn.Module, values: Mapping[str, Tensor], inputs: tuple[Any, ...]) -> Any:
    """``torch.func.functional_call`` that also restores submodules with several names, in which values would stay."""
    names: dict[nn.Module, int] = {}
    for _, layer in module.named_modules(remove_duplicate=False):
        names[layer] = names.get(layer, 0) + 1
    kept = [(layer, dict(layer._parameters), dict(layer._buffers)) for layer, count in names.items() if count > 1]
    try:
        return functional_call(module, dict(values), inputs)
    finally:
        for layer, parameters, buffers in kept:
            layer._parameters.update(parameters)
            layer._buffers.update(buffers)


@torch.no_grad()
def load(module: nn.Module, values: Mapping[str, Tensor | np.ndarray]) -> nn.Module:
    """Set parameters and buffers by name, in place, including those that are not persistent."""
    own = dict((*module.named_buffers(remove_duplicate=False), *module.named_parameters(remove_duplicate=False)))
    for name, value in values.items():
        own[name].copy_(torch.as_tensor(value))
    return module


def values(module: nn.Module, but: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Parameters and buffers by name, bit for bit on the host, including those outside the state_dict."""
    each = (*module.named_parameters(), *module.named_buffers())
    return {name: _on_host(t.detach()) for name, t in each if name not in but}


def _on_host(t: Tensor) -> np.ndarray:
    t = (t.to_dense() if t.layout != torch.strided else t).cpu()
    try:
        return t.numpy()
    except TypeError:  # a type that NumPy does not have
        return t.contiguous().view(torch.uint8).numpy()


def frozen(module: nn.Module) -> nn.Module:
    """Switch off the gradients of all parameters, in place; scripted modules lack ``requires_grad_``."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


class _OrdinaryTensors(TorchFunctionMode):
    """Deep copies of tensors without their graph, and outside inference mode."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.__deepcopy__:
            tensor, memo = args
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                memo[id(tensor)] = made = torch.empty(0)  # left behind by a transform; its value is gone
                return made
            if not tensor.is_leaf or tensor.is_inference():
                made = tensor.detach().clone().requires_grad_(tensor.requires_grad)
                memo[id(tensor)] = made
                return made
        return function(*args, **(kwargs or {}))


def _no_copy(module: nn.Module, made: object) -> str:
    """Why something is not a copy of a module; empty if it is one."""
    if not isinstance(made, nn.Module):
        return f"it returns {type(made).__name__}"
    own, others = dict(module.named_parameters()), dict(made.named_parameters())
    for key in (*own, *others):
        if key not in own or key not in others or own[key].shape != others[key].shape:
            return f"the copy has other parameters, such as {key!r}"
        if own[key] is others[key]:
            return f"the copy shares the parameter {key!r}"
    return ""


def _by_own_code(module: nn.Module) -> str:
    """Classes in a module with a ``__deepcopy__`` of their own, worded for a message."""
    names = dict.fromkeys(type(layer).__name__ for layer in module.modules() if hasattr(type(layer), "__deepcopy__"))
    return f" by the __deepcopy__ of {', '.join(names)}" if names else ""


def _uncopyable(module: nn.Module) -> Iterator[str]:
    """Names of attributes that cannot be copied, worded for a message."""
    for path, layer in module.named_modules():
        for key, value in vars(layer).items():
            if key != "_modules":
                try:
                    copy.deepcopy(value)
                except Exception:
                    yield f" because of its attribute {f'{path}.{key}'.lstrip('.')!r}"
