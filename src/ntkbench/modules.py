"""Copies of modules, in another precision, on another device or with other values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ntkbench.errors import BadInput, summary


def copied(module: nn.Module, role: str = "the model") -> nn.Module:
    """A deep copy, with the hooks on parameters, which tensors lose when they are copied.

    Tensors that belong to a graph or to inference mode become ordinary ones; what belonged to a graph asks for
    gradients as before.

    Raises:
        BadInput: an attribute cannot be copied; says which.
    """
    with _OrdinaryTensors(), torch.no_grad():  # parameters of a copied scripted module would belong to a graph
        try:
            made = copy.deepcopy(module)
        except Exception as error:  # whatever the attributes' own code raises
            where = next(_uncopyable(module), "")
            raise BadInput(f"{role} cannot be copied{where}: {summary(error)}") from error
    for own, parameter in zip(made.parameters(), module.parameters(), strict=True):
        for hook in (parameter._backward_hooks or {}).values():
            own.requires_grad_(True).register_hook(hook)
        own.requires_grad_(parameter.requires_grad)
    return made


def cast(module: nn.Module, dtype: torch.dtype, device: torch.device | None = None) -> nn.Module:
    """Bring a module to a real precision, in place; complex tensors become complex ones of that precision."""

    def to(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(device, dtype.to_complex())
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    return module._apply(to)


@torch.no_grad()
def load(module: nn.Module, values: Mapping[str, Tensor | np.ndarray]) -> nn.Module:
    """Set parameters and buffers by name, in place; those that are not persistent as well."""
    own = dict((*module.named_buffers(remove_duplicate=False), *module.named_parameters(remove_duplicate=False)))
    for name, value in values.items():
        own[name].copy_(torch.as_tensor(value))
    return module


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
                memo[id(tensor)] = made = torch.empty(0)  # left behind by a transform, which took the value with it
                return made
            if not tensor.is_leaf or tensor.is_inference():
                made = tensor.detach().clone().requires_grad_(tensor.requires_grad)
                memo[id(tensor)] = made
                return made
        return function(*args, **(kwargs or {}))


def _uncopyable(module: nn.Module) -> Iterator[str]:
    """Names of attributes that cannot be copied, as they stand in a message."""
    for path, layer in module.named_modules():
        for key, value in vars(layer).items():
            if key != "_modules":
                try:
                    copy.deepcopy(value)
                except Exception:
                    yield f" because of its attribute {f'{path}.{key}'.lstrip('.')!r}"
