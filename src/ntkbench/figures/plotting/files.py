"""From a table's file to a figure's files."""

from __future__ import annotations

import io
from pathlib import Path
from types import ModuleType

import pandas as pd

from ntkbench.errors import BadInput
from ntkbench.figures.plotting import base, labels
from ntkbench.measure.outcomes import Outcome
from ntkbench.paths import write_atomically

METADATA = {"png": {"Software": None}, "pdf": {"CreationDate": None}}
"""Metadata that differ between runs or versions, left out."""


def read(table: Path) -> pd.DataFrame:
    """A table from its CSV file.

    Raises:
        BadInput: there is no such file, or it is no table.
    """
    try:
        return pd.read_csv(table, low_memory=False, encoding="utf-8")
    except pd.errors.EmptyDataError:
        raise BadInput(f"{table} is empty, without even a header") from None
    except (OSError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise BadInput(f"{table} cannot be read as a table: {error}") from None


def write(name: str, figure: ModuleType, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw a figure from its table and write ``name.csv``, ``.txt``, ``.png`` and ``.pdf``.

    Where no row is ok, no figure is asked to draw: the picture has the reasons.

    Raises:
        BadInput: the table lacks columns.
    """
    study = getattr(figure, "TABLE", None)
    with base.style():
        if why := base.nothing_measured(table):
            drawing = base.nothing(table, why)
        else:
            table = base.checked(table) if study is None else base.checked_study(table, figure.COLUMNS)
            drawing = figure.draw(table)
        return _write(name, drawing, base.caption(name, drawing, table, study), folder)


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
