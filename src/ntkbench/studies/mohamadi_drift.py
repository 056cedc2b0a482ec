"""Kernels that stand for the NTK, along training: what the sum of logits forgets under cross-entropy.

The softmax's gradients sum to zero over logits, so gradient descent never moves the readout's sum 1^T V; weight decay
shrinks it, and with it the part of the pNTK that comes from all layers but the last. Not in Mohamadi et al. 2023.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from pydantic import Field, PositiveFloat, PositiveInt

from ntkbench.studies import base

OUTPUTS = 10
LOSSES = {
    "cross_entropy": "cross-entropy",
    "cross_entropy_decay": "cross-entropy, weight decay",
    "mse": "mean squared error",
}


class Settings(base.Settings):
    """How a network is trained and looked at.

    Attributes:
        width: of both hidden layers.
        steps: of gradient descent; with the learning rate and the decay they say how far weights decay.
        looks: points in training at which kernels are compared, evenly spaced in steps, both ends among them.
        rate, decay, batch: learning rate, weight decay where there is any, images a step.
        inits: initialisations, each with its own order of images.
        images: that the kernels are between.
    """

    width: PositiveInt = 512
    steps: PositiveInt = 4000
    looks: int = Field(default=11, ge=2)
    rate: PositiveFloat = 0.1
    decay: PositiveFloat = 0.01
    batch: int = Field(default=128, ge=2)
    inits: PositiveInt = 3
    images: int = Field(default=128, ge=2, le=512)


def run(settings: Settings) -> pd.DataFrame:
    """One row for each loss, initialisation, look and kernel."""
    rows = []
    for loss, title in LOSSES.items():
        for init in range(settings.inits):
            case = {"loss": loss, "loss_title": title, "init": init}

            def measure(loss: str = loss, init: int = init) -> dict[str, Any]:
                return {"looks": looks(settings, loss, init)}

            outcome = base.row(case, measure)
            rows += [{**outcome, **look} for look in outcome.pop("looks", [{}])]
    return pd.DataFrame(rows)


def looks(settings: Settings, loss: str, init: int) -> list[dict[str, Any]]:
    """Columns for each look and kernel of one training."""
    import torch

    from ntkbench.networks import classifiers, initialisation
    from ntkbench.operators import torch as backend
    from ntkbench.studies.base import descent, pntk

    target = settings.target()
    device = backend.device(target)
    network = initialisation.seeded(lambda: classifiers.network("fc", settings.width, OUTPUTS), init).to(device)
    x = pntk.held_out_digits()[0][: settings.images].to(device)
    theta = pntk.Theta(network, x, target.memory)

    def mse(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(outputs, torch.nn.functional.one_hot(labels, OUTPUTS).to(outputs))

    course = descent.Descent(
        network,
        mse if loss == "mse" else torch.nn.functional.cross_entropy,
        rate=settings.rate,
        batch=settings.batch,
        decay=settings.decay if loss.endswith("decay") else 0.0,
        seed=init,
    )
    found = []
    for step in sorted({round(i * settings.steps / (settings.looks - 1)) for i in range(settings.looks)}):
        course.to(step)
        found += _look(theta(network), network, x, step, init)
    return found


def _look(full: Any, network: Any, x: Any, step: int, init: int) -> list[dict[str, Any]]:
    from ntkbench.studies.base import pntk

    kernels = pntk.standing_in(full, pntk.features_and_outputs(network, x)[0], seed=init)
    last, pull = kernels["last_layer"], kernels["sum_of_logits"]
    columns = {
        "step": step,
        "sum_direction": pntk.sum_direction(network),
        "pntk_to_last_layer": float((pull - last).norm() / pull.norm()),
    }
    return [
        columns | {"kernel": name, "title": title, "difference": pntk.difference(full, kernels[name])}
        for name, title in pntk.KERNELS.items()
    ]
