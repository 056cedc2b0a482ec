"""Methods that compute NTK metrics, one file each.

To add a method, drop a file here with a subclass of :class:`ntkbench.methods.base.Method` (most easily of
``Deterministic`` or ``Stochastic``). It then appears in the grid, the asv suite, the contract tests, the table and the
figures. :func:`ntkbench.testing.check_method` checks the contract.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from types import ModuleType

from ntkbench import registry
from ntkbench.errors import BadInput, unknown
from ntkbench.methods.base import KINDS, Incremental, Method, Stochastic
from ntkbench.metrics import METRICS, OF_KERNEL
from ntkbench.options import BACKENDS
from ntkbench.registry import Fault, Source

__all__ = ["REGISTRY", "Method", "get", "names", "stochastic"]


def names() -> list[str]:
    """Names of all methods that work; imports all of them."""
    return REGISTRY.names()


def get(name: str) -> Method:
    """The method with a given name; imports no other.

    Raises:
        BadInput: there is none, or it is broken.
    """
    return REGISTRY.get(name)


def stochastic(name: str) -> Stochastic:
    """The stochastic method with a given name; imports no other.

    Raises:
        BadInput: there is none, it is broken, or it is not stochastic.
    """
    method = get(name)
    if not isinstance(method, Stochastic):
        raise BadInput(f"{name} is {method.kind} and draws no probes")
    return method


def _checked(source: Source, module: ModuleType, name: str) -> Method:
    own = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Method)]
    own = [c for c in dict.fromkeys(own) if c.__module__ == module.__name__]
    concrete = [c for c in own if not inspect.isabstract(c)]
    if len(concrete) > 1:
        said = " and ".join(c.__name__ for c in concrete)
        raise Fault(f"defines {len(concrete)} methods, {said}; a file holds one", source.line(concrete[1].__name__))
    if not concrete and own:
        missing = ", ".join(sorted(own[-1].__abstractmethods__))
        raise Fault(f"{own[-1].__name__} leaves abstract: {missing}", source.line(own[-1].__name__))
    if not concrete:
        raise Fault("defines no method: a subclass of ntkbench.methods.base.Method")
    (cls,) = concrete
    if not (cls.__doc__ or module.__doc__ or "").strip():
        raise Fault(f"{cls.__name__} has no docstring", source.line(cls.__name__))

    def fault(attribute: str, says: str) -> Fault:
        return Fault(says, source.line(cls.__name__, attribute))

    for attribute in ("title", "source", "kind"):
        value = getattr(cls, attribute, None)
        if not isinstance(value, str) or not value.strip():
            raise fault(attribute, f"{attribute} must be a string that is not empty; got {value!r}")
    if cls.kind not in KINDS:
        raise fault("kind", str(unknown("kind", cls.kind, KINDS)))
    if (cls.kind == "stochastic") != issubclass(cls, Stochastic):
        raise fault("kind", f"kind is {cls.kind!r}: 'stochastic' is for all subclasses of Stochastic and for no others")
    for attribute in ("estimate", "spend") if issubclass(cls, Incremental) else ():
        if getattr(cls, attribute) is not getattr(Incremental, attribute):
            says = f"overrides {attribute}, which is not called where metrics share probes: override estimates instead"
            raise fault(attribute, f"{cls.__name__} {says}")
    _check_words(cls, "backends", "backend", BACKENDS, fault)
    if cls.metrics != () or not cls.kernel_metrics:
        _check_words(cls, "metrics", "metric", METRICS, fault)
    if cls.kernel_metrics:
        _check_words(cls, "kernel_metrics", "metric", OF_KERNEL, fault)
    for attribute in ("needs_independent_samples", "needs_recurrence"):
        if not isinstance(getattr(cls, attribute), bool):
            raise fault(attribute, f"{attribute} must be True or False; got {getattr(cls, attribute)!r}")
    for attribute in ("fewest_probes", "default_passes") if issubclass(cls, Stochastic) else ():
        value = getattr(cls, attribute)
        if type(value) is not int or value < 1:
            raise fault(attribute, f"{attribute} must be a positive whole number; got {value!r}")
    return cls()


def _check_words(
    cls: type[Method], attribute: str, what: str, allowed: Collection[str], fault: Callable[[str, str], Fault]
) -> None:
    value = getattr(cls, attribute, None)
    if not isinstance(value, tuple | list) or not value or len(set(map(repr, value))) < len(value):
        raise fault(attribute, f"{attribute} must be a tuple of one or more different {what}s; got {value!r}")
    for word in value:
        if word not in allowed:
            raise fault(attribute, str(unknown(what, word, allowed)))


REGISTRY: registry.Registry[Method] = registry.Registry("method", _checked)
