"""How the cost of exact kernels grows with each of a network's sizes, beside what theory says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ntkbench import problems
from ntkbench.errors import BadInput
from ntkbench.figures.plotting import base, canvas, key, labels
from ntkbench.figures.plotting.styles import Look, backends_in, looks

AXES = {"N": "samples N", "O": "outputs O", "width": "width W", "depth": "hidden layers L"}
QUANTITIES = {"seconds": "seconds", "memory_mib_drawn": "peak memory [MiB]"}
MIB = 2.0**20
FLOOR = 0.1
"""MiB; less is drawn here, since a peak less a baseline can come out as nothing or below."""

CONTRACTION, PRODUCTS, STRUCTURED = "N²O²W²L", "N²OW²L", "NOW²L + N²O²WL"
THEORY = {
    "jacobian_contraction": CONTRACTION,
    "nt_jacobian_contraction": CONTRACTION,
    "ntk_vector_products": PRODUCTS,
    "nt_ntk_vector_products": PRODUCTS,
    "structured_derivatives": STRUCTURED,
    "nt_structured_derivatives": STRUCTURED,
}
"""Multiplications for a network of L equal layers of width W (Novak et al. 2022, table 1)."""
EXPONENTS = {
    CONTRACTION: {"N": 2, "O": 2, "width": 2, "depth": 1},
    PRODUCTS: {"N": 2, "O": 1, "width": 2, "depth": 1},
    STRUCTURED: {"N": 2, "O": 2, "width": 2, "depth": 1},
}
"""What the terms grow with once a size is large."""

LINE = ["varied", "method", "backend"]
KEPT = ["problem", "setting", *AXES, "P", "n", "metric", "method", "title", "backend", "status", "reason"]
KEPT += ["seconds", "seconds_q25", "seconds_q75", "memory_bytes"]


def draw(table: pd.DataFrame) -> base.Drawing:
    """Seconds (above) and peak memory (below) of the norm against each size, the other sizes fixed."""
    exact = _with_sizes(table[(table["kind"] == "exact") & (table["metric"] == "norm")])
    exact["memory_mib_drawn"] = (exact["memory_bytes"] / MIB).clip(lower=FLOOR)
    points = base.measured(exact, "seconds")
    if not len(points):
        return base.nothing(exact[KEPT], "No exact norm of a network with an N, an O, a width and a depth.")
    middle = {size: points[size].mode().iloc[0] for size in AXES}
    lines = {size: _varied(exact, size, middle) for size in AXES}
    style = {m: look for m, look in looks(table).items() if m in set(points["method"])}
    used = {m: backends_in(points[points["method"] == m]) for m in style}
    fixed = ", ".join(f"{size} = {middle[size]:g}" for size in AXES)
    figure, grid = canvas.sheet(
        [canvas.Row(2.5, above=0.5, below=0.2), canvas.Row(2.5, above=0, below=0.5)],
        len(AXES),
        title="How exact kernels grow",
        subtitle=f"fully connected ReLU network, around {fixed}  ·  {base.settings_line(exact)}",
        key=key.method_entries(style.values(), used),
        left=0.9,
        bottom=0.05,
    )
    y = {q: canvas.limits(points[q].dropna(), pad=2.2) for q in QUANTITIES}
    slopes = []
    for column, (size, name) in enumerate(AXES.items()):
        for row, (quantity, label) in enumerate(QUANTITIES.items()):
            panel = grid[row][column]
            slopes += _panel(panel, lines[size], size, quantity, y[quantity], style)
            panel.tick_params(labelbottom=row == 1, labelleft=column == 0)
            if column == 0:
                panel.set_ylabel(label)
        grid[0][column].set_title(f"against {name}", loc="left")
        grid[1][column].set_xlabel(name)
    plotted = pd.concat([lines[size].assign(varied=size) for size in AXES], ignore_index=True)
    by_quantity = pd.DataFrame(slopes, columns=[*LINE, "quantity", "slope"]).pivot_table("slope", LINE, "quantity")
    plotted = plotted.merge(by_quantity.add_prefix("slope_").reset_index(), on=LINE, how="left")
    plotted["theory"] = plotted["method"].map(THEORY)
    return base.Drawing(figure, plotted, _caption(fixed, style))


def _with_sizes(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of networks with all four sizes, with these as columns; a label leaves out those at their defaults."""
    sizes = {label: _sizes(label) for label in table["problem"].unique()}
    found = {size: table["problem"].map(lambda label, size=size: sizes[label].get(size, math.nan)) for size in AXES}
    rows = table.assign(**found).astype(dict.fromkeys(AXES, float))
    return rows[rows[list(AXES)].notna().all(axis=1)].copy()


def _sizes(label: str) -> Mapping[str, int | str]:
    try:
        return problems.options(label)
    except BadInput:  # it was measured where there was such a problem
        return {}


def _varied(exact: pd.DataFrame, size: str, middle: dict[str, float]) -> pd.DataFrame:
    """The rows that differ from the middle in one size alone."""
    same = np.logical_and.reduce([exact[other] == value for other, value in middle.items() if other != size])
    return exact[same].sort_values([size, "method", "backend"])


def _panel(
    panel: Axes, cells: pd.DataFrame, size: str, quantity: str, y: tuple[float, float], style: dict[str, Look]
) -> list[tuple[Any, ...]]:
    """Lines over one size, each with its slope at its end; the slopes."""
    sizes = sorted(cells[size].unique())
    x = canvas.limits(sizes, pad=1.3, ratio=4)
    panel.set(xscale="log", yscale="log", ylim=y, xlim=(x[0], x[1] * (x[1] / x[0]) ** 0.36))
    panel.xaxis.set_major_locator(FixedLocator(sizes))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: labels.count_label(value)))
    panel.xaxis.set_minor_locator(NullLocator())
    canvas.decades(panel.yaxis, *y)
    found, ends = [], []
    for (method, backend), line in base.measured(cells, quantity).groupby(["method", "backend"], sort=False):
        panel.plot(line[size], line[quantity], **style[method].line(backend), zorder=3)
        if len(line) >= 2:
            slope = _last_slope(line[size], line[quantity])
            found.append((size, method, backend, quantity.split("_")[0], slope))
            theory = EXPONENTS.get(THEORY.get(method, ""), {}).get(size) if quantity == "seconds" else None
            text = f"{round(slope, 1) + 0.0:.1f}" + (f" ({theory})" if theory else "")  # no minus before a zero
            ends.append((line[quantity].iloc[-1], line[size].iloc[-1], text, style[method].colour))
    canvas.label_ends(panel, ends)
    return found


def _last_slope(x: pd.Series, y: pd.Series) -> float:
    """Between the two largest sizes, where the leading term shows most."""
    (x0, x1), (y0, y1) = x.iloc[-2:], y.iloc[-2:]
    return math.log(y1 / y0) / math.log(x1 / x0)


def _caption(fixed: str, style: dict[str, Look]) -> str:
    theory = "; ".join(f"{look.title} {THEORY[method]}" for method, look in style.items() if method in THEORY)
    return (
        "Seconds of one exact norm (without the first call) and peak memory over a do-nothing baseline against each "
        f"size of a fully connected ReLU network, the others fixed at {fixed}. The number at a line's end is its slope "
        "between the two largest sizes, in powers of that size; in brackets the theory's for large sizes. "
        f"Theory, multiplications with W the width and L the number of layers: {theory}. Sizes too small for the "
        f"leading term and a first layer of fixed size keep slopes below. Peaks below {FLOOR:g} MiB are drawn there."
    )
