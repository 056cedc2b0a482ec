"""The tidy table: exactly one row per cell, with its measurements and their provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ntkbench import methods, operators
from ntkbench.errors import NtkbenchError, Unavailable
from ntkbench.measure.cells import Cell
from ntkbench.measure.config import Config
from ntkbench.measure.outcomes import KEY, Outcome
from ntkbench.measure.provenance import provenance
from ntkbench.problems.base import parse_label

SIZES = ("N", "O", "P", "n")
MEASURED = (
    *("seconds", "seconds_q25", "seconds_q75", "first_call_seconds", "calls"),
    *("passes_spent", "value", "value_q25", "value_q75", "reference", "effective_rank"),
    *("error", "error_q25", "error_q75", "seeds", "standard_error", "covered", "certificate"),
    *("memory_bytes", "gpu_peak_bytes", "notes", "measured_seconds", "wall_seconds"),
)
WHERE = ("device", "dtype", "threads", "first_seed", "fingerprint")
WHENCE = ("git_sha", "git_dirty", "machine", "versions", "python")
WHOLE = ("passes", "seeds", "calls", "first_seed")
COLUMNS = (
    *KEY[:1],
    *("family", *SIZES),
    *KEY[1:2],
    *("title", "kind", "kernel"),
    *KEY[2:],
    *("status", "reason"),
    *MEASURED,
    *WHERE,
    *WHENCE,
)


def row(
    cell: Cell,
    config: Config,
    fingerprint: str,
    outcome: Outcome,
    sizes: Mapping[str, int],
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """One row of the table.

    Args:
        cell: cell of the row.
        config: the settings.
        fingerprint: fingerprint of all that the row depends on.
        outcome: how the measurement ended.
        sizes: N, O, P and n of the problem, where they are known.
        measured: columns of :data:`MEASURED`.
    """
    method = methods.get(cell.method)
    return {
        **{key: getattr(cell, key) for key in KEY},
        **{size: sizes.get(size) for size in SIZES},
        "family": parse_label(cell.problem)[0],
        "title": method.title,
        "kind": method.kind,
        "kernel": method.computes,
        "device": _device(config, cell.backend),
        "dtype": config.dtype,
        "threads": config.threads,
        "first_seed": 0 if method.takes_seed else None,
        "fingerprint": fingerprint,
        "seeds": 0,
        "calls": 0,
        **provenance().columns(),
        **outcome.columns(),
        **measured,
    }


def _device(config: Config, backend: str) -> str:
    """Name of a backend's device. If the backend has none here, its cells are skipped, and name that of PyTorch."""
    try:
        return operators.device_name(config.target(backend))
    except Unavailable:
        return operators.device_name(config.target())


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a table with all columns in order."""
    table = pd.DataFrame(list(rows), columns=list(COLUMNS))
    return table.astype(dict.fromkeys(WHOLE, "Int64"))


def read(file: Path) -> pd.DataFrame:
    """A table from CSV."""
    return pd.read_csv(file, dtype=dict.fromkeys(WHOLE, "Int64") | {"reason": str, "notes": str}, encoding="utf-8")


def labels(table: pd.DataFrame) -> list[str]:
    """The labels of the cells that a table's rows belong to."""
    keys = table[list(KEY)].itertuples(index=False)
    return [Cell(str(p), str(m), str(b), str(k), None if pd.isna(n) else int(n)).label for p, m, b, k, n in keys]


def combine(tables: Iterable[pd.DataFrame], expected: Iterable[Cell]) -> pd.DataFrame:
    """All shards as one table, in the order of the cells.

    Raises:
        NtkbenchError: a cell has no row or more than one, or a row belongs to no cell.
    """
    table = pd.concat(list(tables), ignore_index=True)
    found = labels(table)
    wanted = {cell.label: i for i, cell in enumerate(expected)}
    if sorted(found) != sorted(wanted):
        missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        twice = sorted({label for label in found if found.count(label) > 1})
        said = f"missing {missing}, unknown {extra}, duplicate {twice}"
        raise NtkbenchError(f"the table does not have one row per cell: {said}")
    return table.iloc[sorted(range(len(found)), key=lambda i: wanted[found[i]])].reset_index(drop=True)
