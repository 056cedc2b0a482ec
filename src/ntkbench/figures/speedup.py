"""How much faster than the two baselines a method is, at equal accuracy."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from ntkbench.figures import _canvas, _looks, base
from ntkbench.figures._speedups import BASELINES, TOLERANCES, speedups

SHAPES = {"1 %": ("o", "#56B4E9"), "0.1 %": ("D", "#0072B2"), "exact": ("s", "#000000")}
TITLES = {"naive_jacobian": "naive Jacobian", "direct": "direct"}
FIRST, SECOND = BASELINES
ACCENT = "#882255"
GUTTER = 0.15
"""Share of a panel's width, on the left, where what was not reached is listed."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """Speed-ups over the naive Jacobian (lower axis) and over direct (upper axis), for problems and metrics."""
    plotted = speedups(table)
    if not len(plotted):
        return base.nothing(plotted, base.why_not(table))
    style, metrics = _looks.looks(table), base.metrics_in(table)
    pairs = set(zip(plotted["method"], plotted["backend"], strict=True))
    lines = [(m, b) for m in style for b in _looks.backends_in(table) if (m, b) in pairs]
    names = [style[m].title + ("" if b == "torch" else f" ({_looks.TITLES.get(b, b)})") for m, b in lines]
    problems = list(dict.fromkeys(zip(plotted["problem"], plotted["setting"], strict=True)))
    figure, grid = _canvas.sheet(
        [_canvas.Row(0.195 * len(lines) + 0.1, above=0.78, below=0.3) for _ in problems],
        len(metrics),
        title="Speed-up at equal accuracy",
        subtitle=base.settings_line(table),
        key=_key(plotted),
        left=_canvas.text_width(names, 9) + 0.45,
    )
    for row, (problem, setting) in zip(grid, problems, strict=True):
        here = plotted[(plotted["problem"] == problem) & (plotted["setting"] == setting)]
        for panel, metric in zip(row, metrics, strict=True):
            _frame(panel, lines, style)
            _panel(panel, here[here["metric"] == metric], lines)
            panel.set_title(base.metric_label(metric), pad=22)
            if row is grid[-1]:
                panel.set_xlabel("over naive Jacobian")
        _labels(row[0], names, lines, style)
        size = f"n = {base.range_label(here['n'])},  P = {base.range_label(here['P'])}"
        name = ", ".join(part for part in (base.name_label(problem), setting) if part)
        _canvas.heading(row[0], name, size, offset=40)
    return base.Drawing(figure, plotted, _caption())


def _frame(panel: Axes, lines: list[tuple[str, str]], style: dict[str, _looks.Look]) -> None:
    """Rows for methods, a gap between kinds, the gutter."""
    panel.set(ylim=(len(lines) - 0.4, -0.6), xscale="log")
    panel.set_yticks(range(len(lines)), labels=[])
    panel.tick_params(axis="y", length=0)
    panel.grid(True, axis="y", linewidth=0.5)
    panel.axvspan(0, GUTTER, transform=panel.transAxes, color="#F1F1F1", linewidth=0, zorder=0)
    for i in range(1, len(lines)):
        if style[lines[i][0]].kind != style[lines[i - 1][0]].kind:
            panel.axhline(i - 0.5, color=_canvas.PALE, linewidth=0.8, zorder=1)


def _labels(panel: Axes, names: list[str], lines: list[tuple[str, str]], style: dict[str, _looks.Look]) -> None:
    """Names with the colour and marker that the methods have in the other figures."""
    for i, (name, (method, backend)) in enumerate(zip(names, lines, strict=True)):
        where = {"xycoords": panel.get_yaxis_transform(), "textcoords": "offset points"}
        panel.annotate(name, (0, i), xytext=(-20, 0), ha="right", va="center", fontsize=9, **where)
        mark = style[method].line(backend) | {"linestyle": ""}
        panel.plot(-0.06, i, transform=panel.get_yaxis_transform(), clip_on=False, **mark)


def _panel(panel: Axes, rows: pd.DataFrame, lines: list[tuple[str, str]]) -> None:
    times = {name: rows[f"{name}_seconds"].iloc[0] if len(rows) else np.nan for name in BASELINES}
    have = [name for name in BASELINES if np.isfinite(times[name])]
    if not have:
        panel.set_xticks([])
        _canvas.note(panel, "not in the grid" if not len(rows) else "neither baseline was measured")
        return
    unit = f"speedup_over_{have[0]}"
    reached = rows[rows["outcome"] == "reached"]
    low, high = _canvas.limits([*reached[unit], *(times[have[0]] / times[name] for name in have)], ratio=100)
    panel.set_xlim(low / (high / low) ** (GUTTER / (1 - GUTTER)), high)
    _axes(panel, times, have, low, high)
    for (method, backend), cells in rows.groupby(["method", "backend"]):
        _method(panel, lines.index((method, backend)), cells.set_index("tolerance"), unit, backend)
