"""Recurrent networks of plain operations, in torch and in JAX, and what the structure-aware Jacobian knows of them."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkbench.errors import BadInput, unknown
from ntkbench.operators.recurrent.cells import GATES, ROLES, Recurrence
from ntkbench.operators.recurrent.torch import trajectory


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

        jax = importlib.import_module("ntkbench.operators.recurrent.jax")  # loaded with the backend and not before

        held = {**fixed, **weights}
        w = {role: jnp.asarray(held[name], x.dtype) for role, name in recurrence.names.items()}
        states = jax.trajectory(recurrence.kind, recurrence.alpha, w, x)[0]
        return states @ w["readout_weight"].T + w["readout_bias"] if "readout_weight" in w else states

    return forward
