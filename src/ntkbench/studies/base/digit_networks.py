"""Four kinds of small networks on scikit-learn's digits, which are compared along training."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ntkbench.networks import classifiers, transformer
from ntkbench.networks.architecture import CHANNELS

OUTPUTS, SIDE = 10, 8


class GreyImages(nn.Module):
    """Images of one channel as images of three equal channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, CHANNELS, -1, -1)


def _transformer() -> nn.Module:
    size = transformer.Size(patch=2, width=32, layers=2, heads=4, hidden=64)
    return nn.Sequential(GreyImages(), transformer.VisionTransformer(size, SIDE, OUTPUTS))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: classifiers.network("fc", 128, OUTPUTS),
    "convnet": lambda: classifiers.network("conv", 16, OUTPUTS),
    "resnet": lambda: classifiers.network("resnet18", 4, OUTPUTS),
    "transformer": _transformer,
}
"""Functions that create a network for images ``[N, 1, 8, 8]`` at its initialisation, by name."""
