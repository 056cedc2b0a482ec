"""Mohamadi et al. 2023, figures 2 to 6: how well kernels between samples approximate the NTK, against width."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ntkbench.figures.plotting import base, canvas, claims, curves, labels, pntk, styles
from ntkbench.figures.plotting.pntk import PNTK, QUANTITIES, family_label, looks_of, slope

TABLE = "mohamadi_quality"
COLUMNS = pntk.COLUMNS
RATE = -0.5
"""Power of the width that the theorem gives."""
CAPTION = (
    "Kernels A between samples that stand for Theta as A ⊗ I, at He initialisation, on {data}, against "
    "width (channels, or WideResNet's factor); medians over initialisations with quartiles.",
    "The trace kernel is the best in the Frobenius norm.",
    "Regression is on held-out images; condition numbers may be at float64's limit.",
)
"""Sentences of the caption."""


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
        title=_title(points),
        key=[("kernel", curves.entries(looks.values())), ("how to read", [curves.QUARTILES, full, guide])],
        above=0.45,
        xlabel="width",
    )
    for (quantity, family), panel in panels.items():
        rows = plotted[(plotted["family"] == family) & (plotted["quantity"] == quantity)]
        _panel(panel, rows, quantity, looks)
        if quantity == "difference":
            canvas.title(panel, family_label(family), _sloped(points[points["family"] == family]))
    return base.Drawing(figure, plotted, _caption(points), _claims(points))


def _title(points: pd.DataFrame) -> str:
    """The powers of the width with which the pNTK's difference from the NTK falls: the range over families."""
    found = [value for _, rows in points.groupby("family") for value, half in [slope(rows, PNTK)] if np.isfinite(half)]
    if not found:
        return "Kernels between samples that stand for the NTK, at initialisation (Mohamadi et al., figures 2 to 6)"
    return (
        f"The pNTK's difference from the NTK changes as width to the power {min(found):.2f} to {max(found):.2f} "
        f"(theorem: \N{MINUS SIGN}0.5), at initialisation"
    )


def _caption(points: pd.DataFrame) -> str:
    return labels.fitted(*(sentence.format(data=pntk.data(points)) for sentence in CAPTION))


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


def _claims(points: pd.DataFrame) -> tuple[claims.Claim, ...]:
    """How the pNTK's difference falls with width in each family, and its accuracy in kernel regression."""
    families = [_rate(rows, str(family)) for family, rows in points.groupby("family", sort=False)]
    return tuple(filter(None, [*families, _accuracy(points)]))


def _settings(points: pd.DataFrame) -> dict[str, Any]:
    return {"there": "CIFAR-10", "here": f"{pntk.data(points)}, {pntk.images(points)}"}


def _rate(rows: pd.DataFrame, family: str) -> claims.Claim | None:
    value, half = slope(rows, PNTK)
    if not np.isfinite(half):
        return None
    title = family_label(family)
    return claims.Claim(
        source="Mohamadi et al. 2023, convergence theorem",
        name=f"power of width, {title}",
        statement=f"the pNTK's relative difference from the NTK falls as width to the power {RATE:g} ({title})",
        published=RATE,
        accuracy="theory",
        within=claims.EXPONENT,
        measured=claims.exponent(value, half),
        runs=int((rows["kernel"] == PNTK).sum()),
        of="networks",
        **_settings(rows),
    )


def _accuracy(points: pd.DataFrame) -> claims.Claim | None:
    """The pNTK's accuracy over Theta's: medians over the networks of each family."""
    accuracy = points.pivot_table(index=["family", "width", "init"], columns="kernel", values="accuracy")
    if not {"full", PNTK} <= set(accuracy):
        return None
    ratios = (accuracy[PNTK] / accuracy["full"])[accuracy["full"] > 0].dropna().groupby("family").median()
    return claims.Claim(
        source="Mohamadi et al. 2023, figures 2 to 6",
        name="accuracy of kernel regression, pNTK over NTK",
        statement="kernel regression is as accurate with the pNTK as with the NTK",
        published=1.0,
        accuracy="a sentence",
        within=claims.SHARE,
        measured=claims.ranged(ratios),
        spread="range over families",
        runs=len(ratios),
        of="medians",
        unit="times",
        **_settings(points),
    )
