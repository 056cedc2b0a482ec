"""The steps of the pipeline that are not measured: ``python -m ntkbench check|problem|table|list``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ntkbench import errors, grid, methods, paths, problems, results
from ntkbench.errors import Unavailable
from ntkbench.grid import Config

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
    click.echo(f"{config_file}: profile {config.profile}, {len(grid.cells(config))} cells")


@main.command()
@click.argument("label")
@click.option("--output", type=NEW, required=True)
def problem(label: str, output: Path) -> None:
    """Make a problem ready: trained weights and exact metrics, looked up or computed; its facts go to OUTPUT."""
    from ntkbench import reference

    with errors.as_one_line():
        try:
            loaded = problems.load(label)
            facts = {s: getattr(loaded, s) for s in ("N", "O", "P", "n")} | {"exact": reference.exact(loaded)}
        except Unavailable as error:
            facts = {"unavailable": str(error)}
    paths.write_atomically(output, json.dumps({"problem": label, **facts}, indent=1) + "\n")
    click.echo(f"{label}: {facts}")


@main.command()
@click.argument("shards", nargs=-1, type=FILE, required=True)
@click.option("--config", "config_file", type=FILE, required=True)
@click.option("--output", type=NEW, required=True)
def table(shards: tuple[Path, ...], config_file: Path, output: Path) -> None:
    """Put shards together as one table with one row a cell."""
    with errors.as_one_line():
        config = Config.read(config_file)
        combined = results.combine(map(results.read, shards), grid.cells(config))
    paths.write_atomically(output, combined.to_csv(index=False))
    click.echo(f"{len(combined)} cells: {combined['status'].value_counts().to_dict()}")


@main.command("list")
def list_() -> None:
    """List problems and methods."""
    for name in problems.names():
        click.echo(f"problem  {name:32} {problems.describe(name)}")
    for name in methods.names():
        method = methods.get(name)
        click.echo(f"method   {name:32} {method.kind}, {'/'.join(method.backends)}: {method.title} [{method.source}]")


if __name__ == "__main__":
    main()
