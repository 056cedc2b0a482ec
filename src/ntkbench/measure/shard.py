"""Measure the cells of a shard one by one; each gives exactly one row, even if it fails."""

from __future__ import annotations

import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ntkbench import paths
from ntkbench.measure import (
    engine,
    execution,
    facts,
    fingerprints,
    forecast,
    journal,
    outcomes,
    rows,
    timing,
    watchdog,
)
from ntkbench.measure.cells import Cell, cells, of_shard
from ntkbench.measure.config import Config
from ntkbench.measure.engine import Engine
from ntkbench.measure.forecast import Forecast
from ntkbench.measure.journal import Journal
from ntkbench.measure.outcomes import Outcome
from ntkbench.measure.plan import Plan
from ntkbench.measure.progress import Progress

GUESS = 3.0
"""Expected seconds of a cell before any was measured."""


def measure(config: Config, number: int, problems: Path, output: Path, log: Path) -> None:
    """Measure a shard's cells and write their rows to ``output``.

    Finished rows are kept in a journal, so that an interrupted shard resumes at the cell where it stopped. Rows of
    unchanged cells are not measured again. An edit of what a cell depends on ends the shard.

    Args:
        config: the settings.
        number: number of the shard.
        problems: facts of the problems, see :mod:`ntkbench.measure.facts`.
        output: the shard's table.
        log: file for the output of asv and the cases.

    Raises:
        Edited: a file that a cell depends on was edited since the start; its row is not kept.
    """
    shard = of_shard(config, number)
    known = facts.read(config, sorted({cell.problem for cell in cells(config)}), problems)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("", encoding="utf-8")
    others = [file for file in output.parent.glob("*.journal") if file != output.with_suffix(".journal")]
    with watchdog.step() as mark, Journal(output.with_suffix(".journal"), others) as kept:
        if config.retry == "failed":
            kept.drop(outcomes.PASSING, {cell.label for cell in shard})
        made_for = {cell: fingerprints.cell(config, cell) for cell in shard}
        done = {cell: _known(cell, config, known, kept, made_for[cell]) for cell in shard}
        pending = [cell for cell in shard if done[cell] is None]
        work = Path(tempfile.mkdtemp(prefix="ntkbench-"))
        try:
            forecasts = _forecasts(config, pending, output, work) if config.limits.times_exact and pending else {}
            for cell, reason in forecast.pruned(forecasts, config.limits).items():
                if cell in pending:
                    row = rows.row(
                        cell, config, made_for[cell], Outcome(outcomes.SKIPPED, reason), known[cell.problem], {}
                    )
                    done[cell] = row  # not kept: the prediction depends on other methods and on the machine
                    pending.remove(cell)
            expected = _expected(pending, [row for row in done.values() if row], forecasts)
            exact = {label: found["exact"] for label, found in known.items() if "exact" in found}
            contents = {label: found["contents"] for label, found in known.items() if "contents" in found}
            plan = Plan(config, pending, exact, work, contents)
            plan.write(work / "plan.json")
            with (
                Progress(output.parents[1], output.stem, sum(expected.values())) as progress,
                engine.started(work / "plan.json", plan.labels, config.limits, mark, log) as asv,
            ):
                for index, cell in enumerate(pending):
                    progress.begin(cell.label, expected[cell])
                    _check_sources(config, cell, made_for[cell])
                    kept.begin(cell.label, made_for[cell])
                    start = time.perf_counter()
                    outcome, measured = _measure(asv, cell, index, work)
                    _check_sources(config, cell, made_for[cell])
                    measured["wall_seconds"] = time.perf_counter() - start
                    progress.measured += measured.get("measured_seconds") or 0.0
                    row = rows.row(cell, config, made_for[cell], outcome, known[cell.problem], measured)
                    kept.finish(cell.label, made_for[cell], row)
                    done[cell] = row
        finally:
            shutil.rmtree(work, ignore_errors=True)
    table = rows.frame(row for row in done.values() if row)
    paths.write_atomically(output, table.to_csv(index=False, lineterminator="\n"))


def _check_sources(config: Config, cell: Cell, made_for: str) -> None:
    if fingerprints.cell(config, cell) != made_for:
        raise fingerprints.Edited(cell.label)


def pending(config: Config, results: Path) -> list[Cell]:
    """The cells that a run into a results folder would measure: those without a valid row there."""
    known = journal.rows_of((results / "shards").glob("*.journal"))
    return [cell for cell in cells(config) if (cell.label, fingerprints.cell(config, cell)) not in known]


def discard_damaged(config: Config, results: Path) -> list[Path]:
    """Remove the tables of shards that are not what their journals say, so that a run writes them again.

    A table is damaged if it cannot be read, has not one row per cell of the present configuration, has a row that
    differs from that of the journal, or has a measured row that is in no journal. A run measures such a row again;
    :func:`pending` counts it.

    Returns:
        the removed files.
    """
    known = journal.rows_of((results / "shards").glob("*.journal"))
    damaged = []
    for number in range(config.shards):
        file = results / "shards" / f"shard-{number}.csv"
        if file.exists() and not _is_as_kept(file, of_shard(config, number), known):
            file.unlink()
            damaged.append(file)
    return damaged


