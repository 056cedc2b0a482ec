"""Code shared by all figures: their table, the drawing that they return, style and caption."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ntkbench.errors import BadInput
from ntkbench.figures.plotting import labels
from ntkbench.figures.plotting.claims import Claim
from ntkbench.measure.provenance import several_machines
from ntkbench.metrics import METRICS, OF_KERNEL

STYLE = Path(__file__).with_name("ntkbench.mplstyle")
KINDS = ("exact", "approximate", "stochastic")
SETTINGS = ("machine", "device", "dtype", "threads")
"""Columns that must be equal for two rows to be compared; rows that differ in one of them never share a panel."""

WORDS: tuple[str, ...] = ("problem", "family", "method", "title", "kind", "backend", "metric", "status", "reason")
WORDS += ("device", "dtype", "machine", "git_sha", "git_dirty")
NUMBERS: tuple[str, ...] = (
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
"""Columns of the tidy table that figures read; the table has more."""

PROVENANCE = ("status", "reason", "git_sha", "git_dirty", "machine", "device", "dtype", "threads")
"""Columns that every study's table has."""


@dataclass(frozen=True)
class Drawing:
    """What a figure file returns.

    Attributes:
        figure: the drawing itself.
        plotted: the numbers in the figure, and nothing else; goes into the CSV.
        caption: what the figure shows and by which rules, in 60 words or fewer.
        claims: claims of papers that the figure tests.
    """

    figure: Figure
    plotted: pd.DataFrame
    caption: str
    claims: tuple[Claim, ...] = ()

    @property
    def title(self) -> str:
        """The figure's title, its first text, on one line; empty if it has none."""
        return " ".join(self.figure.texts[0].get_text().replace(r"\$", "$").split()) if self.figure.texts else ""


def checked(table: pd.DataFrame) -> pd.DataFrame:
    """A copy of the results table ready for drawing, with a column ``setting`` that distinguishes rows.

    Numbers are finite or missing, words are single lines and never missing. ``setting`` is empty if the whole table
    comes from one machine, device, precision and number of threads. Further columns are kept.

    Raises:
        BadInput: columns are missing, or hold something other than numbers.
    """
    table = _complete(table, COLUMNS)
    for column in NUMBERS:
        try:
            table[column] = pd.to_numeric(table[column]).astype(float)
        except (ValueError, TypeError) as error:
            raise BadInput(f"column {column!r} of the table must hold numbers: {error}") from None
    table = _cleaned(table)
    parts = [
        table[column].map(lambda value: f"{value:g} threads") if column == "threads" else table[column]
        for column in SETTINGS
        if table[column].nunique(dropna=False) > 1
    ]
    table["setting"] = pd.concat(parts, axis=1).agg(", ".join, axis=1) if parts else ""
    return table


