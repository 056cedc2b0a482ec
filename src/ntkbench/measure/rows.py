"""asv's results and the records beside them, as one tidy table: every cell exactly one row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ntkbench import methods, operators
from ntkbench.errors import NtkbenchError
from ntkbench.measure import execution
from ntkbench.measure.cells import Cell
from ntkbench.measure.config import Config
from ntkbench.measure.provenance import provenance
from ntkbench.problem import Problem
from ntkbench.problems.base import parse_label

STATUSES = ("ok", "skipped", "failed", "timeout", "out_of_memory")
KEY = ["problem", "method", "backend", "metric", "passes"]
MEASURED = [
    "seconds",
    "seconds_q25",
    "seconds_q75",
    "first_call_seconds",
    "passes_spent",
    "value",
    "reference",
    "effective_rank",
    "error",
    "error_q25",
    "error_q75",
    "seeds",
    "standard_error",
    "covered",
    "memory_bytes",
    "gpu_peak_bytes",
    "notes",
]
WHOLE = ("passes", "seeds", "first_seed")
COLUMNS = [
    *KEY[:1],
    *("family", "N", "O", "P", "n"),
    *KEY[1:2],
    *("title", "kind"),
    *KEY[2:],
    *("status", "reason"),
    *MEASURED,
    *("device", "dtype", "threads", "first_seed", "fingerprint"),
    *("git_sha", "git_dirty", "machine", "versions", "python"),
]


def row(
    cell: Cell, problem: Problem | None, config: Config, fingerprint: str, outcome: Mapping[str, Any]
) -> dict[str, Any]:
    """One row of the table.

    Args:
        cell: what was to be measured.
        problem: its problem, ``None`` where that cannot be had.
        config: the settings.
        fingerprint: of the method's sources.
        outcome: status, reason and whatever was measured.
    """
    method = methods.get(cell.method)
    sizes = {s: getattr(problem, s) if problem else None for s in ("N", "O", "P", "n")}
    return {
        **{key: getattr(cell, key) for key in KEY},
        **sizes,
        "family": parse_label(cell.problem)[0],
        "title": method.title,
        "kind": method.kind,
        "device": operators.device_name(config.target(cell.backend)),
        "dtype": config.dtype,
        "threads": config.threads,
        "first_seed": 0 if method.takes_passes else None,
        "fingerprint": fingerprint,
        **provenance().columns(),
        **outcome,
    }


def outcome(cell: Cell, records: Path, asv: AsvResults) -> dict[str, Any]:
    """What became of a cell that asv was asked to measure."""
    found = {aspect: execution.read(execution.record_file(records, cell, aspect)) for aspect in execution.ASPECTS}
    for aspect, record in found.items():
        if record.get("status") != "ok":
            return _not_ok(aspect, record)
    seconds, peak = asv.seconds(cell.label), asv.peak_bytes(cell.label)
    if seconds is None or peak is None:
        return {"status": "failed", "reason": "asv recorded no result, although the execution ended well"}
    accuracy = found["accuracy"]
    reference = accuracy["reference"]
    values = np.array(accuracy["estimates"], dtype=float)
    errors = np.abs(values - reference) / abs(reference)
    spread = [e for e in accuracy["standard_errors"] if e is not None]
    return {
        "status": "ok",
        "reason": "",
        **seconds,
        "first_call_seconds": accuracy["first_call_seconds"],
        "passes_spent": accuracy["passes_spent"],
        "value": float(np.median(values)),
        "reference": reference,
        "effective_rank": accuracy["effective_rank"],
        **dict(zip(("error_q25", "error", "error_q75"), np.quantile(errors, (0.25, 0.5, 0.75)).tolist(), strict=True)),
        "seeds": len(values),
        "standard_error": float(np.median(spread)) if spread else None,
        "covered": float(np.mean(accuracy["covered"])) if spread else None,
        "notes": accuracy["notes"],
        "memory_bytes": max(0.0, peak - found["memory"]["baseline_bytes"]),
        "gpu_peak_bytes": found["memory"]["gpu_peak_bytes"],
    }


def _not_ok(aspect: str, record: Mapping[str, Any]) -> dict[str, Any]:
    if not record:
        return {"status": "failed", "reason": f"measuring {aspect} never began"}
    if record["status"] == "started":
        return {"status": "failed", "reason": f"the process measuring {aspect} died without a word"}
    return {"status": record["status"], "reason": f"{record['reason']} (measuring {aspect})"}


class AsvResults:
    """What one asv run measured, by benchmark and case."""

    def __init__(self, folder: Path) -> None:
        from asv.results import iter_results

        results = list(iter_results(str(folder)))
        if len(results) != 1:
            raise NtkbenchError(f"expected the results of one asv run in {folder}, found {len(results)}")
        (self._results,) = results

    def seconds(self, label: str) -> dict[str, float] | None:
        """Median and quartiles of a case's seconds."""
        index, value = self._find("ntk.Seconds.time_estimate", label)
        if value is None:
            return None
        params = self._results.get_result_params("ntk.Seconds.time_estimate")
        stats = self._results.get_result_stats("ntk.Seconds.time_estimate", params)[index] or {}
        quartiles = {f"seconds_{q}": stats.get(f"q_{q[1:]}", value) for q in ("q25", "q75")}
        return {"seconds": value, **quartiles}

    def peak_bytes(self, label: str) -> float | None:
        """Peak resident memory of a case's process."""
        return self._find("ntk.Memory.peakmem_estimate", label)[1]

    def _find(self, benchmark: str, label: str) -> tuple[int, float | None]:
        params = self._results.get_result_params(benchmark)
        values = self._results.get_result_value(benchmark, params)
        index = params[0].index(repr(label))
        value = values[index]
        return index, None if value is None or math.isnan(value) else value


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a table with all columns in order."""
    table = pd.DataFrame(list(rows), columns=COLUMNS)
    return table.astype(dict.fromkeys(WHOLE, "Int64"))


def read(file: Path) -> pd.DataFrame:
    """A table from CSV."""
    return pd.read_csv(file, dtype=dict.fromkeys(WHOLE, "Int64") | {"reason": str, "notes": str})


def combine(tables: Iterable[pd.DataFrame], expected: Iterable[Cell]) -> pd.DataFrame:
    """All shards as one table.

    Raises:
        NtkbenchError: a cell has no row or more than one, or a row is no cell.
    """
    table = pd.concat(list(tables), ignore_index=True)
    labels = [
        Cell(p, m, b, k, None if pd.isna(n) else int(n)).label for p, m, b, k, n in table[KEY].itertuples(index=False)
    ]
    wanted = [cell.label for cell in expected]
    if sorted(labels) != sorted(wanted):
        missing, extra = sorted(set(wanted) - set(labels)), sorted(set(labels) - set(wanted))
        twice = sorted({label for label in labels if labels.count(label) > 1})
        raise NtkbenchError(f"the table is not one row a cell: missing {missing}, no cells {extra}, twice {twice}")
    return table.iloc[np.argsort([wanted.index(label) for label in labels])].reset_index(drop=True)
