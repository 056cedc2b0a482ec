"""Recurrent networks in PyTorch and in JAX: layers of plain operations, and PyTorch's own.

Each module declares a :class:`ntkbench.operators.recurrent.cells.Recurrence`, which tells the structure-aware Jacobian
the roles of its parameters.
"""

from __future__ import annotations

import copy
import importlib
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ntkbench.errors import BadInput, unknown
from ntkbench.operators.recurrent.cells import GATES, ROLES, Recurrence, declared
from ntkbench.operators.recurrent.torch_trajectory import trajectory

EULER_STEP = 0.5
"""Euler step of a continuous-time network (``ctrnn``), in time constants."""

PARTS = {
    "all": ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "readout.weight", "readout.bias"),
    "recurrent": ("weight_hh",),
    "inputs": ("weight_ih", "bias_ih"),
    "readout": ("readout.weight", "readout.bias"),
}
"""Parts of a :class:`Recurrent`, and the parameters in each; a network need not have all of them."""


class Recurrent(nn.Module):
    """A recurrent layer with zero initial state: ``x [N, T, inputs]`` to states ``[N, T, hidden]``, or their readout.

    Weights are interchangeable with those of ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM`` (``weight_ih [gH, I]``, ``weight_hh
    [gH, H]``, ``bias_ih [gH]``, ``bias_hh [gH]``, gates in torch's order) and so is their initialisation, uniform in
    +-1 / sqrt(H). A ``ctrnn`` has no ``bias_hh``. With ``outputs`` there are ``readout.weight [O, H]`` and
    ``readout.bias [O]``, which read the state h. The layer is a loop of plain operations over T, because fused kernels
    have no forward mode.

    theta consists of the parameters with ``requires_grad=True``; freeze the others for the NTK of a part.

    Args:
        kind: ``"rnn"`` (tanh), ``"gru"``, ``"lstm"`` or ``"ctrnn"``.
        inputs: I.
        hidden: H.
        outputs: O of a linear readout; the states themselves are the output if not given.
        alpha: Euler step of a ``ctrnn`` divided by its time constant, in (0, 1].

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
            raise BadInput(f"a ctrnn needs alpha, its step, in (0, 1]; other kinds have none; got {alpha} for {kind!r}")
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


class States(nn.Module):
    """Outputs of a torch recurrent layer at all steps: inputs ``[N, T, I]`` to ``[N, T, ...]``, for any layout.

    It declares a ``recurrence`` for an unmodified ``nn.RNN`` (tanh), ``nn.GRU`` or ``nn.LSTM`` of one layer and one
    direction. Other kinds, subclasses, and layers with hooks or parametrisations may compute something else; they are
    called as they are.
    """

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.training = layer.training
        self.recurrence = _recurrence(layer)
        self.layer = layer
        if self.recurrence is not None:
            self.layer = copy.deepcopy(layer)
            self.layer.batch_first = True
        self.time_first = not self.layer.batch_first

    def forward(self, x: Tensor) -> Tensor:
        if self.time_first:
            return self.layer(x.transpose(0, 1))[0].transpose(0, 1)
        return self.layer(x)[0]


CHANGING = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of modules that hold hooks, which may change values or gradients."""


def _recurrence(layer: nn.RNNBase) -> Recurrence | None:
    """The recurrence that a layer computes; ``None`` if it may compute anything else."""
    kind = layer.mode.partition("_")[0].lower()
    roles = Recurrence.of_layer(kind, "layer").names
    own = {f"layer.{name}" for name, _ in layer.named_parameters()}
    as_made = (
        type(layer) in (nn.RNN, nn.GRU, nn.LSTM)
        and "forward" not in vars(layer)
        and not any(vars(layer).get(hooks) for hooks in CHANGING)
        and not any(w._backward_hooks for w in layer.parameters())
    )
    of_one_layer = layer.num_layers == 1 and not layer.bidirectional and not layer.proj_size
    of_tanh = getattr(layer, "nonlinearity", "tanh") == "tanh"
    complete = own == {name for name in roles.values() if layer.bias or "bias" not in name}
    if not (as_made and of_one_layer and of_tanh and complete):
        return None
    return Recurrence(kind, {role: name for role, name in roles.items() if name in own})


