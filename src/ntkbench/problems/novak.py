"""The networks that exact kernels are compared on, at any size: fully connected, convolutional and ResNet18.

Those of Novak et al. (arXiv 2206.08720, figures 1 and 2) in kind: ReLU networks on flattened images, convolutions with
a global average before the readout, and an image network with BatchNorm in eval mode. Inputs are standard normal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ntkbench.networks.jax_layers import linear
from ntkbench.problems.base import Definition, problem, training

if TYPE_CHECKING:
    from torch import nn

PIXELS, SIDE = 784, 32
TRAINED_ON = 8


@problem(any_size=True)
def fc_relu(N: int = 128, O: int = 10, width: int = 1024, depth: int = 3) -> Definition:  # noqa: E741
    """784-width-...-width-O ReLU network with ``depth`` hidden layers on N standard normal inputs."""
    from torch import nn

    def network() -> nn.Module:
        sizes = [PIXELS, *[width] * depth]
        hidden = [layer for i in range(depth) for layer in (nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(width, O))

    def jax_forward(weights, x):
        import jax

        for i in range(depth):
            x = jax.nn.relu(linear(x, weights[f"{2 * i}.weight"], weights[f"{2 * i}.bias"]))
        return linear(x, weights[f"{2 * depth}.weight"], weights[f"{2 * depth}.bias"])

    return _on_normal_inputs(network, (N, PIXELS), jax_forward)


@problem(any_size=True)
def conv_relu(N: int = 64, O: int = 10, width: int = 64) -> Definition:  # noqa: E741
    """Three 3x3 convolutions of ``width`` channels on 32x32 inputs, global average, linear readout."""
    from torch import nn

    def network() -> nn.Module:
        hidden = [layer for i in range(3) for layer in (nn.Conv2d(width if i else 3, width, 3, padding=1), nn.ReLU())]
        return nn.Sequential(*hidden, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, O))

    def jax_forward(weights, x):
        import jax

        for i in (0, 2, 4):
            x = jax.nn.relu(_convolved(x, weights[f"{i}.weight"]) + weights[f"{i}.bias"][:, None, None])
        return linear(x.mean((2, 3)), weights["8.weight"], weights["8.bias"])

    return _on_normal_inputs(network, (N, 3, SIDE, SIDE), jax_forward)


@problem(any_size=True)
def resnet18(N: int = 8, O: int = 10, width: int = 64) -> Definition:  # noqa: E741
    """ResNet18 for 32x32 inputs (3x3 stem, no max pooling), BatchNorm in eval mode with its initial statistics."""
    return _on_normal_inputs(lambda: _resnet18(O, width), (N, 3, SIDE, SIDE), _resnet18_in_jax)


def _resnet18(O: int, width: int) -> nn.Module:  # noqa: E741
    import torch
    from torch import nn

    class Block(nn.Module):
        """Two convolutions and a shortcut, which is a convolution where the shape changes."""

        def __init__(self, channels: int, out: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
            self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
            same = stride == 1 and channels == out
            self.shortcut = (
                nn.Identity()
                if same
                else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            )

        def forward(self, x):
            inner = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
            return torch.relu(inner + self.shortcut(x))

    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks = []
    for i in range(4):
        blocks += [Block(width * 2 ** max(0, i - 1), width * 2**i, 2 if i else 1), Block(width * 2**i, width * 2**i, 1)]
    readout = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, O)]
    return nn.Sequential(*stem, *blocks, *readout).eval()


def _resnet18_in_jax(weights, x):
    import jax

    def norm(x, name):
        scale = weights[f"{name}.weight"] / (1 + 1e-5) ** 0.5
        return x * scale[:, None, None] + weights[f"{name}.bias"][:, None, None]

    x = jax.nn.relu(norm(_convolved(x, weights["0.weight"]), "1"))
    for block in range(3, 11):
        stride = 2 if block in (5, 7, 9) else 1
        inner = jax.nn.relu(norm(_convolved(x, weights[f"{block}.conv1.weight"], stride), f"{block}.norm1"))
        inner = norm(_convolved(inner, weights[f"{block}.conv2.weight"]), f"{block}.norm2")
        if stride == 2:
            x = norm(_convolved(x, weights[f"{block}.shortcut.0.weight"], stride, 0), f"{block}.shortcut.1")
        x = jax.nn.relu(inner + x)
    return linear(x.mean((2, 3)), weights["13.weight"], weights["13.bias"])


def _convolved(x: Any, weight: Any, stride: int = 1, padding: int = 1) -> Any:
    import jax

    return jax.lax.conv_general_dilated(x, weight, (stride, stride), ((padding, padding), (padding, padding)))


def _on_normal_inputs(
    network: Callable[[], nn.Module], shape: tuple[int, ...], jax_forward: Callable[..., Any]
) -> Definition:
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Inputs of training first, so that they and the network do not depend on N.
        known = torch.randn(TRAINED_ON, *shape[1:])
        module = network()
        x = torch.randn(shape)

    def train(module: nn.Module) -> None:
        """4 full-batch steps of Adam towards fixed standard normal targets, on 8 inputs of their own."""
        outputs = module(known).shape
        targets = torch.randn(outputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        training.adam(module, known, targets, nn.functional.mse_loss, batch=TRAINED_ON, epochs=4)

    return Definition(module, x.numpy(), train, jax_forward=jax_forward)
