"""Seeded gradient descent, the same for every problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def adam(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 1e-3,
    batch: int,
    epochs: int,
    seed: int = 0,
) -> None:
    """Train ``module`` in place with Adam on shuffled mini-batches.

    Runs in float64, so that rounding differences between machines stay far below the float32 the weights are kept in.
    """
    import torch

    module.double()
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=shuffle).split(batch):
            optimizer.zero_grad()
            loss(module(x[chosen].double()), y[chosen]).backward()
            optimizer.step()
    module.float()
