"""What the asv suite measures: the cells of one shard of the pipeline, or the small fixed grid of asv's own history."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ntkbench import paths
from ntkbench.measure import cells
from ntkbench.measure.cells import Cell
from ntkbench.measure.config import Config
from ntkbench.measure.limits import Limits

HISTORY = paths.ROOT / "config" / "history.yaml"
VARIABLE = "NTKBENCH_PLAN"


@dataclass(frozen=True)
class Plan:
    """Cells, the settings they are measured with, and the folder for what asv does not keep.

    Attributes:
        config: the configuration.
        cells: in the order of asv's cases.
        exact: exact values of each problem's metrics; a problem that is not there has its values looked up.
        records: folder of a run's records; ``None`` where asv alone is asked, which keeps what it measures.
    """

    config: Config
    cells: list[Cell]
    exact: dict[str, dict[str, float]] = field(default_factory=dict)
    records: Path | None = None

    @classmethod
    def current(cls) -> Plan:
        """The plan that ``$NTKBENCH_PLAN`` points to, else the history's."""
        if file := os.environ.get(VARIABLE):
            written = json.loads(Path(file).read_text(encoding="utf-8"))
            # Settings alone, checked before: checking a grid again would import every plug-in that it names.
            limits = Limits(**written["settings"].pop("limits"))
            config = Config.model_construct(**written["settings"], limits=limits)
            made = [Cell(**cell) for cell in written["cells"]]
            return cls(config, made, written["exact"], Path(written["records"]))
        config = Config.read(HISTORY)
        return cls(config, cells.cells(config))

    @property
    def labels(self) -> list[str]:
        """asv's names of the cases."""
        return [cell.label for cell in self.cells]

    def write(self, file: Path) -> None:
        """Write the plan where :meth:`current` finds it."""
        plan = {
            "settings": self.config.model_dump(mode="json", exclude={"grid", "studies"}),
            "cells": [asdict(cell) for cell in self.cells],
            "exact": self.exact,
            "records": str(self.records),
        }
        paths.write_atomically(file, json.dumps(plan))
