"""Calibration of standard errors: the share of 95 % intervals that contain the exact value, by method and metric."""

from __future__ import annotations

import itertools
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
GROUPS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "other": (f"{FEW} or more", 0.0, {}),
    "below": (f"below {FEW}", 0.26, {"markerfacecolor": "white"}),
    "unknown": ("unknown", -0.26, {"markerfacecolor": canvas.PALE}),
}
"""Groups of cells by effective rank: what it is, how far below its method's line a group is drawn, and its markers."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """Coverage with its Wilson interval, pooled over problems, backends and budgets; a row of panels a setting."""
    if "covered" not in table:
        return base.nothing(table, "The table has no column 'covered'.")
    rows = base.measured(table, "covered", "seeds")
    rows = rows[(rows["kind"] == "stochastic") & (rows["seeds"] >= 1)]
    if not len(rows):
        return base.nothing(table, "No method in the table gives intervals.")
    plotted = _pooled(rows)
    style = {m: look for m, look in looks(table).items() if m in set(plotted["method"])}
    lines = {m: i for i, m in enumerate(style)}
    metrics, settings = base.metrics_in(plotted), list(dict.fromkeys(plotted["setting"]))
    titles = [look.title for look in style.values()]
    figure, grid = canvas.sheet(
        [canvas.Row(0.34 * len(lines) + 0.2, above=0.6 if any(settings) else 0.4, below=0.3)] * len(settings),
        len(metrics),
        title=_title(plotted),
        subtitle=base.settings_line(table),
        key=[("how to read", _reading(plotted))],
        left=0.3 + canvas.text_width(titles, 9.5),
    )
    low = min(0.8, math.floor(plotted["low"].min() * 20) / 20)
    for (i, setting), (j, metric) in itertools.product(enumerate(settings), enumerate(metrics)):
        panel = grid[i][j]
        panel.set(xlim=(low, 1.01), ylim=(len(lines) - 0.4, -0.6), yticks=range(len(lines)))
        panel.set_yticklabels(titles if j == 0 else [])
        panel.tick_params(axis="y", length=0)
        panel.xaxis.set_major_locator(MultipleLocator(0.05 if low >= 0.8 else 0.1 if low >= 0.6 else 0.2))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
        panel.axvspan(*TARGET, color="#E3EFE8", linewidth=0, zorder=0)
        panel.axvline(0.95, color=canvas.PALE, linewidth=1.2, linestyle=(0, (1, 1.5)), zorder=1)
        canvas.title(panel, labels.metric_label(metric), labels.short(setting, 30), offset=4 if setting else -7)
        _panel(panel, plotted[(plotted["metric"] == metric) & (plotted["setting"] == setting)], style, lines)
    for panel in grid[-1]:
        panel.set_xlabel("coverage [%]")
    return base.Drawing(figure, plotted, _caption(plotted))


def _pooled(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each method, metric, setting and group of effective ranks."""
    from scipy.stats import binomtest

    rank = rows["effective_rank"]
    rows = rows.assign(
        group=np.select([rank.isna(), rank < FEW], ["unknown", "below"], "other"),
        hits=(rows["covered"].astype(float) * rows["seeds"]).round(),
    )
    keys = ["metric", "setting", "method", "title", "group"]
    pooled = rows.groupby(keys, sort=False).agg(cells=("seeds", "size"), seeds=("seeds", "sum"), hits=("hits", "sum"))
    pooled = pooled.reset_index().sort_values(keys).reset_index(drop=True)
    tests = [binomtest(int(h), int(n)) for h, n in zip(pooled["hits"], pooled["seeds"], strict=True)]
    bounds = [test.proportion_ci(method="wilson") for test in tests]
    pooled["covered"] = pooled["hits"] / pooled["seeds"]
    pooled["low"], pooled["high"] = [b.low for b in bounds], [b.high for b in bounds]
    pooled["in_target"] = pooled["covered"].between(*TARGET)
    words = {group: said for group, (said, *_) in GROUPS.items()}
    return pooled.assign(effective_rank=pooled["group"].map(words)).drop(columns="hits")


def _panel(panel: Axes, points: pd.DataFrame, style: dict[str, Look], lines: dict[str, int]) -> None:
    for row in points.itertuples():
        look, (_, below, face) = style[row.method], GROUPS[row.group]
        y = lines[row.method] + below
        marker = look.line("torch") | {"linestyle": ""} | face
        panel.hlines(y, row.low, row.high, color=look.colour, linewidth=1.2, zorder=2)
        panel.plot(row.covered, y, **marker, zorder=3, clip_on=False)


def _reading(plotted: pd.DataFrame) -> list[key.Entry]:
    plain: dict[str, Any] = {"color": styles.GREY, "marker": "o", "markersize": 5.5}
    entries: list[key.Entry] = [
        (Line2D([], [], **plain, **face), f"effective rank {said}")
        for group, (said, _, face) in GROUPS.items()
        if group in set(plotted["group"])
    ]
    dotted = Line2D([], [], color=canvas.PALE, linewidth=1.2, linestyle=(0, (1, 1.5)))
    target = f"target, {100 * TARGET[0]:.0f} to {100 * TARGET[1]:.0f} %"
    return [*entries, (Patch(color="#E3EFE8", linewidth=0), target), (dotted, "nominal, 95 %")]


def _held(plotted: pd.DataFrame) -> float:
    """Percentage of all intervals that contain the exact value."""
    return float(100 * (plotted["covered"] * plotted["seeds"]).sum() / plotted["seeds"].sum())


def _title(plotted: pd.DataFrame) -> str:
    return (
        f"{_held(plotted):.1f} % of the 95 % intervals contain the exact value; coverage is within the target for "
        f"{plotted['in_target'].sum()} of {len(plotted)} groups"
    )


def _caption(plotted: pd.DataFrame) -> str:
    inside = int(plotted["in_target"].sum())
    outside = int(((plotted["high"] < TARGET[0]) | (plotted["low"] > TARGET[1])).sum())
    total = plotted["seeds"].sum()
    by = "method, metric" + (", effective rank and setting" if plotted["setting"].any() else " and effective rank")
    return (
        "Share of 95 % intervals that contain the exact value, pooled over problems, backends and budgets, for "
        f"{len(plotted)} groups by {by}. Bars: Wilson's 95 % intervals. "
        f"{inside} groups are within the target of {100 * TARGET[0]:.0f} to {100 * TARGET[1]:.0f} %; for {outside} the "
        f"whole bar is outside. Overall, {_held(plotted):.1f} % of {int(total)} intervals contain the value."
    )
