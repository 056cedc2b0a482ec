"""What exactness costs: seconds and memory of the exact methods as Theta grows."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ntkbench.figures import _canvas, base
from ntkbench.figures._looks import Look, backends_in, looks

MIB = 2.0**20
FLOOR = 0.1
"""MiB; less is drawn here, since a peak less a baseline can come out as nothing or below."""

KEPT = ["family", "setting", "problem", "N", "O", "P", "n", "metric", "method", "title", "backend", "status", "reason"]
KEPT += ["seconds", "seconds_q25", "seconds_q75", "memory_bytes"]


def draw(table: pd.DataFrame) -> base.Drawing:
    """Seconds (above) and peak memory (below) against n, for each family of problems."""
    exact = table[table["kind"] == "exact"].sort_values(["family", "setting", "n", "problem", "method", "backend"])
    if not (exact["status"] == "ok").any():
        why = base.why_not(exact) if len(exact) else "The table has no exact method."
        return base.nothing(exact[KEPT], why)
    metric = _metric(exact)
    exact = exact[exact["metric"] == metric]
    # A method that runs nowhere on a backend (not written for it) has cost nothing there and is no news.
    runs = exact.groupby(["method", "backend"])["status"].transform(lambda status: (status != "skipped").any())
    plotted = exact.loc[runs, KEPT].copy()
    plotted["memory_mib_drawn"] = (plotted["memory_bytes"] / MIB).clip(lower=FLOOR)

    style = {m: look for m, look in looks(table).items() if m in set(plotted["method"])}
    used = {m: backends_in(plotted[plotted["method"] == m]) for m in style}
    families = list(dict.fromkeys(zip(plotted["family"], plotted["setting"], strict=True)))
    lost = [s for s in ("timeout", "out_of_memory", "failed", "skipped") if s in set(plotted["status"])]
    lost += sorted(set(plotted["status"]) - {"ok", *lost})
    strip = [_canvas.Row(0.27 * len(lost), above=0.62, below=0.06)] if lost else []
    figure, grid = _canvas.sheet(
        [*strip, _canvas.Row(2.3, above=0 if lost else 0.62, below=0.2), _canvas.Row(2.3, above=0)],
        len(families),
        title=f"Cost of exact methods for the {base.metric_label(metric)}",
        subtitle=base.settings_line(table),
        key=[*_canvas.method_entries(style.values(), used), ("how to read", _reading(plotted, bool(lost)))],
        left=1.15,
    )
    bands = {
        "seconds": _canvas.limits(plotted[["seconds", "seconds_q25", "seconds_q75"]].stack()),
        "memory_mib_drawn": _canvas.limits(plotted["memory_mib_drawn"].dropna()),
    }
    for c, (family, setting) in enumerate(families):
        cells = plotted[(plotted["family"] == family) & (plotted["setting"] == setting)]
        column = [row[c] for row in grid]
        x = _canvas.limits(cells["n"], pad=1.7, ratio=30)
        for panel in column:
            panel.set(xscale="log", xlim=x)
            _canvas.decades(panel.xaxis, *x, most=4)
            panel.tick_params(labelbottom=panel is column[-1], labelleft=c == 0)
        if lost:
            _lost(column[0], cells, lost, style)
        for panel, (quantity, y) in zip(column[-2:], bands.items(), strict=True):
            panel.set(yscale="log", ylim=y)
            _canvas.decades(panel.yaxis, *y)
            _costs(panel, cells, quantity, style)
        column[-1].set_xlabel("n = N O, outputs in all")
        _title(column[0], family, setting, cells)
    grid[-2][0].set_ylabel("seconds")
    grid[-1][0].set_ylabel("peak memory over baseline [MiB]")
    return base.Drawing(figure, plotted, _caption(metric, plotted))


def _metric(exact: pd.DataFrame) -> str:
    """The norm, or else the metric with the most rows."""
    counts = exact[exact["status"] == "ok"].groupby("metric").size()
    return "norm" if "norm" in counts else counts.idxmax()


def _title(panel: Axes, family: str, setting: str, cells: pd.DataFrame) -> None:
    name = "\n".join(part for part in (base.name_label(family), setting) if part)
    sizes = f"O = {base.range_label(cells['O'])},  P = {base.range_label(cells['P'])}"
    panel.annotate(
        sizes, (0, 1), xytext=(0, 6), xycoords="axes fraction", textcoords="offset points", color=_canvas.GREY
    )
    _canvas.heading(panel, name)


def _costs(panel: Axes, cells: pd.DataFrame, quantity: str, style: dict[str, Look]) -> None:
    """Lines over n of one family, for seconds or for memory."""
    points = base.measured(cells, quantity)
    if not len(points):
        _canvas.note(panel, base.why_not(cells) if not (cells["status"] == "ok").any() else "not measured")
        return
    _guides(panel, points["n"], points[quantity])
    for (method, backend), line in points.groupby(["method", "backend"], sort=False):
        panel.plot(line["n"], line[quantity], **style[method].line(backend), zorder=3)
        if quantity == "seconds":
            panel.vlines(line["n"], line["seconds_q25"], line["seconds_q75"], color=style[method].colour, linewidth=0.8)


def _guides(panel: Axes, n: pd.Series, cost: pd.Series) -> None:
    """Slopes n and n^2 from the cheapest corner, each labelled where it leaves the panel."""
    (left, right), (_, top) = panel.get_xlim(), panel.get_ylim()
    for power, label in ((1, "n"), (2, "n²")):
        height = cost[n == n.min()].min() / 1.6
        end = min(right, left * 0 + n.min() * (top / height) ** (1 / power))
        x = np.array([n.min(), end])
        panel.plot(x, height * (x / n.min()) ** power, color=_canvas.PALE, linewidth=1.1, linestyle=(0, (1, 1.5)), zorder=1)
        spot = n.min() * (end / n.min()) ** 0.93
        panel.text(
            spot, height * (spot / n.min()) ** power, label, color=_canvas.GREY, fontsize=9, fontstyle="italic",
            ha="center", va="center", bbox={"color": "white", "pad": 0.8}, zorder=1.5,
        )  # fmt: skip


def _lost(panel: Axes, cells: pd.DataFrame, lost: list[str], style: dict[str, Look]) -> None:
    """The strip on top: what has no cost because it did not finish, by how it ended."""
    panel.set(ylim=(len(lost) - 0.5, -0.5), yticks=range(len(lost)), facecolor="#F3F3F3")
    panel.set_yticklabels([base.status_label(status) for status in lost])
    panel.tick_params(axis="both", length=0)
    panel.spines[:].set_visible(False)
    panel.grid(False, axis="y")
    for (n, status), here in cells[cells["status"] != "ok"].groupby(["n", "status"]):
        for k, row in enumerate(here.itertuples()):
            beside = n * 1.16 ** (k - (len(here) - 1) / 2)
            panel.plot(beside, lost.index(status), **style[row.method].line(row.backend), clip_on=False)


def _reading(plotted: pd.DataFrame, lost: bool) -> list[_canvas.Entry]:
    entries = _canvas.backend_entries(backends_in(plotted))
    guide = Line2D([], [], color=_canvas.PALE, linewidth=1.1, linestyle=(0, (1, 1.5)))
    entries.append((guide, "slopes n and n²"))
    if lost:
        strip = Line2D([], [], marker="s", markersize=9, linestyle="", color="#E3E3E3")
        entries.append((strip, "top strip: did not finish"))
    return entries


def _caption(metric: str, plotted: pd.DataFrame) -> str:
    small = int((plotted["memory_bytes"] < FLOOR * MIB).sum())
    text = (
        f"Seconds of one exact computation (without the first call) and peak memory over a do-nothing baseline, for "
        f"the metric {metric!r}, against n = N O; the sizes of one family are joined by a line. Whiskers are the quartiles "
        "of the seconds. Markers in the strip on top stand over the n at which a method did not finish; side by side "
        "where there are several."
    )
    if small:
        text += f" {small} peaks below {FLOOR:g} MiB are drawn at {FLOOR:g} MiB."
    return text
