"""The Makefile's commands, which are only printed."""

import os
import shutil
import subprocess

import pytest

from ntkbench import paths

NEEDED = ("Makefile", "pyproject.toml", "requirements.txt", "requirements-no-deps.txt", "requirements-docs.txt")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_targets_are_made_where_the_path_has_a_space(tmp_path):
    folder = tmp_path / "a copy"
    folder.mkdir()
    for name in NEEDED:
        shutil.copy(paths.ROOT / name, folder)
    # The tests themselves may have been started by make.
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "--dry-run", "test", "docs"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert " -m venv .venv\n" in done.stdout and "\npytest " in done.stdout and "a copy" not in done.stdout
