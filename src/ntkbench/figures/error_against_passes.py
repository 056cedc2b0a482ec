"""Relative error against passes, the theoretical cost: families of methods on the tasks with the most points."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from ntkbench.figures.plotting import base, canvas, key, labels, styles, tasks
from ntkbench.figures.plotting.styles import backends_in

COST = "passes_spent"
FLOOR = 1e-8
"""Smaller errors are drawn at this value: exact methods may agree to the last bit, and a log axis has no zero."""
COLUMNS, PANELS = 3, 6
GOAL = 0.01
"""Error to which the title compares costs."""
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


def draw(table: pd.DataFrame) -> base.Drawing:
    """Families of methods, a panel for each of the tasks with the most points."""
    rows, left_out = _with_a_choice(table)
    rows = rows.sort_values(["family", "n", "problem", "setting", "metric", "method", "backend", "passes"])
    plotted = rows[[*KEPT, COST, *DRAWN, "seeds"]].copy()
    for column in DRAWN:
        plotted[f"{column}_drawn"] = plotted[column].clip(lower=FLOOR)
    points = base.measured(plotted, COST, "error")
    if not len(points):
        return base.nothing(plotted, labels.why_not(table))
    plotted["series"] = [tasks.ESTIMATORS.get(m, k) for m, k in zip(plotted["method"], plotted["kind"], strict=True)]
    points = plotted.loc[points.index]
    points["best"] = _best(points)
    cases, knee, won = _cases(points), _knee(points), _won(rows)
    rows_of_panels = canvas.in_rows(cases, COLUMNS)
    figure, grid = canvas.sheet(
        [canvas.Row(2.0, above=0.6, below=0.35) for _ in rows_of_panels],
        min(COLUMNS, len(rows_of_panels[0])),
        title=_title(points, won),
        subtitle=base.settings_line(table),
        key=[*_families(points), ("how to read", _reading(points, knee))],
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
            spent = canvas.limits(own[COST])
            panel.set(xscale="log", yscale="log", xlim=spent, ylim=(low, high), xlabel="passes")
            problem, setting, metric = case
            name = f"{labels.case_label(problem, setting)}:  {labels.sizes_label(here, 'n', 'P')}"
            canvas.title(panel, labels.metric_label(metric), name)
            _axes(panel, knee)
            panel.tick_params(labelleft=panel is panels[0])
            _panel(panel, here, own)
    return base.Drawing(figure, plotted, _caption(points, knee, len(cases), won) + left_out)


def _cases(points: pd.DataFrame) -> list[tuple[str, str, str]]:
    """The tasks with the most methods and points, at least one of each metric, in the order of metrics and sizes."""
    found = points.groupby(CASE, sort=False).agg(methods=("method", "nunique"), points=("n", "size"), n=("n", "first"))
    found = found.sort_values(["methods", "points"], ascending=False, kind="stable")
    metric = found.index.get_level_values("metric")
    first = found[~metric.duplicated()]
    chosen = pd.concat([first, found.drop(first.index)])[:PANELS]
    order = base.metrics_in(points)
    return sorted(chosen.index, key=lambda case: (order.index(case[2]), chosen.loc[case, "n"], case))


def _best(points: pd.DataFrame) -> pd.Series:
    """Whether each point is the most accurate of its task and family at its cost or less."""
    ordered = points.sort_values([COST, "error"])
    least = ordered.groupby([*CASE, "series"], sort=False)["error"].cummin()
    before = least.groupby([ordered[c] for c in [*CASE, "series"]], sort=False).shift(fill_value=math.inf)
    return (ordered["error"] < before).reindex(points.index)


def _won(rows: pd.DataFrame) -> pd.DataFrame:
    """The method with the fewest passes to a 1 % error on each task, by fitted laws, without approximations."""
    rows = rows[rows["kind"] != "approximate"]
    costs = rows.assign(**dict.fromkeys(("seconds", "seconds_q25", "seconds_q75"), rows[COST]))
    return tasks.winners(costs, {f"{100 * GOAL:g} %": GOAL}, drift=0.0)


def _title(points: pd.DataFrame, won: pd.DataFrame) -> str:
    """The number of tasks on which each kind of method surely takes the fewest passes to a 1 % error."""
    if not len(won):
        return f"Relative error against passes: no exact method or estimate reaches a median error of {100 * GOAL:g} %"
    sure = won[won["fastest_of_kind"] >= tasks.SURE]
    counts = [f"{KINDS.get(kind, kind)} on {count}" for kind, count in sure["kind"].value_counts().items()]
    undecided = f"undecided on {len(won) - len(sure)}"
    total = len(points.drop_duplicates(CASE))
    return f"Fewest passes to {100 * GOAL:g} %: {', '.join([*counts, undecided])} of {total} tasks"


def _with_a_choice(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The rows of problems with a trade-off between error and cost, and a sentence on problems without a measurement.

    Such problems have a measured point of a method that is not exact. If none has, all rows are returned.
    """
    case = ["problem", "setting"]
    points = base.measured(table, COST, "error")
    chosen = points.loc[points["kind"] != "exact", case].drop_duplicates()
    if not len(chosen):
        return table, ""
    here = pd.MultiIndex.from_frame(table[case]).isin(pd.MultiIndex.from_frame(chosen))
    lost = table.loc[~table["problem"].isin(points["problem"]), "problem"].nunique()
    return table[here], f" Problems without a measurement: {lost}." if lost else ""


