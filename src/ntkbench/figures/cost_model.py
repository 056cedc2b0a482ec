"""Predicted against measured seconds and memory of methods."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ntkbench.figures.plotting import base, canvas, key, labels, styles
from ntkbench.units import counted

TABLE = "cost_model"
COLUMNS: tuple[str, ...] = ("problem", "metric", "method", "title", "kind", "predicted_seconds", "seconds", "calls")
COLUMNS += ("predicted_bytes", "memory_bytes", "predicted_passes", "passes_spent", "samples", "N")

PANELS = {
    "seconds": ("predicted_seconds", "seconds", 1.0, "seconds"),
    "memory": ("predicted_bytes", "memory_bytes", 2.0**20, "peak memory [MiB]"),
}
"""By heading: columns of the prediction and the measurement, the unit, and the label of both axes."""
COLOURS = {"exact": styles.BLUE, "approximate": styles.GREEN, "stochastic": styles.VERMILION}
FACTOR = 2.0
LOST = ("timeout", "out_of_memory", "failed")
"""Statuses of rows whose prediction was tried and missed."""
FLOOR = 0.5
"""MiB; smaller peaks count as this, since they cannot be told from the process's other memory."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """A point for each problem, metric and method; predictions on the diagonal are right."""
    points = ratios(table)
    if not points["seconds_ratio"].notna().any():
        return base.nothing(table, labels.why_not(table))
    kinds = [kind for kind in COLOURS if kind in set(points["kind"])]
    handles = [Line2D([], [], color=COLOURS[kind], marker="o", linestyle="", markersize=5) for kind in kinds]
    band = Patch(color=canvas.SHADE, linewidth=0)
    figure, (panels,) = canvas.sheet(
        [canvas.Row(3.6, above=0.4, below=0.5)],
        len(PANELS),
        title=_finding(points),
        subtitle=base.settings_line(table),
        key=[("kind", list(zip(handles, kinds, strict=True))), ("how to read", _reading(band))],
        left=0.9,
        gap=0.9,
    )
    for panel, (heading, (predicted, measured, unit, label)) in zip(panels, PANELS.items(), strict=True):
        drawn = points[points[f"{heading}_ratio"].notna()]
        _panel(panel, drawn, predicted, measured, unit, label)
        canvas.heading(panel, heading, offset=6)
    kept = [*COLUMNS, "seconds_ratio", "memory_ratio"]
    return base.Drawing(figure, points[kept].reset_index(drop=True), _caption(points, *left_out(table)))


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """All rows with a prediction, with ``seconds_ratio`` and ``memory_ratio``, predicted over measured.

    The ratios of rows that ended without seconds (:data:`LOST`) are missing. Rows whose method ran on all samples for
    its prediction are left out: both of their numbers are measured.
    """
    lost = table["status"].isin(LOST)
    tried = lost | ((table["status"] == "ok") & table["seconds"].notna())
    points = table.assign(**{name: table[name].mask(lost) for name in ("seconds", "memory_bytes")})
    points = points[tried & table["predicted_seconds"].notna() & ~_in_full(table)].copy()
    points["seconds_ratio"] = points["predicted_seconds"] / points["seconds"]
    floor = FLOOR * 2**20
    predicted = points["predicted_bytes"].fillna(0.0).clip(lower=floor)
    points["memory_ratio"] = predicted / points["memory_bytes"].clip(lower=floor)
    return points


def left_out(table: pd.DataFrame) -> tuple[int, int]:
    """Numbers of measured rows whose method ran on all samples for its prediction, and of rows predicted too slow."""
    slow = table["reason"].astype(str).str.contains("is predicted to take")
    return int(_in_full(base.measured(table, "predicted_seconds", "seconds")).sum()), int(slow.sum())


def _in_full(table: pd.DataFrame) -> pd.Series:
    return pd.to_numeric(table["samples"], errors="coerce") >= table["N"]


def _panel(panel: Axes, points: pd.DataFrame, predicted: str, measured: str, unit: float, label: str) -> None:
    low = FLOOR if unit > 1 else 0.0
    x, y = ((points[column].fillna(0.0) / unit).clip(lower=low) for column in (measured, predicted))
    if not len(points):
        canvas.note(panel, "not measured")
        return
    low, high = canvas.limits([*x, *y])
    panel.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel=f"measured {label}")
    panel.set_ylabel(f"predicted {label}")
    for axis in (panel.xaxis, panel.yaxis):
        canvas.decades(axis, low, high)
    ends = np.array([low, high])
    panel.fill_between(ends, ends / FACTOR, ends * FACTOR, color=canvas.SHADE, linewidth=0, zorder=0)
    panel.plot(ends, ends, color=canvas.PALE, linewidth=1.1, zorder=1)
    panel.scatter(x, y, c=points["kind"].map(COLOURS), s=20, linewidths=0, alpha=0.8, zorder=3)


def _reading(band: Patch) -> list[key.Entry]:
    line = Line2D([], [], color=canvas.PALE, linewidth=1.1)
    return [(line, "predicted as measured"), (band, f"within a factor of {FACTOR:g}")]


def within(ratios: pd.Series) -> float:
    """Share of ratios within the factor; a missing one is not."""
    return float(((ratios <= FACTOR) & (ratios >= 1 / FACTOR)).mean())


def median_factor(ratios: pd.Series) -> float:
    """The median factor by which predictions are off, in either direction."""
    return float(np.exp(np.log(ratios.dropna()).abs().median()))


def _finding(points: pd.DataFrame) -> str:
    ratios = points["seconds_ratio"]
    return (
        f"Predicted seconds: {labels.share_label(within(ratios))} within a factor of {FACTOR:g}, "
        f"median error a factor of {labels.rounded(median_factor(ratios))}"
    )


def _caption(points: pd.DataFrame, in_full: int, slow: int) -> str:
    memory, lost = points["memory_ratio"].dropna(), int(points["seconds"].isna().sum())
    return labels.fitted(
        f"Predicted against measured seconds of an estimate, for {len(points)} cases of "
        f"{counted(points['problem'].nunique(), 'problem')}, metrics and methods.",
        f"{lost} ended without seconds and count as missed." if lost else "",
        f"Left out: {in_full} predicted by running on all samples." if in_full else "",
        f"Not measured: {slow} predicted to take too long." if slow else "",
        f"Memory peaks: {labels.share_label(within(memory))} of {len(memory)} within a factor of {FACTOR:g}; "
        f"those below {FLOOR:g} MiB count as {FLOOR:g} MiB."
        if len(memory)
        else "",
        "Budgets: those predicted to reach the tolerance.",
    )
