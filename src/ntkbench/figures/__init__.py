"""Figures: a table in; PDF, PNG, the plotted numbers as CSV and a caption out.

One file is one figure, drawn under the file's name. It has one function, ``draw(table) -> Drawing``. The table has at
least one row that is ok. It is the results table, as :func:`ntkbench.figures.plotting.base.checked` returns it, or the
table of a study, as :func:`ntkbench.figures.plotting.base.checked_study` returns it. In the second case the file says
``TABLE = "<study>"`` and lists the ``COLUMNS`` that it reads.

Neither :func:`names` nor :func:`study_of` imports a figure, and matplotlib is imported when the first one is drawn.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ntkbench import registry
from ntkbench.errors import BadInput, unknown
from ntkbench.measure import outcomes

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["draw", "draw_all", "names", "study_of"]


def names() -> list[str]:
    """The names of all figures, sorted."""
    return registry.names(__name__)


def study_of(name: str) -> str | None:
    """The study whose table a figure is drawn from, or ``None`` for the results table.

    Raises:
        BadInput: no such figure, or its file is not Python.
    """
    if name not in names():
        raise unknown("figure", name, names())
    file = Path(importlib.util.find_spec(f"{__name__}.{name}").origin)
    try:
        for node in ast.parse(file.read_bytes()).body:
            if isinstance(node, ast.Assign) and "TABLE" in [getattr(target, "id", "") for target in node.targets]:
                return ast.literal_eval(node.value)
    except (SyntaxError, ValueError) as error:
        raise BadInput(f"figure {name!r} cannot be read, {file}, line {getattr(error, 'lineno', 1)}: {error}") from None
    return None


def draw(name: str, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw one figure into ``folder``: ``name.csv`` (what is plotted), ``.txt`` (caption), ``.png`` and ``.pdf``.

    The same table gives the same bytes.

    Returns:
        the paths of the four files, in this order.

    Raises:
        BadInput: no such figure, or the table lacks columns.
    """
    from ntkbench.figures.plotting import files

    return files.write(name, registry.load(__name__, name, "figure"), table, Path(folder))


def draw_all(tables: Mapping[str, Path], folder: Path) -> dict[str, outcomes.Outcome]:
    """Draw figures into ``folder``, each from the CSV file that ``tables`` has for it; a table is read once.

    A figure that cannot be drawn, for whatever reason, gets files that say so, and the others are drawn.

    Returns:
        an outcome for each figure: ``ok``, or a status and a reason in one line.
    """
    from ntkbench.figures.plotting import files

    read = functools.cache(files.read)
    made = {}
    for name, table in tables.items():
        try:
            draw(name, read(Path(table)), folder)
            made[name] = outcomes.Outcome(outcomes.OK)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a figure is a plug-in: it may even exit
            made[name] = outcomes.of_exception(error)
            files.write_failed(name, made[name], Path(folder))
    return made
