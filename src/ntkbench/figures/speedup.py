"""How much faster than the two baselines a method is, at equal accuracy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import ScaledTranslation

from ntkbench.figures.plotting import base, canvas, key, labels, styles, tasks
from ntkbench.figures.plotting.speedups import BASELINES, TOLERANCES, speedups

SHAPES = {"1 %": ("o", "#56B4E9"), "0.1 %": ("D", "#0072B2"), "exact": ("s", "#000000")}
FIRST, SECOND = BASELINES
SECONDS = [f"{name}_seconds" for name in BASELINES]
CASE = ["problem", "setting"]
COLUMNS = 3
ACCENT = "#882255"
TIMES = "\N{MULTIPLICATION SIGN}"
GUTTER = 0.15
"""Share of a panel's width, on the left, where what was not reached is listed."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """Speed-ups over the naive Jacobian (lower axis) and over direct (upper axis); a metric's problems side by side."""
    everything = speedups(table)
    plotted = everything[everything[SECONDS].notna().any(axis=1)]
    if not len(plotted):
        return base.nothing(everything, f"No baseline was measured.\n{labels.why_not(table)}")
    style = styles.looks(table)
    rows = [
        (metric, row)
        for metric in base.metrics_in(plotted)
        for row in canvas.in_rows(plotted[plotted["metric"] == metric].groupby(CASE, sort=False), COLUMNS)
    ]
    lines = [_lines(row, style) for _, row in rows]
    names = [[_name(style[method].title, backend) for method, backend in pairs] for pairs in lines]
    figure, grid = canvas.sheet(
        [canvas.Row(0.195 * len(pairs) + 0.1, above=1.15, below=0.36) for pairs in lines],
        min(COLUMNS, max(len(row) for _, row in rows)),
        title="Speed-up at equal accuracy",
        subtitle=base.settings_line(table),
        key=_reading(plotted),
        left=canvas.text_width([*itertools.chain(*names), f"over {BASELINES[FIRST]}  "], 9) + 0.45,
        gap=0.26,
        bottom=0.1,
    )
    for panels, (metric, row), row_lines, row_names in zip(grid, rows, lines, names, strict=True):
        canvas.hide(panels[len(row) :])
        _names(panels[0], row_names, row_lines, style)
        canvas.heading(panels[0], labels.metric_label(metric), offset=60)
        for panel, (case, here) in zip(panels, row, strict=False):
            panel.set_ylim(len(row_lines) - 0.4, -0.6)
            canvas.title(panel, labels.case_label(*case), labels.sizes_label(here, "n", "P"), offset=24)
            _frame(panel, row_lines, style)
            _panel(panel, here, row_lines, _limits(here))
    return base.Drawing(figure, plotted, _caption() + _without_baseline(everything))


def _lines(row: Sequence[tuple[Any, pd.DataFrame]], style: dict[str, styles.Look]) -> list[tuple[str, str]]:
    """The methods, each with its backend, that some panel of a row has."""
    pairs = {pair for _, here in row for pair in zip(here["method"], here["backend"], strict=True)}
    backends = styles.backends_in(pd.concat([here for _, here in row]))
    return [(method, backend) for method in style for backend in backends if (method, backend) in pairs]


def _name(title: str, backend: str) -> str:
    return title + ("" if backend == "torch" else f" ({styles.TITLES.get(backend, backend)})")


def _without_baseline(everything: pd.DataFrame) -> str:
    """A sentence on problems without a panel, since neither baseline was measured on them."""
    without = everything[everything[SECONDS].isna().all(axis=1)]
    cases = [
        f"{labels.case_label(problem, setting)} ({', '.join(dict.fromkeys(rows['metric'].str.replace('_', ' ')))})"
        for (problem, setting), rows in without.groupby(CASE, sort=False)
    ]
    return f" Without a panel, since neither baseline was measured there: {'; '.join(cases)}." if cases else ""


def _ending(rows: pd.DataFrame, baseline: str) -> str:
    torch = rows[(rows["method"] == baseline) & (rows["backend"] == "torch")]
    return torch["outcome"].iloc[0] if len(torch) else "not run"


def _limits(rows: pd.DataFrame) -> tuple[float, float]:
    """Of the lower axis."""
    baselines = rows[f"{FIRST}_seconds"] / rows[f"{SECOND}_seconds"]
    return canvas.limits(pd.concat([rows[f"speedup_over_{FIRST}"], baselines]), ratio=100)


def _frame(panel: Axes, lines: list[tuple[str, str]], style: dict[str, styles.Look]) -> None:
    """Rows for methods, a gap between kinds, the gutter."""
    panel.set_xscale("log")
    panel.set_yticks(range(len(lines)), labels=[])
    panel.tick_params(axis="y", length=0)
    panel.grid(True, axis="y", linewidth=0.5)
    panel.add_patch(Rectangle((0, 0), GUTTER, 1, transform=panel.transAxes, color=canvas.SHADE, linewidth=0, zorder=0))
    for i in range(1, len(lines)):
        if style[lines[i][0]].kind != style[lines[i - 1][0]].kind:
            panel.axhline(i - 0.5, color=canvas.PALE, linewidth=0.8, zorder=1)


def _names(panel: Axes, names: list[str], lines: list[tuple[str, str]], style: dict[str, styles.Look]) -> None:
    """Names with the colour and marker that the methods have in the other figures."""
    beside = ScaledTranslation(-10 / 72, 0, panel.figure.dpi_scale_trans)
    for i, (name, (method, backend)) in enumerate(zip(names, lines, strict=True)):
        where: dict[str, Any] = {"xycoords": panel.get_yaxis_transform(), "textcoords": "offset points"}
        panel.annotate(name, (0, i), xytext=(-20, 0), ha="right", va="center", fontsize=9, **where)
        mark = style[method].line(backend) | {"linestyle": ""}
        panel.plot(0, i, transform=panel.get_yaxis_transform() + beside, clip_on=False, **mark)
    for name, y, offset, va, colour in ((FIRST, 0, -5, "top", "black"), (SECOND, 1, 5, "bottom", ACCENT)):
        panel.annotate(
            f"over {BASELINES[name]}", (0, y), xytext=(-20, offset), xycoords="axes fraction",
            textcoords="offset points", ha="right", va=va, fontsize=9.5, color=colour,
        )  # fmt: skip


def _panel(panel: Axes, rows: pd.DataFrame, lines: list[tuple[str, str]], x: tuple[float, float]) -> None:
    """One problem and metric, in speed-ups over the first baseline, or over the second where the first is missing."""
    times = {name: rows[f"{name}_seconds"].iloc[0] for name in BASELINES}
    unit = FIRST if np.isfinite(times[FIRST]) else SECOND
    speedup = f"speedup_over_{unit}"
    low, high = x if unit == FIRST else canvas.limits([1.0, *rows[speedup]], ratio=100)
    panel.set_xlim(low / (high / low) ** (GUTTER / (1 - GUTTER)), high)
    canvas.decades(panel.xaxis, low, high, most=4)
    panel.xaxis.set_major_formatter(FuncFormatter(_tick))
    panel.tick_params(labelbottom=unit == FIRST)
    factor = times[SECOND] / times[unit]
    if np.isfinite(factor):
        upper = panel.secondary_xaxis("top", functions=(lambda x: x * factor, lambda x: x / factor))
        canvas.decades(upper.xaxis, low * factor, high * factor, most=4)
        upper.xaxis.set_major_formatter(FuncFormatter(_tick))
        upper.tick_params(colors=ACCENT, labelcolor=ACCENT, length=3)
        upper.spines["top"].set_color(ACCENT)
    sides = {FIRST: (0, -4, "top", "black", "-"), SECOND: (1, 4, "bottom", ACCENT, (0, (3, 1.5)))}
    for name, (y, offset, va, colour, dashes) in sides.items():
        if np.isfinite(times[name]):
            panel.axvline(times[unit] / times[name], color=colour, linewidth=1.0, linestyle=dashes, zorder=1.5)
        else:
            panel.annotate(
                f"{BASELINES[name]}: {_ending(rows, name)}", (0.5, y), xytext=(0, offset), xycoords="axes fraction",
                textcoords="offset points", ha="center", va=va, fontsize=9, color=styles.GREY,
            )  # fmt: skip
    spots = [lines.index(pair) for pair in zip(rows["method"], rows["backend"], strict=True)]
    _points(panel, rows.assign(x=rows[speedup], y=spots))


def _points(panel: Axes, rows: pd.DataFrame) -> None:
    """Where each tolerance was reached; in the gutter those that were not; words where nothing was measured."""
    reached = rows[rows["outcome"] == "reached"]
    # An exact method has one time, which serves the looser tolerances as well.
    exact = reached.loc[reached["tolerance"] == "exact", "y"]
    reached = reached[(reached["tolerance"] == "exact") | ~reached["y"].isin(exact)]
    spans = reached.groupby("y")["x"].agg(["min", "max"])
    panel.hlines(spans.index, spans["min"], spans["max"], color=canvas.PALE, linewidth=1.2, zorder=2)
    for (tolerance, backend), marks in reached.groupby(["tolerance", "backend"]):
        panel.plot(marks["x"], marks["y"], **_mark(tolerance, backend), zorder=3)

    side = panel.get_yaxis_transform()
    missed = rows[rows["outcome"] == "not reached"]
    for (tolerance, backend, kind), marks in missed.groupby(["tolerance", "backend", "kind"]):
        x = GUTTER * (list(TOLERANCES).index(tolerance) + 0.5) / (3 if kind == "exact" else 2)
        panel.plot([x] * len(marks), marks["y"], transform=side, **_mark(tolerance, backend, canvas.PALE))
    for row in rows[~rows["outcome"].isin(["reached", "not reached"])].drop_duplicates("y").itertuples():
        text = "\N{EN DASH}" if row.outcome == "skipped" else row.outcome
        box = {"color": canvas.SHADE, "pad": 0.6}
        panel.text(0.03, row.y, text, transform=side, va="center", fontsize=8.5, color=styles.GREY, bbox=box, zorder=4)


def _mark(tolerance: str, backend: str, colour: str | None = None) -> dict:
    marker, own = SHAPES[tolerance]
    colour = colour or own
    size = 4.4 if marker == "D" else 5.2
    return {"marker": marker, "markersize": size, "linestyle": "", "markeredgecolor": colour, "markeredgewidth": 1.2,
            "markerfacecolor": colour if backend == "torch" else "white"}  # fmt: skip


def _tick(value: float, _: int) -> str:
    return labels.power_label(value, between=(-3, 4)) + TIMES


def _reading(plotted: pd.DataFrame) -> key.Key:
    marks = [(Line2D([], [], **_mark(t, "torch")), text) for t, text in (
        ("1 %", "median error at most 1 %"), ("0.1 %", "median error at most 0.1 %"), ("exact", "exact method"),
    )]  # fmt: skip
    lines = [
        (Line2D([], [], color="black", linewidth=1.0), f"1{TIMES} over naive Jacobian (lower axis)"),
        (Line2D([], [], color=ACCENT, linewidth=1.0, linestyle=(0, (3, 1.5))), f"1{TIMES} over direct (upper axis)"),
        (Patch(color="#E6E6E6"), "grey gutter: not reached; \N{EN DASH} skipped"),
    ]
    backends = key.backend_entries(styles.backends_in(plotted), linestyle=False)
    return [("accuracy", marks), ("baselines, both in PyTorch", lines), ("backend", backends)]


def _caption() -> str:
    return (
        "Speed-up over the naive Jacobian (lower axis) and over direct (upper axis, the same points), both baselines "
        "in PyTorch on the same problem and metric; right of a baseline's line is faster. Tolerances are of the median "
        f"relative error. {tasks.RULE} Exact: exact methods with a relative error of at most "
        f"{TOLERANCES['exact']:g}; their one time holds for the looser tolerances too. Tolerances that no measured "
        "budget reached are in the grey gutter on the left; a method without any measurement says how its cells ended "
        "(a dash: skipped)."
    )
