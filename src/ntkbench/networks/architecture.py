"""Standard image networks, as used in studies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

CHANNELS = 3
"""Channels of an image."""
Weights = Mapping[str, Any]
"""Arrays by the names of a torch module's parameters."""


@dataclass(frozen=True)
class Architecture:
    """An image network with any number of outputs.

    Attributes:
        title: its name and size.
        width: channels of a ResNet's first stage; width of a token for the others.
        side: side length of an image in pixels.
        make: function from the number of outputs O to the torch network, ``[N, 3, side, side] -> [N, O]``.
        forward: the same in JAX, a function of weights and images.
    """

    title: str
    width: int
    side: int
    make: Callable[[int], nn.Module]
    forward: Callable[[Weights, Any], Any]
