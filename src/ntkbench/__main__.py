"""``python -m ntkbench`` is the ``ntkbench`` command."""

from ntkbench.cli import main

main(prog_name="ntkbench")
