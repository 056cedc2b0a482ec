"""Folders of plug-ins outside ntkbench: those that the environment names, and those of installed packages.

Such a folder has at least one of the folders ``methods/``, ``problems/``, ``studies/``, ``figures/`` and ``rules/``.
The environment variable ``NTKBENCH_PLUGINS`` lists folders; installed packages are named by an entry point in the group
``ntkbench.plugins``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from ntkbench.errors import BadInput

VARIABLE = "NTKBENCH_PLUGINS"
"""Environment variable with folders of plug-ins, separated as in ``PATH``."""
GROUP = "ntkbench.plugins"
"""Group of the entry points whose values are packages with plug-ins."""
FOLDERS = ("methods", "problems", "studies", "figures", "rules")
"""Folders with the plug-ins of each kind."""
MOST_FILES = 1000
"""Maximum number of Python files in a folder of plug-ins; a folder with more also holds other code."""
INSTALLED = {"site-packages", "dist-packages"}
"""Names of folders with installed packages, of the user or of the system."""


def folders(name: str) -> list[str]:
    """Folders with the plug-ins of one kind; if two have a file of the same name, the first one counts.

    Args:
        name: one of :data:`FOLDERS`.

    Raises:
        BadInput: as :func:`roots`.
    """
    return [str(root / name) for root in roots() if (root / name).is_dir()]


def roots() -> list[Path]:
    """The folders that the environment names, then those of installed packages, with links resolved.

    Raises:
        BadInput: the environment names a folder that is missing, or has none of :data:`FOLDERS`.
    """
    return list(dict.fromkeys([*_named([]), *entry_points()[0]]))


def add(further: Sequence[str]) -> None:
    """Add folders to the environment of this process and of those that it starts.

    Raises:
        BadInput: as :func:`roots`; the environment is then unchanged.
    """
    if named := _named(further):
        # Absolute, since cells run in folders of their own.
        os.environ[VARIABLE] = os.pathsep.join(map(str, named))


def files() -> list[Path]:
    """All Python files of the folders, which plug-ins there may import.

    Virtual environments, hidden files and folders, and ntkbench itself are left out.

    Raises:
        BadInput: as :func:`roots`, or there are more than :data:`MOST_FILES`.
    """
    found: list[Path] = []
    for root in roots():
        for folder, below, names in os.walk(root):
            below[:] = [name for name in below if _may_hold_plugins(os.path.join(folder, name), name)]
            candidates = (Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("."))
            found += [file for file in candidates if file.is_file()]
            if len(found) > MOST_FILES:
                raise BadInput(f"{root} has more than {MOST_FILES} Python files; name a folder of plug-ins only")
    return sorted(found)


@functools.cache
def entry_points() -> tuple[list[Path], list[tuple[str, str]]]:
    """Folders of the packages that entry points name, and the name and value of each entry point that names none.

    No package is imported.
    """
    found: list[Path] = []
    wrong = []
    for point in importlib.metadata.entry_points(group=GROUP):
        spec = None
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(point.value) if point.value.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            wrong.append((point.name, point.value))
        else:
            found += [Path(folder).resolve() for folder in spec.submodule_search_locations]
    return found, wrong


def is_local(path: Path) -> bool:
    """Whether a file or folder belongs neither to ntkbench, nor to Python, nor to an installed package."""
    path = path.resolve()
    if INSTALLED & set(path.parts):
        return False
    places = sysconfig.get_paths()
    others = [Path(__file__).parent, *(Path(places[kind]) for kind in ("stdlib", "purelib", "platlib"))]
    return not any(path.is_relative_to(folder.resolve()) for folder in others)


def local_file(module: str) -> Path | None:
    """The file of a module that is neither installed nor a part of ntkbench or Python; ``None`` for others.

    It is looked for where Python would look, and no module is imported.
    """
    top, *below = module.split(".")
    own, folders = _local(top)
    if not below:
        return own
    paths = [folder.joinpath(*below) for folder in folders]
    files = [file for path in paths for file in (path / "__init__.py", path.with_name(f"{path.name}.py"))]
    return next((file for file in files if file.is_file()), None)


@functools.cache
def _local(top: str) -> tuple[Path | None, list[Path]]:
    """The file of a module without dots and the folders with its submodules, if it is local."""
    spec = None
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec(top)
    if spec is None:
        return None, []
    own = Path(spec.origin) if spec.origin and Path(spec.origin).is_file() else None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    places = [*([own] if own else []), *folders]
    if not all(map(is_local, places)) or any(_holds_packages(place.parent) for place in folders or places):
        return None, []
    return own, folders


def _holds_packages(folder: Path) -> bool:
    """Whether packages were installed into a folder, as with ``pip install --target``."""
    return any(folder.glob("*.dist-info"))


def _named(further: Sequence[str]) -> list[Path]:
    given = filter(None, os.environ.get(VARIABLE, "").split(os.pathsep))
    named = [Path(each) for each in dict.fromkeys(map(os.path.realpath, [*given, *further]))]
    for folder in named:
        if not folder.is_dir():
            raise BadInput(f"{VARIABLE}: there is no folder {folder}")
        if not any((folder / name).is_dir() for name in FOLDERS):
            raise BadInput(f"{VARIABLE}: {folder} has none of the folders {', '.join(FOLDERS)}")
    return named


def _may_hold_plugins(path: str, name: str) -> bool:
    own = os.path.dirname(os.path.realpath(__file__))
    hidden = name.startswith((".", "__")) or name == "site-packages"
    return not hidden and path != own and not os.path.exists(os.path.join(path, "pyvenv.cfg"))
