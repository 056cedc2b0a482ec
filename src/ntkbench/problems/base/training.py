"""Seeded gradient descent, the same for every problem."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ntkbench.errors import DidNotTrain

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


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


def descent(loss: Callable[[], Tensor], optimizer: Optimizer, *, to: float, most: int) -> Iterator[tuple[int, float]]:
    """Gradient descent until the loss is at most ``to``: steps taken and loss, before each step and at the end.

    The caller may look at the weights in between; nothing is kept.

    Args:
        loss: computes the loss at the present weights, differentiably.
        optimizer: of those weights.
        to: the loss to reach.
        most: steps that may be taken.

    Raises:
        DidNotTrain: the loss is not reached in so many steps, or is no number any more.
    """
    for step in itertools.count():
        value = loss()
        now = float(value.detach())
        yield step, now
        if now <= to:
            return
        if step == most or not math.isfinite(now):
            raise DidNotTrain(f"training did not reach a loss of {to:g}: it is {now:.3g} after {step} steps")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def checkpoints(
    module: nn.Module, course: Iterator[tuple[int, float]], ratio: float = 2**0.5
) -> Iterator[tuple[int, float, dict[str, np.ndarray]]]:
    """Steps, loss and weights along a :func:`descent` at log-spaced steps: 0, 1, and each some ratio later; the end.

    Weights are copies, in float32, by parameter name.
    """
    due, last, kept = 0.0, None, None
    for step, loss in course:
        last = step, loss
        if step >= due:
            kept = step
            yield step, loss, _copied(module)
            due = max(step + 1, step * ratio)
    if last is not None and kept != last[0]:
        yield *last, _copied(module)


def _copied(module: nn.Module) -> dict[str, np.ndarray]:
    return {key: w.detach().cpu().float().numpy().copy() for key, w in module.named_parameters()}
