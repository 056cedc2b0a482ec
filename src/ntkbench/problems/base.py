"""What a problem is: a network, inputs, and two sets of weights."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import numpy as np

from ntkbench.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Problem:
    """A network with inputs and two sets of weights, on which NTK metrics are defined.

    Arrays are NumPy and live on the host; the Jacobian operators bring them to a device in the precision asked for,
    so that every backend starts from the same bits.

    Attributes:
        name: label, sizes included, such as ``"digits_mlp[N=64]"``.
        module: ``x -> [N, ...outputs]``; ``theta_0`` or ``theta_f`` are put in for its own weights.
        x: inputs ``[N, ...]``.
        theta_0: weights at initialisation, by parameter name; parameters of the module that are not among them are
            frozen, at the values in ``fixed_0`` and ``fixed_f``, or else at the module's own.
        theta_f: weights after training, for alignment; ``None`` where there are none.
        jax_forward: the same network as a pure function ``(weights, x) -> [N, ...outputs]`` on JAX arrays, or ``None``.
        samples_interact: whether an output of one sample depends on another sample.
    """

    name: str
    module: nn.Module
    x: np.ndarray
    theta_0: Weights
    theta_f: Weights | None = None
    jax_forward: Callable[[Mapping[str, Any], Any], Any] | None = None
    samples_interact: bool = False
    fixed_0: Weights = field(default_factory=dict)
    fixed_f: Weights = field(default_factory=dict)
    _shape: list[tuple[int, ...]] = field(default_factory=list, repr=False, compare=False)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """``(N, ...outputs)``, from a forward pass that computes nothing (meta tensors)."""
        if not self._shape:
            self._shape.append(_output_shape(self.module, self.theta_0, self.x))
        return self._shape[0]

    @property
    def N(self) -> int:
        """Number of samples."""
        return self.output_shape[0]

    @property
    def O(self) -> int:  # noqa: E743 - the field's symbol
        """Outputs a sample."""
        return int(np.prod(self.output_shape[1:]))

    @property
    def n(self) -> int:
        """Outputs in all, the size of Theta."""
        return self.N * self.O

    @property
    def P(self) -> int:
        """Number of parameters."""
        return sum(w.size for w in self.theta_0.values())

    def weights(self, which: str) -> Weights:
        """``"theta_0"`` or ``"theta_f"``.

        Raises:
            BadInput: the problem has no trained weights.
        """
        weights = getattr(self, which)
        if weights is None:
            raise BadInput(f"{self.name} has no {which}, so alignment is not defined for it")
        return weights

    def fixed(self, which: str) -> Weights:
        """The weights that go with ``"theta_0"`` or ``"theta_f"`` and are not differentiated by; often none."""
        return self.fixed_0 if which == "theta_0" else self.fixed_f

    def digest(self) -> str:
        """Hash of inputs and weights, to the bit: two problems with one digest have the same exact metrics."""
        arrays = [self.x]
        for weights in (self.theta_0, self.theta_f or {}, self.fixed_0, self.fixed_f):
            arrays += weights.values()
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def _output_shape(module: nn.Module, weights: Weights, x: np.ndarray) -> tuple[int, ...]:
    import torch
    from torch.func import functional_call

    arrays = {key: torch.empty(w.shape, device="meta") for key, w in weights.items()}
    fixed = (*module.named_buffers(), *((key, w) for key, w in module.named_parameters() if key not in arrays))
    arrays |= {key: torch.empty_like(b, device="meta") for key, b in fixed}
    inputs = torch.empty(x.shape, dtype=torch.from_numpy(x[:0]).dtype, device="meta")
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    return tuple(functional_call(module, arrays, (inputs,)).shape)


def split(network: nn.Module, weights: Weights) -> tuple[Weights, Weights]:
    """Of the weights that a network has, those that it is differentiated by, and the others."""
    by = {key: w.requires_grad for key, w in network.named_parameters() if key in weights}
    return {key: weights[key] for key in by if by[key]}, {key: weights[key] for key in by if not by[key]}


@dataclass(frozen=True)
class Definition:
    """What a problem file returns: everything but the trained weights, which ``train`` makes when they are needed.

    Attributes:
        module: the network with its weights at initialisation.
        x: inputs ``[N, ...]``.
        train: trains the module it is given in place, from theta_0 to theta_f, the same way every time.
        jax_forward: see :class:`Problem`.
        samples_interact: see :class:`Problem`.
        part: the network whose NTK it is, where that is not all of what is trained: its parameters are some of those of
            ``module``, and it is not differentiated by those that do not require a gradient.
        recipe: what trained weights depend on besides theta_0 where that varies, such as the length of sequences.
    """

    module: nn.Module
    x: np.ndarray
    train: Callable[[nn.Module], None]
    jax_forward: Callable[[Mapping[str, Any], Any], Any] | None = None
    samples_interact: bool = False
    part: nn.Module | None = None
    recipe: str = ""


REGISTRY: dict[str, Callable[..., Definition]] = {}


ANY_SIZE: set[str] = set()
"""Problems whose sizes may go beyond their defaults."""


def problem(define: Callable[..., Definition] | None = None, *, any_size: bool = False) -> Any:
    """Register a function as a problem under its own name.

    Its integer keywords (``N=50``) are the sizes one may ask for. Their defaults are the largest, and smaller ones only
    cut the inputs down; with ``any_size`` they are where one starts from, and may change the network. A keyword with a
    word as its default is a choice among the words of its type, as in ``read: Literal["state", "outputs"] = "state"``.
    """
    if define is None:
        return functools.partial(problem, any_size=any_size)
    REGISTRY[define.__name__] = define
    if any_size:
        ANY_SIZE.add(define.__name__)
    return define


def parse_label(label: str) -> tuple[str, dict[str, int | str]]:
    """``"rnn_flipflop[N=64,read=outputs]"`` to ``("rnn_flipflop", {"N": 64, "read": "outputs"})``.

    Raises:
        BadInput: the label is malformed, or names a size or a choice that the problem does not have.
    """
    match = re.fullmatch(r"(\w+)(?:\[([^\[\]]*)\])?", label.strip())
    if not match:
        raise BadInput(f"malformed problem {label!r}; allowed: a name, or a name with sizes such as 'digits_mlp[N=64]'")
    name, options = match[1], {}
    if name not in REGISTRY:
        return name, {}
    defaults = {key: p.default for key, p in inspect.signature(REGISTRY[name]).parameters.items()}
    choices = _choices(name)
    for part in filter(None, (match[2] or "").split(",")):
        key, _, value = (s.strip() for s in part.partition("="))
        if key in options:
            raise BadInput(f"problem {label!r}: {key} is given twice")
        if key in choices:
            if value not in choices[key]:
                raise BadInput(
                    f"problem {label!r}: {part.strip()!r} is no choice of {name}; allowed: {_allowed(name, key)}"
                )
            options[key] = value
            continue
        if key not in defaults or not value.isdecimal() or int(value) < 1:
            raise BadInput(
                f"problem {label!r}: {part.strip()!r} is no size of {name}; allowed: "
                + ", ".join(_allowed(name, key) for key in defaults)
            )
        if int(value) > defaults[key] and name not in ANY_SIZE:
            raise BadInput(f"problem {label!r}: {key} can be at most {defaults[key]}, the size it is defined at")
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
