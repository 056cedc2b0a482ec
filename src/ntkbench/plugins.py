"""One-file plug-ins: a file dropped into ``problems/``, ``methods/`` or ``figures/`` is found by its name."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

ROOMS_OWN = {"base"}
"""File names that belong to a room itself and are no plug-ins."""


def modules(package: str) -> dict[str, ModuleType]:
    """Import every plug-in file of ``package``; file name to module, sorted by name."""
    room = importlib.import_module(package)
    names = sorted(m.name for m in pkgutil.iter_modules(room.__path__) if not m.ispkg)
    return {
        name: importlib.import_module(f"{package}.{name}")
        for name in names
        if name not in ROOMS_OWN and not name.startswith("_")
    }
