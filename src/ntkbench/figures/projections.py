"""Projected gradients: errors of the Gram matrix, pNTK, norm and alignment against features, seconds and bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from scipy.special import ndtr

from ntkbench.figures.plotting import base, canvas, key, labels, styles, tasks
from ntkbench.figures.plotting.styles import Look, looks
from ntkbench.measure import laws

TABLE = "projections"
ERRORS = {
    "gram_error": "Gram matrix",
    "pntk_error": "pNTK",
    "norm": "norm",
    "alignment": "alignment",
}
"""Panels of a row, and what each is the error of."""
VALUES = ("gram_error", "pntk_error", "norm_plug_in", "norm_unbiased", "alignment_plug_in", "alignment_unbiased")
COLUMNS: tuple[str, ...] = ("problem", "method", "title", "kind", "kernel", "k", "passes", "N", "O", "P", "n")
COLUMNS += tuple(f"{value}{end}" for value in VALUES for end in ("", "_low", "_high"))
COLUMNS += ("trace_bias", "norm_bias", "effective_rank_bias", "bytes", "kept", "seconds", "seconds_q25", "seconds_q75")
COLUMNS += ("alignment_seconds", "seeds", "calls")
AGAINST = ("k", "seconds", "bytes")
"""Costs that errors are drawn against, one for each row of a problem."""
COSTS = {
    "k": "features of a row, k",
    "seconds": "seconds (of the norm)",
    "alignment_seconds": "seconds (of the alignment)",
    "bytes": "bytes kept",
}
SHOWN = ("projection", "estimator", "approximate", "exact")
FLOOR = 1e-4
"""Smaller errors, those of exact kernels, are drawn at this value."""
NORMAL = 1.96
"""Half of a 95 % interval in standard deviations."""
UNCOMPARED, NONE, SEVERAL = "not compared", "none", "undecided"
"""Findings of :func:`choice` that name no method."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """Three rows of panels for each problem: against features, seconds and bytes."""
    points = base.measured(table, "seconds", "n")
    points = points[points["kind"].isin(SHOWN)]
    if not len(points[points["kind"] == "projection"]):
        return base.nothing(table, labels.why_not(table))
    shown = list(dict.fromkeys(points["problem"]))
    style = looks(points.assign(kind=points["kind"].replace({"projection": "stochastic", "estimator": "stochastic"})))
    rows = [
        canvas.Row(1.6, above=0.8, below=0.5),
        canvas.Row(1.6, above=0.05, below=0.5),
        canvas.Row(1.6, above=0.05, below=0.6),
    ] * len(shown)
    figure, grid = canvas.sheet(
        rows,
        len(ERRORS),
        title=_title(points),
        subtitle=base.settings_line(table),
        key=[*_methods(points, style), ("how to read", _reading())],
        left=0.7,
        gap=0.2,
    )
    for i, problem in enumerate(shown):
        here = points[points["problem"] == problem]
        for against, panels in zip(AGAINST, grid[len(AGAINST) * i :], strict=False):
            drawn = here[here["kind"] == "projection"] if against == "k" else here
            for panel, (error, what) in zip(panels, ERRORS.items(), strict=True):
                cost = "alignment_seconds" if (against, error) == ("seconds", "alignment") else against
                _panel(panel, drawn, cost, error, style, _limits(here))
                panel.set_xlabel(COSTS[cost])
                panel.tick_params(labelleft=panel is panels[0])
                if against == "k":
                    canvas.title(panel, what, "")
            panels[0].set_ylabel("relative error")
        said = f"{labels.name_label(problem)}:  {labels.sizes_label(here, 'n', 'P', 'O')}"
        grid[len(AGAINST) * i][0].annotate(
            said, (0, 1), (0, 30), "axes fraction", "offset points", fontsize=11, fontweight="bold", color=styles.GREY
        )
    kept = points[[column for column in COLUMNS if column in points]].reset_index(drop=True)
    return base.Drawing(figure, kept, _caption(points))


def _limits(here: pd.DataFrame) -> tuple[float, float]:
    return canvas.limits(np.clip(here[list(VALUES)].to_numpy(float), FLOOR, None).ravel(), pad=1.5)


def _panel(
    panel: Axes, here: pd.DataFrame, against: str, error: str, style: dict[str, Look], limits: tuple[float, float]
) -> None:
    """Lines of all methods; for norm and alignment, the published value is dashed and open, the unbiased one solid."""
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
    """Columns of an error, each with whether it is that of the published, biased value."""
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
        (Line2D([], [], linestyle=""), f"errors below {FLOOR:g} are drawn there"),
        (Line2D([], [], linestyle=""), "N x N kernels A stand for A ⊗ I"),
    ]


# --- findings, title and caption


def _faster(here: pd.DataFrame) -> pd.DataFrame:
    """The rows that certainly take less time than every exact kernel, on one problem; none without an exact kernel."""
    middle, deviations = laws.median_seconds(here)
    exact = (here["kind"] == "exact").to_numpy()
    if not exact.any():
        return here.iloc[:0]
    others = middle[exact][:, None], deviations[exact][:, None]
    apart = (others[0] - middle) / np.hypot(others[1], deviations)
    return here[(ndtr(apart) >= tasks.SURE).all(0) & ~exact]


def choice(here: pd.DataFrame, error: str) -> str:
    """The most accurate of the methods that are faster than every exact kernel on a problem.

    Both hold with 95 % certainty: that the method is faster, and that its error is the smallest.

    Args:
        here: rows of one problem.
        error: a key of :data:`ERRORS`.

    Returns:
        The title of the method; :data:`NONE` if none is faster, :data:`SEVERAL` if errors do not decide, or
        :data:`UNCOMPARED` without an exact kernel.
    """
    if not (here["kind"] == "exact").any():
        return UNCOMPARED
    rows = _faster(here)
    found = pd.concat([rows.assign(error=rows[column], low=rows.get(f"{column}_low"), high=rows.get(f"{column}_high"))
                       for column, _ in _columns(error)])  # fmt: skip
    found = found[found["error"] > 0]
    if not len(found):
        return NONE
    middle = np.log(found["error"].to_numpy(float))
    spread = np.log(found["high"].astype(float)).sub(middle).fillna(0).to_numpy() / NORMAL
    shares = pd.Series(laws.smallest(middle, spread), index=found["title"]).groupby(level=0).sum()
    return str(shares.idxmax()) if shares.max() >= tasks.SURE else SEVERAL


def _title(points: pd.DataFrame) -> str:
    compared = points[(points["kind"] == "exact").groupby(points["problem"]).transform("any")]
    if not len(compared):
        return "Projected gradients: errors against features, seconds and bytes"
    faster = pd.concat([_faster(here) for _, here in compared.groupby("problem", sort=False)])
    faster = faster[(faster["kind"] == "projection") & faster["gram_error_high"].notna()]
    of = f"of {compared['problem'].nunique()} problems"
    if not len(faster):
        return f"No projection is surely faster than the exact kernel on any {of}"
    least = labels.share_label(float(faster["gram_error_high"].min()))
    return (
        f"Projections are surely faster than the exact kernel on {faster['problem'].nunique()} {of}, and give the Gram "
        f"matrix to {least} at best"
    )


def _caption(points: pd.DataFrame) -> str:
    """What is drawn, and which method to use when, over all problems."""
    names = labels.families(points["problem"])
    said = []
    for error in ("gram_error", "norm"):
        chosen: dict[str, list[str]] = {}
        for problem, here in points.groupby("problem", sort=False):
            chosen.setdefault(choice(here, error), []).append(names[problem])
        parts = [
            title if len(chosen) == 1 else f"{title} on {labels.listed(found, 2)}" for title, found in chosen.items()
        ]
        said.append(f"For the {ERRORS[error]}: {', '.join(parts)}.")
    return labels.fitted(
        "Root-mean-square errors of projected gradients. Surely faster than the exact kernel, and most accurate:",
        *said,
    )
