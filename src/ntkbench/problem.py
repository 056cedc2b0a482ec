"""What all methods are given: a network, inputs, and two sets of weights."""

from __future__ import annotations

import hashlib
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
