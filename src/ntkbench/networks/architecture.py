"""Standard networks for images: what a study is handed of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

CHANNELS = 3
"""Of an image."""
Weights = Mapping[str, Any]
"""Arrays by the names of a torch module's parameters."""


@dataclass(frozen=True)
class Architecture:
    """A network but for the size of its readout.

    Attributes:
        title: its name and size.
        width: channels of a ResNet's first stage, numbers a token of the others.
        side: pixels of an image's side.
        make: number of outputs O to the network in torch, images ``[N, 3, side, side]`` to ``[N, O]``.
        forward: the same in JAX, a function of weights and images.
    """

    title: str
    width: int
    side: int
    make: Callable[[int], nn.Module]
    forward: Callable[[Weights, Any], Any]
