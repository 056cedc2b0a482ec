"""What exactness costs: seconds and memory of the exact methods as Theta grows."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from ntkbench.figures.plotting import base, canvas, key, labels, styles
from ntkbench.figures.plotting.styles import Look, backends_in, looks

MOST = 4
"""Families side by side; more of them go below."""
ASIDE = 0.17
"""Inches between the markers of methods that were measured at a single size."""
MIB = 2.0**20
FLOOR = 0.1
"""MiB; less is drawn here, since a peak less a baseline can come out as nothing or below."""

KEPT = ["family", "setting", "problem", "N", "O", "P", "n", "metric", "method", "title", "backend", "status", "reason"]
KEPT += ["seconds", "seconds_q25", "seconds_q75", "memory_bytes"]


def draw(table: pd.DataFrame) -> base.Drawing:
    """Seconds (above) and peak memory (below) against n, for each family of problems."""
    exact = table[table["kind"] == "exact"].sort_values(["family", "setting", "n", "problem", "method", "backend"])
    # Families whose network changes with its size are in the figure of scaling.
    exact = exact[exact.groupby("family")["P"].transform("nunique") <= 1]
    if not (exact["status"] == "ok").any():
        why = labels.why_not(exact) if len(exact) else "The table has no exact method."
        return base.nothing(exact[KEPT], why)
    metric = _metric(exact)
    exact = exact[exact["metric"] == metric]
    # A method that runs nowhere on a backend (not written for it) has no cost there and is not shown.
    runs = exact.groupby(["method", "backend"])["status"].transform(lambda status: (status != "skipped").any())
    plotted = exact.loc[runs, KEPT].copy()
    plotted["memory_mib_drawn"] = (plotted["memory_bytes"] / MIB).clip(lower=FLOOR)

    style = {m: look for m, look in looks(table).items() if m in set(plotted["method"])}
    used = {m: backends_in(plotted[plotted["method"] == m]) for m in style}
    families = list(plotted.groupby(["family", "setting"], sort=False))
    lost = [s for s in ("timeout", "out_of_memory", "failed", "skipped") if s in set(plotted["status"])]
    lost += sorted(set(plotted["status"]) - {"ok", *lost})
    above = 0.82 if any(plotted["setting"]) else 0.64
    block = [canvas.Row(0.27 * len(lost), above=above, below=0.06)] if lost else []
    block += [canvas.Row(2.3, above=0 if lost else above, below=0.2), canvas.Row(2.3, above=0, below=0.55)]
    columns = min(MOST, len(families))
    figure, grid = canvas.sheet(
        block * math.ceil(len(families) / columns),
        columns,
        title=f"Cost of exact methods for the {labels.metric_label(metric)}",
        subtitle=base.settings_line(exact),
        key=[*key.method_entries(style.values(), used), ("how to read", _reading(plotted, bool(lost)))],
        left=1.15,
        bottom=0.05,
    )
    y = {
        "seconds": canvas.limits(plotted[["seconds", "seconds_q25", "seconds_q75"]].stack(), pad=2.5),
        "memory_mib_drawn": canvas.limits(plotted["memory_mib_drawn"].dropna(), pad=2.5),
    }
    for i in range(columns * math.ceil(len(families) / columns)):
        first = len(block) * (i // columns)
        panels = [row[i % columns] for row in grid[first : first + len(block)]]
        if i >= len(families):
            for panel in panels:
                panel.remove()
            continue
        (family, setting), cells = families[i]
        _column(panels, cells, y, lost, style)
        _title(panels[0], family, setting, cells)
        for panel in panels:
            panel.tick_params(labelbottom=panel is panels[-1], labelleft=i % columns == 0)
        if i % columns == 0:
            panels[-2].set_ylabel("seconds")
            panels[-1].set_ylabel("peak memory [MiB]")
            figure.align_ylabels(panels)
    return base.Drawing(figure, plotted, _caption(metric, plotted))


def _column(
    panels: list[Axes], cells: pd.DataFrame, y: dict[str, tuple[float, float]], lost: list[str], style: dict[str, Look]
) -> None:
    """One family: the strip of what did not finish if there is any, seconds, memory."""
    x = canvas.limits(cells["n"], pad=1.7, ratio=30)
    for panel in panels:
        panel.set(xscale="log", xlim=x)
        _sizes(panel, sorted(cells["n"].dropna().unique()), x)
    if lost:
        _lost(panels[0], cells, lost, style)
    for panel, (quantity, band) in zip(panels[-2:], y.items(), strict=True):
        panel.set(yscale="log", ylim=band)
        canvas.decades(panel.yaxis, *band)
        _costs(panel, cells, quantity, style)
    panels[-1].set_xlabel("n = N O, outputs in all")


def _sizes(panel: Axes, sizes: list[float], x: tuple[float, float]) -> None:
    """Ticks at the very sizes of the family, or at powers of ten where sizes are too many or too close for labels."""
    span = math.log(x[1] / x[0])
    if all(math.log(b / a) > 0.16 * span for a, b in itertools.pairwise(sizes)):
        panel.xaxis.set_major_locator(FixedLocator(sizes))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: labels.count_label(value)))
        panel.xaxis.set_minor_locator(NullLocator())
    else:
        canvas.decades(panel.xaxis, *x, most=4)


def _metric(exact: pd.DataFrame) -> str:
    """The norm, or else the metric with the most rows."""
    counts = exact[exact["status"] == "ok"].groupby("metric").size()
    return "norm" if "norm" in counts else counts.idxmax()


def _title(panel: Axes, family: str, setting: str, cells: pd.DataFrame) -> None:
    name = labels.case_label(family, setting, by="\n")
    sizes = labels.sizes_label(cells, "O", "P")
    panel.annotate(
        sizes, (0, 1), xytext=(0, 6), xycoords="axes fraction", textcoords="offset points", color=styles.GREY
    )
    canvas.heading(panel, name)


def _costs(panel: Axes, cells: pd.DataFrame, quantity: str, style: dict[str, Look]) -> None:
    """Lines over n of one family, for seconds or for memory."""
    points = base.measured(cells, quantity)
    if not len(points):
        why = labels.why_not(cells) if quantity == "seconds" else "no memory measured"
        canvas.note(panel, why)
        return
    _guides(panel, points["n"], points[quantity])
    lines = list(points.groupby(["method", "backend"], sort=False))
    # A single size has no lines, and room for markers side by side.
    spread = ASIDE if points["n"].nunique() == 1 else 0.0
    for i, ((method, backend), line) in enumerate(lines):
        aside = ScaledTranslation(spread * (i - (len(lines) - 1) / 2), 0, panel.figure.dpi_scale_trans)
        drawn: dict[str, Any] = {"transform": panel.transData + aside, "zorder": 3}
        panel.plot(line["n"], line[quantity], **style[method].line(backend), **drawn)
        if quantity == "seconds":
            low, high, colour = line["seconds_q25"], line["seconds_q75"], style[method].colour
            panel.vlines(line["n"], low, high, color=colour, linewidth=0.8, **drawn)


def _guides(panel: Axes, n: pd.Series, cost: pd.Series) -> None:
    """Slopes n and n^2 from below the cheapest point of the least n, each labelled near where it leaves the panel."""
    if n.nunique() < 2:
        return
    start, height = n.min(), cost[n == n.min()].min() / 1.8
    for power, label in ((1, "n"), (2, "n²")):
        end = min(panel.get_xlim()[1], start * (panel.get_ylim()[1] / height) ** (1 / power))
        x = np.array([start, end])
        panel.plot(
            x, height * (x / start) ** power, color=canvas.PALE, linewidth=1.1, linestyle=(0, (1, 1.5)), zorder=1
        )
        spot = start * (end / start) ** 0.93
        panel.text(
            spot, height * (spot / start) ** power, label, color=styles.GREY, fontsize=9, fontstyle="italic",
            ha="center", va="center", bbox={"color": "white", "pad": 0.8}, zorder=1.5,
        )  # fmt: skip


def _lost(panel: Axes, cells: pd.DataFrame, lost: list[str], style: dict[str, Look]) -> None:
    """The strip on top: what has no cost because it did not finish, by how it ended."""
    panel.set(ylim=(len(lost) - 0.5, -0.5), yticks=range(len(lost)), facecolor=canvas.SHADE)
    panel.set_yticklabels([labels.status_label(status) for status in lost])
    panel.tick_params(axis="both", length=0)
    sns.despine(ax=panel, left=True, bottom=True)
    panel.grid(False, axis="y")
    left, right = np.log(panel.get_xlim())
    # Side by side around their n, closer where there are many, and never outside the strip.
    for (n, status), here in cells[cells["status"] != "ok"].groupby(["n", "status"]):
        step = min(0.13 / panel.get_position().width / canvas.WIDTH, 0.9 / cells["n"].nunique() / len(here))
        middle, reach = (np.log(n) - left) / (right - left), step * (len(here) - 1)
        start = min(max(middle - reach / 2, 0.03), 0.97 - reach)
        for k, row in enumerate(here.itertuples()):
            mark = style[row.method].line(row.backend)
            panel.plot(start + k * step, lost.index(status), transform=panel.get_yaxis_transform(), **mark)


def _reading(plotted: pd.DataFrame, lost: bool) -> list[key.Entry]:
    entries = key.backend_entries(backends_in(plotted))
    guide = Line2D([], [], color=canvas.PALE, linewidth=1.1, linestyle=(0, (1, 1.5)))
    entries.append((guide, "slopes n and n²"))
    if lost:
        strip = Line2D([], [], marker="s", markersize=9, linestyle="", color="#E3E3E3")
        entries.append((strip, "top strip: did not finish"))
    return entries


def _caption(metric: str, plotted: pd.DataFrame) -> str:
    small = int((plotted["memory_bytes"] < FLOOR * MIB).sum())
    text = (
        "Seconds of one exact computation (without the first call) and peak memory over a do-nothing baseline, for the "
        f"metric {metric!r}, against n = N O; the sizes of one family are joined by a line, at a single size methods "
        "stand side by side. Whiskers are quartiles of seconds."
    )
    if (plotted["status"] != "ok").any():
        text += (
            " Markers in the strip on top stand over the n at which a method did not finish; side by side where there "
            "are several."
        )
    if small:
        text += f" {small} peaks below {FLOOR:g} MiB are drawn at {FLOOR:g} MiB."
    return text
