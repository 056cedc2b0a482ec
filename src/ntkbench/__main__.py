"""``python -m ntkbench`` is the ``ntkbench`` command."""

from __future__ import annotations

from ntkbench import errors


def main() -> None:
    """Check for the packages that only the command needs, then run it."""
    with errors.as_one_line():
        for module in ("click", "pandas", "pydantic", "yaml"):
            errors.need(module, "the ntkbench command", "'.[pipeline]' (in ntkbench's checkout)")
        from ntkbench import cli

    cli.main(prog_name="ntkbench")


if __name__ == "__main__":
    main()
