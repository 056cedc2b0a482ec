"""How well the pNTK and similar kernels approximate the NTK, against width and along training (Mohamadi et al. 2023).

Figures 2 to 6 of the paper, on scikit-learn's digits or a part of CIFAR-10: relative Frobenius difference, largest
eigenvalue, condition number, off-diagonal mass of Theta's O x O blocks, predictions of kernel regression and their
accuracy; and the networks' own accuracy, on 512 held-out images. Networks are trained on all training images, by the
cross-entropy without weight decay, in float32; kernels are computed in float64.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pandas as pd
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from ntkbench.data.images import CIFAR10
from ntkbench.studies import base

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ntkbench.studies.base.descent import Descent
    from ntkbench.studies.base.pntk import Pictures, Theta

TIMED = False
OUTPUTS = 10
FULL = {"full": "NTK"}
"""Name and title of the whole NTK among the kernels."""
DEEP = ("resnet18", "wide_resnet")
"""Families of networks whose kernels and steps take longest."""
DATA = {"cifar10": (CIFAR10,)}


Widths = Annotated[list[PositiveInt], Field(min_length=1)]


class Settings(base.Settings):
    """Widths and sizes, and how networks are trained.

    A learning rate that suits one width is too large for the next: Theta's eigenvalues grow with width. So rates are
    given in units of N / lambda_max, for the largest eigenvalue of Theta at initialisation on the N images that kernels
    are trained on. Without momentum, gradient descent on half the squared error is stable for rates below 2.

    Attributes:
        data: scikit-learn's digits (8x8 pixels), or 5,000 training images of CIFAR-10 (3x32x32).
        widths: widths of each family of networks: units, channels, channels of the first stage, or the widening factor.
        inits: initialisations at each width.
        trained: number of these that are also trained, each with its own order of images.
        steps: steps of gradient descent after which networks are measured, the first one 0, initialisation.
        rate, momentum, batch: learning rate over N / lambda_max, momentum, images per step.
        train, test: images that kernels are trained and tested on.
        deep_share: share of these images and of the steps that is used for residual networks, rounded up.
    """

    USES = ("device", "limits.block_mb")

    dtype: Literal["float64"] = "float64"
    data: Literal["digits", "cifar10"] = "digits"
    widths: dict[Literal["fc", "conv", "resnet18", "wide_resnet"], Widths] = Field(
        default={
            "fc": [64, 128, 256, 512, 1024, 2048],
            "conv": [16, 32, 64, 128, 256],
            "resnet18": [8, 16, 32, 64],
            "wide_resnet": [1, 2, 4, 8],
        },
        min_length=1,
    )
    inits: PositiveInt = 5
    trained: NonNegativeInt = 5
    steps: list[NonNegativeInt] = Field(default=[0, 16, 64, 256, 1024, 4096], min_length=1)
    rate: PositiveFloat = 4
    momentum: float = Field(default=0.9, ge=0, lt=1)
    batch: int = Field(default=32, ge=2)
    train: int = Field(default=256, ge=2, le=5000)
    test: int = Field(default=128, ge=1, le=512)
    deep_share: float = Field(default=1, gt=0, le=1)

    @field_validator("steps")
    @classmethod
    def _from_initialisation_on(cls, steps: list[int]) -> list[int]:
        if steps[0] != 0 or any(b <= a for a, b in itertools.pairwise(steps)):
            raise ValueError("steps must begin with 0 (initialisation) and rise")
        return steps

    @model_validator(mode="after")
    def _images_are_there(self) -> Settings:
        if self.train > (most := {"digits": 1285, "cifar10": 5000}[self.data]):
            raise ValueError(f"train: {self.data} has {most} training images; got {self.train}")
        return self

    def of(self, family: str) -> Settings:
        """The settings for one family."""
        share = self.deep_share if family in DEEP else 1
        less = {name: math.ceil(share * getattr(self, name)) for name in ("train", "test")}
        steps = sorted({math.ceil(share * step) for step in self.steps})
        return self.model_copy(update=less | {"train": max(2, less["train"]), "steps": steps})


def run(settings: Settings) -> pd.DataFrame:
    """One row for each family, width, initialisation, step and kernel."""
    return base.table(
        row
        for family, widths in settings.widths.items()
        for width in widths
        for row in _rows(settings.of(family), family, width)
    )


def _rows(settings: Settings, family: str, width: int) -> Iterator[base.Row]:
    from ntkbench.studies.base import pntk

    architecture = Architecture(settings, family, width)
    kernels = [{"kernel": name, "title": title} for name, title in (FULL | pntk.KERNELS).items()]
    for init in range(settings.inits):
        course = Course(architecture, init)
        for step in settings.steps if init < settings.trained else [0]:

            def measured(course: Course = course, step: int = step) -> list[dict[str, Any]]:
                found = course.look(step)
                return [{**kernel, **found[kernel["kernel"]]} for kernel in kernels]

            case = {"data": settings.data, "family": family, "width": width, "init": init, "step": step}
            yield from base.rows(case, measured, kernels)


@dataclass(frozen=True)
class Architecture:
    """Networks of one family and width, and the images that kernels are computed on."""

    settings: Settings
    family: str
    width: int

    def network(self, init: int) -> nn.Sequential:
        """A network from its seed, on the device."""
        from ntkbench.networks import classifiers, initialisation

        _, *shape = self.labelled[0][0].shape
        made = initialisation.seeded(lambda: classifiers.network(self.family, self.width, OUTPUTS, *shape[:2]), init)
        return made.to(self._device)

    @functools.cached_property
    def labelled(self) -> tuple[Pictures, Pictures]:
        """All training images, and the held-out ones."""
        from ntkbench.studies.base import pntk

        return pntk.labelled(self.settings.data)

    @functools.cached_property
    def images(self) -> dict[str, Tensor]:
        """``x`` and ``labels``, training images first."""
        from ntkbench.studies.base import pntk

        made = pntk.pictures(self.settings.data, self.settings.train, self.settings.test)
        return {name: part.to(self._device) for name, part in made.items()}

    @functools.cached_property
    def theta(self) -> Theta:
        """Theta on these images as a function of the network, traced once."""
        from ntkbench.studies.base import pntk

        return pntk.Theta(self.network(0), self.images["x"], self.settings.target().memory)

    @property
    def _device(self) -> Any:
        from ntkbench.operators import torch as backend

        return backend.device(self.settings.target())


class Course:
    """One network from its initialisation on."""

    def __init__(self, architecture: Architecture, init: int) -> None:
        """Does not create anything yet."""
        self._architecture, self._init = architecture, init

    @functools.cached_property
    def _network(self) -> nn.Sequential:
        return self._architecture.network(self._init)

    def look(self, step: int) -> dict[str, dict[str, Any]]:
        """Columns for each kernel after this number of steps, including the whole NTK (``full``).

        The number of steps must not be smaller than in an earlier call.

        Raises:
            DidNotTrain: training diverged.
        """
        if step == 0:
            return self._at_start
        self._descent.to(step)
        return measure(self._architecture, self._network, self._init)

    @functools.cached_property
    def _at_start(self) -> dict[str, dict[str, Any]]:
        return measure(self._architecture, self._network, self._init)

    @functools.cached_property
    def _descent(self) -> Descent:
        """Training at a rate set by the kernel at initialisation."""
        from torch.nn.functional import cross_entropy

        from ntkbench.studies.base import descent

        settings = self._architecture.settings
        return descent.Descent(
            self._network,
            cross_entropy,
            rate=settings.rate * settings.train / self._at_start["full"]["lambda_max"],
            momentum=settings.momentum,
            batch=settings.batch,
            seed=self._init,
            data=self._architecture.labelled[0],
        )


def measure(architecture: Architecture, network: nn.Sequential, seed: int) -> dict[str, dict[str, Any]]:
    """Columns for each kernel of one network at its current weights, including the whole NTK (``full``)."""
    import torch

    from ntkbench.studies.base import pntk

    settings, x, labels = architecture.settings, *architecture.images.values()
    train = settings.train
    full = architecture.theta(network)
    features, outputs = pntk.features_and_outputs(network, x)
    held_out, held_out_labels = (part.to(x.device) for part in architecture.labelled[1])
    with torch.no_grad():
        own_accuracy = _accuracy(network(held_out), held_out_labels)
    targets = torch.nn.functional.one_hot(labels[:train], OUTPUTS).double()

    among = full[:train, :, :train]
    largest, condition = pntk.spectrum(among.reshape(train * OUTPUTS, -1))
    own = pntk.predictions(full, outputs, targets, train)
    columns = {
        "P": sum(w.numel() for w in network.parameters()),
        "train": train,
        "test": settings.test,
        "rate": settings.rate,
        "momentum": settings.momentum,
        "batch": settings.batch,
        "off_diagonal": pntk.off_diagonal_mass(among),
        "network_accuracy": own_accuracy,
    }
    accuracy = _accuracy(own, labels[train:])
    found = {"full": columns | {"difference": 0.0, "lambda_max": largest, "condition": condition, "accuracy": accuracy}}
    for name, kernel in pntk.standing_in(full, features, seed).items():
        some = kernel[:train, :train]
        top, spread = pntk.spectrum(some)
        predicted = pntk.predictions(kernel, outputs, targets, train)
        found[name] = columns | {
            "difference": pntk.difference(among, some),
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
