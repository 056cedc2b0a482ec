"""Networks, data and weights, one file a family.

To add a problem, drop a file here with a function decorated by :func:`ntkbench.problems.base.problem` that returns a
:class:`ntkbench.problems.base.Definition`. It is then in the grid, the asv suite, the contract tests, the table and the
figures.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect

from ntkbench import plugins
from ntkbench.errors import unknown
from ntkbench.problems import base
from ntkbench.problems.base import Definition, Problem, problem

__all__ = ["Definition", "Problem", "describe", "load", "names", "problem", "source_file"]


def names() -> list[str]:
    """Names of all problems."""
    plugins.modules(__name__)
    return sorted(base.REGISTRY)


def describe(name: str) -> str:
    """First line of a problem's docstring."""
    names()
    return inspect.getdoc(_definition(name)).splitlines()[0]


def source_file(label: str) -> str:
    """The file that defines a problem."""
    names()
    return inspect.getsourcefile(_definition(base.parse_label(label)[0]))


def check(label: str) -> None:
    """Refuse a label that names no problem or a size it does not have, without building anything.

    Raises:
        BadInput: says what was wrong and what is allowed.
    """
    names()
    _definition(base.parse_label(label)[0])


@functools.lru_cache(maxsize=4)
def load(label: str) -> Problem:
    """Build a problem from its label, such as ``"gru_hazelden"`` or ``"gru_hazelden[N=3,T=10]"``.

    Sizes cut the inputs down and leave the weights as they are, but for problems of any size. Trained weights come from
    ``results/reference`` or the cache, and are trained at the first use otherwise.

    Raises:
        BadInput: no such problem, or no such size.
        Unavailable: the problem's data cannot be had here.
    """
    from ntkbench.problems import _weights

    check(label)
    name, sizes = base.parse_label(label)
    definition = _definition(name)(**sizes)
    defaults = inspect.signature(_definition(name)).parameters
    cut = ",".join(f"{key}={size}" for key, size in sorted(sizes.items()) if size != defaults[key].default)
    theta_0, theta_f = _weights.initial_and_trained(name, definition)
    fields = {f.name: getattr(definition, f.name) for f in dataclasses.fields(definition) if f.name != "train"}
    return Problem(name=f"{name}[{cut}]" if cut else name, theta_0=theta_0, theta_f=theta_f, **fields)


def _definition(name: str):
    if name not in base.REGISTRY:
        raise unknown("problem", name, base.REGISTRY)
    return base.REGISTRY[name]
