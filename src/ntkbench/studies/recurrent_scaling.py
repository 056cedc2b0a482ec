"""Seconds of NTK metrics of recurrent networks against trials, steps and probes, with their slopes.

One size at a time is varied, with the others at a middle value. The cost of estimates should grow linearly with each.
An exact trace has no probes and runs backward from every step, so that its cost grows at least with the square of the
steps. Networks are untrained, since seconds do not depend on weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import pandas as pd
from pydantic import Field, PositiveInt, field_validator, model_validator

from ntkbench import methods
from ntkbench.data import tasks
from ntkbench.errors import Unavailable
from ntkbench.estimate import Estimate
from ntkbench.measure import outcomes
from ntkbench.measure.schema import check_probes
from ntkbench.measure.seeds import checked
from ntkbench.measure.timing import quartiles, timed
from ntkbench.methods.base import Stochastic
from ntkbench.problem import Problem
from ntkbench.studies import base

METRICS = {
    "shared_probe_alignment": "alignment",
    "one_sided_reverse": "trace",
    "one_sided_forward": "trace",
    "per_sample_trace_forward": "trace",
    "recurrent_exact_trace": "trace",
}
"""Methods, and the metric that each computes."""
PLUGINS = tuple(f"ntkbench.methods.{name}" for name in METRICS)
TIMED = True
Size = Literal["N", "T", "probes"]
SIZES: tuple[Size, ...] = ("N", "T", "probes")


class Settings(base.Settings):
    """Sizes.

    Attributes:
        task, kinds, H: task, kinds of networks, and their number of units.
        N, T, probes: numbers of trials, steps and probes; each is varied with the others at their middle.
        middle: the middle of each of these, one of its values.
    """

    USES = (*base.OF_TARGET, "calls", "limits.patience_s")

    task: Literal["flipflop", "delayed_response", "match_to_sample"] = "flipflop"
    kinds: list[Literal["rnn", "gru", "lstm", "ctrnn"]] = Field(default=["rnn", "gru"], min_length=1)
    H: PositiveInt = 128
    N: list[PositiveInt] = Field(default=[25, 50, 100, 200], min_length=1)
    T: list[PositiveInt] = Field(default=[5, 10, 20, 40], min_length=1)
    probes: list[PositiveInt] = Field(default=[12, 25, 50, 100], min_length=1)
    middle: dict[Size, PositiveInt] = Field(default={"N": 100, "T": 10, "probes": 50})

    @field_validator("probes")
    @classmethod
    def _enough_for_all_methods(cls, probes: list[int]) -> list[int]:
        return check_probes(probes, [name for name in METRICS if isinstance(methods.get(name), Stochastic)])

    @model_validator(mode="after")
    def _long_enough(self) -> Settings:
        tasks.check(self.task, min(self.T))
        return self

    @model_validator(mode="after")
    def _middle_is_tried(self) -> Settings:
        for size in SIZES:
            if self.middle.get(size) not in getattr(self, size):
                allowed = ", ".join(map(str, getattr(self, size)))
                raise ValueError(f"middle: {size} must be one of those tried ({allowed}); got {self.middle.get(size)}")
        return self


def run(settings: Settings) -> pd.DataFrame:
    """One row for each kind of network, varied size, its value, and method.

    The values of a size take turns, so that a temporary slowdown of the machine does not appear as a slope; except one
    that takes longer than ``limits.patience_s``, which is timed once.
    """

    @functools.cache
    def problem(kind: str, N: int, T: int) -> base.Once[Problem]:
        return base.Once(lambda: _problem(settings, kind, N, T))

    return base.table(
        row
        for kind in settings.kinds
        for varied in SIZES
        for name in METRICS
        if varied != "probes" or isinstance(methods.get(name), Stochastic)
        for row in _line(settings, problem, kind, varied, name)
    )


def _points(settings: Settings, varied: str) -> list[dict[str, int]]:
    """All three sizes, one of them varied, in ascending order."""
    return [settings.middle | {varied: value} for value in sorted(getattr(settings, varied))]


def _problem(settings: Settings, kind: str, N: int, T: int) -> Problem:
    """The states of one network and of another on the same trials."""
    from ntkbench.networks import recurrent

    channels = tasks.channels(settings.task)
    networks = [recurrent.initialised(kind, channels, settings.H, seed=seed) for seed in (0, 1)]
    parts = [recurrent.part(network, "state", "all") for network in networks]
    theta_0, theta_f = ({key: w.detach().numpy() for key, w in part.named_parameters()} for part in parts)
    return Problem(f"{kind}_{settings.task}", parts[0], tasks.trials(settings.task, N, T).inputs, theta_0, theta_f)


def _line(
    settings: Settings, problem: Callable[[str, int, int], base.Once[Problem]], kind: str, varied: str, name: str
) -> list[base.Row]:
    """One method over the values of one size."""
    common = {"task": settings.task, "kind": kind, "H": settings.H, "varied": varied, "method": name}
    rows: list[base.Row] = []
    turns: list[base.Turn] = []
    slow = ""
    for at in _points(settings, varied):
        point = Point(settings, problem(kind, at["N"], at["T"]), name, at["probes"])
        case = {**common, **at, "title": base.title(name), "metric": METRICS[name]}
        rows.append(base.left_out(case, slow) if slow else base.row(case, point.columns))
        if rows[-1]["status"] != outcomes.OK:
            continue
        if rows[-1]["seconds"] > settings.limits.patience_s:
            slow = f"the previous size took over limits.patience_s ({settings.limits.patience_s:g})"
        else:
            turns.append(base.Turn(f"{varied} = {at[varied]}", rows[-1], point.call, point.first))
    base.in_turn(common, turns, settings.calls)
    return rows


class Point:
    """One method at one size.

    Attributes:
        first: the first call, with its seconds.
    """

    def __init__(self, settings: Settings, problem: base.Once[Problem], name: str, probes: int) -> None:
        """Does not prepare anything yet."""
        self._settings, self._problem, self._name, self._probes = settings, problem, name, probes
        self._prepared = base.Once(lambda: methods.get(name).prepare(problem(), settings.target()))
        self.first = base.Once(lambda: timed(self.call, 0))

    @property
    def _passes(self) -> int | None:
        """Passes of the probes; ``None`` for an exact method."""
        method = methods.get(self._name)
        return method.cost(METRICS[self._name], self._probes) if isinstance(method, Stochastic) else None

    def call(self) -> Estimate:
        """The timed region."""
        return methods.get(self._name).estimate(self._prepared(), METRICS[self._name], self._passes)

    def columns(self) -> dict[str, Any]:
        """Columns of the first call; ``seconds`` is replaced once all sizes have been timed in turn.

        A call that takes longer than ``limits.patience_s``, after the first one, is the only one that is timed.
        """
        problem, target, limits = self._problem(), self._settings.target(), self._settings.limits
        method, metric, passes = methods.get(self._name), METRICS[self._name], self._passes
        if reason := method.unsupported_reason(problem, metric, target, passes):
            raise Unavailable(reason)
        limits.check_memory(method.bytes_needed(problem, metric, target, passes))
        self._prepared()
        first = self.first()
        columns: dict[str, Any] = {
            "passes": checked(first.first).passes,
            "first_call_seconds": first.first_seconds,
            "seconds": first.first_seconds,
        }
        if first.first_seconds > limits.patience_s:  # a process's first calls also load libraries
            columns["seconds"] = timed(self.call, 0).first_seconds
        if columns["seconds"] > limits.patience_s:
            columns |= {**quartiles("seconds", [columns["seconds"]]), "calls": 1}
        return columns
