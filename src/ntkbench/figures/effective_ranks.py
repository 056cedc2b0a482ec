"""Effective ranks of Theta and of kernels between samples, by weights and BatchNorm's statistics."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ntkbench.figures.plotting import base, canvas, labels, styles

TABLE = "effective_ranks"
COLUMNS: tuple[str, ...] = ("problem", "weights", "statistics", "kernel", "size", "effective_rank", "N", "O", "P", "n")
COLUMNS += ("effective_rank_low", "effective_rank_high", "entropy_effective_rank", "first_share")

KERNELS = {
    "theta": "Θ, all outputs",
    "trace": "trace kernel",
    "sum_of_logits": "pNTK (sum of logits)",
    "single_logit": "single logits",
}
"""Lines of a panel, from top to bottom."""
STATISTICS = {
    "stored": (styles.BLUE, "o", "of training"),
    "calibrated": (styles.GREEN, "D", "of these images"),
    "uncalibrated": (styles.VERMILION, "^", "means 0, variances 1"),
}
OFFSETS = {"initial": 0.17, "trained": -0.17}
"""Vertical offsets within a kernel's line, by weights."""
FACES = {"initial": "white", "trained": None}


def draw(table: pd.DataFrame) -> base.Drawing:
    """A panel for each problem, a pair of lines for each kernel."""
    points = base.measured(table, "effective_rank", "effective_rank_low", "effective_rank_high", "n")
    known = points["kernel"].isin(KERNELS) & points["statistics"].isin(STATISTICS) & points["weights"].isin(OFFSETS)
    points = points[known & (points["effective_rank_low"] > 0)]
    if not len(points):
        return base.nothing(table, labels.why_not(table))
    problems = list(dict.fromkeys(points["problem"]))
    figure, grid = canvas.sheet(
        [canvas.Row(2.6, above=0.5, below=0.3)],
        len(problems),
        title=_title(points),
        subtitle=base.settings_line(table),
        key=[("BatchNorm's statistics", _statistics(points)), ("weights", _weights())],
        left=0.4 + canvas.text_width(KERNELS.values(), 10),
        gap=0.25,
        bottom=0.4,
    )
    low, high = canvas.limits([1.0, *points["effective_rank_high"]], pad=1.15, ratio=10)
    for panel, problem in zip(grid[0], problems, strict=True):
        here = points[points["problem"] == problem]
        _panel(panel, here)
        panel.set(xscale="log", xlim=(low, high), ylim=(len(KERNELS) - 0.5, -0.5), xlabel="effective rank")
        panel.set_yticks(range(len(KERNELS)), KERNELS.values() if panel is grid[0][0] else [""] * len(KERNELS))
        panel.tick_params(axis="y", length=0)
        canvas.decades(panel.xaxis, low, high)
        canvas.title(panel, labels.name_label(problem), labels.sizes_label(here, "n", "N", "P"))
    kept = points[[column for column in COLUMNS if column in points]].reset_index(drop=True)
    return base.Drawing(figure, kept, _caption(points))


def _panel(panel: Axes, here: pd.DataFrame) -> None:
    panel.axvline(1, color=canvas.PALE, linewidth=1, zorder=1)
    for i in range(1, len(KERNELS)):
        panel.axhline(i - 0.5, color=canvas.SHADE, linewidth=1, zorder=0)
    lines = {kernel: i for i, kernel in enumerate(KERNELS)}
    for row in here.to_dict("records"):
        colour, marker, _ = STATISTICS[row["statistics"]]
        y = lines[row["kernel"]] - OFFSETS[row["weights"]]
        ends = [row["effective_rank_low"], row["effective_rank_high"]]
        panel.plot(ends, [y, y], color=colour, linewidth=1.2, solid_capstyle="round", zorder=2)
        face = FACES[row["weights"]] or colour
        panel.plot(
            row["effective_rank"],
            y,
            marker,
            color=colour,
            markerfacecolor=face,
            markersize=6.5,
            clip_on=False,
            zorder=3,
        )


def _statistics(points: pd.DataFrame) -> list[tuple[Line2D, str]]:
    there = set(points["statistics"])
    return [
        (Line2D([], [], color=colour, marker=marker, linestyle="", markersize=6.5), words)
        for name, (colour, marker, words) in STATISTICS.items()
        if name in there
    ]


def _weights() -> list[tuple[Line2D, str]]:
    sample: dict[str, Any] = {"color": styles.GREY, "marker": "o", "linestyle": "", "markersize": 6.5}
    return [(Line2D([], [], **sample, markerfacecolor="white"), "initial"), (Line2D([], [], **sample), "trained")]


# --- title and caption


def _title(points: pd.DataFrame) -> str:
    low, high = points["effective_rank_low"].min(), points["effective_rank_high"].max()
    ends = f"from {labels.rounded(low)} to {labels.rounded(high)}"
    many = "the same networks" if points["problem"].nunique() > 1 else "one network"
    return f"Effective ranks {ends} of {many}, by kernel, weights and statistics of BatchNorm"


def _caption(points: pd.DataFrame) -> str:
    said = []
    for kernel, words in KERNELS.items():
        rows = points[points["kernel"] == kernel]
        if len(rows):
            said.append(f"{words} {labels.span([*rows['effective_rank_low'], *rows['effective_rank_high']])}")
    copies = " Images of CIFAR-10 are JPEG copies." if points["problem"].str.contains("_cifar").any() else ""
    return (
        "Effective rank, (tr A)^2/||A||_F^2, of Theta (n x n) and of kernels between samples (N x N), with BatchNorm "
        f"in eval mode. Single logits: median and range. Over all networks, {'; '.join(said)}.{copies}"
    )
