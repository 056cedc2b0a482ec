"""Documentation pages: their code blocks, and how to run them."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page: Path) -> list[str]:
    """The blocks of a page that are marked ``python``. Those marked ``py`` are shown and not run."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(page: Path, names: dict[str, Any]) -> str:
    """Run the examples of a page in order with common names; returns the reports of failures, empty if all pass."""
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    parser = doctest.DocTestParser()
    for number, block in enumerate(blocks(page)):
        test = parser.get_doctest(block, names, f"{page.name}, block {number}", str(page), None)
        test.globs = names  # not a copy: later blocks use what earlier ones made
        runner.run(test, out=said.append, clear_globs=False)
    return "".join(said)
