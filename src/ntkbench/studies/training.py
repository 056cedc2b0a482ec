"""The NTK of a recurrent network and its factors K and P along training, from rich and from lazy initialisations.

At log-spaced steps: trace, norm, effective rank, and alignment with the first step, of Theta = P K P*, of K (the
representation) and of P P* (the dynamics). Theta and P P* are estimated with the same probes at all steps, so that
ratios to the first step have paired standard errors; K is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ntkbench.data import tasks
from ntkbench.estimators import paired
from ntkbench.metrics import METRICS
from ntkbench.problem import Problem, Weights, split
from ntkbench.problems.base import training
from ntkbench.studies import base

if TYPE_CHECKING:
    from torch import nn

    from ntkbench.operators.recurrent.state_kernel import StateKernel

TIMED = False


class Settings(base.Settings):
    """One task and one kind of network, from several initialisations.

    Attributes:
        task, kind: the task, and the kind of network.
        N, T, H: trials of the NTK (not those of training), steps and units.
        gains: recurrent weights are normal with variance gain^2 / H.
        ranks: ranks that recurrent weights are truncated to at an unchanged Frobenius norm; H leaves them unchanged.
        networks: number of initial weights drawn for each gain and rank.
        loss: share of the targets' power missed at which training ends.
        steps: maximum number of steps; a network that does not reach the loss by then counts as not trained.
        optimizer, learning_rate: gradient descent (sgd) moves weights in proportion to their gradients, which the
            distinction of rich and lazy is about; adam moves all weights by similar amounts.
        probes: number of probes of Theta and P P*.
        read, parameters: the part of the network whose NTK is measured.
    """

    USES = base.OF_TARGET

    task: Literal["flipflop", "delayed_response", "match_to_sample"] = "flipflop"
    kind: Literal["rnn", "gru", "lstm", "ctrnn"] = "rnn"
    N: PositiveInt = 20
    T: PositiveInt = 10
    H: PositiveInt = 64
    gains: list[PositiveFloat] = Field(default=[0.5, 1.0], min_length=1)
    ranks: list[PositiveInt] = Field(default=[4, 64], min_length=1)
    networks: PositiveInt = 3
    loss: PositiveFloat = training.LOSS
    steps: PositiveInt = training.STEPS
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: PositiveFloat = 0.05
    probes: int = Field(default=100, ge=2)
    read: Literal["state", "outputs"] = "state"
    parameters: Literal["all", "recurrent", "inputs", "readout"] = "all"

    @model_validator(mode="after")
    def _sizes_go_together(self) -> Settings:
        tasks.check(self.task, self.T)
        if max(self.ranks) > self.H:
            raise ValueError(f"ranks: {max(self.ranks)} is more than H ({self.H})")
        if (self.read, self.parameters) == ("state", "readout"):
            raise ValueError("parameters: 'readout' needs read: outputs, since no state depends on the readout")
        return self


def run(settings: Settings) -> pd.DataFrame:
    """One row for each network, step, operator and quantity; one with the reason for a network that does not train.

    The measured steps of a network are only known once it has trained.
    """
    sizes = {key: getattr(settings, key) for key in ("task", "kind", "N", "T", "H", "read", "parameters", "optimizer")}
    return base.table(
        row
        for gain in settings.gains
        for rank in settings.ranks
        for seed in range(settings.networks)
        for row in base.rows(
            {**sizes, "gain": gain, "rank": rank, "init": _name(gain, rank, settings.H), "network": seed},
            functools.partial(_measure, settings, gain, rank, seed),
        )
    )


def _name(gain: float, rank: int, hidden: int) -> str:
    return f"gain {gain:g}, " + ("full rank" if rank == hidden else f"rank {rank}")


def _measure(settings: Settings, gain: float, rank: int, seed: int) -> list[dict[str, Any]]:
    """Train one network; returns the columns of all its steps, operators and quantities."""
    from ntkbench.networks import recurrent

    s = settings
    trained_on, seen = tasks.trials(s.task, training.TRIALS, s.T, seed=1), tasks.trials(s.task, s.N, s.T)
    module = recurrent.initialised(s.kind, tasks.channels(s.task), s.H, gain=gain, rank=rank, seed=seed)
    part = recurrent.part(module, s.read, s.parameters)
    course = training.course(
        module, trained_on, loss=s.loss, steps=s.steps, optimizer=s.optimizer, learning_rate=s.learning_rate
    )
    return list(_along(s, part, seen, list(training.checkpoints(module, course))))


def _along(
    settings: Settings, part: nn.Module, seen: tasks.Trials, kept: list[tuple[int, float, Weights]]
) -> Iterator[dict[str, Any]]:
    from ntkbench.operators.recurrent.state_kernel import StateKernel

    first: StateKernel | None = None
    for step, loss, weights in kept:
        theta, fixed = split(part, weights)
        problem = Problem(settings.task, part, seen.inputs, theta, fixed_0=fixed)
        kernel = StateKernel(problem, "theta_0", settings.target())
        if first is None:
            first, u = kernel, kernel.jacobian.rng(0).sign(settings.probes, problem.n)
            probes = {operator: paired.SharedProbes(u) for operator in ("Theta", "P")}
        found = {"Theta": probes["Theta"].compare(kernel.theta(u)), "K": _exact(kernel, first)}
        found["P"] = probes["P"].compare(kernel.P(kernel.P.T(u)))
        for operator, metrics in found.items():
            for one in metrics:
                yield {"step": step, "loss": loss, "operator": operator, "probes": settings.probes, **vars(one)}


def _exact(kernel: StateKernel, first: StateKernel) -> list[paired.Comparison]:
    from ntkbench.estimators.state_factors import moments_of_k

    now, then = moments_of_k(kernel, first), moments_of_k(first, first)
    return [
        paired.Comparison(quantity, now.metric(quantity), 0.0, now.metric(quantity) / then.metric(quantity), 0.0)
        for quantity in METRICS
    ]
