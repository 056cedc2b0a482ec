"""Fingerprints: hashes of all that a rule depends on, sources among them, so that nothing stale passes as fresh."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ntkbench import paths, problems, studies
from ntkbench.measure.cells import Cell
from ntkbench.measure.config import Config

SUITE = paths.ROOT / "benchmarks"


def cell(config: Config, cell: Cell) -> str:
    """Hash of all that a cell's row depends on: its settings and every source file that measuring it imports."""
    settings = [config.device, config.dtype, config.threads, config.limits.model_dump(), asdict(cell)]
    files = {Path(problems.source_file(cell.problem)), *SUITE.glob("*.py")}
    files |= sources(f"ntkbench.methods.{cell.method}", "ntkbench.measure.execution", "ntkbench.measure.rows")
    return _hash(files, json.dumps(settings))


def problem(label: str) -> str:
    """Hash of all that a problem's weights and exact values depend on."""
    return _hash({Path(problems.source_file(label))} | sources("ntkbench.problems.base.reference"), label)


def study(config: Config, name: str) -> str:
    """Hash of all that a study's numbers depend on: its settings and every source file it can reach."""
    return _hash(sources(*studies.plugins_of(name)), config.study(name).model_dump_json())


def figure(name: str) -> str:
    """Hash of all that a figure's looks depend on, published values among it."""
    files = sources(f"ntkbench.figures.{name}", "ntkbench.figures.plotting.base")
    files |= {*Path(__file__).parents[1].glob("figures/plotting/*.*"), *paths.PUBLISHED.glob("*.csv")}
    return _hash({file for file in files if file.is_file()}, name)


def combined(fingerprints: Iterable[str]) -> str:
    """One hash for several."""
    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()[:16]


def _hash(files: Iterable[Path], settings: str) -> str:
    digest = hashlib.sha256(settings.encode())
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def sources(*modules: str) -> set[Path]:
    """Files of this package that modules import, at the top or in a function, directly or not; their own among them.

    The plug-in rooms load their files by name, which no import statement shows; the backends' operators are among what
    every method reaches, and the other problems and methods are not.
    """
    graph = _imports()
    roots = {*modules, *graph.find_children("ntkbench.operators")}
    reached = roots.union(*(graph.find_upstream_modules(root) for root in roots))
    folder = Path(__file__).parents[1]
    paths = (folder.joinpath(*name.split(".")[1:]) for name in reached)
    return {path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in paths}


@functools.cache
def _imports() -> Any:
    import grimp

    return grimp.build_graph("ntkbench", cache_dir=None)
