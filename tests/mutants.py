"""Small faults that the tests must find: ``python tests/mutants.py [NAME...]``.

Each mutant in ``mutants.yaml`` replaces a piece of source text in a copy of the tree. It is killed if one of its tests
fails. The command reports every mutant, and its exit status is 1 if one survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT_S = 600


class Mutant(NamedTuple):
    """One fault.

    Attributes:
        name: unique.
        file: path relative to the root.
        source: text that occurs in the file exactly once.
        replacement: text that replaces it.
        tests: node ids of test functions, of which at least one must fail.
        why: what would be wrong.
    """

    name: str
    file: str
    source: str
    replacement: str
    tests: tuple[str, ...]
    why: str

    def apply(self, root: Path) -> str:
        """Replace the text in a tree; returns the file's original text.

        Raises:
            ValueError: the text does not occur exactly once.
        """
        original = (root / self.file).read_text(encoding="utf-8")
        if (count := original.count(self.source)) != 1:
            raise ValueError(f"{self.name}: its source text occurs {count} times in {self.file}, not once")
        (root / self.file).write_text(original.replace(self.source, self.replacement), encoding="utf-8")
        return original


def read() -> list[Mutant]:
    """The mutants in the list."""
    listed = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return [Mutant(**entry | {"tests": tuple(entry["tests"])}) for entry in listed]


def copy_tree(root: Path) -> None:
    """Copy all files that git tracks or would track to ``root``."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, root / name)


def tests_pass(root: Path, tests: Sequence[str]) -> bool:
    """Whether tests pass in a tree; a timeout counts as a failure.

    Raises:
        RuntimeError: the tests could not be run.
    """
    # Cached bytecode is matched by the source's size and time in seconds, which a mutant may share with the original.
    environment = os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "--durations=0", *tests]
    try:
        ended = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    if ended.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with exit status {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    return ended.returncode == 0


def main(names: Sequence[str]) -> int:
    """Run the mutants of these names, or all; returns the exit status."""
    mutants = [mutant for mutant in read() if not names or mutant.name in names]
    if missing := set(names) - {mutant.name for mutant in mutants}:
        print(f"no such mutant: {', '.join(sorted(missing))}", file=sys.stderr)
        return 2
    survived = 0
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        root = Path(folder)
        copy_tree(root)
        if not tests_pass(root, sorted({test for mutant in mutants for test in mutant.tests})):
            print("the tests fail without a mutant", file=sys.stderr)
            return 2
        for mutant in mutants:
            original = mutant.apply(root)
            killed = not tests_pass(root, mutant.tests)
            (root / mutant.file).write_text(original, encoding="utf-8")
            survived += not killed
            print(f"killed    {mutant.name}" if killed else f"SURVIVED  {mutant.name}: {mutant.why}", flush=True)
    print(f"{len(mutants) - survived} of {len(mutants)} mutants killed")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
