"""The derivatives of one step of a recurrence, written by hand, once for all backends.

Every cell of :mod:`ntkbench.problems._recurrent` is, at time t and for each unit by itself but for one matrix product,

    z_t = W_hh phi(h_(t-1)) + (what the inputs and biases give)        the gates before their functions
    s_t = F(s_(t-1), z_t)                                               s = h, but for the LSTM, where it is c
    h_t = s_t, for the LSTM sigmoid(z_t^o) tanh(s_t)

so that its linearisation is a handful of diagonals. GRU: the reset gate multiplies W_hh h + b_hh alone, so that what
the inputs send to the third gate enters as a fourth, which W_hh does not reach; it is called the *side* gate here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_compat

from ntkbench.jacobian.base import Array


class Step(NamedTuple):
    """Derivatives along a trajectory; T time steps, B trials, H units; ``None`` stands for what a cell does not have.

    Attributes:
        gain: ds_t / dz_t, ``[T, B, G, H]`` of the gates that s depends on (for the LSTM the first three of four).
        side: ds_t / d(side gate), ``[T, B, H]``.
        keep: ds_t / ds_(t-1) at fixed gates, ``[T, B, H]``.
        emit: dh_t / ds_t, ``[T, B, H]``; 1 if ``None``.
        emit_gate: dh_t / d(the last gate), ``[T, B, H]``.
        slope: phi'(h_(t-1)), ``[T, B, H]``; 1 if ``None``.
        sent: phi(h_(t-1)) itself, what W_hh is multiplied with.
    """

    gain: Array
    side: Array | None
    keep: Array | None
    emit: Array | None
    emit_gate: Array | None
    slope: Array | None
    sent: Array


def linearised(
    kind: str, alpha: float | None, states: tuple[Array, ...], z_x: Array, weight_hh: Array, bias_hh: Array | float
) -> Step:
    """The derivatives along a trajectory that was run already.

    Args:
        kind: of the cell.
        alpha: of a ``ctrnn``.
        states: h, and for an LSTM c, after each step, ``[T, B, H]``.
        z_x: W_ih x + b_ih, ``[T, B, gH]``.
        weight_hh: ``[gH, H]``.
        bias_hh: ``[gH]``, or 0.
    """
    xp = array_api_compat.array_namespace(z_x)
    before = tuple(xp.concat([xp.zeros_like(s[:1]), s[:-1]]) for s in states)
    return CELLS[kind](xp, alpha, states, before, z_x, lambda sent: sent @ weight_hh.T + bias_hh)


Product = Callable[[Array], Array]


def _rnn(xp: Any, alpha: None, states: Any, before: Any, z_x: Array, product: Product) -> Step:
    return Step(1 - states[0][:, :, None] ** 2, None, None, None, None, None, before[0])


def _ctrnn(xp: Any, alpha: float, states: Any, before: Any, z_x: Array, product: Product) -> Step:
    sent = xp.tanh(before[0])
    ones = xp.ones_like(sent)
    return Step(alpha * ones[:, :, None], None, (1 - alpha) * ones, None, None, 1 - sent**2, sent)


def _gru(xp: Any, alpha: None, states: Any, before: Any, z_x: Array, product: Product) -> Step:
    (r_x, u_x, n_x), (r_h, u_h, n_h) = _gates(z_x, 3), _gates(product(before[0]), 3)
    reset, update = _sigmoid(xp, r_x + r_h), _sigmoid(xp, u_x + u_h)
    new = xp.tanh(n_x + reset * n_h)
    side = (1 - update) * (1 - new**2)
    gain = (side * n_h * reset * (1 - reset), (before[0] - new) * update * (1 - update), side * reset)
    return Step(xp.stack(gain, axis=2), side, update, None, None, None, before[0])


def _lstm(xp: Any, alpha: None, states: Any, before: Any, z_x: Array, product: Product) -> Step:
    enter, forget, new, out = _gates(z_x + product(before[0]), 4)
    enter, forget, new, out = _sigmoid(xp, enter), _sigmoid(xp, forget), xp.tanh(new), _sigmoid(xp, out)
    gain = (new * enter * (1 - enter), before[1] * forget * (1 - forget), enter * (1 - new**2))
    bounded = xp.tanh(states[1])
    emit, emit_gate = out * (1 - bounded**2), bounded * out * (1 - out)
    return Step(xp.stack(gain, axis=2), None, forget, emit, emit_gate, None, before[0])


CELLS: dict[str, Callable[..., Step]] = {"rnn": _rnn, "ctrnn": _ctrnn, "gru": _gru, "lstm": _lstm}


def _gates(z: Array, count: int) -> list[Array]:
    size = z.shape[-1] // count
    return [z[..., i * size : (i + 1) * size] for i in range(count)]


def _sigmoid(xp: Any, z: Array) -> Array:
    return 1 / (1 + xp.exp(-z))
