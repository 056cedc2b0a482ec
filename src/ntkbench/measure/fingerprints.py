"""Fingerprints: hashes of the source files and settings that a measurement depends on, to detect stale results.

The files are those that the process of a measurement imports: its roots, and all that these import, at the top of a
file or in a function. They are found by reading sources; nothing is imported. Modules that are loaded by name, such as
plug-ins and backends, appear in no import statement and are roots themselves.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from ntkbench import methods, outside, paths, problems, registry
from ntkbench.measure.cells import Cell
from ntkbench.measure.config import Config
from ntkbench.measure.provenance import packages
from ntkbench.problems.base import parse_label, reference, weights
from ntkbench.registry import BrokenPlugin, Fault, Source

PACKAGE = Path(__file__).parents[1]
"""The folder of the package whose files are hashed."""

SUITE = paths.ROOT / "benchmarks" / "pipeline" / "ntk.py"
"""The file that a cell's process starts from; it is not part of the package."""
CELL_ROWS = "ntkbench.measure.rows"
REPORT = "ntkbench.figures.plotting.report"
REFERENCE = "ntkbench.problems.base.reference"
AROUND = {
    "cell": ("measure/shard.py", "measure/engine.py"),
    "study": ("studies/base/runner.py",),
}
"""Files that turn a process's results into a row. Their imports, which run processes and store rows, do not count."""
LIMITS_OF_CELLS = {"time_s", "memory_mb", "block_mb", "passes"}
"""The limits that apply to cells; the others apply to problems and studies."""
LIMITS_OF_FORECASTS = {"times_exact", "patience_s"}
"""The limits that apply to cells whose costs are predicted."""

OPERATORS, RECURRENT = "ntkbench.operators", "ntkbench.operators.recurrent"
RULES = registry.PACKAGES["rule"]
"""The package that loads all plug-ins with rules by name."""
DECLARES_RECURRENCE = f"{RECURRENT}.cells"
"""Every module that declares a recurrence imports this one, and needs the operators in ``RECURRENT``."""


def cell(config: Config, cell: Cell) -> str:
    """Fingerprint of a cell's row: its method, its problem, its backend, the measuring core, settings and packages.

    Raises:
        Unavailable: ntkbench is not in a checkout, which holds the suite that measures cells.
    """
    paths.checkout("measuring cells")
    files = sources(*cell_roots(cell), backend=cell.backend) | _data_of_problem(cell.problem)
    files |= {SUITE, *(PACKAGE / name for name in AROUND["cell"])}
    settings = config.model_dump(mode="json", include={"device", "dtype", "threads"})
    applied = LIMITS_OF_CELLS | (LIMITS_OF_FORECASTS if config.limits.times_exact else set())
    limits = config.limits.model_dump(mode="json", include=applied)
    return _hash(files, asdict(cell), settings, limits, packages())


def cell_roots(cell: Cell) -> list[str]:
    """Modules that a cell's process imports by itself, and the module that makes its row."""
    return [
        *imports(SUITE.stem, SUITE),
        CELL_ROWS,
        methods.REGISTRY.module(cell.method),
        problems.module_of(cell.problem),
    ]


def problem(label: str) -> str:
    """Fingerprint of a problem's weights and exact values."""
    files = sources(problems.module_of(label), REFERENCE, backend="torch")
    return _hash(files | _data_of_problem(label), label)


def study(config: Config, name: str) -> str:
    """Fingerprint of a study's table: its file, the plug-ins that it names, their data, its settings and packages."""
    settings = config.study(name).model_dump(mode="json")
    files = sources(*study_roots(name, settings), backend="torch") | {PACKAGE / file for file in AROUND["study"]}
    known = problems.REGISTRY.found()
    words = set(_strings(settings))
    labels = {text for text in words if text.partition("[")[0] in known}
    own = getattr(registry.of("study").get(name), "DATA", {})
    files |= {here for word in words & set(own) for file in own[word] if (here := file.here())}
    return _hash(files.union(*map(_data_of_problem, labels)), name, settings, packages())


def study_roots(name: str, settings: Mapping[str, Any]) -> list[str]:
    """A study's module, the modules that it declares to load by name, and the problems and methods in its settings."""
    studies = registry.of("study")
    named = {text.partition("[")[0] for text in _strings(settings)}
    registries = (methods.REGISTRY, problems.REGISTRY)
    chosen = [plugins.module(plugin) for plugins in registries for plugin in sorted(named & set(plugins.found()))]
    return [studies.module(name), *getattr(studies.get(name), "PLUGINS", ()), *chosen]


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for pair in value.items() for part in pair for text in _strings(part))
    elif isinstance(value, list | tuple):
        yield from (text for part in value for text in _strings(part))


def figure(name: str) -> str:
    """Fingerprint of a figure and of the page that shows it, including published values."""
    files = sources(registry.of("figure").module(name), REPORT)
    plotting = PACKAGE / "figures" / "plotting"
    files |= {*plotting.glob("*.mplstyle"), plotting / "report.html"}
    if plotting / "sources.py" in files:
        files |= set(paths.PUBLISHED.glob("*.csv"))
    return _hash(files, name)


