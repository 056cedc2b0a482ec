"""Growth of the seconds of NTK metrics of recurrent networks with trials, steps and probes: measured slopes."""

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
"""Not expected to be linear: the one goes back from every step, the other draws a tangent for each trial."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """A row for each kind of network, a column for each size, a line for each method with its slope."""
    points = base.measured(table, "seconds")
    if not len(points):
        return base.nothing(table[[*COLUMNS, "status", "reason"]], labels.why_not(table))
    looks, kinds = curves.looks(points), list(dict.fromkeys(points["kind"]))
    middle = {size: points.loc[points["varied"] != size, size].mode() for size in SIZES}
    said = ", ".join(f"{values.iloc[0]:g} {SIZES[size].split()[0]}" for size, values in middle.items() if len(values))
    figure, grid = canvas.sheet(
        [canvas.Row(2.5, above=0.55, below=0.42) for _ in kinds],
        len(SIZES),
        title="What NTK metrics of a recurrent network cost against trials, steps and probes",
        subtitle=f"H = {points['H'].iloc[0]:g}, around {said}  ·  {base.settings_line(table)}",
        key=[("method", curves.entries(looks.values())), ("how to read", [curves.QUARTILES])],
        gap=0.25,
        bottom=0.1,
    )
    seconds = points[["seconds", "seconds_q25", "seconds_q75"]].stack()
    slopes: dict[tuple[str, str, str], tuple[float, float]] = {}
    for panels, kind in zip(grid, kinds, strict=True):
        for panel, (size, label) in zip(panels, SIZES.items(), strict=True):
            lines = points[(points["kind"] == kind) & (points["varied"] == size)]
            for method, found in _panel(panel, lines, size, seconds, looks).items():
                slopes[kind, size, method] = found
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
    panel: Axes, lines: pd.DataFrame, size: str, seconds: pd.Series, looks: dict[str, styles.Look]
) -> dict[str, tuple[float, float]]:
    """Lines over one size, each with its slope at its end; the slopes with half their intervals."""
    slopes, ends = {}, []
    curves.logarithmic(panel, lines[size], seconds)
    low, high = panel.get_xlim()
    panel.set_xlim(low, high * (high / low) ** 0.3)  # room for slopes
    for method, line in lines.groupby("method", sort=False):
        line = line.sort_values(size)
        curves.line(panel, line.drop(columns="m", errors="ignore"), size, "seconds", looks[method])
        slope, half = slopes[method] = curves.slope(line[size], line["seconds"])
        if math.isfinite(slope):
            text = f"{slope:.2f}" + (f" ± {half:.2f}" if math.isfinite(half) else "")
            ends.append((line["seconds"].iloc[-1], line[size].iloc[-1], text, looks[method].colour))
    curves.counts(panel, lines[size])
    canvas.label_ends(panel, ends)
    return slopes


def _caption(table: pd.DataFrame, slopes: dict[tuple[str, str, str], tuple[float, float]]) -> str:
    text = (
        "Seconds of one estimate against one size with the others fixed, medians with quartiles of interleaved calls; "
        "slopes are fitted to the logarithms. Shared-probe alignment takes four passes per probe, one-sided traces "
        "one. The expected slope is 1, or less at small sizes, where the overhead of a call shows; against steps it is "
        "2 to 3 for the exact trace, which goes back from every step, and less than 1 for the per-sample trace."
    )
    known = {key: pair for key, pair in slopes.items() if math.isfinite(pair[1])}
    linear = [pair for (_, size, method), pair in known.items() if (method, size) not in NOT_LINEAR]
    if linear:
        values = [slope for slope, _ in linear]
        steeper = sum(slope - half > 1 for slope, half in linear)
        text += (
            f" Claim: linear in each size. Measured over {len(linear)} lines: a median slope of "
            f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f}). Conclusion: {steeper} of "
            "them are steeper than 1 by their 95 % interval."
        )
    exact = [
        f"{slope:.2f} ± {half:.2f} ({kind.upper()})"
        for (kind, size, method), (slope, half) in known.items()
        if (method, size) == ("recurrent_exact_trace", "T")
    ]
    if exact:
        text += f" Exact trace against steps: {', '.join(exact)}."
    left = table[table["status"] != "ok"]
    return text + (f" Not measured: {len(left)} points ({labels.why_not(table)})." if len(left) else "")
