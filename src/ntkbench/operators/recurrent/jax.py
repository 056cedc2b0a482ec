"""The Jacobian of recurrent networks in JAX: the loops over time, as scans."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ntkbench.operators.jax import JaxJacobian, device, network
from ntkbench.operators.recurrent.base import RecurrentJacobian
from ntkbench.operators.recurrent.cells import declared
from ntkbench.operators.recurrent.injections import Injections, ParameterLayout
from ntkbench.operators.recurrent.jax_trajectory import trajectory
from ntkbench.operators.recurrent.products import LinearisedRecurrence
from ntkbench.options import Target
from ntkbench.problem import Problem


def linearise(problem: Problem, weights: str, target: Target) -> JaxRecurrentJacobian:
    """See :func:`ntkbench.operators.linearise`.

    Raises:
        BadInput: theta has parameters outside the recurrence that the module declares, or shapes do not fit it.
    """
    assert problem.module is not None  # it declares its recurrence
    forward, parameters, x = network(problem, weights, target)
    parameters = dict(sorted(parameters.items()))  # the order in which JAX flattens dicts
    j = JaxRecurrentJacobian(forward, parameters, x, problem.output_shape, target.memory)
    held = {key: w.detach().cpu().numpy() for key, w in problem.module.named_parameters() if key not in parameters}
    held |= problem.fixed(weights)
    frozen = {key: jax.device_put(w.astype(target.dtype), device(target)) for key, w in held.items()}
    j.describe(declared(problem.module), frozen)
    return j


class JaxRecurrentJacobian(RecurrentJacobian, JaxJacobian):
    """J of a recurrent layer; see :class:`ntkbench.operators.recurrent.base.RecurrentJacobian`."""

    def call(self, product: Callable[..., Any], *arrays: Any) -> Any:
        return _compiled(product, self.layout, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(product: Callable[..., Any], layout: ParameterLayout, *arrays: Any) -> Any:
    return product(JaxLoops, layout, *arrays)


class JaxLoops:
    """See :class:`ntkbench.operators.recurrent.products.TimeLoops`."""

    trajectory = staticmethod(trajectory)

    @staticmethod
    def tangent(linear: LinearisedRecurrence, e: Injections) -> jax.Array:
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
    def adjoint(linear: LinearisedRecurrence, u: jax.Array) -> Injections:
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
