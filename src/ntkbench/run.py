"""A run for the pipeline: its folders, its steps, the tables behind its figures, and the resources of each step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from ntkbench import figures, paths, studies
from ntkbench.data.files import DataFile
from ntkbench.measure import cells, fingerprints, outcomes, timings
from ntkbench.measure.config import Config
from ntkbench.measure.limits import Limits

ASPECTS = 2
"""Executions of a cell, each within the limits."""
BESIDE_MB = 2048
"""MiB of a step's processes other than the one that measures."""
BEGIN_S = 600
"""Seconds that a job takes before and after it measures."""


class Needs(NamedTuple):
    """Resources that a step requests from a scheduler, by the names of Snakemake's standard resources.

    Attributes:
        threads: processors.
        mem_mb: MiB of memory.
        runtime: minutes.
        gpu: number of GPUs.
        timer: 2 for a step that needs its machine to itself, else 1.
    """

    threads: int
    mem_mb: int
    runtime: int
    gpu: int
    timer: int


class Run:
    """The run of a configuration.

    Attributes:
        config: the configuration.
        results: the folder that the run writes to.
        tables: the folder with the tables that figures are drawn from.
        cells: cells of the grid.
        problems: labels of the grid's problems.
        shards: numbers of the shards that have cells.
        figures: the table that each figure is drawn from.
        made_for: fingerprints of the measurements.
    """

    def __init__(self, config: Config) -> None:
        """Does not write anything.

        Raises:
            BadInput: the results folder cannot be used, or no tables of the profile are committed.
        """
        self.config = config
        self.results = Path("results") / config.folder
        paths.check_folder(self.results)
        self.tables = config.tables(self.results)
        self.cells = cells.cells(config)
        self.problems = sorted({cell.problem for cell in self.cells})
        self.shards = [number for number in range(config.shards) if cells.of_shard(config, number)]
        self.figures = {name: file for name in figures.names() if (file := self._table_of(name))}
        self.made_for = fingerprints.Run(config, self.cells)

    @property
    def measured(self) -> list[Path]:
        """The tables of a complete run."""
        chosen = [f"studies/{study}.csv" for study in self.config.studies] if self.config.source == "measured" else []
        return [self.tables / name for name in (["table.csv"] if self.cells else []) + chosen]

    @property
    def reported(self) -> list[Path]:
        """The tables that the report is made from: those of its figures, and all others that were measured."""
        measured = self.measured if self.config.source == "measured" else []
        return sorted({*self.figures.values(), *measured})

    @property
    def of_papers(self) -> dict[str, Path]:
        """The :attr:`figures` that are drawn from studies, which include those of the papers."""
        return {name: file for name, file in self.figures.items() if file.name != "table.csv"}

    def expected(self) -> dict[str, float]:
        """Expected seconds of the steps whose outputs are missing; other steps count once they begin."""
        steps = {"problems": "problems.json", "draw": "report.html"}
        steps |= {f"shard-{number}": f"shards/shard-{number}.csv" for number in self.shards}
        steps |= {f"study-{study}": f"studies/{study}.csv" for study in self.config.studies}
        left = [step for step, output in steps.items() if not (self.results / output).exists()]
        return timings.expected(self.results, self.config.profile, left)

    def may_change(self, *, study: str | None = None, number: int | str | None = None) -> bool:
        """Whether another attempt may change what a step wrote: a row or a problem failed, or data were missing.

        Args:
            study, number: the step, as in :meth:`needs`.
        """
        data: set[DataFile] = set()
        if study:
            output, data = f"studies/{study}.csv", fingerprints.study_data(self.config, study)
        elif number is not None:
            output = f"shards/shard-{number}.csv"
        else:
            output, data = "problems.json", data.union(*map(fingerprints.data_files, self.problems))
        return any(file.here() is None for file in data) or outcomes.may_change(self.results / output)

    def needs(self, *, study: str | None = None, number: int | str | None = None) -> Needs:
        """Resources of a step by the configuration's limits: a study, a shard of the grid, or the grid's problems.

        Args:
            study: name of a study.
            number: number of a shard.
        """
        settings = self.config.study(study) if study else self.config
        timed = studies.is_timed(study) if study else number is not None
        threads = settings.threads if timed or not study else 1
        memory = math.ceil(settings.limits.memory_mb) + BESIDE_MB
        seconds = min(self._seconds(settings.limits, study, number), 3600 * self.config.job_h)
        return Needs(threads, memory, math.ceil(seconds / 60), int(settings.device == "cuda"), 2 if timed else 1)

    def _seconds(self, limits: Limits, study: str | None, number: int | str | None) -> float:
        if study:
            return math.inf  # the number of rows is not known
        if number is None:
            return BEGIN_S + len(self.problems) * limits.problem_s
        return BEGIN_S + len(cells.of_shard(self.config, int(number))) * ASPECTS * limits.time_s

    def _table_of(self, figure: str) -> Path | None:
        """The table that a figure of this run is drawn from; ``None`` if there is none, or none is committed."""
        study = figures.study_of(figure)
        if not (study in self.config.studies if study else self.cells):
            return None
        file = self.tables / (f"studies/{study}.csv" if study else "table.csv")
        return file if self.config.source == "measured" or file.exists() else None
