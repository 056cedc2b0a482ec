"""Cells of the grid: what is measured, and what is left out and why."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ntkbench import methods
from ntkbench.errors import OverMemory, Unavailable
from ntkbench.measure.config import Config
from ntkbench.metrics import METRICS, OF_KERNEL
from ntkbench.problem import Problem


@dataclass(frozen=True)
class Cell:
    """One measurement, and one row of the table."""

    problem: str
    method: str
    backend: str
    metric: str
    passes: int | None
    seeds: int = 1
    calls: int = 1

    @property
    def label(self) -> str:
        """``problem/method/backend/metric[/passes]``: the cell's name in asv and in the records."""
        return "/".join(
            str(part) for part in (self.problem, self.method, self.backend, self.metric, self.passes) if part
        )


def cells(config: Config) -> list[Cell]:
    """All cells of a configuration, each once, sorted by method, problem, metric and budget.

    Where blocks overlap, the first block defines the cell.
    """
    found: dict[str, Cell] = {}
    for block in config.grid:
        seeds, calls = block.seeds or config.seeds, block.calls or config.calls
        for problem, name, metric in itertools.product(block.problems, block.methods, block.metrics):
            method = methods.get(name)
            # A metric that a method never gives has no cell; one that it cannot give *here* has a row with the reason.
            if metric not in method.given:
                continue
            for backend in method.backends[: 1 if block.backends == "plain" else None]:
                for passes in block.passes if method.takes_passes else [None]:
                    cell = Cell(problem, name, backend, metric, passes, seeds if method.takes_seed else 1, calls)
                    found.setdefault(cell.label, cell)
    order = {metric: i for i, metric in enumerate((*METRICS, *OF_KERNEL))}
    return sorted(found.values(), key=lambda c: (c.method, c.backend, c.problem, order[c.metric], c.passes or 0))


def unsupported(cell: Cell, problem: Problem, config: Config) -> str | None:
    """The reason to skip a cell, if one is known before it runs; ``None`` if the cell is measured."""
    method, target = methods.get(cell.method), config.target(cell.backend)
    reason = method.unsupported_reason(problem, cell.metric, target, cell.passes) or method.unscored_reason(problem)
    if reason:
        return reason
    try:
        if cell.passes is None:
            config.limits.check_passes(method.passes_needed(problem, cell.metric, target))
        config.limits.check_memory(method.bytes_needed(problem, cell.metric, target, cell.passes))
    except (Unavailable, OverMemory) as error:
        return str(error)
    return None


def of_shard(config: Config, number: int) -> list[Cell]:
    """The cells of one shard; pairs of a problem and a method are assigned to the shards in turn."""
    every = cells(config)
    pairs = sorted({(cell.problem, cell.method) for cell in every})
    mine = set(pairs[number :: config.shards])
    return [cell for cell in every if (cell.problem, cell.method) in mine]
