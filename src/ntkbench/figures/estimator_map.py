"""Which estimator wins at equal passes: a map over effective rank, n / P and budget, for each metric."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ntkbench.figures.plotting import base, canvas, key, labels, styles
from ntkbench.figures.plotting.styles import Look, looks
from ntkbench.measure import laws

TABLE = "estimators_on_spectra"
COLUMNS: tuple[str, ...] = ("spectrum", "n", "P", "outputs_per_parameter", "effective_rank", "metric", "method")
COLUMNS += ("title", "kind", "passes", "passes_spent", "error", "error_q25", "error_q75", "seeds")

FLOOR = 1e-5
"""Errors below this are float32 rounding; methods below it tie."""
TIE = 1.96
"""Two median errors closer than this many standard deviations over seeds tie."""
MOST = 3
"""Maximum number of markers at one place of the map."""

SMALL: dict[str, Any] = {"fontsize": 8.5, "color": styles.GREY}

KEPT = ["metric", "outputs_per_parameter", "n", "P", "spectrum", "effective_rank", "passes", "place", "method", "title"]
KEPT += ["passes_spent", "error", "error_q25", "error_q75", "seeds", "tied"]


def draw(table: pd.DataFrame) -> base.Drawing:
    """The methods with the least median error by spectrum (rows) and budget (columns), per metric and shape of J."""
    points = base.measured(table, "error")
    if not len(points):
        return base.nothing(table, labels.why_not(table))
    plotted = _winners(points)
    style = {m: look for m, look in looks(points).items() if m in set(plotted["method"])}
    metrics = base.metrics_in(plotted)
    ratios = sorted(plotted["outputs_per_parameter"].unique())
    budgets = sorted(plotted["passes"].unique())
    names = plotted.groupby("spectrum")["effective_rank"].max().sort_values(ascending=False).index
    shown = [labels.short(name) for name in names]
    figure, grid = canvas.sheet(
        [canvas.Row(0.46 * len(names), above=0.6, below=0.25) for _ in metrics],
        len(ratios),
        title=_title(plotted),
        subtitle=base.settings_line(table),
        key=[("best, or tied", _entries(style)), ("how to read", _reading())],
        left=0.35 + canvas.text_width(shown, 9.5),
        gap=0.25,
    )
    for panels, metric in zip(grid, metrics, strict=True):
        for panel, ratio in zip(panels, ratios, strict=True):
            here = plotted[(plotted["metric"] == metric) & (plotted["outputs_per_parameter"] == ratio)]
            sizes = points[points["outputs_per_parameter"] == ratio]
            ranks = sizes.groupby("spectrum")["effective_rank"].first()
            _frame(panel, budgets, shown if panel is panels[0] else [""] * len(names))
            panel.text(len(budgets) - 0.42, -0.52, "eff.\nrank", va="bottom", linespacing=0.95, **SMALL)
            canvas.title(panel, labels.metric_label(metric), _shape(ratio, sizes))
            for y, name in enumerate(names):
                if name in ranks:
                    panel.text(len(budgets) - 0.42, y, f"{ranks[name]:.3g}", va="center", **SMALL)
                for x, passes in enumerate(budgets):
                    _place(panel, x, y, here[(here["spectrum"] == name) & (here["passes"] == passes)], style)
    for panel in grid[-1]:
        panel.set_xlabel("budget of passes")
    return base.Drawing(figure, plotted, _caption(plotted))


def _winners(points: pd.DataFrame) -> pd.DataFrame:
    """The best methods at each place of the map, best first: those that tie with the least error, at most ``MOST``."""
    place = ["metric", "outputs_per_parameter", "spectrum", "passes"]
    points = points.assign(drawn=points["error"].clip(lower=FLOOR))
    # Among methods that are exact to rounding, the one with the fewest passes comes first.
    points = points.sort_values([*place, "drawn", "passes_spent", "error", "method"])
    middle, deviation = laws.median_errors(points)
    points = points.assign(middle=np.where(points["drawn"] > FLOOR, middle, np.log(FLOOR)), deviation=deviation)
    groups = points.groupby(place, sort=False)
    first = groups[["middle", "deviation"]].transform("first")
    far = TIE * np.hypot(points["deviation"], first["deviation"])
    tie = (points["middle"] - first["middle"] <= far) & ((points["drawn"] <= FLOOR) | (first["middle"] > np.log(FLOOR)))
    points["tied"] = tie.groupby([points[column] for column in place]).transform("sum")
    points["place"] = groups.cumcount() + 1
    best = (points["place"] <= points["tied"]) & (points["place"] <= MOST)
    return points.loc[best, KEPT].reset_index(drop=True)


def _frame(panel: Axes, budgets: list[float], names: list[str]) -> None:
    panel.set(xlim=(-0.5, len(budgets) - 0.5 + 0.16 * len(budgets)), ylim=(len(names) - 0.5, -0.5))
    panel.set_xticks(range(len(budgets)), [f"{budget:g}" for budget in budgets])
    panel.set_yticks(range(len(names)), names)
    panel.tick_params(length=0)
    sns.despine(ax=panel, left=True, bottom=True)
    panel.grid(False)


def _shape(ratio: float, sizes: pd.DataFrame) -> str:
    return f"n / P = {ratio:g}:  {labels.sizes_label(sizes, 'n', 'P')}"


def _place(panel: Axes, x: int, y: int, best: pd.DataFrame, style: dict[str, Look]) -> None:
    """One place: the background in the winner's colour, its error, and markers of the methods that tie."""
    if not len(best):
        panel.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=canvas.SHADE, linewidth=0))
        return
    red, green, blue = (1 - 0.25 * (1 - c) for c in to_rgb(style[best.iloc[0]["method"]].colour))
    panel.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=(red, green, blue), linewidth=0))
    for i, row in enumerate(best.itertuples()):
        mark = style[row.method].line("torch") | {"linestyle": ""}
        mark["markersize"] *= 1.1 if i == 0 else 0.75
        panel.plot(x - 0.3 + i * 0.3, y - 0.18, **mark)
    panel.text(x - 0.4, y + 0.25, _percent(best.iloc[0]["error"]), va="center", fontsize=8.5)


