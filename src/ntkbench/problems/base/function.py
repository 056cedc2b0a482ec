"""A user's JAX function of a pytree of parameters as a problem; the properties that a problem needs are checked.

JAX is imported inside functions only.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ntkbench import errors
from ntkbench.ambient import own_jax_settings
from ntkbench.errors import BadInput, NotFinite, OverMemory, summary, unknown
from ntkbench.operators.certificate import PLAIN, perturbed, random_weights, ratio, tolerance
from ntkbench.options import DTYPES
from ntkbench.problem import Problem
from ntkbench.problems.base.module import ALONE, INTERACTION, SECOND, TOGETHER, _spread

Arrays = dict[str, np.ndarray]

WRAP = "wrap it in a function that does"

ROUNDING = tolerance(float(np.finfo("float32").eps))
"""Relative difference that exceeds rounding in float32."""


def from_function(
    f: Callable[[Any, Any], Any],
    x: Any,
    params: Any,
    params_f: Any = None,
    *,
    name: str | None = None,
    dtype: str | None = None,
) -> Problem:
    """Wrap a JAX function, its inputs and its parameters as a :class:`ntkbench.problem.Problem`.

    theta is every leaf of ``params`` that is an array of real numbers. Other leaves (arrays of integers or booleans,
    functions, strings, Python integers) are part of the function; ``f`` must close over any other constants, such as
    the running statistics among the variables of a Flax module. Values are copied. The problem has no torch network:
    its targets are ``Target("jax", ...)``.

    Whether samples interact is measured as in :func:`ntkbench.problems.base.module.from_module`.

    Use it to call methods and operators yourself; :class:`ntkbench.Kernel` calls it for you.

    Cost: three forward passes and one backward pass; two passes over 64 samples, and two over 8 of them alone; in
    float32, two more over 64 samples; a trace of a forward and a backward pass, and the compilation of a forward pass
    and of the passes over samples. The same again for ``params_f``, and two passes over 64 samples for another
    ``dtype``.

    >>> import jax.numpy as jnp, ntkbench
    >>> problem = ntkbench.from_function(lambda w, x: x @ w, jnp.ones((4, 3)), jnp.ones((3, 2)))
    >>> problem.N, problem.O, problem.P
    (4, 2, 6)

    Args:
        f: ``(params, x) -> [N, ...outputs]``, pure and traceable by ``jax.jit``.
        x: inputs, an array ``[N, ...]`` or a pytree of them; real ones are converted to ``dtype``.
        params: the parameters theta_0, a pytree.
        params_f: the parameters theta_f, for alignment. Arrays that are not in theta may have other values too.
        name: name of the problem; by default that of the function.
        dtype: precision of parameters and inputs, ``"float32"`` or ``"float64"``; by default that of the parameters.

    Returns:
        The problem, whose ``theta_0`` and ``x`` are copies in NumPy.

    Raises:
        BadInput: the parameters have no real leaves, or differ from ``params_f`` in more than values; the function is
            random, keeps a state, donates its arguments, computes something else in ``dtype`` than in the precision of
            its arguments, or cannot be traced or differentiated; or its outputs are not N rows of finite real numbers
            that depend on the parameters.
        Unavailable: JAX is not installed.
    """
    errors.need("jax", "a function with params", errors.JAX)
    if not callable(f):
        raise BadInput(f"f must be a function (params, x) -> [N, ...outputs], got {type(f).__name__}")
    tree, theta, fixed_0 = _parameters(params, "params")
    dtype = _dtype(theta, dtype)
    inputs, leaves = _inputs(x, "x")
    packed, theta_0 = inputs.packed(leaves, dtype), _cast(theta, dtype)
    forward = FlatFunction(f, tree, inputs, next(iter(theta_0)))
    with own_jax_settings(dtype):
        forward, shape = _checked(forward, theta_0, fixed_0, packed, "f")
        _check_depends(forward, theta_0, fixed_0, packed)
    _check_same_in(_own_precision(theta, leaves) or dtype, dtype, forward, theta, fixed_0, leaves)
    interact = _interact(forward, theta_0, fixed_0, packed, shape)
    theta_f: Arrays | None = None
    fixed_f: Arrays = {}
    if params_f is not None:
        tree_f, theta_f, fixed_f = _parameters(params_f, "params_f")
        theta_f = _cast(theta_f, dtype)
        _check_same(tree, tree_f, theta_0 | fixed_0, theta_f | fixed_f)
        with own_jax_settings(dtype):
            forward, _ = _checked(forward, theta_f, fixed_f, packed, "f with params_f")
        interact = interact or _interact(forward, theta_f, fixed_f, packed, shape)
    own_name = getattr(f, "__name__", type(f).__name__)
    return Problem(
        name=name or (own_name if own_name.isidentifier() else "function"),
        module=None,
        x=packed,
        theta_0=theta_0,
        theta_f=theta_f,
        jax_forward=forward,
        samples_interact=interact,
        fixed_0=fixed_0,
        fixed_f=fixed_f,
        _shape=[shape],
    )


def with_columns(problem: Problem, x2: Any) -> tuple[Problem, np.ndarray]:
    """The problem, and other inputs in the form of its ``x``, for a kernel between the two.

    Args:
        problem: from :func:`from_function`.
        x2: inputs with the structure, shapes and kinds of numbers of the problem's own; any number of samples.

    Raises:
        BadInput: they do not match; says where.
    """
    forward = problem.jax_forward
    assert isinstance(forward, FlatFunction)
    own, (given, leaves) = forward.inputs, _inputs(x2, SECOND)
    if given.structure != own.structure:
        raise BadInput(f"{SECOND} must be a pytree like the first, {own.structure}; got {given.structure}")
    for name, shape, dtype, leaf in zip(own.names, own.shapes, own.dtypes, leaves.values(), strict=True):
        like = np.empty(0, dtype or "float64")
        if leaf.shape[1:] != shape or _sort(leaf) != _sort(like):
            wanted = f"{name!r} [N, {', '.join(map(str, shape))}] of {_sort(like)}"
            raise BadInput(
                f"{SECOND} must hold samples like the first, {wanted}; got shape {leaf.shape} of {leaf.dtype}"
            )
    return problem, own.packed(leaves, problem.theta_0[next(iter(problem.theta_0))].dtype.name)


def at(problem: Problem, params: Any) -> Problem:
    """The same function and inputs at other parameters; theta_f is dropped.

    The function is traced again. If it has changed since the problem was made, such as by a variable outside of it, it
    is also checked again. Whether samples interact is measured again in this case, and if integers or booleans among
    the parameters differ.

    Args:
        problem: from :func:`from_function`.
        params: a pytree like the problem's, with other values of its arrays.

    Raises:
        BadInput: it differs in more than values, or has values that are not finite; says where. Or the function cannot
            be differentiated there.
    """
    forward = problem.jax_forward
    assert isinstance(forward, FlatFunction)
    tree, theta, fixed = _parameters(params, "params")
    dtype = str(next(iter(problem.theta_0.values())).dtype)
    theta = _cast(theta, dtype)
    _check_same(forward.params, tree, {**problem.theta_0, **problem.fixed_0}, theta | fixed)
    shape, interact = problem.output_shape, problem.samples_interact
    with own_jax_settings(dtype):
        try:
            traced = forward.traced(_on_device(theta), _on_device(fixed), problem.x)
        except Exception as error:
            raise BadInput(f"f cannot be differentiated at these parameters: {summary(error)}") from error
        if changed := traced != forward:
            traced, shape = _checked(forward, theta, fixed, problem.x, "f")
    if changed or any(not np.array_equal(fixed[key], problem.fixed_0[key]) for key in fixed):  # as a flag for training
        interact = _interact(traced, theta, fixed, problem.x, shape)
    return replace(
        problem,
        jax_forward=traced,
        _shape=[shape],
        samples_interact=interact,
        theta_0={key: theta[key] for key in problem.theta_0},
        fixed_0={**problem.fixed_0, **fixed, **{key: w for key, w in theta.items() if key not in problem.theta_0}},
        theta_f=None,
        fixed_f={},
        other=None,
    )


def takes_array(problem: Problem, shape: tuple[int, ...]) -> bool:
    """Whether the parameters of a problem from :func:`from_function` are one array, of this shape."""
    import jax

    forward = problem.jax_forward
    assert isinstance(forward, FlatFunction)
    (first, *_) = problem.theta_0.values()
    return forward.params.structure == jax.tree.structure(0) and first.shape == shape


def check_collections(problem: Problem, params: Any) -> None:
    """Refuse the variables of a Flax module if some of them, such as running statistics, are not trained.

    Args:
        problem: what :func:`from_function` made of them.
        params: the variables.

    Raises:
        BadInput: there are arrays of real numbers under ``"params"`` and under other keys.
    """
    keys = list(map(str, params)) if isinstance(params, Mapping) else []
    held = [key for key in keys if any(name == key or name.startswith(f"{key}.") for name in problem.theta_0)]
    if "params" in held and len(held) > 1:
        raise BadInput(
            f"params holds the collections {', '.join(held)}: give parameters='params' for the trained parameters "
            "alone, or parameters='*' for all of them"
        )


@dataclass(frozen=True)
class Tree:
    """A pytree without its arrays.

    Attributes:
        structure: JAX's description of it.
        names: readable, distinct names of its leaves.
        static: leaves that are not arrays of numbers, with their names.
    """

    structure: Any
    names: tuple[str, ...]
    static: tuple[tuple[str, Any], ...] = ()

    def filled(self, arrays: Mapping[str, Any]) -> Any:
        """The pytree with its arrays filled in by name."""
        import jax

        leaves = {**arrays, **dict(self.static)}
        return jax.tree.unflatten(self.structure, [leaves[name] for name in self.names])


@dataclass(frozen=True)
class Inputs:
    """A pytree of inputs without its values, which are packed into one array ``[N, ...]``.

    A single leaf is that array itself. Several leaves are concatenated to ``[N, (size of a sample)]``, integers and
    booleans as real numbers.

    Attributes:
        structure: JAX's description of the pytree.
        names: names of its leaves.
        shapes: shape of one sample of each leaf.
        dtypes: dtype of each leaf of integers or booleans; ``None`` for leaves of real numbers.
    """

    structure: Any
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str | None, ...]

    def packed(self, leaves: Mapping[str, np.ndarray], dtype: str) -> np.ndarray:
        """The leaves as one array; real numbers are converted to ``dtype``.

        Raises:
            BadInput: an integer is not representable in ``dtype``.
        """
        if len(leaves) == 1:
            (leaf,) = _cast(leaves, dtype).values()
            return leaf
        largest = 2 ** (np.finfo(dtype).nmant + 1)
        for name, leaf in leaves.items():
            if not _is_real(leaf) and not -largest <= int(leaf.min()) <= int(leaf.max()) <= largest:
                raise BadInput(
                    f"{name!r} has integers beyond {largest}, which {dtype} cannot hold: choose dtype='float64', or "
                    "close over them in f"
                )
        return np.concatenate([leaf.reshape(len(leaf), -1).astype(dtype) for leaf in leaves.values()], axis=1)

    def unpacked(self, x: Any) -> Any:
        """The pytree of a packed JAX array."""
        import jax

        if len(self.names) == 1:
            return jax.tree.unflatten(self.structure, [x])
        leaves, start = [], 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            size = math.prod(shape)
            part = x[:, start : start + size].reshape(len(x), *shape)
            leaves.append(part if dtype is None else part.astype(jax.dtypes.canonicalize_dtype(dtype)))
            start += size
        return jax.tree.unflatten(self.structure, leaves)


@dataclass(frozen=True)
class Trace:
    """What a function and its gradient compute, for inputs of some shapes.

    Attributes:
        digest: hash of their operations, and of the values of all arrays that they close over.
        devices: devices that some of these arrays are bound to, by ``jax.device_put`` or a sharding.
    """

    digest: str
    devices: frozenset[Any]


class FlatFunction:
    """A function of pytrees as a function of named arrays and one array of inputs, ``(weights, x) -> [N, ...outputs]``.

    Outputs have the precision of the parameters. Instances with the same function, structure and trace are equal, so
    they share what JAX has compiled.

    Args:
        f: the function of pytrees.
        params: parameters without their arrays.
        inputs: inputs without their values.
        parameter: name of one of the parameters.
        trace: what the function computes, if it is known.

    Attributes:
        devices: devices that arrays which the function closes over are bound to, by ``jax.device_put`` or a sharding.
    """

    def __init__(
        self, f: Callable[[Any, Any], Any], params: Tree, inputs: Inputs, parameter: str, trace: Trace | None = None
    ) -> None:
        self.inputs, self.params = inputs, params
        self._f, self._parameter = f, parameter
        self.devices = frozenset() if trace is None else trace.devices
        self._key: Any = (f, params, inputs, trace)
        try:
            hash(self._key)
        except TypeError:
            self._key = object()

    def traced(self, theta: Mapping[str, Any], fixed: Mapping[str, Any], x: Any) -> FlatFunction:
        """The same function as an instance that is equal only to those that compute the same now.

        A function may have changed since JAX compiled it, for example through a variable that it closes over.
        """
        return FlatFunction(self._f, self.params, self.inputs, self._parameter, _trace(self, theta, fixed, x))

    def __eq__(self, other: object) -> bool:
        try:
            return isinstance(other, FlatFunction) and bool(self._key == other._key)
        except Exception:  # a user's own comparison, as of dataclasses with arrays
            return False

    def __hash__(self) -> int:
        return hash(self._key)

    def __call__(self, weights: Mapping[str, Any], x: Any) -> Any:
        return self.plainly(weights, x).astype(weights[self._parameter].dtype)

    def plainly(self, weights: Mapping[str, Any], x: Any) -> Any:
        """The output of the function itself, not converted."""
        return self._f(self.params.filled(weights), self.inputs.unpacked(x))


def _named_leaves(tree: Any, role: str, alone: str) -> tuple[Any, dict[str, Any]]:
    """A pytree's structure, and its leaves by their paths, such as ``layers.0.w``; one without a path is ``alone``."""
    import jax

    try:
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    except Exception as error:  # unsortable keys, or a container's own code, raise anything
        raise BadInput(f"{role} is not a pytree that JAX can flatten: {summary(error)}") from error
    names = [jax.tree_util.keystr(path, simple=True, separator=".") or alone for path, _ in leaves]
    if len(set(names)) < len(names):  # a key with a dot in it
        names = [f"{i}: {name}" for i, name in enumerate(names)]
    return structure, dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def _parameters(params: Any, role: str) -> tuple[Tree, Arrays, Arrays]:
    """Parameters without their arrays, the arrays to differentiate by, and the other arrays.

    Raises:
        BadInput: it is not clear whether, or how, to differentiate by a leaf.
    """
    structure, leaves = _named_leaves(params, role, "params")
    theta: Arrays = {}
    fixed: Arrays = {}
    static: list[tuple[str, Any]] = []
    for name, leaf in leaves.items():
        if isinstance(leaf, float | complex) and not isinstance(leaf, np.generic):
            raise BadInput(
                f"{role} has {name!r}, a Python {type(leaf).__name__}: make it an array if it is a parameter, and "
                "close over it in f if it is not (equinox.partition)"
            )
        if not _is_array(leaf, role, name) or _is_key(leaf):
            static.append((name, leaf))
            continue
        array = _on_host(leaf, role, name)
        if _is_real(array):
            if not np.isfinite(array.astype("float64")).all():
                raise BadInput(f"{role} has nan or infinite values: {name!r}")
            theta[name] = array
        elif array.dtype.kind in "biu":
            fixed[name] = array
        else:
            raise BadInput(
                f"{role} has {name!r}, an array of {array.dtype}; allowed are real numbers, integers and booleans: "
                "pass real and imaginary parts, or close over it in f"
            )
    if not any(w.size for w in theta.values()):
        raise BadInput(f"{role} has no arrays of real numbers, so there is nothing to differentiate by")
    return Tree(structure, tuple(leaves), tuple(static)), theta, fixed


