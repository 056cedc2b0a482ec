"""Errors against cost: one panel for each metric and problem, one line for each stochastic method."""

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

from ntkbench.figures.plotting import base, canvas, key, labels, styles
from ntkbench.figures.plotting.styles import TITLES, Look, backends_in, looks

FLOOR = 1e-8
"""Smaller errors are drawn at this value: exact methods may agree to the last bit, and a log axis has no zero."""
MOST = 12
"""Maximum number of lines in a panel; with more, each backend gets its own panel, and then whiskers replace bands."""
COLUMNS = 3

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
        spread: columns of quartiles of the cost, if it varies.
    """

    column: str
    label: str
    slopes: Sequence[float]
    caption: str
    spread: tuple[str, ...] = ()


def draw(table: pd.DataFrame, cost: Cost) -> base.Drawing:
    """Relative error against a cost, metric by metric, problem by problem."""
    rows, left_out = _with_a_choice(table, cost)
    rows = rows.sort_values(["family", "n", "problem", "setting", "metric", "method", "backend", "passes"])
    plotted = rows[[*KEPT, cost.column, *cost.spread, *DRAWN, "seeds"]].copy()
    for column in DRAWN:
        plotted[f"{column}_drawn"] = plotted[column].clip(lower=FLOOR)
    points = base.measured(plotted, cost.column, "error")
    if not len(points):
        return base.nothing(plotted, labels.why_not(table))

    style, metrics = looks(table), base.metrics_in(plotted)
    knee = _knee(points)
    used = {m: backends_in(points[points["method"] == m]) for m in style if m in set(points["method"])}
    case = ["problem", "setting", "metric"]
    lines = points[points["kind"] == "stochastic"].drop_duplicates([*case, "method", "backend"])
    crowd = lines.groupby(case).size().max() if len(lines) else 0
    shares = [[b] for b in backends_in(points)] if crowd > MOST else [backends_in(plotted)]
    bands = crowd <= MOST * len(shares)
    cases = list(dict.fromkeys(points[case].itertuples(index=False, name=None)))
    cases.sort(key=lambda case: metrics.index(case[-1]))
    rows = canvas.in_rows([(*case, backends) for case in cases for backends in shares], COLUMNS)
    entries = key.method_entries([style[m] for m in used], used)
    figure, grid = canvas.sheet(
        [canvas.Row(2.4 if crowd <= MOST else 2.9, above=0.6, below=0.35) for _ in rows],
        min(COLUMNS, len(rows[0])),
        title=f"Relative error against {cost.label}",
        subtitle=base.settings_line(table),
        key=[*entries, ("how to read", _reading(points, cost, knee, bands))],
    )
    low, high = canvas.limits(points[[f"{c}_drawn" for c in DRAWN]].stack())
    low = max(low, FLOOR / 8)
    high *= 4 if plotted["status"].isin(LOST).any() else 1  # room for the counts in the corner
    for panels, row in zip(grid, rows, strict=True):
        canvas.hide(panels[len(row) :])
        panels[0].set_ylabel("relative error")
        for panel, (problem, setting, metric, backends) in zip(panels, row, strict=False):
            here = plotted[(plotted["problem"] == problem) & (plotted["setting"] == setting)]
            spent = canvas.limits(base.measured(here, cost.column, "error")[[cost.column, *cost.spread]].stack())
            panel.set(xscale="log", yscale="log", xlim=spent, ylim=(low, high), xlabel=cost.label)
            name = labels.case_label(problem, setting, *(TITLES.get(b, b) for b in backends if len(shares) > 1))
            canvas.title(panel, labels.metric_label(metric), f"{name}:  {labels.sizes_label(here, 'n', 'P')}")
            _axes(panel, knee)
            panel.tick_params(labelleft=panel is panels[0])
            here = here[(here["metric"] == metric) & here["backend"].isin(backends)]
            _panel(panel, here, cost, style, bands)
    return base.Drawing(figure, plotted, _caption(points, cost, knee) + left_out)


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


def _panel(panel: Axes, cells: pd.DataFrame, cost: Cost, style: dict[str, Look], bands: bool) -> None:
    points = base.measured(cells, cost.column, "error")
    if not len(points):
        canvas.note(panel, labels.why_not(cells))
        return
    lost = cells[cells["status"].isin(LOST)].groupby("status").size()
    if len(lost):
        text = "not drawn: " + ", ".join(f"{count} {labels.status_label(status)}" for status, count in lost.items())
        panel.text(0.98, 0.97, text, transform=panel.transAxes, ha="right", va="top", fontsize=8.5, color=styles.GREY)
    _guides(panel, points[points["kind"] == "stochastic"], cost)
    for (method, backend), line in points.groupby(["method", "backend"], sort=False):
        _line(panel, line, cost, style[method], backend, bands)


def _line(panel: Axes, line: pd.DataFrame, cost: Cost, look: Look, backend: str, bands: bool) -> None:
    """One method on one backend: a line over its budgets, or points where there are no budgets."""
    drawn = look.line(backend)
    stochastic = look.kind == "stochastic"
    if not stochastic:
        drawn["linestyle"] = ""
    over = 3 if stochastic else 4
    panel.plot(line[cost.column], line["error_drawn"], **drawn, zorder=over, clip_on=False)
    thin: dict[str, Any] = {"color": look.colour, "linewidth": 0.8, "zorder": over - 0.5}
    if cost.spread:
        panel.hlines(line["error_drawn"], *(line[column] for column in cost.spread), **thin)
    quartiles = line["error_q25_drawn"], line["error_q75_drawn"]
    if bands and stochastic and len(line) > 1:
        panel.fill_between(line[cost.column], *quartiles, color=look.colour, alpha=0.13, linewidth=0, zorder=2)
    else:
        panel.vlines(line[cost.column], *quartiles, **thin)


def _guides(panel: Axes, points: pd.DataFrame, cost: Cost) -> None:
    """Guide lines with theory's slopes, from one point above the cheapest stochastic method; the first is above all."""
    if len(points):
        x = pd.Series([points[cost.column].min(), panel.get_xlim()[1]])
        height = 2 * (points["error_drawn"] * (points[cost.column] / x[0]) ** -cost.slopes[0]).max()
        for slope in cost.slopes:
            y = height * (x / x[0]) ** slope
            panel.plot(x, y, color=canvas.PALE, linewidth=1.2, linestyle=DOTS[slope], zorder=1)


