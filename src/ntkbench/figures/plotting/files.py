"""From the file of a table to the files of a figure."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd

from ntkbench.errors import BadInput
from ntkbench.figures.plotting import base, claims, labels, sources, verdicts
from ntkbench.measure.outcomes import KEY, OK, STATUSES, Outcome
from ntkbench.paths import write_atomically

METADATA = {"png": {"Software": None}, "pdf": {"CreationDate": None}}
"""Metadata that differ between runs or versions are left out."""
GRID = "table.csv"
"""The name of a table of the grid, whose rows are cells; all others are those of studies."""
MEASURES = ["first_call_seconds", *(f"{name}{end}" for name in ("seconds", "error") for end in ("", "_q25", "_q75"))]
"""Columns that are never negative or infinite in rows that are ok."""


def read(table: Path) -> pd.DataFrame:
    """A table from its CSV file.

    Raises:
        BadInput: there is no such file, or it is not a table; or it has a row twice, or values that no measurement has.
    """
    try:
        found = pd.read_csv(table, low_memory=False, encoding="utf-8")
    except pd.errors.EmptyDataError:
        raise BadInput(f"{table} is empty, without even a header") from None
    except (OSError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise BadInput(f"{table} cannot be read as a table: {error}") from None
    for row, column, said in faults(found, is_grid=table.name == GRID and {*KEY} <= {*found}):
        raise BadInput(f"{table}: row {row + 1}: {column}: {said}")
    return found


def faults(table: pd.DataFrame, *, is_grid: bool) -> Iterator[tuple[int, str, str]]:
    """Rows, from 0 on, and columns with what no measurement gives, worded for a message."""
    key = [name for name in (*KEY, *base.SETTINGS) if name in table] if is_grid else list(table)
    same = table.groupby(key, dropna=False, sort=False).ngroup()
    for row in np.flatnonzero(same.duplicated()):
        first, what = int(np.argmax(same == same.iloc[row])), "cell" if is_grid else "row"
        yield int(row), ", ".join(key[:5]), f"the same as in row {first + 1}; allowed: each {what} once"
    if "status" not in table:
        return
    for row in np.flatnonzero(~table["status"].isin(STATUSES)):
        yield int(row), "status", f"{str(table['status'].iloc[row])!r}; allowed: {', '.join(STATUSES)}"
    for column in MEASURES:
        if column in table:
            numbers = pd.to_numeric(table[column], errors="coerce")
            for row in np.flatnonzero((table["status"] == OK) & ((numbers < 0) | np.isinf(numbers))):
                yield int(row), column, f"{numbers.iloc[row]:g}; allowed: finite numbers that are not negative"


def write(name: str, figure: ModuleType, table: pd.DataFrame, folder: Path) -> tuple[list[Path], list[dict[str, Any]]]:
    """Draw a figure from its table and write ``name.csv``, ``.txt``, ``.png`` and ``.pdf``.

    If no row is ok, the picture shows the reasons instead of a drawing.

    Returns:
        the paths of the files, and a row of ``claims.csv`` for each claim.

    Raises:
        BadInput: the table lacks columns.
    """
    with base.style():
        drawing, read = _drawn(figure, table)
        caption = base.caption(name, drawing, read, getattr(figure, "TABLE", None))
        return _write(name, drawing, caption, folder), _claimed(name, drawing, read)


def claimed(name: str, figure: ModuleType, table: pd.DataFrame) -> list[dict[str, Any]]:
    """A row of ``claims.csv`` for each claim of a figure; nothing is written.

    Raises:
        BadInput: the table lacks columns.
    """
    with base.style():
        return _claimed(name, *_drawn(figure, table))


def write_claims(
    rows: Sequence[Mapping[str, Any]] | pd.DataFrame, folder: Path, forms: Sequence[str] = ("txt", *METADATA)
) -> None:
    """Write ``claims.csv`` with the claims of a set of figures, its caption and pictures.

    Args:
        rows: rows of the claims; if there are none, nothing is written, and older files are removed.
        folder: folder of the figures.
        forms: endings of the files beside the table.
    """
    table = claims.table(rows)
    if not len(table):
        for form in ("csv", *forms):
            (folder / f"{claims.NAME}.{form}").unlink(missing_ok=True)
        return
    write_atomically(folder / f"{claims.NAME}.csv", claims.to_csv(table))
    table = read(folder / f"{claims.NAME}.csv")  # so that the figure shows the written numbers
    with base.style():
        drawing = verdicts.draw(table)
        said = f"{labels.name_label(claims.NAME)}. {drawing.caption}", labels.TITLE + drawing.title
        caption = "\n".join([*said, verdicts.settings(table)]) + "\n"
        for form in forms:
            data = caption if form == "txt" else _rendered(drawing, form)
            write_atomically(folder / f"{claims.NAME}.{form}", data)


def _drawn(figure: ModuleType, table: pd.DataFrame) -> tuple[base.Drawing, pd.DataFrame]:
    """The drawing of a table, and the checked table."""
    study = getattr(figure, "TABLE", None)
    if why := base.nothing_measured(table):
        return base.nothing(table, why), table
    table = base.checked(table) if study is None else base.checked_study(table, figure.COLUMNS)
    return figure.draw(table), table


def _claimed(name: str, drawing: base.Drawing, table: pd.DataFrame) -> list[dict[str, Any]]:
    return claims.rows(name, [*drawing.claims, *sources.not_addressed(name)], table)


def write_failed(name: str, outcome: Outcome, folder: Path) -> list[Path]:
    """Write the files of a figure that could not be drawn; they say why."""
    plotted = pd.DataFrame([{"figure": name, **outcome.columns()}])
    with base.style():
        picture = base.words(labels.NOT_DRAWN, labels.plain(outcome.reason))
        caption = f"{labels.name_label(name)}. {labels.NOT_DRAWN}: {outcome.reason}\n"
        return _write(name, base.Drawing(picture, plotted, caption), caption, folder)


def _write(name: str, drawing: base.Drawing, caption: str, folder: Path) -> list[Path]:
    made: dict[str, str | bytes] = {
        "csv": drawing.plotted.to_csv(index=False, lineterminator="\n"),
        "txt": caption,
        **{kind: _rendered(drawing, kind) for kind in METADATA},
    }
    paths = [folder / f"{name}.{kind}" for kind in made]
    for path, data in zip(paths, made.values(), strict=True):
        write_atomically(path, data)
    return paths


def _rendered(drawing: base.Drawing, kind: str) -> bytes:
    buffer = io.BytesIO()
    drawing.figure.savefig(buffer, format=kind, metadata=METADATA[kind])
    return buffer.getvalue()
