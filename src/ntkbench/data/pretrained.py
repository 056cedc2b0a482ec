"""Pretrained weights: ResNet-20 and ResNet-56 on CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ntkbench.data.files import DataFile

RESNETS = {
    depth: DataFile(
        f"resnet_cifar10/resnet{depth}.npz",
        f"Weights of ResNet-{depth} on CIFAR-10",
        "the state_dict of github.com/akamaster/pytorch_resnet_cifar10 as float32 arrays by name",
    )
    for depth in (20, 56)
}
"""Weights by depth: Y. Idelbayev's reimplementation of He et al. 2016, section 4.2 (BSD 2-Clause licence)."""


def resnet(depth: int) -> dict[str, np.ndarray]:
    """Parameters and BatchNorm's statistics by their names in the state_dict, float32.

    The accuracy is 91.7 % (ResNet-20) and 93.4 % (ResNet-56) on CIFAR-10's test images, and 81.3 % and 83.1 % on the
    held-out images in JPEG copies.

    Args:
        depth: a key of :data:`RESNETS`.

    Raises:
        BadInput, Unavailable, Corrupt: see :class:`ntkbench.data.files.DataFile`.
    """
    return RESNETS[depth].read(_arrays)


def _arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as stored:
        return {name: stored[name].astype(np.float32) for name in stored.files}
