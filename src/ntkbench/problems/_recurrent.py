"""Recurrent networks of plain operations, in torch and in JAX, and what the structure-aware Jacobian knows of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ntkbench.errors import BadInput, unknown

GATES = {"rnn": 1, "gru": 3, "lstm": 4, "ctrnn": 1}
"""Kinds of cells, and how many blocks of H rows their weights have."""

ROLES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "readout_weight", "readout_bias")


@dataclass(frozen=True)
class Recurrence:
    """Which parameters of a module are what in one recurrent layer that starts at zero, and perhaps a linear readout.

    A module that has one of these as its attribute ``recurrence`` promises that ``x [N, T, I]`` gives the states
    ``[N, T, H]`` of that layer (for an LSTM h, not c), or their linear readout ``[N, T, O]``; its Jacobian is then
    written out by hand, see :mod:`ntkbench.recurrent`.

    Attributes:
        kind: a key of :data:`GATES`, with the conventions of ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM``; ``ctrnn`` is
            h <- h + alpha (-h + W_hh tanh(h) + W_ih x + b).
        names: the parameter that plays each role, by role; roles that none plays are left out.
        alpha: step of the ``ctrnn``, ``None`` for the others.
    """

    kind: str
    names: Mapping[str, str]
    alpha: float | None = None

    @staticmethod
    def of_layer(kind: str, prefix: str) -> Recurrence:
        """That of an ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM`` of one layer, which stands in a module as ``prefix``."""
        return Recurrence(kind, {role: f"{prefix}.{role}_l0" for role in ROLES[:4]})


class Recurrent(nn.Module):
    """A recurrent layer that starts at zero: ``x [N, T, inputs]`` to states ``[N, T, hidden]``, or their readout.

    Weights are interchangeable with those of ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM`` (``weight_ih [gH, I]``, ``weight_hh
    [gH, H]``, ``bias_ih [gH]``, ``bias_hh [gH]``, gates in torch's order) and so is their initialisation, uniform in
    +-1 / sqrt(H). A ``ctrnn`` has no ``bias_hh``. With ``outputs`` there are ``readout.weight [O, H]`` and
    ``readout.bias [O]``, which read the state h. Plain operations in a loop over T, for fused kernels have no forward
    mode.

    theta is made of the parameters with ``requires_grad=True``; freeze the others for the NTK of a part.

    Args:
        kind: ``"rnn"`` (tanh), ``"gru"``, ``"lstm"`` or ``"ctrnn"``.
        inputs: I.
        hidden: H.
        outputs: O of a linear readout; the states themselves are the output if not given.
        alpha: Euler step over time constant of a ``ctrnn``, in (0, 1].

    Raises:
        BadInput: no such kind, a size below 1, or an ``alpha`` that is missing, out of range or not for this kind.
    """

    def __init__(
        self, kind: str, inputs: int, hidden: int, outputs: int | None = None, alpha: float | None = None
    ) -> None:
        super().__init__()
        if kind not in GATES:
            raise unknown("kind of recurrent network", kind, GATES)
        sizes = {"inputs": inputs, "hidden": hidden, "outputs": 1 if outputs is None else outputs}
        if wrong := [f"{name}={size}" for name, size in sizes.items() if size < 1]:
            raise BadInput(f"sizes of a recurrent network must be at least 1; got {', '.join(wrong)}")
        if (kind == "ctrnn") != (alpha is not None) or (alpha is not None and not 0 < alpha <= 1):
            raise BadInput(f"alpha is the step of a ctrnn, in (0, 1], and of no other kind; got {alpha} for {kind!r}")
        rows = GATES[kind] * hidden
        self.weight_ih = nn.Parameter(torch.empty(rows, inputs))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        if kind != "ctrnn":
            self.bias_hh = nn.Parameter(torch.empty(rows))
        for weight in self.parameters():
            nn.init.uniform_(weight, -(hidden**-0.5), hidden**-0.5)
        names = {role: role for role in ROLES[:4] if hasattr(self, role)}
        if outputs is not None:
            self.readout = nn.Linear(hidden, outputs)
            names |= {"readout_weight": "readout.weight", "readout_bias": "readout.bias"}
        self.recurrence = Recurrence(kind, names, alpha)

    def forward(self, x: Tensor) -> Tensor:
        w = {role: operator.attrgetter(name)(self) for role, name in self.recurrence.names.items()}
        states = trajectory(self.recurrence.kind, self.recurrence.alpha, w, x)[0]
        return nn.functional.linear(states, w["readout_weight"], w["readout_bias"]) if "readout_weight" in w else states


def trajectory(kind: str, alpha: float | None, w: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """All states (see :class:`Cell`) after each step, ``[N, T, H]``, from parameters by role and ``x [N, T, I]``."""
    cell = Cell(kind, alpha)
    from_inputs = nn.functional.linear(x, w["weight_ih"], w.get("bias_ih"))
    state = cell.start(x.new_zeros(x.shape[0], w["weight_hh"].shape[1]))
    states = []
    for t in range(x.shape[1]):
        from_state = nn.functional.linear(cell.sent(state, torch), w["weight_hh"], w.get("bias_hh"))
        state = cell.step(state, from_inputs[:, t], from_state, torch)
        states.append(state)
    return tuple(torch.stack(part, 1) for part in zip(*states, strict=True))


def frozen(module: nn.Module) -> dict[str, np.ndarray]:
    """The parameters of a module that theta is not made of, on the host."""
    return {key: w.detach().cpu().numpy().copy() for key, w in module.named_parameters() if not w.requires_grad}


def jax_forward(module: nn.Module) -> Callable[[Mapping[str, Any], Any], Any]:
    """The network of a module with a :class:`Recurrence` as a pure function of JAX arrays, ``(weights, x) -> [N, T,
    ...]``; frozen parameters are fixed at what they are now.
    """
    recurrence, fixed = module.recurrence, frozen(module)

    def forward(weights: Mapping[str, Any], x: Any) -> Any:
        import jax.numpy as jnp

        held = {**fixed, **weights}
        w = {role: jnp.asarray(held[name], x.dtype) for role, name in recurrence.names.items()}
        states = jax_trajectory(recurrence.kind, recurrence.alpha, w, x)[0]
        return states @ w["readout_weight"].T + w["readout_bias"] if "readout_weight" in w else states

    return forward


def jax_trajectory(kind: str, alpha: float | None, w: Mapping[str, Any], x: Any) -> tuple[Any, ...]:
    """:func:`trajectory` in JAX, by ``lax.scan``: it compiles in a time that does not depend on T."""
    import jax
    import jax.numpy as jnp

    functions = _Functions(jnp.tanh, jax.nn.sigmoid)
    cell = Cell(kind, alpha)

    def step(state: Any, from_input: Any) -> tuple[Any, Any]:
        from_state = cell.sent(state, functions) @ w["weight_hh"].T + w.get("bias_hh", 0)
        state = cell.step(state, from_input, from_state, functions)
        return state, state

    start = cell.start(jnp.zeros((x.shape[0], w["weight_hh"].shape[1]), x.dtype))
    from_inputs = x @ w["weight_ih"].T + w.get("bias_ih", 0)
    _, states = jax.lax.scan(step, start, jnp.swapaxes(from_inputs, 0, 1))
    return tuple(jnp.swapaxes(part, 0, 1) for part in states)


class _Functions(NamedTuple):
    """The elementwise functions a cell is made of, as ``torch`` has them."""

    tanh: Callable[[Any], Any]
    sigmoid: Callable[[Any], Any]


class Cell:
    """One step of a recurrence; the same for both backends.

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
        """What ``weight_hh`` is multiplied with."""
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


def _gates(z: Any, count: int) -> list[Any]:
    size = z.shape[-1] // count
    return [z[..., i * size : (i + 1) * size] for i in range(count)]
