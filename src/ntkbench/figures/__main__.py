"""``python -m ntkbench.figures NAME... --table T.csv --out FOLDER``"""

from __future__ import annotations

from pathlib import Path

import click
import pandas as pd

from ntkbench import figures
from ntkbench.errors import NtkbenchError


@click.command()
@click.argument("chosen", metavar="NAME...", nargs=-1)
@click.option(
    "--table", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Tidy table."
)
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for the figures.")
def main(chosen: tuple[str, ...], table: Path, out: Path) -> None:
    """Draw figures from their table: the results table, or that of their study.

    All figures of the results table if no NAME is given.
    """
    try:
        rows = pd.read_csv(table, low_memory=False)
        for name in chosen or [name for name in figures.names() if figures.study_of(name) is None]:
            for path in figures.draw(name, rows, out):
                click.echo(path)
    except pd.errors.EmptyDataError:
        raise click.ClickException(f"{table} is empty, without even a header") from None
    except NtkbenchError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main(prog_name="python -m ntkbench.figures")