def initialised(
    kind: str,
    channels: tuple[int, int],
    hidden: int,
    *,
    gain: float | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> Recurrent:
    """An untrained :class:`Recurrent` with a linear readout, at PyTorch's initialisation unless stated otherwise.

    A ``ctrnn`` takes Euler steps of half its time constant.

    Args:
        kind: as in :class:`Recurrent`.
        channels: numbers of inputs I and outputs O.
        hidden: H.
        gain: recurrent weights are normal with variance gain^2 / H instead; 1 if not given for a ``ctrnn``.
        rank: recurrent weights are cut to their ``rank`` largest singular values, and rescaled to their original
            Frobenius norm.
        seed: random seed of the weights.

    Raises:
        BadInput: no such kind, no units, a gain that is not positive, or a rank that H units cannot have.
    """
    if (gain is not None and not gain > 0) or (rank is not None and not 1 <= rank <= hidden):
        raise BadInput(f"gain must be positive and rank from 1 to H={hidden}; got gain={gain}, rank={rank}")
    inputs, outputs = channels
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = Recurrent(kind, inputs, hidden, outputs, EULER_STEP if kind == "ctrnn" else None)
        w = module.weight_hh
        if gain is not None or kind == "ctrnn":
            w.normal_(std=(1.0 if gain is None else gain) / hidden**0.5)
        if rank is not None:
            norm = w.norm()
            u, s, vt = torch.linalg.svd(w, full_matrices=False)
            w.copy_((u[:, :rank] * s[:rank]) @ vt[:rank])
            w.mul_(norm / w.norm())
    return module


def part(network: Recurrent, read: str, parameters: str) -> Recurrent:
    """A network with the states or the outputs of ``network``, frozen except for the chosen parameters.

    Args:
        network: with a readout; its weights are copied.
        read: ``"state"`` or ``"outputs"``.
        parameters: a key of :data:`PARTS`.

    Raises:
        BadInput: the states do not depend on the parameters.
    """
    if read == "state" and parameters == "readout":
        raise BadInput("the states do not depend on the readout: parameters=readout needs read=outputs")
    outputs, hidden = network.readout.weight.shape
    recurrence = network.recurrence
    sizes = network.weight_ih.shape[1], hidden, outputs if read == "outputs" else None
    with torch.random.fork_rng(devices=[]):
        chosen = Recurrent(recurrence.kind, *sizes, recurrence.alpha)
    chosen.load_state_dict(network.state_dict(), strict=False)
    for key, w in chosen.named_parameters():
        w.requires_grad_(key in PARTS[parameters])
    return chosen


def jax_forward(module: nn.Module) -> Callable[[Mapping[str, Any], Any], Any]:
    """The network of a module with a recurrence as a pure function of JAX arrays, ``(weights, x) -> [N, T, ...]``.

    Frozen parameters are fixed at their current values.
    """
    recurrence = declared(module)
    fixed = {key: w.detach().cpu().numpy().copy() for key, w in module.named_parameters() if not w.requires_grad}

    def forward(weights: Mapping[str, Any], x: Any) -> Any:
        import jax.numpy as jnp

        # Imported by name, so that it counts as imported with the JAX backend only.
        jax_trajectory = importlib.import_module("ntkbench.operators.recurrent.jax_trajectory")
        held = {**fixed, **weights}
        w = {role: jnp.asarray(held[name], x.dtype) for role, name in recurrence.names.items()}
        states = jax_trajectory.trajectory(recurrence.kind, recurrence.alpha, w, x)[0]
        return states @ w["readout_weight"].T + w["readout_bias"] if "readout_weight" in w else states

    return forward
