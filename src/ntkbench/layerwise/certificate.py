"""The certificate of a kernel: the gradient from its factors, compared with plain automatic differentiation.

A kernel's rows are gradients of directions u_bk . f_b. With random weights c the factors of all layers add up to the
gradient of sum_(b, k) c_bk u_bk . f_b, which one plain backward pass over the whole batch also gives. The
certificate therefore covers the trace, every rule, and the assumption that samples do not interact.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ntkbench.layerwise.capture import ParameterValues
from ntkbench.layerwise.factors import GradientFactors
from ntkbench.layerwise.layers import ExplicitGradient, Layer
from ntkbench.operators import certificate
from ntkbench.operators.plain import PlainNetwork


class Certificate:
    """The gradient at one set of weights, accumulated layer by layer as a kernel visits its rows.

    Args:
        names: names of the parameters, in the order of their values.
        parameters: the set of weights.
        x: inputs of all rows.
        directions: directions of all rows, ``[K, O]`` or ``[N, K, O]``; ``None`` for unit vectors.
        count: number of directions, K.
        needed: names of the parameters of all layers that count.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: ParameterValues,
        x: Tensor,
        directions: Tensor | None,
        count: int,
        needed: Collection[str],
    ) -> None:
        self._parameters, self._x, self._directions, self._needed = parameters, x, directions, frozenset(needed)
        self._c = certificate.random_weights(len(x) * count, parameters[0]).reshape(len(x), count)
        self._gradients = {name: torch.zeros_like(w).reshape(-1) for name, w in zip(names, parameters, strict=True)}
        self._covered: set[str] = set()

    def add(self, samples: slice, directions: slice, layer: Layer | ExplicitGradient, factors: GradientFactors) -> None:
        """Add a layer's part of the rows of some samples in some directions."""
        layer.add_gradient(self._gradients, factors, self._c[samples, directions])
        self._covered.update(layer.parameters)

    def difference(self, network: PlainNetwork, memory: int) -> float:
        """The relative difference from the plain gradient over the parameters of all added layers; 1 pass.

        Args:
            network: plain autograd.
            memory: bytes of the values that autograd saves.

        Raises:
            Uncertified: a layer that counts was not added, or none counts.
        """
        if not self._needed or self._covered != self._needed:
            raise certificate.Uncertified("the gradients of some layers were not computed")
        network.load(self._parameters)
        v = self._c if self._directions is None else self._c[:, None] @ self._directions  # [N, 1, O]
        plain = dict(zip(self._gradients, network.gradient(self._x, v, memory), strict=True))
        return certificate.distance_of_parts((self._gradients[name], plain[name].reshape(-1)) for name in self._covered)
