"""Kernels that approximate the NTK, along training: how cross-entropy and weight decay change the pNTK.

The softmax's gradients sum to zero over logits, so gradient descent never moves the readout's sum 1^T V. Weight decay
shrinks it, and with it the part of the pNTK that comes from all layers but the last. This experiment is not in Mohamadi
et al. 2023. Networks are trained in float32, and kernels are computed in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import pandas as pd
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ntkbench.studies import base

TIMED = False
OUTPUTS = 10
LOSSES = {
    "cross_entropy": "cross-entropy",
    "cross_entropy_decay": "cross-entropy, weight decay",
    "mse": "mean squared error",
}


class Settings(base.Settings):
    """How a network is trained and measured.

    Attributes:
        width: width of both hidden layers.
        steps: steps of gradient descent; with the learning rate and the decay they determine how far weights decay.
        looks: number of points in training at which kernels are compared, evenly spaced in steps, including both ends.
        rate, decay, batch: learning rate, weight decay (for the loss that has it), images per step.
        inits: initialisations, each with its own order of images.
        images: number of images that the kernels are computed on.
    """

    USES = ("device", "limits.block_mb")

    dtype: Literal["float64"] = "float64"
    width: PositiveInt = 512
    steps: PositiveInt = 4000
    looks: int = Field(default=11, ge=2)
    rate: PositiveFloat = 0.1
    decay: PositiveFloat = 0.01
    batch: int = Field(default=128, ge=2)
    inits: PositiveInt = 3
    images: int = Field(default=128, ge=2, le=512)

    @model_validator(mode="after")
    def _looks_differ(self) -> Settings:
        if self.looks > self.steps + 1:
            raise ValueError(f"looks: {self.looks} is more than {self.steps} steps allow; at most steps + 1")
        return self


def run(settings: Settings) -> pd.DataFrame:
    """One row for each loss, initialisation, point in training and kernel."""
    return base.table(
        row for loss in LOSSES for init in range(settings.inits) for row in _along_training(settings, loss, init)
    )


def _along_training(settings: Settings, loss: str, init: int) -> Iterator[base.Row]:
    from ntkbench.studies.base import pntk

    course = base.Once(lambda: Course(settings, loss, init))

    def look(step: int) -> list[dict[str, Any]]:
        return course().look(step)

    kernels = [{"kernel": name, "title": title} for name, title in pntk.KERNELS.items()]
    for step in sorted({round(i * settings.steps / (settings.looks - 1)) for i in range(settings.looks)}):
        case = {"loss": loss, "loss_title": LOSSES[loss], "init": init, "step": step}
        yield from base.rows(case, functools.partial(look, step), kernels)


class Course:
    """One network along its training."""

    def __init__(self, settings: Settings, loss: str, init: int) -> None:
        """Trace the network, without training it."""
        import torch

        from ntkbench.networks import classifiers, initialisation
        from ntkbench.operators import torch as backend
        from ntkbench.studies.base import descent, pntk

        target = settings.target()
        device = backend.device(target)
        self._init = init
        self._network = initialisation.seeded(lambda: classifiers.network("fc", settings.width, OUTPUTS), init).to(
            device
        )
        self._x = pntk.held_out_digits()[0][: settings.images].to(device)
        self._theta = pntk.Theta(self._network, self._x, target.memory)

        def mse(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.mse_loss(outputs, torch.nn.functional.one_hot(labels, OUTPUTS).to(outputs))

        self._descent = descent.Descent(
            self._network,
            mse if loss == "mse" else torch.nn.functional.cross_entropy,
            rate=settings.rate,
            batch=settings.batch,
            decay=settings.decay if loss.endswith("decay") else 0.0,
            seed=init,
        )

    def look(self, step: int) -> list[dict[str, Any]]:
        """Columns for each kernel after this number of steps, which must not be smaller than in an earlier call.

        Raises:
            DidNotTrain: training diverged.
        """
        from ntkbench.studies.base import pntk

        self._descent.to(step)
        full = self._theta(self._network)
        features, _ = pntk.features_and_outputs(self._network, self._x)
        kernels = pntk.standing_in(full, features, seed=self._init)
        last, pull = kernels["last_layer"], kernels["sum_of_logits"]
        columns = {
            "sum_direction": pntk.sum_direction(self._network),
            "pntk_to_last_layer": float((pull - last).norm() / pull.norm()),
        }
        return [
            {**columns, "kernel": name, "title": title, "difference": pntk.difference(full, kernels[name])}
            for name, title in pntk.KERNELS.items()
        ]
