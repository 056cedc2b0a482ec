"""Seconds and memory of an NTK of a 10-layer ReLU network against width (Novak et al. 2022, figure 1, right).

What a program needs is known once it is compiled; where that is over the stated budget it is not run.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from pydantic import Field, PositiveFloat, PositiveInt

from ntkbench.studies import base

HIDDEN = 9


class Settings(base.Settings):
    """Sizes.

    Attributes:
        widths, outputs: every width with every O.
        samples: N.
        case_gigaflop: a program that needs more is not run, by its operations as lowered.
        budget_mb: bytes that a program may take; at most memory_limit_mb makes sense.
    """

    widths: list[PositiveInt] = Field(default=[2**k for k in range(4, 13)], min_length=1)
    outputs: list[PositiveInt] = Field(default=[1, 16, 128, 1024], min_length=1)
    samples: PositiveInt = 16
    case_gigaflop: PositiveFloat = 1e9
    budget_mb: PositiveFloat = 16384


def run(settings: Settings) -> pd.DataFrame:
    """One row for each width, O and implementation."""
    from ntkbench.studies.base import programs

    rows = []
    for width in settings.widths:
        for outputs in settings.outputs:
            for name, title in programs.TITLES.items():
                case = {"N": settings.samples, "O": outputs, "width": width, "method": name, "title": title}
                measure = _ours if name == "structured_derivatives" else _theirs
                rows.append(base.row(case, lambda case=case, measure=measure: measure(settings, case)))
                rows[-1].setdefault("budget_mb", settings.budget_mb)
    return pd.DataFrame(rows)


def _network(case: dict[str, Any]) -> Any:
    from ntkbench.problems.novak import fc_relu

    return fc_relu(N=case["N"], O=case["O"], width=case["width"], depth=HIDDEN)


def _theirs(settings: Settings, case: dict[str, Any]) -> dict[str, Any]:
    from ntkbench.studies.base import programs

    network, target = _network(case), settings.target("jax")
    weights = {name: w.detach().numpy() for name, w in network.module.named_parameters()}
    shapes = {name: w.shape for name, w in weights.items()}
    made = programs.lowered(case["method"], network.jax_forward, shapes, network.x.shape)
    base.check_operations(programs.flops(made), settings.case_gigaflop)
    return programs.timed_program(made, weights, network.x, target, settings.timing_seconds, settings.budget_mb)


def _ours(settings: Settings, case: dict[str, Any]) -> dict[str, Any]:
    from ntkbench.studies.base import programs

    network = _network(case)
    base.check_operations(programs.engine_flops(network.module, network.x), settings.case_gigaflop)
    return programs.timed_engine(network.module, network.x, settings.target(), settings.timing_seconds)
