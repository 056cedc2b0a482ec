"""Networks on CIFAR-10, pretrained or trained on a part of it: logits on held-out images."""

from __future__ import annotations

import functools

import numpy as np

from ntkbench.data import images, pretrained
from ntkbench.errors import BadInput
from ntkbench.problems.base import Definition, problem, training


@problem(any_size=True, data=(images.CIFAR10, pretrained.RESNETS[20]))
def resnet20_cifar(N: int = 64) -> Definition:
    """ResNet-20 on N held-out images of CIFAR-10 (JPEG copies), from He initialisation to pretrained weights."""
    return _pretrained(20, N)


@problem(any_size=True, data=(images.CIFAR10, pretrained.RESNETS[56]))
def resnet56_cifar(N: int = 32) -> Definition:
    """ResNet-56 on N held-out images of CIFAR-10 (JPEG copies), from He initialisation to pretrained weights."""
    return _pretrained(56, N)


def _pretrained(depth: int, N: int) -> Definition:
    from ntkbench.networks import cifar_residual
    from ntkbench.networks.initialisation import seeded

    held_out = _held_out(N)
    module = seeded(lambda: cifar_residual.ResNet(depth), 0)
    recipe = training.Given("akamaster/pytorch_resnet_cifar10", pretrained.resnet(depth))
    return Definition(module, held_out, recipe, jax_forward=cifar_residual.jax_forward(depth))


@problem(any_size=True, data=(images.CIFAR10,))
def resnet18_cifar(N: int = 32, width: int = 16) -> Definition:
    """ResNet-18 of a given width on N held-out images of CIFAR-10 (JPEG copies).

    Trained by 5 epochs of Adam on 5,000 images, to an accuracy of 41 % on held-out images at a width of 16.
    """
    from ntkbench.networks import residual
    from ntkbench.networks.initialisation import scaled_normal, seeded

    module = seeded(lambda: scaled_normal(residual.network(18, 10, width)), 0)
    forward = functools.partial(residual.forward, *residual.RESNETS[18], False)
    return Definition(module, _held_out(N), _trained(training.AdamInTrainMode, epochs=5), jax_forward=forward)


@problem(any_size=True, data=(images.CIFAR10,))
def vit_cifar(N: int = 32) -> Definition:
    """Vision Transformer of 4 blocks, d = 64 and patches of 4x4 on N held-out images of CIFAR-10 (JPEG copies).

    Trained by 10 epochs of Adam on 5,000 images, to an accuracy of 45 % on held-out images.
    """
    from ntkbench.networks import transformer
    from ntkbench.networks.initialisation import seeded

    size = transformer.Size(patch=4, width=64, layers=4, heads=4, hidden=256)
    architecture = transformer.of_size("ViT", size, side=32)
    module = seeded(lambda: architecture.make(10), 0)
    return Definition(module, _held_out(N), _trained(training.Adam, epochs=10), jax_forward=architecture.forward)


def _trained(recipe: type[training.Adam], epochs: int) -> training.Adam:
    """A recipe on the training part of CIFAR-10."""
    import torch
    from torch.nn import functional

    pixels, labels = (torch.from_numpy(array) for array in images.cifar10("train"))
    return recipe(pixels, labels, functional.cross_entropy, batch=64, epochs=epochs)


def _held_out(N: int) -> np.ndarray:
    held_out, _ = images.cifar10("test")
    if len(held_out) < N:
        raise BadInput(f"there are {len(held_out)} held-out images of CIFAR-10; got N={N}")
    return held_out[:N]
