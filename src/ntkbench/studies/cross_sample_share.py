"""The share of a trace estimate's variance that comes from cross-sample terms, along the training of four networks.

A pooled estimate of tr Theta, ||J^T u||^2 for random signs u, has the variance 2 (||Theta||_F^2 - D) / K after K
passes, with D = sum_i Theta_ii^2: the terms 2 u_i u_j Theta_ij of all pairs i < j are uncorrelated, each with variance
4 Theta_ij^2. The per-sample estimate sum_b ||J_b^T u_b||^2 takes the same passes, and has only the pairs within a
sample: 2 (sum_b ||Theta_bb||_F^2 - D) / K. Dropping the cross-sample terms therefore divides the variance by

    factor = (||Theta||_F^2 - D) / (sum_b ||Theta_bb||_F^2 - D).

``norm_ratio`` is the same without D, R = ||Theta||_F^2 / sum_b ||Theta_bb||_F^2, and 1 - 1 / R the share of the squared
norm between samples. R is at most N, since ||Theta_bc||_F^2 <= ||Theta_bb||_F ||Theta_cc||_F for a positive
semi-definite Theta. The factor is at least R (for D > 0), and is unbounded: if the outputs of a sample have orthogonal
gradients, as those of a wide network at initialisation nearly do, Theta_bb is diagonal and a per-sample estimate has
zero variance.

Theta is computed exactly, in float64, by the layerwise engine. At the first and the last step of the first
initialisation the factor is also measured, as the ratio of the two estimates' variances over seeds, in float64 as well.
Networks are trained in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from ntkbench import methods
from ntkbench.problem import Problem
from ntkbench.studies import base

if TYPE_CHECKING:
    from torch import Tensor

    from ntkbench.studies.base.pntk import Theta

TIMED = False
Network = Literal["mlp", "convnet", "resnet", "transformer"]
TITLES: dict[Network, str] = {
    "mlp": "MLP",
    "convnet": "ConvNet",
    "resnet": "ResNet-18",
    "transformer": "Vision Transformer",
}
POOLED, PER_SAMPLE = "one_sided_reverse", "per_sample_trace"
PLUGINS = tuple(f"ntkbench.methods.{name}" for name in (POOLED, PER_SAMPLE))
ROUNDING = 1e-10
"""Standard deviation relative to the mean, in float64, up to which estimates are taken as equal."""


class Settings(base.Settings):
    """How networks are trained and measured.

    Attributes:
        seeds: number of estimates behind each measured variance.
        networks: kinds of networks.
        inits: initialisations of each kind, each with its own order of images.
        images: N, the number of held-out images that Theta is computed on.
        steps: steps of gradient descent on the cross-entropy after which networks are measured, from 0 on.
        rate, momentum, batch: learning rate, momentum, images per step.
        passes: passes of each estimate behind a variance.
    """

    USES = ("device", "seeds", "limits.block_mb")

    dtype: Literal["float64"] = "float64"
    seeds: int = Field(400, ge=8)
    networks: list[Network] = Field(default=["mlp", "convnet", "resnet", "transformer"], min_length=1)
    inits: PositiveInt = 3
    images: int = Field(default=64, ge=2, le=512)
    steps: list[NonNegativeInt] = Field(default=[0, 1, 3, 10, 30, 100, 300, 1000], min_length=2)
    rate: PositiveFloat = 0.05
    momentum: float = Field(0.9, ge=0, lt=1)
    batch: int = Field(default=64, ge=2)
    passes: int = Field(default=4, ge=2)

    @field_validator("steps")
    @classmethod
    def _steps_rise(cls, steps: list[int]) -> list[int]:
        if steps[0] != 0 or steps != sorted(steps):
            raise ValueError(f"must begin with 0 and rise; got {steps}")
        return steps


def run(settings: Settings) -> pd.DataFrame:
    """One row for each network, initialisation and step."""
    return base.table(row for network in settings.networks for row in _of_network(settings, network))


def _of_network(settings: Settings, network: Network) -> Iterator[base.Row]:
    theta = base.Once(lambda: _traced(settings, network))
    for init in range(settings.inits):
        course = base.Once(functools.partial(Course, settings, network, init, theta))
        for step in settings.steps:
            case = {"network": network, "title": TITLES[network], "init": init, "step": step}
            yield base.row(case, functools.partial(_look, course, step))


def _look(course: base.Once[Course], step: int) -> dict[str, Any]:
    return course().look(step)


def _traced(settings: Settings, network: Network) -> Theta:
    """Theta of networks of one kind, traced once."""
    from ntkbench.networks import initialisation
    from ntkbench.studies.base import digit_networks, pntk

    made = initialisation.seeded(digit_networks.NETWORKS[network], 0)
    target = settings.target()
    return pntk.Theta(made.to(_device(settings)), _images(settings), target.memory)


def _device(settings: Settings) -> Any:
    from ntkbench.operators import torch as backend

    return backend.device(settings.target())


def _images(settings: Settings) -> Tensor:
    from ntkbench.studies.base import pntk

    return pntk.held_out_digits()[0][: settings.images].to(_device(settings))


class Course:
    """One network along its training."""

    def __init__(self, settings: Settings, network: Network, init: int, theta: base.Once[Theta]) -> None:
        """Does not train yet."""
        import torch

        from ntkbench.networks import initialisation
        from ntkbench.studies.base import descent, digit_networks

        self._settings, self._init, self._theta = settings, init, theta()
        self._network = initialisation.seeded(digit_networks.NETWORKS[network], init).to(_device(settings))
        self._descent = descent.Descent(
            self._network,
            torch.nn.functional.cross_entropy,
            rate=settings.rate,
            momentum=settings.momentum,
            batch=settings.batch,
            seed=init,
        )

    def look(self, step: int) -> dict[str, Any]:
        """Columns after this number of steps, which must not be smaller than in an earlier call.

        Raises:
            DidNotTrain: training diverged.
        """
        self._descent.to(step)
        found = {**shares(self._theta(self._network)), "accuracy": self._accuracy()}
        found["P"] = sum(w.numel() for w in self._network.parameters())
        if self._init == 0 and step in (self._settings.steps[0], self._settings.steps[-1]):
            found |= self._measured()
        return found

    def _accuracy(self) -> float:
        import torch

        from ntkbench.studies.base import pntk

        images, digits = (part.to(_device(self._settings)) for part in pntk.held_out_digits())
        with torch.no_grad():
            return float((self._network(images).argmax(1) == digits).double().mean())

    def _measured(self) -> dict[str, Any]:
        """The ratio of the two estimates' variances over seeds, with its 95 % interval, if both vary."""
        settings = self._settings
        weights = {name: w.detach().cpu().numpy().copy() for name, w in self._network.named_parameters()}
        problem = Problem("digits", self._network, _images(settings).cpu().numpy(), weights)
        estimates = []
        for part, name in enumerate((POOLED, PER_SAMPLE)):
            method = methods.stochastic(name)
            prepared = method.prepare(problem, settings.target())
            seeds = range(part * settings.seeds, (part + 1) * settings.seeds)
            estimates.append([method.estimate(prepared, "trace", settings.passes, seed).value for seed in seeds])
        ratio, low, high = ratio_of_variances(*estimates)
        return {"measured": ratio, "measured_low": low, "measured_high": high, "estimates": settings.seeds}


