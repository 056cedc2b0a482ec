"""The time of each step of a run, and the expected time of the next run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from ntkbench import paths
from ntkbench.errors import BadInput
from ntkbench.measure import progress

FOLDER = "timings"
"""Folder of a run's results with one file per step, as Snakemake's ``benchmark:`` writes it."""
COMMITTED = "timings.csv"
GUESS = 30.0
"""Expected seconds of a step without known timings."""


def of_run(results: Path) -> pd.DataFrame:
    """Columns ``step``, ``seconds`` (wall), ``cpu_seconds`` and ``measured_seconds``, one row per step.

    Measured seconds are those inside measured calls: timed ones, those for errors and for memory, and the training and
    tracing that rows of studies need.
    """
    said, found = progress.read(results), []
    for file in sorted((results / FOLDER).glob("*.tsv")):
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            one = pd.read_csv(file, sep="\t").iloc[-1]
            measured = float(said[file.stem]["measured"]) if file.stem in said else 0.0
            found.append((file.stem, float(one["s"]), float(one["cpu_time"]), measured))
    return pd.DataFrame(found, columns=["step", "seconds", "cpu_seconds", "measured_seconds"])


def report(results: Path) -> str:
    """The timings of a run as text, longest step first.

    Raises:
        BadInput: the folder has no timings.
    """
    table = of_run(results).sort_values("seconds", ascending=False)
    if table.empty:
        raise BadInput(f"{results}: no {FOLDER}/*.tsv there; allowed: a run's results folder, such as results/default")
    total = table[["seconds", "cpu_seconds", "measured_seconds"]].sum()
    lines = [f"{'step':32} {'seconds':>9} {'CPU':>9} {'measured':>9}"]
    for row in table.itertuples():
        lines.append(f"{row.step:32} {row.seconds:9.1f} {row.cpu_seconds:9.1f} {row.measured_seconds:9.1f}")
    lines.append(
        f"{'sum of the steps':32} {total['seconds']:9.1f} {total['cpu_seconds']:9.1f} {total['measured_seconds']:9.1f}"
    )
    share = total["measured_seconds"] / total["seconds"] if total["seconds"] else 0.0
    return "\n".join([*lines, f"{share:.0%} of the steps' wall time is inside measured calls"])


def expected(results: Path, profile: str, steps: Iterable[str]) -> dict[str, float]:
    """Expected seconds of steps: :func:`known` ones where available, else :data:`GUESS`."""
    took = known(results, profile)
    return {step: took.get(step, GUESS) for step in steps}


def elsewhere(steps: Iterable[str]) -> dict[str, tuple[float, str]]:
    """The longest committed seconds of steps in the runs of any profile, and that profile."""
    found: dict[str, tuple[float, str]] = {}
    wanted = set(steps)
    for file in sorted(paths.REFERENCE.glob(f"*/{COMMITTED}")):
        table = pd.read_csv(file)
        for step, taken in zip(table["step"], table["seconds"], strict=True):
            if step in wanted:
                found[step] = max(found.get(step, (0.0, "")), (float(taken), file.parent.name))
    return found


def known(results: Path, profile: str) -> dict[str, float]:
    """Seconds of steps in an earlier run into the same folder, else in the committed run of the profile."""
    kept = paths.REFERENCE / profile / COMMITTED
    tables = [pd.read_csv(kept)] if kept.exists() else []
    tables.append(of_run(results))
    return {step: float(taken) for table in tables for step, taken in zip(table["step"], table["seconds"], strict=True)}
