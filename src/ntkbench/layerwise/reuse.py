"""Kernels of networks that are traced once for each structure.

Tracing takes from a tenth of a second to many seconds, and its result depends only on a network's code and shapes.
Traces are therefore cached, without any values, by the classes, settings and shapes of a network.

These do not cover everything that a forward pass may read: a global variable, a closure, an attribute of an attribute,
the value of a buffer as a Python number. Before a trace is reused, it is therefore compared with plain autograd on one
sample, with a tolerance based on its rounding on the network that it was made from. The certificate of the kernel
covers the other samples. If either contradicts the trace, the network itself is traced.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ntkbench.layerwise.kernel import LayerwiseKernel, Trace
from ntkbench.layerwise.trace import TRACING, fixed_tensors
from ntkbench.operators import arrays, certificate

KEPT = 12
"""Maximum number of cached traces; the least recently used are dropped first."""

HELD = 2**20
"""Maximum bytes of the tensors in a cached trace."""

SPREAD = 100
"""Largest difference from plain autograd of a reused trace, relative to that on the network it was made from."""

_kept: OrderedDict[Hashable, tuple[Trace, float]] = OrderedDict()
"""Traces by structure, with the largest difference from plain autograd at which each is reused."""


def traced(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, memory: int) -> LayerwiseKernel:
    """The kernel of a network, from the trace of an equal network if one is cached.

    Cost: a trace, or two passes of one sample.

    Args:
        module, parameters, x, memory: see :class:`ntkbench.layerwise.kernel.LayerwiseKernel`.

    Raises:
        BadInput: the network cannot be traced.
    """
    x = x[:1].detach().clone()
    key = _structure(module, parameters, x)
    engine = functools.partial(LayerwiseKernel, module, parameters, x, memory)
    sample = list(parameters.values()), x[0]

    def own() -> LayerwiseKernel:
        with TRACING:
            _kept.pop(key, None)
            made = engine()
            with contextlib.suppress(Exception):  # a trace that does not run is not cached
                _keep(key, made.trace, made.difference(*sample), arrays.epsilon(sample[0][0]))
            return made

    with TRACING:
        if key in _kept:
            trace, allowed = _kept[key]
            with contextlib.suppress(Exception):  # the trace of another network may fail in any way
                found = engine(trace=trace, retrace=lambda: own().trace)
                if found.difference(*sample) <= allowed:
                    _kept.move_to_end(key)
                    return found
        return own()


def forget() -> None:
    """Drop all traces: the next kernel of each network traces it again."""
    with TRACING:
        _kept.clear()


def _keep(key: Hashable, trace: Trace, difference: float, epsilon: float) -> None:
    if difference <= certificate.tolerance(epsilon) and trace.nbytes <= HELD:
        _kept[key] = trace, min(SPREAD * max(difference, epsilon), certificate.tolerance(epsilon))
        while len(_kept) > KEPT:
            _kept.popitem(last=False)


def _structure(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Hashable:
    """A key that two networks share if they have the same classes, settings and shapes; it keeps no class alive."""
    layers = tuple(
        (name, weakref.ref(type_before_parametrizations(layer)), _settings(layer))
        for name, layer in module.named_modules(remove_duplicate=False)
    )
    tensors = (parameters, fixed_tensors(module, parameters))
    shapes = tuple(tuple((name, t.shape, t.dtype) for name, t in each.items()) for each in tensors)
    return layers, shapes, x.shape, x.dtype, x.device, torch.get_default_dtype()


def _settings(layer: nn.Module) -> Hashable:
    """Attributes that are numbers, strings and the like, including whether the module is in train mode."""
    return frozenset((name, value) for name, value in vars(layer).items() if _is_plain(value))


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | complex | str | bytes | None | torch.dtype | torch.device)