class Run:
    """Fingerprints of a run's measurements, each computed once, on first use."""

    def __init__(self, config: Config, cells: Iterable[Cell]) -> None:
        """Does not compute anything yet.

        Args:
            config: the settings. With committed tables, nothing is measured, and fingerprints are empty.
            cells: cells of the grid.
        """
        self._config, self._cells = config, tuple(cells)
        self._cell = functools.cache(functools.partial(cell, config))
        self._study = functools.cache(functools.partial(study, config))

    def cells(self, some: Iterable[Cell]) -> str:
        """Fingerprint of some cells."""
        return combined(map(self._cell, some)) if self._config.source == "measured" else ""

    def table(self, name: str) -> str:
        """Fingerprint of a study, or of the grid's ``table``."""
        if name == "table":
            return self.cells(self._cells)
        return self._study(name) if self._config.source == "measured" else ""


def combined(fingerprints: Iterable[str]) -> str:
    """One hash for several."""
    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()[:16]


def sources(*roots: str, backend: str | None = None) -> set[Path]:
    """Files of this package, and of plug-ins outside of it, that the roots import, the files of the roots included.

    Args:
        roots: names of modules.
        backend: backend whose operators are loaded by name if any operators are.
    """
    reached = _reached(roots)
    if RULES in reached:
        roots += tuple(f"{RULES}.{file.stem}" for file in registry.files(RULES))
        reached = _reached(roots)
    beside: list[Path] = []
    if any(not file.is_relative_to(PACKAGE) for file in reached.values()):
        # A plug-in outside of the package may import any file of its folder.
        beside = outside.files()
        roots += tuple(name for file in beside for name in imports("", file))
        reached = _reached(roots)
    if backend and OPERATORS in reached:
        roots += (f"{OPERATORS}.torch", f"{OPERATORS}.{backend}")  # torch certifies the products of every backend
        if DECLARES_RECURRENCE in reached:
            roots += (f"{RECURRENT}.{backend}",)
        reached = _reached(roots)
    return {*reached.values(), *beside}


def _data_of_problem(label: str) -> set[Path]:
    """Committed weights and exact values, and data files."""
    name = parse_label(label)[0]
    files = (weights.committed_file(name), reference.file_of(label, paths.REFERENCE))
    return {file for file in files if file.exists()} | _data_files(name)


def _data_files(name: str) -> set[Path]:
    """Data files that a problem declares, as far as they exist on this machine."""
    try:
        declared = getattr(problems.get(name), "data", ())
    except BrokenPlugin:  # reported where the problem is loaded
        return set()
    return {found for file in declared if (found := file.here())}


def _hash(files: Iterable[Path], *settings: object) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, file in sorted((_name(file), file) for file in files):
        digest.update(f"{name} {_digest(file, *_stamp(file))}".encode())
    return digest.hexdigest()[:16]


def _name(file: Path) -> str:
    for root in (PACKAGE, paths.ROOT):
        if file.is_relative_to(root):
            return file.relative_to(root).as_posix()
    return file.name


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@functools.cache
def _digest(file: Path, modified: int, size: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _reached(roots: Iterable[str]) -> dict[str, Path]:
    """The roots and the modules of this package that they import, directly or indirectly, with their files."""
    reached: dict[str, Path] = {}
    seen, new = {""}, set(roots)
    while new:
        module = new.pop()
        seen.add(module)
        if file := _file(module):
            reached[module] = file
            new |= {module.rpartition(".")[0], *imports(module, file)} - seen
    return reached


def _file(module: str) -> Path | None:
    """The file of a module of this package, or of a plug-in outside of it; ``None`` where there is no such module."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
        if file.is_file():
            return file
    package, _, name = module.rpartition(".")
    if package in registry.PACKAGES.values():
        for folder in outside.folders(package.rpartition(".")[2]):
            if (file := Path(folder) / f"{name}.py").is_file():
                return file
    return None


def imports(module: str, file: Path) -> frozenset[str]:
    """Names of this package (modules and their members) that a file imports, except those for type checkers only."""
    return _imports(module, file, *_stamp(file))


@functools.cache
def _imports(module: str, file: Path, modified: int, size: int) -> frozenset[str]:
    try:
        source = Source.read(file)
    except Fault:  # a process that imports this file fails
        return frozenset()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in _imported(source.tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            if node.level and not package:  # within a folder of plug-ins, where every file counts
                continue
            base = resolve_name("." * node.level + (node.module or ""), package)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return frozenset(name for name in found if name.split(".")[0] == "ntkbench")


def _imported(statements: Iterable[ast.AST]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements in some statements and, recursively, within them, except bodies of ``if TYPE_CHECKING``."""
    for node in statements:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        test = getattr(node, "test", None)
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in (
            getattr(test, "id", None),
            getattr(test, "attr", None),
        )
        for part in ("orelse", "handlers", "finalbody", "cases", *(() if checking else ("body",))):
            yield from _imported(getattr(node, part, ()))
