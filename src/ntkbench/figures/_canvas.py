"""Sheets of panels laid out in inches, under a title and a shared key; and the small parts that panels have in common."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from ntkbench.figures._looks import TITLES, Look

WIDTH = 11.0
"""Inches; text of 10 points is still legible where a page shows this at half size."""
MARGIN = 0.12
GREY = "#6B6B6B"
PALE = "#B9B9B9"

Entry = tuple[Any, str]


@dataclass(frozen=True)
class Row:
    """Heights in inches of a row of panels: above them (titles), they themselves, below them (tick labels)."""

    height: float
    above: float = 0.5
    below: float = 0.3


def sheet(
    rows: Sequence[Row],
    columns: int,
    *,
    title: str,
    subtitle: str,
    key: Sequence[tuple[str, Sequence[Entry]]],
    left: float = 0.85,
    gap: float = 0.18,
    bottom: float = 0.3,
    widest: float = 5.0,
) -> tuple[Figure, list[list[Axes]]]:
    """A figure ``WIDTH`` inches wide with ``len(rows)`` x ``columns`` panels below a title and a key.

    Args:
        rows: heights, from the top.
        columns: panels side by side.
        title: in bold, at the top.
        subtitle: in grey, below the title.
        key: headings with their entries (handle, label).
        left: inches left of the first panel, for labels.
        gap: inches between panels.
        bottom: inches below the last row's tick labels.
        widest: inches that a panel is at most wide.
    """
    figure = Figure(figsize=(WIDTH, 4.0))
    legend = _legend(figure, key)
    head = 0.75 + legend.get_window_extent(FigureCanvasAgg(figure).get_renderer()).height / figure.dpi
    total = head + sum(row.above + row.height + row.below for row in rows) + bottom
    figure.set_size_inches(WIDTH, total)
    figure.text(MARGIN / WIDTH, 1 - MARGIN / total, title, fontsize=12.5, fontweight="bold", va="top")
    figure.text(MARGIN / WIDTH, 1 - 0.36 / total, subtitle, fontsize=9.5, color=GREY, va="top")
    legend.set_bbox_to_anchor((MARGIN / WIDTH, 1 - 0.68 / total), transform=figure.transFigure)

    width = min(widest, (WIDTH - left - MARGIN - gap * (columns - 1)) / columns)
    grid, top = [], total - head
    for row in rows:
        top -= row.above
        low = (top - row.height) / total
        lefts = [left + c * (width + gap) for c in range(columns)]
        grid.append([figure.add_axes((x / WIDTH, low, width / WIDTH, row.height / total)) for x in lefts])
        top -= row.height + row.below
    return figure, grid


def text_width(labels: Iterable[str], size: float) -> float:
    """Inches that the longest of these labels takes."""
    figure = Figure()
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [figure.text(0, 0, label, fontsize=size) for label in labels]
    return max((text.get_window_extent(renderer).width / figure.dpi for text in texts), default=0.0)


def method_entries(looks: Iterable[Look], backends: dict[str, list[str]]) -> list[tuple[str, list[Entry]]]:
    """The key's part on methods, by kind: drawn as for PyTorch, or as for the one backend that a method has."""
    kinds: dict[str, list[Entry]] = {}
    for look in looks:
        style = look.line("torch" if "torch" in backends[look.method] else backends[look.method][0])
        if look.kind != "stochastic":
            style["linestyle"] = ""
        kinds.setdefault(look.kind, []).append((Line2D([], [], **style), look.title))
    return list(kinds.items())


def backend_entries(backends: Iterable[str], linestyle: bool = True) -> list[Entry]:
    """The key's part on backends."""
    sample = Look("", "", "", GREY, "o")
    entries = []
    for backend in backends:
        style = sample.line(backend) | ({} if linestyle else {"linestyle": ""})
        words = {"torch": "filled, solid", "jax": "open, dashed"}.get(backend, "open, dotted")
        words = words if linestyle else words.split(",")[0]
        entries.append((Line2D([], [], **style), f"{TITLES.get(backend, backend)}: {words}"))
    return entries


def _legend(figure: Figure, key: Sequence[tuple[str, Sequence[Entry]]]) -> Legend:
    """All entries, flowing down as many columns as there is room for; a heading stays with what it heads."""
    groups = [[(Line2D([], [], linestyle=""), heading), *entries] for heading, entries in key if entries]
    for columns in (4, 3, 2, 1):
        lines = _flow(groups, columns)
        legend = figure.legend(*zip(*lines, strict=True), ncols=columns, loc="upper left")
        for text in legend.get_texts():
            if text.get_text() in {group[0][1] for group in groups}:
                text.set_fontweight("bold")
        width = legend.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width / figure.dpi
        if width <= WIDTH - 2 * MARGIN or columns == 1:
            break
        legend.remove()
    return legend


def _flow(groups: list[list[Entry]], columns: int) -> list[Entry]:
    """Entries in columns of one height, the last ones filled up with blanks."""
    blank = (Line2D([], [], linestyle=""), " ")
    for height in range(1, 1000):
        made: list[list[Entry]] = [[]]
        for group in groups:
            if made[-1] and len(made[-1]) + 1 + min(len(group), 3) <= height:
                made[-1].append(blank)
            elif made[-1]:
                made.append([])
            for entry in group:
                if len(made[-1]) == height:
                    made.append([])
                made[-1].append(entry)
        if len(made) <= columns and height > 2:
            break
    made += [[] for _ in range(columns - len(made))]
    return [entry for column in made for entry in column + [blank] * (height - len(column))]


def limits(values: Iterable[float], pad: float = 1.6, ratio: float = 40.0) -> tuple[float, float]:
    """Limits of a logarithmic axis around positive values, at least a ``ratio`` apart."""
    values = np.asarray([v for v in values if math.isfinite(v) and v > 0])
    if not len(values):
        return 0.1, 10.0
    low, high = values.min() / pad, values.max() * pad
    more = math.sqrt(max(1.0, ratio / (high / low)))
    return float(low / more), float(high * more)


def decades(axis: Any, low: float, high: float, most: int = 6) -> None:
    """Ticks at powers of ten, at most ``most`` of them, the lowest one included."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / most))
    axis.set_major_locator(FixedLocator([10.0**k for k in range(first, last + 1, step)]))
    axis.set_minor_locator(NullLocator())


def note(panel: Axes, text: str, size: float = 9.0) -> None:
    """Grey text instead of data."""
    width = panel.get_position().width * WIDTH
    lines = [textwrap.fill(line, max(12, int(width * 72 / (0.56 * size)))) for line in text.splitlines()]
    panel.text(
        0.5, 0.5, "\n".join(lines), transform=panel.transAxes, ha="center", va="center", fontsize=size, color=GREY
    )


def heading(panel: Axes, text: str, detail: str = "", offset: float = 20.0) -> None:
    """A row's heading, above its first panel's title: bold, then in grey."""
    spot = panel.annotate(
        text, (0, 1), xytext=(0, offset), xycoords="axes fraction", textcoords="offset points", fontweight="bold"
    )
    if detail:
        panel.annotate(detail, (1, 0), xytext=(8, 0), xycoords=spot, textcoords="offset points", color=GREY, va="bottom")
