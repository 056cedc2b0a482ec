"""Recurrent networks on tasks: four kinds of cells, three tasks, any size, and the NTK of any part of the network.

``rnn_flipflop``, ``gru_delayed_response``, ``ctrnn_match_to_sample`` and so on: N trials of T steps, H units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ntkbench.data import tasks
from ntkbench.problems.base import Definition, problem, training
from ntkbench.registry import first_line

KINDS = {"rnn": "Vanilla tanh RNN", "gru": "GRU", "lstm": "LSTM", "ctrnn": "Continuous-time RNN (Euler steps of 1/2)"}


def _define(kind: str, task: str) -> Callable[..., Definition]:
    def define(
        N: int = 20,
        T: int = 10,
        H: int = 32,
        read: Literal["state", "outputs"] = "state",
        parameters: Literal["all", "recurrent", "inputs", "readout"] = "all",
    ) -> Definition:
        from ntkbench.networks import recurrent

        whole = recurrent.initialised(kind, tasks.channels(task), H)
        part = recurrent.part(whole, read, parameters)
        recipe = training.OnTask(task, training.curriculum(T))
        return Definition(
            whole, tasks.trials(task, N, T).inputs, recipe, recurrent.jax_forward(part), outputs="states", part=part
        )

    define.__name__ = define.__qualname__ = f"{kind}_{task}"
    define.__doc__ = f"{KINDS[kind]} on {first_line(tasks.TASKS[task][0])}"
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
