"""Mohamadi et al. 2023, figures 2 to 6: how well kernels between samples stand for the NTK, against width."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ntkbench.figures.plotting import base, canvas, claims, curves, labels, pntk, styles
from ntkbench.figures.plotting.pntk import PNTK, QUANTITIES, family_label, looks_of, slope

TABLE = "mohamadi_quality"
COLUMNS = pntk.COLUMNS


def draw(table: pd.DataFrame) -> base.Drawing:
    """A row for each quantity, a column for each family of networks; medians over initialisations."""
    points = base.measured(table, "off_diagonal", "width")
    points = points[points["step"] == 0]
    if not len(points):
        return base.nothing(points, labels.why_not(table))
    plotted = pntk.summary(points, QUANTITIES)
    looks = looks_of(plotted)
    full = Line2D([], [], color="black", linewidth=1.2, linestyle=(0, (4, 2))), "the NTK itself"
    guide = Line2D([], [], color=canvas.PALE, linewidth=1.2, linestyle=(0, (1, 1.5))), "slope \N{MINUS SIGN}½"
    figure, panels = pntk.panels(
        table,
        plotted,
        QUANTITIES,
        title="Kernels between samples that stand for the NTK, at initialisation (Mohamadi et al., figures 2 to 6)",
        key=[("kernel", curves.entries(looks.values())), ("how to read", [curves.QUARTILES, full, guide])],
        above=0.45,
        xlabel="width",
    )
    for (quantity, family), panel in panels.items():
        rows = plotted[(plotted["family"] == family) & (plotted["quantity"] == quantity)]
        _panel(panel, rows, quantity, looks)
        if quantity == "difference":
            canvas.title(panel, family_label(family), _sloped(points[points["family"] == family]))
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
    slopes = {family: slope(rows, PNTK) for family, rows in points.groupby("family", sort=False)}
    slopes = {family: fit for family, fit in slopes.items() if np.isfinite(fit[1])}
    if slopes:
        said = [f"{family_label(family)} {value:.2f} ± {half:.2f}" for family, (value, half) in slopes.items()]
        held = [family_label(family) for family, (value, half) in slopes.items() if abs(value + 0.5) <= half]
        text += (
            " Claim: the pNTK's relative difference falls as width to the power -1/2. Measured, 95 % intervals over "
            f"networks: {', '.join(said)}. Conclusion: -1/2 is inside for {', '.join(held) or 'none'}, outside for "
            f"{', '.join(family_label(name) for name in slopes if family_label(name) not in held) or 'none'}."
        )
    networks = ["family", "width", "init"]
    accuracy = points.pivot_table(index=networks, columns="kernel", values="accuracy")
    if {"full", PNTK} <= set(accuracy):
        lost = (accuracy["full"] - accuracy[PNTK]).dropna()
        middle, low, high = claims.median(list(lost))
        words = "the pNTK does better", "the pNTK does worse", "the medians are not told apart"
        text += (
            f" Claim: kernel regression with the pNTK is as accurate as with Theta. Measured, {len(lost)} networks: "
            f"medians {accuracy[PNTK].median():.2f} and {accuracy['full'].median():.2f}, the median difference "
            f"{middle:.3f} ({low:.3f} to {high:.3f}). Conclusion: {claims.compared(low, high, words, 0.0)}."
        )
    wide = points.pivot_table(index=networks, columns="kernel", values="difference")
    if {"single_logit", "random_vector", PNTK, "trace"} <= set(wide):
        over = {name: list(wide[name] / wide["trace"]) for name in (PNTK, "single_logit", "random_vector")}
        ranges = {name: claims.ratio(ratios, "networks") for name, ratios in over.items()}
        text += (
            f" What the paper does not show: differences over the floor's are {ranges[PNTK]} for the sum of logits, "
            f"{ranges['single_logit']} for a single logit and {ranges['random_vector']} for a random direction."
        )
    return text