def _inputs(x: Any, role: str) -> tuple[Inputs, Arrays]:
    """Inputs without their values, and the values by name.

    Raises:
        BadInput: they are not arrays with samples along their first axis.
    """
    structure, leaves = _named_leaves(x, role, role)
    arrays: Arrays = {}
    for name, leaf in leaves.items():
        if not _is_array(leaf, role, name) or _is_key(leaf):
            raise BadInput(f"{role} must be an array [N, ...] or a pytree of them; {name!r} is {_kind(leaf)}")
        arrays[name] = array = _on_host(leaf, role, name)
        if array.ndim == 0 or array.size == 0:
            raise BadInput(
                f"{role} must hold at least one sample, [N, ...] with N > 0; {name!r} has shape {array.shape}"
            )
        if not _is_real(array) and array.dtype.kind not in "biu":
            raise BadInput(
                f"{role} must be real or integer; {name!r} is {array.dtype}: pass its real and imaginary parts"
            )
    if not arrays:
        raise BadInput(f"{role} must be an array [N, ...] or a pytree of them; got one without leaves")
    if len(counts := {name: len(array) for name, array in arrays.items()}) > 1 and len(set(counts.values())) > 1:
        said = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
        raise BadInput(f"all arrays of {role} must have the same number of samples along their first axis: {said}")
    dtypes = tuple(None if _is_real(array) else array.dtype.name for array in arrays.values())
    return Inputs(structure, tuple(arrays), tuple(array.shape[1:] for array in arrays.values()), dtypes), arrays


