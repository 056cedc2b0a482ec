"""Relative error against seconds."""

from __future__ import annotations

import pandas as pd

from ntkbench.figures.plotting import base, errors

COST = errors.Cost(
    column="seconds",
    label="seconds",
    slopes=(-0.5,),
    caption="against the seconds of one estimate after the first",
    least="Least time",
    spread=("seconds_q25", "seconds_q75"),
)


def draw(table: pd.DataFrame) -> base.Drawing:
    """Relative error against seconds, metric by metric, problem by problem."""
    return errors.draw(table, COST)
