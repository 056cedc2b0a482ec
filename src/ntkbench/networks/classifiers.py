"""The networks of Mohamadi et al. (ICML 2023) on other data: four families of any width on digits of 8x8 pixels.

All are at He initialisation with zero biases.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ntkbench.networks import convolutional, fully_connected, residual
from ntkbench.networks.initialisation import scaled_normal

FAMILIES: dict[str, Callable[[int, int], nn.Sequential]] = {
    "fc": lambda width, outputs: fully_connected.network((64, width, width, outputs), flatten=True),
    "conv": lambda width, outputs: convolutional.network((1, width, width, width), outputs, strides=(1, 2, 1)),
    "resnet18": lambda width, outputs: residual.network(18, outputs, width, channels=1),
    "wide_resnet": lambda factor, outputs: residual.wide_network(factor, outputs, channels=1),
}
"""Networks by name, as functions of width and number of outputs, on images ``[N, 1, 8, 8]``."""


def network(family: str, width: int, outputs: int) -> nn.Sequential:
    """A network of a family at He initialisation."""
    return scaled_normal(FAMILIES[family](width, outputs))
