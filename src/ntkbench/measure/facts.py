"""Prepare problems before measurements: trained weights, sizes and exact metrics, or the reason for a failure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ntkbench import problems
from ntkbench.measure import apart, fingerprints, journal, outcomes, timing, watchdog
from ntkbench.measure.config import Config
from ntkbench.measure.journal import Journal
from ntkbench.measure.progress import Progress

SIZES = ("N", "O", "P", "n")

Facts = dict[str, Any]
"""Facts of one problem: status and reason; if it is ready, also its sizes, ``exact``, which maps metric to value, and
``contents``, the hash of the weights and inputs that the values belong to."""


def make(config: Config, labels: Sequence[str], output: Path) -> dict[str, Facts]:
    """Find the facts of problems, each in a process of its own under the limits, and write them to ``output``.

    Unchanged problems that are ready or were skipped are not prepared again.
    """
    found: dict[str, Facts] = {}
    timing.import_early(with_jax=False)
    kept = output.with_suffix(".journal")
    with watchdog.step() as mark, Journal(kept) as rows, Progress(output.parent, "problems", len(labels)) as progress:
        for label in labels:
            progress.begin(label)
            made_for = fingerprints.problem(label)
            row = rows.row(label, made_for)
            if row is None or row["status"] in outcomes.PASSING:
                rows.begin(label, made_for)
                row = _made(label, config, output.with_suffix(".part"))
                if fingerprints.problem(label) != made_for:
                    row = dict(outcomes.EDITED.columns())
                rows.finish(label, made_for, row)
                watchdog.end_marked(mark)
            found[label] = row
    journal.write(output, found)
    return found


def read(config: Config, labels: Sequence[str], output: Path) -> dict[str, Facts]:
    """The facts in the journal of :func:`make`, which has checksums; calls :func:`make` again if any are missing."""
    rows = journal.rows_of([output.with_suffix(".journal")])
    found = {label: rows.get((label, fingerprints.problem(label))) for label in labels}
    known = {label: row for label, row in found.items() if row}
    return known if len(known) == len(labels) else make(config, labels, output)


def _made(label: str, config: Config, part: Path) -> Facts:
    return apart.run(_find, (label,), config.limits, config.threads, part)


def _find(label: str) -> Facts:
    from ntkbench.problems.base import reference

    problem = problems.load(label)
    sizes = {size: getattr(problem, size) for size in SIZES}
    return {**sizes, "exact": reference.exact(problem), "contents": problem.contents()}