def _axes(panel: Axes, knee: float | None) -> None:
    canvas.decades(panel.xaxis, *panel.get_xlim())
    if knee:
        canvas.compress(panel, knee)
    else:
        canvas.decades(panel.yaxis, *panel.get_ylim(), most=5)
    panel.yaxis.set_major_formatter(FuncFormatter(_error_tick))


def _panel(panel: Axes, cells: pd.DataFrame, points: pd.DataFrame) -> None:
    lost = cells[cells["status"].isin(LOST)].groupby("status").size()
    if len(lost):
        text = "not drawn: " + ", ".join(f"{count} {labels.status_label(status)}" for status, count in lost.items())
        panel.text(0.98, 0.97, text, transform=panel.transAxes, ha="right", va="top", fontsize=8.5, color=styles.GREY)
    _guides(panel, points[points["kind"] == "stochastic"])
    others = points[~points["best"]]
    panel.scatter(others[COST], others["error_drawn"], s=9, color=canvas.PALE, zorder=2, clip_on=False)
    for name, line in points[points["best"]].groupby("series", sort=False):
        look, line = _look(str(name)), line.sort_values(COST)
        thin: dict[str, Any] = {"color": look.colour, "linewidth": 0.8, "zorder": 2.5}
        if look.kind == "stochastic":
            panel.plot(line[COST], line["error_drawn"], color=look.colour, zorder=3)
        for backend, own in line.groupby("backend"):
            drawn = look.line(str(backend)) | {"linestyle": ""}
            panel.plot(own[COST], own["error_drawn"], **drawn, zorder=4, clip_on=False)
        panel.vlines(line[COST], line["error_q25_drawn"], line["error_q75_drawn"], **thin)


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


def _guides(panel: Axes, points: pd.DataFrame) -> None:
    """Guide lines of the theoretical slopes from one point at the least cost; the first lies above all estimates."""
    if len(points):
        x = pd.Series([points[COST].min(), panel.get_xlim()[1]])
        height = 2 * (points["error_drawn"] * (points[COST] / x[0]) ** 0.5).max()
        for slope in SLOPES:
            y = height * (x / x[0]) ** slope
            panel.plot(x, y, color=canvas.PALE, linewidth=1.2, linestyle=DOTS[slope], zorder=1)


def _knee(points: pd.DataFrame) -> float | None:
    """The decade below which only exact methods have errors, if a wide gap separates them from the others."""
    others = points[points["kind"] != "exact"]
    if not len(others):
        return None
    knee = 10.0 ** math.floor(math.log10(others[[f"{c}_drawn" for c in DRAWN]].min().min()))
    return knee if points["error_drawn"].min() < knee / 10 else None


def _reading(points: pd.DataFrame, knee: float | None) -> list[key.Entry]:
    entries: list[key.Entry] = key.backend_entries(backends_in(points), linestyle=False)
    if not points["best"].all():
        dot = Line2D([], [], color=canvas.PALE, marker="o", markersize=3, linestyle="")
        entries.append((dot, "less accurate points of a family"))
    if (points["kind"] == "stochastic").any():
        for slope in SLOPES:
            entries.append((Line2D([], [], color=canvas.PALE, linewidth=1.2, linestyle=DOTS[slope]), SLOPES[slope]))
    if knee:
        entries.append((Patch(color="#E6E6E6", linewidth=0), "decades squeezed to ¼"))
    return entries


def _error_tick(value: float, _: int) -> str:
    return ("\N{LESS-THAN OR EQUAL TO}" if value <= FLOOR * 1.01 else "") + labels.power_label(value)


def _caption(points: pd.DataFrame, knee: float | None, panels: int, won: pd.DataFrame) -> str:
    clipped = int((points["error"] < FLOOR).sum())
    text = (
        "Relative error against passes (JVPs and VJPs over the batch): each family's most accurate method at a cost, "
        f"medians with quartiles, on {panels} of {len(points.drop_duplicates(CASE))} tasks. Title: laws fitted to all "
        "budgets; undecided below 95 % of reruns."
    )
    if knee:
        text += f" Decades below {knee:g} are squeezed."
    if clipped:
        text += f" {clipped} errors below {FLOOR:g} are drawn there."
    return text
