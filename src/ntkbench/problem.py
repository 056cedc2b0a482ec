"""The input of all methods: a network, its inputs, and two sets of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkbench.ambient import own_settings
from ntkbench.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor, nn

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Problem:
    """A network with inputs and two sets of weights, on which NTK metrics are defined.

    Arrays are NumPy arrays on the host. The Jacobian operators copy them to a device in the precision of their target,
    so that all backends start from the same numbers.

    Attributes:
        name: label with sizes, such as ``"digits_mlp[N=64]"``.
        module: ``x -> [N, ...outputs]``; ``theta_0`` or ``theta_f`` replace its own weights.
        x: inputs ``[N, ...]``.
        theta_0: weights at initialisation by parameter name. All other parameters of the module are frozen.
        theta_f: weights after training, for alignment; ``None`` where there are none.
        jax_forward: the same network as a pure function ``(weights, x) -> [N, ...outputs]`` on JAX arrays, or ``None``.
        samples_interact: whether an output of one sample depends on another sample.
        fixed_0, fixed_f: values of frozen parameters and buffers that go with ``theta_0`` and ``theta_f``. Those that
            are not among them keep the module's values.
        recipe: how ``theta_f`` was trained; empty where that is not known.
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
    recipe: str = ""
    _shape: list[tuple[int, ...]] = field(default_factory=list, repr=False, compare=False)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """``(N, ...outputs)``, from a forward pass on meta tensors, which computes nothing."""
        if not self._shape:
            self._shape.append(_output_shape(self.module, self.theta_0, self.x))
        return self._shape[0]

    @property
    def N(self) -> int:
        """Number of samples."""
        return self.output_shape[0]

    @property
    def O(self) -> int:  # noqa: E743 - the field's symbol
        """Outputs per sample."""
        return int(np.prod(self.output_shape[1:]))

    @property
    def n(self) -> int:
        """Outputs of the whole batch, N O; Theta is n x n."""
        return self.N * self.O

    @property
    def P(self) -> int:
        """Number of parameters."""
        return sum(w.size for w in self.theta_0.values())

    def weights(self, which: str) -> Weights:
        """The weights named ``"theta_0"`` or ``"theta_f"``.

        Raises:
            BadInput: the problem has no trained weights.
        """
        weights = getattr(self, which)
        if weights is None:
            raise BadInput(f"{self.name} has no {which}, so alignment is not defined for it")
        return weights

    def fixed(self, which: str) -> Weights:
        """Values of frozen parameters and buffers that go with ``"theta_0"`` or ``"theta_f"``; often none."""
        return self.fixed_0 if which == "theta_0" else self.fixed_f

    def digest(self) -> str:
        """Hash of the problem's identity: network, training recipe, inputs and weights.

        Inputs and weights are hashed exactly. The network is hashed by its behaviour in float64: a projection of its
        outputs and one of their gradient, at each set of weights, rounded to 7 digits. A change of code that changes
        the NTK therefore changes the digest. A new version of PyTorch or another machine does not.

        Cost: one forward and one backward pass per set of weights, on two samples if samples do not interact.
        """
        digest = hashlib.sha256(self.recipe.encode())
        hash_arrays(digest, {"x": self.x})
        for which in ("theta_0", "theta_f"):
            weights = getattr(self, which)
            if weights is not None:
                hash_arrays(digest, weights)
                hash_arrays(digest, self.fixed(which))
                digest.update(self._behaviour(which).encode())
        return digest.hexdigest()[:16]

    def _behaviour(self, which: str) -> str:
        import torch

        from ntkbench.modules import cast, copied, load

        with own_settings("float64"):
            network = cast(copied(self.module), torch.float64)
            load(network, {**self.fixed(which), **self.weights(which)})
            own = dict(network.named_parameters())
            theta = [own[key].requires_grad_() for key in self.weights(which)]
            x = torch.from_numpy(self.x if self.samples_interact else self.x[:PROBED]).to(theta[0].device)
            outputs = network(x.double() if x.is_floating_point() else x)
            return signature((_projection(outputs) * outputs).sum(), theta)


PROBED = 2
"""Samples on which a network is run for its identity."""


def signature(value: Tensor, parameters: Sequence[Tensor]) -> str:
    """A number and a projection of its gradient by ``parameters``, to 7 digits, in which machines agree in float64."""
    import torch

    gradients = torch.autograd.grad(value, parameters, materialize_grads=True, allow_unused=True)
    along = sum(float((_projection(g) * g).sum()) for g in gradients)
    return " ".join(f"{number + 0.0:.6e}" for number in (float(value.detach()), along))


def _projection(like: Tensor) -> Tensor:
    """Fixed coefficients in [-1, 1], as many as ``like`` has entries and none of them zero."""
    import torch

    return torch.arange(1, like.numel() + 1, dtype=torch.float64, device=like.device).cos().reshape(like.shape)


def hash_arrays(digest: Any, arrays: Weights) -> None:
    """Put arrays into a hash, with their names, types and shapes."""
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())


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
    """A network's weights, split into those with ``requires_grad`` and the frozen ones."""
    by = {key: w.requires_grad for key, w in network.named_parameters() if key in weights}
    return {key: weights[key] for key in by if by[key]}, {key: weights[key] for key in by if not by[key]}
