"""Trained classifiers of handwritten digits: logits on held-out images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkbench.data import images
from ntkbench.problems.base import Definition, problem, training

if TYPE_CHECKING:
    from torch import nn


@problem
def digits_mlp(N: int = 512) -> Definition:
    """64-256-256-10 ReLU network on scikit-learn's digits, logits of N held-out images; 5 epochs of Adam to theta_f."""
    return _relu_network(*images.digits(), N)


@problem(data=images.MNIST)
def mnist_mlp(N: int = 512) -> Definition:
    """784-256-256-10 ReLU network (the paper's), trained on 9,000 images of MNIST's test file; N of 1,000 held out."""
    return _relu_network(*images.mnist()[:3], N)


@problem
def digits_conv(N: int = 256) -> Definition:
    """ConvNet on scikit-learn's 8x8 digits: 16 and 64 channels of 3x3, then a wide readout of 1024 features."""
    from ntkbench.networks import convolutional

    pixels, labels, held_out = images.digits()
    pixels, held_out = (array.reshape(-1, 1, 8, 8) for array in (pixels, held_out))
    strides = (1, 2)
    make = functools.partial(convolutional.network, (1, 16, 64), 10, strides=strides, features=64 * 4 * 4)
    forward = functools.partial(convolutional.forward, strides=strides, average=False)
    return _classifier(make, pixels, labels, held_out[:N], forward)


def _relu_network(pixels: np.ndarray, labels: np.ndarray, held_out: np.ndarray, N: int) -> Definition:
    from ntkbench.networks import fully_connected

    make = functools.partial(fully_connected.network, [pixels.shape[1], 256, 256, 10])
    return _classifier(make, pixels, labels, held_out[:N], fully_connected.forward)


def _classifier(
    make: Callable[[], nn.Module],
    pixels: np.ndarray,
    labels: np.ndarray,
    held_out: np.ndarray,
    forward: Callable[..., Any],
) -> Definition:
    """Trained by 5 epochs of Adam on the cross-entropy, in batches of 128."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make()
    recipe = training.Adam(
        torch.from_numpy(pixels), torch.from_numpy(labels), nn.functional.cross_entropy, batch=128, epochs=5
    )
    return Definition(module, held_out, recipe, jax_forward=forward)
