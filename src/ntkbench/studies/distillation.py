"""Distillation of a small network, with and without the alignment of its kernel with the teacher's as a regulariser.

A wide network is trained on scikit-learn's digits, and a narrow one on the outputs of the wide one for some images. The
loss of the latter is the cross-entropy with the teacher's probabilities, plus ``weight`` times 1 - alignment of the two
kernels on the batch, by a differentiable estimate from shared probes. The same seeds, and so the same initial weights
and batches, are used with each weight. Each row has the mean over seeds and the mean paired difference from the
``reference``, which has no regulariser, both with 95 % intervals. ``verdict`` is ``better`` or ``worse`` only if the
interval of the difference does not contain 0. Intervals are over students of one teacher, and are not corrected for
multiple comparisons. The regulariser is designed to raise the alignment; the question is whether the other quantities
improve. Everything runs on the CPU and in float32, except the exact alignments, which are in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator
from scipy.special import stdtrit

from ntkbench.studies import base

TIMED = False
BETTER = {"loss": -1, "accuracy": 1, "agreement": 1, "alignment": 1}
"""Quantities on held-out images, and the sign of a change for the better."""


class Settings(base.Settings):
    """Teacher, students, and their training.

    Attributes:
        seeds: number of students with each weight.
        weights: weights of the regulariser, the first one 0.
        teacher, student: widths of fully connected networks with two hidden layers.
        taught: number of gradient descent steps of the teacher.
        images: number of images that the student is trained on.
        steps, batch, rate: number of steps, batch size and learning rate of Adam.
        probes: number of probes of the alignment at each step.
        seen: number of held-out images that the exact alignment is computed on.
    """

    USES = ("seeds",)

    device: Literal["cpu"] = "cpu"
    seeds: int = Field(6, ge=2)
    weights: list[NonNegativeFloat] = Field(default=[0.0, 0.1, 1.0], min_length=2)
    teacher: PositiveInt = 128
    student: PositiveInt = 16
    taught: PositiveInt = 600
    images: PositiveInt = 100
    steps: PositiveInt = 300
    batch: int = Field(default=20, ge=2)
    rate: PositiveFloat = 5e-3
    probes: PositiveInt = 2
    seen: PositiveInt = 24

    @field_validator("weights")
    @classmethod
    def _first_is_none(cls, weights: list[float]) -> list[float]:
        if weights[0] != 0:
            raise ValueError(f"must begin with 0, which the others are compared with; got {weights}")
        return weights


def run(settings: Settings) -> pd.DataFrame:
    """One row for each weight and quantity."""
    school = base.Once(lambda: School(settings))
    without = base.Once(lambda: school().students(0.0))
    return base.table(
        row
        for weight in settings.weights
        for row in base.rows({"weight": weight}, functools.partial(_measure, school, without, weight))
    )


class School:
    """The teacher, and the data on which its students are evaluated."""

    def __init__(self, settings: Settings) -> None:
        """Train the teacher."""
        import torch

        from ntkbench.networks import classifiers, initialisation
        from ntkbench.studies.base import descent, distilling, pntk

        self._settings = settings
        self._teacher = initialisation.seeded(lambda: classifiers.network("fc", settings.teacher, 10), 0)
        loss = torch.nn.functional.cross_entropy
        descent.Descent(self._teacher, loss, rate=0.05, momentum=0.9, batch=64, seed=0).to(settings.taught)
        self._x = pntk.training_digits()[0][: settings.images]
        self._judge = distilling.Judge(self._teacher, self._student(0), settings.seen)

    def students(self, weight: float) -> list[dict[str, float]]:
        """The results of a student for each seed."""
        from ntkbench.studies.base import distilling

        s, found = self._settings, []
        for seed in range(s.seeds):
            student = self._student(seed)
            distilling.distilled(
                student,
                self._teacher,
                self._x,
                weight=weight,
                steps=s.steps,
                batch=s.batch,
                probes=s.probes,
                rate=s.rate,
                seed=seed,
            )
            found.append(self._judge(student))
        return found

    def _student(self, seed: int) -> Any:
        from ntkbench.networks import classifiers, initialisation

        return initialisation.seeded(lambda: classifiers.network("fc", self._settings.student, 10), seed + 1)


def _measure(
    school: base.Once[School], without: base.Once[list[dict[str, float]]], weight: float
) -> list[dict[str, Any]]:
    first = without()
    return compared(school().students(weight) if weight else first, first)


def compared(found: Sequence[dict[str, float]], first: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """Rows by quantity, for students with a regulariser and students of the same seeds without one."""
    rows = []
    for quantity, sign in BETTER.items():
        values, before = (np.array([each[quantity] for each in some]) for some in (found, first))
        mean, low, high = interval(values)
        change, least, most = interval(values - before)
        row = {"quantity": quantity, "value": mean, "low": low, "high": high, "spread": float(values.std(ddof=1))}
        row |= {"difference": change, "difference_low": least, "difference_high": most}
        said = "reference" if found is first else verdict(sign, least, most)
        rows.append(row | {"verdict": said, "seeds": len(values)})
    return rows


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """A mean, and the ends of its 95 % interval by Student's t."""
    half = float(stdtrit(len(values) - 1, 0.975)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return mean, mean - half, mean + half


def verdict(sign: int, low: float, high: float) -> str:
    """The verdict on an interval of differences; ``sign`` is the sign of an improvement."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "not known"
    if low <= 0 <= high:
        return "no difference seen"
    return "better" if low * sign > 0 else "worse"
