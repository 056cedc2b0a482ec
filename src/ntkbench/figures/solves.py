"""Solutions of (Theta + ridge I) x = y: seconds and passes to a residual against the condition number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ntkbench.figures.plotting import base, canvas, key, labels, styles
from ntkbench.figures.plotting.styles import Look

TABLE = "solves"
COLUMNS: tuple[str, ...] = ("problem", "method", "title", "share", "rtol", "condition", "seconds", "seconds_q25")
COLUMNS += ("seconds_q75", "iterations", "passes_spent", "residual", "seeds", "calls", "n", "P", "O")

LOOKS = {
    "cholesky": (styles.PINK, "P"),
    "nystrom": (styles.BLUE, "o"),
    "plain": (styles.ORANGE, "D"),
    "scipy": (styles.BLACK, "d"),
}
EXACT = "cholesky"
SLACK = 1.01
"""Allowed ratio of a residual to its tolerance: the check itself has rounding."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """A row of panels for the seconds to each residual and one for passes, a column for each problem."""
    points = base.measured(table, "seconds", "condition", "residual", "passes_spent", "n")
    points = points[points["method"].isin(LOOKS) & (points["seconds"] > 0)].sort_values("n", kind="stable")
    if not len(points):
        return base.nothing(table, labels.why_not(table))
    problems, rtols = list(dict.fromkeys(points["problem"])), sorted(points["rtol"].unique(), reverse=True)
    look = {m: Look(m, "", "", *LOOKS[m]) for m in LOOKS if m in set(points["method"])}
    rows = [canvas.Row(1.45, above=0.62 if i == 0 else 0.34, below=0.08) for i in range(len(rtols) + 1)]
    figure, grid = canvas.sheet(
        rows,
        len(problems),
        title=_title(points),
        subtitle=base.settings_line(table),
        key=[("method", _methods(points, look)), ("how to read", _reading())],
        left=1.0,
        gap=0.3,
        bottom=0.45,
    )
    low, high = canvas.limits(points["condition"], pad=1.5, ratio=10)
    last = min(rtols)
    for panels, rtol in zip(grid, [*rtols, None], strict=True):
        column = "passes_spent" if rtol is None else "seconds"
        here = points[points["rtol"] == (last if rtol is None else rtol)]
        ends = canvas.limits(here[column] if rtol is None else points[column], pad=1.5)
        for panel, problem in zip(panels, problems, strict=True):
            _panel(panel, here[here["problem"] == problem], column, look)
            panel.set(xscale="log", yscale="log", xlim=(low, high), ylim=ends)
            canvas.decades(panel.xaxis, low, high)
            canvas.decades(panel.yaxis, *ends, most=5)
            panel.tick_params(labelleft=panel is panels[0], labelbottom=rtol is None)
        panels[0].set_ylabel("passes" if rtol is None else "seconds")
        name = f"passes to a residual of {last:g}" if rtol is None else f"seconds to a residual of {rtol:g}"
        panels[0].annotate(name, (0, 1), (0, 4), "axes fraction", "offset points", fontweight="bold")
    for panel, problem in zip(grid[0], problems, strict=True):
        sizes = labels.sizes_label(points[points["problem"] == problem], "n")
        where: Any = ((0, 1), (0, 21), "axes fraction", "offset points")
        panel.annotate(
            f"{labels.short(labels.name_label(problem), 28)}:  {sizes}", *where, color=styles.GREY, fontweight="bold"
        )
    for panel in grid[-1]:
        panel.set_xlabel("condition number of Θ + ridge")
    kept = points[[column for column in COLUMNS if column in points]].reset_index(drop=True)
    return base.Drawing(figure, kept, _caption(points, problems))


def _panel(panel: Axes, here: pd.DataFrame, column: str, look: dict[str, Look]) -> None:
    for method, rows in here.groupby("method", sort=False):
        rows = rows.sort_values("condition")
        drawn = look[str(method)].line("torch") | {"linewidth": 1.1, "clip_on": False, "markersize": 5.0}
        panel.plot(rows["condition"], rows[column], **(drawn | {"marker": ""}))
        short = rows["residual"] > SLACK * rows["rtol"]
        for chosen, face in ((~short, drawn["color"]), (short, "white")):
            own = rows[chosen]
            style = drawn | {"linestyle": "", "markerfacecolor": face, "zorder": 3}
            panel.plot(own["condition"], own[column], **style)


def _methods(points: pd.DataFrame, look: dict[str, Look]) -> list[key.Entry]:
    titles = points.drop_duplicates("method").set_index("method")["title"]
    return [(Line2D([], [], **look[m].line("torch")), labels.short(str(titles[m]))) for m in look]


def _reading() -> list[tuple[Line2D, str]]:
    sample: dict[str, Any] = {"color": styles.GREY, "marker": "o", "linestyle": "", "markersize": 5}
    return [
        (Line2D([], [], **sample), "residual by products within the tolerance"),
        (Line2D([], [], **sample, markerfacecolor="white"), "above the tolerance"),
    ]


# --- words from the data


def fastest(points: pd.DataFrame) -> pd.DataFrame:
    """The fastest method by products against the factor, for each problem, ridge and tolerance that one reached.

    ``ratio`` is the seconds of the factor over those of products: above 1 products win. It is 0, without a ``method``,
    if no products reached the residual, and infinite if the factor did not.
    """
    good = points[points["residual"] <= SLACK * points["rtol"]]
    cases = ["problem", "n", "share", "rtol"]
    exact = good[good["method"] == EXACT].set_index(cases)
    products = good[good["method"] != EXACT]
    products = products.loc[products.groupby(cases, sort=False)["seconds"].idxmin()].set_index(cases)
    found = products[["method", "title", "condition", "seconds", "passes_spent"]]
    ratio = (exact["seconds"] / found["seconds"]).where(exact["seconds"].notna(), np.inf)
    found = found.reindex(found.index.union(exact.index, sort=False))
    both = found.assign(ratio=ratio.reindex(found.index))
    lost = both["method"].isna()
    return both.assign(ratio=both["ratio"].where(~lost, 0.0)).reset_index()


def _title(points: pd.DataFrame) -> str:
    found = fastest(points)
    if not len(found):
        return "Solutions by a factor and by products: seconds to a residual"
    won = found[found["ratio"] > 1]
    if not len(won):
        return f"Where all of Θ fits, its Cholesky factor is the fastest in all {len(found)} cases"
    if len(won) == len(found):
        return f"Conjugate gradients are faster than a Cholesky factor in all {len(found)} cases"
    return f"Products beat a Cholesky factor in {len(won)} of {len(found)} cases"


def _caption(points: pd.DataFrame, problems: list[str]) -> str:
    text = (
        "Seconds from weights to a solution with the given relative residual, medians over right-hand sides, against "
        "the condition number of Theta + ridge I. The factor's time includes the computation of Theta and refinement "
        "by products. Residuals are computed by products in float64."
    )
    found = fastest(points)
    for problem in problems:
        here = found[found["problem"] == problem]
        if not len(here):
            continue
        won, lost = here[here["ratio"] > 1], here["method"].isna().sum()
        text += f" {labels.name_label(problem)}: products are faster in {len(won)} of {len(here)} cases"
        text += f", and do not reach the residual in {lost}" if lost else ""
        here = here[here["method"].notna() & np.isfinite(here["ratio"])]
        for place, words in (
            ((here["ratio"].idxmax(), "at best"), (here["ratio"].idxmin(), "at worst")) if len(here) else ()
        ):
            row = here.loc[place]
            text += (
                f", {words} {labels.rounded(row['ratio'])} times as fast ({row['title']}, condition number "
                f"{labels.rounded(row['condition'])}, residual {row['rtol']:g}, {row['passes_spent']:g} passes)"
            )
        text += "."
        text += _saved(points[points["problem"] == problem])
    return text


def _saved(here: pd.DataFrame) -> str:
    """The savings by the preconditioner at the largest condition number and the smallest residual."""
    last = here[(here["rtol"] == here["rtol"].min()) & (here["share"] == here["share"].min())].set_index("method")
    if not {"nystrom", "plain"} <= set(last.index):
        return ""
    ours, plain = last.loc["nystrom"], last.loc["plain"]
    return (
        f" At the largest condition number and a residual of {ours['rtol']:g}, the preconditioned solver takes "
        f"{ours['iterations']:g} iterations and {ours['passes_spent']:g} passes instead of {plain['iterations']:g} "
        f"and {plain['passes_spent']:g}."
    )
