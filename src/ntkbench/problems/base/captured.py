"""What the functions of a network refer to besides their arguments: random generators, and layers that copies share."""

from __future__ import annotations

import contextlib
import dis
import functools
import random
import types
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)

DEPTH = 4
"""Steps from a layer to its random generators, as in: its hooks, one of them, a function that it calls, a generator."""

MANY = 1000
"""Containers of more items hold data, and are not searched."""

PLAIN = (Tensor, np.ndarray, str, bytes, int, float, type, types.ModuleType, type(None))
"""Types of values that are not searched."""


def generators(net: nn.Module) -> list[Any]:
    """Random generators in the attributes of layers, and in what their functions refer to.

    They are looked for in lists, dicts and objects, in closures and among global variables, up to :data:`DEPTH` steps
    from a layer. Two copies of a network give theirs in the same order.
    """
    seen: dict[int, Any] = {}
    level: list[Any] = list(net.modules())
    for _ in range(DEPTH):
        new = {id(value): value for value in level if id(value) not in seen}
        seen |= new
        level = [each for value in new.values() for each in _inside(value)]
    seen |= {id(value): value for value in level}
    found = [value for value in seen.values() if isinstance(value, GENERATORS)]
    return [value for value in found if not isinstance(value, random.SystemRandom)]  # it has no state


def shared(copy: nn.Module, original: nn.Module) -> str:
    """Where a copy refers to a layer of the original, worded for a message; empty if nowhere.

    Copies share functions, methods with their global variables, and weak references. Such a function or reference would
    use the layer of the original instead of that of the copy.
    """
    layers, known = {id(layer) for layer in original.modules()}, set()
    for path, layer in copy.named_modules():
        methods = {} if type(layer) in known else {f.__name__: f for f in _methods(layer) if hasattr(f, "__code__")}
        known.add(type(layer))
        named = {**methods, **vars(layer)}
        for key, value in named.items():
            held = _inside(value) if isinstance(value, dict | list | tuple) else [value]
            if "state_dict" not in key and any(_refers(each, layers) for each in held):
                if key.endswith("_hooks"):
                    return f"a hook of {path!r}" if path else "a hook of the model"
                kind = "attribute" if key in vars(layer) else "method"
                return f"the {kind} {f'{path}.{key}'.lstrip('.')!r}"
    return ""


def _refers(value: Any, layers: set[int]) -> bool:
    """Whether a weak reference, a function, or one that it refers to, refers to one of these layers."""
    if isinstance(value, weakref.ref):
        return id(value()) in layers
    if not isinstance(value, types.FunctionType):
        return False
    own = _inside(value)
    kinds = (types.FunctionType, types.MethodType, functools.partial, weakref.ref, dict, list, tuple)
    return any(id(each) in layers for each in own + [v for f in own if isinstance(f, kinds) for v in _inside(f)])


def _methods(layer: nn.Module) -> list[Any]:
    """The forward pass of a layer, and the methods that it and they name."""
    found: dict[str, Any] = {}
    names = ["forward"]
    while names:
        if (name := names.pop()) not in found:
            found[name] = next((vars(c)[name] for c in type(layer).__mro__ if name in vars(c)), None)
            names += getattr(getattr(found[name], "__code__", None), "co_names", ())
    return [method for method in found.values() if method is not None]


def _inside(value: Any) -> list[Any]:
    """What a value holds: attributes, items, or what a function refers to. A layer also holds its forward pass."""
    if isinstance(value, PLAIN) or (isinstance(value, dict | list | tuple) and len(value) > MANY):
        return []
    if isinstance(value, nn.Module):
        return [*vars(value).values(), *_methods(value)]
    if isinstance(value, types.FunctionType):
        return _referred(value)
    if isinstance(value, types.MethodType | staticmethod | classmethod):
        return [getattr(value, "__self__", None), value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, dict):
        return list(dict.values(value))  # whatever its class does at an access
    if isinstance(value, list | tuple):
        return list(value)
    with contextlib.suppress(Exception):  # it has no attributes, or code of its own that may raise anything
        return list(vars(value).values())
    return []


def _referred(function: types.FunctionType) -> list[Any]:
    """Values of a function's closure, its defaults, and the global variables that it reads."""
    found = [function.__globals__.get(name) for name in _globals(function.__code__)]
    found += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it has no value yet
            found.append(cell.cell_contents)
    return found


@functools.lru_cache(maxsize=1024)
def _globals(code: types.CodeType) -> frozenset[str]:
    """Names of the global variables that a function, and the functions inside it, read."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return frozenset(own.union(*(_globals(inner) for inner in code.co_consts if isinstance(inner, types.CodeType))))
