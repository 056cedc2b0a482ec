"""Lines against one quantity, as the figures of studies draw them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ntkbench.figures.plotting import canvas, labels, styles
from ntkbench.figures.plotting.sources import MARK

PUBLISHED = (Line2D([], [], **(MARK | {"color": styles.GREY})), "published")
BAND = (Patch(color=styles.GREY, alpha=0.25, linewidth=0), "95 % band")
QUARTILES = (Patch(color=styles.GREY, alpha=0.25, linewidth=0), "quartiles")


def looks(table: pd.DataFrame) -> dict[str, styles.Look]:
    """The look of every method in a study's table, which need not have the column ``kind``."""
    return styles.looks(table.assign(kind=table.get("kind", "exact")))


def entries(chosen: Iterable[styles.Look]) -> list[tuple[Any, str]]:
    """Key entries of methods."""
    return [(Line2D([], [], **look.line(_backend(look))), look.title) for look in chosen]


def style(look: styles.Look) -> dict[str, Any]:
    """Keywords for a method's line."""
    return look.line(_backend(look))


def _backend(look: styles.Look) -> str:
    return "jax" if look.method.startswith("nt_") or look.method == "jacobian" else "torch"


def line(panel: Axes, rows: pd.DataFrame, x: str, y: str, look: styles.Look, **changes: Any) -> None:
    """One method: a line with markers, and the quartiles of ``y`` as a band where the table has them."""
    rows = rows[rows[[x, y]].notna().all(axis=1)]
    rows = rows.sort_values("m" if "m" in rows else x)  # by the chosen size, since x may be measured
    panel.plot(rows[x], rows[y], **(style(look) | changes), zorder=3)
    low, high = f"{y}_q25", f"{y}_q75"
    if low in rows and len(rows) > 1:
        panel.fill_between(rows[x], rows[low], rows[high], color=look.colour, alpha=0.15, linewidth=0, zorder=2)


def published(panel: Axes, rows: pd.DataFrame, colour: str, x: str = "x", y: str = "y") -> None:
    """Published values in the colour of their method."""
    panel.plot(rows[x], rows[y], **MARK, color=colour, zorder=2.5)


def logarithmic(panel: Axes, x: Iterable[float], y: Iterable[float], ratio: float = 40.0) -> None:
    """Log axes around positive values."""
    panel.set(xscale="log", yscale="log", xlim=canvas.limits(x, ratio=8), ylim=canvas.limits(y, ratio=ratio))
    canvas.decades(panel.xaxis, *panel.get_xlim())
    canvas.decades(panel.yaxis, *panel.get_ylim())
    for axis in (panel.xaxis, panel.yaxis):
        if not isinstance(axis.get_major_formatter(), FuncFormatter):
            axis.set_major_formatter(FuncFormatter(lambda value, _: labels.power_label(value)))


def counts(panel: Axes, sizes: Iterable[float], most: int = 7) -> None:
    """Ticks of a log x axis at measured sizes, except where there is no room for labels."""
    sizes = sorted({size for size in sizes if size > 0})
    if not sizes:
        return
    low, high = panel.get_xlim()
    inch = math.log(high / low) / (panel.get_position().width * canvas.WIDTH)
    ticks = sizes[-1:]
    for size in sizes[:: -math.ceil(len(sizes) / most)][1:]:
        if math.log(ticks[-1] / size) >= 0.36 * inch:
            ticks.append(size)
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: labels.count_label(value)))
    panel.xaxis.set_minor_locator(NullLocator())


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope of a straight line through logarithms, and half the width of its 95 % interval (``nan`` for two points)."""
    from scipy import stats

    if len(set(x)) < 2:
        return math.nan, math.nan
    fit = stats.linregress(np.log(x), np.log(y))
    if len(x) < 3:
        return float(fit.slope), math.nan
    return float(fit.slope), float(fit.stderr * stats.t.ppf(0.975, len(x) - 2))
