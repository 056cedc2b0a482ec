"""The Jacobian operator in JAX: jitted products, probes batched with ``vmap``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from ntkbench.errors import BadInput, Unavailable
from ntkbench.operators import arrays
from ntkbench.operators.base import JacobianOperator, Rng
from ntkbench.operators.memory import free_on_host
from ntkbench.options import Target
from ntkbench.problem import Problem

ParameterArrays = dict[str, jax.Array]
NetworkFunction = Callable[[ParameterArrays, jax.Array], jax.Array]


def linearise(problem: Problem, weights: str, target: Target) -> JaxJacobian:
    """See :func:`ntkbench.operators.linearise`."""
    forward, parameters, x = network(problem, weights, target)
    j = JaxJacobian(forward, parameters, x, problem.output_shape, target.memory)
    j.has_plain = problem.module is None
    return j


def network(problem: Problem, weights: str, target: Target) -> tuple[NetworkFunction, ParameterArrays, jax.Array]:
    """The problem's network as a pure function, its parameters by name and its inputs, on the target's device.

    Raises:
        BadInput: no such weights, or the problem has no JAX network.
        Unavailable: the device is not present.
    """
    forward = problem.jax_forward
    if forward is None:
        raise BadInput(f"{problem.name} has no network in JAX; allowed backends for it: torch")
    if target.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        jax.config.update("jax_enable_x64", True)  # without it JAX converts float64 arrays to float32

    def put(array: np.ndarray) -> jax.Array:
        array = array.astype(target.dtype) if np.issubdtype(array.dtype, np.floating) else array
        return jax.device_put(array, device(target))

    fixed = {key: put(w) for key, w in problem.fixed(weights).items()}
    whole = (lambda weights, x: forward({**fixed, **weights}, x)) if fixed else forward
    return whole, {key: put(w) for key, w in problem.weights(weights).items()}, put(problem.x)


def plain_gradient(problem: Problem, weights: str, target: Target, names: Sequence[str]) -> PlainGradient:
    """v ``[n]``, an array of any library, -> J^T v ``[P]`` by :func:`plain_pullback`, which is repeated for each v."""
    return PlainGradient(problem, weights, target, names)


class PlainGradient:
    """See :class:`ntkbench.operators.certificate.PlainGradient`; it takes the whole batch, whatever the memory."""

    note = ""

    def __init__(self, problem: Problem, weights: str, target: Target, names: Sequence[str]) -> None:
        self._of = problem, weights, target, names

    def __call__(self, v: Any, memory: int | None = None) -> jax.Array:
        return plain_pullback(*self._of)(v)


def plain_pullback(
    problem: Problem, weights: str, target: Target, names: Sequence[str]
) -> Callable[[arrays.Array], jax.Array]:
    """v ``[n]`` -> J^T v ``[P]`` by ``jax.vjp`` of the unmodified network: over the whole batch, without jit and vmap.

    Cost: one forward pass, and a backward pass for each v.

    Args:
        names: names of the parameters, in the order of their entries.
    """
    return _plain_pullback(*network(problem, weights, target), names)


def _plain_pullback(
    forward: NetworkFunction, parameters: ParameterArrays, x: jax.Array, names: Sequence[str]
) -> Callable[[arrays.Array], jax.Array]:
    outputs, pull = jax.vjp(lambda p: forward(p, x), parameters)

    def gradient(v: arrays.Array) -> jax.Array:
        (found,) = pull(jnp.asarray(v, outputs.dtype).reshape(outputs.shape))
        return jnp.concatenate([found[name].reshape(-1) for name in names])

    return gradient


def device(target: Target) -> jax.Device:
    """The device of :func:`place`. TF32 is turned off on a GPU, for the whole process unless it is off in this thread.

    Raises:
        Unavailable: ``cuda`` was requested and JAX sees none.
    """
    where, setting = place(target), "jax_default_matmul_precision"
    if target.device != "cpu" and jax.default_backend() == "gpu" and jax.config.values[setting] != "highest":
        jax.config.update(setting, "highest")
    return where


def place(target: Target) -> jax.Device:
    """The device of a target on this machine.

    Raises:
        Unavailable: ``cuda`` was requested and JAX sees none.
    """
    if target.device == "cpu":
        return jax.devices("cpu")[0]
    if target.device == "cuda" and jax.default_backend() != "gpu":
        raise Unavailable("device='cuda' was requested, but JAX sees no CUDA device; allowed here: auto, cpu")
    return jax.devices()[0]


def device_name(target: Target) -> str:
    """See :func:`ntkbench.operators.device_name`."""
    return place(target).device_kind


def device_memory(target: Target) -> int | None:
    """See :func:`ntkbench.operators.device_memory`."""
    statistics = place(target).memory_stats()
    return statistics["peak_bytes_in_use"] if statistics else None


def reset_device_memory(target: Target) -> None:
    """See :func:`ntkbench.operators.reset_device_memory`."""


def free_memory(target: Target) -> int:
    """Bytes that an array on the device may take."""
    statistics = place(target).memory_stats()
    return statistics["bytes_limit"] - statistics["bytes_in_use"] if statistics else free_on_host()


REVERSE, FORWARD, TWICE, PLAIN = "reverse mode", "forward mode", "two reverse passes", "plain jax.vjp"
WAYS = {
    "vjp": (REVERSE, PLAIN),
    "row": (REVERSE, PLAIN),
    "sample_vjp": (REVERSE,),
    "jvp": (FORWARD, TWICE),
    "sample_jvp": (FORWARD, TWICE),
}
"""Methods for each kind of product, the fastest first. All but plain ``jax.vjp`` are compiled and batch probes."""
SAID = {"vjp": "VJP", "row": "row", "jvp": "JVP", "sample_jvp": "per-sample JVP"}


class JaxJacobian(JacobianOperator):
    """J of a pure function at given parameters; see :class:`ntkbench.operators.base.JacobianOperator`.

    Args:
        forward: ``(parameters, x) -> [N, ...outputs]``.
        parameters: trainable parameters by name.
        x: inputs ``[N, ...]``.
        shape: shape of the outputs, ``(N, ...outputs)``.
        memory: bytes that one block of probes may use.

    Attributes:
        has_plain: whether products may be computed by plain ``jax.vjp``. They may not if the problem has a torch
            module, as they are then compared with torch.
    """

    COMPUTED: tuple[str, ...] = ("_pullback", "_plain_pullback")
    has_plain: bool = False

    def __init__(
        self, forward: NetworkFunction, parameters: ParameterArrays, x: jax.Array, shape: tuple[int, ...], memory: int
    ) -> None:
        self.N, self.O = shape[0], int(np.prod(shape[1:]))
        self.P = sum(w.size for w in parameters.values())
        self.memory = memory
        self.itemsize = next(iter(parameters.values())).dtype.itemsize
        self._forward, self._parameters, self._x = forward, parameters, x
        self._programs = _programs(forward)
        self._passed_over: dict[str, str] = {}  # why the first method is not used; shared with copies

    @functools.cached_property
    def _pullback(self) -> Any:
        """The VJP of the forward pass, which runs once for all probes: a pytree of residuals."""
        return self._programs.linearised(self._parameters, self._x)

    @functools.cached_property
    def _plain_pullback(self) -> Callable[[jax.Array], jax.Array]:
        """The same VJP without jit and vmap, one cotangent ``[n]`` at a time."""
        return _plain_pullback(self._forward, self._parameters, self._x, self.names)

    def _next_way(self, kind: str, reason: str) -> bool:
        """See :data:`WAYS`."""
        ways = [way for way in WAYS[kind] if way != PLAIN or self.has_plain]
        if kind in self._passed_over or len(ways) == 1:
            return False
        self._passed_over[kind] = reason
        return True

    def _is_plain(self, kind: str) -> bool:
        return self._way(kind) == PLAIN

    def passes_per_jvp(self, by_sample: bool = False) -> int:
        kind = "sample_jvp" if by_sample else "jvp"
        self._settle(kind)
        return 1 if self._way(kind) == FORWARD else 2

    def _way(self, kind: str) -> str:
        return WAYS[kind][kind in self._passed_over]

    @property
    def _remarks(self) -> tuple[str, ...]:
        return tuple(
            f"each {SAID[kind]} is computed by {self._way(kind)}: {why}" for kind, why in self._passed_over.items()
        )

    def _vjp(self, u: jax.Array) -> jax.Array:
        if self._is_plain("vjp"):
            return jnp.stack([self._plain_pullback(each) for each in u])
        return self._programs.pulled_back(self._pullback, u.reshape(-1, self.N, self.O))

    def _jvp(self, w: jax.Array) -> jax.Array:
        twice = self._way("jvp") == TWICE
        self._sample_passes += len(w) * self.N * twice
        return self._programs.pushed_forward(twice, self._parameters, self._x, w)

    def _row(self, i: int) -> jax.Array:
        if self._is_plain("row"):
            return self._plain_pullback(self.basis(i, i + 1)[0])
        return self._programs.one_row(self._pullback, i, self.N, self.O, next(iter(self._parameters.values())).dtype)

    def _sample_vjp(self, samples: slice, v: jax.Array) -> jax.Array:
        return self._programs.pulled_back_by_sample(_flat, self._parameters, self._x[samples], v)

    def _sample_jvp(self, samples: slice, w: jax.Array) -> jax.Array:
        twice = self._way("sample_jvp") == TWICE
        self._sample_passes += w.shape[0] * w.shape[1] * twice
        return self._programs.pushed_forward_by_sample(twice, self._parameters, self._x[samples], w)

    def _sample_squares(self, samples: slice, v: jax.Array) -> jax.Array:
        return self._programs.pulled_back_by_sample(_squares, self._parameters, self._x[samples], v)

    def _eye(self, size: int, start: int, stop: int) -> jax.Array:
        dtype = next(iter(self._parameters.values())).dtype
        return jax.nn.one_hot(jnp.arange(start, stop), size, dtype=dtype)

    @property
    def names(self) -> list[str]:
        return sorted(self._parameters)  # the order in which JAX flattens dicts

    def rng(self, seed: int) -> JaxRng:
        like = next(iter(self._parameters.values()))
        return JaxRng(seed, like.dtype, like.device)

    def bytes_per_probe(self) -> int:
        return self._bytes_per_probe

    @functools.cached_property
    def _bytes_per_probe(self) -> int:
        # Values and cotangents of everything that the traced forward pass writes, and three gradients, as in torch.
        written = _bytes_written(jax.make_jaxpr(self._forward)(self._parameters, self._x).jaxpr)
        return 2 * written + 3 * self.P * self.itemsize


class JaxRng(Rng):
    """Probes from a JAX key that is split before every draw."""

    def __init__(self, seed: int, dtype: Any, device: jax.Device) -> None:
        key = jax.random.key(seed % 2**32)
        if seed >= 2**32:  # without 64-bit numbers, a key takes the low 32 bits only
            key = jax.random.fold_in(key, seed >> 32)
        self._key = jax.device_put(key, device)
        self._dtype = dtype

    def _next(self) -> jax.Array:
        self._key, key = jax.random.split(self._key)
        return key

    def normal(self, k: int, dim: int) -> jax.Array:
        return jax.random.normal(self._next(), (k, dim), self._dtype)

    def sign(self, k: int, dim: int) -> jax.Array:
        return jax.random.rademacher(self._next(), (k, dim), self._dtype)


class _Programs:
    """The products of one network, compiled for each shape."""

    def __init__(self, forward: NetworkFunction) -> None:
        self.linearised = jax.jit(functools.partial(_linearised, forward))
        self.pulled_back = jax.jit(functools.partial(_pulled_back))
        self.one_row = jax.jit(functools.partial(_one_row), static_argnums=(2, 3, 4))
        self.pushed_forward = jax.jit(functools.partial(_pushed_forward, forward), static_argnums=0)
        self.pushed_forward_by_sample = jax.jit(functools.partial(_pushed_forward_by_sample, forward), static_argnums=0)
        self.pulled_back_by_sample = jax.jit(functools.partial(_pulled_back_by_sample, forward), static_argnums=0)


@functools.lru_cache(maxsize=16)
def _programs(forward: NetworkFunction) -> _Programs:
    """Programs of the most recent networks. JAX would keep programs compiled from functions of this module forever."""
    return _Programs(forward)


def _flat(blocks: ParameterArrays) -> jax.Array:
    """Gradients by parameter, each ``[k, ...]``, concatenated: ``[k, P]``."""
    return jnp.concatenate([block.reshape(block.shape[0], -1) for block in blocks.values()], axis=1)


def _squares(blocks: ParameterArrays) -> jax.Array:
    """Squared norms of gradients by parameter, each ``[k, ...]``: ``[k]``."""
    return functools.reduce(jnp.add, ((block.reshape(block.shape[0], -1) ** 2).sum(1) for block in blocks.values()))


def _outputs(forward: NetworkFunction, parameters: ParameterArrays, x: jax.Array) -> jax.Array:
    return forward(parameters, x).reshape(x.shape[0], -1)


def _linearised(forward: NetworkFunction, parameters: ParameterArrays, x: jax.Array) -> Any:
    return jax.vjp(lambda p: _outputs(forward, p, x), parameters)[1]


def _pulled_back(pullback: Any, u: jax.Array) -> jax.Array:
    return _flat(jax.vmap(pullback)(u)[0])


def _one_row(pullback: Any, i: int, samples: int, outputs: int, dtype: Any) -> jax.Array:
    unit = jnp.zeros(samples * outputs, dtype).at[i].set(1)
    return jnp.concatenate([g.reshape(-1) for g in pullback(unit.reshape(samples, outputs))[0].values()])


def _pushed_forward(
    forward: NetworkFunction, twice: bool, parameters: ParameterArrays, x: jax.Array, w: jax.Array
) -> jax.Array:
    bounds = np.cumsum([p.size for p in parameters.values()])[:-1]

    def push(tangent: jax.Array) -> jax.Array:
        parts = jnp.split(tangent, bounds)
        tangents = {key: part.reshape(parameters[key].shape) for key, part in zip(parameters, parts, strict=True)}
        of = lambda p: _outputs(forward, p, x).reshape(-1)  # noqa: E731
        if not twice:
            return jax.jvp(of, (parameters,), (tangents,))[1]
        outputs, pullback = jax.vjp(of, parameters)  # J w is the derivative of v -> <J^T v, w>, which is linear in v
        return jax.vjp(lambda v: pullback(v)[0], jnp.zeros_like(outputs))[1](tangents)[0]

    return jax.vmap(push)(w)


def _pushed_forward_by_sample(
    forward: NetworkFunction, twice: bool, parameters: ParameterArrays, x: jax.Array, w: jax.Array
) -> jax.Array:
    one = lambda x, w: _pushed_forward(forward, twice, parameters, x[None], w)  # noqa: E731
    return jax.vmap(one, in_axes=(0, 1), out_axes=1)(x, w)


def _pulled_back_by_sample(
    forward: NetworkFunction,
    reduce: Callable[[ParameterArrays], jax.Array],
    parameters: ParameterArrays,
    x: jax.Array,
    v: jax.Array,
) -> jax.Array:
    """``reduce`` of each sample's gradients (by parameter, ``[k, ...]`` each), ``[k, samples, ...]``."""

    def one(x: jax.Array, v: jax.Array) -> jax.Array:
        pullback = jax.vjp(lambda p: _outputs(forward, p, x[None])[0], parameters)[1]
        return reduce(jax.vmap(pullback)(v)[0])

    return jax.vmap(one, in_axes=(0, 1), out_axes=1)(x, v)


def _bytes_written(jaxpr: Any) -> int:
    """Bytes of the outputs of all equations, those of loop bodies once per iteration, and those of all branches."""
    total = 0
    for equation in jaxpr.eqns:
        if inner := list(jaxprs_in_params(equation.params)):
            total += equation.params.get("length", 1) * sum(map(_bytes_written, inner))
        else:
            total += sum(v.aval.size * v.aval.dtype.itemsize for v in equation.outvars)
    return total
