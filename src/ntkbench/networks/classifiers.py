"""The networks of Mohamadi et al. (ICML 2023) on other data: four families of any width on images of any size.

All are at He initialisation with zero biases.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ntkbench.networks import convolutional, fully_connected, residual
from ntkbench.networks.initialisation import scaled_normal

FAMILIES: dict[str, Callable[[int, int, int, int], nn.Sequential]] = {
    "fc": lambda width, outputs, channels, side: fully_connected.network(
        (channels * side**2, width, width, outputs), flatten=True
    ),
    "conv": lambda width, outputs, channels, side: convolutional.network(
        (channels, width, width, width), outputs, strides=(1, 2, 1)
    ),
    "resnet18": lambda width, outputs, channels, side: residual.network(18, outputs, width, channels),
    "wide_resnet": lambda factor, outputs, channels, side: residual.wide_network(factor, outputs, channels),
}
"""Networks by name, as functions of width, outputs, and the images ``[N, channels, side, side]``."""


def network(family: str, width: int, outputs: int, channels: int = 1, side: int = 8) -> nn.Sequential:
    """A network of a family at He initialisation, for images ``[N, channels, side, side]``."""
    return scaled_normal(FAMILIES[family](width, outputs, channels, side))
