"""Cells of recurrent networks: one step of each kind and its explicit derivatives, shared by all backends.

Apart from one matrix product, every cell acts elementwise at time t:

    z_t = W_hh phi(h_(t-1)) + W_ih x_t + b          the gates before their nonlinearities
    s_t = F(s_(t-1), z_t)                           s = h; for the LSTM s = c
    h_t = s_t                                       for the LSTM h_t = sigmoid(z_t^o) tanh(s_t)

Its linearisation therefore consists of diagonal matrices and W_hh. In a GRU the reset gate multiplies W_hh h + b_hh
only, so that the input's part of the third gate is a gate of its own, which W_hh does not reach: the *side* gate.

A new kind of cell is a method of :class:`Cell`, a function in :data:`LINEARISED` and an entry in :data:`GATES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import array_api_compat

from ntkbench.operators.base import Array

GATES = {"rnn": 1, "gru": 3, "lstm": 4, "ctrnn": 1}
"""Kinds of cells, and the number of gates of each: its weights have that many blocks of H rows."""

ROLES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "readout_weight", "readout_bias")


@dataclass(frozen=True)
class Recurrence:
    """The roles of a module's parameters in one recurrent layer with zero initial state and an optional linear readout.

    A module with such an attribute ``recurrence`` promises to map ``x [N, T, I]`` to the states ``[N, T, H]`` of that
    layer (h for an LSTM, not c), or to their linear readout ``[N, T, O]``. Its Jacobian is then computed from explicit
    derivatives, see :mod:`ntkbench.operators.recurrent`.

    Attributes:
        kind: a key of :data:`GATES`, with the conventions of ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM``; ``ctrnn`` is
            h <- h + alpha (-h + W_hh tanh(h) + W_ih x + b).
        names: parameter names by role; absent roles are left out.
        alpha: step of a ``ctrnn``, ``None`` for the others.
    """

    kind: str
    names: Mapping[str, str]
    alpha: float | None = None

    @staticmethod
    def of_layer(kind: str, prefix: str) -> Recurrence:
        """The recurrence of a one-layer ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM`` that a module holds as ``prefix``."""
        return Recurrence(kind, {role: f"{prefix}.{role}_l0" for role in ROLES[:4]})


def declared(module: Any) -> Recurrence:
    """The recurrence that a module declares, by its attribute ``recurrence``."""
    return cast(Recurrence, module.recurrence)


class Nonlinearities(NamedTuple):
    """The elementwise functions of the cells, under the names that ``torch`` gives them."""

    tanh: Callable[[Any], Any]
    sigmoid: Callable[[Any], Any]


class Cell:
    """One time step of a recurrence, shared by all backends.

    A state is ``(h,)``, for an LSTM ``(h, c)``, each ``[N, H]``.
    """

    def __init__(self, kind: str, alpha: float | None) -> None:
        self._alpha = alpha
        self._kind = kind
        self.step = getattr(self, f"_{kind}")
        """``(state, W_ih x + b_ih, W_hh sent + b_hh, functions) -> state``."""

    def start(self, zeros: Any) -> tuple[Any, ...]:
        """The state before the first step."""
        return (zeros, zeros) if self._kind == "lstm" else (zeros,)

    def sent(self, state: tuple[Any, ...], functions: Any) -> Any:
        """phi(h), the vector that ``weight_hh`` multiplies."""
        return functions.tanh(state[0]) if self._kind == "ctrnn" else state[0]

    def _rnn(self, state: Any, z_x: Any, z_h: Any, functions: Any) -> tuple[Any]:
        return (functions.tanh(z_x + z_h),)

    def _ctrnn(self, state: Any, z_x: Any, z_h: Any, functions: Any) -> tuple[Any]:
        (h,) = state
        return (h + self._alpha * (z_x + z_h - h),)

    def _gru(self, state: Any, z_x: Any, z_h: Any, functions: Any) -> tuple[Any]:
        (h,) = state
        (r_x, u_x, n_x), (r_h, u_h, n_h) = _gates(z_x, 3), _gates(z_h, 3)
        update = functions.sigmoid(u_x + u_h)
        new = functions.tanh(n_x + functions.sigmoid(r_x + r_h) * n_h)
        return (new + update * (h - new),)

    def _lstm(self, state: Any, z_x: Any, z_h: Any, functions: Any) -> tuple[Any, Any]:
        enter, forget, new, out = _gates(z_x + z_h, 4)
        c = functions.sigmoid(forget) * state[1] + functions.sigmoid(enter) * functions.tanh(new)
        return functions.sigmoid(out) * functions.tanh(c), c


class StepDerivatives(NamedTuple):
    """Derivatives of each step of a trajectory: T time steps, B trials, H units; ``None`` for an absent term.

    Attributes:
        gain: ds_t / dz_t, ``[T, B, G, H]`` of the gates that s depends on (for the LSTM the first three of four).
        side: ds_t / d(side gate), ``[T, B, H]``.
        keep: ds_t / ds_(t-1) at fixed gates, ``[T, B, H]``.
        emit: dh_t / ds_t, ``[T, B, H]``; 1 if ``None``.
        emit_gate: dh_t / d(the last gate), ``[T, B, H]``.
        slope: phi'(h_(t-1)), ``[T, B, H]``; 1 if ``None``.
        sent: phi(h_(t-1)), the vector that W_hh multiplies, ``[T, B, H]``.
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
) -> StepDerivatives:
    """The derivatives of each step along a known trajectory.

    Args:
        kind: kind of the cell.
        alpha: step of a ``ctrnn``.
        states: h, and for an LSTM c, after each step, ``[T, B, H]``.
        z_x: W_ih x + b_ih, ``[T, B, gH]``.
        weight_hh: ``[gH, H]``.
        bias_hh: ``[gH]``, or 0.
    """
    xp = array_api_compat.array_namespace(z_x)
    before = tuple(xp.concat([xp.zeros_like(s[:1]), s[:-1]]) for s in states)
    return LINEARISED[kind](xp, alpha, states, before, z_x, lambda sent: sent @ weight_hh.T + bias_hh)


