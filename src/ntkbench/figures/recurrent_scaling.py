"""How seconds of recurrent networks' NTK metrics grow with trials, steps and probes: measured slopes."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ntkbench.figures.plotting import base, canvas, curves, labels, styles

TABLE = "recurrent_scaling"
QUANTITIES = ("seconds", "seconds_q25", "seconds_q75")
COLUMNS = ("task", "kind", "H", "varied", "N", "T", "probes", "method", "title", "metric", "passes", *QUANTITIES)
SIZES = {"N": "trials N", "T": "steps T", "probes": "probes"}
NOT_LINEAR = {("recurrent_exact_trace", "T"), ("per_sample_trace_forward", "T")}
"""Not expected to be linear: the first runs backward from every step, the second draws a tangent for each trial."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """A row for each kind of network, a column for each size, a line for each method with its slope."""
    points = base.measured(table, "seconds")
    if not len(points):
        return base.nothing(table[[*COLUMNS, "status", "reason"]], labels.why_not(table))
    looks, kinds = curves.looks(points), list(dict.fromkeys(points["kind"]))
    lines = points.groupby(["kind", "varied", "method"], sort=False)
    slopes = {case: curves.slope(line[case[1]], line["seconds"]) for case, line in lines if case[1] in SIZES}
    middle = {size: points.loc[points["varied"] != size, size].mode() for size in SIZES}
    said = ", ".join(f"{values.iloc[0]:g} {SIZES[size].split()[0]}" for size, values in middle.items() if len(values))
    figure, grid = canvas.sheet(
        [canvas.Row(2.5, above=0.55, below=0.42) for _ in kinds],
        len(SIZES),
        title=_title(slopes),
        subtitle=f"H = {points['H'].iloc[0]:g}, around {said}  ·  {base.settings_line(table)}",
        key=[("method", curves.entries(looks.values())), ("how to read", [curves.QUARTILES])],
        gap=0.25,
        bottom=0.1,
    )
    seconds = points[["seconds", "seconds_q25", "seconds_q75"]].stack()
    for panels, kind in zip(grid, kinds, strict=True):
        for panel, (size, label) in zip(panels, SIZES.items(), strict=True):
            here = points[(points["kind"] == kind) & (points["varied"] == size)]
            own = {method: pair for (one, varied, method), pair in slopes.items() if (one, varied) == (kind, size)}
            _panel(panel, here, size, seconds, looks, own)
            panel.set_xlabel(label)
            panel.tick_params(labelleft=size == "N")
        panels[0].set_ylabel("seconds")
        canvas.title(
            panels[0], labels.short(kind.upper()), "at a line's end: its slope, with the 95 % interval of the fit"
        )
    keys = list(zip(table["kind"], table["varied"], table["method"], strict=True))
    nothing = (math.nan, math.nan)
    plotted = table[[*COLUMNS, "status", "reason"]].assign(
        slope=[slopes.get(key, nothing)[0] for key in keys],
        slope_interval=[slopes.get(key, nothing)[1] for key in keys],
    )
    return base.Drawing(figure, plotted, _caption(table, slopes))


def _panel(
    panel: Axes,
    lines: pd.DataFrame,
    size: str,
    seconds: pd.Series,
    looks: dict[str, styles.Look],
    slopes: dict[str, tuple[float, float]],
) -> None:
    """Lines against one size, by method, each with its slope and half of the slope's interval at its end."""
    ends = []
    curves.logarithmic(panel, lines[size], seconds)
    low, high = panel.get_xlim()
    panel.set_xlim(low, high * (high / low) ** 0.3)  # room for slopes
    for method, line in lines.groupby("method", sort=False):
        line = line.sort_values(size)
        curves.line(panel, line.drop(columns="m", errors="ignore"), size, "seconds", looks[method])
        slope, half = slopes[method]
        if math.isfinite(slope):
            text = f"{slope:.2f}" + (f" ± {half:.2f}" if math.isfinite(half) else "")
            ends.append((line["seconds"].iloc[-1], line[size].iloc[-1], text, looks[method].colour))
    curves.counts(panel, lines[size])
    canvas.label_ends(panel, ends)


def _slopes(slopes: dict[tuple[str, str, str], tuple[float, float]]) -> list[tuple[float, float]]:
    """The slopes that are expected to be 1, each with half of its 95 % interval."""
    return [
        pair
        for (_, size, method), pair in slopes.items()
        if math.isfinite(pair[1]) and (method, size) not in NOT_LINEAR
    ]


def _title(slopes: dict[tuple[str, str, str], tuple[float, float]]) -> str:
    """The number of costs that grow faster than linearly, by the intervals of their slopes."""
    linear = _slopes(slopes)
    if not linear:
        return "Cost of NTK metrics of a recurrent network against trials, steps and probes"
    steeper = sum(slope - half > 1 for slope, half in linear)
    return (
        f"Metrics of a recurrent network: {steeper} of {len(linear)} costs surely grow faster than trials, steps or "
        "probes"
    )


def _caption(table: pd.DataFrame, slopes: dict[tuple[str, str, str], tuple[float, float]]) -> str:
    linear = [slope for slope, _ in _slopes(slopes)]
    exact = [
        f"{slope:.2f} ± {half:.2f} ({kind.upper()})"
        for (kind, size, method), (slope, half) in slopes.items()
        if (method, size) == ("recurrent_exact_trace", "T") and math.isfinite(half)
    ]
    left = int((table["status"] != "ok").sum())
    return labels.fitted(
        "Seconds of one estimate against one size, medians with quartiles; slopes of logarithms.",
        "Expected 1, or less where the overhead of a call shows; median "
        f"{np.median(linear):.2f} ({min(linear):.2f} to {max(linear):.2f})."
        if linear
        else "",
        f"Exact trace against steps, expected 2 to 3: {', '.join(exact)}." if exact else "",
        f"Not measured: {left} points." if left else "",
    )
