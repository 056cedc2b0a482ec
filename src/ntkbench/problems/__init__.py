"""Networks, data and weights, one file a family.

To add a problem, drop a file here with a function decorated by :func:`ntkbench.problems.base.problem` that returns a
:class:`ntkbench.problems.base.Definition`. It is then in the grid, the asv suite, the contract tests, the table and the
figures.
"""

from __future__ import annotations

import functools
import inspect

from ntkbench import registry
from ntkbench.errors import unknown
from ntkbench.problem import Problem, split
from ntkbench.problems import base
from ntkbench.problems.base import Definition, problem

__all__ = ["Definition", "Problem", "check", "define", "describe", "load", "names", "problem", "source_file"]


def names() -> list[str]:
    """Names of all problems."""
    registry.modules(__name__)
    return sorted(base.REGISTRY)


def describe(name: str) -> str:
    """First line of a problem's docstring."""
    names()
    return inspect.getdoc(_definition(name)).splitlines()[0]


def source_file(label: str) -> str:
    """The file that defines a problem."""
    names()
    return inspect.getsourcefile(_definition(base.parse_label(label)[0]))


def check(label: str) -> str:
    """A label in its one spelling: no spaces, options in alphabetical order, none at its default. Builds nothing.

    Raises:
        BadInput: no such problem, size or choice; says what is allowed.
    """
    names()
    name, options = base.parse_label(label)
    defaults = inspect.signature(_definition(name)).parameters
    chosen = ",".join(f"{key}={value}" for key, value in sorted(options.items()) if value != defaults[key].default)
    return f"{name}[{chosen}]" if chosen else name


@functools.lru_cache(maxsize=4)
def load(label: str) -> Problem:
    """Build a problem from its label, such as ``"gru_hazelden"`` or ``"gru_hazelden[N=3,T=10]"``.

    Sizes cut the inputs down and leave the weights as they are, but for problems of any size. Some problems have
    choices besides, as in ``"rnn_flipflop[read=outputs,parameters=recurrent]"``. Trained weights come from
    ``results/reference`` or the cache, and are trained at the first use otherwise.

    Raises:
        BadInput: no such problem, size or choice.
        Unavailable: the problem's data cannot be had here.
        DidNotTrain: training failed.
        Corrupt: its committed weights are damaged.
    """
    from ntkbench.problems.base import weights

    full_name, definition = check(label), define(label)
    network = definition.part or definition.module
    ends = weights.initial_and_trained(base.parse_label(label)[0], definition)
    (theta_0, fixed_0), (theta_f, fixed_f) = (split(network, stored) for stored in ends)
    return Problem(
        name=full_name,
        module=network,
        x=definition.x,
        theta_0=theta_0,
        theta_f=theta_f,
        jax_forward=definition.jax_forward,
        samples_interact=definition.samples_interact,
        fixed_0=fixed_0,
        fixed_f=fixed_f,
        recipe=str(definition.training),
    )


def define(label: str) -> Definition:
    """The definition behind a label: network, data and training recipe, before anything is trained.

    Raises:
        BadInput: no such problem, size or choice.
        Unavailable: the problem's data cannot be had here.
    """
    check(label)
    name, options = base.parse_label(label)
    return _definition(name)(**options)


def _definition(name: str):
    if name not in base.REGISTRY:
        raise unknown("problem", name, base.REGISTRY)
    return base.REGISTRY[name]
