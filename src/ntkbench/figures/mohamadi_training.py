"""Mohamadi et al. 2023 beyond initialisation: how well the pNTK stands for the NTK along training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ntkbench.figures.plotting import base, canvas, claims, curves, labels, pntk
from ntkbench.figures.plotting.pntk import PNTK, family_label

TABLE = "mohamadi_quality"
OWN = "network_accuracy"
QUANTITIES = pntk.QUANTITIES | {OWN: "the network itself,\ntest accuracy"}
COLUMNS = (*pntk.COLUMNS, OWN, "rate", "momentum", "batch")
FLOOR = "trace"
DASHED, DOTTED = (0, (4, 2)), (0, (1, 1.5))


def draw(table: pd.DataFrame) -> base.Drawing:
    """A row for each quantity, a column for each family, a line for each width; medians over initialisations."""
    points = _trained(base.measured(table, "off_diagonal", "width", "step"))
    if not len(points):
        return base.nothing(points, labels.why_not(table) if (table["status"] != "ok").any() else "None was trained.")
    if not (points["kernel"] == PNTK).any():
        return base.nothing(points, "The pNTK of trained networks was not measured.")
    plotted = pntk.summary(points[points["kernel"].isin([PNTK, FLOOR, "full"])], QUANTITIES)
    look = pntk.looks_of(plotted)[PNTK]
    narrow, wide = (Line2D([], [], **(curves.style(look) | _coloured(shade))) for shade in _shades(look.colour, 2))
    lines = [
        (narrow, f"{look.title}, narrowest network"),
        (wide, f"{look.title}, widest network"),
        (Line2D([], [], color=look.colour, linewidth=0.9, linestyle=DOTTED), "trace kernel, the floor"),
        (Line2D([], [], color="black", linewidth=0.9, linestyle=DASHED), "the NTK itself"),
        (Line2D([], [], color=look.colour), "of the network, whatever the kernel"),
    ]
    figure, panels = pntk.panels(
        table,
        plotted,
        QUANTITIES,
        title="How well the pNTK stands for the NTK along training",
        key=[("kernel, the darker the wider the network", lines), ("how to read", [curves.QUARTILES])],
        above=0.3,
        xlabel="training step",
    )
    for (quantity, family), panel in panels.items():
        rows = plotted[(plotted["family"] == family) & (plotted["quantity"] == quantity)]
        _panel(panel, rows, quantity, look)
        if quantity == "difference":
            widths = rows["width"]
            canvas.title(panel, family_label(family), f"width {widths.min():g} to {widths.max():g}")
    return base.Drawing(figure, plotted, _caption(points))


def _trained(points: pd.DataFrame) -> pd.DataFrame:
    """The rows of networks that were looked at after initialisation as well."""
    return points[points.groupby(["family", "width", "init"])["step"].transform("max") > 0]


def _shades(colour: str, count: int) -> list[str]:
    """From a light tint of a colour to the colour itself."""
    tints = np.linspace(0.62, 0.0, count) if count > 1 else [0.0]
    shades = []
    for tint in tints:
        red, green, blue = (1 - (1 - part) * (1 - tint) for part in to_rgb(colour))
        shades.append(to_hex((red, green, blue)))
    return shades


def _coloured(shade: str) -> dict[str, Any]:
    return {"color": shade, "markerfacecolor": shade, "markeredgecolor": shade}


def _panel(panel: Axes, rows: pd.DataFrame, quantity: str, look: Any) -> None:
    if not len(rows):
        canvas.note(panel, "not measured")
        return
    widths, steps = sorted(rows["width"].unique()), sorted(rows["step"].unique())
    shares = quantity in ("accuracy", OWN)
    for width, shade, grey in zip(widths, _shades(look.colour, len(widths)), _shades("#000000", len(widths)),
                                  strict=True):  # fmt: skip
        here = rows[rows["width"] == width].sort_values("step")
        line = here[here["kernel"] == ("full" if quantity == "off_diagonal" else PNTK)]
        style = curves.style(look) | _coloured(shade)
        if quantity in ("off_diagonal", OWN):  # of the network, whatever the kernel
            style["marker"] = ""
        panel.plot(line["step"], line["value"], **style, zorder=3)
        panel.fill_between(line["step"], line["value_q25"], line["value_q75"], color=shade, alpha=0.15, linewidth=0)
        if quantity == "difference":
            floor = here[here["kernel"] == FLOOR]
            panel.plot(floor["step"], floor["value"], color=shade, linewidth=0.9, linestyle=DOTTED)
        if quantity == "accuracy":
            full = here[here["kernel"] == "full"]
            panel.plot(full["step"], full["value"], color=grey, linewidth=0.9, linestyle=DASHED, zorder=4)
    _along(panel, steps)
    if shares:
        panel.set_ylim(0, 1.02)
    else:
        panel.set(yscale="log", ylim=canvas.limits(rows.loc[rows["value"] > 0, "value"].clip(1e-6, 1e6), ratio=8))
        canvas.decades(panel.yaxis, *panel.get_ylim())


def _along(panel: Axes, steps: Sequence[float]) -> None:
    """Steps on a logarithmic axis that has a place for 0."""
    first = next((step for step in steps if step > 0), 1)
    panel.set_xscale("symlog", linthresh=first, linscale=0.5)
    panel.set_xlim(-0.12 * first, 1.2 * max(*steps, first))
    panel.xaxis.set_major_locator(FixedLocator(steps))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: labels.count_label(value) if value else "0"))


def _caption(points: pd.DataFrame) -> str:
    one = points.iloc[0]
    text = (
        "The pNTK (x) I_O for Theta along training by the cross-entropy on scikit-learn's digits "
        f"({one['batch']:g} images a step, momentum {one['momentum']:g}, rate {one['rate']:g} N / lambda_max)."
    )
    ours = points[points["kernel"] == PNTK]
    ends = _ends(ours)
    grown = int((ends["last"] > ends["first"]).sum())
    text += f" Its relative difference grows for {grown} of {len(ends)} families and widths."
    text += _still_better(ours)
    accuracy = _last(points).pivot_table(index=["family", "width", "init"], columns="kernel", values="accuracy")
    if {"full", PNTK} <= set(accuracy):
        gained = claims.median(list((accuracy[PNTK] - accuracy["full"]).dropna()))
        if np.isfinite(gained[0]):
            text += f" Its accuracy in kernel regression less that of Theta: {labels.interval_label(*gained)}."
    return text


def _last(points: pd.DataFrame) -> pd.DataFrame:
    """The rows of each family's last step."""
    return points[points["step"] == points.groupby("family")["step"].transform("max")]


def _ends(points: pd.DataFrame) -> pd.DataFrame:
    """Medians of the difference at step 0 and at each family's last, a row for each family and width."""
    case = ["family", "width"]
    parts = {"first": points[points["step"] == 0], "last": _last(points)}
    medians = {name: rows.groupby(case, sort=False)["difference"].median() for name, rows in parts.items()}
    return pd.DataFrame(medians).dropna().reset_index()


def _still_better(points: pd.DataFrame) -> str:
    """Slopes by width at the last step, and whether wider networks are better there."""
    last = _last(points)
    slopes = {family: pntk.slope(rows, PNTK) for family, rows in last.groupby("family", sort=False)}
    slopes = {family: pair for family, pair in slopes.items() if np.isfinite(pair[1])}
    if not slopes:
        return ""
    said = []
    for family, (value, half) in slopes.items():
        verdict = "wider is better" if value + half < 0 else "wider is worse" if value - half > 0 else "cannot be told"
        said.append(f"{family_label(family)} {value:.2f} ± {half:.2f} ({verdict})")
    return f" Slopes by width after training, 95 % intervals: {', '.join(said)}."