Product = Callable[[Array], Array]


def _rnn(xp: Any, alpha: None, states: Any, before: Any, z_x: Array, product: Product) -> StepDerivatives:
    return StepDerivatives(1 - states[0][:, :, None] ** 2, None, None, None, None, None, before[0])


def _ctrnn(xp: Any, alpha: float, states: Any, before: Any, z_x: Array, product: Product) -> StepDerivatives:
    sent = xp.tanh(before[0])
    ones = xp.ones_like(sent)
    return StepDerivatives(alpha * ones[:, :, None], None, (1 - alpha) * ones, None, None, 1 - sent**2, sent)


def _gru(xp: Any, alpha: None, states: Any, before: Any, z_x: Array, product: Product) -> StepDerivatives:
    (r_x, u_x, n_x), (r_h, u_h, n_h) = _gates(z_x, 3), _gates(product(before[0]), 3)
    reset, update = _sigmoid(xp, r_x + r_h), _sigmoid(xp, u_x + u_h)
    new = xp.tanh(n_x + reset * n_h)
    side = (1 - update) * (1 - new**2)
    gain = (side * n_h * reset * (1 - reset), (before[0] - new) * update * (1 - update), side * reset)
    return StepDerivatives(xp.stack(gain, axis=2), side, update, None, None, None, before[0])


def _lstm(xp: Any, alpha: None, states: Any, before: Any, z_x: Array, product: Product) -> StepDerivatives:
    enter, forget, new, out = _gates(z_x + product(before[0]), 4)
    enter, forget, new, out = _sigmoid(xp, enter), _sigmoid(xp, forget), xp.tanh(new), _sigmoid(xp, out)
    gain = (new * enter * (1 - enter), before[1] * forget * (1 - forget), enter * (1 - new**2))
    bounded = xp.tanh(states[1])
    emit, emit_gate = out * (1 - bounded**2), bounded * out * (1 - out)
    return StepDerivatives(xp.stack(gain, axis=2), None, forget, emit, emit_gate, None, before[0])


LINEARISED: dict[str, Callable[..., StepDerivatives]] = {"rnn": _rnn, "ctrnn": _ctrnn, "gru": _gru, "lstm": _lstm}


def _gates(z: Array, count: int) -> list[Array]:
    size = z.shape[-1] // count
    return [z[..., i * size : (i + 1) * size] for i in range(count)]


def _sigmoid(xp: Any, z: Array) -> Array:
    return 1 / (1 + xp.exp(-z))
