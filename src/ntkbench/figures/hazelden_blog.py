"""The blog post's figures: Hutch++ against its samples; alignment from shared probes and from three Hutch++ traces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ntkbench.figures.plotting import base, canvas, claims, curves, labels, sources, styles
from ntkbench.measure import laws
from ntkbench.units import seconds_label

TABLE = "hazelden_blog"
QUANTITIES = tuple(f"{name}{q}" for name in ("seconds", "value", "error") for q in ("", "_q25", "_q75"))
COLUMNS = ("problem", "metric", "method", "title", "m", "n", "P", "passes", "reference", "seeds", *QUANTITIES)
HUTCHPP = "hutchpp"
CAPTION = (
    "Runtime, estimate and relative error against passes (one Jacobian product each), medians over reruns with "
    "quartiles. Numbers at points are samples: columns in the sketch of Hutch++ (and as many residual probes), or "
    "probes of shared-probe alignment. Black: the exact value."
)


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
        title=_title(points),
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
    return base.Drawing(figure, points[[*COLUMNS]], CAPTION, _claims(points))


def _title(points: pd.DataFrame) -> str:
    """The error and seconds of shared probes at the post's number of samples; the network alone if they are missing."""
    network = labels.name_label(points["problem"].iloc[0])
    samples = float(sources.values("hazelden_blog").set_index("quantity")["value"]["samples"])
    shared = points[(points["method"] == claims.SHARED) & (points["m"] == samples)]
    if not len(shared):
        return f"Estimates against samples (blog post): {network}"
    row = shared.iloc[0]
    return (
        f"{samples:g} shared probes give the alignment to a median error of {labels.share_label(row['error'])} in "
        f"{seconds_label(row['seconds'])} (blog post; {network})"
    )


def _samples(panel: Axes, line: pd.DataFrame, quantity: str) -> None:
    """The number of samples at each point: above errors and the seconds of Hutch++, below other seconds."""
    where: dict[str, Any] = {"xytext": (0, 7), "ha": "center"}
    if quantity == "seconds":
        above = line["method"].iloc[0] == "hutchpp"
        where = {"xytext": (-4, 5), "ha": "right"} if above else {"xytext": (4, -13), "ha": "left"}
    for row in line.itertuples():
        at = (row.passes, getattr(row, quantity))
        panel.annotate(f"{row.m:g}", at, textcoords="offset points", fontsize=9, color=styles.GREY, zorder=4, **where)


def _claims(points: pd.DataFrame) -> tuple[claims.Claim, ...]:
    """Seconds and error of shared probes against the post's, shared probes against Hutch++, and where the two cross."""
    there = sources.values("hazelden_blog").set_index("quantity")
    samples, seconds, error = (float(there["value"][name]) for name in ("samples", "seconds", "error"))
    alignment = points[points["metric"] == "alignment"]
    shared = alignment[alignment["method"] == claims.SHARED]
    common: dict[str, Any] = {
        "source": "Hazelden's blog post",
        "there": "two recurrent networks of 128 units, 100 trials of 10 steps",
        "here": f"{labels.name_label(points['problem'].iloc[0])}, {labels.sizes_label(points, 'n', 'P')}",
    }
    made = []
    for row in shared[shared["m"] == samples].head(1).to_dict("records"):
        made += [
            claims.Claim(
                name=f"error of {samples:g} shared probes",
                statement=f"{samples:g} shared probes give the alignment with an error below "
                f"{labels.share_label(error)}",
                published=error,
                accuracy=there["accuracy"]["error"],
                relation=claims.BELOW,
                measured=laws.banded(laws.fit(shared).error(row["passes"])),
                runs=claims.count(row["seeds"]),
                of="estimates",
                note="there against the curve's own last value",
                **common,
            ),
            claims.Claim(
                name=f"seconds of {samples:g} shared probes",
                statement=f"{samples:g} shared probes take {seconds:g} seconds",
                published=seconds,
                accuracy=there["accuracy"]["seconds"],
                measured=(row["seconds"], row["seconds_q25"], row["seconds_q75"]),
                spread="quartiles",
                runs=claims.count(row.get("calls", row["seeds"])),
                of="calls",
                unit="s",
                addressed=False,
                note="seconds of another machine and network do not compare",
                **common,
            ),
        ]
    known = float(there["value"]["crossing"])
    counted = crossings(alignment)
    crossed = claims.Claim(
        name="crossing of two estimates",
        statement=f"two curves cross near {known:g} samples",
        published=known,
        accuracy=there["accuracy"]["crossing"],
        measured=claims.ranged(counted.values()),
        spread="range over ways to count samples",
        runs=len(counted),
        of="ways",
        unit="samples",
        note="errors of the alignment by shared probes and by three Hutch++ traces; " + _open(counted),
        **common,
    )
    return (*made, *claims.shared_probes(points, HUTCHPP), crossed)


def _open(counted: Mapping[str, float]) -> str:
    """What the crossings leave open."""
    if len(counted) > 1:
        return "it is not kept what the post counts"
    left = f", except at equal {next(iter(counted))}" if counted else ""
    return f"the budgets leave the crossing open{left}"


def crossings(alignment: pd.DataFrame) -> dict[str, float]:
    """Samples above which three Hutch++ traces have smaller errors than shared probes, by what is equal for both.

    With equal samples, a column of a sketch counts as much as a shared probe. With equal passes, the result is the
    number of shared probes. A crossing outside of the budgets that both have is left out.

    Args:
        alignment: measured rows of the alignment.
    """
    both = [alignment[alignment["method"] == name] for name in (HUTCHPP, claims.SHARED)]
    if not all(map(len, both)):
        return {}
    each = float((both[1]["passes"] / both[1]["m"]).iloc[0])
    at = {"samples": _crossing(*(rows.assign(passes=rows["m"]) for rows in both)), "passes": _crossing(*both) / each}
    return {equal: samples for equal, samples in at.items() if np.isfinite(samples)}


def _crossing(late: pd.DataFrame, early: pd.DataFrame) -> float:
    """The budget above which ``late`` has the smaller median error, by fitted laws; ``nan`` if there is none."""
    budgets = [np.sort(rows["passes"].unique()) for rows in (late, early)]
    low, high = max(some[0] for some in budgets), min(some[-1] for some in budgets)
    if low >= high:
        return math.nan
    grid = np.linspace(math.log(low), math.log(high), 1000)
    above, below = (np.interp(grid, np.log(law.passes), np.log(law.errors[0])) for law in map(laws.fit, (late, early)))
    larger = np.flatnonzero(above >= below)
    if not len(larger) or larger[-1] + 1 == len(grid):
        return math.nan
    return float(np.exp(grid[larger[-1]]))