def _is_as_kept(file: Path, shard: Sequence[Cell], known: Mapping[tuple[str, str], Mapping[str, Any]]) -> bool:
    try:
        table = rows.read(file)
        labels = rows.labels(table)
        keys = list(zip(labels, table["fingerprint"].astype(str), strict=True))
        measured = table["wall_seconds"].notna()
    except (ArithmeticError, KeyError, OSError, TypeError, ValueError):  # of pandas, if a number is none
        return False
    # Rows of problems that failed, and of cells that are predicted to be slow, are in no journal.
    if sorted(labels) != sorted(cell.label for cell in shard) or any(
        key not in known for key, own in zip(keys, measured, strict=True) if own
    ):
        return False
    kept = [i for i, key in enumerate(keys) if key in known]
    written = io.StringIO(rows.frame(known[keys[i]] for i in kept).to_csv(index=False))
    texts = [pd.read_csv(source, dtype=str, keep_default_na=False) for source in (file, written)]
    if list(texts[0]) != list(texts[1]):
        return False
    pairs = zip(texts[0].iloc[kept].to_numpy().flat, texts[1].to_numpy().flat, strict=True)
    return all(a == b or _number(a) == _number(b) for a, b in pairs)


def _number(text: str) -> float | str:
    """A number, as the same one may be written as 3 and 3.0; other text unchanged."""
    try:
        return float(text)
    except ValueError:
        return text


def _known(
    cell: Cell, config: Config, known: Mapping[str, facts.Facts], kept: Journal, made_for: str
) -> dict[str, Any] | None:
    """The row of a cell that need not be measured; ``None`` for other cells."""
    problem = known[cell.problem]
    if problem["status"] != outcomes.OK:
        outcome = Outcome(problem["status"], problem["reason"])
        return rows.row(cell, config, made_for, outcome, {}, {})
    return kept.row(cell.label, made_for)


def _forecasts(config: Config, pending: list[Cell], output: Path, work: Path) -> Mapping[Cell, Forecast]:
    """Predicted costs of the cells, and of the exact methods that they are compared with."""
    chosen = dict.fromkeys([*pending, *forecast.rivals(pending, cells(config))])
    timing.import_early(with_jax=False)
    with Progress(output.parents[1], output.stem, GUESS * len(pending)) as progress:
        return forecast.make(config, chosen, work, lambda label: progress.begin(f"predicting costs, {label}", 0.0))


def _expected(
    pending: list[Cell], before: list[dict[str, Any]], forecasts: Mapping[Cell, Forecast]
) -> dict[Cell, float]:
    walls = [row["wall_seconds"] for row in before if row.get("wall_seconds")]
    guess = statistics.mean(walls) if walls else GUESS
    return {cell: forecasts[cell].wall(cell) if cell in forecasts else guess for cell in pending}


def _measure(asv: Engine, cell: Cell, index: int, work: Path) -> tuple[Outcome, dict[str, Any]]:
    """Measure every aspect of a cell, up to the first failure; returns the outcome and the measured columns."""
    found: dict[str, dict[str, Any]] = {}
    results: dict[str, engine.Result] = {}
    for aspect in execution.ASPECTS:
        outcome = _aspect(asv, aspect, index, work, found, results)
        if outcome.status == outcomes.SKIPPED:
            return outcome, {}
        if outcome.status != outcomes.OK:
            return outcome._replace(reason=f"{outcome.reason} (measuring {aspect})"), {}
    memory, accuracy = found["memory"], found["seconds"]
    samples, baseline = results["seconds"].samples, memory["baseline_bytes"]
    peak = results["memory"].value
    if len(samples) != cell.calls or peak is None:
        return Outcome(outcomes.FAILED, "asv recorded no result, although the case ended without an error"), {}
    measured = {
        **{name: value for name, value in accuracy.items() if name in rows.MEASURED},
        **timing.quartiles("seconds", samples),
        "calls": len(samples),
        "memory_bytes": None if baseline is None else max(0.0, peak - baseline),
        "gpu_peak_bytes": memory["gpu_peak_bytes"],
        "measured_seconds": memory["first_call_seconds"]
        + memory["memory_seconds"]
        + accuracy["first_call_seconds"]
        + accuracy["error_seconds"]
        + sum(samples),
    }
    return Outcome(outcomes.OK), measured


def _aspect(
    asv: Engine,
    aspect: str,
    index: int,
    work: Path,
    found: dict[str, dict[str, Any]],
    results: dict[str, engine.Result],
) -> Outcome:
    """Run one execution, and once more if something other than its limits killed it."""
    record = execution.record_file(work, index, aspect)
    for _ in range(2):
        record.unlink(missing_ok=True)
        results[aspect] = result = asv.run(aspect, index)
        if not result.killed:
            break
    found[aspect] = kept = execution.read(record)
    if result.outcome.status in (outcomes.TIMEOUT, outcomes.OUT_OF_MEMORY):
        return result.outcome
    if "status" in kept:
        return Outcome(kept["status"], kept["reason"])
    return result.outcome
