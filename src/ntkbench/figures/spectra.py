"""Matrix-free spectral quantities: errors and seconds against passes, beside those of decomposing all of Theta."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ntkbench.figures.plotting import base, canvas, key, labels, styles, tasks
from ntkbench.figures.plotting.styles import Look
from ntkbench.measure import laws

TABLE = "spectra"
COLUMNS: tuple[str, ...] = ("problem", "method", "title", "kind", "quantity", "passes", "tolerance", "passes_spent")
COLUMNS += ("error", "error_q25", "error_q75", "holds", "stated", "seconds", "seconds_q25", "seconds_q75")
COLUMNS += ("seeds", "calls", "n", "P", "O")

QUANTITIES = {
    "largest": ("largest eigenvalue", "relative error"),
    "top": ("largest eigenvalues", "worst relative error"),
    "condition": ("condition number of Θ + ridge", "relative error"),
    "entropy_effective_rank": ("entropy effective rank", "relative error"),
    "log_determinant": ("log det(I + Θ / ridge)", "relative error"),
    "density": ("spectral density", "decades"),
}
"""Headings of the panels from top to bottom, and labels of their errors."""
SHORT = {
    "largest": "λmax",
    "top": "largest eigenvalues",
    "condition": "condition number",
    "entropy_effective_rank": "entropy rank",
    "log_determinant": "log det",
    "density": "density",
}
"""Names of the quantities in a sentence."""
LOOKS = {
    "eigh": (styles.PINK, "P"),
    "spectrum": (styles.BLUE, "o"),
    "block_lanczos": (styles.SKY, "D"),
    "stochastic_lanczos": (styles.GREEN, "<"),
    "arpack": (styles.ORANGE, "p"),
    "lobpcg": (styles.VERMILION, ">"),
    "matfree": (styles.BLACK, "d"),
}
EXACT, WHOLE = "eigh", "spectrum"
FLOORS = {"largest": 1e-8, "top": 1e-8}
FLOOR = 1e-4
"""Smaller errors are drawn at this value; errors of the largest eigenvalues have their own floor."""
ROUNDING = 1e-6
"""Smaller errors count as float32 rounding."""
RIGHT = 0.9
"""Share of seeds for which a stated bound must hold for a filled marker."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """A row of panels for each quantity and one for seconds, a column for each problem."""
    points = base.measured(table, "error", "passes_spent", "seconds", "n")
    points = points[points["method"].isin(LOOKS) & points["quantity"].isin(QUANTITIES) & (points["passes_spent"] > 0)]
    if not len(points):
        return base.nothing(table, labels.why_not(table))
    problems = list(dict.fromkeys(points["problem"]))
    shown = [quantity for quantity in QUANTITIES if quantity in set(points["quantity"])]
    look = {m: Look(m, "", "", *LOOKS[m]) for m in LOOKS if m in set(points["method"])}
    rows = [canvas.Row(1.35, above=0.62 if i == 0 else 0.34, below=0.08) for i in range(len(shown) + 1)]
    figure, grid = canvas.sheet(
        rows,
        len(problems),
        title=_title(points),
        subtitle=base.settings_line(table),
        key=[*_methods(points, look), ("how to read", _reading())],
        left=1.0,
        gap=0.3,
        bottom=0.45,
    )
    low, high = canvas.limits(points["passes_spent"], pad=1.3)
    for panels, quantity in zip(grid, [*shown, "seconds"], strict=True):
        here = points[points["quantity"] == quantity] if quantity != "seconds" else points
        column = "seconds" if quantity == "seconds" else "error"
        floor = FLOORS.get(quantity, FLOOR) if column == "error" else 0.0
        ends = canvas.limits(here[column].clip(lower=floor), pad=2)
        for panel, problem in zip(panels, problems, strict=True):
            _panel(panel, here[here["problem"] == problem], column, look, floor)
            panel.set(xscale="log", yscale="log", xlim=(low, high), ylim=ends)
            canvas.decades(panel.xaxis, low, high)
            canvas.decades(panel.yaxis, *ends, most=5)
            panel.tick_params(labelleft=panel is panels[0], labelbottom=quantity == "seconds")
        name, words = QUANTITIES.get(quantity, ("seconds of a call", "seconds"))
        panels[0].set_ylabel(words)
        panels[0].annotate(name, (0, 1), (0, 4), "axes fraction", "offset points", fontweight="bold")
    for panel, problem in zip(grid[0], problems, strict=True):
        sizes = labels.sizes_label(points[points["problem"] == problem], "n")
        where: Any = ((0, 1), (0, 21), "axes fraction", "offset points")
        said = f"{labels.short(labels.name_label(problem), 28)}:  {sizes}"
        panel.annotate(said, *where, color=styles.GREY, fontweight="bold")
    for panel in grid[-1]:
        panel.set_xlabel("passes")
    kept = points[[column for column in COLUMNS if column in points]].reset_index(drop=True)
    return base.Drawing(figure, kept, _caption(points, shown))


def _panel(panel: Axes, here: pd.DataFrame, column: str, look: dict[str, Look], floor: float) -> None:
    for method, rows in here.groupby("method", sort=False):
        if column == "seconds":  # the same for all quantities of a call
            rows = rows.drop_duplicates(["passes", "tolerance"])
        rows = rows.sort_values("passes_spent")
        drawn = look[str(method)].line("torch") | {"linewidth": 1.1, "clip_on": False, "markersize": 5.0}
        at = rows["passes_spent"].to_numpy(float)
        values = rows[column].clip(lower=floor).to_numpy(float)
        panel.plot(at, values, **(drawn | {"marker": ""}))
        wrong = (rows["holds"] < RIGHT).to_numpy() if column == "error" else np.zeros(len(rows), bool)
        for chosen, face in ((~wrong, drawn["color"]), (wrong, "white")):
            panel.plot(at[chosen], values[chosen], **(drawn | {"linestyle": "", "markerfacecolor": face, "zorder": 3}))


def _methods(points: pd.DataFrame, look: dict[str, Look]) -> key.Key:
    titles = points.drop_duplicates("method").set_index("method")["title"]
    entries = {m: (Line2D([], [], **look[m].line("torch")), labels.short(str(titles[m]))) for m in look}
    exact = [(Line2D([], [], **look[EXACT].line("torch") | {"linestyle": ""}), entries[EXACT][1])]
    return [
        ("exact", exact if EXACT in entries else []),
        ("matrix-free", [entry for method, entry in entries.items() if method != EXACT]),
    ]


def _reading() -> list[tuple[Line2D, str]]:
    sample: dict[str, Any] = {"color": styles.GREY, "marker": "o", "linestyle": "", "markersize": 5}
    return [
        (Line2D([], [], **sample), "stated bounds hold, or none are stated"),
        (Line2D([], [], **sample, markerfacecolor="white"), f"they hold for less than {100 * RIGHT:g} % of the seeds"),
        (Line2D([], [], linestyle=""), "small errors are drawn at a floor"),
        (Line2D([], [], linestyle=""), "density: Wasserstein-1 distance of log10(λ + ridge)"),
    ]


# --- findings, title and caption


def at_most(points: pd.DataFrame, method: str) -> pd.DataFrame:
    """The rows of a method at its most passes, one for each problem and quantity."""
    own = points[points["method"] == method]
    return own.loc[own.groupby(["problem", "quantity"], sort=False)["passes_spent"].idxmax()]


def exact_is_faster(points: pd.DataFrame) -> dict[str, bool]:
    """Whether decomposing all of Theta is faster, with 95 % certainty, than products with the most passes.

    The result is by problem. Problems without a measurement of both are left out.
    """
    typical, found = laws.typical_spread(points), {}
    for problem, here in points.groupby("problem", sort=False):
        pair = [at_most(here, method).head(1) for method in (EXACT, WHOLE)]
        if all(map(len, pair)):
            shares = laws.smallest(*laws.median_seconds(pd.concat(pair), typical=typical))
            found[str(problem)] = bool(shares[0] >= tasks.SURE)
    return found


def most_accurate(points: pd.DataFrame) -> dict[str, str]:
    """The title of the matrix-free method that is the most accurate on every problem, by quantity.

    Methods are compared at their most passes. A quantity is left out unless one method is the most accurate with 95 %
    certainty on each problem, of at least two. Errors below :data:`ROUNDING` count as equal.
    """
    leads: dict[str, set[str]] = {}
    for (_, quantity), here in points[points["method"] != EXACT].groupby(["problem", "quantity"], sort=False):
        rows = here.loc[here.groupby("method")["passes_spent"].idxmax()]
        drawn = rows.assign(passes=rows["passes_spent"])
        for column in ("error", "error_q25", "error_q75"):
            drawn[column] = drawn[column].clip(lower=ROUNDING)
        shares = laws.smallest(*laws.median_errors(drawn))
        sure = len(rows) > 1 and shares.max() >= tasks.SURE
        leads.setdefault(quantity, set()).add(rows["title"].iloc[shares.argmax()] if sure else "")
    return {quantity: found.pop() for quantity, found in leads.items() if len(found) == 1 and "" not in found}


def _title(points: pd.DataFrame) -> str:
    worst = at_most(points, WHOLE).groupby("quantity")["error"].max()
    if not {"top", "log_determinant"} <= set(worst.index):
        return "Matrix-free spectral quantities: errors against passes"
    top, volume = (_error(quantity, float(worst[quantity])) for quantity in ("top", "log_determinant"))
    said = f"Products give the top eigenvalues to {top}, log det to {volume}"
    everywhere = list(exact_is_faster(points).values()) == [True] * points["problem"].nunique()
    return f"{said}; all of Θ takes less time" if everywhere else said


def _caption(points: pd.DataFrame, shown: list[str]) -> str:
    said = "Median errors relative to float64 values."
    return labels.fitted(said, _of_exact(points), _of_products(points, shown))


def _of_exact(points: pd.DataFrame) -> str:
    """Where to decompose all of Theta."""
    names = labels.families(points["problem"])
    faster = [problem for problem, is_faster in exact_is_faster(points).items() if is_faster]
    if not faster:
        return "Where Θ fits, decompose it if exact values are needed."
    most = at_most(points[points["problem"].isin(faster)], WHOLE)["passes_spent"].max()
    where = "" if len(faster) == len(names) else f" on {labels.listed(names[problem] for problem in faster)}"
    return f"Where Θ fits, decompose it: it is surely faster than {most:g} passes{where}."


def _of_products(points: pd.DataFrame, shown: list[str]) -> str:
    """Which matrix-free method to use for which quantity."""
    leads: dict[str, list[str]] = {}
    for quantity, title in most_accurate(points).items():
        if quantity in shown:
            leads.setdefault(title, []).append(SHORT[quantity])
    best = [f"{title} for {labels.listed(quantities)}" for title, quantities in leads.items()]
    return f"Without the whole matrix, use {', '.join(best) or 'any method: none is certainly the most accurate'}."


def _error(quantity: str, error: float) -> str:
    if error < ROUNDING:
        return "rounding"
    return f"{labels.rounded(error)} decades" if quantity == "density" else labels.share_label(error)
