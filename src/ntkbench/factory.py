"""User functions that are named on the command line or in a configuration, and return a network with its inputs."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import keyword
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ntkbench import paths, registry
from ntkbench.errors import BadInput, summary, unknown

RETURNS = "must return (model, inputs) or (model, inputs, call)"
PLUGIN = '''"""The network of a user's function, written by ntkbench for a configuration."""

from ntkbench.problems.base import factories, problem


@problem
def {name}():
    """The network of {factory}."""
    return factories.definition({factory!r}, {folder!r}, {known!r})
'''
"""A problem as a plug-in. Its text, and so the fingerprints of its rows, depends on what is known of the network."""
DESCRIBE = "import sys; from ntkbench.problems.base import factories; factories.describe(*sys.argv[1:])"


class Made(NamedTuple):
    """What a factory returns.

    Attributes:
        model, inputs, call: as :class:`ntkbench.Kernel` takes them.
    """

    model: Any
    inputs: Any
    call: Any = None


def make(name: str, folder: str | None = None) -> Made:
    """Call a user's function by its name, and return its result.

    What it prints goes to standard error, as results go to standard output.

    Args:
        name: ``module:function``, with a module of the folder or an installed one.
        folder: folder of the module, which is the current one while the function runs; the current one if not given.

    Raises:
        BadInput: there is no such function, or it fails, or it returns something else; says what.
    """
    module_name, function_name = _parts(name)
    here = os.getcwd() if folder is None else folder
    _search(here)
    try:
        with _inside(here):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise BadInput(f"there is no module {error.name!r} in {here} or among the installed ones") from None
        raise BadInput(f"{module_name} cannot be imported: {summary(error)}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a user's file does
        raise BadInput(f"{module_name} cannot be imported: {summary(error)}") from error
    function = getattr(module, function_name, None)
    if function is None:
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown(f"function of {module_name}", function_name, functions)
    if not callable(function):
        raise BadInput(f"{name} is of type {type(function).__name__}, not a function")
    try:
        with _inside(here):
            made = function()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise BadInput(f"{name} failed: {summary(error)}") from error
    if inspect.iscoroutine(made):
        made.close()  # else Python warns that it was never awaited
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        size = f" of {len(made)}" if isinstance(made, tuple) else ""
        raise BadInput(f"{name} {RETURNS}, got {type(made).__name__}{size}")
    if len(made) == 3 and made[2] is not None and not callable(made[2]):
        raise BadInput(f"{name} {RETURNS}, but its call is of type {type(made[2]).__name__}")
    return Made(*made)


def as_problems(factories: Mapping[str, str]) -> None:
    """Register factories as problems under given names, in this process and in those that it starts.

    Their networks stay untrained. Each function is called once, in a process of its own. A process that loads the
    problem later refuses it if its source files, weights or inputs have changed, or what it computes.

    Args:
        factories: ``module:function`` by the name of the problem.

    Raises:
        BadInput: a name is invalid or taken, or :func:`make` refuses the function; says which and why.
    """
    registered, texts = registry.of("problem"), dict[str, str]()
    for name, factory in factories.items():
        if name not in registered.found():
            try:
                texts[name] = _plugin(name, factory)
            except BadInput as error:
                raise BadInput(f"{name}: {error}") from error
        elif f"factories.definition({factory!r}, " not in registered.file(name).read_text(encoding="utf-8"):
            raise BadInput(f"{name} is already a problem; choose another name")
    if texts:  # the others were made by the process that started this one
        folder = paths.cache() / "factories" / hashlib.sha256("".join(texts.values()).encode()).hexdigest()[:16]
        (folder / "problems").mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            paths.write_atomically(folder / "problems" / f"{name}.py", text)
        registry.use([str(folder)])


def _plugin(name: str, factory: str) -> str:
    """The text of a plug-in that defines a factory's problem."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise BadInput("not a valid problem name; allowed: letters, digits and _, but no Python keyword")
    _parts(factory)
    here = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="ntkbench-") as folder:
        file = Path(folder) / "known.json"
        done = subprocess.run(
            [sys.executable, "-c", DESCRIBE, factory, here, str(file)], capture_output=True, text=True, check=False
        )
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            last = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
            raise BadInput(f"{factory} ended its process: {last}") from None
    if "error" in known:
        raise BadInput(known["error"])
    return PLUGIN.format(name=name, factory=factory, folder=here, known=known)


def _parts(name: str) -> tuple[str, str]:
    module_name, colon, function_name = name.partition(":")
    if module_name.endswith(".py") or os.sep in module_name:
        module = Path(module_name).stem
        raise BadInput(
            f"a factory is named by its module, not its file: {module}:{function_name or 'make'}; got {name!r}"
        )
    if not (colon and function_name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise BadInput(f"a factory is named module:function, such as my_networks:make; got {name!r}")
    return module_name, function_name


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    """Run a user's code in a folder, whose files it may name relative to it, with its output on standard error."""
    with contextlib.redirect_stdout(sys.stderr), contextlib.chdir(folder):
        yield


def _search(folder: str) -> None:
    """Look for modules in a folder first, as ``python -m`` does in the current one."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
