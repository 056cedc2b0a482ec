"""Run neural-tangents 0.6.5, which is archived and imports unmodified only up to jax 0.4.25, on current jax.

:func:`load` imports it and repairs what newer versions of jax broke:

- names that neural-tangents looks up during its import are added to jax's modules for the time of the import only;
- names that it looks up at run time are put into its own module, on top of jax's.

jax itself is the same before and after. All repairs use jax's public API, and the implementations of the NTK need every
one of them. Other parts of neural-tangents (``predict``, infinite-width kernels, the bridge to TensorFlow) are not
supported.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ntkbench import errors


@functools.cache
def load() -> types.ModuleType:
    """The repaired module ``neural_tangents``. The first call imports it, and jax; later calls return the same module.

    Raises:
        Unavailable: neural-tangents or JAX is not installed.
    """
    if not is_installed():
        raise errors.missing("neural_tangents", "this method", errors.NEURAL_TANGENTS)
    errors.need("jax", "this method", errors.JAX)
    with _core_names(), _zeros_like_primitive(), _module(_jax_util()), _module(_no_tensorflow()):
        neural_tangents = importlib.import_module("neural_tangents")
    empirical = neural_tangents._src.empirical
    _dynamic_shapes(empirical)
    _names_of_ad(empirical)
    _transposes(empirical)
    _operations(empirical)
    return neural_tangents


def is_installed() -> bool:
    """Whether neural-tangents is installed."""
    return importlib.util.find_spec("neural_tangents") is not None


def _core_names() -> contextlib.AbstractContextManager[None]:
    """The classes of jaxprs, for the import: absent from ``jax.core`` since jax 0.6.0.

    ``jax.extend.core`` has the same classes, so neural-tangents' type checks still hold.
    """
    import jax.core
    import jax.extend.core

    names = ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var")
    return _lent(jax.core, {name: getattr(jax.extend.core, name) for name in names})


def _zeros_like_primitive() -> contextlib.AbstractContextManager[None]:
    """``ad.zeros_like_p``, for the import: absent since jax 0.9.0.

    neural-tangents registers a rule for it. No network contains it, so an unused primitive suffices.
    """
    import jax.extend.core
    import jax.interpreters.ad

    return _lent(jax.interpreters.ad, {"zeros_like_p": jax.extend.core.Primitive("zeros_like")})


def _jax_util() -> types.ModuleType:
    """``jax.util``, for the import: absent since jax 0.8.0. It holds strict and eager versions of map and zip."""
    util = types.ModuleType("jax.util")

    def safe_zip(*rows: Sequence[Any]) -> list[tuple[Any, ...]]:
        return list(zip(*rows, strict=True))

    def safe_map(function: Callable[..., Any], *rows: Sequence[Any]) -> list[Any]:
        return [function(*row) for row in safe_zip(*rows)]

    vars(util).update(safe_map=safe_map, safe_zip=safe_zip)
    return util


def _no_tensorflow() -> types.ModuleType:
    """An empty ``neural_tangents.experimental``, for the import: the real one is for TensorFlow, which it imports."""
    return types.ModuleType("neural_tangents.experimental")


def _dynamic_shapes(empirical: types.ModuleType) -> None:
    """``core.DShapedArray``: absent since jax 0.8.2. No array has this type, so an unused type suffices."""
    vars(empirical)["core"] = _Overlay(empirical.core, DShapedArray=type("DShapedArray", (), {}))


def _names_of_ad(empirical: types.ModuleType) -> None:
    """The names that neural-tangents looks up in ``jax.interpreters.ad`` when it traverses a linearised network.

    ``source_info_util``, absent since jax 0.4.26, is now in ``jax.extend``. Only ``jax_enable_checks`` is
    read of ``config``, also absent since then. It enables a check by functions that jax no longer has, so it is off.
    For ``linearize`` see :func:`_linearize`.
    """
    import jax.extend.source_info_util

    vars(empirical)["ad"] = _Overlay(
        empirical.ad,
        source_info_util=jax.extend.source_info_util,
        config=types.SimpleNamespace(jax_enable_checks=False),
        linearize=_linearize,
    )


def _linearize(network: Any, *weights: Any, has_aux: bool) -> tuple[list[Any], list[_Unknown], Any, list[Any]]:
    """The former ``ad.linearize``: outputs, a mark for each output, the linear map as a jaxpr, and its constants.

    In jax 0.10 its marks are booleans, and since jax 0.10.2 its arguments differ. Tracing the result of the public
    ``jax.linearize`` gives the same, except that outputs which do not depend on the weights are not marked and have
    explicit zeros.
    """
    import jax

    outputs, jvp = jax.linearize(network.call_wrapped, *weights)
    linear = jax.make_jaxpr(_splits_as_slices(jax.make_jaxpr(jvp)(*weights)))(*weights)
    return outputs, [_Unknown()] * len(outputs), linear.jaxpr, linear.consts


class _Unknown:
    """Marks an output as one that depends on the weights."""

    def is_known(self) -> bool:
        return False


def _splits_as_slices(linear: Any) -> Callable[..., list[Any]]:
    """The function of a jaxpr, with each ``split`` replaced by slices for its used parts.

    Since jax 0.4.38 ``jnp.split`` is a primitive with several outputs, which neural-tangents refuses. Before, it was a
    set of slices.
    """
    import jax
    from jax.extend.core import Literal

    readers = [equation.invars for equation in linear.jaxpr.eqns] + [linear.jaxpr.outvars]
    used = {v for variables in readers for v in variables if not isinstance(v, Literal)}

    def evaluate(*inputs: Any) -> list[Any]:
        values = dict(zip([*linear.jaxpr.constvars, *linear.jaxpr.invars], [*linear.consts, *inputs], strict=True))

        def read(variables: Sequence[Any]) -> list[Any]:
            return [v.val if isinstance(v, Literal) else values[v] for v in variables]

        for equation in linear.jaxpr.eqns:
            if equation.primitive is jax.lax.split_p:
                (array,) = read(equation.invars)
                values.update(_slices(equation, array, used))
                continue
            made = equation.primitive.bind(*read(equation.invars), **equation.params)
            made = made if equation.primitive.multiple_results else [made]
            values.update(zip(equation.outvars, made, strict=True))
        return read(linear.jaxpr.outvars)

    return evaluate


def _slices(split: Any, array: Any, used: set[Any]) -> dict[Any, Any]:
    """Values of the used parts of a split, by variable."""
    import jax

    axis, parts, start = split.params["axis"], {}, 0
    for variable, size in zip(split.outvars, map(int, split.params["sizes"]), strict=True):
        if variable in used:
            parts[variable] = jax.lax.slice_in_dim(array, start, start + size, axis=axis)
        start += size
    return parts


def _transposes(empirical: types.ModuleType) -> None:
    """Transpose single equations by the public ``jax.linear_transpose``.

    neural-tangents looks the rule up in jax's tables, by a mark on the primitive (``map_primitive``). The mark and one
    of the tables (``ad.reducing_transposes``) are gone since jax 0.10.0, and since jax 0.8.1 the rules of more and more
    primitives, slices first, are in a private table and are called differently. ``jax.linear_transpose`` of a single
    equation applies the same rules, wherever they are.
    """
    vars(empirical)["_eqn_vjp_fn"] = _equation_vjp


def _equation_vjp(equation: Any, cotangent: Any, *inputs: Any) -> tuple[Any, ...]:
    """Cotangents of an equation's inputs; ``None`` for inputs that are constants of the linear map."""
    import jax
    from jax.interpreters import ad

    if equation is None:  # the identity, where an output is a weight itself
        return (cotangent,)
    linear = [i for i, value in enumerate(inputs) if ad.is_undefined_primal(value)]
    cotangents: list[Any] = [None] * len(inputs)
    if isinstance(cotangent, ad.Zero):
        return tuple(cotangents)

    def apply(*variables: Any) -> Any:
        values = list(inputs)
        for i, variable in zip(linear, variables, strict=True):
            values[i] = variable
        made = equation.primitive.bind(*values, **equation.params)
        return made[0] if equation.primitive.multiple_results else made  # several outputs were refused before

    for i, made in zip(linear, jax.linear_transpose(apply, *(inputs[i].aval for i in linear))(cotangent), strict=True):
        cotangents[i] = made
    return tuple(cotangents)


