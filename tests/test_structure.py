"""The package's structure: imports point one way, and names with underscores stay private."""

from __future__ import annotations

import ast
import graphlib

import grimp
import pytest

from ntkbench import paths
from ntkbench.measure import fingerprints
from ntkbench.registry import PACKAGES

PACKAGE = paths.ROOT / "src" / "ntkbench"

LAYERS = (
    ("ambient", "errors", "factory", "modules", "options", "outside", "paths", "progress_bar", "registry", "units"),
    ("estimate", "problem", "metrics"),
    ("operators",),
    ("layerwise", "estimators", "operations"),
    ("networks", "data"),
    ("problems",),
    ("methods",),
    ("ladder", "cost", "trials", "kernel", "kernel_file", "testing", "doctor"),
    ("stream",),
    ("api", "tracking"),
    ("measure",),
    ("studies",),
    ("figures",),
    ("readme", "run"),
    ("cli", "__main__"),
    ("",),  # ntkbench/__init__.py, which offers what is below it
)
"""Layers of packages and top-level modules, from below: each imports from its own layer and from those before it."""

UPWARD: set[tuple[str, str]] = set()
"""Known violations, to be fixed; a fixed one must be removed from here."""


def short(module: str) -> str:
    return module.removeprefix("ntkbench").removeprefix(".")


@pytest.fixture(scope="module")
def edges() -> set[tuple[str, str]]:
    """Importer and imported, imports for type checkers and those inside functions included."""
    graph = grimp.build_graph("ntkbench", cache_dir=None, exclude_type_checking_imports=False)
    return {
        (short(importer), short(imported))
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
    }


def layer(module: str) -> int:
    return next(i for i, packages in enumerate(LAYERS) if module.partition(".")[0] in packages)


def test_every_package_has_a_layer(edges):
    files = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in PACKAGE.rglob("*.py")}
    assert files - {"__init__"} == {package for packages in LAYERS for package in packages} - {""}


def test_nothing_imports_from_a_layer_above(edges):
    assert {(importer, imported) for importer, imported in edges if layer(imported) > layer(importer)} == UPWARD


def test_imports_have_no_cycles(edges):
    left = edges - UPWARD
    graph: dict[str, set[str]] = {}
    for importer, imported in left:
        graph.setdefault(importer, set()).add(imported)
    graphlib.TopologicalSorter(graph).prepare()
    packages: dict[str, set[str]] = {}
    for importer, imported in left:
        ends = importer.partition(".")[0], imported.partition(".")[0]
        if ends[0] != ends[1]:
            packages.setdefault(ends[0], set()).add(ends[1])
    graphlib.TopologicalSorter(packages).prepare()


def test_no_plug_in_imports_another(edges):
    packages = {short(package) for package in PACKAGES.values()}
    plugins = {
        f"{package}.{file.stem}"
        for package in packages
        for file in (PACKAGE / package).glob("*.py")
        if file.stem[0] != "_"
    }
    assert len(plugins) > 60
    own = {(a, b) for a, b in edges if a in plugins and b in plugins and a.partition(".")[0] == b.partition(".")[0]}
    assert own == set()


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_an_underscore_is_private_to_its_package(file):
    package = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    modules: dict[str, str] = {}  # names that stand for modules or for what is in them, and where they are from
    foreign = []
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "ntkbench"):
            assert not node.level, f"line {node.lineno}: relative import"
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                modules[alias.asname or alias.name] = path
                if short(path).split(".")[0] != package:
                    foreign += [path for part in path.split(".") if private(part)]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and private(node.attr):
            path = modules.get(node.value.id, "")
            if path and short(path).split(".")[0] != package:
                foreign.append(f"{path}.{node.attr}")
    assert foreign == []


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_fingerprints_read_the_same_imports_as_grimp():
    graph = grimp.build_graph("ntkbench", cache_dir=None, exclude_type_checking_imports=True)
    for module in graph.modules:
        parts = module.split(".")[1:]
        folder = PACKAGE.joinpath(*parts)
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        read = fingerprints.imports(module, file) & graph.modules
        packages = {name.rpartition(".")[0] for name in read}  # grimp leaves out those that an import passes through
        assert read - packages <= graph.find_modules_directly_imported_by(module) <= read, module


POSIX = {
    "os": "sched_getaffinity sched_setaffinity fork forkpty killpg getpgid getpgrp setsid setpgid getuid geteuid "
    "getgid pidfd_open pwrite pread posix_fallocate posix_fadvise sysconf uname getloadavg nice wait3 wait4 WNOHANG "
    "mkfifo memfd_create statvfs sync fdatasync chown O_DIRECTORY O_NOFOLLOW O_CLOEXEC",
    "signal": "SIGKILL SIGALRM SIGHUP SIGUSR1 SIGUSR2 SIGCHLD SIGSTOP SIGCONT SIGPIPE alarm setitimer pause sigwait",
    "select": "poll epoll kqueue POLLIN",
    "multiprocessing": "get_context set_start_method",
}
"""What Windows or macOS lack, or what depends on how the system starts processes."""

HANDLED = {
    ("src/ntkbench/ambient.py", "get_context"): "falls back",
    ("src/ntkbench/studies/kernel_in_file.py", "get_context"): "spawns, which every system does",
    ("src/ntkbench/studies/side_by_side.py", "get_context"): "the same",
    ("src/ntkbench/measure/compare.py", "killpg"): "refuses a system without fork before",
    ("src/ntkbench/measure/compare.py", "SIGKILL"): "the same",
    ("benchmarks/side.py", "fork"): "is started by the former",
    ("src/ntkbench/measure/watchdog.py", "poll"): "falls back",
    ("src/ntkbench/measure/watchdog.py", "POLLIN"): "the same",
    ("src/ntkbench/measure/watchdog.py", "pidfd_open"): "the same",
    ("src/ntkbench/measure/watchdog.py", "SIGKILL"): "is used after loading a library that only others have",
}
"""Uses that no ``hasattr`` guards, and why they need none."""


def test_names_that_only_some_systems_have_are_guarded():
    """By ``hasattr`` in the same file; a system that has the name may still refuse the call."""
    either = lambda name: name.replace("sched_get", "sched_set")  # noqa: E731 - systems have both or neither
    used = set()
    for file in (*PACKAGE.rglob("*.py"), *(paths.ROOT / "benchmarks").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
        calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr"]
        asked = {either(call.args[1].value) for call in calls if isinstance(call.args[1], ast.Constant)}
        found = [node for node in nodes if isinstance(node, ast.Attribute) and either(node.attr) not in asked]
        names = [node.attr for node in found if node.attr in POSIX.get(ast.unparse(node.value), "").split()]
        used |= {(file.relative_to(paths.ROOT).as_posix(), name) for name in names}
    assert used == set(HANDLED)
