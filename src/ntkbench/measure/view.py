"""The rows of a results table as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ntkbench.errors import BadInput, summary, unknown
from ntkbench.units import counted

FIRST = (
    "problem",
    "network",
    "spectrum",
    "N",
    "step",
    "subject",
    "rival",
    "method",
    "backend",
    "metric",
    "way",
    "passes",
    "status",
    "seconds",
    "ratio",
    "value",
    "error",
    "covered",
    "memory_bytes",
    "reason",
)
"""Columns shown by default, if the table has them and they are not empty."""


def rows_of(
    file: Path, where: str | None = None, columns: Sequence[str] | None = None, sort: str | None = None, most: int = 40
) -> str:
    """Rows of a table, one per line, and their number.

    Args:
        file: CSV.
        where: a condition as :meth:`pandas.DataFrame.eval` takes it; all rows if not given.
        columns: columns to show, :data:`FIRST` if not given.
        sort: the column to sort by.
        most: maximum number of rows to show.

    Raises:
        BadInput: the file is not a table, there is no such column, or the condition is invalid.
    """
    try:
        table = pd.read_csv(file, low_memory=False)
    except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
        raise BadInput(f"{file} is not a table: {summary(error)}") from None
    for name in (*(columns or ()), *([sort] if sort else ())):
        if name not in table:
            raise unknown("column", name, list(table))
    total = len(table)
    if where is not None:
        try:
            mask = table.eval(where, engine="python")
        except Exception as error:  # pandas may raise anything for a typed condition
            raise BadInput(f"--where {where!r} cannot be used: {summary(error)}") from None
        if not isinstance(mask, pd.Series) or mask.dtype != bool or not mask.index.equals(table.index):
            raise BadInput(f"--where {where!r} must be true or false for each row")
        table = table[mask]
    if sort is not None:
        table = table.sort_values(sort, kind="stable")
    shown = list(columns) if columns else [name for name in FIRST if name in table and table[name].notna().any()]
    said = f"{len(table)} of {counted(total, 'row')}" + (f", the first {most}" if len(table) > most else "")
    if not len(table):
        return said
    lines = (
        table[shown or list(table)]
        .head(most)
        .to_string(index=False, na_rep="", float_format=lambda number: f"{number:.4g}")
    )
    return f"{lines}\n{said}"
