"""MLP-Mixers (Tolstikhin et al. 2021, arXiv 2105.01601): alternating perceptrons across patches and channels."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ntkbench.networks import layers
from ntkbench.networks.architecture import Architecture, Weights
from ntkbench.networks.initialisation import scaled_normal


@dataclass(frozen=True)
class Size:
    """Size of an MLP-Mixer.

    Attributes:
        patch: side length of a patch in pixels.
        width: channels of a token.
        layers: number of blocks.
        across_tokens: hidden units of a block's perceptron across patches.
        across_channels: hidden units of a block's perceptron across channels.
    """

    patch: int
    width: int
    layers: int
    across_tokens: int
    across_channels: int


SIZES = {
    "S/32": Size(32, 512, 8, 256, 2048),
    "S/16": Size(16, 512, 8, 256, 2048),
    "B/16": Size(16, 768, 12, 384, 3072),
}
"""Sizes by the paper's names (its table 1)."""


def mlp_mixer(name: str, side: int) -> Architecture:
    """An MLP-Mixer of a standard size."""
    return of_size(f"Mixer-{name}", SIZES[name], side)


def of_size(title: str, size: Size, side: int) -> Architecture:
    """An MLP-Mixer of any size; patches must tile the image."""
    make = functools.partial(MlpMixer, size, side)
    return Architecture(title, size.width, side, make, functools.partial(_forward, size))


class Block(nn.Module):
    """A perceptron across tokens and one across channels, each after a norm and with a shortcut."""

    def __init__(self, size: Size, tokens: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (layers.LayerNorm(size.width) for _ in range(2))
        self.tokens = layers.Perceptron(tokens, size.across_tokens)
        self.channels = layers.Perceptron(size.width, size.across_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class MlpMixer(nn.Module):
    """Images ``[N, 3, side, side]`` to ``[N, O]``, read out from the mean over patches."""

    def __init__(self, size: Size, side: int, outputs: int) -> None:
        super().__init__()
        self.patches = layers.Patches(size.patch, size.width)
        self.blocks = nn.Sequential(*(Block(size, (side // size.patch) ** 2) for _ in range(size.layers)))
        self.norm = layers.LayerNorm(size.width)
        self.head = nn.Linear(size.width, outputs)
        scaled_normal(self, "linear")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x))).mean(1))


def _forward(size: Size, weights: Weights, x: Any) -> Any:
    x = layers.patches(weights, "patches", x)
    for i in range(size.layers):
        normed = layers.layer_norm(weights, f"blocks.{i}.norm1", x).swapaxes(1, 2)
        x = x + layers.perceptron(weights, f"blocks.{i}.tokens", normed).swapaxes(1, 2)
        x = x + layers.perceptron(weights, f"blocks.{i}.channels", layers.layer_norm(weights, f"blocks.{i}.norm2", x))
    return layers.linear(weights, "head", layers.layer_norm(weights, "norm", x).mean(1))
