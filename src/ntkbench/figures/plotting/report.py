"""The report of a run: one self-contained page of HTML, from the answer to the provenance of its numbers.

In this order: which method to use, the reproduction of the papers, the figures with their captions, all cells of the
grid, checks of the tables, and provenance. Figures that failed are marked.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ntkbench.errors import BadInput
from ntkbench.figures.plotting import base, claims, files, labels, quality, tasks
from ntkbench.units import bytes_label, counted, percent_label, seconds_label

TEMPLATE = Path(__file__).with_name("report.html")
PICTURE: dict[str, Any] = {"format": "WEBP", "quality": 86, "method": 4}
"""Format of embedded pictures: a third of the bytes of PNG, so that a report stays below 5 MB."""
CELL_COLUMNS: dict[str, Callable[[Any], str]] = {
    "problem": str,
    "metric": lambda metric: metric.replace("_", " "),
    "method": str,
    "backend": str,
    "passes": lambda passes: f"{passes:g}",
    "seconds": seconds_label,
    "error": percent_label,
    "memory_bytes": bytes_label,
    "status": labels.status_label,
    "reason": str,
}
"""Columns of the table of all cells, each with the function that formats its values."""
PROVENANCE = ("git_sha", "git_dirty", "machine", "device", "dtype", "threads", "versions", "python")
CALLS = {
    "torch": {
        "alignment": "ntkbench.alignment(model, other, x, {})",
        "spectrum": "ntkbench.spectrum(model, x)",
        "regression_error": "ntkbench.Kernel(model, x).regress(held_out, y, ridge=ridge)",
        "": "ntkbench.{}(model, x, {})",
    },
    "jax": {
        "alignment": "ntkbench.alignment(f, other_params, x, params=params, {})",
        "spectrum": "ntkbench.spectrum(f, x, params=params)",
        "regression_error": "ntkbench.Kernel(f, x, params=params).regress(held_out, y, ridge=ridge)",
        "": "ntkbench.{}(f, x, params=params, {})",
    },
}
"""A call of the API by backend, and by metric where it has arguments of its own."""
OF_SPECTRUM = {
    "largest_eigenvalue": "largest",
    "condition_number": "condition_number",
    "entropy_effective_rank": "entropy_effective_rank",
}
"""Attributes of a spectrum by metric."""


def page(pictures: Sequence[Path], title: str, tables: Iterable[Path] = (), figures: str | None = "figures") -> str:
    """The page.

    Args:
        pictures: PNG files, each with its caption beside it as ``.txt``; that of all claims is ``claims.png``, with
            ``claims.csv``.
        title: heading of the page.
        tables: files of the tables to show, the grid's ``table.csv`` and ``<study>.csv``; no others are read.
        figures: address of the folder of the pictures, relative to the page; ``None`` for no links to it.

    Raises:
        BadInput: a picture has no caption, or a table cannot be read.
    """
    groups: dict[str, list[dict[str, Any]]] = {labels.OWN: [], **{name: [] for name in labels.GROUPS.values()}}
    for picture in sorted(pictures, key=lambda path: path.stem):
        groups[labels.group(picture.stem)].append(_figure(picture, figures))
    claimed = groups.pop(labels.GROUPS[claims.NAME])
    read = {file: files.read(file) for file in tables}
    table = next((base.checked(found) for file, found in read.items() if file.name == "table.csv"), None)
    studies = {
        f"study {file.stem.replace('_', ' ')}": found for file, found in read.items() if file.name != "table.csv"
    }
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(TEMPLATE.name).render(
        title=title,
        answer=[] if table is None else answer(table),
        tolerances=[name if name == "exact" else f"within {name}" for name in tasks.TOLERANCES],
        rule=tasks.RULE,
        claims=claimed,
        groups={name: shown for name, shown in groups.items() if shown},
        columns=[name.removesuffix("_bytes").replace("_", " ") for name in CELL_COLUMNS],
        cells=[] if table is None else cells(table),
        checks=[] if table is None else quality.checks(table),
        provenance=provenance(({} if table is None else {"cells of the grid": table}) | studies),
    )


def answer(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The fastest method that states its error, for each metric, problem and tolerance.

    Args:
        table: what :func:`ntkbench.figures.plotting.base.checked` gives.

    Returns:
        For each metric its name and rows; a row has the problem, its sizes, and a choice for each tolerance, ``None``
        where no measured method reaches it.
    """
    table = table[table["kind"] != "approximate"]
    chosen = tasks.winners(table)
    found = []
    for metric in base.metrics_in(table):
        rows = []
        own = table[table["metric"] == metric].sort_values(["n", "P", "problem", "setting"])
        for (problem, setting), cells_of in own.groupby(["problem", "setting"], sort=False):
            solved = chosen[
                (chosen["metric"] == metric) & (chosen["problem"] == problem) & (chosen["setting"] == setting)
            ].set_index("tolerance")
            done = cells_of[cells_of["status"] == "ok"]
            first = (done if len(done) else cells_of).iloc[0]
            known = [f"{size} {labels.count_label(first[size])}" for size in "NOP" if first[size] == first[size]]
            choices = [
                _choice(solved.loc[name], cells_of) if name in solved.index else None for name in tasks.TOLERANCES
            ]
            rows.append(
                {
                    "problem": problem,
                    "setting": setting,
                    "sizes": ", ".join(known),
                    "choices": choices,
                    "methods": _counted(done["method"].nunique()),
                    "reason": "" if len(done) else _reason(cells_of),
                }
            )
        found.append({"metric": metric.replace("_", " "), "rows": rows})
    return found


