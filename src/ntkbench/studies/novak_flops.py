"""Operations for an NTK entry of a 10-layer ReLU network against width (Novak et al. 2022, figure 1, left).

Apart from one sample, which is traced, nothing is run or allocated. The operations of neural-tangents' three
implementations and of the Jacobian alone are counted in lowered programs, those of our layerwise kernel from the shapes
of its matrix products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pandas as pd
from pydantic import Field, PositiveInt

from ntkbench.problems.base import Definition
from ntkbench.studies import base

TIMED = False
HIDDEN = 9


class Settings(base.Settings):
    """Sizes.

    Attributes:
        widths, outputs, samples: every width with every O and every N.
    """

    USES = ()

    device: Literal["cpu"] = "cpu"
    widths: list[PositiveInt] = Field(default=[2**k for k in range(4, 13)], min_length=1)
    outputs: list[PositiveInt] = Field(default=[1, 16, 128, 1024], min_length=1)
    samples: list[PositiveInt] = Field(default=[1, 16], min_length=1)


def run(settings: Settings) -> pd.DataFrame:
    """One row for each width, O, N and implementation."""
    return base.table(
        row for width in settings.widths for outputs in settings.outputs for row in _rows(settings, width, outputs)
    )


def _rows(settings: Settings, width: int, outputs: int) -> Iterator[base.Row]:
    from ntkbench.studies.base import programs

    network = base.Once(lambda: _network(outputs, width))
    for samples in settings.samples:
        for name, title in programs.TITLES.items():
            case = {"N": samples, "O": outputs, "width": width, "method": name, "title": title}
            yield base.row(case, functools.partial(_measure, case, network))


def _network(outputs: int, width: int) -> Definition:
    from ntkbench.problems.novak import fc_relu

    return fc_relu(N=1, O=outputs, width=width, depth=HIDDEN)


def _measure(case: dict[str, Any], network: Callable[[], Definition]) -> dict[str, float]:
    count = _ours if case["method"] == "structured_derivatives" else _theirs
    flops = count(case, network())
    parameters = sum(w.numel() for w in network().module.parameters())
    return {"P": parameters, "flops": flops, "flops_per_entry": flops / (case["N"] * case["O"]) ** 2}


def _theirs(case: dict[str, Any], network: Definition) -> float:
    from ntkbench.studies.base import programs

    shapes = {name: tuple(w.shape) for name, w in network.module.named_parameters()}
    x = (case["N"], *network.x.shape[1:])
    assert network.jax_forward is not None
    return programs.flops(programs.lowered(case["method"], network.jax_forward, shapes, x))


def _ours(case: dict[str, Any], network: Definition) -> float:
    from ntkbench.studies.base import programs

    return programs.engine_flops(network.module, network.x.repeat(case["N"], 0))
