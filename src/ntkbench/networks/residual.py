"""ResNets and WideResNets-16: those of Mohamadi's studies, and the same in JAX."""

from __future__ import annotations

import functools
from typing import Any

from ntkbench.networks import classifiers
from ntkbench.networks.architecture import Architecture, Weights
from ntkbench.networks.jax_layers import linear

PARTS = {"basic": 2, "bottleneck": 3}
"""Convolutions of a kind of block."""
STRIDED = {"basic": 0, "bottleneck": 1}
"""Which of them has the block's stride."""


def resnet(depth: int, width: int, side: int) -> Architecture:
    """ResNet of a depth with the stem of ImageNet."""
    make = functools.partial(classifiers.resnet, depth, width=width, imagenet_stem=True)
    return Architecture(
        f"ResNet{depth}", width, side, make, functools.partial(_forward, *classifiers.RESNETS[depth], True)
    )


def wide_resnet(factor: int, side: int) -> Architecture:
    """WideResNet-16 of a widening factor, with a stem of 3x3."""
    make = functools.partial(classifiers.wide_resnet, factor)
    forward = functools.partial(_forward, "basic", classifiers.WIDE_STAGES, False)
    return Architecture(f"WideResNet-16-{factor}", 16 * factor, side, make, forward)


def _forward(kind: str, stages: tuple[int, ...], imagenet_stem: bool, weights: Weights, x: Any) -> Any:
    import jax

    x = jax.nn.relu(_convolved(weights, "0", "1", x, 2 if imagenet_stem else 1))
    if imagenet_stem:
        window = {"window_dimensions": (1, 1, 3, 3), "window_strides": (1, 1, 2, 2)}
        x = jax.lax.reduce_window(x, -float("inf"), jax.lax.max, padding=((0, 0), (0, 0), (1, 1), (1, 1)), **window)
    block = 4 if imagenet_stem else 3
    for stage, count in enumerate(stages):
        for i in range(count):
            stride = 2 if stage and not i else 1
            inner = x
            for part in range(PARTS[kind]):
                step = stride if part == STRIDED[kind] else 1
                inner = _convolved(weights, f"{block}.inner.{3 * part}", f"{block}.inner.{3 * part + 1}", inner, step)
                inner = inner if part == PARTS[kind] - 1 else jax.nn.relu(inner)
            if f"{block}.shortcut.0.weight" in weights:
                x = _convolved(weights, f"{block}.shortcut.0", f"{block}.shortcut.1", x, stride)
            x = jax.nn.relu(inner + x)
            block += 1
    return linear(x.mean((2, 3)), weights[f"{block + 2}.weight"], weights[f"{block + 2}.bias"])


def _convolved(weights: Weights, name: str, norm: str, x: Any, stride: int) -> Any:
    """A convolution, and BatchNorm in eval mode with its initial statistics."""
    import jax

    kernel = weights[f"{name}.weight"]
    pad = kernel.shape[-1] // 2
    x = jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((pad, pad), (pad, pad)))
    scale = weights[f"{norm}.weight"] / (1 + 1e-5) ** 0.5
    return x * scale[:, None, None] + weights[f"{norm}.bias"][:, None, None]
