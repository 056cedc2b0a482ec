"""Seconds of NTK metrics of recurrent networks against trials, steps and probes, and the slopes that they grow with.

One size at a time is varied around a middle. Estimates should grow linearly with each; an exact trace has no probes
and goes back from every step, so that it grows with the square of the steps or more. Networks are untrained, since
seconds do not depend on weights.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

import pandas as pd
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ntkbench import methods
from ntkbench.data import tasks
from ntkbench.measure import timing
from ntkbench.methods.base import Stochastic
from ntkbench.operators import linearise
from ntkbench.problem import Problem
from ntkbench.studies import base

METRICS = {
    "shared_probe_alignment": "alignment",
    "one_sided_reverse": "trace",
    "one_sided_forward": "trace",
    "per_sample_trace_forward": "trace",
    "recurrent_exact_trace": "trace",
}
"""Methods, and what each is asked for."""
PLUGINS = tuple(f"ntkbench.methods.{name}" for name in METRICS)
SIZES = ("N", "T", "probes")


class Settings(base.Settings):
    """Sizes.

    Attributes:
        task, kinds, H: what the networks are, and their units.
        N, T, probes: trials, steps and probes that are tried, each with the others in the middle.
        middle: of each of these, one of those that are tried.
        patience_seconds: of an estimate, after which a method is not tried on larger sizes.
    """

    task: Literal["flipflop", "delayed_response", "match_to_sample"] = "flipflop"
    kinds: list[Literal["rnn", "gru", "lstm", "ctrnn"]] = Field(default=["rnn", "gru"], min_length=1)
    H: PositiveInt = 128
    N: list[PositiveInt] = Field(default=[25, 50, 100, 200], min_length=1)
    T: list[PositiveInt] = Field(default=[5, 10, 20, 40], min_length=1)
    probes: list[PositiveInt] = Field(default=[12, 25, 50, 100], min_length=1)
    middle: dict[Literal["N", "T", "probes"], PositiveInt] = Field(default={"N": 100, "T": 10, "probes": 50})
    patience_seconds: PositiveFloat = 30

    @model_validator(mode="after")
    def _middle_is_tried(self) -> Settings:
        for size in SIZES:
            if self.middle.get(size) not in getattr(self, size):
                allowed = ", ".join(map(str, getattr(self, size)))
                raise ValueError(f"middle: {size} must be one of those tried ({allowed}); got {self.middle.get(size)}")
        return self


def run(settings: Settings) -> pd.DataFrame:
    """One row for each kind of network, size that is varied, its value, and method.

    The values of a size take turns, so that a machine that is slow for a while is no slope.

    Raises:
        BadInput: a task that so few steps are not enough for.
    """
    sizes = sorted({(at["N"], at["T"]) for size in SIZES for at in _points(settings, size)})
    # All problems first, so that what cannot be is refused before anything is timed.
    problems = {(kind, *size): _problem(settings, kind, *size) for kind in settings.kinds for size in sizes}
    j = linearise(problems[settings.kinds[0], *sizes[0]], "theta_0", settings.target())
    float(j.ntk(j.basis(0, 1)).sum())  # a process's first products load libraries, and would count as slow
    return pd.DataFrame(
        [
            row
            for kind in settings.kinds
            for varied in SIZES
            for name in METRICS
            if varied != "probes" or isinstance(methods.get(name), Stochastic)
            for row in _line(settings, problems, kind, varied, name)
        ]
    )


def _points(settings: Settings, varied: str) -> list[dict[str, int]]:
    """All three sizes, one of them varied, from its smallest value on."""
    return [settings.middle | {varied: value} for value in sorted(getattr(settings, varied))]


def _problem(settings: Settings, kind: str, N: int, T: int) -> Problem:
    """The states of one network and of another on the same trials."""
    from ntkbench.networks import recurrent

    channels = tasks.channels(settings.task)
    networks = [recurrent.initialised(kind, channels, settings.H, seed=seed) for seed in (0, 1)]
    parts = [recurrent.part(network, "state", "all") for network in networks]
    weights = [{key: w.detach().numpy() for key, w in part.named_parameters()} for part in parts]
    return Problem(f"{kind}_{settings.task}", parts[0], tasks.trials(settings.task, N, T).inputs, *weights)


def _line(
    settings: Settings, problems: Mapping[tuple[str, int, int], Problem], kind: str, varied: str, name: str
) -> list[dict[str, Any]]:
    """One method over the values of one size."""
    method, metric = methods.get(name), METRICS[name]
    rows, calls, slow = [], [], ""

    def began(at: dict[str, int]) -> dict[str, Any]:
        problem = problems[kind, at["N"], at["T"]]
        passes = method.cost(metric, at["probes"]) if isinstance(method, Stochastic) else None
        prepared = method.prepare(problem, settings.target())
        call = lambda: method.estimate(prepared, metric, passes)  # noqa: E731
        start = time.perf_counter()
        found = call()  # warms up
        calls.append((at, call))
        return {"passes": found.passes, "seconds": time.perf_counter() - start}

    for at in _points(settings, varied):
        case = {"task": settings.task, "kind": kind, "H": settings.H, "varied": varied, **at}
        case |= {"method": name, "title": method.title, "metric": metric}
        # Seconds come from all rows in turn, so rows are of use together only.
        rows.append(base.left_out(case, slow) if slow else base.row(case, lambda at=at: began(at), resumable=False))
        if rows[-1].get("seconds", 0) > settings.patience_seconds:
            slow = f"the size before took over patience_seconds ({settings.patience_seconds:g})"
    times = timing.in_turn([call for _, call in calls], settings.timing_seconds * len(calls))
    for (at, _), own in zip(calls, times, strict=True):
        row = next(row for row in rows if row[varied] == at[varied])
        row |= timing.quartiles("seconds", own)
    return rows
