"""Seconds for NTK and pNTK of ResNets against depth (Mohamadi et al. 2023, figure 1).

For two images by themselves and for all pairs of N images, which is where published ratios come from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field, PositiveInt

from ntkbench import methods
from ntkbench.measure import timing
from ntkbench.problem import Problem
from ntkbench.studies import base

METHODS = ("structured_derivatives", "structured_sum_of_logits", "jacobian_contraction", "sum_of_logits")
PLUGINS = tuple(f"ntkbench.methods.{name}" for name in METHODS)
KERNELS = dict(zip(METHODS, ("NTK", "pNTK", "NTK", "pNTK"), strict=True))


class Settings(base.Settings):
    """Networks and inputs.

    Attributes:
        depths: 18, 34, 50, 101, 152, 200.
        outputs: of the readout.
        width: channels of the first stage; 64 in the paper.
        side: pixels of an image's side; 64 for Tiny ImageNet.
        samples: whose pairs share the cost; two by themselves are measured as well.
        case_gigaflop: what needs more multiplications than that is left out, by the cost of a forward pass.
    """

    depths: list[int] = Field(default=[18, 34, 50, 101, 152, 200], min_length=1)
    outputs: list[PositiveInt] = Field(default=[10, 100, 200], min_length=1)
    width: PositiveInt = 64
    side: PositiveInt = 64
    samples: int = Field(default=16, ge=3)
    case_gigaflop: float = Field(1e9, gt=0)


def run(settings: Settings) -> pd.DataFrame:
    """One row for each depth, number of outputs, number of images and method."""
    rows = []
    for depth in settings.depths:
        for outputs in settings.outputs:
            for samples in (2, settings.samples):
                problem, flops = _problem(settings, depth, outputs, samples)
                shared: dict[Any, Any] = {}
                rows += [_row(settings, problem, flops, depth, name, shared) for name in METHODS]
    return pd.DataFrame(rows)


def _row(
    settings: Settings, problem: Problem, flops: float, depth: int, name: str, shared: dict[Any, Any]
) -> dict[str, Any]:
    """One method on one problem; methods that prepare alike share what was prepared."""
    method, target = methods.get(name), settings.target()
    sizes = {size: getattr(problem, size) for size in ("N", "O", "P", "n")}
    case = {"depth": depth, **sizes, "method": name, "title": method.title, "kernel": KERNELS[name]}
    # A backward pass takes twice a forward pass, and the products of all rows of J n^2 P.
    directions = problem.O if KERNELS[name] == "NTK" else 1
    needed = 3 * flops * problem.N * directions
    needed += 2 * problem.n**2 * problem.P if name == "jacobian_contraction" else 0
    if reason := method.unsupported_reason(problem, "norm", target):
        return base.left_out(case, reason)
    size = problem.n * problem.P * np.dtype(settings.dtype).itemsize
    if name == "jacobian_contraction" and size > target.memory:
        kept = f"over block_memory_mb ({settings.block_memory_mb:g}): it would be made anew for every pair of blocks"
        return base.left_out(case, f"J takes {size / 2**20:.0f} MiB, {kept}")

    def measure() -> dict[str, Any]:
        base.check_operations(needed, settings.case_gigaflop)
        prepare = type(method).prepare
        if prepare not in shared:
            shared[prepare] = method.prepare(problem, target)
        times, _ = timing.timed(lambda: method.estimate(shared[prepare], "norm"), settings.timing_seconds)
        pairs = problem.N * (problem.N + 1) // 2
        spread = timing.quartiles("seconds", times)
        return spread | {"pairs": pairs, "seconds_per_pair": spread["seconds"] / pairs}

    return base.row(case, measure)


def _problem(settings: Settings, depth: int, outputs: int, samples: int) -> tuple[Problem, float]:
    """A ResNet on standard normal images, and floating-point operations of its forward pass of one image."""
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
