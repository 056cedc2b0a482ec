"""Networks on which exact kernels are compared, at any size: fully connected, convolutional and ResNet18.

They are of the kinds in Novak et al. (arXiv 2206.08720, figures 1 and 2): ReLU networks on flattened images,
convolutions with a global average before the readout, and an image network with BatchNorm in eval mode. Inputs are
standard normal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ntkbench.errors import BadInput
from ntkbench.problems.base import Definition, problem, training

if TYPE_CHECKING:
    from torch import nn

PIXELS, SIDE = 784, 32
TRAINED_ON = 8


@problem(any_size=True)
def fc_relu(N: int = 128, O: int = 10, width: int = 1024, depth: int = 3, inputs: int = PIXELS) -> Definition:  # noqa: E741
    """inputs-width-...-width-O ReLU network with ``depth`` hidden layers on N standard normal inputs."""
    from ntkbench.networks import fully_connected

    make = functools.partial(fully_connected.network, [inputs, *[width] * depth, O])
    return _on_normal_inputs(make, (N, inputs), O, fully_connected.forward)


@problem(any_size=True)
def conv_relu(N: int = 64, O: int = 10, width: int = 64) -> Definition:  # noqa: E741
    """Three 3x3 convolutions of ``width`` channels on 32x32 inputs, global average, linear readout."""
    from ntkbench.networks import convolutional

    strides = (1, 1, 1)
    make = functools.partial(convolutional.network, (3, width, width, width), O, strides=strides)
    forward = functools.partial(convolutional.forward, strides=strides)
    return _on_normal_inputs(make, (N, 3, SIDE, SIDE), O, forward)


@problem(any_size=True)
def resnet18(N: int = 8, O: int = 10, width: int = 64, depth: int = 18) -> Definition:  # noqa: E741
    """ResNet18, or a deeper one, for 32x32 inputs (3x3 stem, no max pooling).

    BatchNorm is in eval mode with its initial statistics. Depths are 18, 34, 50, 101, 152 and 200.
    """
    from ntkbench.networks import residual

    if depth not in residual.RESNETS:
        raise BadInput(f"depth must be one of {', '.join(map(str, residual.RESNETS))}; got {depth}")
    make = functools.partial(residual.network, depth, O, width)
    forward = functools.partial(residual.forward, *residual.RESNETS[depth], False)
    return _on_normal_inputs(make, (N, 3, SIDE, SIDE), O, forward)


def _on_normal_inputs(
    make: Callable[[], nn.Module], shape: tuple[int, ...], outputs: int, forward: Callable[..., Any]
) -> Definition:
    """Trained by 4 full-batch steps of Adam towards fixed standard normal targets, on 8 separate inputs."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Training inputs are drawn first, so that they and the network do not depend on N.
        known = torch.randn(TRAINED_ON, *shape[1:])
        module = make().eval()
        x = torch.randn(shape)
    targets = torch.randn((TRAINED_ON, outputs), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    recipe = training.Adam(known, targets, nn.functional.mse_loss, batch=TRAINED_ON, epochs=4)
    return Definition(module, x.numpy(), recipe, jax_forward=forward)
