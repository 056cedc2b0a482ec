"""Figures: the tidy table in; PDF, PNG, the plotted numbers as CSV and a caption out.

One file a figure: a file dropped in here is drawn under its own name. It holds one function, ``draw(table) ->
Drawing``, which gets a table with at least one row: the results table as
:func:`ntkbench.figures.plotting.base.checked` has it, or, where the file says ``TABLE = "<study>"`` and names the
``COLUMNS`` that it reads, that study's table as :func:`ntkbench.figures.plotting.base.checked_study` does.
"""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd

from ntkbench import registry
from ntkbench.figures.plotting import base
from ntkbench.paths import write_atomically

__all__ = ["draw", "names", "study_of"]


def names() -> list[str]:
    """Every figure there is, sorted; none of them is imported."""
    return registry.names(__name__)


def study_of(name: str) -> str | None:
    """The study that a figure is drawn from; ``None`` where that is the results table.

    Raises:
        BadInput: no such figure.
    """
    return getattr(registry.load(__name__, name, "figure"), "TABLE", None)


def draw(name: str, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw one figure into ``folder``: ``name.csv`` (what is plotted), ``.txt`` (caption), ``.png`` and ``.pdf``.

    The same table gives the same bytes.

    Raises:
        BadInput: no such figure, or the table lacks columns.
    """
    module = registry.load(__name__, name, "figure")
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
