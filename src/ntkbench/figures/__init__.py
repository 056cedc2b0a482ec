"""Figures: the tidy table in; PDF, PNG, the plotted numbers as CSV and a caption out.

One file a figure: a file dropped in here is drawn under its own name. It holds one function, ``draw(table) ->
Drawing``, which gets a table with at least one row: the results table as
:func:`ntkbench.figures.plotting.base.checked` has it, or, where the file says ``TABLE = "<study>"`` and names the
``COLUMNS`` that it reads, that study's table as :func:`ntkbench.figures.plotting.base.checked_study` does.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pandas as pd

from ntkbench import registry
from ntkbench.errors import unknown
from ntkbench.figures.plotting import base
from ntkbench.paths import write_atomically
from ntkbench.registry import PACKAGES, Fault, Source

__all__ = ["ROOM", "draw", "names", "study_of"]


def names() -> list[str]:
    """Every figure whose source shows no fault, sorted; none of them is imported."""
    return ROOM.found()


def study_of(name: str) -> str | None:
    """The study that a figure is drawn from; ``None`` where that is the results table. The figure is not imported.

    Raises:
        BadInput: no such figure, or it is broken.
    """
    return Source.read(ROOM.file(name)).literal("TABLE")


def draw(name: str, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw one figure into ``folder``: ``name.csv`` (what is plotted), ``.txt`` (caption), ``.png`` and ``.pdf``.

    The same table gives the same bytes.

    Raises:
        BadInput: no such figure, it is broken, or the table lacks columns.
    """
    module = ROOM.get(name)
    table = base.checked(table) if study_of(name) is None else base.checked_study(table, module.COLUMNS)
    with base.style():
        drawing = module.draw(table) if len(table) else base.nothing(table, "The table has no rows.")
        made = {
            "csv": drawing.plotted.to_csv(index=False, lineterminator="\n"),
            "txt": base.caption(name, drawing, table, study_of(name)),
            "png": _rendered(drawing, "png", {"Software": None}),
            "pdf": _rendered(drawing, "pdf", {"CreationDate": None}),
        }
    paths = [Path(folder) / f"{name}.{kind}" for kind in made]
    for path, data in zip(paths, made.values(), strict=True):
        write_atomically(path, data)
    return paths


def _rendered(drawing: base.Drawing, kind: str, metadata: dict[str, None]) -> bytes:
    buffer = io.BytesIO()
    drawing.figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def _find(source: Source) -> Mapping[str, int]:
    """The figure, if its source shows no fault."""
    if not source.binds("draw"):
        raise Fault("defines no draw(table)")
    table = source.literal("TABLE")
    if table is not None:
        studies = [file.stem for file in registry.files(PACKAGES["study"])]
        if table not in studies:
            raise Fault(f"TABLE: {unknown('study', table, studies)}", source.line("TABLE"))
        if not source.binds("COLUMNS"):
            raise Fault("is drawn from a study, and must name the COLUMNS that it reads", source.line("TABLE"))
    return registry.one_a_file(source)


def _checked(source: Source, module: ModuleType, name: str) -> ModuleType:
    if not callable(module.draw):
        raise Fault("draw must be a function of a table", source.line("draw"))
    try:
        inspect.signature(module.draw).bind(None)
    except TypeError as error:
        raise Fault(f"draw must take a table alone: {error}", source.line("draw")) from None
    columns = module.COLUMNS if study_of(name) else ()
    if not isinstance(columns, tuple | list) or not all(isinstance(column, str) for column in columns):
        raise Fault(f"COLUMNS must be a tuple of names; got {columns!r}", source.line("COLUMNS"))
    return module


ROOM: registry.Room[ModuleType] = registry.Room("figure", _checked, _find)
