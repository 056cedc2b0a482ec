"""Seconds and memory of an NTK of a 10-layer ReLU network against width (Novak et al. 2022, figure 1, right).

The memory of a program is known once it is compiled; a program that needs more than ``limits.memory_mb`` is not run.
"""

from __future__ import annotations

import functools
from typing import Any

import pandas as pd
from pydantic import Field, PositiveInt

from ntkbench.studies import base

TIMED = True
HIDDEN = 9


class Settings(base.Settings):
    """Sizes.

    Attributes:
        widths, outputs: every width with every O.
        samples: N.
    """

    widths: list[PositiveInt] = Field(default=[2**k for k in range(4, 13)], min_length=1)
    outputs: list[PositiveInt] = Field(default=[1, 16, 128, 1024], min_length=1)
    samples: PositiveInt = 16


def run(settings: Settings) -> pd.DataFrame:
    """One row for each width, O and implementation."""
    from ntkbench.studies.base import programs

    sizes = {"N": settings.samples, "budget_mb": settings.limits.memory_mb}
    cases: list[dict[str, Any]] = [
        {**sizes, "O": outputs, "width": width, "method": name, "title": title}
        for width in settings.widths
        for outputs in settings.outputs
        for name, title in programs.TITLES.items()
    ]
    measures = {"structured_derivatives": _ours}
    return base.table(
        base.row(case, functools.partial(measures.get(case["method"], _theirs), settings, case)) for case in cases
    )


def _network(case: dict[str, Any]) -> Any:
    from ntkbench.problems.novak import fc_relu

    return fc_relu(N=case["N"], O=case["O"], width=case["width"], depth=HIDDEN)


def _theirs(settings: Settings, case: dict[str, Any]) -> dict[str, Any]:
    from ntkbench.studies.base import programs

    network, target = _network(case), settings.target("jax")
    weights = {name: w.detach().numpy() for name, w in network.module.named_parameters()}
    shapes = {name: w.shape for name, w in weights.items()}
    made = programs.lowered(case["method"], network.jax_forward, shapes, network.x.shape)
    settings.limits.check_operations(programs.flops(made))
    return programs.timed_program(made, weights, network.x, target, settings.limits, settings.calls)


def _ours(settings: Settings, case: dict[str, Any]) -> dict[str, Any]:
    from ntkbench.studies.base import programs

    network = _network(case)
    settings.limits.check_operations(programs.engine_flops(network.module, network.x))
    return programs.timed_engine(network.module, network.x, settings.target(), settings.calls)
