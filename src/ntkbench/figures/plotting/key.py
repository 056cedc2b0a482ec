"""The key of a sheet: the colour and marker of each method, and how to read the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

from ntkbench.figures.plotting.styles import GREY, TITLES, Look

LONGEST = 10
"""Maximum number of entries in a column; a longer group continues in the next column."""

Entry = tuple[Any, str]
Key = Sequence[tuple[str, Sequence[Entry]]]
"""Headings with their entries: handles and labels."""
_BLANK = Line2D([], [], linestyle="")


def backend_entries(backends: Iterable[str], linestyle: bool = True) -> list[Entry]:
    """Key entries of backends."""
    sample = Look("", "", "", GREY, "o")
    entries = []
    for backend in backends:
        style = sample.line(backend) | ({} if linestyle else {"linestyle": ""})
        words = {"torch": "filled, solid", "jax": "open, dashed"}.get(backend, "open, dotted")
        words = words if linestyle else words.split(",")[0]
        entries.append((Line2D([], [], **style), f"{TITLES.get(backend, backend)}: {words}"))
    return entries


def legend(figure: Figure, key: Key, room: float) -> Legend:
    """The key in as many columns as ``room`` inches hold; only long groups are split."""
    chunks, headings = [], {name for name, entries in key if entries}
    for name, entries in key:
        parts = max(1, math.ceil(len(entries) / LONGEST))
        size = math.ceil(len(entries) / parts)
        for start in range(0, len(entries), size or 1):
            top = [(_BLANK, name if start == 0 else " ")]
            chunks.append([*top, *entries[start : start + size]])
    for columns in (4, 3, 2, 1):
        lines = _flow(chunks, columns)
        made = figure.legend(*zip(*lines, strict=True), ncols=columns, loc="upper left")
        for text in made.get_texts():
            text.set_fontweight("bold" if text.get_text() in headings else "normal")
        width = made.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width / figure.dpi
        if width <= room or columns == 1:
            return made
        made.remove()
    raise AssertionError("one column always does")


def _flow(chunks: list[list[Entry]], columns: int) -> list[Entry]:
    """Chunks in at most ``columns`` columns of the smallest height that holds them in order, padded with blanks."""
    height = max(len(chunk) for chunk in chunks)
    while True:
        made: list[list[Entry]] = [[]]
        for chunk in chunks:
            goes_on = chunk[0][1] == " "
            if made[-1] and len(made[-1]) + len(chunk) + (-1 if goes_on else 1) <= height:
                made[-1].extend(chunk[1:] if goes_on else [(_BLANK, " "), *chunk])
            else:
                made.extend([[]] if made[-1] else [])
                made[-1].extend(chunk)
        if len(made) <= columns:
            break
        height += 1
    made += [[] for _ in range(columns - len(made))]
    return [entry for column in made for entry in column + [(_BLANK, " ")] * (height - len(column))]
