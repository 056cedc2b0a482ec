"""From the tidy table to speed-ups at equal accuracy: what ``speedup.py`` draws."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ntkbench.figures.plotting import base, labels

BASELINES = {"naive_jacobian": "naive Jacobian", "direct": "direct"}
"""Names and titles; both of them in PyTorch, on the same problem, metric and setting."""
TOLERANCES = {"1 %": 1e-2, "0.1 %": 1e-3, "exact": 1e-4}
"""Largest median relative error; the last one is for exact methods only, which get float32's rounding."""

COLUMNS = ["problem", "setting", "metric", "n", "P", "method", "title", "kind", "backend", "tolerance", "outcome"]
COLUMNS += ["passes", "error", "seconds", *(f"{name}_seconds" for name in BASELINES)]
COLUMNS += [f"speedup_over_{name}" for name in BASELINES]


def speedups(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each problem, setting, metric, method, backend and tolerance.

    A method's time is the least of its measured medians whose median error is within the tolerance; nothing is
    interpolated between budgets. ``outcome`` is ``reached``, ``not reached``, or how the cells ended if none was
    measured.
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
            points = points.sort_values("seconds", kind="stable").to_dict("records")
            for tolerance in TOLERANCES if first["kind"] == "exact" else list(TOLERANCES)[:2]:
                best = next((p for p in points if p["error"] <= TOLERANCES[tolerance]), None)
                row = dict(zip(("problem", "setting", "metric"), case, strict=True))
                row |= first[["n", "P", "title", "kind"]].to_dict()
                row |= {"method": method, "backend": backend, "tolerance": tolerance}
                row["outcome"] = _outcome(rows) if best is None else "reached"
                row |= {c: np.nan if best is None else best[c] for c in ("passes", "error", "seconds")}
                for name, seconds in baselines.items():
                    row[f"{name}_seconds"] = seconds
                    row[f"speedup_over_{name}"] = seconds / row["seconds"]
                made.append(row)
    return pd.DataFrame(made, columns=COLUMNS)


def _baseline(cells: pd.DataFrame, method: str) -> float:
    """Seconds of a baseline, ``nan`` where it was not measured."""
    rows = cells[(cells["method"] == method) & (cells["backend"] == "torch")]
    return float(base.measured(rows, "seconds")["seconds"].min())


def _outcome(rows: pd.DataFrame) -> str:
    """Why there is no time: too wrong, or else the most frequent end of its cells other than having been skipped."""
    if len(base.measured(rows, "seconds", "error")):
        return "not reached"
    ends = rows.loc[rows["status"] != "ok", "status"]
    ended = ends[ends != "skipped"] if (ends != "skipped").any() else ends
    return labels.status_label(ended.mode().iloc[0]) if len(ended) else "not measured"
