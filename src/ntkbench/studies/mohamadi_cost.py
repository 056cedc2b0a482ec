"""Seconds for NTK and pNTK of ResNets against depth (Mohamadi et al. 2023, figure 1).

Seconds are measured for two images alone, and for all pairs of N images, on which the published ratios are based.
Operations are estimated from those of a forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import pandas as pd
from pydantic import Field, PositiveInt

from ntkbench import methods, operations
from ntkbench.errors import Unavailable
from ntkbench.measure.seeds import checked
from ntkbench.measure.timing import timed
from ntkbench.methods.base import Method
from ntkbench.problem import Problem
from ntkbench.studies import base

METHODS = ("structured_derivatives", "structured_sum_of_logits", "jacobian_contraction", "sum_of_logits")
PLUGINS = tuple(f"ntkbench.methods.{name}" for name in METHODS)
TIMED = True
KERNELS = dict(zip(METHODS, ("NTK", "pNTK", "NTK", "pNTK"), strict=True))


class Settings(base.Settings):
    """Networks and inputs.

    Attributes:
        depths: 18, 34, 50, 101, 152, 200.
        outputs: numbers of outputs of the readout.
        width: channels of the first stage; 64 in the paper.
        side: pixels of an image's side; 64 for Tiny ImageNet.
        samples: N images whose pairs share the cost; two images alone are measured as well.
    """

    USES = (*base.OF_TARGET, "calls", "limits.gigaflop")

    depths: list[Literal[18, 34, 50, 101, 152, 200]] = Field(default=[18, 34, 50, 101, 152, 200], min_length=1)
    outputs: list[PositiveInt] = Field(default=[10, 100, 200], min_length=1)
    width: PositiveInt = 64
    side: PositiveInt = 64
    samples: int = Field(default=16, ge=3)


def run(settings: Settings) -> pd.DataFrame:
    """One row for each depth, number of outputs, number of images and method."""
    return base.table(
        row
        for depth in settings.depths
        for outputs in settings.outputs
        for samples in (2, settings.samples)
        for row in _rows(settings, depth, outputs, samples)
    )


def _rows(settings: Settings, depth: int, outputs: int, samples: int) -> Iterator[base.Row]:
    """All methods on one problem; methods with the same preparation share it."""
    made = base.Once(lambda: _problem(settings, depth, outputs, samples))
    shared: dict[Any, base.Once[Any]] = {}

    def measure(name: str) -> dict[str, Any]:
        problem, flops = made()
        method, target = methods.get(name), settings.target()
        _check(settings, method, problem, flops)
        prepared = shared.setdefault(type(method).prepare, base.Once(lambda: method.prepare(problem, target)))()
        found = timed(lambda: method.estimate(prepared, "norm"), settings.calls)
        pairs = problem.N * (problem.N + 1) // 2
        columns = {**found.columns(), "value": checked(found.first).value, "pairs": pairs}
        return {**base.sizes(problem), **columns, "seconds_per_pair": columns["seconds"] / pairs}

    for name in METHODS:
        case = {"depth": depth, "N": samples, "O": outputs, "method": name, "title": base.title(name)}
        yield base.row({**case, "kernel": KERNELS[name]}, functools.partial(measure, name))


def _check(settings: Settings, method: Method, problem: Problem, flops: float) -> None:
    """Check that a method can be measured within the limits.

    Raises:
        Unavailable: it cannot.
    """
    target = settings.target()
    if reason := method.unsupported_reason(problem, "norm", target):
        raise Unavailable(reason)
    of_both = operations.FORWARD_AND_BACKWARD * flops
    needed = of_both * problem.N * (problem.O if KERNELS[method.name] == "NTK" else 1)
    if method.name == "jacobian_contraction":
        needed += 2 * problem.n**2 * problem.P  # products of all rows of J
        size = problem.n * problem.P * target.itemsize
        if size > target.memory:
            kept = (
                f"over limits.block_mb ({settings.limits.block_mb:g}): it would be recomputed for every pair of blocks"
            )
            raise Unavailable(f"J takes {size / 2**20:.0f} MiB, {kept}")
    settings.limits.check_operations(needed)


def _problem(settings: Settings, depth: int, outputs: int, samples: int) -> tuple[Problem, float]:
    """A ResNet on standard normal images, and the floating-point operations of its forward pass for one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ntkbench.networks import residual
    from ntkbench.networks.initialisation import scaled_normal, seeded

    network = seeded(lambda: scaled_normal(residual.network(depth, outputs, settings.width)), 0)
    x = torch.randn(samples, 3, settings.side, settings.side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x[:1])
    weights = {name: w.detach().numpy() for name, w in network.named_parameters()}
    return Problem(f"resnet{depth}[O={outputs}]", network, x.numpy(), weights), counter.get_total_flops()
