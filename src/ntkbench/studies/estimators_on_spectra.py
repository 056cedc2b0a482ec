"""Every estimator on Jacobians of prescribed spectra, at equal passes: the winner depends on the spectrum.

J = U S V^T has random orthogonal U and V, and the square roots of given eigenvalues in S. It is stored as a matrix, so
that a pass is a matrix product and the exact metrics are known. With n outputs and P parameters there are min(n, P)
nonzero eigenvalues. For the alignment, J_f = 0.6 J + 0.8 J' with a J' drawn like J. Methods that need per-sample
gradients are excluded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, PositiveFloat, PositiveInt

from ntkbench import methods, metrics
from ntkbench.errors import Unavailable
from ntkbench.measure.seeds import Reruns
from ntkbench.methods.base import Stochastic
from ntkbench.studies import base
from ntkbench.units import counted

if TYPE_CHECKING:
    from ntkbench.operators import JacobianOperator

SPECTRA: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda i: np.linspace(1, 3, len(i)),
    "1/i": lambda i: 1 / i,
    "0.9^i": lambda i: 0.9**i,
    "5 % ones, 1e-3": lambda i: np.where(i <= len(i) / 20, 1, 1e-3),
    "5 % ones, 1e-8": lambda i: np.where(i <= len(i) / 20, 1, 1e-8),
    "0.7^i": lambda i: 0.7**i,
    "i^-2": lambda i: i**-2.0,
    "spike + 1/i": lambda i: 1 / i + 30 * (i == 1),
}
"""Eigenvalues of Theta as functions of their index, from 1 on."""

NAMES = [name for name in methods.names() if isinstance(methods.get(name), Stochastic)]
NAMES = [name for name in NAMES if not methods.get(name).needs_independent_samples]
"""Stochastic methods that need only products with J and J^T."""

TIMED = False
PLUGINS = ("ntkbench.operators.dense", *(f"ntkbench.methods.{name}" for name in methods.REGISTRY.found()))


class Settings(base.Settings):
    """Sizes of the Jacobians and budgets.

    Attributes:
        seeds: number of seeds of a method at each budget.
        n: outputs.
        outputs_per_parameter: n / P, each value for one shape of J.
        spectra: names in :data:`SPECTRA`.
        passes: budgets.
    """

    USES = (*base.OF_TARGET, "seeds")

    seeds: int = Field(100, ge=2)
    n: PositiveInt = Field(1000, ge=20)
    outputs_per_parameter: list[PositiveFloat] = Field(default=[0.25, 1, 4], min_length=1)
    # The names are known when the class is created, which is when pydantic needs them.
    spectra: list[Literal[*SPECTRA]] = Field(default=list(SPECTRA), min_length=1)  # type: ignore[valid-type]
    passes: list[PositiveInt] = Field(default=[18, 36, 72, 144, 288], min_length=1)


class Spectrum:
    """A prescribed spectrum instead of a prepared problem: the Jacobians of each metric, and the exact values.

    Args:
        eigenvalues: nonzero eigenvalues of Theta, ``[min(n, P)]``.
        n, P: shape of J.
        settings: device, precision and memory.
        seed: seed of the singular vectors.
    """

    def __init__(self, eigenvalues: np.ndarray, n: int, P: int, settings: Settings, seed: int = 0) -> None:
        import torch

        from ntkbench.operators import dense
        from ntkbench.operators.torch import TorchRng, device

        rng = np.random.default_rng(seed)
        values = np.sqrt(eigenvalues)
        J, other = ((_orthonormal(rng, n, len(values)) * values) @ _orthonormal(rng, P, len(values)).T for _ in "ab")
        ends = (J, 0.6 * J + 0.8 * other)
        self.truth = {
            metric: _exact(metric, *ends[: len(metrics.parameter_sets(metric))]) for metric in metrics.METRICS
        }
        target = settings.target()
        to = {"dtype": getattr(torch, target.dtype), "device": device(target)}
        probes = functools.partial(TorchRng, **to)
        self._jacobians = [dense.DenseJacobian(torch.from_numpy(end).to(**to), probes, target.memory) for end in ends]

    def jacobians(self, metric: str) -> list[JacobianOperator]:
        """Operators with their counters at zero, at both sets of weights for the alignment."""
        return [j.fresh() for j in self._jacobians[: len(metrics.parameter_sets(metric))]]


def run(settings: Settings) -> pd.DataFrame:
    """One row for each shape, spectrum, metric, method and budget: quartiles of error, and coverage."""
    return base.table(
        row
        for ratio in settings.outputs_per_parameter
        for name in settings.spectra
        for row in _rows(settings, ratio, name)
    )


def _rows(settings: Settings, ratio: float, name: str) -> Iterator[base.Row]:
    n, P = settings.n, max(1, round(settings.n / ratio))
    values = SPECTRA[name](np.arange(1, min(n, P) + 1))
    spectrum = base.Once(lambda: Spectrum(values, n, P, settings))
    rank = float(values.sum() ** 2 / (values**2).sum())
    sizes = {"spectrum": name, "n": n, "P": P, "outputs_per_parameter": ratio, "effective_rank": rank}
    for method in map(methods.stochastic, NAMES):
        for metric in method.metrics:
            for passes in settings.passes:
                case = {**sizes, "metric": metric, "method": method.name, "title": method.title, "kind": method.kind}
                measure = functools.partial(_measure, settings, spectrum, method, metric, passes)
                yield base.row({**case, "passes": passes}, measure)


def _measure(
    settings: Settings, spectrum: Callable[[], Spectrum], method: Stochastic, metric: str, passes: int
) -> dict[str, Any]:
    least = method.cost(metric, method.fewest_probes)
    if passes < least:
        raise Unavailable(f"the {metrics.words(metric)} takes at least {counted(least, 'pass', 'passes')}")
    made = spectrum()
    found = Reruns(made.truth[metric], settings.dtype)
    found.run(lambda seed: method.estimate(made, metric, passes, seed), range(settings.seeds))
    return found.columns()


def _orthonormal(rng: np.random.Generator, size: int, columns: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((size, columns)))[0]


def _exact(metric: str, *ends: np.ndarray) -> float:
    return metrics.from_gram(*(J @ J.T for J in ends)).metric(metric)
