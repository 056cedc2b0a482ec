"""The parts of an installation, and their faults."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ntkbench import ambient, operators, paths, registry
from ntkbench.errors import NtkbenchError, summary
from ntkbench.options import BACKENDS, Target
from ntkbench.problems.base import storage
from ntkbench.registry import Broken
from ntkbench.units import counted

UNDECLARED = ("jaxlib", "neural-tangents")
"""Packages that are used but not declared: jaxlib comes with jax, neural-tangents requires more than it needs."""
STORED = ("exact/*.json", "weights/*.npz")
"""Files of a store that have a checksum."""
FLOORS = "requirements-floors.txt"
"""The requirements file of the lowest allowed versions, which are not those that ntkbench is tested with by default."""


@dataclass(frozen=True)
class Package:
    """A package that ntkbench imports.

    Attributes:
        name: name under which it is installed.
        required: allowed versions, such as ``">=2.11"``; empty for any.
        needed_for: the extra that requires it; empty if the library itself does.
        installed: its version; ``None`` if it is missing.
        tested: the version that ntkbench's own tests run with; ``None`` if that is not known.
    """

    name: str
    required: str
    needed_for: str
    installed: str | None
    tested: str | None

    @property
    def fault(self) -> str | None:
        """What is wrong with it; ``None`` if it is usable, or missing and only an extra requires it."""
        from packaging.specifiers import SpecifierSet

        if self.installed is None:
            return None if self.needed_for else f"package {self.name} is missing"
        if not SpecifierSet(self.required).contains(self.installed, prereleases=True):
            return f"package {self.name} is {self.installed}, and must be {self.required}"
        return None

    def __str__(self) -> str:
        same = self.installed and self.installed.partition("+")[0] == self.tested
        tested = f"tested with {self.tested}" if self.tested and not same else ""
        notes = "; ".join(filter(None, (self.required, tested, self.needed_for and f"for {self.needed_for}")))
        return f"{self.name} {self.installed or 'missing'}" + (f" ({notes})" if notes else "")


@dataclass(frozen=True)
class Store:
    """A folder of weights and exact values.

    Attributes:
        folder: where it is.
        files: number of files.
        size: total bytes.
        faults: a line for each damaged file.
    """

    folder: Path
    files: int
    size: int
    faults: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.folder}: {counted(self.files, 'file')}, {self.size / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Diagnosis:
    """The result of :func:`diagnose`.

    Attributes:
        version: of ntkbench.
        root: the checkout.
        commit: of the checkout; ``None`` without git.
        changed: files of the checkout that differ from the commit.
        python: version of the interpreter.
        cores: processor cores that this process may use, and those of the machine.
        threads: ``$OMP_NUM_THREADS``; ``None`` if it is not set.
        devices: device of each backend, or why it has none.
        packages: packages that ntkbench imports.
        stores: committed weights and exact values, and the cache.
        plugins: for each kind, the number that work, or why none can.
        broken: plug-ins that do not work.
    """

    version: str
    root: Path
    commit: str | None
    changed: tuple[str, ...]
    python: str
    cores: tuple[int, int]
    threads: str | None
    devices: dict[str, str]
    packages: tuple[Package, ...]
    stores: tuple[Store, ...]
    plugins: dict[str, int | str]
    broken: tuple[Broken, ...]

    @property
    def faults(self) -> list[str]:
        """A line for each fault."""
        of_packages = [package.fault for package in self.packages if package.fault]
        return [*of_packages, *(fault for store in self.stores for fault in store.faults), *map(str, self.broken)]

    def lines(self) -> Iterator[str]:
        """Lines of the report; the faults come last."""
        yield f"ntkbench {self.version} in {self.root}, Python {self.python}"
        state = counted(len(self.changed), "changed file") if self.changed else "clean"
        yield f"git: {self.commit}, {state}" if self.commit else "git: none"
        yield f"cores: {self.cores[0]} of {self.cores[1]}; OMP_NUM_THREADS: {self.threads or 'not set'}"
        yield from (f"{backend}: {device}" for backend, device in self.devices.items())
        yield from (f"package {package}" for package in self.packages)
        yield from (f"store {store}" for store in self.stores)
        yield from (f"plug-ins, {kind}: {count}" for kind, count in self.plugins.items())
        yield from (f"BROKEN: {fault}" for fault in self.faults)
        if not self.faults:
            yield "nothing is broken"


def diagnose() -> Diagnosis:
    """Inspect the installation. Imports every backend and every plug-in, and reads every stored file."""
    plugins, broken = _plugins()
    changes = paths.git("status", "--porcelain") or ""
    return Diagnosis(
        version=_version("ntkbench") or "(not installed)",
        root=paths.ROOT,
        commit=paths.git("rev-parse", "HEAD"),
        changed=tuple(line.split(maxsplit=1)[1] for line in changes.splitlines()),
        python=platform.python_version(),
        cores=(ambient.cores(), os.cpu_count() or 1),
        threads=os.environ.get("OMP_NUM_THREADS"),
        devices={backend: _device(backend) for backend in BACKENDS},
        packages=tuple(_packages()),
        stores=(_store(paths.REFERENCE), _store(paths.cache())),
        plugins=plugins,
        broken=tuple(broken),
    )


def _plugins() -> tuple[dict[str, int | str], list[Broken]]:
    plugins: dict[str, int | str] = {}
    broken = registry.entry_points()
    for kind in registry.PACKAGES:
        try:
            registered = registry.of(kind)
        except ImportError as error:  # an extra is missing
            plugins[kind] = summary(error)
            continue
        plugins[kind] = len(registered.names())
        broken += registered.broken()
    return plugins, broken


def _device(backend: str) -> str:
    try:
        return operators.device_name(Target(backend))
    except Exception as error:
        return summary(error)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Package]:
    """The declared packages, each with the first extra that requires it."""
    from packaging.requirements import Requirement

    tested, seen = _tested(), set()
    for needed_for, lines in {**_declared(), "JAX methods": UNDECLARED}.items():
        for requirement in map(Requirement, lines):
            name = requirement.name.lower()
            if name not in seen:
                seen.add(name)
                yield Package(name, str(requirement.specifier), needed_for, _version(name), tested.get(name))


def _declared() -> Mapping[str, Sequence[str]]:
    """Requirements of the library (the empty key) and of its extras: the checkout's, else the installed package's."""
    try:
        project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return {"": project["dependencies"], **project["optional-dependencies"]}
    except (OSError, KeyError):
        pass
    declared: dict[str, list[str]] = {"": []}
    try:
        for line in importlib.metadata.requires("ntkbench") or []:
            extra = line.partition("extra == ")[2].strip("\"' ")
            declared.setdefault(extra, []).append(line.partition(";")[0])
    except importlib.metadata.PackageNotFoundError:
        pass
    return declared


def _tested() -> dict[str, str]:
    """Pinned versions in the checkout's requirements files, except :data:`FLOORS`."""
    lines = (
        line
        for file in sorted(paths.ROOT.glob("requirements*.txt"))
        if file.name != FLOORS
        for line in file.read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    )
    pairs = (line.split("==", 1) for line in lines)
    return {name.strip().lower(): version.split()[0] for name, version in pairs}


def _store(folder: Path) -> Store:
    files = [file for pattern in STORED for file in sorted(folder.glob(pattern))]
    return Store(folder, len(files), sum(file.stat().st_size for file in files), tuple(_damage(files)))


def _damage(files: list[Path]) -> Iterator[str]:
    for file in files:
        try:
            storage.parse(file)
        except NtkbenchError as error:
            yield str(error)
