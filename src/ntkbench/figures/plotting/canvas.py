"""Sheets of panels laid out in inches, below a title and a shared key; and helpers for panels."""

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
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ntkbench.errors import BadInput
from ntkbench.figures.plotting.key import Key, legend
from ntkbench.figures.plotting.styles import GREY

WIDTH = 11.0
"""Width in inches; text of 10 points is still legible if a page shows the sheet at half size."""
MARGIN = 0.12
TITLE: dict[str, Any] = {"fontsize": 12.5, "fontweight": "bold"}
PALE = "#B9B9B9"
SHADE = "#F2F2F2"


@dataclass(frozen=True)
class Row:
    """Heights in inches of a row of panels: the panels, the space above (titles) and below (tick labels)."""

    height: float
    above: float = 0.5
    below: float = 0.3


def sheet(
    rows: Sequence[Row],
    columns: int,
    *,
    title: str,
    subtitle: str,
    key: Key,
    left: float = 0.85,
    gap: float = 0.18,
    bottom: float = 0.3,
    widest: float = 5.0,
) -> tuple[Figure, list[list[Axes]]]:
    """A figure ``WIDTH`` inches wide with ``len(rows)`` x ``columns`` panels below a title and a key.

    Args:
        rows: heights, from the top.
        columns: panels side by side.
        title: in bold, at the top; wrapped if it is long.
        subtitle: in grey, below the title.
        key: headings with their entries (handle, label).
        left: inches left of the first panel, for labels; at most half of the width.
        gap: inches between panels.
        bottom: inches below the last row's tick labels.
        widest: maximum width of a panel in inches.

    Raises:
        BadInput: there is no panel.
    """
    if not rows or columns < 1:
        raise BadInput("the rows of the table lack the names of their panels, so there is no panel to draw")
    left = min(left, WIDTH / 2)
    figure = Figure(figsize=(WIDTH, 4.0))
    drawn = legend(figure, key, WIDTH - 2 * MARGIN)
    lines = _lines(title)
    more = 0.22 * (len(lines) - 1)
    head = 0.75 + more + drawn.get_window_extent(FigureCanvasAgg(figure).get_renderer()).height / figure.dpi
    total = head + sum(row.above + row.height + row.below for row in rows) + bottom
    figure.set_size_inches(WIDTH, total)
    figure.text(MARGIN / WIDTH, 1 - MARGIN / total, "\n".join(lines), va="top", **TITLE)
    figure.text(MARGIN / WIDTH, 1 - (0.36 + more) / total, subtitle, fontsize=9.5, color=GREY, va="top")
    drawn.set_bbox_to_anchor((MARGIN / WIDTH, 1 - (0.68 + more) / total), transform=figure.transFigure)

    width = min(widest, (WIDTH - left - MARGIN - gap * (columns - 1)) / columns)
    grid, top = [], total - head
    for row in rows:
        top -= row.above
        low = (top - row.height) / total
        lefts = [left + c * (width + gap) for c in range(columns)]
        grid.append([figure.add_axes((x / WIDTH, low, width / WIDTH, row.height / total)) for x in lefts])
        top -= row.height + row.below
    return figure, grid


def _lines(title: str) -> list[str]:
    """A sheet's title, in the fewest lines of similar length that fit."""
    for count in range(1, 5):
        lines = textwrap.wrap(title, math.ceil(len(title) / count) + 6 * (count > 1)) if title.strip() else [""]
        if text_width(lines, **TITLE) <= WIDTH - 2 * MARGIN:
            break
    return lines


def text_width(labels: Iterable[str], fontsize: float, fontweight: str = "normal") -> float:
    """Width in inches of the longest of these labels."""
    figure = Figure()
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [figure.text(0, 0, label, fontsize=fontsize, fontweight=fontweight) for label in labels]
    return max((text.get_window_extent(renderer).width / figure.dpi for text in texts), default=0.0)


def limits(values: Iterable[float], pad: float = 1.6, ratio: float = 40.0) -> tuple[float, float]:
    """Limits of a logarithmic axis around positive values, at least a ``ratio`` apart."""
    values = np.asarray([v for v in values if math.isfinite(v) and v > 0]).clip(1e-300, 1e300)
    if not len(values):
        return 0.1, 10.0
    low, high = values.min() / pad, values.max() * pad
    more = math.sqrt(max(1.0, ratio / (high / low)))
    return float(low / more), float(high * more)


