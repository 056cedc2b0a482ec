"""One-file plug-ins: a file dropped into ``problems/``, ``methods/`` or ``figures/`` is found by its name."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from ntkbench.errors import unknown

ROOMS_OWN = {"base"}
"""File names that belong to a room itself and are no plug-ins."""


def names(package: str) -> list[str]:
    """Names of the plug-in files of ``package``, sorted; none of them is imported."""
    room = importlib.import_module(package)
    found = (module.name for module in pkgutil.iter_modules(room.__path__) if not module.ispkg)
    return sorted(name for name in found if name not in ROOMS_OWN and not name.startswith("_"))


def load(package: str, name: str, kind: str) -> ModuleType:
    """One plug-in file of ``package``, imported.

    Raises:
        BadInput: there is none of that name; ``kind`` says what it would be.
    """
    if name not in names(package):
        raise unknown(kind, name, names(package))
    return importlib.import_module(f"{package}.{name}")


def modules(package: str) -> dict[str, ModuleType]:
    """Import every plug-in file of ``package``; file name to module, sorted by name."""
    return {name: importlib.import_module(f"{package}.{name}") for name in names(package)}