def shares(theta: Tensor) -> dict[str, float]:
    """The parts of Theta within samples and between them.

    Args:
        theta: ``[N, O, N, O]``.

    Returns:
        N, O, ``factor`` and ``norm_ratio`` as above, the effective rank of Theta, and that of a sample's block,
        (sum_b (tr Theta_bb)^2) / (sum_b ||Theta_bb||_F^2).
    """
    blocks = theta.diagonal(dim1=0, dim2=2)  # [O, O, N]
    diagonals = blocks.diagonal(dim1=0, dim2=1)  # [N, O]
    square, own, diagonal = (float((part**2).sum()) for part in (theta, blocks, diagonals))
    traces = diagonals.sum(1)
    return {
        "N": theta.shape[0],
        "O": theta.shape[1],
        "factor": (square - diagonal) / (own - diagonal) if own > diagonal else math.inf,
        "norm_ratio": square / own,
        "effective_rank": float(traces.sum()) ** 2 / square,
        "block_rank": float((traces**2).sum()) / own,
    }


def ratio_of_variances(above: Sequence[float], below: Sequence[float]) -> tuple[float | None, ...]:
    """The ratio of the variances of two independent samples, with its 95 % interval; ``None`` if one hardly varies.

    The interval is normal in the logarithm. The variance of log s^2 is (k - 1) / n for n values of kurtosis k, to first
    order, for any distribution.
    """
    samples = [np.asarray(values, dtype=float) for values in (above, below)]
    if any(values.std() <= ROUNDING * abs(values.mean()) for values in samples):
        return None, None, None
    logs, errors = zip(*map(_log_variance, samples), strict=True)
    half = 1.96 * math.sqrt(sum(errors))
    return math.exp(logs[0] - logs[1]), math.exp(logs[0] - logs[1] - half), math.exp(logs[0] - logs[1] + half)


def _log_variance(values: np.ndarray) -> tuple[float, float]:
    """Logarithm of the variance, and the variance of that logarithm."""
    centred = values - values.mean()
    kurtosis = (centred**4).mean() / (centred**2).mean() ** 2
    return math.log(values.var(ddof=1)), float(kurtosis - 1) / len(values)
