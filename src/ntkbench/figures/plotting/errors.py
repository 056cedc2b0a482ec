"""Errors against cost: families of methods on the tasks with the most measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from ntkbench.figures.plotting import base, canvas, key, labels, styles, tasks
from ntkbench.figures.plotting.styles import backends_in
from ntkbench.measure import laws

FLOOR = 1e-8
"""Smaller errors are drawn at this value: exact methods may agree to the last bit, and a log axis has no zero."""
COLUMNS, PANELS = 3, 6
GOAL = 0.01
"""Error of the title."""
CASE = ["problem", "setting", "metric"]
KINDS = {"exact": "exact methods", "stochastic": "estimates"}
COLOURS = (styles.ORANGE, styles.SKY, styles.WINE, styles.BLACK, styles.INDIGO, styles.OLIVE)
SERIES = {
    "exact": tasks.FAMILIES["exact"],
    "approximate": tasks.FAMILIES["approximate"],
    **{
        title: styles.Look(title, title, "stochastic", colour, marker)
        for (title, marker), colour in zip(tasks.ESTIMATOR_MARKS.items(), COLOURS, strict=True)
    },
}
"""Looks of the families."""

KEPT = ["problem", "setting", "n", "P", "metric", "method", "title", "kind", "backend", "passes", "status", "reason"]
LOST = ["timeout", "out_of_memory", "failed"]
DRAWN = ["error", "error_q25", "error_q75"]
SLOPES = {-0.5: "slope \N{MINUS SIGN}½, the Monte Carlo rate", -1.0: "slope \N{MINUS SIGN}1, the rate of Hutch++"}
"""Slopes of guide lines, with their labels."""
DOTS = {-0.5: (0, (1, 1.5)), -1.0: (0, (4, 2))}


@dataclass(frozen=True)
class Cost:
    """A cost that errors are drawn against.

    Attributes:
        column: column of the tidy table.
        label: label of the axis, also in the title.
        slopes: slopes of guide lines, keys of :data:`SLOPES`.
        caption: what the horizontal axis is, and how to read it.
        least: words for the least cost, for the title.
        spread: columns of quartiles of the cost, if it varies.
    """

    column: str
    label: str
    slopes: Sequence[float]
    caption: str
    least: str
    spread: tuple[str, ...] = ()


def draw(table: pd.DataFrame, cost: Cost) -> base.Drawing:
    """Relative error against a cost: families of methods, a panel for each of the tasks with the most points."""
    rows, left_out = _with_a_choice(table, cost)
    rows = rows.sort_values(["family", "n", "problem", "setting", "metric", "method", "backend", "passes"])
    plotted = rows[[*KEPT, cost.column, *cost.spread, *DRAWN, "seeds"]].copy()
    for column in DRAWN:
        plotted[f"{column}_drawn"] = plotted[column].clip(lower=FLOOR)
    points = base.measured(plotted, cost.column, "error")
    if not len(points):
        return base.nothing(plotted, labels.why_not(table))
    plotted["series"] = [tasks.ESTIMATORS.get(m, k) for m, k in zip(plotted["method"], plotted["kind"], strict=True)]
    points = plotted.loc[points.index]
    points["best"] = _best(points, cost)
    cases, knee, won = _cases(points), _knee(points), _won(rows, cost)
    rows_of_panels = canvas.in_rows(cases, COLUMNS)
    figure, grid = canvas.sheet(
        [canvas.Row(2.0, above=0.6, below=0.35) for _ in rows_of_panels],
        min(COLUMNS, len(rows_of_panels[0])),
        title=_title(points, cost, won),
        subtitle=base.settings_line(table),
        key=[*_families(points), ("how to read", _reading(points, cost, knee))],
    )
    low, high = canvas.limits(points[[f"{c}_drawn" for c in DRAWN]].stack())
    low = max(low, FLOOR / 8)
    high *= 4 if plotted["status"].isin(LOST).any() else 1  # room for the counts in the corner
    for panels, row in zip(grid, rows_of_panels, strict=True):
        canvas.hide(panels[len(row) :])
        panels[0].set_ylabel("relative error")
        for panel, case in zip(panels, row, strict=False):
            here = plotted[(plotted[CASE] == list(case)).all(axis=1)]
            own = points[points.index.isin(here.index)]
            spent = canvas.limits(own[[cost.column, *cost.spread]].stack())
            panel.set(xscale="log", yscale="log", xlim=spent, ylim=(low, high), xlabel=cost.label)
            problem, setting, metric = case
            name = f"{labels.case_label(problem, setting)}:  {labels.sizes_label(here, 'n', 'P')}"
            canvas.title(panel, labels.metric_label(metric), name)
            _axes(panel, knee)
            panel.tick_params(labelleft=panel is panels[0])
            _panel(panel, here, own, cost)
    return base.Drawing(figure, plotted, _caption(points, cost, knee, len(cases), won) + left_out)


def _cases(points: pd.DataFrame) -> list[tuple[str, str, str]]:
    """The tasks with the most methods and points, at least one of each metric, in the order of metrics and sizes."""
    found = points.groupby(CASE, sort=False).agg(methods=("method", "nunique"), points=("n", "size"), n=("n", "first"))
    found = found.sort_values(["methods", "points"], ascending=False, kind="stable")
    metric = found.index.get_level_values("metric")
    first = found[~metric.duplicated()]
    chosen = pd.concat([first, found.drop(first.index)])[:PANELS]
    order = base.metrics_in(points)
    return sorted(chosen.index, key=lambda case: (order.index(case[2]), chosen.loc[case, "n"], case))


def _best(points: pd.DataFrame, cost: Cost) -> pd.Series:
    """Whether a point is its family's most accurate at its cost or less, task by task."""
    ordered = points.sort_values([cost.column, "error"])
    least = ordered.groupby([*CASE, "series"], sort=False)["error"].cummin()
    before = least.groupby([ordered[c] for c in [*CASE, "series"]], sort=False).shift(fill_value=math.inf)
    return (ordered["error"] < before).reindex(points.index)


