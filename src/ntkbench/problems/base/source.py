"""Sources of a kernel's problem: a torch network or a JAX function, with inputs of any structure."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ntkbench import ambient
from ntkbench.errors import BadInput, Unavailable, unknown
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of names in wrapped networks."""


class Source(ABC):
    """A network and its inputs as the user gave them.

    Attributes:
        problem: the network and its inputs as a problem.
    """

    problem: Problem

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user on what J leaves out."""
        return ()

    @abstractmethod
    def target(self, device: str | torch.device | None) -> tuple[Target, int | None]:
        """The target to compute on, and the index of its GPU if one is named."""

    @abstractmethod
    def columns(self, problem: Problem, inputs: Any) -> tuple[Problem, Any]:
        """A problem that also holds other inputs, and these inputs as its network takes them."""

    @abstractmethod
    def at(self, problem: Problem, weights: Any) -> Problem:
        """A problem of this source at other weights.

        Raises:
            BadInput: they do not belong to this network.
        """

    def of(self, model: Any) -> Problem | None:
        """Another network on the same inputs; ``None`` if ``model`` is not a network."""
        return None

    def alike(self, model: Any) -> Any:
        """Another network that is called as this one; its weights are shared, not copied."""
        return model

    def takes_array(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape may be all parameters of the network."""
        return False

    @abstractmethod
    def check_end(self, other: Any) -> None:
        """Refuse an object that cannot be the second network of an alignment, whatever its values.

        Raises:
            BadInput: says what is allowed.
        """

    @abstractmethod
    def settings(self, target: Target, index: int | None) -> contextlib.AbstractContextManager[object]:
        """The settings of the backend under which kernels are computed, on one of several GPUs."""

    def checks(self, target: Target, index: int | None) -> contextlib.AbstractContextManager[object]:
        """The settings under which networks are checked, which may be on another device than their kernels."""
        return self.settings(target, index)


class TorchSource(Source):
    """A module and tensors."""

    def __init__(self, model: nn.Module, inputs: Any, call: Any, output: Any, dtype: str | None) -> None:
        import torch

        from ntkbench.problems.base import calls
        from ntkbench.problems.base.sequences import wrapped

        with calls.unbatched(inputs):
            self._module, x = calls.as_module(model, inputs, call, output)
            # The caller may write to its own tensor, and frees its graph.
            self._x = x.detach().clone() if isinstance(x, torch.Tensor) else x
            self.problem = wrapped(self._module, self._x, dtype=dtype)
        self._dtype = str(next(iter(self.problem.theta_0.values())).dtype)

    @functools.cached_property
    def notes(self) -> tuple[str, ...]:
        """As in :class:`Source`; one forward pass, of one sample if samples do not interact."""
        import torch

        from ntkbench.modules import beside, called
        from ntkbench.operators.plain import leaves
        from ntkbench.problems.base.module import generators_restored

        problem, net = self.problem, beside(self.problem.network)
        own = {id(w) for w in net.parameters()}
        x = torch.from_numpy(problem.x if problem.samples_interact else problem.x[:1]).to(next(net.parameters()).device)
        with generators_restored([x.device] if x.is_cuda else []), torch.enable_grad():
            others = [w for w in leaves(called(net, x)) if id(w) not in own]
        if not others:
            return ()
        return (
            "J leaves out tensors with requires_grad=True that are not among the network's parameters, such as one of "
            f"shape {tuple(others[0].shape)}: register them, as by nn.Parameter or nn.ModuleList",
        )

    def target(self, device: str | torch.device | None) -> tuple[Target, int | None]:
        kind, index = _device(self._module, device)
        return Target("torch", self._dtype, kind), index

    def columns(self, problem: Problem, inputs: Any) -> tuple[Problem, Tensor]:
        from ntkbench.problems.base import calls

        adapted = isinstance(problem.module, calls.Calling)
        module, _, x2 = calls.with_more(problem.network if adapted else self._module, self._x, inputs)
        return dataclasses.replace(problem, module=module) if adapted else problem, x2.detach()

    def at(self, problem: Problem, weights: Any) -> Problem:
        from torch import nn

        from ntkbench.networks.recurrent import States
        from ntkbench.problems.base import module

        if isinstance(weights, Mapping):
            return module.at(problem, self._own(problem.network, weights))
        self._check_layout(weights)
        if isinstance(weights, nn.RNNBase) and isinstance(problem.module, States):
            weights = States(weights)
        return module.at(problem, self.alike(weights))

    def alike(self, model: Any) -> Any:
        """As in :class:`Source`, with the present values of modules that were given as ``call`` or ``output``.

        What this method has returned, and copies of it, are returned unchanged.
        """
        from ntkbench.problems.base import calls

        return calls.alike(self._module, model, self.problem.network)

    def _own(self, net: nn.Module, weights: Mapping[Any, Any]) -> dict[str, Any]:
        """Values by their names in a problem's network, from values by their names in the user's network.

        A tensor that is tied under several names may be given under each. Values that the problem's network does not
        have, such as running statistics of BatchNorm in train mode, are left out.
        """
        import torch

        from ntkbench.problems.base.adapter import Calling, own_name
        from ntkbench.problems.base.module import as_value, unwrapped

        model = unwrapped(self._module.model if isinstance(self._module, Calling) else self._module)
        inputs = set(net._buffers) if isinstance(net, Calling) else set()
        every = (
            *net.named_parameters(remove_duplicate=False),
            *((key, b) for key, b in net.named_buffers(remove_duplicate=False) if key not in inputs),
        )
        first: dict[int, str] = {}
        keys = {own_name(net, key): first.setdefault(id(w), key) for key, w in every}
        left_out = {key for key, _ in (*model.named_parameters(), *model.named_buffers())} - keys.keys()
        found: dict[str, Any] = {}
        for given, value in weights.items():
            name = str(given)
            while name not in keys and name.startswith(WRAPPERS):  # of a compiled network, or of one on several GPUs
                name = name.partition(".")[2]
            if name in left_out:
                continue
            if name not in keys:
                raise unknown("parameter or buffer", name, keys)
            key = keys[name]
            value = as_value(name, value)
            if key in found and not torch.equal(found[key], value):
                raise BadInput(f"{name!r} is tied to another parameter, but the two have different values")
            found[key] = value
        return found

    def _check_layout(self, model: object) -> None:
        """Refuse a recurrent layer with another layout of its inputs."""
        from torch import nn

        layers = [layer for layer in (self._module, model) if isinstance(layer, nn.RNNBase)]
        if len({layer.batch_first for layer in layers}) > 1:
            raise BadInput("model_0 and model_f must take their inputs in the same layout; batch_first differs")

    def check_end(self, other: Any) -> None:
        from torch import nn

        if not isinstance(other, nn.Module | Mapping):
            raise BadInput(
                "the second network of an alignment must be a torch.nn.Module, a Kernel, values of its parameters by "
                f"name, or a target array; got {type(other).__name__}"
            )

    def of(self, model: Any) -> Problem | None:
        from torch import nn

        from ntkbench.problems.base.sequences import wrapped

        if not isinstance(model, nn.Module):
            return None
        self._check_layout(model)
        return wrapped(self.alike(model), self._x, dtype=self._dtype)

    def checks(self, target: Target, index: int | None) -> contextlib.AbstractContextManager[object]:
        return ambient.own_settings(target.dtype, str(next(self._module.parameters()).device))

    @contextlib.contextmanager
    def settings(self, target: Target, index: int | None) -> Iterator[None]:
        import torch

        from ntkbench.operators import torch as backend

        one_gpu = contextlib.nullcontext() if index is None else torch.cuda.device(index)
        with one_gpu, ambient.own_settings(target.dtype, str(backend.place(target)), tf32=target.tf32):
            yield


