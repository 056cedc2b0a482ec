"""Distillation with the alignment of kernels as a regulariser: differences from no regulariser, by its weight."""

from __future__ import annotations

import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from ntkbench.figures.plotting import base, canvas, labels, styles

TABLE = "distillation"
COLUMNS: tuple[str, ...] = ("weight", "quantity", "value", "low", "high", "difference", "difference_low")
COLUMNS += ("difference_high", "verdict", "seeds")

COLOURS = {
    "better": styles.GREEN,
    "worse": styles.VERMILION,
    "no difference seen": styles.GREY,
    "not known": styles.GREY,
    "reference": styles.BLACK,
}


def draw(table: pd.DataFrame) -> base.Drawing:
    """A panel for each quantity: the mean difference from weight 0 against the weight, with its 95 % interval."""
    points = base.measured(table, "difference", "difference_low", "difference_high", "weight")
    points = points[points["verdict"].isin(COLOURS)]
    compared = points[points["verdict"] != "reference"]
    if not len(compared):
        return base.nothing(table[list(COLUMNS)], labels.why_not(table))
    quantities, weights = list(dict.fromkeys(points["quantity"])), sorted(compared["weight"].unique())
    seen = [verdict for verdict in COLOURS if (compared["verdict"] == verdict).any()]
    marks = [(Line2D([], [], color=COLOURS[verdict], marker="o", linestyle=""), verdict) for verdict in seen]
    figure, grid = canvas.sheet(
        [canvas.Row(2.3, above=0.45, below=0.35)],
        len(quantities),
        title=_title(compared),
        subtitle=base.settings_line(table),
        key=[("difference from no regulariser", marks)],
        gap=0.85,
        bottom=0.3,
    )
    for panel, quantity in zip(grid[0], quantities, strict=True):
        here = compared[compared["quantity"] == quantity]
        panel.axhline(0, color=styles.BLACK, linewidth=0.8)
        for _, row in here.iterrows():
            ends = [[row["difference"] - row["difference_low"]], [row["difference_high"] - row["difference"]]]
            place = weights.index(row["weight"])
            panel.errorbar([place], [row["difference"]], ends, color=COLOURS[row["verdict"]], marker="o", capsize=3)
        panel.set(xlim=(-0.6, len(weights) - 0.4), xlabel="weight of the regulariser")
        panel.xaxis.set_major_locator(FixedLocator(range(len(weights))))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{weights[round(place)]:g}"))
        canvas.title(panel, labels.short(quantity), "")
    grid[0][0].set_ylabel("difference")
    return base.Drawing(figure, points[list(COLUMNS)], _caption(points))


def _title(compared: pd.DataFrame) -> str:
    others = compared[compared["quantity"] != "alignment"]
    better, worse = ((others["verdict"] == verdict).sum() for verdict in ("better", "worse"))
    return (
        f"With the alignment as a regulariser, distillation is better in {better} of {len(others)} comparisons "
        f"({', '.join(others['quantity'].unique())}), and worse in {worse}"
    )


def _caption(points: pd.DataFrame) -> str:
    return (
        "A narrow network trained on the outputs of a wide one, with a weight times 1 - alignment of their kernels in "
        "the loss. Points: mean difference on held-out digits from students of the same seeds without it; bars: 95 % "
        f"intervals over {points['seeds'].max():g} students of one teacher, not corrected for several comparisons."
    )
