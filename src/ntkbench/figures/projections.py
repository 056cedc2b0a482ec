"""Projected gradients: errors of Gram matrix, pNTK, norm and alignment against features, seconds and bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ntkbench.figures.plotting import base, canvas, key, labels, styles
from ntkbench.figures.plotting.styles import Look, looks

TABLE = "projections"
COLUMNS: tuple[str, ...] = ("problem", "method", "title", "kind", "k", "passes", "N", "O", "P", "n", "gram_error")
COLUMNS += ("pntk_error", "norm_plug_in", "norm_unbiased", "norm_bias", "alignment_plug_in", "alignment_unbiased")
COLUMNS += ("bytes", "kept", "seconds", "seeds", "calls")

AGAINST_K = {
    "gram_error": "Gram matrix",
    "pntk_error": "pNTK",
    "norm": "norm",
    "alignment": "alignment",
}
"""Panels of the upper row of a problem, against features."""
AGAINST_COST = (
    ("gram_error", "seconds", "Gram matrix"),
    ("norm", "seconds", "norm"),
    ("alignment", "seconds", "alignment"),
    ("gram_error", "bytes", "Gram matrix"),
)
"""Panels of the lower row: error, cost, and what it is the error of."""
FEATURES = "features of a row, k"
COSTS = {"seconds": "seconds (of the norm)", "bytes": "bytes kept"}
SHOWN = ("projection", "estimator", "approximate", "exact")
FLOOR = 1e-4
"""Smaller errors are drawn at this value; they are those of exact kernels."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """Two rows of panels for each problem: against features, and against seconds and bytes."""
    points = base.measured(table, "seconds", "n")
    points = points[points["kind"].isin(SHOWN)]
    if not len(points[points["kind"] == "projection"]):
        return base.nothing(table, labels.why_not(table))
    shown = list(dict.fromkeys(points["problem"]))
    style = looks(points.assign(kind=points["kind"].replace({"projection": "stochastic", "estimator": "stochastic"})))
    rows = [canvas.Row(1.9, above=0.8, below=0.45), canvas.Row(1.9, above=0.2, below=0.55)] * len(shown)
    figure, grid = canvas.sheet(
        rows,
        len(AGAINST_K),
        title=_title(points),
        subtitle=base.settings_line(table).replace("median over", "root mean square over"),
        key=[*_methods(points, style), ("how to read", _reading())],
        left=0.7,
        gap=0.2,
    )
    for i, problem in enumerate(shown):
        here = points[points["problem"] == problem]
        above, below = grid[2 * i], grid[2 * i + 1]
        projections = here[here["kind"] == "projection"]
        for panel, (error, what) in zip(above, AGAINST_K.items(), strict=True):
            _panel(panel, projections, "k", error, style, _limits(projections))
            canvas.title(panel, what, "")
            panel.set_xlabel(FEATURES)
        for panel, (error, cost, what) in zip(below, AGAINST_COST, strict=True):
            _panel(panel, here, cost, error, style, _limits(here))
            panel.set_xlabel(f"{what}: {COSTS[cost]}")
        for panels in (above, below):
            panels[0].set_ylabel("relative error")
            for panel in panels[1:]:
                panel.tick_params(labelleft=False)
        said = f"{labels.name_label(problem)}:  {labels.sizes_label(here, 'n', 'P', 'O')}"
        above[0].annotate(
            said, (0, 1), (0, 30), "axes fraction", "offset points", fontsize=11, fontweight="bold", color=styles.GREY
        )
    kept = points[[column for column in COLUMNS if column in points]].reset_index(drop=True)
    return base.Drawing(figure, kept, _caption(points))


def _limits(here: pd.DataFrame) -> tuple[float, float]:
    columns = ("gram_error", "pntk_error", "norm_plug_in", "norm_unbiased", "alignment_plug_in", "alignment_unbiased")
    return canvas.limits(np.clip(here[list(columns)].to_numpy(float), FLOOR, None).ravel(), pad=1.5)


def _panel(
    panel: Axes, here: pd.DataFrame, against: str, error: str, style: dict[str, Look], limits: tuple[float, float]
) -> None:
    """Lines of all methods; for norm and alignment the published value is dashed and open, the unbiased one solid."""
    for method, rows in here.groupby("method", sort=False):
        rows = rows[rows[against].notna()].sort_values(against)
        look = style[str(method)].line("torch")
        for column, plug_in in _columns(error):
            own = rows[rows[column].notna()]
            if not len(own):
                continue
            published = plug_in and own["kind"].iloc[0] == "projection"
            drawn = look | ({"linestyle": (0, (3.2, 1.6)), "markerfacecolor": "white"} if published else {})
            panel.plot(own[against], own[column].clip(lower=FLOOR), **{**drawn, "linewidth": 1.2, "clip_on": False})
    panel.set(xscale="log", yscale="log", ylim=limits)
    canvas.decades(panel.yaxis, *limits)
    values = here[against].dropna()
    if len(values):
        low, high = canvas.limits(values, pad=1.3, ratio=4)
        panel.set_xlim(low, high)
        canvas.decades(panel.xaxis, low, high)


def _columns(error: str) -> list[tuple[str, bool]]:
    """Columns of an error, each with whether it is of the published, biased value."""
    if error in ("norm", "alignment"):
        return [(f"{error}_unbiased", False), (f"{error}_plug_in", True)]
    return [(error, False)]


def _methods(points: pd.DataFrame, style: dict[str, Look]) -> key.Key:
    kinds = points.drop_duplicates("method").set_index("method")["kind"]
    headings = {"projection": "projections", "estimator": "estimators"}
    made = []
    for kind in SHOWN:
        entries = []
        for method in kinds[kinds == kind].index:
            line = style[method].line("torch") | ({"linestyle": ""} if kind in ("approximate", "exact") else {})
            entries.append((Line2D([], [], **line), style[method].title))
        made.append((headings.get(kind, kind), entries))
    return made


def _reading() -> list[tuple[Line2D, str]]:
    sample: dict[str, Any] = {"color": styles.GREY, "marker": "o", "markersize": 5}
    return [
        (Line2D([], [], **sample), "error; norm, alignment: unbiased"),
        (Line2D([], [], **sample, markerfacecolor="white", linestyle=(0, (3.2, 1.6))), "of the published Gram matrix"),
    ]


# --- words from the data


def slopes(points: pd.DataFrame) -> pd.Series:
    """Power of the kept features with which the error of the Gram matrix falls, by problem and method.

    It is a fit in logarithms; a method with fewer than three numbers of features has none.
    """
    found = {}
    for names, rows in points[points["kind"] == "projection"].groupby(["problem", "method"], sort=False):
        rows = rows[rows["gram_error"] > 0].drop_duplicates("kept")
        if len(rows) >= 3:
            found[names] = float(np.polyfit(np.log(rows["kept"]), np.log(rows["gram_error"]), 1)[0])
    return pd.Series(found, dtype=float)


def _exact_seconds(here: pd.DataFrame) -> float:
    return float(here.loc[here["kind"] == "exact", "seconds"].min())


def _faster(here: pd.DataFrame) -> pd.DataFrame:
    """Projections that take less time than the fastest exact kernel, the most accurate first."""
    rows = here[(here["kind"] == "projection") & (here["seconds"] < _exact_seconds(here))]
    return rows.sort_values("gram_error")


def _title(points: pd.DataFrame) -> str:
    said = [_faster(here) for _, here in points.groupby("problem", sort=False)]
    if not all(np.isfinite(_exact_seconds(here)) for _, here in points.groupby("problem")):
        return "Projected gradients: errors against features, seconds and bytes"
    if not any(len(rows) for rows in said):
        return "No projection is faster than the exact kernel on these problems"
    least = labels.share_label(min(float(rows["gram_error"].iloc[0]) for rows in said if len(rows)))
    return f"Of projections that are faster than the exact kernel, the best Gram matrix is off by {least}"


def _caption(points: pd.DataFrame) -> str:
    titles = points.drop_duplicates("method").set_index("method")["title"]
    text = (
        "Relative root-mean-square errors over seeds from k random features of each row of J (Gram matrix: Frobenius "
        "norm). Dashed: from the Gram matrix, as published; solid: unbiased before the root or ratio, from pairs of "
        f"independent parts of the projection. Errors below {FLOOR:g} are drawn there. Approximations by a kernel A "
        "between samples stand for Theta as A ⊗ I_O. Bytes are those of the features or the kernel, not the peak."
    )
    for problem, here in points.groupby("problem", sort=False):
        text += f" {labels.name_label(str(problem))}: {_found(here, titles)}"
    return text


def _found(here: pd.DataFrame, titles: pd.Series) -> str:
    slope = slopes(here).droplevel(0)
    parts = [f"{titles[method]} {labels.rounded(value)}" for method, value in slope.items()]
    said = [f"the Gram matrix's error falls as k to the power of {', '.join(parts)}"] if parts else []
    projections = here[here["kind"] == "projection"]
    for method, rows in projections.groupby("method", sort=False):
        first, last = rows.loc[rows["kept"].idxmin()], rows.loc[rows["kept"].idxmax()]
        said.append(
            f"{titles[method]} is off by {labels.share_label(first['gram_error'])} at k = {first['kept']:g} and by "
            f"{labels.share_label(last['gram_error'])} at {last['kept']:g} in {labels.rounded(last['seconds'])} s (its "
            f"norm by {_signed(first['norm_bias'])} and {_signed(last['norm_bias'])} on average)"
        )
    for row in here[here["kind"] == "approximate"].to_dict("records"):
        off = (
            f"the norm by {_signed(row['norm_bias'])}, the alignment by {labels.share_label(row['alignment_plug_in'])}"
        )
        gram = "" if math.isnan(row["gram_error"]) else f"Theta by {labels.share_label(row['gram_error'])}, "
        said.append(f"{row['title']} misses {gram}{off}")
    exact = _exact_seconds(here)
    if math.isfinite(exact):
        best = _faster(here)
        said.append(f"an exact kernel takes {labels.rounded(exact)} s" + _instead(best, titles))
    return "; ".join(said) + "."


def _instead(best: pd.DataFrame, titles: pd.Series) -> str:
    """The alternatives that take less time than an exact kernel."""
    if not len(best):
        return ", less than any of these projections"
    row = best.iloc[0]
    error = labels.share_label(row["gram_error"])
    return f"; in less time {titles[row['method']]} with k = {row['kept']:g} gives the Gram matrix to {error} at best"


def _signed(share: float) -> str:
    return f"{'+' if share > 0 else ''}{labels.share_label(share)}"
