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
from ntkbench.data.files import DataFile
from ntkbench.errors import NtkbenchError
from ntkbench.measure import provenance
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


class Edited(NtkbenchError):
    """A file that a measurement depends on was edited during the run; what is measured is then of no version.

    Args:
        what: what is measured.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: a file that it depends on was edited during the run; start the run again")


def cell(config: Config, cell: Cell) -> str:
    """Fingerprint of a cell's row: its method, its problem, its backend, the measuring core, settings and packages.

    If this machine measures, its devices count too.

    Raises:
        Unavailable: ntkbench is not in a checkout, which holds the suite that measures cells.
    """
    paths.checkout("measuring cells")
    files = sources(*cell_roots(cell), backend=cell.backend) | _data_of_problem(cell.problem)
    files |= {SUITE, *(PACKAGE / name for name in AROUND["cell"])}
    settings = config.model_dump(mode="json", include={"device", "dtype", "threads"})
    applied = LIMITS_OF_CELLS | (LIMITS_OF_FORECASTS if config.limits.times_exact else set())
    limits = config.limits.model_dump(mode="json", include=applied)
    # With the device ``auto`` it depends on PyTorch's device whether a cell of another backend is measured.
    backends = ["torch", cell.backend] if config._here else []
    devices = [provenance.device(backend, config.device) for backend in backends]
    return _hash(files, asdict(cell), settings, limits, packages(), devices)


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
    """Fingerprint of a study's table: its file, the plug-ins that it names, their data, its settings and packages.

    A study without seconds runs on one thread, whatever its settings say.
    """
    settings = config.study(name).model_dump(mode="json")
    del settings["limits"]["problem_s"]  # of preparations, which are in no row
    if getattr(registry.of("study").get(name), "TIMED", True) is False:
        del settings["threads"]
    files = sources(*study_roots(name, settings), backend="torch") | {PACKAGE / file for file in AROUND["study"]}
    files |= {here for file in study_data(config, name) if (here := file.here())}
    return _hash(files.union(*map(_data_of_problem, _labels(settings))), name, settings, packages())


def study_data(config: Config, name: str) -> set[DataFile]:
    """Data files that a study and the problems in its settings declare."""
    settings = config.study(name).model_dump(mode="json")
    own = getattr(registry.of("study").get(name), "DATA", {})
    files = {file for word in set(_strings(settings)) & set(own) for file in own[word]}
    return files.union(*map(data_files, _labels(settings)))


def _labels(settings: Mapping[str, Any]) -> set[str]:
    """The problems in a study's settings."""
    known = problems.REGISTRY.found()
    return {text for text in _strings(settings) if text.partition("[")[0] in known}


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
    """Files that the roots import, and their own: of this package, of plug-ins outside of it, and of local modules.

    Local modules are those of :func:`ntkbench.outside.local_file`.

    Args:
        roots: names of modules.
        backend: backend whose operators are loaded by name if any operators are.
    """
    reached = _reached(roots)
    if RULES in reached:
        roots += tuple(f"{RULES}.{file.stem}" for file in registry.files(RULES))
        reached = _reached(roots)
    beside: list[Path] = []
    if any(module.startswith("ntkbench.") and not file.is_relative_to(PACKAGE) for module, file in reached.items()):
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
    here = {found for file in data_files(label) if (found := file.here())}
    return here.union(file for file in files if file.exists())


def data_files(label: str) -> tuple[DataFile, ...]:
    """Data files that a problem declares."""
    try:
        return tuple(getattr(problems.get(parse_label(label)[0]), "data", ()))
    except BrokenPlugin:  # reported where the problem is loaded
        return ()


def _hash(files: Iterable[Path], *settings: object) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, file in sorted((_name(file), file) for file in files):
        digest.update(f"{name} {of_file(file)}".encode())
    return digest.hexdigest()[:16]


def of_file(file: Path) -> str:
    """Hash of a file's content."""
    return _digest(file, *_stamp(file))


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
    """The roots and the modules that they import, directly or indirectly, with their files, except installed ones."""
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
    """The file of a module of this package, of a plug-in outside of it, or of a local module; ``None`` for others."""
    if module.partition(".")[0] != "ntkbench":
        return outside.local_file(module)
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
    """Names (modules and their members) that a file imports, except those for type checkers only."""
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
            if node.level > (package.count(".") + 1 if package else 0):
                # Within a folder of plug-ins every file counts.
                continue
            base = resolve_name("." * node.level + (node.module or ""), package)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return frozenset(found)


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
