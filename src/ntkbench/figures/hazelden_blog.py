"""The blog post's figures: Hutch++ against its samples; alignment from shared probes and from three Hutch++ traces."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ntkbench.figures.plotting import base, canvas, curves, labels, styles

TABLE = "hazelden_blog"
QUANTITIES = tuple(f"{name}{q}" for name in ("seconds", "value", "error") for q in ("", "_q25", "_q75"))
COLUMNS = ("problem", "metric", "method", "title", "m", "n", "P", "passes", "reference", *QUANTITIES)
PUBLISHED = "0.33 s and an error below about 1 % for 50 samples"


def draw(table: pd.DataFrame) -> base.Drawing:
    """A row for each metric: seconds, estimate and error against passes."""
    points = base.measured(table, "seconds", "error", "passes")
    if not len(points):
        return base.nothing(points, labels.why_not(table))
    looks = curves.looks(points)
    metrics = [metric for metric in ("trace", "alignment") if metric in set(points["metric"])]
    figure, grid = canvas.sheet(
        [canvas.Row(2.2, above=0.6, below=0.42) for _ in metrics],
        3,
        title=f"Estimates against samples (blog post): {labels.name_label(points['problem'].iloc[0])}",
        subtitle=base.settings_line(points),
        key=[("method", curves.entries(looks.values())), ("how to read", [curves.QUARTILES])],
        gap=0.75,
    )
    for panels, metric in zip(grid, metrics, strict=True):
        rows = points[points["metric"] == metric]
        exact = rows["reference"].iloc[0]
        for panel, quantity in zip(panels, ("seconds", "value", "error"), strict=True):
            for method, line in rows.groupby("method", sort=False):
                curves.line(panel, line, "passes", quantity, looks[method])
                if quantity != "value":
                    _samples(panel, line, quantity)
            curves.logarithmic(panel, rows["passes"], rows[[quantity, f"{quantity}_q25", f"{quantity}_q75"]].stack())
            if quantity == "value":
                panel.set_yscale("linear")
                panel.autoscale(axis="y")
                panel.yaxis.set_major_locator(MaxNLocator(5))
                panel.yaxis.set_major_formatter("{x:g}")
                panel.axhline(exact, color="black", linewidth=0.9, zorder=1)
            label = {"seconds": "seconds", "value": metric, "error": "relative error"}[quantity]
            panel.set(xlabel="passes", ylabel=label)
        canvas.title(panels[0], labels.metric_label(metric), f"exact {exact:.5g}")
    return base.Drawing(figure, points[[*COLUMNS]], _caption(points))


def _samples(panel: Axes, line: pd.DataFrame, quantity: str) -> None:
    """How many samples each point of a line has: above errors; over Hutch++'s seconds, and under the others'."""
    where: dict[str, Any] = {"xytext": (0, 7), "ha": "center"}
    if quantity == "seconds":
        above = line["method"].iloc[0] == "hutchpp"
        where = {"xytext": (-4, 5), "ha": "right"} if above else {"xytext": (4, -13), "ha": "left"}
    for row in line.itertuples():
        at = (row.passes, getattr(row, quantity))
        panel.annotate(f"{row.m:g}", at, textcoords="offset points", fontsize=9, color=styles.GREY, zorder=4, **where)


def _caption(points: pd.DataFrame) -> str:
    text = (
        "Runtime, estimate and relative error against passes (one Jacobian product each), medians over reruns with "
        "quartiles; the numbers at points are samples: columns in the sketch of Hutch++, as many in its residual, and "
        "probes of shared-probe alignment. Black: the exact value; the post's errors are against each curve's own last "
        f"value. The post reports {PUBLISHED} of shared probes, on two networks of 128 units and 100 trials of 10 "
        "steps."
    )
    shared = points[(points["method"] == "shared_probe_alignment") & (points["m"] >= 50)]
    if len(shared):
        row = shared.loc[shared["m"].idxmin()]
        text += (
            f" Here {row['m']:g} shared probes take {labels.rounded(row['seconds'])} s with a median "
            f"error of {labels.share_label(row['error'])}."
        )
    both = points[points["metric"] == "alignment"].pivot_table(index="m", columns="method", values=["error", "passes"])
    both = both.dropna()
    if len(both) and len(both.columns) == 4:
        last = both.iloc[-1]
        shared, hutchpp = (last["error", name] for name in ("shared_probe_alignment", "hutchpp"))
        fewer = last["passes", "hutchpp"] / last["passes", "shared_probe_alignment"]
        text += (
            f" At {both.index[-1]:g} samples shared probes have an error of {labels.share_label(shared)} and three "
            f"Hutch++ traces one of {labels.share_label(hutchpp)} for {labels.rounded(fewer)} times as many passes: "
            f"what the post says of them {'agrees' if shared < hutchpp * fewer**0.5 else 'does not agree'} at equal "
            "passes (by the Monte Carlo rate). What does not: the networks, and so seconds."
        )
    return text
