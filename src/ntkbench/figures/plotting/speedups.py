"""Speed-ups at equal accuracy from the tidy table, for ``speedup.py``."""

from __future__ import annotations

import zlib

import numpy as np
import pandas as pd

from ntkbench.figures.plotting import base, labels
from ntkbench.measure import laws

BASELINES = {"naive_jacobian": "naive Jacobian", "direct": "direct"}
"""Names and titles of the baselines; both in PyTorch, on the same problem, metric and setting."""
TOLERANCES = {"1 %": 1e-2, "0.1 %": 1e-3, "exact": 1e-4}
"""Largest median relative errors; the last one is for exact methods only, and allows for rounding in float32."""

COLUMNS = ["problem", "setting", "metric", "n", "P", "method", "title", "kind", "backend", "tolerance", "outcome"]
COLUMNS += ["seeds", "error", *laws.Reached._fields, *(f"{name}_seconds" for name in BASELINES)]
COLUMNS += [f"speedup_over_{name}" for name in BASELINES]
NOT_REACHED = laws.Reached(*[np.nan] * 6)


def speedups(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each problem, setting, metric, method, backend and tolerance.

    A method's time is where the law of its errors crosses the tolerance, with a 95 % band; see
    :mod:`ntkbench.measure.laws`. ``seeds`` are the estimates behind the law. ``outcome`` is ``reached``, ``not
    reached``, or how the cells ended if none was measured.
    """
    runs = table.groupby(["method", "backend"])["status"].transform(lambda status: (status != "skipped").any())
    order = ["family", "n", "problem", "setting", "metric", "method", "backend", "passes"]
    table = table[runs].sort_values(order)
    made = []
    for case, cells in table.groupby(["problem", "setting", "metric"], sort=False):
        baselines = {name: _baseline(cells, name) for name in BASELINES}
        for (method, backend), rows in cells.groupby(["method", "backend"]):
            first = rows.iloc[0]
            points = base.measured(rows[rows["seconds"] > 0], "seconds", "error")
            law = laws.fit(points, zlib.crc32(f"{case} {method} {backend}".encode())) if len(points) else None
            for tolerance in TOLERANCES if first["kind"] == "exact" else list(TOLERANCES)[:2]:
                reached = law.reached(TOLERANCES[tolerance]) if law else NOT_REACHED
                there = reached.seconds == reached.seconds
                row = dict(zip(("problem", "setting", "metric"), case, strict=True))
                row |= first[["n", "P", "title", "kind"]].to_dict() | reached._asdict()
                row |= {"method": method, "backend": backend, "tolerance": tolerance, "seeds": points["seeds"].sum()}
                row["outcome"] = "reached" if there else _outcome(rows)
                row["error"] = law.error(reached.passes)[0] if law and there else np.nan
                for name, seconds in baselines.items():
                    row[f"{name}_seconds"] = seconds
                    row[f"speedup_over_{name}"] = seconds / row["seconds"]
                made.append(row)
    return pd.DataFrame(made, columns=COLUMNS)


def _baseline(cells: pd.DataFrame, method: str) -> float:
    """Seconds of a baseline, ``nan`` if it was not measured."""
    rows = cells[(cells["method"] == method) & (cells["backend"] == "torch")]
    return float(base.measured(rows, "seconds")["seconds"].min())


def _outcome(rows: pd.DataFrame) -> str:
    """Why there is no time: the tolerance is not reached, or the most frequent status of its cells, skipped last."""
    if len(base.measured(rows, "seconds", "error")):
        return "not reached"
    ends = rows.loc[rows["status"] != "ok", "status"]
    ended = ends[ends != "skipped"] if (ends != "skipped").any() else ends
    return labels.status_label(ended.mode().iloc[0]) if len(ended) else "not measured"
