"""Seconds and memory of an NTK of a 10-layer ReLU network against width (Novak et al. 2022, figure 1, right).

The memory of a program is known once it is compiled, whether or not it is run afterwards. A program that needs more
than ``limits.memory_mb``, or more operations than ``limits.gigaflop``, is not run; its row still has its memory. All
programs are in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import pandas as pd
from pydantic import Field, PositiveInt

from ntkbench.measure.schema import Strict
from ntkbench.studies import base

TIMED = True


class Network(Strict):
    """An additional ReLU network.

    Attributes:
        inputs, depth, width, outputs: inputs, hidden layers, units of each, and O.
    """

    inputs: PositiveInt
    depth: PositiveInt
    width: PositiveInt
    outputs: PositiveInt


class Settings(base.Settings):
    """Sizes.

    Attributes:
        widths, outputs: every width with every O.
        inputs, depth: inputs and hidden layers of these networks; 784 and 9 in the paper.
        samples: N.
        others: other networks, such as that of neural-tangents' notebook.
    """

    USES = ("device", "calls", "limits.block_mb", "limits.gigaflop")

    widths: list[PositiveInt] = Field(default=[2**k for k in range(4, 13)], min_length=1)
    outputs: list[PositiveInt] = Field(default=[1, 16, 128, 1024], min_length=1)
    inputs: PositiveInt = 784
    depth: PositiveInt = 9
    samples: PositiveInt = 16
    others: list[Network] = Field(default=[])

    def networks(self) -> list[Network]:
        """All networks that are measured."""
        grid = [(width, outputs) for width in self.widths for outputs in self.outputs]
        own = [Network(inputs=self.inputs, depth=self.depth, width=w, outputs=o) for w, o in grid]
        return [*own, *self.others]


def run(settings: Settings) -> pd.DataFrame:
    """One row for each network and implementation."""
    from ntkbench.studies.base import programs

    cases: list[dict[str, Any]] = [
        {
            "N": settings.samples,
            "budget_mb": settings.limits.memory_mb,
            "inputs": network.inputs,
            "depth": network.depth,
            "O": network.outputs,
            "width": network.width,
            "method": name,
            "title": title,
        }
        for network in settings.networks()
        for name, title in programs.TITLES.items()
    ]
    measures = {"structured_derivatives": _ours}
    return base.table(
        base.row(case, functools.partial(measures.get(case["method"], _theirs), settings, case)) for case in cases
    )


def _network(case: dict[str, Any]) -> Any:
    from ntkbench.problems.novak import fc_relu

    return fc_relu(**{name: case[name] for name in ("N", "O", "width", "depth", "inputs")})


def _theirs(settings: Settings, case: dict[str, Any]) -> dict[str, Any]:
    from ntkbench.studies.base import programs

    network, target = _network(case), settings.target("jax")
    weights = {name: w.detach().numpy() for name, w in network.module.named_parameters()}
    shapes = {name: w.shape for name, w in weights.items()}
    made = programs.lowered(case["method"], network.jax_forward, shapes, network.x.shape)
    return programs.timed_program(made, weights, network.x, target, settings.limits, settings.calls)


def _ours(settings: Settings, case: dict[str, Any]) -> dict[str, Any]:
    from ntkbench.studies.base import programs

    network = _network(case)
    settings.limits.check_operations(programs.engine_flops(network.module, network.x))
    return programs.timed_engine(network.module, network.x, settings.target(), settings.calls)
