"""Gradient descent on labelled images that stops where a study measures the network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ntkbench.errors import DidNotTrain
from ntkbench.studies.base import pntk


class Descent:
    """Stochastic gradient descent on all training images, in the precision and on the device of the network.

    The network is trained in the mode that it is in: BatchNorm in eval mode keeps its statistics, so that samples do
    not interact in training either, and its scale and shift are trained like any other parameter.

    Attributes:
        steps: number of steps so far.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        rate: float,
        batch: int,
        seed: int,
        momentum: float = 0.0,
        decay: float = 0.0,
        data: pntk.Pictures | None = None,
    ) -> None:
        """Does not train yet.

        Args:
            network: images to ``[N, O]``; trained in place.
            loss: function of outputs ``[N, O]`` and labels ``[N]``.
            rate, batch, momentum, decay: learning rate, images per step (at least two), momentum, weight decay.
            seed: seed of the order of images.
            data: training images and labels; by default those of scikit-learn's digits.
        """
        self.steps = 0
        self._network, self._loss, self._batch = network, loss, batch
        device = next(network.parameters()).device
        self._images, self._labels = (part.to(device) for part in data or pntk.training_digits())
        self._optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=momentum, weight_decay=decay)
        self._shuffle = torch.Generator().manual_seed(seed)

    def to(self, step: int) -> None:
        """Continue training up to this total number of steps.

        Raises:
            DidNotTrain: outputs are no longer finite, or do not depend on the image.
        """
        while self.steps < step:
            chosen = torch.randint(len(self._images), (self._batch,), generator=self._shuffle)
            chosen = chosen.to(self._images.device)
            value = self._loss(self._network(self._images[chosen]), self._labels[chosen])
            self._optimizer.zero_grad()
            value.backward()
            self._optimizer.step()
            self.steps += 1
        with torch.no_grad():
            outputs = self._network(self._images[: self._batch])
        if not outputs.isfinite().all():
            raise DidNotTrain(f"training diverged: outputs are not finite after {self.steps} steps")
        if (outputs == outputs[0]).all():  # all units of a ReLU layer are inactive, and stay so
            raise DidNotTrain(f"training diverged: outputs are the same for all images after {self.steps} steps")