def _kind(leaf: Any) -> str:
    return "an array of keys" if _is_key(leaf) else f"of type {type(leaf).__name__}"


def _is_array(leaf: Any, role: str, name: str) -> bool:
    """Whether a leaf is a NumPy or JAX array.

    Raises:
        BadInput: it is a PyTorch tensor.
    """
    import jax

    if any(base.__module__.partition(".")[0] == "torch" for base in type(leaf).__mro__):
        raise BadInput(f"{role} must consist of JAX or NumPy arrays; {name!r} is a torch {type(leaf).__name__}")
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of random keys."""
    import jax

    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)


def _is_real(array: np.ndarray) -> bool:
    """Whether an array has real numbers in any floating-point format, including JAX's own."""
    import jax

    return bool(jax.dtypes.issubdtype(array.dtype, np.floating))


def _sort(array: np.ndarray) -> str:
    return "real" if _is_real(array) else "booleans" if array.dtype == bool else "integers"


def _on_host(leaf: Any, role: str, name: str) -> np.ndarray:
    try:
        return np.array(leaf)
    except Exception as error:  # inside a transformation, deleted, or on other hosts
        raise BadInput(f"{role} has no values to copy at {name!r}, as inside jax.jit: {summary(error)}") from error


def _cast(arrays: Mapping[str, np.ndarray], dtype: str) -> Arrays:
    return {key: array.astype(dtype) if _is_real(array) else array for key, array in arrays.items()}


