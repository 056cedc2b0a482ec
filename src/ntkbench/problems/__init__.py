"""Networks, data and weights, one file per family.

To add a problem, drop a file here with a function decorated by :func:`ntkbench.problems.base.problem` that returns a
:class:`ntkbench.problems.base.Definition`. It then appears in the grid, the asv suite, the contract tests, the table
and the figures.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Literal, get_args, get_origin, get_type_hints

from ntkbench import registry
from ntkbench.problem import Problem, split
from ntkbench.problems import base
from ntkbench.problems.base import Definition, problem, weights
from ntkbench.registry import Fault, Source

__all__ = [
    "REGISTRY",
    "Definition",
    "Problem",
    "check",
    "define",
    "describe",
    "get",
    "load",
    "module_of",
    "names",
    "problem",
]


def names() -> list[str]:
    """Names of all problems that work; imports all problem files."""
    return sorted({*REGISTRY.names(), *base.REGISTRY})


def get(name: str) -> Callable[..., Definition]:
    """The function that defines a problem; imports its file and no other.

    Raises:
        BadInput: there is no such problem, or it is broken.
    """
    if name not in base.REGISTRY:
        base.REGISTRY[name] = REGISTRY.get(name)
    return base.REGISTRY[name]


def describe(name: str) -> str:
    """First line of a problem's docstring."""
    return registry.first_line(get(name))


def module_of(label: str) -> str:
    """Import name of the file that defines a problem; does not import it."""
    return REGISTRY.module(base.parse_label(label)[0])


def check(label: str) -> str:
    """The canonical spelling of a label: no spaces, options in alphabetical order, no defaults. Builds nothing.

    Raises:
        BadInput: no such problem, size or choice; says what is allowed.
    """
    name, options = _parsed(label)
    defaults = inspect.signature(get(name)).parameters
    chosen = ",".join(f"{key}={value}" for key, value in sorted(options.items()) if value != defaults[key].default)
    return f"{name}[{chosen}]" if chosen else name


def options(label: str) -> dict[str, int | str]:
    """All options of a label, including defaults, which the canonical spelling leaves out. Builds nothing.

    Raises:
        BadInput: there is no such problem, or it does not take the options.
    """
    name, chosen = _parsed(label)
    return {key: chosen.get(key, p.default) for key, p in inspect.signature(get(name)).parameters.items()}


@functools.lru_cache(maxsize=4)
def load(label: str) -> Problem:
    """Build a problem from its label, such as ``"gru_hazelden"`` or ``"gru_hazelden[N=3,T=10]"``.

    Sizes only cut the inputs down and leave the weights unchanged, except for problems of any size. Some problems also
    have choices, as in ``"rnn_flipflop[read=outputs,parameters=recurrent]"``. Trained weights come from
    ``results/reference`` or the cache; if neither has them, the network is trained at first use.

    Raises:
        BadInput: no such problem, size or choice.
        Unavailable: the problem's data are not available.
        DidNotTrain: training failed.
        Corrupt: its committed weights are damaged.
    """
    full_name, definition = check(label), define(label)
    network = definition.part or definition.module
    initial, trained = weights.initial_and_trained(base.parse_label(label)[0], definition)
    theta_0, fixed_0 = split(network, initial)
    theta_f, fixed_f = (None, {}) if trained is None else split(network, trained)
    return Problem(
        name=full_name,
        module=network,
        x=definition.x,
        theta_0=theta_0,
        theta_f=theta_f,
        jax_forward=definition.jax_forward,
        samples_interact=definition.samples_interact,
        outputs=definition.outputs,
        fixed_0=fixed_0,
        fixed_f=fixed_f,
        recipe=str(definition.training or ""),
    )


def define(label: str) -> Definition:
    """The definition behind a label: network, data and training recipe, before anything is trained.

    Raises:
        BadInput: no such problem, size or choice.
        Unavailable: the problem's data are not available.
    """
    name, options = _parsed(label)
    return get(name)(**options)


def _parsed(label: str) -> tuple[str, dict[str, int | str]]:
    get(base.parse_label(label)[0])  # loads the problem, so that its sizes and choices are known
    return base.parse_label(label)


def _find(source: Source) -> dict[str, int]:
    """Functions under ``@problem`` and names listed in ``NAMES``, with their lines in the file."""
    found: dict[str, int] = {}
    for node in source.tree.body:
        if isinstance(node, ast.FunctionDef) and any(map(_is_problem, node.decorator_list)):
            if node.name in found:
                raise Fault(f"{node.name} is defined twice, on line {found[node.name]} before", node.lineno)
            found[node.name] = node.lineno
    listed = source.literal("NAMES")
    if listed is not None:
        if not isinstance(listed, tuple | list) or not all(isinstance(name, str) for name in listed):
            raise Fault(f"NAMES must be a tuple of names; got {listed!r}", source.line("NAMES"))
        found |= dict.fromkeys(listed, source.line("NAMES"))
    if not found:
        raise Fault("defines no problem: a function under @problem, or names in NAMES")
    if wrong := [name for name in found if not name.isidentifier()]:
        raise Fault(f"{wrong[0]!r} is not a valid problem name", found[wrong[0]])
    return found


def _is_problem(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return (getattr(called, "attr", None) or getattr(called, "id", None)) == "problem"


def _checked(source: Source, module: ModuleType, name: str) -> Callable[..., Definition]:
    declared = {k: f for k, f in vars(module).items() if inspect.isfunction(f) and hasattr(f, "any_size")}
    declared = {k: f for k, f in declared.items() if f.__module__ == module.__name__}
    if unlisted := sorted({f.__name__ for f in declared.values()} - set(_find(source))):
        raise Fault(f"{unlisted[0]} is a problem that NAMES does not list", source.line("NAMES"))
    line = _find(source)[name]
    if name not in declared or declared[name].__name__ != name:
        raise Fault(f"{name} is not a function declared by @problem", line)
    define = declared[name]
    if not (define.__doc__ or "").strip():
        raise Fault(f"{name} has no docstring", line)
    hints = get_type_hints(define)
    for key, parameter in inspect.signature(define).parameters.items():
        said = f"keyword {key!r} of {name}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise Fault(f"{said}: sizes and choices must be keywords with defaults", line)
        default, hint = parameter.default, hints.get(key)
        if isinstance(default, str):
            if get_origin(hint) is not Literal or default not in get_args(hint):
                raise Fault(f"{said}: a choice needs Literal[...] as its type, with its default among the words", line)
            if not all(isinstance(word, str) for word in get_args(hint)):
                raise Fault(f"{said}: choices must be words", line)
        elif type(default) is not int or default < 1 or hint not in (None, int):
            raise Fault(f"{said}: a size needs a positive whole number as its default, and int as its type", line)
    return define


REGISTRY: registry.Registry[Callable[..., Definition]] = registry.Registry("problem", _checked, _find)
