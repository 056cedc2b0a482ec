"""What a problem is: a network, inputs, and two sets of weights."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
            frozen at the module's own values.
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

    def digest(self) -> str:
        """Hash of inputs and weights, to the bit: two problems with one digest have the same exact metrics."""
        digest = hashlib.sha256()
        for array in (self.x, *self.theta_0.values(), *(self.theta_f or {}).values()):
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


@dataclass(frozen=True)
class Definition:
    """What a problem file returns: everything but the trained weights, which ``train`` makes when they are needed.

    Attributes:
        module: the network with its weights at initialisation.
        x: inputs ``[N, ...]``.
        train: trains the module it is given in place, from theta_0 to theta_f, the same way every time.
        jax_forward: see :class:`Problem`.
        samples_interact: see :class:`Problem`.
    """

    module: nn.Module
    x: np.ndarray
    train: Callable[[nn.Module], None]
    jax_forward: Callable[[Mapping[str, Any], Any], Any] | None = None
    samples_interact: bool = False


REGISTRY: dict[str, Callable[..., Definition]] = {}


ANY_SIZE: set[str] = set()
"""Problems whose sizes may go beyond their defaults."""


def problem(define: Callable[..., Definition] | None = None, *, any_size: bool = False) -> Any:
    """Register a function as a problem under its own name.

    Its integer keywords (``N=50``) are the sizes one may ask for. Their defaults are the largest, and smaller ones only
    cut the inputs down; with ``any_size`` they are where one starts from, and may change the network.
    """
    if define is None:
        return functools.partial(problem, any_size=any_size)
    REGISTRY[define.__name__] = define
    if any_size:
        ANY_SIZE.add(define.__name__)
    return define


def parse_label(label: str) -> tuple[str, dict[str, int]]:
    """``"digits_mlp[N=64]"`` to ``("digits_mlp", {"N": 64})``.

    Raises:
        BadInput: the label is malformed, or names a size that the problem does not have.
    """
    match = re.fullmatch(r"(\w+)(?:\[([^\[\]]*)\])?", label.strip())
    if not match:
        raise BadInput(f"malformed problem {label!r}; allowed: a name, or a name with sizes such as 'digits_mlp[N=64]'")
    name, sizes = match[1], {}
    if name not in REGISTRY:
        return name, {}
    allowed = inspect.signature(REGISTRY[name]).parameters
    for part in filter(None, (match[2] or "").split(",")):
        key, _, value = (s.strip() for s in part.partition("="))
        if key not in allowed or not value.isdigit() or int(value) < 1:
            raise BadInput(
                f"problem {label!r}: {part.strip()!r} is no size of {name}; allowed: "
                + ", ".join(f"{k}=<positive integer, {v.default} if not given>" for k, v in allowed.items())
            )
        if int(value) > allowed[key].default and name not in ANY_SIZE:
            raise BadInput(f"problem {label!r}: {key} can be at most {allowed[key].default}, the size it is defined at")
        sizes[key] = int(value)
    return name, sizes