def _dtype(theta: Arrays, dtype: str | None) -> str:
    """The precision to compute in."""
    if dtype is not None:
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        return dtype
    found = sorted({w.dtype.name for w in theta.values() if w.size})
    if len(found) > 1 or found[0] not in DTYPES:
        raise BadInput(
            f"parameters are {', '.join(found)}; choose the precision to compute in, dtype='float32' or 'float64'"
        )
    return found[0]


def _check_same(tree: Tree, tree_f: Tree, arrays: Arrays, arrays_f: Arrays) -> None:
    """Refuse parameters that differ in more than the values of arrays."""
    if tree.structure != tree_f.structure:
        raise BadInput(f"params and params_f must have the same structure; got {tree.structure} and {tree_f.structure}")
    shapes, shapes_f = (
        {name: (w.shape, _is_real(w)) for name, w in each.items()} | dict.fromkeys(of, ())
        for each, of in ((arrays, dict(tree.static)), (arrays_f, dict(tree_f.static)))
    )
    for name in tree.names:
        if shapes[name] != shapes_f[name]:
            raise BadInput(
                f"params and params_f must have the same arrays; {name!r} is {_said(arrays.get(name))} and "
                f"{_said(arrays_f.get(name))}"
            )
    for (name, leaf), (_, leaf_f) in zip(tree.static, tree_f.static, strict=True):
        if leaf is not leaf_f and not bool(np.all(leaf == leaf_f)):
            raise BadInput(f"params and params_f must differ only in the values of arrays; {name!r} differs")


