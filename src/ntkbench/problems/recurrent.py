"""Recurrent networks on tasks: four kinds of cells, three tasks, any size, and the NTK of any part of the network.

``rnn_flipflop``, ``gru_delayed_response``, ``ctrnn_match_to_sample`` and so on: N trials of T steps, H units.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from ntkbench.data import tasks
from ntkbench.errors import BadInput
from ntkbench.problems.base import Definition, problem, training

if TYPE_CHECKING:
    from torch import nn

KINDS = {"rnn": "Vanilla tanh RNN", "gru": "GRU", "lstm": "LSTM", "ctrnn": "Continuous-time RNN (Euler steps of 1/2)"}
EULER_STEP = 0.5
"""Of the continuous-time network, in time constants."""

TRAINED_ON, LEARNING_RATE, CLIP, LOSS, STEPS = 128, 5e-3, 1.0, 0.1, 2000
SHORTEST = 10
"""Steps of the shortest trials that come before longer ones."""
PARTS = {
    "all": ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "readout.weight", "readout.bias"),
    "recurrent": ("weight_hh",),
    "inputs": ("weight_ih", "bias_ih"),
    "readout": ("readout.weight", "readout.bias"),
}
"""What ``parameters`` may be, and the parameters that it stands for; those that a network has."""


def network(
    kind: str, task: str, hidden: int, *, gain: float | None = None, rank: int | None = None, seed: int = 0
) -> nn.Module:
    """An untrained network for a task, with a linear readout, at torch's initialisation unless it says otherwise.

    Args:
        kind: a key of ``KINDS``.
        task: a key of ``_tasks.TASKS``.
        hidden: H.
        gain: recurrent weights are normal with variance gain^2 / H instead; 1 if not given for a ``ctrnn``.
        rank: recurrent weights are cut to their largest singular values, and scaled to the Frobenius norm they had.
        seed: of the weights.

    Raises:
        BadInput: no such kind or task, no units, a gain that is not positive, or a rank that H units cannot have.
    """
    import torch

    from ntkbench.networks.recurrent import Recurrent

    if (gain is not None and not gain > 0) or (rank is not None and not 1 <= rank <= hidden):
        raise BadInput(f"gain must be positive and rank from 1 to H={hidden}; got gain={gain}, rank={rank}")
    inputs, outputs = tasks.channels(task)
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


def course(
    module: nn.Module,
    trials: tasks.Trials,
    *,
    loss: float = LOSS,
    steps: int = STEPS,
    optimizer: str = "adam",
    learning_rate: float = LEARNING_RATE,
) -> Iterator[tuple[int, float]]:
    """Train in place on all trials at once; see :func:`_training.descent` for what comes out and when.

    Gradients are clipped to norm 1. In float64, so that rounding differences between machines stay far below the
    float32 that weights are kept in.

    Args:
        module: the network, in float64 until the end.
        trials: to train it on.
        loss: at which to stop.
        steps: that may be taken.
        optimizer: ``"adam"``, or ``"sgd"`` for gradient descent with a momentum of 0.9, which moves each weight by as
            much as its gradient says.
        learning_rate: of either.
    """
    import torch

    module.double()
    x, missed = torch.from_numpy(trials.inputs).double(), trials.loss()
    make = {"adam": torch.optim.Adam, "sgd": functools.partial(torch.optim.SGD, momentum=0.9)}[optimizer]
    chosen = make(module.parameters(), lr=learning_rate)

    def clip(*_: object) -> None:
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)

    chosen.register_step_pre_hook(clip)
    yield from training.descent(lambda: missed(module(x)), chosen, to=loss, most=steps)
    module.float()


def curriculum(T: int) -> list[int]:
    """Lengths of trials that a network is trained on in turn: T, a third of it and so on, but for those below 10.

    Over dozens of steps gradients of a vanilla network vanish, and nothing is learned from long trials alone.
    """
    lengths = [T]
    while lengths[0] // 3 >= SHORTEST:
        lengths.insert(0, lengths[0] // 3)
    return lengths


def part(module: nn.Module, read: str, parameters: str) -> nn.Module:
    """The network that gives a recurrent network's states or outputs, frozen but for the parameters asked for.

    Raises:
        BadInput: the states do not come from the parameters.
    """
    import torch

    from ntkbench.networks.recurrent import Recurrent

    if read == "state" and parameters == "readout":
        raise BadInput("the states do not come from the readout: parameters=readout needs read=outputs")
    outputs, hidden = module.readout.weight.shape
    recurrence = module.recurrence
    sizes = module.weight_ih.shape[1], hidden, outputs if read == "outputs" else None
    with torch.random.fork_rng(devices=[]):
        network = Recurrent(recurrence.kind, *sizes, recurrence.alpha)
    network.load_state_dict(module.state_dict(), strict=False)
    for key, w in network.named_parameters():
        w.requires_grad_(key in PARTS[parameters])
    return network


def _define(kind: str, task: str) -> Callable[..., Definition]:
    def define(
        N: int = 20,
        T: int = 10,
        H: int = 32,
        read: Literal["state", "outputs"] = "state",
        parameters: Literal["all", "recurrent", "inputs", "readout"] = "all",
    ) -> Definition:
        from ntkbench.networks.recurrent import jax_forward

        trials = tasks.trials(task, N, T)
        whole = network(kind, task, H)
        chosen = part(whole, read, parameters)

        lengths = curriculum(T)

        def train(module: nn.Module) -> None:
            """To a tenth of the targets' power, on 128 trials, of the shorter lengths first."""
            for length in lengths:
                for _ in course(module, tasks.trials(task, TRAINED_ON, length, seed=1)):
                    pass

        recipe = f"{TRAINED_ON} trials of T={', '.join(map(str, lengths))} to {LOSS}"
        return Definition(whole, trials.inputs, train, jax_forward(chosen), part=chosen, recipe=recipe)

    define.__name__ = define.__qualname__ = f"{kind}_{task}"
    define.__doc__ = f"{KINDS[kind]} on {inspect.getdoc(tasks.TASKS[task][0]).splitlines()[0]}"
    return define


NAMES = (
    "rnn_flipflop",
    "rnn_delayed_response",
    "rnn_match_to_sample",
    "gru_flipflop",
    "gru_delayed_response",
    "gru_match_to_sample",
    "lstm_flipflop",
    "lstm_delayed_response",
    "lstm_match_to_sample",
    "ctrnn_flipflop",
    "ctrnn_delayed_response",
    "ctrnn_match_to_sample",
)
for _name in NAMES:
    globals()[_name] = problem(_define(*_name.split("_", 1)), any_size=True)
