"""Relative error against Jacobian passes: the cost in theory, independent of the machine."""

from __future__ import annotations

import pandas as pd

from ntkbench.figures.plotting import base, errors

COST = errors.Cost(
    column="passes_spent",
    label="passes",
    slopes=(-0.5, -1.0),
    caption="against the passes spent, JVPs and VJPs over the batch",
    least="Fewest passes",
)


def draw(table: pd.DataFrame) -> base.Drawing:
    """Relative error against passes, metric by metric, problem by problem."""
    return errors.draw(table, COST)