def _percent(error: float) -> str:
    return "exact" if error < FLOOR else f"{100 * error:.1g} %" if error < 0.095 else f"{100 * error:.0f} %"


def _entries(style: dict[str, Look]) -> list[key.Entry]:
    return [(Line2D([], [], **look.line("torch") | {"linestyle": ""}), look.title) for look in style.values()]


def _reading() -> list[key.Entry]:
    small: dict[str, Any] = {"color": styles.GREY, "linestyle": "", "marker": "o"}
    return [
        (Line2D([], [], **small, markersize=6.5), "the least median error, written below it"),
        (Line2D([], [], **small, markersize=4.4), "tied with it, given the seeds"),
        (Line2D([], [], color=canvas.SHADE, linestyle="", marker="s", markersize=9), "no method takes so few passes"),
    ]


def _title(plotted: pd.DataFrame) -> str:
    """The method that most often has the least error, alone or tied, among those compared."""
    wins = plotted[plotted["place"] == 1]
    counts = wins["title"].value_counts()
    alone = int(((wins["tied"] == 1) & (wins["title"] == counts.index[0])).sum())
    first, count = labels.short(counts.index[0], 40), counts.iloc[0]
    return (
        f"Among matrix-free estimators, {first} has the least error at {count} of {len(wins)} places ({alone} surely)"
    )


def _caption(plotted: pd.DataFrame) -> str:
    wins = plotted[plotted["place"] == 1]
    return (
        "Estimators of least median error, and those that a test at 95 % does not distinguish from it (at most "
        f"{MOST} in all), by effective rank and budget. Exact and per-sample methods are left out. Errors below "
        f"{FLOOR:g} count as exact; the fewest passes come first. One is distinguished from all others at "
        f"{(wins['tied'] == 1).sum()} of {len(wins)} places."
    )
