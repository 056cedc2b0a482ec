"""Squared norm, alignment and effective rank of the trained 784-256-256-10 network (Hazelden 2025, figure 4).

On MNIST's test file, or on scikit-learn's digits (64-256-256-10) if MNIST is not available.
"""

from __future__ import annotations

import pandas as pd
from pydantic import Field, PositiveInt, field_validator

from ntkbench.measure.schema import ProblemLabel, check_probes
from ntkbench.studies import base
from ntkbench.studies.base import estimates

PLUGINS = estimates.PLUGINS
TIMED = True
METRICS = {
    "norm": ("hutchpp_paper",),
    "alignment": ("hutchpp_paper", "shared_probe_alignment"),
    "effective_rank": ("hutchpp_paper",),
}


class Settings(estimates.WithBaselines):
    """Grid of m.

    Attributes:
        problems: labels; the first one with available data is used.
        samples: nominal numbers of samples, of sketch and residual together.
    """

    problems: list[ProblemLabel] = Field(default=["mnist_mlp", "digits_mlp"], min_length=1)
    samples: list[PositiveInt] = Field(default=[6, 12, 24, 48, 96, 192, 384], min_length=1)

    @field_validator("samples")
    @classmethod
    def _enough_for_all_methods(cls, samples: list[int]) -> list[int]:
        return check_probes(samples, {name for names in METRICS.values() for name in names})


def run(settings: Settings) -> pd.DataFrame:
    """One row for each metric, method and m, and one for each metric and baseline."""
    subject = estimates.Subject(settings.problems)
    rows = []
    for metric, names in METRICS.items():
        rows += [estimates.baseline(settings, subject, metric, name) for name in ("direct", estimates.ONE_BY_ONE)]
        for name in names:
            rows += estimates.stochastic(settings, subject, metric, name, settings.samples)
    return base.table(rows)
