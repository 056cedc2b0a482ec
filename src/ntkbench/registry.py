"""Plug-ins: every ``.py`` file in the folder of a kind, such as ``methods/``, is one, found by its name.

Names are found by reading source, without importing anything. A plug-in is imported alone, when it is requested. A file
that cannot be used becomes a :class:`Broken` record, and raises an error only if it is requested. Sub-packages
(``base/``) hold shared code and are not plug-ins. A file whose name begins with an underscore counts as broken, since
it would be neither.

Plug-ins may also lie outside this package, see :mod:`ntkbench.outside`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from ntkbench import outside, paths
from ntkbench.errors import BadInput, summary, unknown

PACKAGES = {
    "method": "ntkbench.methods",
    "problem": "ntkbench.problems",
    "study": "ntkbench.studies",
    "figure": "ntkbench.figures",
    "rule": "ntkbench.layerwise.rules",
}
"""Kinds of plug-ins, and the package with the files of each."""

T = TypeVar("T")


@dataclass(frozen=True)
class Broken:
    """A plug-in that cannot be used.

    Attributes:
        kind: a key of :data:`PACKAGES`.
        name: name of the plug-in, or of its file if the name is not known.
        file: path of the file.
        line: line of the fault; 1 if it is not known.
        reason: one line.
    """

    kind: str
    name: str
    file: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} is broken: {self.file}:{self.line}: {self.reason}"


class BrokenPlugin(BadInput):
    """A requested plug-in cannot be used; ``broken`` says why."""

    def __init__(self, broken: Broken) -> None:
        super().__init__(str(broken))
        self.broken = broken


class Fault(Exception):
    """A fault of a plug-in file; raised by the function that checks the file."""

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.reason, self.line = reason, line


@dataclass(frozen=True)
class Source:
    """The source of a plug-in file."""

    file: Path
    tree: ast.Module

    @classmethod
    def read(cls, file: Path) -> Source:
        """Read and parse a file; an unchanged file is parsed only once.

        Raises:
            Fault: it cannot be read, is not UTF-8 or not Python, or is empty.
        """
        try:
            status = file.stat()
        except OSError as error:
            raise Fault(f"cannot be read: {error.strerror}") from None
        return _read(file, status.st_mtime_ns, status.st_size)

    def line(self, name: str, attribute: str | None = None) -> int:
        """The line that binds a name, or an attribute in the body of the class of that name; 1 if there is none."""
        node = self._bound.get(name)
        if attribute is not None and isinstance(node, ast.ClassDef):
            node = dict(_bindings(node.body)).get(attribute, node)
        return node.lineno if node else 1

    def binds(self, name: str) -> bool:
        """Whether the file binds a name at its top level."""
        return name in self._bound or "*" in self._bound

    def literal(self, name: str) -> Any:
        """The value that the file assigns to a name, read without importing it; ``None`` if it assigns none.

        Raises:
            Fault: the value is not written out as a literal.
        """
        node = self._bound.get(name)
        if node is None:
            return None
        try:
            return ast.literal_eval(node.value)  # type: ignore[attr-defined]
        except (ValueError, AttributeError):
            raise Fault(f"{name} must be written out as a literal", node.lineno) from None

    def line_of(self, error: BaseException) -> int | None:
        """The last line of this file that an exception passed through; ``None`` if it passed through none."""
        if isinstance(error, SyntaxError) and error.filename and Path(error.filename) == self.file:
            return error.lineno
        line, frame = None, error.__traceback__
        while frame:
            line = frame.tb_lineno if Path(frame.tb_frame.f_code.co_filename) == self.file else line
            frame = frame.tb_next
        return line

    def raises(self, error: BaseException) -> bool:
        """Whether an exception comes from a ``raise`` statement of this file."""
        line = self.line_of(error)
        statements = (node for node in ast.walk(self.tree) if isinstance(node, ast.Raise))
        return line is not None and any(node.lineno <= line <= (node.end_lineno or line) for node in statements)

    @functools.cached_property
    def _bound(self) -> dict[str, ast.stmt]:
        return dict(_bindings(self.tree.body))


@functools.cache
def _read(file: Path, modified: int, size: int) -> Source:
    try:
        data = file.read_bytes()
        tree = ast.parse(data.decode("utf-8-sig"), str(file))
    except OSError as error:
        raise Fault(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Fault("is not UTF-8", 1 + data[: error.start].count(b"\n")) from None
    except SyntaxError as error:
        raise Fault(f"{type(error).__name__}: {error.msg}", error.lineno or 1) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise Fault(f"cannot be parsed: {summary(error)}") from None
    if not tree.body:
        raise Fault("is empty")
    return Source(file, tree)


def _bindings(body: Iterable[ast.AST]) -> Iterator[tuple[str, ast.stmt]]:
    """Names that statements bind, each with its statement, including blocks such as ``if`` and ``try``."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node
            case ast.Import() | ast.ImportFrom():
                yield from ((alias.asname or alias.name.partition(".")[0], node) for alias in node.names)
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = (leaf for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name))
                yield from ((leaf.id, node) for leaf in names if isinstance(leaf.ctx, ast.Store))
            case _:
                for block in ("body", "handlers", "orelse", "finalbody"):
                    yield from _bindings(getattr(node, block, ()))


