"""asv with nothing asked of git or of the home folder: the same run in a clean, a dirty and an exported checkout.

asv saves results of an existing environment only under a commit that its repository confirms, fails where there is no
git, and wants a description of the machine in the home folder. ``python -m benchmarks.asv_standalone FOLDER run ...``
takes asv's own arguments after a folder for that description.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import asv.commands.run
import asv.main
from asv.machine import Machine, MachineCollection
from asv.repo import NoRepository


class Checkout(NoRepository):
    """One commit, the one that was handed in, made now."""

    def get_hash_from_name(self, name: str) -> str:
        return name

    def get_decorated_hash(self, commit: str, length: int = 8) -> str:
        return commit[:length]

    def get_date(self, commit: str) -> int:
        return int(time.time() * 1000)  # asv counts in milliseconds

    def pull(self) -> None:
        pass


def main(folder: Path) -> None:
    """Run asv on the remaining arguments."""
    asv.commands.run.get_repo = lambda conf: Checkout()
    MachineCollection.get_machine_file_path = staticmethod(lambda: str(folder / "asv-machine.json"))
    MachineCollection.save(**_this_machine())
    asv.main.main()


def _this_machine() -> dict:
    defaults = Machine.get_defaults()
    return {"machine_name": defaults["machine"], "machine_info": defaults}


if __name__ == "__main__":
    main(Path(sys.argv.pop(1)))
