"""User functions that are named on the command line, and that return a network with its inputs."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NamedTuple

from ntkbench.errors import BadInput, summary, unknown

RETURNS = "must return (model, inputs) or (model, inputs, call)"


class Made(NamedTuple):
    """What a factory returns.

    Attributes:
        model, inputs, call: as :class:`ntkbench.Kernel` takes them.
    """

    model: Any
    inputs: Any
    call: Any = None


def make(name: str) -> Made:
    """What the function of a name returns.

    Args:
        name: ``module:function``, with a module of the current folder or an installed one.

    Raises:
        BadInput: there is no such function, or it fails, or it returns something else; says what.
    """
    module_name, colon, function_name = name.partition(":")
    if not (colon and function_name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise BadInput(f"a factory is named module:function, such as my_networks:make; got {name!r}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as python -m does
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise BadInput(f"there is no module {error.name!r} in {here} or among the installed ones") from None
        raise BadInput(f"{module_name} cannot be imported: {summary(error)}") from error
    except (Exception, SystemExit) as error:  # whatever a user's file does
        raise BadInput(f"{module_name} cannot be imported: {summary(error)}") from error
    function = getattr(module, function_name, None)
    if function is None:
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown(f"function of {module_name}", function_name, functions)
    if not callable(function):
        raise BadInput(f"{name} is of type {type(function).__name__}, not a function")
    try:
        made = function()
    except (Exception, SystemExit) as error:
        raise BadInput(f"{name} failed: {summary(error)}") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        size = f" of {len(made)}" if isinstance(made, tuple) else ""
        raise BadInput(f"{name} {RETURNS}, got {type(made).__name__}{size}")
    if len(made) == 3 and made[2] is not None and not callable(made[2]):
        raise BadInput(f"{name} {RETURNS}, and its call is {type(made[2]).__name__}")
    return Made(*made)
