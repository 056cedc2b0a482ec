"""A study as a step of the pipeline: rows run in a separate process, under limits; interrupted studies resume."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from ntkbench import errors, operators, paths, studies
from ntkbench.measure import fingerprints, journal, outcomes, timing, watchdog
from ntkbench.measure.config import Config
from ntkbench.measure.journal import Journal, Rows
from ntkbench.measure.limits import Limits
from ntkbench.measure.outcomes import Outcome
from ntkbench.measure.progress import Progress
from ntkbench.measure.provenance import provenance
from ntkbench.measure.settings import Settings
from ntkbench.units import counted


def measure(config: Config, config_file: Path, name: str, output: Path) -> None:
    """Measure a study; its table goes to ``output``, even if rows fail.

    Finished rows are kept in a journal beside it. A separate process measures. If a row exceeds a limit, or the process
    dies, that row gets the reason, and another process continues with the next row. If that happens between rows,
    another process continues as long as each of them finishes a row. Rows of a study with seconds that another kind of
    machine or device made are measured again.

    Raises:
        BadInput: the configuration has no such study.
    """
    if name not in config.studies:
        raise errors.unknown("study", name, config.studies)
    for file in fingerprints.study_data(config, name):  # a later download would look like an edit
        with contextlib.suppress(errors.Unavailable):
            file.path()
    limits, kept = config.study(name).limits, _journal(output)
    command = [sys.executable, "-m", "ntkbench", "study-rows", name]
    command += ["--config", str(config_file), "--output", str(output)]
    killed: set[str | None] = set()
    with Journal(kept) as rows:
        rows.forget_begun()  # by an earlier run, possibly with other settings
        if config.retry == "failed":
            rows.drop(outcomes.PASSING)
        known = len(rows.rows(fingerprints.study(config, name)))
    with watchdog.step() as mark, Progress(output.parents[1], f"study-{name}", 0) as progress:
        output.unlink(missing_ok=True)  # so that any table there is from this run
        progress.begin("measuring")
        while True:
            child = psutil.Popen(command)
            with watchdog.Watch(_Clock(child, kept, limits), limits.memory_bytes) as watch:
                code = child.wait()
            watchdog.end_marked(mark)
            if code == 0 and output.exists():
                break
            outcome = Outcome(*watch.verdict) if watch.verdict else outcomes.of_exit(code)
            with Journal(kept) as rows:
                key = rows.begun
                if code == outcomes.KILLED and not watch.verdict and key not in killed:
                    killed.add(key)  # by something else; the row is tried once more
                    continue
                whence, made_for = _whence(_settings(config, name)), fingerprints.study(config, name)
                entries = rows.rows(made_for)
                if key is None:
                    if len(entries) > known:
                        known = len(entries)
                        continue
                    place = _place(name, whence)
                    here = [entry for entry in entries if place.items() <= entry.items()]
                    made = [row for entry in here for row in studies.base.unfolded(entry)]
                    _write(config, name, output, [*made, outcome.columns()])
                    break
                case = json.loads(key[: key.rindex("}") + 1])
                rows.finish(key, made_for, {**case, **outcome.columns(), **whence})
                known = len(rows.rows(made_for))
        with contextlib.suppress(OSError, ValueError):
            progress.measured = float(_measured(output).read_text(encoding="utf-8"))


class _Clock:
    """The time limit of a study's process: ``limits.time_s`` for a row, from its start.

    Before the first row and between rows, while the process imports and builds problems, it is ``limits.problem_s``.
    """

    def __init__(self, child: psutil.Process, file: Path, limits: Limits) -> None:
        self._file, self._limits = file, limits
        self._size = self._bytes()
        self._now = watchdog.Watched(child, time.monotonic(), limits.problem_s)

    def __call__(self) -> list[watchdog.Watched]:
        if (size := self._bytes()) != self._size:
            self._size = size
            seconds = self._limits.time_s if journal.begun(self._file) else self._limits.problem_s
            self._now = self._now._replace(since=time.monotonic(), seconds=seconds)
        return [self._now]

    def _bytes(self) -> int:
        """The journal's size, which every entry increases; two entries may have the same modification time."""
        try:
            return self._file.stat().st_size
        except OSError:
            return 0


def measure_rows(config: Config, name: str, output: Path) -> None:
    """Measure the rows of a study that are not in its journal, and write the table of all rows.

    If the study itself fails, between its rows, the table has the rows so far and one more with the reason.
    """
    watchdog.end_with_parent()
    output = output.absolute()  # a plug-in may change the working directory
    made_for = fingerprints.study(config, name)
    with Journal(_journal(output)) as kept:
        say = Progress(output.parents[1], f"study-{name}", 0).begin
        chosen = _settings(config, name)
        whence = _whence(chosen)
        rows = Rows(kept, made_for, whence, say, _place(name, whence))
        with journal.kept(rows):
            try:
                timing.use_threads(chosen.threads, pinned=studies.is_timed(name))
                table = studies.run(name, chosen).to_dict("records")
            except Exception as error:
                made = [row for entry in rows.made for row in studies.base.unfolded(entry)]
                table = [*made, outcomes.of_exception(error).columns()]
        if fingerprints.study(config, name) != made_for:
            rows.take_back(outcomes.EDITED.columns())
            table = [row | outcomes.EDITED.columns() for row in table]
    if not table:
        table = [Outcome(outcomes.FAILED, "its settings leave nothing to measure").columns()]
    _write(config, name, output, table)
    paths.write_atomically(_measured(output), f"{rows.seconds}\n")
    outcomes.say(f"{name}: {counted(len(table), 'row')}")


def _write(config: Config, name: str, output: Path, rows: list[dict[str, Any]]) -> None:
    """Write the table, with the provenance of each row."""
    chosen = _settings(config, name)
    table = studies.base.table(rows)
    columns = {
        "dtype": chosen.dtype,
        "threads": chosen.threads,
        "fingerprint": fingerprints.study(config, name),
        **_whence(chosen),
    }
    # Earlier rows have their own provenance.
    table = table.assign(**{k: table[k].where(table[k].notna(), v) if k in table else v for k, v in columns.items()})
    paths.write_atomically(output, table.to_csv(index=False, lineterminator="\n"))


def _whence(chosen: Settings) -> dict[str, object]:
    """Provenance of new rows: code, versions, machine and device."""
    return {**provenance().columns(), "device": operators.device_name(chosen.target())}


def _place(name: str, whence: Mapping[str, object]) -> dict[str, object]:
    """Columns that all rows of a table with seconds must share: those of two machines or devices do not compare."""
    return {column: whence[column] for column in ("machine", "device")} if studies.is_timed(name) else {}


def _settings(config: Config, name: str) -> Settings:
    """A study's settings; on one thread if it measures no times, so that others can run beside it."""
    chosen = config.study(name)
    return chosen if studies.is_timed(name) else chosen.model_copy(update={"threads": 1})


def _journal(output: Path) -> Path:
    return output.with_suffix(".journal")


def _measured(output: Path) -> Path:
    return output.with_name(f".{output.stem}.measured")
