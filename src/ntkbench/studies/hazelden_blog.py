"""The blog post's two figures: Hutch++ for the trace, and alignment from shared probes against three Hutch++ traces.

The post compares two recurrent networks of 128 units on 100 trials of 10 steps; here they are a GRU before and after
training.
"""

from __future__ import annotations

import pandas as pd
from pydantic import Field, PositiveInt, field_validator

from ntkbench.measure.schema import ProblemLabel, check_probes
from ntkbench.studies import base
from ntkbench.studies.base import estimates

PLUGINS = estimates.PLUGINS
TIMED = True
SHARED = "shared_probe_alignment"
METHODS = {"trace": ("hutchpp",), "alignment": (SHARED, "hutchpp")}


class Settings(estimates.Settings):
    """Grid of samples.

    Attributes:
        problem: label of a problem with weights before and after training.
        samples: probes of shared-probe alignment; columns in the sketch of Hutch++, three products each.
        shared: further probes of shared-probe alignment, which takes a ninth of the passes of three Hutch++ traces.
    """

    problem: ProblemLabel = "gru_hazelden"
    samples: list[PositiveInt] = Field(default=[2, 5, 10, 20, 50, 100], min_length=1)
    shared: list[PositiveInt] = Field(default=[])

    @field_validator("samples")
    @classmethod
    def _enough_for_all_methods(cls, samples: list[int]) -> list[int]:
        return check_probes(samples, {name for names in METHODS.values() for name in names})


def run(settings: Settings) -> pd.DataFrame:
    """One row for each metric, method and number of samples."""
    subject = estimates.Subject([settings.problem])
    return base.table(
        row
        for metric, names in METHODS.items()
        for name in names
        for row in estimates.stochastic(
            settings, subject, metric, name, settings.samples + settings.shared * (name == SHARED)
        )
    )
