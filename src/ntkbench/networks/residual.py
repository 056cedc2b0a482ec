"""ResNets and WideResNet-16, with BatchNorm in eval mode at its initial statistics."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ntkbench.networks import layers
from ntkbench.networks.architecture import CHANNELS, Architecture, Weights
from ntkbench.networks.initialisation import scaled_normal

RESNETS = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
    200: ("bottleneck", (3, 24, 36, 3)),
}
"""Depth to kind of block and blocks per stage (He et al. 2016; 200 as in its follow-up)."""
WIDE_STAGES = (2, 2, 2)
"""Blocks per stage of WideResNet-16."""
KERNELS = {"basic": (3, 3), "bottleneck": (1, 3, 1)}
"""Kernel sizes of a block's convolutions; the first 3x3 one has the block's stride."""
EXPANSION = {"basic": 1, "bottleneck": 4}
"""Output channels of a block, in multiples of its width."""


class Block(nn.Module):
    """Convolutions with BatchNorm and a shortcut, which is a convolution where the shape changes."""

    def __init__(self, kind: str, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out, kernels = width * EXPANSION[kind], KERNELS[kind]
        stack: list[nn.Module] = []
        before = channels
        for i, size in enumerate(kernels):
            after = out if i == len(kernels) - 1 else width
            step = stride if i == kernels.index(3) else 1
            stack += [nn.Conv2d(before, after, size, step, size // 2, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        self.inner = nn.Sequential(*stack[:-1])
        same = stride == 1 and channels == out
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.inner(x) + self.shortcut(x))


def network(
    depth: int, outputs: int, width: int = 64, channels: int = CHANNELS, imagenet_stem: bool = False
) -> nn.Sequential:
    """ResNet of a given depth, with a 3x3 stem, or the 7x7 one with max pooling for images of 224x224."""
    kind, stages = RESNETS[depth]
    stem: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    if imagenet_stem:
        stem[0] = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        stem.append(nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, *_stages(kind, width, width, stages), *_readout(kind, width, stages, outputs))


def wide_network(factor: int, outputs: int, channels: int = CHANNELS) -> nn.Sequential:
    """WideResNet-16 with a given widening factor: three stages of two blocks, from 16 channels."""
    stem = [nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = _stages("basic", 16, 16 * factor, WIDE_STAGES)
    return nn.Sequential(*stem, *blocks, *_readout("basic", 16 * factor, WIDE_STAGES, outputs))


def forward(kind: str, stages: tuple[int, ...], imagenet_stem: bool, weights: Weights, x: Any) -> Any:
    """:func:`network` or :func:`wide_network` in JAX, by kind of block and blocks per stage."""
    import jax

    x = jax.nn.relu(_normed(weights, "0", "1", x, 2 if imagenet_stem else 1))
    if imagenet_stem:
        window = {"window_dimensions": (1, 1, 3, 3), "window_strides": (1, 1, 2, 2)}
        x = jax.lax.reduce_window(x, -float("inf"), jax.lax.max, padding=((0, 0), (0, 0), (1, 1), (1, 1)), **window)
    block, kernels = 4 if imagenet_stem else 3, KERNELS[kind]
    for stage, count in enumerate(stages):
        for i in range(count):
            stride = 2 if stage and not i else 1
            inner = x
            for part in range(len(kernels)):
                step = stride if part == kernels.index(3) else 1
                inner = _normed(weights, f"{block}.inner.{3 * part}", f"{block}.inner.{3 * part + 1}", inner, step)
                inner = inner if part == len(kernels) - 1 else jax.nn.relu(inner)
            if f"{block}.shortcut.0.weight" in weights:
                x = _normed(weights, f"{block}.shortcut.0", f"{block}.shortcut.1", x, stride)
            x = jax.nn.relu(inner + x)
            block += 1
    return layers.linear(weights, f"{block + 2}", x.mean((2, 3)))


def resnet(depth: int, width: int, side: int) -> Architecture:
    """ResNet of a given depth with the ImageNet stem, at He initialisation."""

    def make(outputs: int) -> nn.Module:
        return scaled_normal(network(depth, outputs, width, imagenet_stem=True))

    return Architecture(f"ResNet{depth}", width, side, make, functools.partial(forward, *RESNETS[depth], True))


def wide_resnet(factor: int, side: int) -> Architecture:
    """WideResNet-16 with a given widening factor and a 3x3 stem, at He initialisation."""

    def make(outputs: int) -> nn.Module:
        return scaled_normal(wide_network(factor, outputs))

    run = functools.partial(forward, "basic", WIDE_STAGES, False)
    return Architecture(f"WideResNet-16-{factor}", 16 * factor, side, make, run)


def _stages(kind: str, channels: int, width: int, stages: tuple[int, ...]) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for stage, count in enumerate(stages):
        for i in range(count):
            blocks.append(Block(kind, channels, width * 2**stage, 2 if stage and not i else 1))
            channels = width * 2**stage * EXPANSION[kind]
    return blocks


def _readout(kind: str, width: int, stages: tuple[int, ...], outputs: int) -> list[nn.Module]:
    features = width * 2 ** (len(stages) - 1) * EXPANSION[kind]
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, outputs)]


def _normed(weights: Weights, name: str, norm: str, x: Any, stride: int) -> Any:
    return layers.batch_norm(weights, norm, layers.convolution(weights, name, x, stride))