def _said(array: np.ndarray | None) -> str:
    return "no array" if array is None else f"{array.shape} of {array.dtype}"


def _on_device(*arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    import jax.numpy as jnp

    return {key: jnp.array(array) for each in arrays for key, array in each.items()}


def _checked(
    forward: FlatFunction, theta: Arrays, fixed: Arrays, x: np.ndarray, role: str
) -> tuple[FlatFunction, tuple[int, ...]]:
    """The function, checked and traced, and the shape of its outputs.

    Raises:
        BadInput: it is not a function of its arguments alone, or its outputs are not rows of finite real numbers.
        OverMemory: it does not fit in memory with these inputs.
    """
    import jax
    import jax.numpy as jnp

    held, constants, inputs = _on_device(theta), _on_device(fixed), jnp.array(x)
    weights = {**held, **constants}
    try:
        outputs = forward.plainly(weights, inputs)
    except Exception as error:  # a user's function may raise anything
        kind = OverMemory if _is_out_of_memory(error) else BadInput
        raise kind(f"{role} cannot be called as f(params, x): {summary(error)}") from error
    if any(array.is_deleted() for array in (inputs, *weights.values())):
        raise BadInput(f"{role} donates its arguments, which are used again: leave out donate_argnums of jax.jit")
    if not isinstance(outputs, jax.Array | np.ndarray):
        raise BadInput(f"{role} must return one array [N, ...outputs], got {type(outputs).__name__}: {WRAP}")
    if outputs.ndim == 0 or outputs.shape[0] != len(x) or outputs.size == 0:
        raise BadInput(
            f"{role} must return [N, ...outputs] with a row for each of the N = {len(x)} samples, "
            f"got shape {outputs.shape}"
        )
    if not jax.dtypes.issubdtype(outputs.dtype, np.floating):
        raise BadInput(
            f"{role} must return real numbers, got {outputs.dtype}: {WRAP}, such as the real and imaginary parts"
        )
    if not np.isfinite(np.asarray(outputs, "float64")).all():
        raise BadInput(f"{role} returns nan or infinite outputs for these inputs")
    if not _close(forward.plainly(weights, inputs), outputs, ROUNDING, axis=0):
        raise BadInput(f"{role} is random or keeps a state: two calls on the same arguments differ")
    try:
        forward = forward.traced(held, constants, inputs)
    except Exception as error:  # loops of unknown length, or operations without a derivative, unless f is not traceable
        said = summary(error)
        try:
            jax.eval_shape(forward.plainly, weights, inputs)
        except Exception as failed:
            said = summary(failed)
            raise BadInput(f"{role} cannot be compiled by jax.jit, as with branches on values: {said}") from failed
        raise BadInput(f"{role} cannot be differentiated: {said}") from error
    if not _close(_compiled(forward)(weights, inputs), outputs, PLAIN):  # products are certified more closely
        raise BadInput(f"{role} gives other values under jax.jit: is it random, or does it round intermediate values?")
    return forward, tuple(outputs.shape)


def _trace(forward: FlatFunction, theta: Mapping[str, Any], fixed: Mapping[str, Any], x: Any) -> Trace:
    """What a function and its gradient compute; they are traced, and nothing is computed.

    Raises:
        Exception: whatever JAX or the function raises.
    """
    import jax

    def both(theta: Any, fixed: Any, x: Any) -> Any:
        outputs, pull = jax.vjp(lambda theta: forward({**fixed, **theta}, x), theta)
        return outputs, pull(jax.numpy.ones_like(outputs))

    made = jax.make_jaxpr(both)(theta, fixed, x)
    digest, devices = hashlib.sha256(made.jaxpr.pretty_print(use_color=False).encode()), set()
    for value in _held(made):
        if getattr(value, "committed", False):
            devices |= value.devices()
        array = np.asarray(jax.random.key_data(value) if _is_key(value) else value)
        digest.update(f"{array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return Trace(digest.hexdigest(), frozenset(devices))


def _held(jaxpr: Any) -> Iterator[Any]:
    """Arrays and numbers that a trace holds, in loops, branches and calls as well."""
    import jax
    from jax.extend.core import Literal

    yield from getattr(jaxpr, "consts", ())
    for equation in jaxpr.eqns:
        yield from (variable.val for variable in equation.invars if isinstance(variable, Literal))
        is_jaxpr = lambda value: hasattr(value, "eqns")  # noqa: E731
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from _held(value)
            elif isinstance(value, jax.Array | np.ndarray):
                yield value


@functools.lru_cache(maxsize=16)
def _compiled(forward: FlatFunction) -> Callable[[Any, Any], Any]:
    """The function, compiled for each shape, and cached like products with its Jacobian."""
    import jax

    return jax.jit(forward)


@functools.lru_cache(maxsize=16)
def _gradient(forward: FlatFunction) -> Callable[[Any, Any, Any, Any], Any]:
    """(fixed arrays, parameters, x, cotangents of the outputs) -> the gradient ``[P]``, compiled for each shape."""
    import jax

    def gradient(fixed: Any, theta: Any, x: Any, v: Any) -> Any:
        (g,) = jax.vjp(lambda theta: forward({**fixed, **theta}, x).reshape(-1), theta)[1](v.reshape(-1))
        return jax.numpy.concatenate([part.reshape(-1) for part in g.values()])

    return jax.jit(gradient)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(said in str(error) for said in ("out of memory", "RESOURCE_EXHAUSTED"))


def _close(a: Any, b: Any, within: float, axis: int | None = None) -> bool:
    """Whether the differences of two arrays are within a share of the largest entry (along an axis)."""
    a, b = (np.asarray(each, "float64") for each in (a, b))
    return a.shape == b.shape and bool((abs(a - b) <= within * abs(b).max(axis)).all())


def _check_depends(forward: FlatFunction, theta: Arrays, fixed: Arrays, x: np.ndarray) -> None:
    """Refuse a function whose gradient is zero both at the given parameters and at perturbed ones."""
    rng = np.random.default_rng(0)
    for at in (theta, {key: perturbed(w, rng) for key, w in theta.items()}):
        try:
            found = _plain_gradient(forward, at, fixed, x)
        except Exception as error:  # an operation may have no derivative at these values
            raise BadInput(f"f cannot be differentiated: {summary(error)}") from error
        if found.any():
            return
    raise BadInput(
        "no output of f depends on an array of real numbers in params: is there a stop_gradient around them?"
    )


def _plain_gradient(forward: FlatFunction, theta: Arrays, fixed: Arrays, x: np.ndarray) -> np.ndarray:
    """The gradient ``[P]`` of the outputs' sum with random weights, by plain ``jax.vjp``, in float64."""
    import jax
    import jax.numpy as jnp

    constants, inputs = _on_device(fixed), jnp.asarray(x)
    outputs, pull = jax.vjp(lambda theta: forward({**constants, **theta}, inputs), _on_device(theta))
    v = random_weights(outputs.size, np.empty(0)).reshape(outputs.shape)
    (gradients,) = pull(jnp.asarray(v, outputs.dtype))
    return np.concatenate([np.asarray(g, "float64").reshape(-1) for g in gradients.values()])


def _difference(own: str, other: str, forward: FlatFunction, theta: Arrays, fixed: Arrays, x: np.ndarray) -> float:
    """The relative difference of a function's gradients in two precisions; 0 if that of the first is not finite.

    A function may be another one in another precision: ``jax.random`` then draws other numbers from the same key.
    """
    if own == other:
        return 0.0
    gradients = []
    for dtype in (own, other):
        with own_jax_settings(dtype):
            arrays = _cast(theta, dtype), _cast(fixed, dtype), _cast({"x": x}, dtype)["x"]
            gradients.append(_plain_gradient(forward, *arrays))
    expected, found = gradients
    if not np.isfinite(expected).all():
        return 0.0
    return ratio(float(np.linalg.norm(found - expected)), float(np.linalg.norm(expected)))


def _own_precision(theta: Arrays, leaves: Arrays) -> str | None:
    """The precision to which JAX promotes parameters and inputs: the widest; ``None`` if it is neither of ``DTYPES``.

    Inputs count only if the user enables 64 bits: JAX rounds NumPy's default of float64 otherwise.
    """
    import jax

    wide = jax.eval_shape(lambda x: x, np.zeros(1)).dtype == "float64"
    held = [*theta.values(), *(leaves.values() if wide else ())]
    return max({array.dtype.name for array in held if array.size} & set(DTYPES), default=None)


def _check_same_in(own: str, dtype: str, forward: FlatFunction, theta: Arrays, fixed: Arrays, leaves: Arrays) -> None:
    """Refuse a function that computes something else in ``dtype`` than in the precision of its arguments.

    Args:
        own: that precision.
        theta, fixed, leaves: parameters, constants and inputs as given, not yet rounded to ``dtype``.

    Raises:
        BadInput: its gradients differ by more than rounding, which may be large in a bfloat16 network.
    """
    if own == dtype:
        return
    try:
        x, _ = (forward.inputs.packed(leaves, each) for each in ("float64", own))  # integers must fit in both
        off = _difference(own, dtype, forward, theta, fixed, x[_spread(len(x), TOGETHER)])
    except Exception:  # f may run only in ``dtype``, or accept no other number of samples
        return
    if off > PLAIN:
        raise BadInput(
            f"f computes something else in {dtype} than in {own}, the precision of its arguments: gradients differ by "
            f"{off:.1e} of their norm (are random numbers drawn in it, or is float32 too inaccurate for it?); give "
            f"params and x in {dtype} if that is meant"
        )


def _interact(forward: FlatFunction, theta: Arrays, fixed: Arrays, x: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether some sample's gradients in the batch differ from those of the sample alone, if these are finite.

    Raises:
        BadInput: the function cannot be differentiated.
    """
    if len(x) == 1:
        return False
    few, own = x[_spread(len(x), TOGETHER)], next(iter(theta.values())).dtype.name
    failed: Exception | None = None
    finite = True
    for inputs, dtype in ((few, "float64"), (few, own), (x, "float64"), (x, own)):
        try:
            if not _difference(own, dtype, forward, theta, fixed, inputs) <= ROUNDING:
                continue
            with own_jax_settings(dtype):
                arrays = _cast(theta, dtype), _cast(fixed, dtype), _cast({"x": inputs}, dtype)["x"]
                return _gradients_differ(forward, *arrays, int(np.prod(shape[1:])))
        except Exception as error:  # f may accept no other number of samples, or no other precision
            failed, finite = error, finite and not isinstance(error, NotFinite)
    if not finite:
        return False
    assert failed is not None  # the last precision is that of the function itself
    raise BadInput(f"f cannot be differentiated: {summary(failed)}") from failed


def _gradients_differ(forward: FlatFunction, theta: Arrays, fixed: Arrays, x: np.ndarray, outputs: int) -> bool:
    gradient = functools.partial(_gradient(forward), _on_device(fixed))
    dtype = next(iter(theta.values())).dtype
    rng = np.random.default_rng(0)
    chosen = _spread(len(x), ALONE)
    v = np.zeros((len(x), outputs), dtype)
    v[chosen] = random_weights(v[chosen].size, v).reshape(v[chosen].shape)
    within = max(INTERACTION, tolerance(float(np.finfo(dtype).eps)))
    for at in (theta, {key: perturbed(w, rng) for key, w in theta.items()}):
        together = np.asarray(gradient(at, x, v))
        if not np.isfinite(together).all():
            if at is not theta:
                break  # the function is not defined at such weights
            raise NotFinite("gradients are nan or infinite")
        try:
            alone = sum(np.asarray(gradient(at, x[i : i + 1], v[i : i + 1])) for i in chosen)
        except Exception:  # f does not accept a single sample
            return True
        if not np.linalg.norm(together - alone) <= within * np.linalg.norm(together):
            return True
    return False