def decades(axis: Any, low: float, high: float, most: int = 6) -> None:
    """At most ``most`` ticks at powers of ten, including the lowest; finer ticks if there are fewer than two."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / most))
    ticks = [10.0**k for k in range(first, last + 1, step)]
    if len(ticks) < 2:
        fine = [m * 10.0**k for k in range(first - 1, last + 1) for m in (1, 3)]
        ticks = [tick for tick in fine if low <= tick <= high]
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())


def label_ends(panel: Axes, ends: Iterable[tuple[float, float, str, str]]) -> None:
    """Text to the right of line ends (y, x, text, colour) on a log y axis, moved up where labels would overlap."""
    low, high = panel.get_ylim()
    inches = panel.bbox.height / panel.figure.dpi
    span, least, last = math.log(high / low), 0.15 / inches, -1.0
    for y, x, text, colour in sorted(ends):
        at = max(math.log(y / low) / span, last + least)
        last = at
        where = (x, low * math.exp(at * span))
        panel.annotate(text, where, xytext=(7, 0), textcoords="offset points", color=colour, fontsize=8.5, va="center")


def compress(panel: Axes, knee: float) -> None:
    """Log y axis with decades below ``knee`` squeezed, on grey, since slopes there do not compare with those above."""
    bottom, share = math.log10(knee), 0.25

    def squeezed(y: np.ndarray) -> np.ndarray:
        log = np.log10(np.maximum(y, 1e-300))
        return np.where(log < bottom, bottom + share * (log - bottom), log)

    def back(z: np.ndarray) -> np.ndarray:
        return 10.0 ** np.where(z < bottom, bottom + (z - bottom) / share, z)

    low, high = panel.get_ylim()
    panel.set_yscale("function", functions=(squeezed, back))
    panel.set_ylim(low, high)
    panel.axhspan(low, knee, color=SHADE, linewidth=0, zorder=0)
    above, below = (math.floor(math.log10(v) + 1e-9) for v in (high, knee))
    ticks = [*range(math.ceil(math.log10(low) - 1e-9), below - 1, 2), *range(below, above + 1)]
    panel.yaxis.set_major_locator(FixedLocator([10.0**k for k in ticks]))
    panel.yaxis.set_minor_locator(NullLocator())


def note(panel: Axes, text: str, size: float = 9.0) -> None:
    """Grey text instead of data."""
    width = panel.get_position().width * WIDTH
    lines = [textwrap.fill(line, max(12, int(width * 72 / (0.56 * size)))) for line in text.splitlines()]
    panel.text(
        0.5, 0.5, "\n".join(lines), transform=panel.transAxes, ha="center", va="center", fontsize=size, color=GREY
    )


def in_rows(panels: Iterable[Any], columns: int) -> list[list[Any]]:
    """The panels, split into rows of at most ``columns``."""
    panels = list(panels)
    return [panels[i : i + columns] for i in range(0, len(panels), columns)]


def title(panel: Axes, text: str, detail: str, offset: float = 4.0) -> None:
    """A panel's title on the left, with its details in grey below it."""
    where: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    panel.annotate(text, (0, 1), xytext=(0, offset + 13), fontweight="bold", **where)
    panel.annotate(detail, (0, 1), xytext=(0, offset), color=GREY, fontsize=9, **where)


def hide(panels: Iterable[Axes]) -> None:
    """Hide the panels that a row does not fill."""
    for panel in panels:
        panel.set_visible(False)


def heading(panel: Axes, text: str, detail: str = "", offset: float = 20.0) -> None:
    """A row's heading, above its first panel's title: bold, then in grey."""
    spot = panel.annotate(
        text, (0, 1), xytext=(0, offset), xycoords="axes fraction", textcoords="offset points", fontweight="bold"
    )
    if detail:
        panel.annotate(
            detail, (1, 0), xytext=(8, 0), xycoords=spot, textcoords="offset points", color=GREY, va="bottom"
        )
