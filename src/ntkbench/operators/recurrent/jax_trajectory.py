"""The forward pass of a recurrent network in JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ntkbench.operators.recurrent.cells import Cell, Nonlinearities


def trajectory(kind: str, alpha: float | None, w: Mapping[str, Any], x: Any) -> tuple[Any, ...]:
    """States after each step; see :func:`ntkbench.operators.recurrent.torch_trajectory.trajectory`.

    The loop is a ``lax.scan``, so that compile time does not depend on T.
    """
    functions = Nonlinearities(jnp.tanh, jax.nn.sigmoid)
    cell = Cell(kind, alpha)

    def step(state: Any, from_input: Any) -> tuple[Any, Any]:
        from_state = cell.sent(state, functions) @ w["weight_hh"].T + w.get("bias_hh", 0)
        state = cell.step(state, from_input, from_state, functions)
        return state, state

    start = cell.start(jnp.zeros((x.shape[0], w["weight_hh"].shape[1]), x.dtype))
    from_inputs = x @ w["weight_ih"].T + w.get("bias_ih", 0)
    _, states = jax.lax.scan(step, start, jnp.swapaxes(from_inputs, 0, 1))
    return tuple(jnp.swapaxes(part, 0, 1) for part in states)
