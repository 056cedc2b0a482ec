"""Alignment, effective rank, trace and norm of a transformer's NTK along its training, whole and by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ntkbench.figures.plotting import base, canvas, labels, styles
from ntkbench.figures.plotting.key import Key

TABLE = "language_training"
COLUMNS: tuple[str, ...] = ("problem", "N", "O", "P", "step", "loss", "part", "parameters", "metric", "value", "low")
COLUMNS += ("high", "ratio", "ratio_standard_error", "probes")

METRICS = {
    "alignment": "alignment with step 0",
    "effective_rank": "effective rank",
    "trace": "trace",
    "norm": "Frobenius norm",
}
WHOLE = "all parameters"
FACTORS = {"K": "K", "P": "P P*"}
DASHES = {"K": "--", "P": ":"}


def draw(table: pd.DataFrame) -> base.Drawing:
    """A panel for each metric, a line for each part of the parameters, bars for 95 % intervals."""
    shown = base.measured(table, "value", "step", "low", "high")
    shown = shown[shown["metric"].isin(METRICS)]
    if not len(shown):
        return base.nothing(table[list(COLUMNS)], labels.why_not(table))
    parts = list(dict.fromkeys(shown["part"]))
    others = [part for part in parts if part not in (WHOLE, *FACTORS)]
    colours = {part: styles.COLOURS[i % len(styles.COLOURS)] for i, part in enumerate(others)}
    colours |= dict.fromkeys((WHOLE, *FACTORS), styles.BLACK)
    figure, grid = canvas.sheet(
        [canvas.Row(2.4, above=0.35, below=0.3)] * 2,
        2,
        title=_title(shown),
        subtitle=f"{_sizes(shown)}  ·  {base.settings_line(table)}",
        key=_key(parts, colours),
        left=0.85,
        gap=0.8,
        bottom=0.3,
    )
    last = shown["step"].max()
    for (metric, label), panel in zip(METRICS.items(), [panel for row in grid for panel in row], strict=True):
        lines = shown[shown["metric"] == metric]
        for part, line in lines.groupby("part", sort=False):
            line = line.sort_values("step")
            bars = [line["value"] - line["low"], line["high"] - line["value"]]
            width = 1.8 if part == WHOLE else 1.1
            style: dict[str, Any] = {"color": colours[part], "linestyle": DASHES.get(part, "-")}
            panel.errorbar(line["step"], line["value"], bars, linewidth=width, elinewidth=0.9, **style)
        _axes(panel, lines, last, metric)
        panel.set_ylabel(label)
    for panel in grid[1]:
        panel.set_xlabel("training step")
    return base.Drawing(figure, shown[list(COLUMNS)], _caption(shown))


def _key(parts: Sequence[str], colours: Mapping[str, str]) -> Key:
    """A heading for each block, one for the parameters outside of blocks, and one for the factors."""
    found: dict[str, list[tuple[Line2D, str]]] = {}
    for part in parts:
        block, _, inside = part.partition(", ")
        style: dict[str, Any] = {"color": colours[part], "linestyle": DASHES.get(part, "-")}
        entry = Line2D([], [], **style), FACTORS.get(part, labels.short(inside or part))
        heading = "factors" if part in FACTORS else labels.short(block) if inside else "parameters"
        found.setdefault(heading, []).append(entry)
    return list(found.items())


def _axes(panel: Axes, lines: pd.DataFrame, last: float, metric: str) -> None:
    panel.set_xscale("symlog", linthresh=1, linscale=0.4)
    panel.xaxis.set_major_locator(FixedLocator([0, *(10**k for k in range(7) if 10**k <= last)]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_xlim(-0.1, max(last, 1) * 1.3)
    if metric == "alignment":
        panel.set_ylim(0, 1.03)
        return
    low, high = canvas.limits(lines["value"], pad=1.4, ratio=12)
    panel.set(yscale="log", ylim=(low, high))
    canvas.decades(panel.yaxis, low, high)


def _sizes(shown: pd.DataFrame) -> str:
    one = shown.iloc[0]
    return f"{labels.name_label(one['problem'])}: O = {one['O']:g}, P = {labels.count_label(one['P'])}"


def _title(shown: pd.DataFrame) -> str:
    last = shown[(shown["part"] == WHOLE) & (shown["step"] == shown["step"].max())].set_index("metric")
    if not {"alignment", "effective_rank"} <= set(last.index):
        return "The NTK of a transformer along its training"
    aligned, rank = last.loc["alignment"], last.loc["effective_rank"]
    half = 1.96 * rank["ratio_standard_error"]
    times = labels.interval_label(rank["ratio"], rank["ratio"] - half, rank["ratio"] + half)
    alignment = labels.interval_label(aligned["value"], aligned["low"], aligned["high"])
    return (
        f"After {rank['step']:g} steps, the alignment with step 0 is {alignment}, and the effective rank {times} "
        "times as large"
    )


def _caption(shown: pd.DataFrame) -> str:
    losses = shown.sort_values("step")["loss"]
    first, last = (labels.rounded(losses.iloc[i], 3) for i in (0, -1))
    return (
        "NTK of a transformer's logits along its training, whole and by parts, which add up to it. "
        "Factors of Theta = P K P*: K is exact, P P* estimated. The loss goes from "
        f"{first} to {last} nats per token. Bars: 95 % intervals from {shown['probes'].max():g} probes."
    )
