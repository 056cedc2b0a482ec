"""The plan of the pipeline's suite: the cells of one shard of a run."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ntkbench import paths
from ntkbench.measure.cells import Cell
from ntkbench.measure.config import Config
from ntkbench.measure.limits import Limits

VARIABLE = "NTKBENCH_PLAN"
IMPORTED = "the suite is imported"
"""What the suite prints at its end in asv's fork server, whose answer does not say whether the import failed."""


@dataclass(frozen=True)
class Plan:
    """Cells, the settings they are measured with, and the folder for results that asv does not keep.

    Attributes:
        config: the configuration.
        cells: in the order of asv's cases.
        exact: exact values of each problem's metrics; the values of missing problems are looked up.
        records: folder of the run's records.
        contents: hashes of the weights and inputs that the exact values belong to, by problem.
    """

    config: Config
    cells: list[Cell]
    exact: dict[str, dict[str, float]]
    records: Path
    contents: dict[str, str] = field(default_factory=dict)

    @classmethod
    def current(cls) -> Plan:
        """The plan that ``$NTKBENCH_PLAN`` points to."""
        written = json.loads(Path(os.environ[VARIABLE]).read_text(encoding="utf-8"))
        # Only the settings, already checked: checking the grid again would import every plug-in that it names.
        limits = Limits(**written["settings"].pop("limits"))
        config = Config.model_construct(**written["settings"], limits=limits)
        made = [Cell(**cell) for cell in written["cells"]]
        return cls(config, made, written["exact"], Path(written["records"]), written["contents"])

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
            "contents": self.contents,
        }
        paths.write_atomically(file, json.dumps(plan))