def _won(rows: pd.DataFrame, cost: Cost) -> pd.DataFrame:
    """The method of the least cost to an error of 1 % for each task, by fitted laws; approximations do not count."""
    low, high = cost.spread or (cost.column, cost.column)
    rows = rows[rows["kind"] != "approximate"]
    costs = rows.assign(seconds=rows[cost.column], seconds_q25=rows[low], seconds_q75=rows[high])
    return tasks.winners(costs, {f"{100 * GOAL:g} %": GOAL}, laws.DRIFT if cost.spread else 0.0)


def _title(points: pd.DataFrame, cost: Cost, won: pd.DataFrame) -> str:
    """Which kinds of methods reach an error of 1 % at the least cost, on how many tasks."""
    if not len(won):
        return f"Relative error against {cost.label}: no exact method or estimate is within {100 * GOAL:g} %"
    counts = ", ".join(f"{KINDS.get(kind, kind)} on {count}" for kind, count in won["kind"].value_counts().items())
    total = len(points.drop_duplicates(CASE))
    return f"{cost.least} to {100 * GOAL:g} %: {counts} of {total} tasks"


def _with_a_choice(table: pd.DataFrame, cost: Cost) -> tuple[pd.DataFrame, str]:
    """The rows of problems on which error can be traded for cost, and a sentence on the others.

    Those are problems with a measured point of a method that is not exact; all problems if there is none.
    """
    case = ["problem", "setting"]
    points = base.measured(table, cost.column, "error")
    chosen = points.loc[points["kind"] != "exact", case].drop_duplicates()
    if not len(chosen):
        return table, ""
    here = pd.MultiIndex.from_frame(table[case]).isin(pd.MultiIndex.from_frame(chosen))
    lost = table[~table["problem"].isin(points["problem"])].groupby("problem")
    unmeasured = [f"{labels.name_label(name)} ({labels.why_not(rows, most=1)})" for name, rows in lost]
    text = " Problems with exact methods alone are in the figure of exact costs." if (~here).any() else ""
    return table[here], text + (f" Not measured: {'; '.join(unmeasured)}." if unmeasured else "")


def _axes(panel: Axes, knee: float | None) -> None:
    canvas.decades(panel.xaxis, *panel.get_xlim())
    if knee:
        canvas.compress(panel, knee)
    else:
        canvas.decades(panel.yaxis, *panel.get_ylim(), most=5)
    panel.yaxis.set_major_formatter(FuncFormatter(_error_tick))