def files(package: str) -> list[Path]:
    """The plug-in files of a package, sorted by name; imports neither the files nor the package."""
    found = (file for folder in _folders(package) for file in sorted(Path(folder).glob("*.py")) if not file.is_dir())
    return [file for file in found if not file.name.startswith((".", "__"))]


def _folders(package: str) -> list[str]:
    module = sys.modules.get(package)
    if module is not None:
        return list(module.__path__)
    own = Path(__file__).parent.joinpath(*package.split(".")[1:])  # find_spec would import the packages above it
    return list(dict.fromkeys([str(own), *_outside(package)]))


def use(folders: Sequence[str]) -> None:
    """Use plug-ins from further folders, in this process and in those that it starts.

    Raises:
        BadInput: as :func:`ntkbench.outside.add`; nothing changes then.
    """
    outside.add(folders)
    for package in PACKAGES.values():
        if package in sys.modules:
            _extend(package)


def _extend(package: str) -> None:
    """Let a package find plug-ins outside of it; its own come first."""
    module = sys.modules[package]
    assert module.__file__ is not None
    module.__path__[:] = [str(Path(module.__file__).parent), *_outside(package)]


def _outside(package: str) -> list[str]:
    return outside.folders(package.rpartition(".")[2])


def _state() -> tuple[Any, ...]:
    """State of all folders of plug-ins: equal as long as no file is added, changed or removed."""
    state: list[Any] = []
    for package in PACKAGES.values():
        state += [package, package in sys.modules]
        for folder in _folders(package):
            state.append(folder)
            with contextlib.suppress(OSError), os.scandir(folder) as entries:  # it may have been removed
                state += sorted((e.path, *_stamp(e)) for e in entries if e.name != "__pycache__")
    return tuple(state)


def _stamp(entry: os.DirEntry[str]) -> tuple[int, int]:
    """Modification time and size of a file; zeros for a dangling link."""
    try:
        status = entry.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


@dataclass(frozen=True)
class _Entry:
    name: str
    file: Path
    line: int


def one_a_file(source: Source) -> Mapping[str, int]:
    """The plug-in of a file that holds exactly one: the name of the file, on line 1."""
    return {source.file.stem: 1}


