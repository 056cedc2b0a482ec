"""Trace estimates of Hazelden's MLP and GRU against the nominal number of samples m (arXiv 2511.10796, figures 1-3).

For each problem, estimator and m: seconds, estimates and errors over reruns, and for comparison the cost of exact
traces.
"""

from __future__ import annotations

from typing import Literal

import pandas as pd
from pydantic import Field, PositiveInt, field_validator

from ntkbench.measure.schema import ProblemLabel, check_probes
from ntkbench.studies import base
from ntkbench.studies.base import estimates

PLUGINS = estimates.PLUGINS
TIMED = True
METHODS = ("hutchpp_paper", "one_sided_paper_reverse", "one_sided_paper_forward")
BASELINES = (estimates.ONE_BY_ONE, "direct", "structured_derivatives")


class Settings(estimates.Settings):
    """Problems and grids of m; six samples are the fewest that the estimators take.

    Attributes:
        problems: labels of the MLP and of the GRU.
        mlp, gru: large m, for the MLP and for the GRU.
        small: small m, for both; the paper's are 6 * int(linspace(1, 50, 20)).
    """

    problems: dict[Literal["mlp", "gru"], ProblemLabel] = Field(
        default={"mlp": "mlp_hazelden", "gru": "gru_hazelden"}, min_length=1
    )
    mlp: list[PositiveInt] = Field(default=[60, 93, 145, 225, 351, 546, 850, 1322, 2057, 3200], min_length=1)
    gru: list[PositiveInt] = Field(
        default=[60, 87, 127, 186, 272, 398, 581, 848, 1238, 1808, 2640, 3855, 5629, 8219, 12000], min_length=1
    )
    small: list[PositiveInt] = Field(default=[6 * int(1 + 49 * i / 19) for i in range(20)], min_length=1)

    @field_validator("mlp", "gru", "small")
    @classmethod
    def _enough_for_all_methods(cls, samples: list[int]) -> list[int]:
        return check_probes(samples, METHODS)


def run(settings: Settings) -> pd.DataFrame:
    """One row for each problem, method and m, and one for each problem and exact method."""
    rows = []
    for network, label in settings.problems.items():
        subject = estimates.Subject([label])
        columns = {"network": network}
        rows += [estimates.baseline(settings, subject, "trace", name, **columns) for name in BASELINES]
        for name in METHODS:
            first = 0
            for grid, samples in (("large", getattr(settings, network)), ("small", settings.small)):
                rows += estimates.stochastic(settings, subject, "trace", name, samples, first, **columns, grid=grid)
                first += len(samples) * settings.seeds
    return base.table(rows)
