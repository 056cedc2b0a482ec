"""ResNets for CIFAR-10 of 6 n + 2 layers (He et al. 2016, section 4.2), with parameter-free shortcuts.

Module names are those of github.com/akamaster/pytorch_resnet_cifar10, so that its weights can be loaded. BatchNorm is
in eval mode.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ntkbench.networks import layers
from ntkbench.networks.architecture import CHANNELS, Weights

WIDTH = 16
"""Channels of the first of three stages; the others have two and four times as many."""


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut.

    Where the shape changes, the shortcut takes every other pixel and pads with channels of zeros, half before and half
    after (option A).
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stride = width // channels
        self.conv1 = nn.Conv2d(channels, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            missing = (inner.shape[1] - x.shape[1]) // 2
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, missing, missing))
        return torch.relu(inner + x)


class ResNet(nn.Module):
    """Images ``[N, 3, 32, 32]`` to logits ``[N, O]``, at He initialisation, in eval mode.

    Args:
        depth: number of layers, 6 n + 2 for n blocks per stage.
        outputs: O.
    """

    def __init__(self, depth: int, outputs: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, WIDTH, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(Block(before, width), *(Block(width, width) for _ in range(_blocks(depth) - 1)))
            for before, width in itertools.pairwise((WIDTH, WIDTH, 2 * WIDTH, 4 * WIDTH))
        )
        self.linear = nn.Linear(4 * WIDTH, outputs)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def jax_forward(depth: int) -> Callable[[Weights, Any], Any]:
    """:class:`ResNet` in JAX, a function of weights and images; running statistics default to the initial ones."""
    return functools.partial(_forward, _blocks(depth))


def _blocks(depth: int) -> int:
    """Blocks per stage."""
    return (depth - 2) // 6


def _forward(blocks: int, weights: Weights, x: Any) -> Any:
    import jax
    import jax.numpy as jnp

    x = jax.nn.relu(_normed(weights, "", 1, x))
    for stage in range(3):
        for i in range(blocks):
            name, stride = f"layer{stage + 1}.{i}.", 2 if stage and not i else 1
            inner = _normed(weights, name, 2, jax.nn.relu(_normed(weights, name, 1, x, stride)))
            if stride > 1:
                missing = (inner.shape[1] - x.shape[1]) // 2
                x = jnp.pad(x[:, :, ::2, ::2], ((0, 0), (missing, missing), (0, 0), (0, 0)))
            x = jax.nn.relu(inner + x)
    return layers.linear(weights, "linear", x.mean((2, 3)))


def _normed(weights: Weights, name: str, number: int, x: Any, stride: int = 1) -> Any:
    return layers.batch_norm(
        weights, f"{name}bn{number}", layers.convolution(weights, f"{name}conv{number}", x, stride)
    )
