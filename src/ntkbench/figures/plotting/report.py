"""The report of a run: a self-contained page of HTML, from the answer to the provenance of its numbers.

In this order: which method to use, the reproduction of the papers, the signature figures with their captions, all cells
of the grid, checks of the tables, provenance, and the other figures. Figures that could not be drawn are marked.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ntkbench import figures as all_figures
from ntkbench.errors import BadInput
from ntkbench.figures.plotting import base, claims, files, labels, quality, styles, tasks
from ntkbench.units import bytes_label, counted, percent_label, seconds_label

TEMPLATE = Path(__file__).with_name("report.html")
PICTURE: dict[str, Any] = {"format": "WEBP", "quality": 86, "method": 4}
"""Format of embedded pictures: a third of the bytes of PNG, so that a report stays below 5 MB."""
FEW_BYTES = 100 * 2**10
"""Peaks of a process are not measured more exactly than this."""


def _peak_label(count: float) -> str:
    return f"below {bytes_label(FEW_BYTES)}" if count < FEW_BYTES else bytes_label(count)


CELL_COLUMNS: dict[str, Callable[[Any], str]] = {
    "problem": str,
    "metric": lambda metric: metric.replace("_", " "),
    "method": str,
    "backend": str,
    "passes": lambda passes: f"{passes:g}",
    "seconds": seconds_label,
    "error": percent_label,
    "memory_bytes": _peak_label,
    "status": labels.status_label,
    "reason": str,
}
"""Columns of the table of all cells, each with the function that formats its values."""
BACKENDS = ("torch", "jax")
"""Backends in the order of the answers."""
PROVENANCE = ("git_sha", "git_dirty", "machine", "device", "dtype", "threads", "versions", "python")


def page(
    pictures: Sequence[Path],
    title: str,
    tables: Iterable[Path] = (),
    figures: str | None = "figures",
    folder: Path | None = None,
) -> str:
    """The page of a run, as HTML.

    Args:
        pictures: PNG files, each with its caption beside it as ``.txt``; that of all claims is ``claims.png``, with
            ``claims.csv``.
        title: heading of the page.
        tables: files of the tables to show, the grid's ``table.csv`` and ``<study>.csv``; no others are read.
        figures: address of the folder of the pictures, relative to the page; ``None`` for no links to it.
        folder: the page's folder; it links to tables below it.

    Raises:
        BadInput: a picture has no caption, or a table cannot be read.
    """
    tables = list(tables)
    addresses = {file: address for file in tables if (address := _below(file, folder))}
    drawn_from = all_figures.of_tables(tables)
    shown = {picture.stem: _figure(picture, figures) for picture in sorted(pictures, key=lambda path: path.stem)}
    for name, figure in shown.items():
        if (file := drawn_from.get(name)) in addresses:
            figure["files"] |= {"table": addresses[file]}
    claimed = [shown.pop(claims.NAME)] if claims.NAME in shown else []
    for figure in claimed:
        judged = {row["figure"] for row in figure["claims"] if row["measured"]}
        found = sorted({drawn_from[name] for name in judged if name in drawn_from})
        figure["judged_by"] = [(_table_name(file), addresses.get(file, "")) for file in found]
        figure["files"] |= _committed(pictures, folder)
    signature = [shown.pop(name) for name in labels.SIGNATURE if name in shown]
    groups: dict[str, list[dict[str, Any]]] = {}
    for group in (labels.OWN, *labels.GROUPS.values()):
        if members := [figure for name, figure in shown.items() if labels.group(name) == group]:
            groups[group] = members
    read = {file: files.read(file) for file in tables}
    table = next((base.checked(found) for file, found in read.items() if file.name == files.GRID), None)
    grid = [] if table is None else [(file, table) for file in tables if file.name == files.GRID][:1]
    studies = [(file, found) for file, found in read.items() if file.name != files.GRID]
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(TEMPLATE.name).render(
        title=title,
        answer=[] if table is None else answer(table),
        tolerances=[name if name == "exact" else f"within {name}" for name in tasks.TOLERANCES],
        rule=tasks.RULE,
        claims=claimed,
        signature=signature,
        groups=groups,
        columns=[name.removesuffix("_bytes").replace("_", " ") for name in CELL_COLUMNS],
        cells=[] if table is None else cells(table),
        checks=[] if table is None else quality.checks(table),
        provenance=[
            provenance(_table_name(file), found) | {"address": addresses.get(file, "")}
            for file, found in [*grid, *studies]
        ],
    )


def _below(file: Path, folder: Path | None) -> str:
    """The address of a file below the page's folder, relative to it; empty for other files."""
    if folder is None:
        return ""
    address = Path(os.path.relpath(file, folder)).as_posix()
    return "" if address.startswith("..") else address


def _table_name(file: Path) -> str:
    """A table's name, after that of its folder of results: ``default: study novak flops``."""
    if file.name == files.GRID:
        return f"{file.resolve().parent.name}: cells of the grid"
    results = file.resolve().parent.parent if file.parent.name == "studies" else file.resolve().parent
    return f"{results.name}: study {file.stem.replace('_', ' ')}"


