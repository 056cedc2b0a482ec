"""Mohamadi et al. 2023, figures 2 to 6: how well kernels between samples stand for the NTK, against width."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ntkbench.figures.plotting import base, canvas, curves, labels, pntk, styles
from ntkbench.figures.plotting.pntk import PNTK, QUANTITIES, family_label, looks_of, slope

TABLE = "mohamadi_quality"
COLUMNS = pntk.COLUMNS
PUBLISHED = {64: 0.58, 2048: 0.07}
"""Relative difference of the pNTK at initialisation, FC network, O = 10."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """A row for each quantity, a column for each family of networks; medians over initialisations."""
    points = base.measured(table, "off_diagonal", "width")
    points = points[points["step"] == 0]
    if not len(points):
        return base.nothing(points, labels.why_not(table))
    plotted = pntk.summary(points, QUANTITIES)
    looks, published = looks_of(plotted), styles.KNOWN[PNTK][0]
    full = Line2D([], [], color="black", linewidth=1.2, linestyle=(0, (4, 2))), "the NTK itself"
    guide = Line2D([], [], color=canvas.PALE, linewidth=1.2, linestyle=(0, (1, 1.5))), "slope \N{MINUS SIGN}½"
    known = Line2D([], [], color=published, marker="x", linestyle=""), "expected"
    figure, panels = pntk.panels(
        table,
        plotted,
        QUANTITIES,
        title="Kernels between samples that stand for the NTK, at initialisation (Mohamadi et al., figures 2 to 6)",
        key=[("kernel", curves.entries(looks.values())), ("how to read", [curves.QUARTILES, full, guide, known])],
        above=0.45,
        xlabel="width",
    )
    for (quantity, family), panel in panels.items():
        rows = plotted[(plotted["family"] == family) & (plotted["quantity"] == quantity)]
        _panel(panel, rows, quantity, looks)
        if quantity == "difference":
            canvas.title(panel, family_label(family), _sloped(points[points["family"] == family]))
            if family == "fc":
                panel.plot(*zip(*PUBLISHED.items(), strict=True), "x", color=published, zorder=5)
    return base.Drawing(figure, plotted, _caption(points))


def _sloped(points: pd.DataFrame) -> str:
    value, half = slope(points, "sum_of_logits")
    return f"pNTK: slope {value:.2f} ± {half:.2f}" if np.isfinite(half) else ""


def _panel(panel: Axes, rows: pd.DataFrame, quantity: str, looks: dict[str, styles.Look]) -> None:
    values = rows.loc[rows["value"] > 0, "value"].clip(1e-6, 1e6)
    if not len(values):
        canvas.note(panel, "not measured")
        return
    for kernel, line in rows.groupby("kernel", sort=False):
        if kernel == "full":
            if quantity in ("accuracy", "off_diagonal"):
                line = line.sort_values("width")
                panel.plot(line["width"], line["value"], color="black", linewidth=1.2, linestyle=(0, (4, 2)), zorder=4)
        elif quantity != "off_diagonal":
            curves.line(panel, line, "width", "value", looks[kernel])
    sizes = np.sort(rows["width"].unique())
    if quantity == "accuracy":
        panel.set(xscale="log", xlim=canvas.limits(sizes, ratio=8), ylim=(0, 1))
    else:
        guide = 1.4 * values.max() * (sizes / sizes[0]) ** -0.5 if quantity in ("difference", "off_diagonal") else []
        if len(guide):
            panel.plot(sizes, guide, color=canvas.PALE, linewidth=1.2, linestyle=(0, (1, 1.5)))
        low, high = np.nanquantile(values, [0.0, 1.0])
        curves.logarithmic(panel, sizes, [*values, *guide], ratio=8 if high / low < 100 else 40)
    curves.counts(panel, sizes, most=4)


def _caption(points: pd.DataFrame) -> str:
    inits = labels.range_label(points.groupby(["family", "width"])["init"].nunique())
    text = (
        "Kernels A between samples that stand for Theta as A (x) I, for networks with He initialisation on "
        f"scikit-learn's digits (O = 10; {pntk.images(points)}), against width (channels, or WideResNet's factor); "
        f"medians over {inits} initialisations with quartiles. The trace kernel is the best of all in the Frobenius "
        "norm, the floor of the first row. Kernel regression f_0(x) + K(x, X) K(X, X)^-1 (Y - f_0(X)) is compared on "
        "held-out images. Condition numbers of the NTK itself may be at the limit of float64."
    )
    slopes = {family: slope(points[points["family"] == family], PNTK) for family in dict.fromkeys(points["family"])}
    words, agreeing = [], []
    for family, (value, half) in slopes.items():
        if np.isfinite(half):
            words.append(f"{family_label(family)} {value:.2f} ± {half:.2f}")
            agreeing.append(abs(value + 0.5) <= half)
    if words:
        text += (
            f" Slopes of the pNTK's relative difference, 95 % intervals, beside the theorem's -1/2: {', '.join(words)}"
        )
        text += (
            "."
            if all(agreeing)
            else (
                "; where -1/2 is outside, widths are too small for the leading term, or the network's width is not "
                "that of all its layers."
            )
        )
    text += _expected(points)
    accuracy = points.groupby("kernel")["accuracy"].mean()
    if {"full", "sum_of_logits"} <= set(accuracy.index):
        text += (
            f" Test accuracy over all networks: {accuracy['full']:.2f} with Theta, {accuracy['sum_of_logits']:.2f} "
            "with the pNTK."
        )
    wide = points.pivot_table(index=["family", "width", "init"], columns="kernel", values="difference")
    if {"single_logit", "random_vector", "sum_of_logits", "trace"} <= set(wide):
        over = {name: wide[name] / wide["trace"] for name in ("sum_of_logits", "single_logit", "random_vector")}
        ranges = {name: curves.ratio_words(ratios) for name, ratios in over.items()}
        text += (
            f" What the paper does not show: differences over the floor's are {ranges['sum_of_logits']} for the sum of "
            f"logits, {ranges['single_logit']} for a single logit and {ranges['random_vector']} for a random direction"
        )
        medians = [ratios.median() for ratios in over.values()]
        text += "; the sum is nothing special at initialisation." if max(medians) < 1.1 * min(medians) else "."
    return text


def _expected(points: pd.DataFrame) -> str:
    rows: Any = points[(points["family"] == "fc") & (points["kernel"] == "sum_of_logits")]
    found = rows.groupby("width")["difference"].median()
    said = [f"{found[w]:.2f} at width {w} ({value:.2f} expected)" for w, value in PUBLISHED.items() if w in found.index]
    return f" Fully connected: {', '.join(said)}." if said else ""
