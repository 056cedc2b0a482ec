"""The steps of the pipeline: ``python -m ntkbench check|problem|study|table|gallery|list``."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import click

from ntkbench import errors, methods, paths, problems, studies
from ntkbench.errors import Unavailable
from ntkbench.measure import cells as grid
from ntkbench.measure import fingerprints, rows, watchdog
from ntkbench.measure.config import Config
from ntkbench.measure.provenance import provenance

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
NEW = click.Path(path_type=Path)


@click.group()
def main() -> None:
    """Steps of the ntkbench pipeline."""


@main.command()
@click.argument("config_file", type=FILE)
def check(config_file: Path) -> None:
    """Refuse a configuration that cannot be run, naming file, key, value and what is allowed; else count its cells."""
    with errors.as_one_line():
        config = Config.read(config_file)
    click.echo(
        f"{config_file}: profile {config.profile}, {len(grid.cells(config))} cells, {len(config.studies)} studies"
    )


@main.command()
@click.argument("label")
@click.option("--output", type=NEW, required=True)
def problem(label: str, output: Path) -> None:
    """Make a problem ready: trained weights and exact metrics, looked up or computed; its facts go to OUTPUT."""
    from ntkbench.problems.base import reference

    with errors.as_one_line():
        try:
            loaded = problems.load(label)
            facts = {s: getattr(loaded, s) for s in ("N", "O", "P", "n")} | {"exact": reference.exact(loaded)}
        except Unavailable as error:
            facts = {"unavailable": str(error)}
    paths.write_atomically(output, json.dumps({"problem": label, **facts}, indent=1) + "\n")
    click.echo(f"{label}: {facts}")


@main.command()
@click.argument("name")
@click.option("--config", "config_file", type=FILE, required=True)
@click.option("--output", type=NEW, required=True)
def study(name: str, config_file: Path, output: Path) -> None:
    """Measure a study as the configuration has it; its table goes to OUTPUT.

    Finished rows are kept in OUTPUT.journal meanwhile, so that a study that is stopped goes on behind them. A process
    of its own measures; where a row takes it over the configuration's memory limit it ends, the row says so, and
    another one goes on with the next row.
    """
    verdict = output.with_suffix(".verdict")
    verdict.unlink(missing_ok=True)
    with errors.as_one_line():
        config = Config.read(config_file)
        if name not in config.studies:
            raise errors.unknown("study", name, config.studies)
    command = [sys.executable, "-m", "ntkbench", "study-rows", name, "--config", config_file, "--output", output]
    stopped: list[str] = []
    while code := subprocess.run([*command, *stopped]).returncode:
        if not verdict.exists():
            sys.exit(f"ntkbench: study {name} ended with exit status {code}")
        stopped = ["--stopped", verdict.read_text()]
        verdict.unlink()


@main.command(hidden=True)
@click.argument("name")
@click.option("--config", "config_file", type=FILE, required=True)
@click.option("--output", type=NEW, required=True)
@click.option("--stopped", help="the watchdog's verdict on the process before")
def study_rows(name: str, config_file: Path, output: Path, stopped: str | None) -> None:
    """Measure the rows of a study that are not in its journal; the table of all goes to OUTPUT."""
    notes = output.with_suffix(".journal")
    with errors.as_one_line():
        config = Config.read(config_file)
        chosen = config.study(name)
        made_for = {"fingerprint": fingerprints.study_fingerprint(config, name), **provenance().columns()}
        journal = studies.Journal(notes, json.dumps(made_for), json.loads(stopped) if stopped else None)
        watchdog.guard(math.inf, chosen.memory_limit_mb * 2**20, output.with_suffix(".verdict"))
        start = time.perf_counter()
        made = studies.run(name, chosen, journal)
    paths.write_atomically(output, made.to_csv(index=False, lineterminator="\n"))
    notes.unlink()
    click.echo(f"{name}: {len(made)} rows in {time.perf_counter() - start:.1f} s")


@main.command()
@click.argument("pictures", nargs=-1, type=FILE, required=True)
@click.option("--title", required=True)
@click.option("--output", type=NEW, required=True)
def gallery(pictures: tuple[Path, ...], title: str, output: Path) -> None:
    """Put PICTURES (PNG, each with a caption as .txt beside it) on one page that needs no other file."""
    from ntkbench.figures.plotting import gallery

    with errors.as_one_line():
        paths.write_atomically(output, gallery.page(pictures, title))


@main.command()
@click.argument("shards", nargs=-1, type=FILE, required=True)
@click.option("--config", "config_file", type=FILE, required=True)
@click.option("--output", type=NEW, required=True)
def table(shards: tuple[Path, ...], config_file: Path, output: Path) -> None:
    """Put shards together as one table with one row a cell."""
    with errors.as_one_line():
        config = Config.read(config_file)
        combined = rows.combine(map(rows.read, shards), grid.cells(config))
    paths.write_atomically(output, combined.to_csv(index=False))
    click.echo(f"{len(combined)} cells: {combined['status'].value_counts().to_dict()}")


@main.command("list")
def list_() -> None:
    """List problems, methods and studies."""
    for name in problems.names():
        click.echo(f"problem  {name:32} {problems.describe(name)}")
    for name in methods.names():
        method = methods.get(name)
        click.echo(f"method   {name:32} {method.kind}, {'/'.join(method.backends)}: {method.title} [{method.source}]")
    for name in studies.names():
        click.echo(f"study    {name:32} {studies.describe(name)}")