def _operations(empirical: types.ModuleType) -> None:
    """The criterion of ``AUTO``: the cost analysis of a compiled program is a dict; neural-tangents expects a list of
    one."""
    import jax

    def operations(function: Callable[..., Any], optimize: bool, *arguments: Any, **keywords: Any) -> float:
        lowered = jax.jit(function).lower(*arguments, **keywords)
        analysis: Any = (lowered.compile() if optimize else lowered).cost_analysis()
        return float(analysis["flops"])

    vars(empirical)["_get_flops"] = operations


@contextlib.contextmanager
def _lent(module: types.ModuleType, names: dict[str, Any]) -> Iterator[None]:
    """Add missing names to a module, and remove them at the end."""
    lacking = [name for name in names if name not in vars(module)]
    for name in lacking:
        setattr(module, name, names[name])
    try:
        yield
    finally:
        for name in lacking:
            delattr(module, name)


@contextlib.contextmanager
def _module(stand_in: types.ModuleType) -> Iterator[None]:
    """Make a stand-in importable under its name, and remove it at the end."""
    before = sys.modules.get(stand_in.__name__)
    sys.modules[stand_in.__name__] = stand_in
    try:
        yield
    finally:
        del sys.modules[stand_in.__name__]
        if before is not None:
            sys.modules[stand_in.__name__] = before


class _Overlay:
    """A module with some names replaced or added."""

    def __init__(self, module: types.ModuleType, **names: Any) -> None:
        self._module = module
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
