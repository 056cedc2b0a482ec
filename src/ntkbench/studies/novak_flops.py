"""Operations for an NTK entry of a 10-layer ReLU network against width (Novak et al. 2022, figure 1, left).

Nothing is run or allocated: neural-tangents' three implementations and the Jacobian alone are counted in lowered
programs, our kernel by layers by the shapes of its matrix products, up to a width.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from pydantic import Field, PositiveInt

from ntkbench.problems.base import Definition
from ntkbench.studies import base

HIDDEN = 9


class Settings(base.Settings):
    """Sizes.

    Attributes:
        widths, outputs, samples: every width with every O and every N.
        largest_traced: width up to which our kernel is counted, since tracing it takes weights.
    """

    widths: list[PositiveInt] = Field(default=[2**k for k in range(4, 13)], min_length=1)
    outputs: list[PositiveInt] = Field(default=[1, 16, 128, 1024], min_length=1)
    samples: list[PositiveInt] = Field(default=[1, 16], min_length=1)
    largest_traced: PositiveInt = 1024


def run(settings: Settings) -> pd.DataFrame:
    """One row for each width, O, N and implementation."""
    from ntkbench.problems.novak import fc_relu
    from ntkbench.studies.base import programs

    rows = []
    for width in settings.widths:
        for outputs in settings.outputs:
            network = fc_relu(N=1, O=outputs, width=width, depth=HIDDEN)
            sizes = {"O": outputs, "width": width, "P": sum(w.numel() for w in network.module.parameters())}
            for samples in settings.samples:
                for name, title in programs.TITLES.items():
                    case = {"N": samples, **sizes, "method": name, "title": title}
                    rows.append(_row(settings, case, network))
    return pd.DataFrame(rows)


def _row(settings: Settings, case: dict[str, Any], network: Definition) -> dict[str, Any]:
    ours = case["method"] == "structured_derivatives"
    if ours and case["width"] > settings.largest_traced:
        return base.left_out(case, f"is traced with its weights, up to largest_traced ({settings.largest_traced})")

    def measure() -> dict[str, float]:
        flops = _ours(case) if ours else _theirs(case, network)
        return {"flops": flops, "flops_per_entry": flops / (case["N"] * case["O"]) ** 2}

    return base.row(case, measure)


def _theirs(case: dict[str, Any], network: Definition) -> float:
    from ntkbench.studies.base import programs

    shapes = {name: tuple(w.shape) for name, w in network.module.named_parameters()}
    x = (case["N"], *network.x.shape[1:])
    return programs.flops(programs.lowered(case["method"], network.jax_forward, shapes, x))


def _ours(case: dict[str, Any]) -> float:
    from ntkbench.problems.novak import fc_relu
    from ntkbench.studies.base import programs

    network = fc_relu(N=case["N"], O=case["O"], width=case["width"], depth=HIDDEN)
    return programs.engine_flops(network.module, network.x)
