"""What figures share: the table that they get, the drawing that they return, the style, the caption."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from ntkbench.errors import BadInput
from ntkbench.figures.plotting import labels
from ntkbench.metrics import METRICS

STYLE = Path(__file__).with_name("ntkbench.mplstyle")
KINDS = ("exact", "approximate", "stochastic")
SETTINGS = ("machine", "device", "dtype", "threads")
"""What must be equal for two rows to be compared; rows that differ in one of these never share a panel."""

WORDS = ("problem", "family", "method", "title", "kind", "backend", "metric", "status", "reason", "device", "dtype")
WORDS += ("machine", "git_sha", "git_dirty")
NUMBERS = (
    "N",
    "O",
    "P",
    "n",
    "passes",
    "passes_spent",
    "seconds",
    "seconds_q25",
    "seconds_q75",
    "error",
    "error_q25",
    "error_q75",
)
NUMBERS += ("effective_rank", "seeds", "memory_bytes", "threads")
COLUMNS = WORDS + NUMBERS
"""Columns of the tidy table that figures read; it has more."""

PROVENANCE = ("status", "reason", "git_sha", "git_dirty", "machine", "device", "dtype", "threads")
"""Columns that every study's table has."""


@dataclass(frozen=True)
class Drawing:
    """What a figure file returns.

    Attributes:
        figure: the drawing itself.
        plotted: the numbers in it, and nothing else; goes into the CSV.
        caption: what is shown and by which rules; the settings are added to it.
    """

    figure: Figure
    plotted: pd.DataFrame
    caption: str


def checked(table: pd.DataFrame) -> pd.DataFrame:
    """A copy of the tidy table fit for drawing: numbers are numbers, words are words, ``setting`` says what varies.

    ``setting`` is empty where the whole table comes from one machine, device, precision and number of threads.

    Raises:
        BadInput: columns are missing, or hold something else than numbers.
    """
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise BadInput(f"the table lacks columns that figures need: {', '.join(missing)}")
    table = table.reset_index(drop=True).copy()
    for column in NUMBERS:
        try:
            table[column] = pd.to_numeric(table[column]).astype(float)
        except (ValueError, TypeError) as error:
            raise BadInput(f"column {column!r} of the table must hold numbers: {error}") from None
    for column in WORDS:
        table[column] = table[column].astype(object).where(table[column].notna(), "").astype(str)
    parts = [
        table[column].map(lambda value: f"{value:g} threads") if column == "threads" else table[column]
        for column in SETTINGS
        if table[column].nunique(dropna=False) > 1
    ]
    table["setting"] = pd.concat(parts, axis=1).agg(", ".join, axis=1) if parts else ""
    return table


def checked_study(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """A copy of a study's table fit for drawing: columns of words have no missing values.

    Raises:
        BadInput: columns are missing.
    """
    missing = [column for column in (*columns, *PROVENANCE) if column not in table.columns]
    if missing:
        raise BadInput(
            f"the table lacks columns that this figure needs: {', '.join(missing)}; is it its study's table?"
        )
    table = table.reset_index(drop=True).copy()
    for column in table.columns:
        if column in WORDS or not pd.api.types.is_numeric_dtype(table[column]):
            table[column] = table[column].astype(object).where(table[column].notna(), "").astype(str)
    return table


def measured(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows that are ok and have all of these numbers."""
    return table[(table["status"] == "ok") & table[list(columns)].notna().all(axis=1)]


def metrics_in(table: pd.DataFrame) -> list[str]:
    """The table's metrics in their usual order, unknown ones last."""
    there = set(table["metric"])
    return [m for m in METRICS if m in there] + sorted(there - set(METRICS))


def settings_line(table: pd.DataFrame) -> str:
    """Device, precision, threads, seeds and code on one line, for under a figure's title."""
    threads = " / ".join(f"{t:g}" for t in sorted(table["threads"].dropna().unique()))
    stochastic = table[table["kind"] == "stochastic"] if "kind" in table else table
    seeds = stochastic["seeds"].dropna() if "seeds" in table else stochastic["threads"].iloc[:0]
    parts = [
        *(" / ".join(sorted(set(table[column]) - {""})) for column in ("device", "dtype")),
        threads and f"{threads} thread" + "s" * (threads != "1"),
        f"median over {labels.range_label(seeds)} seeds" if len(seeds) else "",
        _code(table),
    ]
    return labels.plain("  ·  ".join(part for part in parts if part))


def _code(table: pd.DataFrame) -> str:
    """Short git shas, each with a mark where the working tree had uncommitted changes."""
    pairs = {
        (sha[:10], dirty.strip().lower() in {"true", "1", "1.0", "yes"})
        for sha, dirty in zip(table["git_sha"], table["git_dirty"], strict=True)
        if sha
    }
    shas = ", ".join(f"{sha} (dirty)" if dirty else sha for sha, dirty in sorted(pairs))
    return f"git {shas}" if shas else ""


def caption(name: str, drawing: Drawing, table: pd.DataFrame, study: str | None = None) -> str:
    """The figure's caption with the settings of the table behind it, the results table or that of a study."""
    cells = table.groupby("status").size()
    cells = ", ".join(f"{cells[s]} {labels.status_label(s)}" for s in sorted(cells.index, key=lambda s: (s != "ok", s)))
    lines = [
        f"{labels.name_label(name)}. {drawing.caption}",
        f"Settings: {settings_line(table) or 'none recorded'}.",
        f"Machine: {'; '.join(sorted(set(table['machine']) - {''})) or 'not recorded'}.",
        f"{f'Rows of the study {study}' if study else 'Cells of the grid'}: {cells or 'none'}.",
    ]
    return "\n".join(lines).replace(r"\$", "$") + "\n"


def nothing(table: pd.DataFrame, why: str) -> Drawing:
    """A figure that says that there is nothing to show, with the same columns in its CSV as the table."""
    figure = Figure(figsize=(7, 1.6))
    figure.text(0.5, 0.65, "Nothing to show", ha="center", va="center", fontsize=13, color="#444444")
    figure.text(0.5, 0.35, why, ha="center", va="center", color="#666666", wrap=True)
    return Drawing(figure, table.iloc[:0], f"Nothing to show: {why}")


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw in the suite's style, whatever the user's own matplotlib settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.style.use(STYLE)
        yield
