"""Networks on CIFAR-10 with pretrained weights: logits on held-out images."""

from __future__ import annotations

import numpy as np

from ntkbench.data import images, pretrained
from ntkbench.errors import BadInput
from ntkbench.problems.base import Definition, problem, training


@problem(any_size=True, data=(images.CIFAR10, pretrained.RESNETS[20]))
def resnet20_cifar(N: int = 64) -> Definition:
    """ResNet-20 on N held-out images of CIFAR-10 (JPEG copies), from He initialisation to weights trained by others."""
    return _pretrained(20, N)


@problem(any_size=True, data=(images.CIFAR10, pretrained.RESNETS[56]))
def resnet56_cifar(N: int = 32) -> Definition:
    """ResNet-56 on N held-out images of CIFAR-10 (JPEG copies), from He initialisation to weights trained by others."""
    return _pretrained(56, N)


def _pretrained(depth: int, N: int) -> Definition:
    from ntkbench.networks import cifar_residual
    from ntkbench.networks.initialisation import seeded

    held_out = _held_out(N)
    module = seeded(lambda: cifar_residual.ResNet(depth), 0)
    recipe = training.Given("akamaster/pytorch_resnet_cifar10", pretrained.resnet(depth))
    return Definition(module, held_out, recipe, jax_forward=cifar_residual.jax_forward(depth))


def _held_out(N: int) -> np.ndarray:
    held_out, _ = images.cifar10("test")
    if len(held_out) < N:
        raise BadInput(f"there are {len(held_out)} held-out images of CIFAR-10; got N={N}")
    return held_out[:N]
