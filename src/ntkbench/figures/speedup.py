"""Speed-ups of families of methods over the naive Jacobian, at equal accuracy."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from ntkbench.figures.plotting import base, canvas, key, labels, styles, tasks
from ntkbench.figures.plotting.speedups import BASELINES, speedups

BASELINE = "naive_jacobian"
SPEEDUP = f"speedup_over_{BASELINE}"
FAMILIES = {
    "direct": "direct",
    "jacobian_contraction": "Jacobian contraction",
    "ntk_vector_products": "NTK-vector products",
    "structured_derivatives": "structured derivatives",
    "nt_jacobian_contraction": "neural-tangents Jacobian contraction",
    "nt_ntk_vector_products": "neural-tangents NTK-vector products",
    "nt_structured_derivatives": "neural-tangents structured derivatives",
    **tasks.ESTIMATORS,
}
"""Families of methods, in the order of the rows."""
OTHERS = {"exact": "other exact methods", "approximate": "approximate kernels"}
"""Families of methods that are not listed, by kind; those of other kinds are :data:`REST`."""
REST = "other estimators"
ORDER = [*dict.fromkeys([*list(FAMILIES.values())[:7], *OTHERS.values(), *FAMILIES.values(), REST])]
MARKS = {"1 %": ("o", styles.BLUE), "0.1 %": ("D", styles.VERMILION)}
"""Marker and colour by accuracy; exact methods have their own."""
LOOSE, TIGHT = MARKS
COLUMNS = 2
ASIDE = 2.3
"""Inches to the right of a panel, for counts."""
TIMES = "\N{MULTIPLICATION SIGN}"


def draw(table: pd.DataFrame) -> base.Drawing:
    """A row for each family, a dot for each task, a bar at the median; on the right what was reached."""
    everything = speedups(table)
    plotted = everything[everything[[f"{name}_seconds" for name in BASELINES]].notna().any(axis=1)].copy()
    plotted["family"] = [
        FAMILIES.get(method) or OTHERS.get(kind, REST)
        for method, kind in zip(plotted["method"], plotted["kind"], strict=True)
    ]
    reached = plotted[(plotted["outcome"] == "reached") & (plotted[SPEEDUP] > 0) & (plotted["method"] != BASELINE)]
    fastest = reached.groupby(["setting", "problem", "metric", "family", "tolerance"])["seconds"].idxmin()
    plotted["fastest"] = plotted.index.isin(fastest)
    compared = plotted[plotted[f"{BASELINE}_seconds"].notna()]
    compared = compared[(compared["method"] != BASELINE) & (compared["outcome"] != "skipped")]
    if not len(compared):
        why = f"No method was measured on a task of the naive Jacobian.\n{labels.why_not(table)}"
        return base.nothing(everything, why)
    style = styles.looks(table)
    families = [family for family in ORDER if family in set(compared["family"])]
    panels = list(compared.groupby("setting"))
    columns = min(COLUMNS, len(panels))
    left = canvas.text_width(families, 10) + 0.3
    rows = canvas.in_rows(panels, columns)
    figure, grid = canvas.sheet(
        [canvas.Row(0.27 * len(families) + 0.1, above=0.6 if any(compared["setting"]) else 0.25, below=0.4)]
        * len(rows),
        columns,
        title=_title(compared),
        subtitle=base.settings_line(table),
        key=_reading(compared),
        left=left,
        gap=ASIDE,
        widest=(canvas.WIDTH - left - ASIDE * columns) / columns,
        bottom=0.15,
    )
    for line, row in zip(grid, rows, strict=True):
        canvas.hide(line[len(row) :])
        for panel, (setting, here) in zip(line, row, strict=False):
            _panel(panel, here, families, style)
            panel.set_title(labels.plain(setting), loc="left", pad=22)
            panel.tick_params(labelleft=panel is line[0])
    return base.Drawing(figure, plotted, _caption(everything, compared))


def _dots(compared: pd.DataFrame) -> pd.DataFrame:
    """What is drawn: the fastest method of a family for a task; for exact methods only the tolerance ``exact``."""
    dots = compared[compared["fastest"]]
    return dots[(dots["kind"] != "exact") | (dots["tolerance"] == "exact")]


def _medians(compared: pd.DataFrame) -> pd.Series:
    """The median speed-up of each family over the tasks in which it is within the looser tolerance."""
    return compared[compared["fastest"] & (compared["tolerance"] == LOOSE)].groupby("family")[SPEEDUP].median()


def _panel(panel: Axes, here: pd.DataFrame, families: list[str], style: dict[str, styles.Look]) -> None:
    """The dots of one setting, the medians as bars, and the counts on the right."""
    dots, medians = _dots(here), _medians(here)
    panel.set_xscale("log")
    panel.set(xlim=canvas.limits([1.0, *dots[SPEEDUP]], ratio=30), ylim=(len(families) - 0.4, -0.6))
    canvas.decades(panel.xaxis, *panel.get_xlim())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: labels.power_label(value, (-3, 4)) + TIMES))
    panel.set_yticks(range(len(families)), families)
    panel.tick_params(axis="y", length=0)
    panel.set_xlabel("speed-up over the naive Jacobian")
    panel.axvline(1, color=styles.BLACK, linewidth=1.0, zorder=1.5)
    for (tolerance, method), marked in dots.groupby(["tolerance", dots["method"].where(dots["kind"] == "exact", "")]):
        look = style[method].line(marked["backend"].iloc[0]) if method else _mark(tolerance)
        panel.plot(marked[SPEEDUP], marked["family"].map(families.index), **(look | {"linestyle": ""}), zorder=3)
    for x, words in zip((0.1, 0.85, 1.6), ("median", f"to {LOOSE}", f"to {TIGHT}"), strict=True):
        _aside(panel, x, -0.75, words, styles.GREY)
    for row, family in enumerate(families):
        own = here[here["family"] == family]
        panel.axhline(row, color=canvas.SHADE, linewidth=1.0, zorder=0)
        if family in medians:
            panel.vlines(medians[family], row - 0.4, row + 0.4, color=styles.GREY, linewidth=2.5, zorder=2)
            _aside(panel, 0.1, row, f"{labels.rounded(medians[family])}{TIMES}", styles.BLACK, fontweight="bold")
        for x, tolerance in zip((0.85, 1.6), MARKS, strict=True):
            tried = own[own["tolerance"] == tolerance]
            count = len(tried.drop_duplicates(["problem", "metric"]))
            _aside(panel, x, row, f"{tried['fastest'].sum()} of {count}" if count else "\N{EN DASH}", styles.GREY)


def _aside(panel: Axes, inches: float, row: float, text: str, colour: str, **how: Any) -> None:
    panel.annotate(text, (1, row), xytext=(72 * inches, 0), xycoords=panel.get_yaxis_transform(), fontsize=9.5,
                   textcoords="offset points", va="center", color=colour, **how)  # fmt: skip


def _mark(tolerance: str) -> dict[str, Any]:
    marker, colour = MARKS[tolerance]
    return {"marker": marker, "color": colour, "markersize": 5.5}


def _title(compared: pd.DataFrame) -> str:
    """The exact method and the family of others with the largest medians, each with its number of tasks."""
    said = []
    for exact, name in ((True, "{}"), (False, "estimators")):
        own = compared[(compared["kind"] == "exact") == exact]
        medians = _medians(own)
        if len(medians):
            first = medians.idxmax()
            count = int((own["fastest"] & (own["tolerance"] == LOOSE) & (own["family"] == first)).sum())
            of = f"{count} task{'s' * (count != 1)}"
            said.append(f"{name.format(first)} {labels.rounded(medians[first])}{TIMES} ({of})")
    if not said or compared["setting"].nunique() > 1:
        return "Speed-up over the naive Jacobian at equal accuracy"
    return f"Speed-up over naive Jacobian: {', '.join(said)}"


def _reading(compared: pd.DataFrame) -> key.Key:
    dots = [
        (Line2D([], [], **_mark(tolerance), linestyle=""), f"to a median error of {tolerance}") for tolerance in MARKS
    ]
    bar = Line2D([], [], marker="|", color=styles.GREY, linestyle="", markersize=11, markeredgewidth=2.5)
    return [
        ("a mark is a task", [*dots, (bar, f"median, exact or to {LOOSE}")]),
        ("exact methods", key.backend_entries(styles.backends_in(compared), linestyle=False)),
    ]


def _caption(everything: pd.DataFrame, compared: pd.DataFrame) -> str:
    case = ["problem", "setting", "metric"]
    count = len(compared.drop_duplicates(case))
    text = (
        f"Speed-up of the fastest method of a family over the naive Jacobian in PyTorch on {count} tasks (problem and "
        "metric). Right: median, and tasks in which a family is within 1 % and 0.1 %; families were measured on "
        "different tasks."
    )
    if without := len(everything.drop_duplicates(case)) - count:
        text += f" {without} tasks without a naive Jacobian are left out."
    lost = compared.loc[(compared["tolerance"] == LOOSE) & (compared["outcome"] != "reached"), "outcome"]
    if len(lost):
        counts = ", ".join(f"{number} {outcome}" for outcome, number in lost.value_counts().items())
        text += f" Single methods to {LOOSE}: {counts}."
    return text
