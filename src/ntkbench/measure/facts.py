"""Prepare problems before measurements: trained weights, sizes and exact metrics, or the reason for a failure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from ntkbench import problems
from ntkbench.measure import apart, fingerprints, journal, outcomes, timing, watchdog
from ntkbench.measure.config import Config
from ntkbench.measure.journal import Journal
from ntkbench.measure.progress import Progress
from ntkbench.problems.base import parse_label, weights

SIZES = ("N", "O", "P", "n")

Facts = dict[str, Any]
"""Facts of one problem: status and reason; if it is ready, also its sizes, ``exact``, which maps metric to value,
``contents``, the hash of the weights and inputs that the values belong to, and ``cached``, the files of trained weights
in the cache with a hash of each. A failure has the ``limits`` that it was found under."""


def make(config: Config, labels: Sequence[str], output: Path) -> dict[str, Facts]:
    """Find the facts of problems, each in a process of its own under the limits, and write them to ``output``.

    Unchanged problems are not prepared again, with three exceptions: one that is ready, if its weights have left the
    cache; one that failed, if ``retry`` asks for it or the limits have changed; and one whose data were missing.

    Raises:
        Edited: a file that a problem depends on was edited meanwhile.
    """
    found: dict[str, Facts] = {}
    timing.import_early(with_jax=False)
    kept, part = output.with_suffix(".journal"), output.with_suffix(".part")
    with watchdog.step() as mark, Journal(kept) as rows, Progress(output.parent, "problems", len(labels)) as progress:
        for label in labels:
            progress.begin(label)
            lacking = _lacking(label, config, part)  # before the fingerprint, which the files are part of
            made_for = fingerprints.problem(label)
            row = None if lacking else rows.row(label, made_for)
            if row is None or not _is_final(label, row, config):
                rows.begin(label, made_for)
                row = lacking or _made(label, config, part)
                if fingerprints.problem(label) != made_for:
                    raise fingerprints.Edited(label)
                if row["status"] in outcomes.PASSING:
                    row["limits"] = _limits(config)
                rows.finish(label, made_for, row)
                watchdog.end_marked(mark)
            found[label] = row
    journal.write(output, found)
    return found


def read(config: Config, labels: Sequence[str], output: Path) -> dict[str, Facts]:
    """The facts in the journal of :func:`make`, which has checksums; calls :func:`make` again if any are missing."""
    with FileLock(f"{output}.lock"):  # of several shards one prepares the problems, and the others wait
        rows = journal.rows_of([output.with_suffix(".journal")])
        found = {label: rows.get((label, fingerprints.problem(label))) for label in labels}
        known = {label: row for label, row in found.items() if row and _has_weights(label, row)}
        return known if len(known) == len(labels) else make(config, labels, output)


def _lacking(label: str, config: Config, part: Path) -> Facts | None:
    """Fetch the data files of a problem that are not here; its facts if one cannot be had."""
    if all(file.here() for file in fingerprints.data_files(label)):
        return None
    fetched = apart.run(_fetch, (label,), config.limits, config.threads, part)
    return None if fetched["status"] == outcomes.OK else fetched


def _fetch(label: str) -> Facts:
    for file in fingerprints.data_files(label):
        file.path()
    return {}


def _is_final(label: str, row: Facts, config: Config) -> bool:
    """Whether facts in the journal need not be found again."""
    if row["status"] in outcomes.PASSING:
        return config.retry != "failed" and row.get("limits") == _limits(config)
    return _has_weights(label, row)


def _has_weights(label: str, row: Facts) -> bool:
    """Whether the cache still has the weights that a problem was prepared with; its cells would train others."""
    return row.get("cached", {}).items() <= _cached(label).items()


def _cached(label: str) -> dict[str, str]:
    return {file.name: fingerprints.of_file(file) for file in weights.cached(parse_label(label)[0])}


def _limits(config: Config) -> list[float]:
    return [config.limits.problem_s, config.limits.memory_mb]


def _made(label: str, config: Config, part: Path) -> Facts:
    return apart.run(_find, (label,), config.limits, config.threads, part)


def _find(label: str) -> Facts:
    from ntkbench.problems.base import reference

    problem = problems.load(label)
    sizes = {size: getattr(problem, size) for size in SIZES}
    exact, contents = reference.exact(problem), problem.contents()
    return {**sizes, "exact": exact, "contents": contents, "cached": _cached(label)}
