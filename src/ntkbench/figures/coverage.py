"""Calibration of standard errors: the share of 95 % intervals that contain the exact value, by method and metric."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MultipleLocator

from ntkbench.figures.plotting import base, canvas, key, labels, styles
from ntkbench.figures.plotting.styles import Look, looks

TARGET = (0.90, 0.98)
"""Accepted coverage of a 95 % interval."""
FEW = 20
"""Below this effective rank few directions dominate a metric, and few probes reveal little of their spread."""
GROUPS = {"other": 0.0, "below": 0.26}
"""Groups of cells by effective rank, and how far below its method's line a group is drawn."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """Coverage with its Wilson interval, pooled over problems, backends and budgets; low effective ranks apart."""
    if "covered" not in table:
        return base.nothing(table, "The table has no column 'covered'.")
    rows = base.measured(table, "covered", "seeds")
    rows = rows[(rows["kind"] == "stochastic") & (rows["seeds"] >= 1)]
    if not len(rows):
        return base.nothing(table, "No method in the table gives intervals.")
    plotted = _pooled(rows)
    style = {m: look for m, look in looks(table).items() if m in set(plotted["method"])}
    lines = {m: i for i, m in enumerate(style)}
    metrics = base.metrics_in(plotted)
    titles = [look.title for look in style.values()]
    figure, ((*panels,),) = canvas.sheet(
        [canvas.Row(0.34 * len(lines) + 0.2, above=0.4, below=0.3)],
        len(metrics),
        title=_title(plotted),
        subtitle=base.settings_line(table).replace("median over", "over"),
        key=[("how to read", _reading(plotted))],
        left=0.3 + canvas.text_width(titles, 9.5),
    )
    low = min(0.8, math.floor(plotted["low"].min() * 20) / 20)
    for panel, metric in zip(panels, metrics, strict=True):
        panel.set(xlim=(low, 1.01), ylim=(len(lines) - 0.4, -0.6), yticks=range(len(lines)), xlabel="coverage [%]")
        panel.set_yticklabels(titles if panel is panels[0] else [])
        panel.tick_params(axis="y", length=0)
        panel.xaxis.set_major_locator(MultipleLocator(0.05 if low >= 0.8 else 0.1 if low >= 0.6 else 0.2))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
        panel.axvspan(*TARGET, color="#E3EFE8", linewidth=0, zorder=0)
        panel.axvline(0.95, color=canvas.PALE, linewidth=1.2, linestyle=(0, (1, 1.5)), zorder=1)
        canvas.heading(panel, labels.metric_label(metric), offset=6)
        _panel(panel, plotted[plotted["metric"] == metric], style, lines)
    return base.Drawing(figure, plotted, _caption(plotted))


def _pooled(rows: pd.DataFrame) -> pd.DataFrame:
    """One line for each method, metric and group of effective ranks."""
    from scipy.stats import binomtest

    rows = rows.assign(
        group=np.where(rows["effective_rank"] < FEW, "below", "other"),
        hits=(rows["covered"].astype(float) * rows["seeds"]).round(),
    )
    keys = ["metric", "method", "title", "group"]
    pooled = rows.groupby(keys, sort=False).agg(cells=("seeds", "size"), seeds=("seeds", "sum"), hits=("hits", "sum"))
    pooled = pooled.reset_index().sort_values(keys).reset_index(drop=True)
    tests = [binomtest(int(h), int(n)) for h, n in zip(pooled["hits"], pooled["seeds"], strict=True)]
    bounds = [test.proportion_ci(method="wilson") for test in tests]
    pooled["covered"] = pooled["hits"] / pooled["seeds"]
    pooled["low"], pooled["high"] = [b.low for b in bounds], [b.high for b in bounds]
    pooled["in_target"] = pooled["covered"].between(*TARGET)
    words = {"below": f"below {FEW}", "other": f"{FEW} or more"}
    return pooled.assign(effective_rank=pooled["group"].map(words)).drop(columns="hits")


def _panel(panel: Axes, points: pd.DataFrame, style: dict[str, Look], lines: dict[str, int]) -> None:
    for row in points.itertuples():
        look = style[row.method]
        y = lines[row.method] + GROUPS[row.group]
        marker = look.line("torch" if row.group == "other" else "jax") | {"linestyle": ""}
        panel.hlines(y, row.low, row.high, color=look.colour, linewidth=1.2, zorder=2)
        panel.plot(row.covered, y, **marker, zorder=3, clip_on=False)


def _reading(plotted: pd.DataFrame) -> list[key.Entry]:
    plain: dict[str, Any] = {"color": styles.GREY, "marker": "o", "markersize": 5.5}
    entries = []
    if "other" in set(plotted["group"]):
        entries.append((Line2D([], [], **plain), f"effective rank {FEW} or more"))
    if "below" in set(plotted["group"]):
        entries.append((Line2D([], [], **plain, markerfacecolor="white"), f"effective rank below {FEW}"))
    dotted = Line2D([], [], color=canvas.PALE, linewidth=1.2, linestyle=(0, (1, 1.5)))
    target = f"target, {100 * TARGET[0]:.0f} to {100 * TARGET[1]:.0f} %"
    return [*entries, (Patch(color="#E3EFE8", linewidth=0), target), (dotted, "nominal, 95 %")]


def _held(plotted: pd.DataFrame) -> float:
    """Percentage of all intervals that contain the exact value."""
    return float(100 * (plotted["covered"] * plotted["seeds"]).sum() / plotted["seeds"].sum())


def _title(plotted: pd.DataFrame) -> str:
    return (
        f"{_held(plotted):.1f} % of the 95 % intervals contain the exact value; coverage is within the target for "
        f"{plotted['in_target'].sum()} of {len(plotted)}"
    )


def _caption(plotted: pd.DataFrame) -> str:
    inside = int(plotted["in_target"].sum())
    outside = int(((plotted["high"] < TARGET[0]) | (plotted["low"] > TARGET[1])).sum())
    total = plotted["seeds"].sum()
    return (
        "Share of 95 % intervals that contain the exact value, pooled over problems, backends and budgets, for "
        f"{len(plotted)} pairs of method and metric. Bars: Wilson's 95 % intervals. "
        f"{inside} pairs are within the target of {100 * TARGET[0]:.0f} to {100 * TARGET[1]:.0f} %; for {outside} the "
        f"whole bar is outside. Overall, {_held(plotted):.1f} % of {int(total)} intervals contain the value."
    )
