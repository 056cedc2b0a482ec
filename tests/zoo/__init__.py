"""Many networks and ntkbench's results for them, compared with J J^T by plain autograd in float64."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ntkbench
from ntkbench import testing
from ntkbench.estimate import Estimate

Network = tuple[nn.Module, Tensor]
"""A network and its inputs, in float64."""

TOLERANCE = 1e-9
"""Relative error that rounding may cause."""

WAYS = {
    "structured_derivatives": "layer by layer",
    "jacobian_contraction": "contraction",
    "naive_jacobian": "row by row",
}
"""Names of exact methods in the table."""


@dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
        name: unique.
        make: builds the network and its inputs from torch's current random state.
        group: what the network is an example of.
        package: package that it needs besides ntkbench's own requirements.
    """

    name: str
    make: Callable[[], Network]
    group: str
    package: str | None = None

    @property
    def installed(self) -> bool:
        """Whether the package is installed."""
        return self.package is None or importlib.util.find_spec(self.package) is not None

    def build(self) -> Network:
        """The same network and inputs each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.make()


@dataclass(frozen=True)
class Answer:
    """What ntkbench computes for a network.

    Attributes:
        errors: relative errors, by call.
        estimate: that of the norm.
    """

    errors: dict[str, float]
    estimate: Estimate

    @property
    def error(self) -> float:
        """The largest error."""
        return max(self.errors.values())

    @property
    def way(self) -> str:
        """How the norm was computed."""
        way = WAYS.get(self.estimate.method, "estimate")
        written_out = sum(" written out: " in note for note in self.estimate.notes)
        return f"{way}, {written_out} parameters written out" if written_out else way


@functools.cache
def cases() -> dict[str, Case]:
    """All cases by name."""
    from zoo import libraries, operations

    return {case.name: case for case in (*operations.cases(), *libraries.cases())}


def answer(case: Case) -> Answer:
    """``ntk``, ``trace`` and ``norm`` of a network, compared with the explicit kernel."""
    model, x = case.build()
    theta = explicit_kernel(model, x)
    found = ntkbench.ntk(model, x)
    if case.package is None:
        metrics = {"trace": ntkbench.trace(model, x), "norm": ntkbench.norm(model, x)}
    else:  # tracing takes most of the time of a deep network; all metrics share one trace
        metrics = ntkbench.metrics_of(model, x)
    assert found.shape == theta.shape, f"the kernel is {tuple(found.shape)}, not {tuple(theta.shape)}"
    errors = {"ntk": float((found - theta).abs().max() / theta.abs().max())}
    for name, value in testing.metrics_of(theta.numpy()).items():
        if name in metrics:
            errors[name] = abs(float(metrics[name]) / value - 1)
    return Answer(errors, metrics["norm"])


def explicit_kernel(model: nn.Module, x: Tensor) -> Tensor:
    """J J^T, one plain backward pass for each output."""
    theta = [p for p in model.parameters() if p.requires_grad]
    J = torch.stack([torch.cat(_gradients(output, theta)) for output in model(x).reshape(-1)])
    return J @ J.T


def _gradients(output: Tensor, theta: list[nn.Parameter]) -> list[Tensor]:
    for p in theta:
        p.grad = None
    output.backward(retain_graph=True)
    return [torch.zeros_like(p).flatten() if p.grad is None else p.grad.to_dense().flatten() for p in theta]
