"""``python -m ntkbench.figures TABLE... --out FOLDER [--only NAME]...``"""

from __future__ import annotations

from pathlib import Path

import click

from ntkbench import errors, figures
from ntkbench.measure.outcomes import OK

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("tables", metavar="TABLE...", nargs=-1, required=True, type=FILE)
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for the figures.")
@click.option("--only", metavar="NAME", multiple=True, help="Draw this figure; may be given more than once.")
def main(tables: tuple[Path, ...], out: Path, only: tuple[str, ...]) -> None:
    """Draw the figures of tables: table.csv is the results table, NAME.csv that of the study NAME.

    A figure that cannot be drawn gets a picture with the reason, and the command goes on to the next one.
    """
    given = {table.stem: table for table in tables}
    with errors.as_one_line():
        sources = {name: figures.study_of(name) or "table" for name in only or figures.names()}
        if missing := [f"{name} is drawn from {sources[name]}.csv" for name in only if sources[name] not in given]:
            raise errors.BadInput(f"no such table was given: {'; '.join(missing)}")
    made = figures.draw_all({name: given[table] for name, table in sources.items() if table in given}, out)
    for name, outcome in made.items():
        if outcome.status == OK:
            click.echo(out / f"{name}.png")
    for name, outcome in made.items():
        if outcome.status != OK:
            click.echo(f"ntkbench: figure {name} could not be drawn: {outcome.reason}", err=True)


if __name__ == "__main__":
    main(prog_name="python -m ntkbench.figures")