class JaxSource(Source):
    """A function ``f(params, x)`` and arrays."""

    def __init__(
        self, f: Any, inputs: Any, params: Any, call: Any, output: Any, dtype: str | None, selected: bool
    ) -> None:
        from ntkbench.problems.base.function import check_collections, from_function

        if call is not None or output is not None:
            raise BadInput("call and output are for torch modules; a JAX function selects its outputs itself")
        self._f, self._inputs, self._dtype = f, inputs, dtype
        self.problem = from_function(f, inputs, params, dtype=dtype)
        if not selected:
            check_collections(self.problem, params)

    def target(self, device: str | torch.device | None) -> tuple[Target, int | None]:
        from ntkbench.operators.jax import place
        from ntkbench.problems.base.function import FlatFunction

        own = str(self.problem.theta_0[next(iter(self.problem.theta_0))].dtype)
        target = Target("jax", self._dtype or own, "auto" if device is None else str(device))
        assert isinstance(self.problem.jax_forward, FlatFunction)
        if others := self.problem.jax_forward.devices - {place(target)}:
            said = ", ".join(sorted(map(str, others)))
            raise BadInput(f"f closes over arrays on {said}, and is computed on {place(target)}: move them there")
        return target, None

    def columns(self, problem: Problem, inputs: Any) -> tuple[Problem, Any]:
        from ntkbench.problems.base import function

        return function.with_columns(problem, inputs)

    def settings(self, target: Target, index: int | None) -> contextlib.AbstractContextManager[object]:
        return ambient.own_jax_settings(target.dtype)

    def check_end(self, other: Any) -> None:
        if other is None or callable(other):
            raise BadInput(
                "the second network of an alignment must be a pytree of the function's parameters, a Kernel, or a "
                f"target array; got {type(other).__name__}; for another function use ntkbench.Kernel(f, x, params=...)"
            )

    def at(self, problem: Problem, weights: Any) -> Problem:
        from ntkbench.problems.base import function

        return function.at(problem, weights)

    def takes_array(self, shape: tuple[int, ...]) -> bool:
        from ntkbench.problems.base import function

        return function.takes_array(self.problem, shape)


def source(
    model: Any, inputs: Any, call: Any, output: Any, params: Any, dtype: str | None, *, selected: bool
) -> Source:
    """The source for the model and inputs that the user gave; ``selected`` says whether parameters are selected later.

    Raises:
        BadInput: it is neither a module nor a function with ``params``; or the source refuses it.
    """
    from torch import nn

    if isinstance(model, nn.Module):
        if params is not None:
            raise BadInput("params are for JAX functions f(params, x); a torch.nn.Module has its own")
        return TorchSource(model, inputs, call, output, dtype)
    if callable(model) and params is not None:
        return JaxSource(model, inputs, params, call, output, dtype, selected)
    raise BadInput(
        f"model must be a torch.nn.Module, or a JAX function f(params, x) with params=..., got {type(model).__name__}"
    )


def _device(model: nn.Module, device: str | torch.device | None) -> tuple[str, int | None]:
    """Kind of device, as a target names it, and the index of its GPU if one is named."""
    name = str(next(model.parameters()).device if device is None else device)
    match = re.fullmatch(r"(cpu|cuda):([0-9]+)", name)
    if not match:
        return name, None
    if match[1] == "cpu":
        return "cpu", None
    import torch

    if int(match[2]) >= torch.cuda.device_count():
        raise Unavailable(f"device={name!r} was requested, but torch sees {torch.cuda.device_count()} CUDA devices")
    return "cuda", int(match[2])
