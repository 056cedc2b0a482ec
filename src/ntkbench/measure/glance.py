"""Rough costs of cells, from their passes, shapes and committed rates alone: nothing is trained, run or timed.

Seconds come from the committed table of the default configuration, for the cell's method at about the same number of
operations. A pass counts as two forward passes, whose operations are counted on shapes. Seconds are typically off by a
factor of two or three, and by the ratio of the speeds of the two machines. Problems whose data are not on this machine
are left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from ntkbench import methods, operators, paths, problems
from ntkbench.ambient import uncompiled
from ntkbench.errors import Unavailable
from ntkbench.measure.cells import Cell
from ntkbench.measure.config import Config
from ntkbench.measure.forecast import Forecast
from ntkbench.metrics import METRICS
from ntkbench.options import Target
from ntkbench.problem import Problem, on_shapes
from ntkbench.problems.base import parse_label
from ntkbench.units import bytes_label, counted, seconds_label

TABLE = "default/table.csv"
"""The committed table with the rates, in ``results/reference/``."""
OFF = 3.0
"""Multiple of a limit of seconds above which a cell is reported, as seconds are off by about that factor."""
NEAREST = 3
"""Rows of the table, nearest in the number of operations, whose median rate is taken."""
LONG = 1800.0
"""Predicted seconds of a grid above which they are reported."""
SHOWN = 3
"""Maximum number of methods and problems over a limit that are named."""


class Shapes(NamedTuple):
    """A problem before it is trained, and the operations of its forward pass."""

    problem: Problem
    forward: float


def warnings(config: Config, every: Iterable[Cell]) -> list[str]:
    """Lines about a grid that takes longer than :data:`LONG`, and about cells over the limits, if there are any.

    A grid on a GPU has no lines, since the committed rates are those of a processor.
    """
    if operators.device_memory(config.target("torch")) is not None:
        return []
    found, limits = costs(config, every), config.limits
    lines = []
    if (total := sum(min(one.wall(cell), 2 * limits.time_s) for cell, one in found.items())) > LONG:
        said = f"this grid takes about {seconds_label(total)}, for {counted(len(found), 'cell')} with a forecast"
        lines.append(f"{said}; `ntkbench check --predict` is more accurate")
    heavy = {cell: one.bytes for cell, one in found.items() if one.bytes and one.bytes > limits.memory_bytes}
    slow = {cell: one.seconds for cell, one in found.items() if one.seconds > OFF * limits.time_s}
    if heavy:
        lines.append(f"over limits.memory_mb ({limits.memory_mb:g}), so skipped: {_worst(heavy, 'needs', bytes_label)}")
    if slow:
        lines.append(f"over limits.time_s ({limits.time_s:g}): {_worst(slow, 'takes about', seconds_label)}")
    return lines


def _worst(cells: Mapping[Cell, float], verb: str, label: Callable[[float], str]) -> str:
    """The methods and problems of the cells with the largest costs, and the number of all cells."""
    largest: dict[str, float] = {}
    for cell in sorted(cells, key=lambda cell: -cells[cell]):
        largest.setdefault(f"{cell.method} on {cell.problem}", cells[cell])
    named = [f"{name} {verb} {label(cost)}" for name, cost in [*largest.items()][:SHOWN]]
    more = f"; {counted(len(cells), 'cell')} in all" if len(cells) > len(named) else ""
    return f"{', '.join(named)}{more}"


def costs(config: Config, every: Iterable[Cell]) -> dict[Cell, Forecast]:
    """Rough costs of the cells whose method applies; those without passes or rates are left out."""
    rates = _rates()
    found = {}
    for cell in every:
        if cell.metric not in METRICS or (known := _shapes(cell.problem)) is None:
            continue
        method = methods.get(cell.method)
        try:
            target = config.target(cell.backend)
        except Unavailable:  # its row says so
            continue
        if method.unsupported_reason(known.problem, cell.metric, target, cell.passes):
            continue
        held = method.bytes_needed(known.problem, cell.metric, target, cell.passes)
        seconds = _seconds(rates, cell, _operations(cell, known, target))
        if seconds is not None:
            found[cell] = Forecast(seconds, held)
    return found


def _operations(cell: Cell, known: Shapes, target: Target) -> float:
    """Operations of one call: two forward passes per pass; O passes if the method counts none."""
    passes = cell.passes or methods.get(cell.method).passes_needed(known.problem, cell.metric, target)
    return 2 * known.forward * (passes or known.problem.O)


def _seconds(rates: pd.DataFrame, cell: Cell, operations: float) -> float | None:
    """Seconds of a call, by the nearest rows of the same method, or else of all methods of its kind."""
    own = rates[(rates["method"] == cell.method) & (rates["backend"] == cell.backend)]
    if not len(own):
        own = rates[rates["kind"] == methods.get(cell.method).kind]
    if not len(own) or not operations > 0:
        return None
    distance = np.log(own["operations"] / operations).abs()
    near = own.loc[distance.nsmallest(NEAREST).index]
    # Calls with fewer operations than were ever measured take as long as the shortest ones.
    factor = np.maximum(operations / near["operations"], 1.0 if operations < own["operations"].min() else 0.0)
    return math.exp(float(np.log(near["seconds"] * factor).median()))


@functools.cache
def _rates() -> pd.DataFrame:
    """Seconds and operations of the rows of the committed table whose problems are known here."""
    file = paths.REFERENCE / TABLE
    table = pd.read_csv(file, low_memory=False) if file.exists() else pd.DataFrame(columns=["status"])
    rows = []
    for row in table[table["status"] == "ok"].to_dict("records"):
        if row["seconds"] > 0 and row["metric"] in METRICS and (known := _shapes(row["problem"])):
            passes = row["passes_spent"] if row["passes_spent"] > 0 else known.problem.O
            named = {key: row[key] for key in ("problem", "method", "backend", "kind", "seconds")}
            rows.append(named | {"operations": 2 * known.forward * passes})
    return pd.DataFrame(rows, columns=["problem", "method", "backend", "kind", "seconds", "operations"])


@functools.cache
def _shapes(label: str) -> Shapes | None:
    """A problem with its initial weights; ``None`` if its data are not here, or it cannot be built."""
    from torch.utils.flop_counter import FlopCounterMode

    try:
        if not all(file.here() for file in getattr(problems.get(parse_label(label)[0]), "data", ())):
            return None
        made = problems.define(label)
        network = made.part or made.module
        theta = {name: w.detach().numpy() for name, w in network.named_parameters() if w.requires_grad}
        trained = theta if made.training else None
        problem = Problem(label, network, made.x, theta, trained, made.jax_forward, made.samples_interact, made.outputs)
        with uncompiled(), FlopCounterMode(display=False) as counter:
            problem._shape.append(tuple(on_shapes(problem, network).shape))
    except Exception:  # reported where the problem is loaded; or the network needs values
        return None
    return Shapes(problem, max(float(counter.get_total_flops()), 2.0 * problem.N * problem.P))
