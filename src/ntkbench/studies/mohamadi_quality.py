"""How well the pNTK and its siblings stand for the NTK, against width (Mohamadi et al. 2023, figures 2 to 6).

On scikit-learn's digits, at initialisation: relative Frobenius difference, largest eigenvalue, condition number,
off-diagonal mass of Theta's O x O blocks, predictions of kernel regression and their accuracy.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import pandas as pd
from pydantic import Field, PositiveInt

from ntkbench.studies import base

PLUGINS = ("ntkbench.problems._images",)
OUTPUTS = 10
DEEP = ("resnet18", "wide_resnet")
"""Families whose networks take seconds to trace, each."""


class Settings(base.Settings):
    """Widths and sizes.

    Attributes:
        widths: of each family of networks: units, channels, channels of the first stage, or the widening factor.
        inits: initialisations at each width.
        train, test: images.
        deep_share: of initialisations and images that the residual networks get, rounded up.
    """

    widths: dict[Literal["fc", "conv", "resnet18", "wide_resnet"], list[PositiveInt]] = Field(
        default={
            "fc": [64, 128, 256, 512, 1024, 2048],
            "conv": [16, 32, 64, 128, 256],
            "resnet18": [8, 16, 32, 64],
            "wide_resnet": [1, 2, 4, 8],
        },
        min_length=1,
    )
    inits: PositiveInt = 5
    train: int = Field(default=256, ge=2, le=1285)
    test: int = Field(default=128, ge=1, le=512)
    deep_share: float = Field(default=1, gt=0, le=1)

    def of(self, family: str) -> Settings:
        """The settings for one family."""
        share = self.deep_share if family in DEEP else 1
        less = {"inits": self.inits, "train": self.train, "test": self.test}
        less = {name: math.ceil(share * count) for name, count in less.items()}
        return self.model_copy(update=less | {"train": max(2, less["train"])})


def run(settings: Settings) -> pd.DataFrame:
    """One row for each family, width, initialisation and kernel."""
    return pd.DataFrame(
        [
            row
            for family, widths in settings.widths.items()
            for width in widths
            for init in range(settings.of(family).inits)
            for row in _rows(settings.of(family), {"family": family, "width": width, "init": init})
        ]
    )


def _rows(settings: Settings, case: dict[str, Any]) -> list[dict[str, Any]]:
    from ntkbench.studies import _pntk

    found: dict[str, dict[str, Any]] = {}

    def measured() -> dict[str, Any]:
        found.update(measure(settings, **case))
        return {}

    outcome = base.row(case, measured)
    kernels = {"full": "NTK"} | _pntk.KERNELS
    return [{**outcome, "kernel": name, "title": title, **found.get(name, {})} for name, title in kernels.items()]


def measure(settings: Settings, family: str, width: int, init: int) -> dict[str, dict[str, Any]]:
    """Columns for each kernel of one network, the whole NTK (``full``) among them."""
    import torch

    from ntkbench.jacobian import torch as backend
    from ntkbench.studies import _networks, _pntk

    data = _pntk.digits(settings.train, settings.test)
    device = backend.device(settings.target())
    network = _networks.seeded(lambda: _networks.FAMILIES[family](width, OUTPUTS), init).to(device)
    x, labels = data["x"].to(device), data["labels"].to(device)
    full = _pntk.theta(network, x)
    with torch.no_grad():
        at_0 = network.double()(x.double())
    network.float()
    train = settings.train
    targets = torch.nn.functional.one_hot(labels[:train], OUTPUTS).double()

    among = full[:train, :, :train]
    largest, condition = _pntk.spectrum(among.reshape(train * OUTPUTS, -1))
    own = _pntk.predictions(full, at_0, targets, train)
    accuracy = _accuracy(own, labels[train:])
    sizes = {"P": sum(w.numel() for w in network.parameters()), "train": train, "test": settings.test}
    columns = sizes | {"off_diagonal": _pntk.off_diagonal_mass(among)}
    found = {"full": columns | {"difference": 0.0, "lambda_max": largest, "condition": condition, "accuracy": accuracy}}
    for name, kernel in _pntk.standing_in(network, x, full, seed=init).items():
        some = kernel[:train, :train]
        top, spread = _pntk.spectrum(some)
        predicted = _pntk.predictions(kernel, at_0, targets, train)
        found[name] = columns | {
            "difference": _pntk.difference(among, some),
            "lambda_max": top,
            "lambda_max_error": abs(top - largest) / largest,
            "condition": spread,
            "condition_ratio": spread / condition,
            "prediction_difference": float((predicted - own).norm() / own.norm()),
            "accuracy": _accuracy(predicted, labels[train:]),
        }
    return found


def _accuracy(predicted: Any, labels: Any) -> float:
    return float((predicted.argmax(1) == labels).double().mean())
