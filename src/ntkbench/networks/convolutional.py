"""Plain convolutional ReLU networks: 3x3 convolutions and a linear readout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ntkbench.networks import layers
from ntkbench.networks.architecture import Weights


def network(
    channels: Sequence[int], outputs: int, *, strides: Sequence[int], features: int | None = None
) -> nn.Sequential:
    """Convolutions with zero padding of 1, a ReLU after each, and a linear readout of their global average.

    Args:
        channels: channels of the images ``[N, C, side, side]``, then of each convolution.
        outputs: O.
        strides: stride of each convolution.
        features: output entries of the last convolution per sample, to read out all of them instead of their average.
    """
    stack: list[nn.Module] = []
    for before, after, stride in zip(channels[:-1], channels[1:], strides, strict=True):
        stack += [nn.Conv2d(before, after, 3, stride, 1), nn.ReLU()]
    stack += [nn.AdaptiveAvgPool2d(1)] if features is None else []
    return nn.Sequential(*stack, nn.Flatten(), nn.Linear(features or channels[-1], outputs))


def forward(weights: Weights, x: Any, *, strides: Sequence[int], average: bool = True) -> Any:
    """:func:`network` in JAX; ``average`` is true if ``features`` is not given there."""
    import jax

    for i, stride in enumerate(strides):
        x = jax.nn.relu(layers.convolution(weights, f"{2 * i}", x, stride))
    x = x.mean((2, 3)) if average else x.reshape(len(x), -1)
    return layers.linear(weights, f"{2 * len(strides) + 1 + average}", x)
