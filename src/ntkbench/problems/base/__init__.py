"""Definitions of problems: registration, labels such as ``digits_mlp[N=64]``, and what a problem file returns."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

import numpy as np

from ntkbench.data.files import DataFile
from ntkbench.errors import BadInput
from ntkbench.problems.base.training import Training

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Definition:
    """What a problem file returns: network, data and training recipe.

    Attributes:
        module: the network with its weights at initialisation. For a network that takes several inputs, or is not
            called as ``module(x)``, use the module and x of :func:`ntkbench.problems.base.calls.as_module`.
        x: inputs ``[N, ...]``.
        training: how the network gets from theta_0 to theta_f, such as a
            :class:`ntkbench.problems.base.training.Adam`; ``None`` for a network that stays untrained and so has no
            alignment.
        jax_forward: see :class:`Problem`.
        samples_interact: see :class:`Problem`.
        outputs: see :class:`Problem`.
        part: the network whose NTK is computed, if it is not the whole trained network. Its parameters are some of
            those of ``module``; theta consists of those that require a gradient.
    """

    module: nn.Module
    x: np.ndarray
    training: Training | None
    jax_forward: Callable[[Mapping[str, Any], Any], Any] | None = None
    samples_interact: bool = False
    outputs: Literal["logits", "states"] = "logits"
    part: nn.Module | None = None

    def __post_init__(self) -> None:
        if not (self.training is None or isinstance(self.training, Training)):
            raise BadInput(
                "training must be a recipe that can be recorded, such as ntkbench.problems.base.training.Adam(...); "
                f"got {self.training!r}"
            )


LARGEST = 999_999_999
"""The largest size of a problem of any size."""

REGISTRY: dict[str, Callable[..., Definition]] = {}
"""The problems that :func:`ntkbench.problems.get` has loaded so far, by name."""


def problem(
    define: Callable[..., Definition] | None = None, *, any_size: bool = False, data: Sequence[DataFile] = ()
) -> Any:
    """Declare a function to be a problem, under its own name.

    Its integer keywords (``N=50``) are the sizes that a label may set. Their defaults are the largest allowed, and
    smaller ones only cut the inputs down. With ``any_size`` a size may be any positive integer, and may change the
    network. A keyword with a word as its default is a choice among the words of its type, as in
    ``read: Literal["state", "outputs"] = "state"``. ``data`` are the data files that the problem depends on: its rows
    are measured again when these change.

    Problems are found without importing their file. A problem that is declared by a call, and not by ``@problem`` above
    a function of its name, must be assigned to that name and listed in the file's ``NAMES = ("first", "second")``.
    """
    if define is None:
        return functools.partial(problem, any_size=any_size, data=data)
    define.any_size, define.data = any_size, tuple(data)  # type: ignore[attr-defined]
    return define


def parse_label(label: str) -> tuple[str, dict[str, int | str]]:
    """``"rnn_flipflop[N=64,read=outputs]"`` to ``("rnn_flipflop", {"N": 64, "read": "outputs"})``.

    Raises:
        BadInput: the label is malformed, or names a size or a choice that the problem does not have.
    """
    match = re.fullmatch(r"(\w+)(?:\[([^\[\]]*)\])?", label.strip(" "))
    if not match:
        raise BadInput(f"malformed problem {label!r}; allowed: a name, or a name with sizes such as 'digits_mlp[N=64]'")
    name, options = match[1], {}
    if name not in REGISTRY:
        return name, {}
    defaults = {key: p.default for key, p in inspect.signature(REGISTRY[name]).parameters.items()}
    choices = _choices(name)
    for part in [] if match[2] is None else match[2].split(","):
        part = part.strip(" ")
        key, _, value = (s.strip(" ") for s in part.partition("="))
        if key in options:
            raise BadInput(f"problem {label!r}: {key} is given twice")
        if key in choices:
            if value not in choices[key]:
                raise BadInput(f"problem {label!r}: {part!r} is not a choice of {name}; allowed: {_allowed(name, key)}")
            options[key] = value
            continue
        if not defaults:
            raise BadInput(f"problem {label!r}: {name} has no sizes; allowed: {name!r} alone")
        if key not in defaults or not re.fullmatch("0*[1-9][0-9]*", value):
            raise BadInput(
                f"problem {label!r}: {part!r} is not a size of {name}; allowed: "
                + ", ".join(_allowed(name, key) for key in defaults)
            )
        most, why = (LARGEST, "") if getattr(REGISTRY[name], "any_size", False) else (defaults[key], ", its default")
        if len(value.lstrip("0")) > len(str(most)) or int(value) > most:
            raise BadInput(f"problem {label!r}: {key} can be at most {most}{why}")
        options[key] = int(value)
    return name, options


def _choices(name: str) -> dict[str, tuple[str, ...]]:
    """The words that each word-valued keyword of a problem may take."""
    hints = get_type_hints(REGISTRY[name])
    defaults = inspect.signature(REGISTRY[name]).parameters
    return {key: get_args(hints[key]) for key, p in defaults.items() if isinstance(p.default, str)}


def _allowed(name: str, key: str) -> str:
    default = inspect.signature(REGISTRY[name]).parameters[key].default
    what = " or ".join(_choices(name)[key]) if isinstance(default, str) else "positive integer"
    return f"{key}=<{what}, {default} if not given>"
