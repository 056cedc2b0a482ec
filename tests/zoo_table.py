"""Writes the table of ntkbench's results on every network of the zoo: ``python tests/zoo_table.py``.

The table is ``results/reference/zoo/table.csv``. It has one row for each network: how the result is computed, its
error, and the time of ``ntkbench.ntk``, tracing included, relative to that of an explicit J by plain autograd, row by
row. The two are timed alternately. The networks are tiny, so tracing takes most of the time. A failure is a row with
its reason. timm and transformers must be installed (the extra ``zoo``).
"""

from __future__ import annotations

import importlib.metadata
import logging
import statistics
import textwrap

import click
import pandas as pd
from zoo import TOLERANCE, Case, answer, cases, explicit_kernel

import ntkbench
from ntkbench import errors, paths
from ntkbench.measure.provenance import provenance
from ntkbench.measure.timing import in_turn, use_threads

TABLE = paths.REFERENCE / "zoo" / "table.csv"
THREADS = 1
ROUNDS = 3
"""Timed calls of each side."""
NOTE = 200
"""Characters kept of each note."""


def row(case: Case) -> dict[str, object]:
    """The row of a network."""
    package = case.package or "torch"
    where = {"model": case.name, "group": case.group, "package": f"{package} {importlib.metadata.version(package)}"}
    try:
        found = answer(case)
        model, x = case.build()
        ours, plain = in_turn([lambda: ntkbench.ntk(model, x), lambda: explicit_kernel(model, x)], ROUNDS)
    except Exception as error:  # recorded as a row
        return where | {"status": "failed", "reason": errors.summary(error)}
    return where | {
        "status": "ok" if found.error < TOLERANCE else "wrong",
        "way": found.way,
        "method": found.estimate.method,
        "notes": " | ".join(textwrap.shorten(note, NOTE) for note in found.estimate.notes),
        "error": found.error,
        "time_ratio": statistics.median(a / b for a, b in zip(ours, plain, strict=True)),
        "seconds": statistics.median(ours),
        "plain_seconds": statistics.median(plain),
        "calls": ROUNDS,
        "N": len(x),
        "P": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


@click.command()
def main() -> None:
    """Measure all networks and write the table."""
    logging.getLogger("ntkbench").setLevel(logging.ERROR)  # its warnings are in the notes
    use_threads(THREADS)
    where = {"threads": THREADS, "dtype": "float64"} | provenance().columns()
    rows = []
    for case in cases().values():
        rows.append(row(case) | where)
        said = {key: rows[-1].get(key) for key in ("status", "way", "error", "time_ratio", "reason")}
        click.echo(f"{case.name:36} {'  '.join(f'{value}' for value in said.values() if value is not None)}")
    paths.write_atomically(
        TABLE, pd.DataFrame(rows).convert_dtypes().to_csv(index=False, lineterminator="\n", float_format="%.4g")
    )


if __name__ == "__main__":
    main()