def _panel(panel: Axes, cells: pd.DataFrame, points: pd.DataFrame, cost: Cost) -> None:
    lost = cells[cells["status"].isin(LOST)].groupby("status").size()
    if len(lost):
        text = "not drawn: " + ", ".join(f"{count} {labels.status_label(status)}" for status, count in lost.items())
        panel.text(0.98, 0.97, text, transform=panel.transAxes, ha="right", va="top", fontsize=8.5, color=styles.GREY)
    _guides(panel, points[points["kind"] == "stochastic"], cost)
    others = points[~points["best"]]
    panel.scatter(others[cost.column], others["error_drawn"], s=9, color=canvas.PALE, zorder=2, clip_on=False)
    for name, line in points[points["best"]].groupby("series", sort=False):
        look, line = _look(str(name)), line.sort_values(cost.column)
        thin: dict[str, Any] = {"color": look.colour, "linewidth": 0.8, "zorder": 2.5}
        if look.kind == "stochastic":
            panel.plot(line[cost.column], line["error_drawn"], color=look.colour, zorder=3)
        for backend, own in line.groupby("backend"):
            drawn = look.line(str(backend)) | {"linestyle": ""}
            panel.plot(own[cost.column], own["error_drawn"], **drawn, zorder=4, clip_on=False)
        panel.vlines(line[cost.column], line["error_q25_drawn"], line["error_q75_drawn"], **thin)
        if cost.spread:
            panel.hlines(line["error_drawn"], *(line[column] for column in cost.spread), **thin)


def _look(series: str) -> styles.Look:
    return SERIES.get(series) or styles.Look(series, series, "stochastic", styles.GREY, "v")


def _families(points: pd.DataFrame) -> key.Key:
    """The key of the families, exact and approximate ones first."""
    there = set(points["series"])
    known = [name for name in SERIES if name in there]
    groups: dict[str, list[key.Entry]] = {}
    for name in [*known, *sorted(there - set(known))]:
        look = _look(name)
        style = look.line("torch") | ({} if look.kind == "stochastic" else {"linestyle": ""})
        groups.setdefault("estimates" if look.kind == "stochastic" else "kernels", []).append(
            (Line2D([], [], **style), look.title)
        )
    return list(groups.items())


def _guides(panel: Axes, points: pd.DataFrame, cost: Cost) -> None:
    """Guide lines with theory's slopes, from one point above the cheapest stochastic method; the first is above all."""
    if len(points):
        x = pd.Series([points[cost.column].min(), panel.get_xlim()[1]])
        height = 2 * (points["error_drawn"] * (points[cost.column] / x[0]) ** -cost.slopes[0]).max()
        for slope in cost.slopes:
            y = height * (x / x[0]) ** slope
            panel.plot(x, y, color=canvas.PALE, linewidth=1.2, linestyle=DOTS[slope], zorder=1)


def _knee(points: pd.DataFrame) -> float | None:
    """The decade below which only exact methods have errors, if a wide gap separates them from the others."""
    others = points[points["kind"] != "exact"]
    if not len(others):
        return None
    knee = 10.0 ** math.floor(math.log10(others[[f"{c}_drawn" for c in DRAWN]].min().min()))
    return knee if points["error_drawn"].min() < knee / 10 else None


def _reading(points: pd.DataFrame, cost: Cost, knee: float | None) -> list[key.Entry]:
    entries: list[key.Entry] = key.backend_entries(backends_in(points), linestyle=False)
    if not points["best"].all():
        dot = Line2D([], [], color=canvas.PALE, marker="o", markersize=3, linestyle="")
        entries.append((dot, "less accurate points of a family"))
    if (points["kind"] == "stochastic").any():
        for slope in cost.slopes:
            entries.append((Line2D([], [], color=canvas.PALE, linewidth=1.2, linestyle=DOTS[slope]), SLOPES[slope]))
    if knee:
        entries.append((Patch(color="#E6E6E6", linewidth=0), "decades squeezed to ¼"))
    return entries


def _error_tick(value: float, _: int) -> str:
    return ("\N{LESS-THAN OR EQUAL TO}" if value <= FLOOR * 1.01 else "") + labels.power_label(value)


def _caption(points: pd.DataFrame, cost: Cost, knee: float | None, panels: int, won: pd.DataFrame) -> str:
    clipped = int((points["error"] < FLOOR).sum())
    text = (
        f"Relative error {cost.caption}: each family's most accurate method at a cost, medians over seeds with "
        f"quartiles. Guide lines have theory's slopes. {panels} of {len(points.drop_duplicates(CASE))} tasks are drawn."
        " The title is by laws fitted to all budgets of exact methods and estimates; approximations state no error and "
        f"do not count. Undecided: {(won['fastest'] < tasks.SURE).sum()} of {len(won)}."
    )
    if knee:
        text += f" Below {knee:g}, with exact methods only, decades are squeezed."
    if clipped:
        text += f" {clipped} errors below {FLOOR:g} are drawn at {FLOOR:g}."
    return text
