"""Recurrent networks in JAX: the loops over time, as scans."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ntkbench.operators.jax import JaxJacobian
from ntkbench.operators.recurrent.base import RecurrentJacobian
from ntkbench.operators.recurrent.cells import Cell, Functions
from ntkbench.operators.recurrent.injections import Injections, Layout
from ntkbench.operators.recurrent.products import Linear
from ntkbench.options import Target
from ntkbench.problem import Problem


def linearise(problem: Problem, weights: str, target: Target) -> JaxRecurrentJacobian:
    """See :func:`ntkbench.operators.linearise`.

    Raises:
        BadInput: theta is not of the recurrence that the problem's module declares.
    """
    forward, parameters, x = autodiff.network(problem, weights, target)
    parameters = dict(sorted(parameters.items()))  # the order that JAX gives all dicts, and so the other operator
    j = JaxRecurrentJacobian(forward, parameters, x, problem.output_shape, target.memory)
    held = {key: w.detach().cpu().numpy() for key, w in problem.module.named_parameters() if key not in parameters}
    held |= problem.fixed(weights)
    frozen = {key: jax.device_put(w.astype(target.dtype), autodiff.device(target)) for key, w in held.items()}
    j.describe(problem.module.recurrence, frozen)
    return j


def trajectory(kind: str, alpha: float | None, w: Mapping[str, Any], x: Any) -> tuple[Any, ...]:
    """All states after each step, ``[N, T, H]``, from parameters by role and ``x [N, T, I]``.

    By ``lax.scan``, so that compile time does not depend on T.
    """
    functions = Functions(jnp.tanh, jax.nn.sigmoid)
    cell = Cell(kind, alpha)

    def step(state: Any, from_input: Any) -> tuple[Any, Any]:
        from_state = cell.sent(state, functions) @ w["weight_hh"].T + w.get("bias_hh", 0)
        state = cell.step(state, from_input, from_state, functions)
        return state, state

    start = cell.start(jnp.zeros((x.shape[0], w["weight_hh"].shape[1]), x.dtype))
    from_inputs = x @ w["weight_ih"].T + w.get("bias_ih", 0)
    _, states = jax.lax.scan(step, start, jnp.swapaxes(from_inputs, 0, 1))
    return tuple(jnp.swapaxes(part, 0, 1) for part in states)


class JaxRecurrentJacobian(RecurrentJacobian, JaxJacobian):
    """J of a recurrent layer; see :class:`ntkbench.operators.recurrent.base.RecurrentJacobian`."""

    def call(self, product: Callable[..., Any], *arrays: Any) -> Any:
        return _compiled(product, self.layout, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(product: Callable[..., Any], layout: Layout, *arrays: Any) -> Any:
    return product(_Loops, layout, *arrays)


class _Loops:
    """See :class:`ntkbench.operators.recurrent.products.Loops`."""

    trajectory = staticmethod(trajectory)

    @staticmethod
    def tangent(linear: Linear, e: Injections) -> jax.Array:
        _, B, k, _ = e.gates.shape
        H = linear.weight_hh.shape[1]

        def step(carry: Any, now: Any) -> tuple[Any, jax.Array]:
            s, h = carry
            d, gates, side = now
            z = gates + _times(d.slope, h) @ linear.weight_hh.T
            by_gate = z.reshape(B, k, -1, H)
            s = (d.gain[:, None] * by_gate[:, :, : d.gain.shape[1]]).sum(2) + (
                0 if d.keep is None else d.keep[:, None] * s
            )
            if side is not None:
                s = s + d.side[:, None] * side
            h = s if d.emit is None else d.emit[:, None] * s + d.emit_gate[:, None] * by_gate[:, :, -1]
            return (s, h), h

        nothing = jnp.zeros((B, k, H), e.gates.dtype)
        _, changes = jax.lax.scan(step, (nothing, nothing), (linear.step, e.gates, e.side))
        return jnp.transpose(changes, (2, 1, 0, 3))

    @staticmethod
    def adjoint(linear: Linear, u: jax.Array) -> Injections:
        k, B, _, H = u.shape

        def step(carry: Any, now: Any) -> tuple[Any, Any]:
            from_later, kept = carry
            d, u = now
            on_h = u + from_later
            on_s = kept + _times(d.emit, on_h)
            gates = d.gain[:, None] * on_s[:, :, None]
            if d.emit_gate is not None:
                gates = jnp.concatenate([gates, (d.emit_gate[:, None] * on_h)[:, :, None]], axis=2)
            gates = gates.reshape(B, k, -1)
            side = None if d.side is None else d.side[:, None] * on_s
            kept = jnp.zeros_like(on_s) if d.keep is None else d.keep[:, None] * on_s
            return (_times(d.slope, gates @ linear.weight_hh), kept), (gates, side)

        nothing = jnp.zeros((B, k, H), u.dtype)
        by_step = (linear.step, jnp.transpose(u, (2, 1, 0, 3)))
        _, (gates, side) = jax.lax.scan(step, (nothing, nothing), by_step, reverse=True)
        return Injections(gates, side, None)


def _times(slope: jax.Array | None, block: jax.Array) -> jax.Array:
    return block if slope is None else slope[:, None] * block
