"""Small networks on which intervals are compared with exact values: MLPs, also on skewed inputs, and a transformer.

``small_mlp`` has 272 outputs per sample, more than ``method="auto"`` computes exactly when no budget is given. A ReLU
follows its last layer, so it has no wide head.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Literal

from ntkbench.problems.base import Definition, problem, training

if TYPE_CHECKING:
    from torch import Tensor

SAMPLES = 12
INPUTS, HIDDEN, OUTPUTS = 8, 8, 272
MANY = (48, 64)
HEAD = (48, 128)
TOKENS, LENGTH, WIDTH, SEQUENCES = 8, 9, 8, 256


@problem
def small_mlp(
    N: int = SAMPLES, inputs: Literal["ordinary", "imbalanced", "heavy_tailed", "one_outlier"] = "ordinary"
) -> Definition:
    """8-8-8-272 ReLU MLP on 12 inputs: normal; all but one nearly alike; Cauchy-scaled; one 100 times as large.

    A ReLU follows each layer, including the last. Trained by 10 full-batch steps towards fixed standard normal targets.
    """
    import torch

    draw = torch.Generator().manual_seed(1)
    x, centre = (torch.randn(shape, generator=draw) for shape in ((SAMPLES, INPUTS), (INPUTS,)))
    quantiles = (torch.randperm(SAMPLES, generator=draw) + 0.5) / SAMPLES
    targets = torch.randn((SAMPLES, OUTPUTS), generator=draw, dtype=torch.float64)
    if inputs == "imbalanced":
        alike = torch.arange(SAMPLES) != 4
        x[alike] = centre + 0.05 * x[alike]
    elif inputs == "heavy_tailed":
        x *= torch.tan(quantiles * torch.pi / 2)[:, None]  # quantiles of the absolute value of a Cauchy variable
    elif inputs == "one_outlier":
        x[4] *= 100
    return _mlp([INPUTS, HIDDEN, HIDDEN, OUTPUTS], x, targets, N, relu_at_end=True)


@problem
def many_samples(N: int = MANY[0]) -> Definition:
    """8-8-8-64 ReLU MLP on 48 inputs, of which all but one in twelve are nearly alike; otherwise as ``small_mlp``."""
    import torch

    draw = torch.Generator().manual_seed(1)
    x, centre = (torch.randn(shape, generator=draw) for shape in ((MANY[0], INPUTS), (INPUTS,)))
    alike = torch.arange(MANY[0]) % SAMPLES != 4
    x[alike] = centre + 0.05 * x[alike]
    targets = torch.randn(MANY, generator=draw, dtype=torch.float64)
    return _mlp([INPUTS, HIDDEN, HIDDEN, MANY[1]], x, targets, N, relu_at_end=True)


@problem
def small_wide_head(N: int = SAMPLES) -> Definition:
    """8-8-48-128 ReLU MLP with a linear last layer, a wide head, on 12 normal inputs; trained as ``small_mlp``."""
    import torch

    draw = torch.Generator().manual_seed(1)
    x = torch.randn((SAMPLES, INPUTS), generator=draw)
    targets = torch.randn((SAMPLES, HEAD[1]), generator=draw, dtype=torch.float64)
    return _mlp([INPUTS, HIDDEN, *HEAD], x, targets, N, relu_at_end=False)


@problem
def small_interacting(N: int = SAMPLES) -> Definition:
    """8-8-8-272 ReLU MLP with batch statistics, so samples interact; otherwise as ``small_mlp``."""
    import torch
    from torch import nn

    from ntkbench.networks import layers
    from ntkbench.networks.initialisation import seeded

    def make() -> nn.Module:
        hidden: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise([INPUTS, HIDDEN, HIDDEN]):
            hidden += [nn.Linear(inputs, outputs, bias=False), layers.BatchStatistics(), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(HIDDEN, OUTPUTS), nn.ReLU())

    draw = torch.Generator().manual_seed(1)
    x = torch.randn((SAMPLES, INPUTS), generator=draw)
    targets = torch.randn((SAMPLES, OUTPUTS), generator=draw, dtype=torch.float64)
    recipe = training.Adam(x, targets, nn.functional.mse_loss, batch=len(x), epochs=10, lr=1e-3)
    return Definition(seeded(make, 0), x[:N].numpy().copy(), recipe, samples_interact=True)


def _mlp(sizes: list[int], x: Tensor, targets: Tensor, N: int, *, relu_at_end: bool) -> Definition:
    from torch import nn

    from ntkbench.networks import fully_connected
    from ntkbench.networks.initialisation import seeded

    module = seeded(functools.partial(fully_connected.network, sizes, relu_at_end=relu_at_end), 0)
    recipe = training.Adam(x, targets, nn.functional.mse_loss, batch=len(x), epochs=10, lr=1e-3)
    forward = functools.partial(fully_connected.forward, relu_at_end=relu_at_end)
    return Definition(module, x[:N].numpy().copy(), recipe, jax_forward=forward)


@problem
def reversing_transformer(N: int = SAMPLES) -> Definition:
    """One block of width 8, 2 heads, that reverses sequences of 9 tokens from a vocabulary of 8: logits of all tokens.

    Inputs are one-hot tokens concatenated with one-hot positions. The bias of the keys is frozen, because no output
    depends on it. Trained by 60 epochs of Adam on 256 separate sequences.
    """
    import torch
    from torch import nn

    from ntkbench.networks import layers
    from ntkbench.networks.initialisation import seeded
    from ntkbench.networks.transformer import Block, Size

    def make() -> nn.Module:
        block = Block(Size(patch=1, width=WIDTH, layers=1, heads=2, hidden=2 * WIDTH))
        block.attention.key.bias.requires_grad_(False)
        return nn.Sequential(
            nn.Linear(TOKENS + LENGTH, WIDTH), block, layers.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS)
        )

    tokens = torch.randint(TOKENS, (SAMPLES + SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    positions = torch.eye(LENGTH).expand(len(tokens), -1, -1)
    x = torch.cat([nn.functional.one_hot(tokens, TOKENS), positions], -1)
    recipe = training.Adam(x[SAMPLES:], tokens[SAMPLES:].flip(1), of_tokens, batch=64, epochs=60, lr=1e-2)
    return Definition(seeded(make, 0), x[:N].numpy().copy(), recipe)


def of_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of logits ``[N, T, V]`` for tokens ``[N, T]``."""
    import torch

    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
