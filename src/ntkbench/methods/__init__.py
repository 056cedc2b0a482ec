"""The ways of getting at Theta, one file each.

To add a method, drop a file here with a subclass of :class:`ntkbench.methods.base.Method` (most easily of
``Deterministic`` or ``Stochastic``). It is then in the grid, the asv suite, the contract tests, the table, the figures
and the README's list.
"""

from __future__ import annotations

import functools
import inspect

from ntkbench import registry
from ntkbench.errors import unknown
from ntkbench.methods.base import Method

__all__ = ["Method", "get", "names"]


@functools.cache
def _all() -> dict[str, Method]:
    found = {}
    for name, module in registry.modules(__name__).items():
        own = [
            c
            for _, c in inspect.getmembers(module, inspect.isclass)
            if issubclass(c, Method) and c.__module__ == module.__name__ and not inspect.isabstract(c)
        ]
        if len(own) != 1:
            raise TypeError(f"{module.__file__} must define exactly one Method, found {[c.__name__ for c in own]}")
        found[name] = own[0]()
    return found


def names() -> list[str]:
    """Names of all methods."""
    return list(_all())


def get(name: str) -> Method:
    """The method of a name.

    Raises:
        BadInput: there is none.
    """
    if name not in _all():
        raise unknown("method", name, _all())
    return _all()[name]