def _counted(methods: int) -> str:
    return f"{counted(methods, 'method that states', 'methods that state')} an error" if methods else ""


def _reason(cells_of: pd.DataFrame) -> str:
    """The most frequent reason why cells have no result."""
    return labels.why_not(cells_of, most=1).partition("\n")[0].replace(r"\$", "$")


def _choice(winner: pd.Series, cells_of: pd.DataFrame) -> dict[str, Any]:
    own = cells_of[(cells_of["method"] == winner["method"]) & (cells_of["backend"] == winner["backend"])]
    memory = own["memory_bytes"].max()
    passes = winner["passes"]
    facts = [
        winner["kind"],
        "" if passes != passes else counted(round(passes), "pass", "passes"),
        "" if memory != memory else bytes_label(memory),
        "" if winner["kind"] == "exact" else f"error {percent_label(winner['error'])}",
        "" if winner["lead"] != winner["lead"] else f"next {winner['lead']:.2g} times slower",
    ]
    return {
        "method": winner["method"],
        "title": winner["title"] + (" in JAX" if winner["backend"] == "jax" else ""),
        "seconds": ("at most " if winner["at_most"] else "") + seconds_label(winner["seconds"]),
        "facts": ", ".join(filter(None, facts)),
        "sure": winner["fastest"] >= tasks.SURE,
        "call": _call(winner),
    }


def _call(winner: pd.Series) -> str:
    """The line of Python that uses a method."""
    forms = CALLS["jax" if winner["backend"] == "jax" else "torch"]
    options = f'method="{winner["method"]}"'
    if winner["kind"] == "stochastic" and winner["passes"] == winner["passes"]:
        options += f", passes={winner['passes']:.0f}"
    metric = winner["metric"]
    if metric in OF_SPECTRUM:
        return f"{forms['spectrum']}.{OF_SPECTRUM[metric]}"
    return forms[metric].format(options) if metric in forms else forms[""].format(metric, options)


def cells(table: pd.DataFrame) -> list[list[dict[str, str]]]:
    """All cells of the grid: for each column what is shown, and what it is sorted by."""
    rows = []
    for row in table.to_dict("records"):
        shown = []
        for name, said in CELL_COLUMNS.items():
            value = row.get(name)
            missing = value is None or value != value or value == ""
            shown.append({"text": "" if missing else said(value), "key": "" if missing else str(value)})
        rows.append(shown)
    return rows


def provenance(tables: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """The provenance of each table: for each column its values, and how its rows ended."""
    found = []
    for name, table in tables.items():
        values = {column: _distinct(table[column]) for column in PROVENANCE if column in table}
        ended = table["status"].value_counts() if "status" in table else pd.Series(dtype=int)
        found.append(
            {
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
        )
    return found


def _distinct(column: pd.Series) -> list[str]:
    """The values of a column as words, each once; whole numbers without decimals."""
    return sorted({f"{value:g}" if isinstance(value, float) else str(value) for value in column.dropna()} - {""})


def _figure(picture: Path, figures: str | None) -> dict[str, Any]:
    caption = picture.with_suffix(".txt")
    if not caption.exists():
        raise BadInput(f"{picture} has no caption: {caption.name} is missing")
    first, _, settings = caption.read_text(encoding="utf-8").partition("\n")
    name, _, text = first.partition(". ")
    with Image.open(picture) as image:
        width, height = image.size  # so that links arrive where they should while pictures load
        embedded = io.BytesIO()
        image.convert("RGB").save(embedded, **PICTURE)
    stem, ends = picture.stem, {} if figures is None else {"CSV": "csv", "PDF": "pdf", "PNG": "png"}
    return {
        "id": stem,
        "name": name or labels.name_label(stem),
        "text": text,
        "finding": text.partition(". ")[0],
        "settings": settings,
        "failed": text.startswith(labels.NOT_DRAWN),
        "width": width,
        "height": height,
        "claims": claims.readable(pd.read_csv(picture.with_suffix(".csv"))) if stem == claims.NAME else [],
        "files": {form: f"{figures}/{stem}.{end}" for form, end in ends.items()},
        "data": base64.b64encode(embedded.getvalue()).decode(),
    }
