"""The NTK of a small decoder-only transformer along its training: the whole, its layers, and its factors K and P.

Trace, norm, effective rank, and alignment with the kernel before training, at some steps of the problem's training
recipe. Parts of the parameters are the embeddings, the attention and the perceptron of each block, each with its norm,
and the readout; their kernels add up to the whole. All kernels are estimated with the same probes at all steps, so that
ratios to the first step have paired standard errors. A step takes one VJP per probe, and one JVP per probe and part.

Theta without the parameters that have no factors is P K P* (see :mod:`ntkbench.methods.base.factors`). K, the
representation, is exact and takes a forward pass. The metrics of P P*, the dynamics, come from as many separate probes,
drawn anew at each step. Each takes one pass at this step and one at step 0.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from pydantic import Field, NonNegativeInt, field_validator

from ntkbench import problems
from ntkbench.errors import BadInput, Unavailable
from ntkbench.estimate import Estimate
from ntkbench.estimators import paired
from ntkbench.measure.schema import ProblemLabel
from ntkbench.metrics import METRICS
from ntkbench.operators import linearise
from ntkbench.problem import Problem, split
from ntkbench.problems.base import Definition, training
from ntkbench.studies import base

TIMED = False
PLUGINS = ("ntkbench.problems.language",)
WHOLE = "all parameters"
FACTORS = ("K", "P")
"""Names of the factors in the column ``part``; P stands for P P*."""
LAYERS = {"embedding": "embedding", "position": "embedding", "norm": "readout", "head": "readout"}
"""Modules outside the blocks, and the parts that they belong to; other modules are separate parts."""
SUBLAYERS = {"norm1": "attention", "attention": "attention", "norm2": "MLP", "mlp": "MLP"}
"""The same inside a block."""


class Settings(base.Settings):
    """The trained problem, and when it is measured.

    Attributes:
        problems: labels of problems that are trained by Adam; the first one with available data is used.
        steps: training steps after which the network is measured, from 0 on.
        probes: number of probes, the same for all kernels of parts of the parameters.
    """

    USES = base.OF_TARGET

    problems: list[ProblemLabel] = Field(
        default=["transformer_small[N=4,T=16]", "transformer_flipflop[N=16]"], min_length=1
    )
    steps: list[NonNegativeInt] = Field(default=[0, 1, 3, 10, 30, 100, 300, 1000, 1500], min_length=2)
    probes: int = Field(default=100, ge=2)

    @field_validator("steps")
    @classmethod
    def _steps_rise(cls, steps: list[int]) -> list[int]:
        if steps[0] != 0 or steps != sorted(steps):
            raise ValueError(f"must begin with 0 and rise; got {steps}")
        return steps


def run(settings: Settings) -> pd.DataFrame:
    """One row for each step, part of the parameters or factor, and metric; one with the reason for a failed step."""
    course = base.Once(lambda: Course(settings))
    named = " or ".join(settings.problems)
    return base.table(
        row
        for step in settings.steps
        for row in base.rows({"problems": named, "step": step}, functools.partial(_look, course, step))
    )


def _look(course: base.Once[Course], step: int) -> list[dict[str, Any]]:
    return course().look(step)


class Course:
    """One network along its training."""

    def __init__(self, settings: Settings) -> None:
        """Record the quantities at initialisation; does not train yet.

        Raises:
            BadInput: the problem is not trained by Adam.
            Unavailable: no problem has available data.
        """
        self._settings = settings
        self._label, definition = _first_available(settings.problems)
        if not isinstance(definition.training, training.Adam):
            raise BadInput(f"{self._label} is not trained by Adam")
        self._trained, self._x = definition.module, definition.x
        self._network = definition.part or definition.module
        self._parts = parts(name for name, _ in self._network.named_parameters())
        self._course = definition.training.course(self._trained)
        self._at = next(self._course)
        j = linearise(self._problem(), "theta_0", settings.target())
        self._probes = j.rng(0).sign(settings.probes, j.n)
        self._seen = {part: paired.SharedProbes(self._probes) for part in (WHOLE, *self._parts)}
        self._first: dict[str, Estimate] = {}
        self._start = self._problem()
        self._at_start = self._metrics()

    def look(self, step: int) -> list[dict[str, Any]]:
        """Rows after this number of steps, which must not be smaller than in an earlier call.

        Raises:
            BadInput: the recipe has fewer steps.
        """
        if step == 0:
            return self._at_start
        while self._at[0] < step:
            after = next(self._course, None)
            if after is None:
                raise BadInput(f"{self._label} is trained for fewer than {step} steps")
            self._at = after
        return self._metrics()

    def _problem(self) -> Problem:
        """The network at its current weights."""
        own = dict(self._network.named_parameters())
        weights = {
            name: w.detach().double().numpy().copy() for name, w in self._trained.named_parameters() if name in own
        }
        theta, fixed = split(self._network, weights)
        return Problem(self._label, self._network, self._x, theta, fixed_0=fixed)

    def _metrics(self) -> list[dict[str, Any]]:
        """Rows of all parts at the current weights."""
        problem = self._problem()
        j = linearise(problem, "theta_0", self._settings.target())
        g = j.vjp(self._probes)
        ends = list(itertools.accumulate((problem.theta_0[name].size for name in j.names), initial=0))
        columns = {name: slice(*pair) for name, pair in zip(j.names, itertools.pairwise(ends), strict=True)}
        images, sizes = {}, {WHOLE: problem.P}
        for part, names in self._parts.items():
            w = g * 0
            for name in names:
                w[:, columns[name]] = g[:, columns[name]]
            images[part], sizes[part] = j.jvp(w), sum(problem.theta_0[name].size for name in names)
        images = {WHOLE: sum(images.values()), **images}
        shared = {"problem": self._label, **base.sizes(problem), "loss": self._at[1], "probes": len(self._probes)}
        rows = [
            {"part": part, "parameters": sizes[part], **_columns(one, len(self._probes))}
            for part, image in images.items()
            for one in self._seen[part].compare(image)
        ]
        return [shared | row for row in (*rows, *self._factors(problem))]

    def _factors(self, problem: Problem) -> list[dict[str, Any]]:
        """Rows of K and P P* at the current weights; the alignment is with those at step 0."""
        from ntkbench.methods.base import factors
        from ntkbench.methods.base.layerwise import TracedProblem

        both = dataclasses.replace(problem, theta_f=self._start.theta_0, fixed_f=self._start.fixed_0)
        found = factors.of_layers(
            TracedProblem(both, self._settings.target()), list(METRICS), self._settings.probes, self._at[0]
        )
        left_out = sum(problem.theta_0[name].size for name in found.left_out)
        rows = []
        for part, estimates in (("K", found.K), ("P", found.P)):
            for metric, one in estimates.items():
                first = self._first.setdefault(f"{part} {metric}", one)
                row = {"part": part, "parameters": problem.P - left_out, "metric": metric, "value": one.value}
                rows.append(row | dict(zip(("low", "high"), one.interval(), strict=True)) | _ratio(one, first))
        return rows


def _columns(one: paired.Comparison, probes: int) -> dict[str, Any]:
    """A metric with its 95 % interval, and its ratio to that at step 0."""
    found = Estimate(one.value, one.standard_error, None, "", metric=one.quantity, degrees=probes - 1)
    low, high = found.interval()
    ratio = {"ratio": one.ratio, "ratio_standard_error": one.ratio_standard_error}
    return {"metric": one.quantity, "value": one.value, "low": low, "high": high, **ratio}


def _ratio(one: Estimate, first: Estimate) -> dict[str, Any]:
    """The ratio to an independent estimate at step 0; 1 there."""
    ratio = one.value / first.value
    relative = (0.0 if one is first else (each.standard_error or 0.0) / each.value for each in (one, first))
    return {"ratio": ratio, "ratio_standard_error": ratio * math.hypot(*relative)}


def _first_available(labels: Sequence[str]) -> tuple[str, Definition]:
    """The first problem with available data, before it is trained."""
    for label in labels[:-1]:
        try:
            return label, problems.define(label)
        except Unavailable:
            continue
    return labels[-1], problems.define(labels[-1])


def parts(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of parameters by the parts of a transformer that they belong to, in the order of the network."""
    found: dict[str, list[str]] = {}
    for name in names:
        module, *inside = name.split(".")
        part = LAYERS.get(module, module)
        if module == "blocks":
            part = f"block {int(inside[0]) + 1}, {SUBLAYERS.get(inside[1], inside[1])}"
        found.setdefault(part, []).append(name)
    return found
