"""``python -m ntkbench`` is the ``ntkbench`` command."""

from __future__ import annotations

from ntkbench import errors


def main() -> None:
    """Run the command, after a check for the packages that only the command needs."""
    with errors.as_one_line():
        for module in ("click", "pandas", "pydantic", "yaml"):
            errors.need(module, "the ntkbench command", "'.[pipeline]' (in ntkbench's checkout)")
        from ntkbench import cli

    cli.main(prog_name="ntkbench")


if __name__ == "__main__":
    main()