class Registry(Generic[T]):
    """The plug-ins of one kind."""

    def __init__(
        self,
        kind: str,
        check: Callable[[Source, ModuleType, str], T],
        find: Callable[[Source], Mapping[str, int]] = one_a_file,
    ) -> None:
        """Does not read any file yet.

        Args:
            kind: a key of :data:`PACKAGES`.
            check: takes a file's source, its module, and the name of a plug-in in it; returns the plug-in, or raises
                :class:`Fault`. Any other exception counts as a fault as well.
            find: takes a file's source; returns the names of its plug-ins with their lines, or raises :class:`Fault`
                for faults that show without importing the file.
        """
        self.kind, self.package = kind, PACKAGES[kind]
        _extend(self.package)
        self._check, self._find = check, find
        self._loaded: dict[str, T] = {}
        self._failed: dict[tuple[_Entry, int], Broken] = {}
        self._indexed: tuple[Any, dict[str, _Entry], list[Broken]] | None = None

    def found(self) -> list[str]:
        """Names of the plug-ins whose source shows no fault, sorted; imports none of them."""
        return sorted(self._index()[0])

    def names(self) -> list[str]:
        """Names of the plug-ins that work, sorted; imports all of them."""
        return self._tried()[0]

    def broken(self) -> list[Broken]:
        """The plug-ins that do not work, by file and line; imports all of them."""
        return self._tried()[1]

    def get(self, name: str) -> T:
        """The plug-in with a name; imports only its file.

        Raises:
            BrokenPlugin: it cannot be used; names file and line.
            BadInput: there is no plug-in with this name.
        """
        if name not in self._loaded:
            entry = self._entry(name)
            key = (entry, entry.file.stat().st_mtime_ns)
            if key in self._failed:
                raise BrokenPlugin(self._failed[key])
            try:
                self._loaded[name] = self._load(entry)
            except BrokenPlugin as error:
                self._failed[key] = error.broken
                raise
        return self._loaded[name]

    def file(self, name: str) -> Path:
        """The file that holds a plug-in; does not import it.

        Raises:
            BrokenPlugin, BadInput: as :meth:`get`, for faults that show without an import.
        """
        return self._entry(name).file

    def module(self, name: str) -> str:
        """Import name of :meth:`file`."""
        return f"{self.package}.{self.file(name).stem}"

    def _tried(self) -> tuple[list[str], list[Broken]]:
        entries, seen = self._index()
        names, broken = [], [*seen]
        for name in sorted(entries):
            try:
                self.get(name)
                names.append(name)
            except BrokenPlugin as error:
                broken.append(error.broken)
        return names, sorted(broken, key=lambda one: (one.file, one.line, one.name))

    def _entry(self, name: str) -> _Entry:
        entries, broken = self._index()
        if name in entries:
            return entries[name]
        for one in broken:
            if one.name == name:
                raise BrokenPlugin(one)
        hint = f"; broken: {', '.join(f'{one.file.name}:{one.line}' for one in broken)}" if broken else ""
        raise BadInput(f"{unknown(self.kind, name, entries)}{hint}")

    def _index(self) -> tuple[dict[str, _Entry], list[Broken]]:
        """Plug-ins by name, and those with visible faults; read again only when files have changed."""
        state = _state()
        if self._indexed is None or self._indexed[0] != state:
            self._indexed = state, *self._read()
        return self._indexed[1:]

    def _read(self) -> tuple[dict[str, _Entry], list[Broken]]:
        claims: dict[str, list[_Entry]] = {}
        broken = []
        first: dict[str, Path] = {}
        for file in files(self.package):
            try:
                if (taken := first.setdefault(file.stem, file)) != file:
                    raise Fault(f"the file name is taken by {taken}")
                self._check_name(file)
                for name, line in self._find(Source.read(file)).items():
                    claims.setdefault(name, []).append(_Entry(name, file, line))
            except Fault as fault:
                broken.append(Broken(self.kind, file.stem, file, fault.line, fault.reason))
        for name, entries in claims.items():
            if len(entries) > 1:  # plug-ins of ntkbench itself keep their names
                entries.sort(key=lambda entry: not paths.git("ls-files", "--error-unmatch", str(entry.file)))
                reason = f"the name {name!r} is taken by {entries[0].file}:{entries[0].line}"
                broken += [Broken(self.kind, name, other.file, other.line, reason) for other in entries[1:]]
        return {name: entries[0] for name, entries in claims.items()}, broken

    def _check_name(self, file: Path) -> None:
        """Check that a file's name can be that of a plug-in.

        Raises:
            Fault: it cannot, or it would hide a name of the package.
        """
        name = file.stem
        if not (name.isidentifier() and name.isascii()) or name.startswith("_"):
            raise Fault(f"{name!r} is not a valid plug-in name; use letters, digits and underscores, a letter first")
        there = getattr(sys.modules.get(self.package), name, None)
        hides = there is not None and getattr(there, "__file__", None) != str(file)
        if hides or (file.with_suffix("") / "__init__.py").exists():
            raise Fault(f"the name {name!r} is taken by {self.package}.{name}")

    def _load(self, entry: _Entry) -> T:
        """Import and check a plug-in, whatever its file does.

        Raises:
            BrokenPlugin: it cannot be used.
        """
        source, doing = Source.read(entry.file), "imported"
        try:
            module = importlib.import_module(f"{self.package}.{entry.file.stem}")
            doing = "used"
            return self._check(source, module, entry.name)
        except Fault as fault:
            line, reason = fault.line, fault.reason
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and not source.raises(error):
                raise  # from the user
            line, reason = source.line_of(error) or entry.line, f"cannot be {doing}: {summary(error)}"
        raise BrokenPlugin(Broken(self.kind, entry.name, entry.file, line, reason))


def first_line(plugin: object) -> str:
    """First line of the docstring of a plug-in; empty if it has none."""
    return (inspect.getdoc(plugin) or "").partition("\n")[0]


def of(kind: str) -> Registry[Any]:
    """The plug-ins of a kind; imports their package, but no plug-in."""
    return importlib.import_module(PACKAGES[kind]).REGISTRY


def entry_points() -> list[Broken]:
    """The entry points of installed packages that cannot be used."""
    said = "the entry point's value {!r} must be an installed package, without dots"
    return [
        Broken("entry point", name, Path(value), 1, said.format(value)) for name, value in outside.entry_points()[1]
    ]


def broken() -> list[Broken]:
    """Every plug-in that does not work; imports all of them."""
    return [*entry_points(), *(one for kind in PACKAGES for one in of(kind).broken())]


outside.add([])  # makes the folders that the environment names absolute
