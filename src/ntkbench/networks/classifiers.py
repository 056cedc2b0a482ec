"""Networks of the studies: fully connected, convolutional, residual and wide residual, at any width and depth.

He initialisation with zero biases throughout, BatchNorm in eval mode with its initial statistics, as
Mohamadi et al. 2023 have them up to the data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

RESNETS = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
    200: ("bottleneck", (3, 24, 36, 3)),
}
"""Depth to kind of block and blocks a stage (He et al. 2016; 200 as in its follow-up)."""
WIDE_STAGES = (2, 2, 2)
"""Blocks a stage of WideResNet-16."""
EXPANSION = {"basic": 1, "bottleneck": 4}


class Block(nn.Module):
    """Convolutions with BatchNorm and a shortcut, which is a convolution where the shape changes."""

    def __init__(self, kind: str, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * EXPANSION[kind]
        sizes = {"basic": ((3, stride), (3, 1)), "bottleneck": ((1, 1), (3, stride), (1, 1))}[kind]
        layers: list[nn.Module] = []
        before = channels
        for i, (size, step) in enumerate(sizes):
            after = out if i == len(sizes) - 1 else width
            layers += [nn.Conv2d(before, after, size, step, size // 2, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        self.inner = nn.Sequential(*layers[:-1])
        same = stride == 1 and channels == out
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.inner(x) + self.shortcut(x))


def resnet(depth: int, outputs: int, width: int = 64, channels: int = 3, imagenet_stem: bool = False) -> nn.Module:
    """ResNet of a depth; with a 3x3 stem, or the 7x7 one with max pooling for images of 224x224."""
    kind, stages = RESNETS[depth]
    stem: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    if imagenet_stem:
        stem[0] = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        stem.append(nn.MaxPool2d(3, 2, 1))
    return _initialised(nn.Sequential(*stem, *_stages(kind, width, width, stages), *_readout(kind, width, 4, outputs)))


def wide_resnet(factor: int, outputs: int, channels: int = 3) -> nn.Module:
    """WideResNet-16 of a widening factor: three stages of two blocks, from 16 channels."""
    stem = [nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16 * factor
    return _initialised(
        nn.Sequential(*stem, *_stages("basic", 16, width, WIDE_STAGES), *_readout("basic", width, 3, outputs))
    )


def fc(width: int, outputs: int, inputs: int = 64) -> nn.Module:
    """Two hidden ReLU layers of a width, on flattened images."""
    layers = [nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return _initialised(nn.Sequential(*layers, nn.Linear(width, outputs)))


def conv(width: int, outputs: int, channels: int = 1) -> nn.Module:
    """Three 3x3 convolutions of a width, the second one of stride two, global average, linear readout."""
    layers: list[nn.Module] = []
    for i, stride in enumerate((1, 2, 1)):
        layers += [nn.Conv2d(width if i else channels, width, 3, stride, 1), nn.ReLU()]
    return _initialised(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs)))


FAMILIES: dict[str, Callable[[int, int], nn.Module]] = {
    "fc": fc,
    "conv": conv,
    "resnet18": lambda width, outputs: resnet(18, outputs, width, channels=1),
    "wide_resnet": lambda factor, outputs: wide_resnet(factor, outputs, channels=1),
}
"""Name to network of a width on images of one channel."""


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network whose weights are drawn from a seed, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def _stages(kind: str, channels: int, width: int, stages: tuple[int, ...]) -> list[nn.Module]:
    blocks = []
    for stage, count in enumerate(stages):
        for i in range(count):
            blocks.append(Block(kind, channels, width * 2**stage, 2 if stage and not i else 1))
            channels = width * 2**stage * EXPANSION[kind]
    return blocks


def _readout(kind: str, width: int, stages: int, outputs: int) -> list[nn.Module]:
    features = width * 2 ** (stages - 1) * EXPANSION[kind]
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, outputs)]


def _initialised(network: nn.Module) -> nn.Module:
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network
