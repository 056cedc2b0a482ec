"""Committed tables: all rows of a table come from one commit without uncommitted changes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from conftest import mostly_slow
from PIL import Image

from ntkbench import figures
from ntkbench.figures.plotting import files
from ntkbench.measure.timings import COMMITTED
from ntkbench.paths import PUBLISHED, REFERENCE

TABLES = {
    str(path.relative_to(REFERENCE)): path
    for path in sorted(REFERENCE.rglob("*.csv"))
    if path.parent not in (PUBLISHED, REFERENCE) and path.name != COMMITTED  # timings of the steps of a run
}


IN_PARTS = {
    "calibration/studies/calibration.csv": "problems were added, or measured again after a fault was mended"
}
"""Tables whose rows come from several clean commits, and why."""


def violations(rows: pd.DataFrame) -> set[str]:
    rows = rows[["git_sha", "git_dirty"]]
    found = {
        "rows without a commit": rows.isna().to_numpy().any(),
        "more than one commit": rows["git_sha"].nunique() > 1,
        "uncommitted changes": (rows["git_dirty"].astype(str) != "False").any(),
    }
    return {name for name, wrong in found.items() if wrong}


def test_there_are_committed_tables():
    assert len(TABLES) > 20


@pytest.mark.parametrize("name", TABLES)
def test_a_table_comes_from_one_clean_commit(name):
    found = violations(pd.read_csv(TABLES[name], low_memory=False))
    assert found == ({"more than one commit"} if name in IN_PARTS else set())


PICTURES = [path for path in REFERENCE.glob("*/*.png") if path.stem in figures.names()]
PICTURES.sort(key=lambda path: (path.stat().st_size, path))  # the quickest one first


@pytest.mark.parametrize("picture", mostly_slow(PICTURES, 1), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_committed_picture_is_that_of_the_committed_table(picture, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "METADATA", {"png": files.METADATA["png"]})  # no PDF
    table = files.read(figures.table_of(picture.stem, picture.parent))
    figures.draw(picture.stem, table, tmp_path)
    made, committed = (
        np.asarray(Image.open(folder / picture.name).convert("L"), float) for folder in (tmp_path, picture.parent)
    )
    same = made.shape == committed.shape and np.abs(made - committed).mean() < 0.3
    assert same, f"`ntkbench report {picture.parent} --output new/report.html` redraws it, in new/figures"


def test_rows_of_two_commits_or_of_none_are_noticed():
    rows = pd.DataFrame({"git_sha": ["a", "b"], "git_dirty": [False, True]})
    assert violations(rows) == {"more than one commit", "uncommitted changes"}
    assert violations(rows.assign(git_sha=None, git_dirty=False)) == {"rows without a commit"}
