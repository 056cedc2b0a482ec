"""From the tidy table to tasks, a metric of a problem within a tolerance, and the times that solve them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ntkbench.figures.plotting import base

TOLERANCES = {"10 %": 1e-1, "1 %": 1e-2, "0.1 %": 1e-3, "exact": 1e-4}
"""Largest median relative error; the last one is for exact methods only, which get float32's rounding."""
TASK = ["problem", "setting", "metric", "tolerance"]
SIZES = ["family", "N", "O", "P", "n"]
COLUMNS = [*TASK, *SIZES, "effective_rank", "method", "backend", "title", "kind", "passes", "error", "seconds"]


def solutions(table: pd.DataFrame, tolerances: Mapping[str, float] = TOLERANCES) -> pd.DataFrame:
    """The least measured time of each method and backend for each task that it solves; nothing is interpolated.

    Args:
        table: what :func:`ntkbench.figures.plotting.base.checked` gives.
        tolerances: names to largest median errors; ``exact`` counts exact methods alone.
    """
    points = base.measured(table, "seconds", "error")
    made = []
    for name, largest in tolerances.items():
        good = points[points["error"] <= largest]
        good = good[good["kind"] == "exact"] if name == "exact" else good
        best = good.loc[good.groupby([*TASK[:3], "method", "backend"])["seconds"].idxmin()]
        made.append(best.assign(tolerance=name))
    return pd.concat(made, ignore_index=True)[COLUMNS]


def ratios(solved: pd.DataFrame) -> pd.Series:
    """Seconds over those of the fastest on the same task."""
    return solved["seconds"] / solved.groupby(TASK)["seconds"].transform("min")


def shares(solved: pd.DataFrame, factors: np.ndarray) -> pd.DataFrame:
    """Performance profiles (Dolan and More 2002): the share of tasks solved within a factor of the fastest.

    A task that a method does not solve, or was not measured on, counts as not solved; tasks that nobody solves do not
    count.

    Returns:
        one row for each method, backend and factor.
    """
    tasks = len(solved.drop_duplicates(TASK))
    ratio = ratios(solved)
    columns = ["method", "backend", "title", "kind", "factor", "share", "tasks"]
    made = []
    for (method, backend), own in solved.groupby(["method", "backend"]):
        within = np.searchsorted(np.sort(ratio[own.index]), factors, side="right")
        named = {"method": method, "backend": backend, "title": own["title"].iloc[0], "kind": own["kind"].iloc[0]}
        made.append(pd.DataFrame({**named, "factor": factors, "share": within / tasks, "tasks": tasks}))
    return pd.concat(made, ignore_index=True) if made else pd.DataFrame(columns=columns)