def _knee(points: pd.DataFrame) -> float | None:
    """The decade below which only exact methods have errors, where they leave a wide gap to the others."""
    others = points[points["kind"] != "exact"]
    if not len(others):
        return None
    knee = 10.0 ** math.floor(math.log10(others[[f"{c}_drawn" for c in DRAWN]].min().min()))
    return knee if points["error_drawn"].min() < knee / 10 else None


def _reading(points: pd.DataFrame, cost: Cost, knee: float | None, bands: bool) -> list[key.Entry]:
    entries = key.backend_entries(backends_in(points))
    if (points["kind"] == "stochastic").any():
        band = Patch(color=styles.GREY, alpha=0.25, linewidth=0)
        whisker = Line2D([], [], color=styles.GREY, marker="|", markersize=9, markeredgewidth=0.8, linestyle="")
        entries.append((band if bands else whisker, "quartiles over seeds"))
        for slope in cost.slopes:
            entries.append((Line2D([], [], color=canvas.PALE, linewidth=1.2, linestyle=DOTS[slope]), SLOPES[slope]))
    if knee:
        entries.append((Patch(color="#E6E6E6", linewidth=0), "decades squeezed to ¼"))
    return entries


def _error_tick(value: float, _: int) -> str:
    return ("\N{LESS-THAN OR EQUAL TO}" if value <= FLOOR * 1.01 else "") + labels.power_label(value)


def _caption(points: pd.DataFrame, cost: Cost, knee: float | None) -> str:
    clipped = int((points["error"] < FLOOR).sum())
    text = (
        f"Relative error |estimate - exact| / |exact| {cost.caption}, exact values in float64. Stochastic methods: a "
        "line over budgets of passes, the median over seeds with its quartiles as a band (as whiskers where lines are "
        f"many). Exact and approximate methods: one point each. {'Whiskers across are quartiles. ' * bool(cost.spread)}"
        "Guide lines have theory's slopes; their height means nothing. Rows of the CSV that are not ok have no point; "
        "those that failed or ran out of time or memory are counted in the corner of their panel."
    )
    if knee:
        text += f" On grey, below {knee:g}, where only exact methods are, decades are a quarter as high."
    if clipped:
        text += f" Errors below {FLOOR:g} ({clipped} of them; some are zero perhaps) are drawn at {FLOOR:g}."
    return text
