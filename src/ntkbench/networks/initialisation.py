"""Initial weights: PyTorch's own, or normal ones scaled by fan-in, drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def scaled_normal(network: Module, nonlinearity: Literal["relu", "linear"] = "relu") -> Module:
    """Draw normal weights and set biases to zero, in place, in all linear and convolutional layers.

    The variance is 2 / fan-in for ``"relu"`` (He et al. 2015) and 1 / fan-in for ``"linear"``.

    Returns:
        The network itself.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity=nonlinearity)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network


def seeded(make: Callable[[], Module], seed: int) -> Module:
    """The network that ``make`` creates with a seed, in eval mode. Torch's random state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()
