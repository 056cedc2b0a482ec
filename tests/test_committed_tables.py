"""Committed tables: the numbers of one profile are of one commit, without uncommitted changes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from ntkbench.measure.timings import COMMITTED
from ntkbench.paths import PUBLISHED, REFERENCE

PROFILES: dict[str, list[Path]] = {}
for path in sorted(REFERENCE.rglob("*.csv")):
    if path.parent not in (PUBLISHED, REFERENCE) and path.name != COMMITTED:  # where the time of that run went
        PROFILES.setdefault(path.relative_to(REFERENCE).parts[0], []).append(path)


def violations(profile: str) -> set[str]:
    tables = (pd.read_csv(path, low_memory=False) for path in PROFILES[profile])
    rows = pd.concat([table[["git_sha", "git_dirty"]] for table in tables])
    found = {
        "rows without a commit": rows.isna().to_numpy().any(),
        "more than one commit": rows["git_sha"].nunique() > 1,
        "uncommitted changes": (rows["git_dirty"].astype(str) != "False").any(),
    }
    return {name for name, wrong in found.items() if wrong}


def test_there_are_committed_tables():
    assert len(PROFILES["default"]) > 10


@pytest.mark.parametrize("profile", PROFILES)
def test_the_tables_of_a_profile_are_of_one_clean_commit(profile):
    assert violations(profile) == set()
