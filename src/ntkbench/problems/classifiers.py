"""Classifiers of handwritten digits, trained for real: logits on held-out images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkbench.data import images
from ntkbench.networks.jax_layers import linear
from ntkbench.problems.base import Definition, problem, training

if TYPE_CHECKING:
    from torch import nn


@problem
def digits_mlp(N: int = 512) -> Definition:
    """64-256-256-10 ReLU network on scikit-learn's digits, logits of N held-out images; 5 epochs of Adam to theta_f."""
    return _relu_network(*images.digits(), N)


@problem
def mnist_mlp(N: int = 512) -> Definition:
    """784-256-256-10 ReLU network on MNIST (the paper's trained network), only where MNIST can be had."""
    return _relu_network(*images.mnist(), N)


@problem
def digits_conv(N: int = 256) -> Definition:
    """ConvNet on scikit-learn's 8x8 digits: 16 and 64 channels of 3x3, then a wide readout of 1024 features."""
    from torch import nn

    pixels, labels, held_out = (array.reshape(-1, 1, 8, 8) if array.ndim > 1 else array for array in images.digits())

    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 10),
        )

    def jax_forward(weights, x):
        import jax

        for layer, stride in ((0, 1), (2, 2)):
            x = jax.lax.conv_general_dilated(x, weights[f"{layer}.weight"], (stride, stride), ((1, 1), (1, 1)))
            x = jax.nn.relu(x + weights[f"{layer}.bias"][:, None, None])
        return linear(x.reshape(x.shape[0], -1), weights["5.weight"], weights["5.bias"])

    return _classifier(network, pixels, labels, held_out[:N], jax_forward)


def _relu_network(images: np.ndarray, labels: np.ndarray, held_out: np.ndarray, N: int) -> Definition:
    from torch import nn

    def network() -> nn.Module:
        return nn.Sequential(
            nn.Linear(images.shape[1], 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )

    def jax_forward(weights, x):
        import jax

        for layer in (0, 2):
            x = jax.nn.relu(linear(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"]))
        return linear(x, weights["4.weight"], weights["4.bias"])

    return _classifier(network, images, labels, held_out[:N], jax_forward)


def _classifier(
    network: Callable[[], nn.Module],
    images: np.ndarray,
    labels: np.ndarray,
    held_out: np.ndarray,
    jax_forward: Callable[..., Any],
) -> Definition:
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = network()

    def train(module: nn.Module) -> None:
        """5 epochs of Adam on the cross-entropy, learning rate 1e-3, batches of 128."""
        training.adam(
            module,
            torch.from_numpy(images),
            torch.from_numpy(labels),
            nn.functional.cross_entropy,
            batch=128,
            epochs=5,
        )

    return Definition(module, held_out, train, jax_forward=jax_forward)
