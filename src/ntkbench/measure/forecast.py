"""Predicted costs of cells, which prune the grid and tell its duration before it runs."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ntkbench import cost, methods, problems
from ntkbench.errors import Unavailable
from ntkbench.measure import apart, outcomes
from ntkbench.measure.cells import Cell
from ntkbench.measure.config import Config
from ntkbench.measure.limits import Limits
from ntkbench.metrics import METRICS
from ntkbench.units import bytes_label, seconds_label

BESIDE = 1.0
"""Seconds of a cell besides its estimates: processes, the problem, preparing and tracing."""
OFF = 2.0
"""Factor by which predictions are typically off."""


class Forecast(NamedTuple):
    """Predicted cost of a cell.

    Attributes:
        seconds: seconds of one estimate after the first.
        bytes: peak bytes besides the network; ``None`` if not known.
    """

    seconds: float
    bytes: float | None

    def wall(self, cell: Cell) -> float:
        """Seconds that the whole cell takes."""
        return BESIDE + (2 + cell.seeds + cell.calls) * self.seconds


def make(
    config: Config, some: Iterable[Cell], work: Path, begin: Callable[[str], None] = lambda label: None
) -> dict[Cell, Forecast]:
    """Predict the costs of cells, problem by problem, each in a process of its own under the limits.

    Cells without a prediction are left out: those whose method does not apply, those of metrics of eigenvalues, and all
    of a problem that fails. Cost: see :func:`ntkbench.cost.predict`; a few seconds for each small problem and metric.

    Args:
        config: the settings.
        some: the cells.
        work: a folder for a temporary file.
        begin: called with each problem's label before it is predicted.
    """
    found: dict[Cell, Forecast] = {}
    chosen = sorted((cell for cell in some if cell.metric in METRICS), key=lambda cell: cell.problem)
    for label, group in itertools.groupby(chosen, key=lambda cell: cell.problem):
        begin(label)
        own = list(group)
        made = apart.run(_predict, (config, own), config.limits, config.threads, work / "forecast.part")
        if made["status"] != outcomes.OK:
            outcomes.say(f"no costs are predicted for {label}: {made['reason']}")
            continue
        found |= {cell: Forecast(*made["costs"][cell.label]) for cell in own if cell.label in made["costs"]}
    return found


def rivals(some: Iterable[Cell], every: Iterable[Cell]) -> list[Cell]:
    """The cells of exact methods on the same tasks as ``some``, which ``some`` are compared with."""
    tasks = {(cell.problem, cell.metric) for cell in some}
    return [cell for cell in every if _is_exact(cell) and (cell.problem, cell.metric) in tasks]


def pruned(forecasts: Mapping[Cell, Forecast], limits: Limits) -> dict[Cell, str]:
    """Cells that are predicted to take too long, with the reason.

    One call takes :data:`OFF` times ``time_s``; or it takes more than ``patience_s``, and more than ``times_exact``
    times as long as the fastest exact method.
    """
    fastest: dict[tuple[str, str], tuple[float, str]] = {}
    for cell, found in forecasts.items():
        if _is_exact(cell):
            task = cell.problem, cell.metric
            fastest[task] = min(fastest.get(task, (found.seconds, cell.method)), (found.seconds, cell.method))
    reasons = {}
    for cell, found in forecasts.items():
        seconds, exact = fastest.get((cell.problem, cell.metric), (found.seconds, cell.method))
        said = f"a call is predicted to take {found.seconds:.2g} s"
        if found.seconds > OFF * limits.time_s:
            reasons[cell] = f"{said}, over limits.time_s ({limits.time_s:g})"
        elif limits.times_exact and found.seconds > max(limits.patience_s, limits.times_exact * seconds):
            times = f"{found.seconds / seconds:.2g} times as long as {exact}, which is exact"
            reasons[cell] = f"{said}, {times} (limits.times_exact: {limits.times_exact:g})"
    return reasons


def summary(config: Config, every: Sequence[Cell], begin: Callable[[str], None]) -> list[str]:
    """Lines on the predicted time of cells, the slowest one, and the one that needs the most memory."""
    with tempfile.TemporaryDirectory(prefix="ntkbench-") as folder:
        found = make(config, every, Path(folder), begin)
    skipped = pruned(found, config.limits) if config.limits.times_exact else {}
    kept = {cell: one for cell, one in found.items() if cell not in skipped}
    if not kept:
        return ["no cell's cost could be predicted"]
    # Each of the two executions of a cell ends at the limit.
    walls = {cell: min(one.wall(cell), 2 * config.limits.time_s) for cell, one in kept.items()}
    slowest, largest = max(walls, key=walls.__getitem__), max(kept, key=lambda cell: kept[cell].bytes or 0)
    lines = [
        f"cells with a prediction: {len(kept)}, about {seconds_label(sum(walls.values()))} in all",
        f"the slowest is {slowest.label}, {seconds_label(walls[slowest])}; the largest is {largest.label}, "
        f"{bytes_label(kept[largest].bytes or 0)}",
    ]
    if skipped:
        lines.append(f"cells that would be skipped as too slow: {len(skipped)}")
    if left := len(every) - len(found):
        lines.append(f"cells without a prediction: {left} (the method does not apply, or the metric is of eigenvalues)")
    return lines


def _is_exact(cell: Cell) -> bool:
    return methods.get(cell.method).kind == "exact"


def _predict(config: Config, some: Sequence[Cell]) -> dict[str, Any]:
    problem = problems.load(some[0].problem)
    costs: dict[str, tuple[float, int | None]] = {}
    for (metric, backend), group in itertools.groupby(sorted(some, key=_task), key=_task):
        own = list(group)
        try:
            target = config.target(backend)
        except Unavailable:  # its rows say so
            continue
        wanted = [(cell.method, cell.passes) for cell in own]
        found = cost.of_budgets(problem, metric, target, wanted)
        each = [(cell, found[cell.method, cell.passes]) for cell in own]
        costs |= {cell.label: (one.seconds, one.bytes) for cell, one in each if one.seconds is not None}
    return {"costs": costs}


def _task(cell: Cell) -> tuple[str, str]:
    return cell.metric, cell.backend
