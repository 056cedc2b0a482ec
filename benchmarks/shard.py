"""Measure one method: ``python -m benchmarks.shard --config C.yaml --method M --output M.csv --log M.log``.

Runs asv over the method's cells into a results folder of its own and turns what it found into rows. The output file
appears whole at the end or not at all; until then everything lies in a work folder beside it, which the next attempt
clears away.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from ntkbench import errors, paths, problems
from ntkbench.errors import NtkbenchError, Unavailable
from ntkbench.measure import execution, grid, rows
from ntkbench.measure.grid import Cell, Config
from ntkbench.measure.provenance import provenance
from ntkbench.problem import Problem

from .plan import VARIABLE, Plan

SUITE = Path(__file__).parent
PIPELINE = r"^ntk\.(Memory|Seconds|Accuracy)\.(peakmem|time|track_error)"


@click.command()
@click.option("--config", "config_file", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--method", required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--log", type=click.Path(path_type=Path), required=True, help="what asv prints")
def main(config_file: Path, method: str, output: Path, log: Path) -> None:
    """Measure one method's cells and write their rows."""
    with errors.as_one_line():
        measure(Config.read(config_file), method, output, log)


def measure(config: Config, method: str, output: Path, log: Path) -> None:
    """Rows of one method's cells, in ``output``."""
    cells = [cell for cell in grid.cells(config) if cell.method == method]
    fingerprint = grid.fingerprint(config, method, SUITE)
    outcomes = {cell: {"status": "skipped", "reason": reason} for cell in cells if (reason := _left_out(cell, config))}
    if measured := [cell for cell in cells if cell not in outcomes]:
        outcomes |= _measure(measured, config, output.with_name(f".{method}.work"), log)
    table = rows.frame(rows.row(cell, _problem(cell)[0], config, fingerprint, outcomes[cell]) for cell in cells)
    paths.write_atomically(output, table.to_csv(index=False))
    shutil.rmtree(output.with_name(f".{method}.work"), ignore_errors=True)
    counts = table["status"].value_counts()
    click.echo(f"{method}: " + ", ".join(f"{count} {status}" for status, count in counts.items()))


def _problem(cell: Cell) -> tuple[Problem | None, str]:
    try:
        return problems.load(cell.problem), ""
    except Unavailable as error:
        return None, str(error)


def _left_out(cell: Cell, config: Config) -> str | None:
    problem, reason = _problem(cell)
    return grid.refusal(cell, problem, config) if problem else reason


def _measure(cells: list[Cell], config: Config, work: Path, log: Path) -> dict[Cell, dict[str, Any]]:
    """Have asv measure cells; what became of each."""
    shutil.rmtree(work, ignore_errors=True)
    work = work.resolve()
    plan = Plan(config, [cell.label for cell in cells], work / "records")
    plan.write(work / "plan.json")
    plan.records.mkdir()
    with _progress(cells, plan.records):
        _run_asv(work, log)
    found = rows.AsvResults(work / "asv")
    return {cell: rows.outcome(cell, plan.records, found) for cell in cells}


def _run_asv(work: Path, log: Path) -> None:
    """asv's run command in this environment, one process a case, forked from one that has the imports done."""
    config = json.loads((paths.ROOT / "asv.conf.json").read_text())
    config |= {"results_dir": str(work / "asv"), "repo": str(paths.ROOT), "benchmark_dir": str(SUITE)}
    (work / "asv.conf.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "benchmarks.asv_standalone", str(work), "run"]
    command += ["--config", str(work / "asv.conf.json"), "--python=same", "--launch-method=forkserver"]
    command += ["--set-commit-hash", provenance().git_sha, "--show-stderr", "--bench", PIPELINE]
    environment = os.environ | {VARIABLE: str(work / "plan.json"), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=paths.ROOT, env=environment)
    if done.returncode not in (0, 2):  # 2 says that some case failed, which is a row and no failure of the shard
        raise NtkbenchError(f"asv ended with status {done.returncode}, see {log}:\n{log.read_text()[-2000:]}")


@contextlib.contextmanager
def _progress(cells: list[Cell], records: Path) -> Iterator[None]:
    """Show which execution is running and how many are done, from the records as they appear."""
    done = threading.Event()
    terminal = sys.stderr.isatty()
    total = len(cells) * len(execution.ASPECTS)
    bar = tqdm(total=total, desc=cells[0].method, unit="run", mininterval=0.5 if terminal else 20, ascii=not terminal)

    def watch() -> None:
        while not done.wait(0.5):
            begun = sorted(records.glob("*.json"), key=lambda file: file.stat().st_mtime)
            if begun:
                bar.set_postfix_str(begun[-1].stem.replace("~", " "), refresh=False)
            bar.update(max(0, len(begun) - 1 - bar.n))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
        bar.update(bar.total - bar.n)
    finally:
        done.set()
        thread.join()
        bar.close()


if __name__ == "__main__":
    main()
