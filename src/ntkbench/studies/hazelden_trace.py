"""Trace estimates of Hazelden's MLP and GRU against the nominal number of samples m (arXiv 2511.10796, figures 1-3).

For each problem, estimator and m: seconds, estimates and errors over reruns, and for comparison the cost of exact
traces. Rows of one-sided estimators have ``off_diagonal``, on which their variance depends (:func:`off_diagonal`).
"""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field, PositiveInt, field_validator

from ntkbench.measure.schema import ProblemLabel, check_probes
from ntkbench.methods.base.sides import Side, factor
from ntkbench.operators import arrays, linearise
from ntkbench.options import Target
from ntkbench.studies import base
from ntkbench.studies.base import estimates

PLUGINS = estimates.PLUGINS
TIMED = True
SIDES: dict[str, Side] = {"one_sided_paper_reverse": "reverse", "one_sided_paper_forward": "forward"}
METHODS = ("hutchpp_paper", *SIDES)
BASELINES = (estimates.ONE_BY_ONE, "direct", "structured_derivatives")
PRODUCTS = 256
"""Products with random signs from which the diagonal of G is estimated."""


class Settings(estimates.WithBaselines):
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
            first, known = 0, base.Once(functools.partial(_known, subject, name, settings.target()))
            for grid, samples in (("large", getattr(settings, network)), ("small", settings.small)):
                rows += estimates.stochastic(
                    settings, subject, "trace", name, samples, first, known, **columns, grid=grid
                )
                first += len(samples) * settings.seeds
    return base.table(rows)


def _known(subject: estimates.Subject, name: str, target: Target) -> dict[str, float]:
    return {"off_diagonal": off_diagonal(subject, SIDES[name], target)} if name in SIDES else {}


def off_diagonal(subject: estimates.Subject, side: Side, target: Target) -> float:
    """(||G||_F^2 - sum_i G_ii^2) / (tr G)^2, with G = Theta for ``reverse`` and G = J^T J for ``forward``.

    The relative variance of the mean of ||A u||^2 over k random signs u is 2 / k times this number, where G = A^T A.
    Norm and trace are the exact ones. The squared diagonal is the mean over all pairs of :data:`PRODUCTS` products with
    random signs, without bias.
    """
    j, exact = linearise(subject.problem(), "theta_0", target), subject.exact()
    A, rng = factor(j, side), j.rng(0)
    second = fourth = np.zeros(A.dim)
    for k in j.blocks(PRODUCTS):
        squares = arrays.to_numpy(A.adjoint(rng.sign(k, A.image_dim)), np.float64) ** 2
        second, fourth = second + squares.sum(0), fourth + (squares**2).sum(0)
    diagonal = float((second**2 - fourth).sum()) / (PRODUCTS * (PRODUCTS - 1))
    return (exact["norm"] ** 2 - diagonal) / exact["trace"] ** 2
