"""Mohamadi et al. 2023 beyond initialisation: how well the pNTK approximates the NTK along training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ntkbench.figures.plotting import base, canvas, claims, curves, labels, pntk, styles
from ntkbench.figures.plotting.pntk import PNTK, family_label

TABLE = "mohamadi_quality"
OWN = "network_accuracy"
QUANTITIES = pntk.QUANTITIES | {OWN: "the network itself,\ntest accuracy"}
COLUMNS = (*pntk.COLUMNS, OWN, "rate", "momentum", "batch")
FLOOR = "trace"
DOTTED = (0, (1, 1.5))


def draw(table: pd.DataFrame) -> base.Drawing:
    """A panel for each family, a line for each width: the error of the pNTK; medians over initialisations."""
    points = _trained(base.measured(table, "off_diagonal", "width", "step"))
    if not len(points):
        return base.nothing(points, labels.why_not(table) if (table["status"] != "ok").any() else "None was trained.")
    if not (points["kernel"] == PNTK).any():
        return base.nothing(points, "The pNTK of trained networks was not measured.")
    plotted = pntk.summary(points[points["kernel"].isin([PNTK, FLOOR, "full"])], QUANTITIES)
    look = pntk.looks_of(plotted)[PNTK]
    floor = Line2D([], [], color=canvas.PALE, linewidth=1.2, linestyle=DOTTED)
    names = sorted(set(plotted["family"]), key=lambda name: ([*pntk.FAMILIES, name].index(name), name))
    figure, (panels,) = canvas.sheet(
        [canvas.Row(3.0, above=0.5, below=0.42)],
        len(names),
        title=_title(points),
        subtitle=base.settings_line(table),
        key=[
            ("kernel", [(Line2D([], [], **curves.style(look)), look.title), (floor, "trace kernel, the floor")]),
            ("how to read", [curves.QUARTILES]),
        ],
        gap=0.55,
    )
    errors = plotted[(plotted["quantity"] == "difference") & plotted["kernel"].isin([PNTK, FLOOR])]
    limits = canvas.limits(errors.loc[errors["value"] > 0, "value"].clip(1e-6, 1e6), pad=1.2, ratio=8)
    limits = limits[0], limits[1] * (limits[1] / limits[0]) ** 0.25  # room for labels that move up
    for panel, family in zip(panels, names, strict=True):
        canvas.title(panel, family_label(family), "lines: width, the darker the wider")
        _panel(panel, errors[errors["family"] == family], look, limits)
        panel.set_xlabel("training step")
        panel.tick_params(labelleft=panel is panels[0])
    panels[0].set_ylabel("‖A ⊗ I − Θ‖ / ‖Θ‖")
    return base.Drawing(figure, plotted, _caption(points))


def _title(points: pd.DataFrame) -> str:
    """The factor by which training changes the error, and where it grows most."""
    ends = _ends(points[points["kernel"] == PNTK])
    ends = ends[(ends["first"] > 0) & (ends["last"] > 0)]
    if not len(ends):
        return "Error of the pNTK along training"
    growth = ends["last"] / ends["first"]
    most = ends.loc[growth.idxmax()]
    return (
        f"Training multiplies the error of the pNTK by {labels.span(growth)} "
        f"({labels.rounded(most['first'])} to {labels.rounded(most['last'])} for {family_label(most['family'])}, "
        f"width {most['width']:g})"
    )


def _trained(points: pd.DataFrame) -> pd.DataFrame:
    """The rows of networks that were also measured after initialisation."""
    return points[points.groupby(["family", "width", "init"])["step"].transform("max") > 0]


def _shades(colour: str, count: int) -> list[str]:
    """From a light tint of a colour to the colour itself."""
    tints = np.linspace(0.5, 0.0, count) if count > 1 else [0.0]
    shades = []
    for tint in tints:
        red, green, blue = (1 - (1 - part) * (1 - tint) for part in to_rgb(colour))
        shades.append(to_hex((red, green, blue)))
    return shades


def _coloured(shade: str) -> dict[str, Any]:
    return {"color": shade, "markerfacecolor": shade, "markeredgecolor": shade}


def _panel(panel: Axes, rows: pd.DataFrame, look: styles.Look, limits: tuple[float, float]) -> None:
    """The errors of one family, with its widths at the ends of the lines."""
    if not len(rows):
        canvas.note(panel, "not measured")
        return
    widths, ends = sorted(rows["width"].unique()), []
    for width, shade in zip(widths, _shades(look.colour, len(widths)), strict=True):
        here = rows[rows["width"] == width].sort_values("step")
        line, floor = here[here["kernel"] == PNTK], here[here["kernel"] == FLOOR]
        panel.plot(floor["step"], floor["value"], color=canvas.PALE, linewidth=1.2, linestyle=DOTTED, zorder=1)
        if not len(line):
            continue
        panel.plot(line["step"], line["value"], **(curves.style(look) | _coloured(shade)), zorder=3)
        panel.fill_between(line["step"], line["value_q25"], line["value_q75"], color=shade, alpha=0.15, linewidth=0)
        ends.append((line["value"].iloc[-1], line["step"].iloc[-1], f"{width:g}", shade))
    _along(panel, sorted(rows["step"].unique()))
    panel.set(yscale="log", ylim=limits)
    canvas.decades(panel.yaxis, *limits)
    canvas.label_ends(panel, [end for end in ends if end[0] > 0])


def _along(panel: Axes, steps: Sequence[float]) -> None:
    """A logarithmic axis of steps that includes 0."""
    first = next((step for step in steps if step > 0), 1)
    panel.set_xscale("symlog", linthresh=first, linscale=0.5)
    panel.set_xlim(-0.12 * first, 1.2 * max(*steps, first))
    panel.xaxis.set_major_locator(FixedLocator(steps))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: labels.count_label(value) if value else "0"))


def _caption(points: pd.DataFrame) -> str:
    one, gained = points.iloc[0], claims.UNKNOWN
    ends = _ends(points[points["kernel"] == PNTK])
    grown = int((ends["last"] > ends["first"]).sum())
    accuracy = _last(points).pivot_table(index=["family", "width", "init"], columns="kernel", values="accuracy")
    if {"full", PNTK} <= set(accuracy):
        gained = claims.median(list((accuracy[PNTK] - accuracy["full"]).dropna()))
    known = np.isfinite(gained[0])
    return labels.fitted(
        f"Relative Frobenius error of the pNTK along training on {pntk.data(points)} ({one['batch']:g} images per "
        f"step, momentum {one['momentum']:g}, rate {one['rate']:g} N / lambda_max); medians over initialisations.",
        f"The error grows for {grown} of {len(ends)} families and widths.",
        f"Its accuracy in kernel regression minus that of Theta: {labels.interval_label(*gained)}." if known else "",
    )


def _last(points: pd.DataFrame) -> pd.DataFrame:
    """The rows of each family's last step."""
    return points[points["step"] == points.groupby("family")["step"].transform("max")]


def _ends(points: pd.DataFrame) -> pd.DataFrame:
    """Medians of the difference at step 0 and at each family's last, a row for each family and width."""
    case = ["family", "width"]
    parts = {"first": points[points["step"] == 0], "last": _last(points)}
    medians = {name: rows.groupby(case, sort=False)["difference"].median() for name, rows in parts.items()}
    return pd.DataFrame(medians).dropna().reset_index()
