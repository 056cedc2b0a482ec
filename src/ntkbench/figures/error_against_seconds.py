"""How wrong against how long: one panel for each problem and metric, one line for each stochastic method."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from ntkbench.figures import _canvas, base
from ntkbench.figures._looks import Look, backends_in, looks

FLOOR = 1e-8
"""Errors below are drawn here: an exact method may agree to the last bit, and zero has no place on a logarithmic axis."""

KEPT = ["problem", "setting", "n", "P", "metric", "method", "title", "kind", "backend", "passes", "status", "reason"]
KEPT += ["seconds", "seconds_q25", "seconds_q75", "error", "error_q25", "error_q75", "seeds"]
DRAWN = ["error", "error_q25", "error_q75"]


def draw(table: pd.DataFrame) -> base.Drawing:
    """Relative error against seconds, for the sheet's problems (rows) and metrics (columns)."""
    rows = table.sort_values(["family", "n", "problem", "setting", "metric", "method", "backend", "passes"])
    plotted = rows[KEPT].copy()
    for column in DRAWN:
        plotted[f"{column}_drawn"] = plotted[column].clip(lower=FLOOR)
    points = base.measured(plotted, "seconds", "error")
    if not len(points):
        return base.nothing(plotted, base.why_not(table))

    style, metrics = looks(table), base.metrics_in(table)
    problems = list(dict.fromkeys(zip(plotted["problem"], plotted["setting"], strict=True)))
    used = {m: backends_in(points[points["method"] == m]) for m in style if m in set(points["method"])}
    figure, grid = _canvas.sheet(
        [_canvas.Row(2.1) for _ in problems],
        len(metrics),
        title="Relative error against seconds",
        subtitle=base.settings_line(table),
        key=[*_canvas.method_entries([style[m] for m in used], used), ("how to read", _reading(points))],
    )
    low, high = _canvas.limits(points[[f"{c}_drawn" for c in DRAWN]].stack())
    low = max(low, 0.6 * FLOOR)
    for row, (problem, setting) in zip(grid, problems, strict=True):
        here = plotted[(plotted["problem"] == problem) & (plotted["setting"] == setting)]
        seconds = _canvas.limits(base.measured(here, "seconds", "error")[["seconds", "seconds_q25", "seconds_q75"]].stack())
        for panel, metric in zip(row, metrics, strict=True):
            panel.set(xscale="log", yscale="log", xlim=seconds, ylim=(low, high))
            panel.set_title(base.metric_label(metric))
            _canvas.decades(panel.xaxis, *seconds)
            _canvas.decades(panel.yaxis, low, high, most=5)
            panel.yaxis.set_major_formatter(FuncFormatter(_error_tick))
            if panel is not row[0]:
                panel.tick_params(labelleft=False)
            if row is grid[-1]:
                panel.set_xlabel("seconds")
            _panel(panel, here[here["metric"] == metric], style)
        row[0].set_ylabel("relative error")
        size = f"n = {base.range_label(here['n'])},  P = {base.range_label(here['P'])}"
        name = ", ".join(part for part in (base.name_label(problem), setting) if part)
        _canvas.heading(row[0], name, size)
    return base.Drawing(figure, plotted, _caption(points))


def _panel(panel: Axes, cells: pd.DataFrame, style: dict[str, Look]) -> None:
    points = base.measured(cells, "seconds", "error")
    if not len(points):
        _canvas.note(panel, base.why_not(cells) if len(cells) else "not in the grid")
        return
    lost = cells[~cells["status"].isin(["ok", "skipped"])].groupby("status").size()
    if len(lost):
        text = ", ".join(f"{count} {base.status_label(status)}" for status, count in lost.items())
        panel.text(0.98, 0.97, text, transform=panel.transAxes, ha="right", va="top", fontsize=8.5, color=_canvas.GREY)
    _guide(panel, points[points["kind"] == "stochastic"])
    for (method, backend), line in points.groupby(["method", "backend"], sort=False):
        _line(panel, line, style[method], backend)


def _line(panel: Axes, line: pd.DataFrame, look: Look, backend: str) -> None:
    """One method on one backend: a line over its budgets, or points where there are no budgets."""
    drawn = look.line(backend)
    stochastic = look.kind == "stochastic"
    if not stochastic:
        drawn["linestyle"] = ""
    over = 3 if stochastic else 4
    panel.plot(line["seconds"], line["error_drawn"], **drawn, zorder=over, clip_on=False)
    panel.hlines(
        line["error_drawn"], line["seconds_q25"], line["seconds_q75"], color=look.colour, linewidth=0.8, zorder=over - 0.5
    )
    if stochastic and len(line) > 1:
        quartiles = line["error_q25_drawn"], line["error_q75_drawn"]
        panel.fill_between(line["seconds"], *quartiles, color=look.colour, alpha=0.13, linewidth=0, zorder=2)
    else:
        quartiles = line["error_q25_drawn"], line["error_q75_drawn"]
        panel.vlines(line["seconds"], *quartiles, color=look.colour, linewidth=0.8, zorder=over - 0.5)


def _guide(panel: Axes, points: pd.DataFrame) -> None:
    """A line of slope -1/2 just above the stochastic methods."""
    if len(points):
        height = 2 * (points["error_drawn"] * points["seconds"] ** 0.5).max()
        x = pd.Series(panel.get_xlim())
        panel.plot(x, height * x**-0.5, color=_canvas.PALE, linewidth=1.2, linestyle=(0, (1, 1.5)), zorder=1)


def _reading(points: pd.DataFrame) -> list[_canvas.Entry]:
    entries = _canvas.backend_entries(backends_in(points))
    if (points["kind"] == "stochastic").any():
        guide = Line2D([], [], color=_canvas.PALE, linewidth=1.2, linestyle=(0, (1, 1.5)))
        entries.append((Patch(color=_canvas.GREY, alpha=0.25, linewidth=0), "quartiles over seeds"))
        entries.append((guide, "slope \N{MINUS SIGN}½, the Monte Carlo rate"))
    return entries


def _error_tick(value: float, _: int) -> str:
    power = round(pd.Series([value]).map("{:e}".format).str.split("e").str[1].astype(int).item())
    return rf"$\leq 10^{{{power}}}$" if value <= FLOOR * 1.01 else rf"$10^{{{power}}}$"


def _caption(points: pd.DataFrame) -> str:
    clipped = int((points["error"] < FLOOR).sum())
    text = (
        "Relative error |estimate - exact| / |exact| against the seconds of one estimate (without the first call), "
        "exact values in float64. Stochastic methods: a line over budgets of passes, the median over seeds with its "
        "quartiles as a band. Exact and approximate methods: one point each. Horizontal whiskers are the quartiles of "
        "the seconds. The dotted line has the slope -1/2 of Monte Carlo. Rows of the CSV that are not ok have no point; "
        "those that failed or ran out of time or memory are counted in the corner of their panel."
    )
    if clipped:
        text += f" {clipped} errors below {FLOOR:g}, zero among them or not, are drawn at {FLOOR:g}."
    return text
