"""Problems from user functions that a configuration names; see :func:`ntkbench.factory.as_problems`."""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ntkbench import paths
from ntkbench.errors import BadInput, NtkbenchError
from ntkbench.factory import make
from ntkbench.modules import values
from ntkbench.problem import hashed
from ntkbench.problems.base import Definition
from ntkbench.problems.base.calls import as_module
from ntkbench.problems.base.sequences import wrapped

PACKAGE = Path(__file__).parents[2]
INSTALLED = {"site-packages", "dist-packages"}
"""Names of folders with installed packages, of the user or of the system."""


def definition(factory: str, folder: str, known: Mapping[str, Any]) -> Definition:
    """The untrained problem of a factory.

    Args:
        factory: ``module:function``.
        folder: where its module is looked for.
        known: what :func:`describe` found.

    Raises:
        BadInput: there is no such function, or what it returns cannot be used.
        NtkbenchError: it differs from what is known; says how.
    """
    for file, digest in known["files"].items():
        if _digest(Path(file)) != digest:
            raise NtkbenchError(f"{file} was changed after the configuration was read: start the run again")
    found, contents = _made(factory, folder)
    if contents != known["contents"]:
        raise NtkbenchError(
            f"{factory} returns other weights or inputs than when the configuration was read: "
            "seed its random numbers, or start the run again"
        )
    return found


def describe(factory: str, folder: str, output: str) -> None:
    """Write what a factory's rows depend on, as JSON: ``files`` with their digests and ``contents``, or ``error``.

    Call it in a process of its own. The files are those of the factory's module and of all that this process has
    imported, except from ntkbench, the standard library and installed packages.

    Args:
        factory, folder: as in :func:`definition`.
        output: path of the file.
    """
    found: dict[str, Any]
    try:
        _, contents = _made(factory, folder)
        own = sys.modules[factory.partition(":")[0]]
        files = {file for module in list(sys.modules.values()) if (file := _file(module)) and _is_local(file)}
        files |= {file} if (file := _file(own)) else set()
        found = {"files": {str(file): _digest(file) for file in sorted(files)}, "contents": contents}
    except BadInput as error:
        found = {"error": str(error)}
    paths.write_atomically(Path(output), json.dumps(found))


def _made(factory: str, folder: str) -> tuple[Definition, str]:
    """The problem of a factory, checked as those of :class:`ntkbench.Kernel`, and a hash of all its tensors."""
    made = make(factory, folder)
    p = wrapped(*as_module(made.model, made.inputs, made.call))
    if p.mixed:
        raise BadInput(f"{factory} makes a network with parts of precisions of their own, which a grid would convert")
    network = p.network.cpu()  # measurements choose the device
    found = Definition(network, p.x, None, samples_interact=p.samples_interact)
    return found, hashed({**values(network), "the inputs": p.x})


def _file(module: Any) -> Path | None:
    name = getattr(module, "__file__", None)
    return Path(name).resolve() if name and Path(name).is_file() else None


def _is_local(file: Path) -> bool:
    if INSTALLED & set(file.parts):
        return False
    installed = [PACKAGE, *(Path(sysconfig.get_paths()[kind]).resolve() for kind in ("stdlib", "purelib", "platlib"))]
    return not any(file.is_relative_to(folder) for folder in installed)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "missing"
