"""Published values of the papers, for overlays in figures; see ``results/reference/published/README.md``."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ntkbench import paths
from ntkbench.errors import BadInput
from ntkbench.figures.plotting.claims import Claim

MARK: dict[str, Any] = {
    "marker": "x",
    "markersize": 5.0,
    "markeredgewidth": 1.1,
    "linestyle": (0, (1, 1.2)),
    "linewidth": 1.0,
}
"""Style of published values: crosses on a dotted line, in the colour of the corresponding measured values."""

HAZELDEN = {
    "hutchpp_paper": "hutch++",
    "one_sided_paper_reverse": "one-sided reverse",
    "one_sided_paper_forward": "one-sided forward",
}
"""Methods, and their names in the figures of Hazelden's paper."""


def values(file: str, **chosen: Any) -> pd.DataFrame:
    """Rows of a file of published values in which columns have these values.

    Raises:
        BadInput: there is no such file.
        Unavailable: ntkbench is not in a checkout, where these files are.
    """
    paths.checkout("a figure with published values")
    path = paths.PUBLISHED / f"{file}.csv"
    if not path.exists():
        there = ", ".join(sorted(other.stem for other in paths.PUBLISHED.glob("*.csv")))
        raise BadInput(f"no published values {file!r} in {paths.PUBLISHED}; there: {there or 'none'}")
    table = pd.read_csv(path)
    for column, value in chosen.items():
        table = table[table[column] == value]
    return table.reset_index(drop=True)


def not_addressed(figure: str) -> list[Claim]:
    """Claims of a figure that nothing here tests; none outside of a checkout."""
    if not paths.IN_CHECKOUT:
        return []
    return [
        Claim(
            source=row.source,
            name=row.name,
            statement=row.statement,
            published=row.published,
            accuracy=row.accuracy,
            there=row.setting,
            addressed=False,
            note=row.reason,
        )
        for row in values("not_addressed", figure=figure)
        .fillna({"accuracy": "", "setting": ""})
        .itertuples(index=False)
    ]
