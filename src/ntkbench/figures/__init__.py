"""Figures: from a table to PDF, PNG, the plotted numbers as CSV and a caption; and verdicts on the papers' claims.

Each file defines one figure, named after the file, by a function ``draw(table) -> Drawing``. The table has at least one
row that is ok. It is the results table, as :func:`ntkbench.figures.plotting.base.checked` returns it, or the table of a
study, as :func:`ntkbench.figures.plotting.base.checked_study` returns it. In the second case the file sets
``TABLE = "<study>"`` and lists the ``COLUMNS`` that it reads.

Neither :func:`names` nor :func:`study_of` imports a figure, and matplotlib is imported when the first one is drawn.
"""

from __future__ import annotations

import concurrent.futures
import functools
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ntkbench import ambient, paths, registry
from ntkbench.errors import unknown
from ntkbench.measure import outcomes
from ntkbench.registry import PACKAGES, Fault, Source

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CLAIMED_FROM", "REGISTRY", "claims", "draw", "draw_all", "names", "study_of"]

CLAIMED_FROM = ("head_to_head", "paper_cpu", "default")
"""Profiles by whose committed tables the papers' claims are judged: for each study, the first that has it."""

Drawn = tuple[outcomes.Outcome, list[dict[str, Any]]]
"""How a figure ended, and a row for each of its claims."""


def names() -> list[str]:
    """The names of all figures without a fault in their source, sorted; no figure is imported."""
    return REGISTRY.found()


def study_of(name: str) -> str | None:
    """The study that a figure is drawn from; ``None`` if that is the results table. The figure is not imported.

    Raises:
        BadInput: no such figure, or it is broken.
    """
    return Source.read(REGISTRY.file(name)).literal("TABLE")


def draw(name: str, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw one figure into ``folder``: ``name.csv`` (what is plotted), ``.txt`` (caption), ``.png`` and ``.pdf``.

    The same table gives the same bytes.

    Returns:
        the paths of the four files, in this order.

    Raises:
        BadInput: no such figure, it is broken, or the table lacks columns.
    """
    from ntkbench.figures.plotting import files

    return files.write(name, REGISTRY.get(name), table, Path(folder))[0]


def table_of(name: str, folder: Path) -> Path:
    """The file of the table that a figure is drawn from, in a run's results ``folder``."""
    study = study_of(name)
    return folder / "studies" / f"{study}.csv" if study else folder / "table.csv"


def of_tables(tables: Iterable[Path]) -> dict[str, Path]:
    """The figures that are drawn from these tables, each with the file of its table; no figure is imported."""
    found = {file.name: file for file in tables}
    return {name: found[file] for name in names() if (file := table_of(name, Path()).name) in found}


def claims(folders: Iterable[Path] | None = None) -> pd.DataFrame:
    """Verdicts on the papers' claims: ``claims.csv``, see :data:`ntkbench.figures.plotting.claims.COLUMNS`.

    Args:
        folders: folders of results; a table is taken from the first one that has it. By default those of the committed
            tables, :data:`CLAIMED_FROM`.

    Raises:
        BadInput: a table lacks columns.
        Unavailable: ntkbench is not in a checkout.
    """
    from ntkbench.figures.plotting import claims as claimed
    from ntkbench.figures.plotting import files

    paths.checkout("judging the papers' claims")
    folders = [paths.REFERENCE / profile for profile in CLAIMED_FROM] if folders is None else list(folders)
    rows: list[dict[str, Any]] = []
    for name in names():
        if table := next((path for path in (table_of(name, folder) for folder in folders) if path.exists()), None):
            rows += files.claimed(name, REGISTRY.get(name), files.read(table))
    return claimed.table(rows)


def draw_all(tables: Mapping[str, Path], folder: Path) -> dict[str, outcomes.Outcome]:
    """Draw figures into ``folder``, each from the CSV file that ``tables`` has for it, on all processors.

    If a figure cannot be drawn, its files say so, and the others are drawn. If figures have claims, ``claims.csv`` has
    all of them, and ``claims.png``, ``.pdf`` and ``.txt`` show them.

    Returns:
        an outcome for each figure: ``ok``, or a status and a reason in one line.
    """
    from ntkbench.figures.plotting import files  # imported before processes are forked

    count = ambient.cores()
    shares = [dict(list(tables.items())[start::count]) for start in range(min(count, len(tables)))]
    apart = functools.partial(_draw_apart, folder=Path(folder))
    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        made = {name: drawn for part in threads.map(apart, shares) for name, drawn in part.items()}
    files.write_claims([row for name in sorted(tables) for row in made[name][1]], Path(folder))
    return {name: made[name][0] for name in tables}


def _draw_apart(tables: Mapping[str, Path], folder: Path) -> dict[str, Drawn]:
    """Draw figures in a separate process; if it dies, draw each in its own process."""
    from ntkbench.figures.plotting import files

    with concurrent.futures.ProcessPoolExecutor(1, ambient.processes()) as pool:
        try:
            return pool.submit(_draw_some, tables, folder).result()
        except concurrent.futures.process.BrokenProcessPool:
            if len(tables) > 1:
                return {n: found for one in tables.items() for n, found in _draw_apart(dict([one]), folder).items()}
    outcome = outcomes.Outcome(outcomes.FAILED, "the process that draws it died")
    for name in tables:
        files.write_failed(name, outcome, folder)
    return dict.fromkeys(tables, (outcome, []))


def _draw_some(tables: Mapping[str, Path], folder: Path) -> dict[str, Drawn]:
    """Draw figures one after another; a table is read once."""
    from ntkbench.figures.plotting import files

    read = functools.cache(files.read)
    made: dict[str, Drawn] = {}
    for name, table in tables.items():
        try:
            _, claimed = files.write(name, REGISTRY.get(name), read(Path(table)), folder)
            made[name] = outcomes.Outcome(outcomes.OK), claimed
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a figure is a plug-in: it may even exit
            made[name] = outcomes.of_exception(error), []
            files.write_failed(name, made[name][0], folder)
    return made


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
            raise Fault("is drawn from a study and must name the COLUMNS that it reads", source.line("TABLE"))
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


REGISTRY: registry.Registry[ModuleType] = registry.Registry("figure", _checked, _find)