def _committed(pictures: Sequence[Path], folder: Path | None) -> dict[str, str]:
    """The address of a ``claims.csv`` beside the page that has the same claims."""
    name = f"{claims.NAME}.csv"
    if folder is None or not (folder / name).exists():
        return {}
    drawn = next(picture for picture in pictures if picture.stem == claims.NAME).with_suffix(".csv")
    return {"table": name} if (folder / name).read_bytes() == drawn.read_bytes() else {}


def answer(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The fastest method of each backend that states its error, for each metric, problem and tolerance.

    Args:
        table: what :func:`ntkbench.figures.plotting.base.checked` gives.

    Returns:
        For each metric, its name and rows. A row has the problem, its sizes, and a cell for each tolerance. A cell has
        the ``best`` methods, that in PyTorch first, and ``hole``, why PyTorch has none, empty if it has one. A cell
        also stands for the ``span - 1`` cells after it, whose span is 0.
    """
    table = table[table["kind"] != "approximate"]
    order = [*BACKENDS, *sorted(set(table["backend"]) - {*BACKENDS})]
    solved = [tasks.winners(table[table["backend"] == backend]) for backend in order]
    chosen = pd.concat([rows for rows in solved if len(rows)] or solved[:1])
    found = []
    for metric in base.metrics_in(table):
        rows = []
        own = table[table["metric"] == metric].sort_values(["n", "P", "problem", "setting"])
        for (problem, setting), cells_of in own.groupby(["problem", "setting"], sort=False):
            won = chosen[(chosen["metric"] == metric) & (chosen["problem"] == problem) & (chosen["setting"] == setting)]
            done = cells_of[cells_of["status"] == "ok"]
            first = (done if len(done) else cells_of).iloc[0]
            known = [f"{size} {labels.count_label(first[size])}" for size in "NOP" if first[size] == first[size]]
            rows.append(
                {
                    "problem": problem,
                    "setting": setting,
                    "sizes": ", ".join(known),
                    "cells": _spanned(
                        [_cell(won[won["tolerance"] == name], cells_of, name) for name in tasks.TOLERANCES]
                    ),
                    "methods": _counted(done),
                    "reason": "" if len(done) else _reason(cells_of),
                }
            )
        found.append({"metric": metric.replace("_", " "), "rows": rows})
    return found


def _cell(won: pd.DataFrame, cells_of: pd.DataFrame, tolerance: str) -> dict[str, Any]:
    """The fastest method of each backend within a tolerance, and why there is none at all or none in PyTorch."""
    if not len(won):
        return {"best": [], "hole": _hole(cells_of, tolerance)}
    own = cells_of[cells_of["backend"] == BACKENDS[0]]
    hole = "" if BACKENDS[0] in set(won["backend"]) else f"{styles.TITLES[BACKENDS[0]]}: {_hole(own, tolerance)}"
    return {"best": [_choice(row, cells_of) for _, row in won.iterrows()], "hole": hole}


def _spanned(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells of a row with their spans: neighbours with equal choices share the first, at the loosest tolerance."""
    made: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for cell in found:
        if made and _choices(cell) == _choices(first):
            first["span"] += 1
            made.append(cell | {"span": 0})
        else:
            first = cell | {"span": 1}
            made.append(first)
    return made


def _choices(cell: dict[str, Any]) -> tuple[object, ...]:
    named = ("method", "backend", "passes", "sure")
    return cell["hole"], *(tuple(choice[name] for name in named) for choice in cell["best"])


def _hole(cells_of: pd.DataFrame, tolerance: str) -> str:
    """Why there is no answer; if no exact method was measured, the tolerance may well be within reach."""
    done = cells_of[cells_of["status"] == "ok"]
    if not len(done):
        return "not measured"
    if (done["kind"] == "exact").any():
        return "not reached"
    exact = cells_of[cells_of["kind"] == "exact"]
    without = "no exact method measured" + (f" ({_reason(exact)})" if len(exact) else "")
    return without if tolerance == "exact" else f"not reached by estimates; {without}"


def _counted(done: pd.DataFrame) -> str:
    """How many methods were measured, and whether any is exact."""
    methods = done["method"].nunique()
    if not methods:
        return ""
    none = "" if (done["kind"] == "exact").any() else ", none exact"
    return f"{counted(methods, 'method that states', 'methods that state')} an error{none}"


def _reason(cells_of: pd.DataFrame) -> str:
    """The most frequent reason why cells have no result."""
    return labels.why_not(cells_of, most=1).partition("\n")[0].replace(r"\$", "$")


def _choice(winner: pd.Series, cells_of: pd.DataFrame) -> dict[str, Any]:
    memory, passes = _memory(winner, cells_of), winner["passes"]
    band = [seconds_label(winner[end]) for end in ("seconds_low", "seconds_high") if winner[end] == winner[end]]
    facts = [
        winner["kind"],
        "" if passes != passes else counted(round(passes), "pass", "passes"),
        "" if memory != memory else _peak_label(memory),
        "" if winner["kind"] == "exact" else f"error {percent_label(winner['error'])}",
        f"{' to '.join(band)} (95 %)" if len(band) == 2 and not winner["at_most"] else "",
        f"{winner['seeds']:.0f} seeds" if winner["kind"] == "stochastic" else "",
        "" if winner["lead"] != winner["lead"] else f"next {winner['lead']:.2g} times slower",
    ]
    return {
        "method": winner["method"],
        "backend": winner["backend"],
        "title": winner["title"]
        + (
            "" if winner["backend"] == BACKENDS[0] else f" in {styles.TITLES.get(winner['backend'], winner['backend'])}"
        ),
        "seconds": ("at most " if winner["at_most"] else "") + seconds_label(winner["seconds"]),
        "facts": ", ".join(filter(None, facts)),
        "sure": winner["fastest"] >= tasks.SURE,
        "passes": None if passes != passes else round(passes),
        "call": _call(winner),
    }


def _memory(winner: pd.Series, cells_of: pd.DataFrame) -> float:
    """Peak bytes at the smallest measured budget that is at least the winner's; ``nan`` if they were not measured."""
    own = cells_of[(cells_of["method"] == winner["method"]) & (cells_of["backend"] == winner["backend"])]
    own = base.measured(own, "memory_bytes").sort_values("passes")
    if winner["passes"] == winner["passes"]:
        own = own[own["passes"] >= winner["passes"] * (1 - 1e-9)].iloc[:1]
    return float(own["memory_bytes"].max())


def _call(winner: pd.Series) -> str:
    """The line of Python that uses a method."""
    options = f'method="{winner["method"]}"'
    if winner["kind"] == "stochastic" and winner["passes"] == winner["passes"]:
        options += f", passes={winner['passes']:.0f}"
    return tasks.call(winner["metric"], winner["backend"], options)


def cells(table: pd.DataFrame) -> list[list[dict[str, str]]]:
    """All cells of the grid: the shown text and the sort key of each column."""
    rows = []
    for row in table.to_dict("records"):
        shown = []
        for name, said in CELL_COLUMNS.items():
            value = row.get(name)
            missing = value is None or value != value or value == ""
            shown.append({"text": "" if missing else said(value), "key": "" if missing else str(value)})
        rows.append(shown)
    return rows


def provenance(name: str, table: pd.DataFrame) -> dict[str, Any]:
    """The provenance of a table: for each column its values, and how its rows ended."""
    values = {column: _distinct(table[column]) for column in PROVENANCE if column in table}
    ended = table["status"].value_counts() if "status" in table else pd.Series(dtype=int)
    return {
        "table": name,
        "rows": ", ".join(f"{count} {labels.status_label(str(status))}" for status, count in ended.items()),
        "code": [sha[:10] for sha in values.get("git_sha", [])],
        "dirty": bool({value.lower() for value in values.get("git_dirty", [])} & {"true", "1", "1.0", "yes"}),
        "machine": values.get("machine", []),
        "settings": [
            ", ".join(values.get(column, [])) + (" threads" if column == "threads" else "")
            for column in ("device", "dtype", "threads")
            if values.get(column)
        ],
        "versions": values.get("versions", []) + [f"Python {python}" for python in values.get("python", [])],
    }


def _distinct(column: pd.Series) -> list[str]:
    """The values of a column as words, each once; whole numbers without decimals."""
    return sorted({f"{value:g}" if isinstance(value, float) else str(value) for value in column.dropna()} - {""})


def _figure(picture: Path, figures: str | None) -> dict[str, Any]:
    caption = picture.with_suffix(".txt")
    if not caption.exists():
        raise BadInput(f"{picture} has no caption: {caption.name} is missing")
    first, *lines = caption.read_text(encoding="utf-8").splitlines()
    name, _, text = first.partition(". ")
    failed = text.startswith(labels.NOT_DRAWN)
    titles = [line.removeprefix(labels.TITLE) for line in lines if line.startswith(labels.TITLE)]
    said = [line for line in lines if line.startswith(labels.CLAIM)]
    with Image.open(picture) as image:
        width, height = image.size  # so that link targets do not move while pictures load
        embedded = io.BytesIO()
        image.convert("RGB").save(embedded, **PICTURE)
    stem, ends = picture.stem, {} if figures is None else {"CSV": "csv", "PDF": "pdf", "PNG": "png"}
    name = name or labels.name_label(stem)
    return {
        "id": stem,
        "name": name,
        "title": name if failed or not titles or titles[0] == text[: len(titles[0])] else titles[0],
        "text": text,
        "claimed": said,
        "settings": "\n".join(line for line in lines if line not in said and not line.startswith(labels.TITLE)),
        "failed": failed,
        "width": width,
        "height": height,
        "claims": claims.readable(pd.read_csv(picture.with_suffix(".csv"))) if stem == claims.NAME else [],
        "files": {form: f"{figures}/{stem}.{end}" for form, end in ends.items()},
        "data": base64.b64encode(embedded.getvalue()).decode(),
    }