def checked_study(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """A copy of a study's table ready for drawing: numbers are finite or missing, words are single lines.

    Raises:
        BadInput: columns are missing.
    """
    return _cleaned(_complete(table, (*columns, *PROVENANCE)))


def _complete(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """A copy of the table, if it has all columns."""
    if missing := [column for column in columns if column not in table.columns]:
        raise BadInput(f"the table lacks columns that this figure needs: {', '.join(missing)}")
    return table.reset_index(drop=True).copy()


def _cleaned(table: pd.DataFrame) -> pd.DataFrame:
    """The table with infinite numbers as missing ones, and with words by :func:`labels.line`, empty if missing."""
    for column in table.columns:
        if column in WORDS or not pd.api.types.is_numeric_dtype(table[column]):
            words = table[column].astype(object).where(table[column].notna(), "").astype(str)
            table[column] = words.map({word: labels.line(word) for word in words.unique()}).astype(object)
        else:
            table[column] = table[column].replace([np.inf, -np.inf], np.nan)
    return table


def measured(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows that are ok and have all of these numbers."""
    return table[(table["status"] == "ok") & table[list(columns)].notna().all(axis=1)]


def metrics_in(table: pd.DataFrame) -> list[str]:
    """The table's metrics in their usual order, unknown ones last."""
    there = set(table["metric"])
    known = (*METRICS, *OF_KERNEL)
    return [m for m in known if m in there] + sorted(there - set(known))


def settings_line(table: pd.DataFrame) -> str:
    """Device, precision, threads, seeds and code on one line, for the subtitle of a figure.

    The line warns of rows from several kinds of machines.
    """
    threads = " / ".join(f"{t:g}" for t in sorted(table["threads"].dropna().unique()))
    seeds = table.loc[table["seeds"] > 1, "seeds"] if "seeds" in table else table["threads"].iloc[:0]
    parts = [
        *(" / ".join(sorted(set(table[column]) - {""})) for column in ("device", "dtype")),
        threads and f"{threads} thread" + "s" * (threads != "1"),
        f"{labels.range_label(seeds)} seeds" if len(seeds) else "",
        "several kinds of machines: seconds do not compare" if several_machines(table) else "",
        _code(table),
    ]
    return labels.plain("  ·  ".join(part for part in parts if part))


def _code(table: pd.DataFrame) -> str:
    """Short git shas, each marked if the working tree had uncommitted changes."""
    pairs = {
        (sha[:10], dirty.strip().lower() in {"true", "1", "1.0", "yes"})
        for sha, dirty in zip(table["git_sha"], table["git_dirty"], strict=True)
        if sha
    }
    shas = ", ".join(f"{sha} (dirty)" if dirty else sha for sha, dirty in sorted(pairs))
    return f"git {shas}" if shas else ""


def caption(name: str, drawing: Drawing, table: pd.DataFrame, study: str | None = None) -> str:
    """The text beside a figure: its caption, its title, a line for each claim, and the settings of its table.

    The table is the results table, or that of a study.
    """
    table = _cleaned(table.reindex(columns=[*dict.fromkeys([*table.columns, *PROVENANCE])]))
    cells = table.groupby("status").size()
    cells = ", ".join(f"{cells[s]} {labels.status_label(s)}" for s in sorted(cells.index, key=lambda s: (s != "ok", s)))
    lines = [
        f"{labels.name_label(name)}. {drawing.caption}",
        *([labels.TITLE + drawing.title] if drawing.title else []),
        *(claim.sentence() for claim in drawing.claims),
        f"Settings: {settings_line(table) or 'none recorded'}.",
        f"Machine: {'; '.join(sorted(set(table['machine']) - {''})) or 'not recorded'}.",
        *filter(None, [several_machines(table)]),
        f"{f'Rows of the study {study}' if study else 'Cells of the grid'}: {cells or 'none'}.",
    ]
    return "\n".join(lines).replace(r"\$", "$") + "\n"


def nothing_measured(table: pd.DataFrame) -> str:
    """Why there is nothing to draw, if no row of a table is ok; else an empty string.

    Raises:
        BadInput: the rows have no status and reason.
    """
    if not len(table):
        return "The table has no rows."
    table = _cleaned(_complete(table, ("status", "reason")))
    return "" if (table["status"] == "ok").any() else labels.why_not(table)


def nothing(table: pd.DataFrame, why: str) -> Drawing:
    """A figure with the message that there is nothing to show, and the columns of the table in its CSV.

    Args:
        table: gives the columns.
        why: the reason, as :func:`labels.why_not` returns it.
    """
    return Drawing(words("Nothing to show", why), table.iloc[:0], f"Nothing to show: {why}")


def words(heading: str, text: str) -> Figure:
    """A picture of a heading and a text of any length."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 100) or [""]]
    height = 1.2 + 0.17 * len(lines)
    figure = Figure(figsize=(7.5, height))
    figure.text(0.5, 1 - 0.5 / height, heading, ha="center", va="center", fontsize=13, color="#444444")
    figure.text(0.5, 1 - 0.8 / height, "\n".join(lines), ha="center", va="top", color="#666666")
    return figure


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw in the suite's style, independent of the user's matplotlib settings."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.style.use(STYLE)
        yield
