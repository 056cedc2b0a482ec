"""Effective ranks of Theta and of kernels between samples, with different statistics of BatchNorm.

The kernel of a network with BatchNorm in eval mode depends on its statistics: those stored with the weights, those of
the images themselves (``calibrated``, by one pass in train mode), or means of 0 and variances of 1
(``uncalibrated``), as in a network that was never trained. Theta is n x n with n = N O. The pNTK, the trace kernel and
the kernels of single logits are N x N, and are read off Theta's entries. The table has the effective rank
(tr A)^2 / ||A||_F^2 and the entropy effective rank, both in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from ntkbench import problems
from ntkbench.errors import Unavailable
from ntkbench.measure.schema import ProblemLabel
from ntkbench.problem import Problem, Weights
from ntkbench.studies import base
from ntkbench.studies.base import thetas

TIMED = False
PLUGINS = (f"ntkbench.methods.{thetas.METHOD}", "ntkbench.operators.torch")

KERNELS = ("theta", "trace", "sum_of_logits", "single_logit")
WEIGHTS = {"theta_0": "initial", "theta_f": "trained"}
STATISTICS = ("stored", "calibrated", "uncalibrated")
"""BatchNorm's statistics: those stored with the weights, those of the images, and means of 0 with variances of 1."""


class Settings(base.Settings):
    """Networks whose kernels are measured.

    Attributes:
        problems: labels of networks with BatchNorm, with n small enough to decompose Theta in float64.
    """

    USES = ("device", "limits.block_mb")

    dtype: Literal["float64"] = "float64"
    problems: list[ProblemLabel] = Field(default=["resnet18[N=24,O=10,width=8]"], min_length=1)


def run(settings: Settings) -> pd.DataFrame:
    """One row for each problem, weights, statistics and kernel."""
    return base.table(row for label in settings.problems for row in _of_problem(settings, label))


def _of_problem(settings: Settings, label: str) -> Iterator[base.Row]:
    problem = base.Once(lambda: problems.load(label))
    for weights, words in WEIGHTS.items():
        for statistics in STATISTICS:
            case = {"problem": label, "weights": words, "statistics": statistics}
            measure = functools.partial(_measure, settings, problem, weights, statistics)
            yield from base.rows(case, measure, [{"kernel": kernel} for kernel in KERNELS])


def _measure(settings: Settings, problem: base.Once[Problem], weights: str, statistics: str) -> list[dict[str, Any]]:
    if problem().theta_f is None and weights == "theta_f":
        raise Unavailable("the network is not trained")
    chosen = with_statistics(problem(), weights, statistics)
    theta = thetas.Theta(chosen, settings.target(dtype="float64"))()
    made = kernels(theta, chosen.O)
    return [{"kernel": name, **base.sizes(chosen), **_columns(found)} for name, found in made.items()]


def with_statistics(problem: Problem, end: str, statistics: str) -> Problem:
    """A problem at only one set of weights, with the requested statistics of BatchNorm.

    Args:
        problem: a problem with a network in torch.
        end: the set of weights, ``theta_0`` or ``theta_f``.
        statistics: one of :data:`STATISTICS`.

    Raises:
        Unavailable: the network has no BatchNorm with statistics, or the stored ones are in their initial state.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    from ntkbench import modules

    weights, fixed = problem.weights(end), dict(problem.fixed(end))
    network = modules.copied(problem.network)
    modules.load(network, {**fixed, **weights})
    normalised = {name: layer for name, layer in network.named_modules() if isinstance(layer, _BatchNorm)}
    if not any(layer.track_running_stats for layer in normalised.values()):
        raise Unavailable(f"{problem.name} has no BatchNorm with statistics")
    if statistics != "stored":
        for layer in normalised.values():
            layer.reset_running_stats()
            layer.momentum = None  # the mean over batches, of which there is one
    if statistics == "calibrated":
        for layer in normalised.values():
            layer.train()
        with torch.no_grad():
            network(torch.from_numpy(problem.x))
    elif statistics == "stored" and all(_is_new(layer) for layer in normalised.values()):
        raise Unavailable("stored statistics are means of 0 and variances of 1")
    values: Weights = {
        f"{name}.{key}": getattr(layer, key).numpy()
        for name, layer in normalised.items()
        for key in ("running_mean", "running_var")
    }
    return replace(problem, theta_0=weights, fixed_0={**fixed, **values}, theta_f=None, fixed_f={})


def _is_new(layer: Any) -> bool:
    return not bool(layer.running_mean.any()) and bool((layer.running_var == 1).all())


def kernels(theta: np.ndarray, outputs: int) -> dict[str, list[np.ndarray]]:
    """The kernels by name, from Theta ``[n, n]``; there are O kernels of single logits."""
    blocks = theta.reshape(len(theta) // outputs, outputs, -1, outputs)
    return {
        "theta": [theta],
        "trace": [np.einsum("aobo->ab", blocks) / outputs],
        "sum_of_logits": [thetas.pooled(theta, outputs)],
        "single_logit": [blocks[:, o, :, o] for o in range(outputs)],
    }


def _columns(found: list[np.ndarray]) -> dict[str, Any]:
    """Effective ranks of kernels of one kind: the median, with the minimum and the maximum."""
    ranks, entropies, shares = zip(*map(effective_ranks, found), strict=True)
    return {
        "size": len(found[0]),
        "kernels": len(found),
        "effective_rank": float(np.median(ranks)),
        "effective_rank_low": min(ranks),
        "effective_rank_high": max(ranks),
        "entropy_effective_rank": float(np.median(entropies)),
        "first_share": float(np.median(shares)),
    }


def effective_ranks(kernel: np.ndarray) -> tuple[float, float, float]:
    """Effective rank, entropy effective rank, and the largest eigenvalue's share of the trace.

    Raises:
        Unavailable: the kernel is zero and has no effective rank.
    """
    values = np.maximum(np.linalg.eigvalsh(kernel), 0.0)
    if not values.any():
        raise Unavailable("a kernel of this network is zero and has no effective rank")
    shares = values / values.sum()
    known = shares[shares > 0]
    return float(1 / (shares**2).sum()), float(np.exp(-(known * np.log(known)).sum())), float(shares.max())
