"""Solutions of (Theta + ridge I) x = y: seconds and passes to a residual against the condition number."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ntkbench.figures.plotting import base, canvas, key, labels, styles, tasks
from ntkbench.figures.plotting.styles import Look
from ntkbench.measure import laws

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
"""Allowed ratio of a residual to its tolerance, for the rounding of the check."""


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
    return base.Drawing(figure, kept, _caption(points))


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
        (Line2D([], [], **sample), "residual, from products, within the tolerance"),
        (Line2D([], [], **sample, markerfacecolor="white"), "above the tolerance"),
        (Line2D([], [], linestyle=""), "the factor's time includes that of Θ"),
    ]


# --- findings, title and caption

FACTOR, PRODUCTS = "factor", "products"


def fastest(points: pd.DataFrame) -> pd.DataFrame:
    """Products against the factor, for each problem, ridge and tolerance that one of them reached.

    ``winner`` is :data:`FACTOR` or :data:`PRODUCTS` if that is the faster one with a probability of at least 95 %. It
    is empty otherwise, or if only one of the two was measured. ``title`` names the fastest matrix-free method if that
    is as certain, and another method was measured.

    Args:
        points: all measured rows, also those that did not reach their tolerance.
    """
    cases = ["problem", "n", "share", "rtol"]
    good = points[points["residual"] <= SLACK * points["rtol"]]
    typical = laws.typical_spread(points)
    made = []
    rivals = points.assign(exact=points["method"] == EXACT).groupby(cases)[["exact", "method"]].nunique()
    for case, rows in good.groupby(cases, sort=False):
        shares = pd.Series(laws.smallest(*laws.median_seconds(rows, typical=typical)), index=rows.index)
        exact = rows["method"] == EXACT
        won = float(shares[~exact].sum())
        row = dict(zip(cases, case, strict=True)) | {"condition": rows["condition"].iloc[0]}
        both, several = rivals.loc[case] > 1
        row["winner"] = "" if not both else PRODUCTS if won >= tasks.SURE else FACTOR if won <= 1 - tasks.SURE else ""
        row["title"] = rows["title"][shares.idxmax()] if several and shares[~exact].max() >= tasks.SURE else ""
        made.append(row)
    return pd.DataFrame(made, columns=[*cases, "condition", "winner", "title"])


def _title(points: pd.DataFrame) -> str:
    found = fastest(points)
    if not len(found):
        return "Solutions by a Cholesky factor and matrix-free: seconds to a residual"
    won = (found["winner"] == PRODUCTS).sum()
    if (found["winner"] == FACTOR).all():
        return f"Where all of Θ fits, its Cholesky factor is the fastest in all {len(found)} cases"
    if won == len(found):
        return f"Conjugate gradients are faster than a Cholesky factor in all {len(found)} cases"
    return f"Products beat a Cholesky factor with 95 % certainty in {won} of {len(found)} cases"


def _caption(points: pd.DataFrame) -> str:
    return labels.fitted(
        "Median seconds to a relative residual, against the condition number of Θ + ridge.", *_advice(fastest(points))
    )


def _advice(found: pd.DataFrame) -> list[str]:
    """Which to use when, over all cases."""
    if not len(found):
        return []
    won, lost = (found[found["winner"] == side] for side in (PRODUCTS, FACTOR))
    sure, cases = "faster with 95 % certainty", f"{len(found)} cases"
    if not len(won) and not len(lost):
        return [f"Undecided in all {cases}: neither the factor nor products are {sure}."]
    if not len(won):
        return [f"Use the factor wherever Θ fits: it is {sure} in {len(lost)} of {cases}, and products in none."]
    said = f"Products are {sure} in {len(won)} of {cases}, and the factor in {len(lost)}."
    box = ["n", "condition", "rtol"]
    inside = (lost[box] >= won[box].min()) & (lost[box] <= won[box].max())
    if inside.all(axis=1).any():
        return [said]
    titles = set(won["title"])
    named = f" ({titles.pop()})" if len(titles) == 1 and "" not in titles else ""
    ends = f"condition numbers of {labels.span(won['condition'])} and residuals of {labels.span(won['rtol'])}"
    return [said, f"Use products{named} for n of {labels.range_label(won['n'])}, {ends}."]
