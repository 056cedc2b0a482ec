"""Kernels that stand for the NTK, along training: what the sum of logits forgets under cross-entropy.

The softmax's gradients sum to zero over logits, so gradient descent never moves the readout's sum 1^T V; weight decay
shrinks it, and with it the part of the pNTK that comes from all layers but the last. Not in Mohamadi et al. 2023.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from pydantic import Field, PositiveFloat, PositiveInt

from ntkbench.studies import base

PLUGINS = ("ntkbench.problems._images",)
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
    batch: PositiveInt = 128
    inits: PositiveInt = 3
    images: int = Field(default=128, ge=2, le=512)


def run(settings: Settings) -> pd.DataFrame:
    """One row for each loss, initialisation, look and kernel."""
    rows = []
    for loss, title in LOSSES.items():
        for init in range(settings.inits):
            case, found = {"loss": loss, "loss_title": title, "init": init}, []

            def measure(loss: str = loss, init: int = init, found: list = found) -> dict[str, Any]:
                found += looks(settings, loss, init)
                return {}

            outcome = base.row(case, measure)
            rows += [{**outcome, **look} for look in found or [{}]]
    return pd.DataFrame(rows)


def looks(settings: Settings, loss: str, init: int) -> list[dict[str, Any]]:
    """Columns for each look and kernel of one training."""
    import torch

    from ntkbench.jacobian import torch as backend
    from ntkbench.problems import _images
    from ntkbench.studies import _networks, _pntk

    device = backend.device(settings.target())
    images, labels, held_out, _ = (torch.from_numpy(a).to(device) for a in _images.digits_with_labels())
    network = _networks.seeded(lambda: _networks.fc(settings.width, OUTPUTS), init).to(device)
    decay = settings.decay if loss.endswith("decay") else 0.0
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.rate, weight_decay=decay)
    targets = torch.nn.functional.one_hot(labels, OUTPUTS).to(images)
    shuffle = torch.Generator().manual_seed(init)
    at = {round(i * settings.steps / (settings.looks - 1)) for i in range(settings.looks)}
    found = []
    for step in range(settings.steps + 1):
        if step in at:
            found += _look(network, held_out[: settings.images], step, init, _pntk)
        chosen = torch.randint(len(images), (settings.batch,), generator=shuffle).to(device)
        outputs = network(images[chosen])
        if loss == "mse":
            value = torch.nn.functional.mse_loss(outputs, targets[chosen])
        else:
            value = torch.nn.functional.cross_entropy(outputs, labels[chosen])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return found


def _look(network: Any, x: Any, step: int, init: int, pntk: Any) -> list[dict[str, Any]]:
    full = pntk.theta(network, x)
    kernels = pntk.standing_in(network, x, full, seed=init)
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
