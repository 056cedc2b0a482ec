"""Which cells this run of the suite measures: the pipeline's, or the small fixed grid of asv's own history."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ntkbench import paths
from ntkbench.measure import grid
from ntkbench.measure.grid import Config

HISTORY = paths.ROOT / "config" / "history.yaml"
VARIABLE = "NTKBENCH_PLAN"


@dataclass(frozen=True)
class Plan:
    """What the suite measures and where its records go."""

    config: Config
    labels: list[str]
    records: Path

    @classmethod
    def current(cls) -> Plan:
        """The plan that ``$NTKBENCH_PLAN`` points to, else the history's."""
        if file := os.environ.get(VARIABLE):
            written = json.loads(Path(file).read_text())
            return cls(Config.check(written["config"], file), written["labels"], Path(written["records"]))
        config = Config.read(HISTORY)
        # A folder of this asv run: its processes are children of one server.
        records = Path(tempfile.gettempdir()) / f"ntkbench-history-{os.getppid()}"
        return cls(config, [cell.label for cell in grid.cells(config)], records)

    def write(self, file: Path) -> None:
        """Write the plan where :meth:`current` finds it."""
        plan = {"config": self.config.model_dump(), "labels": self.labels, "records": str(self.records)}
        paths.write_atomically(file, json.dumps(plan))
