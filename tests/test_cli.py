"""The ``ntkbench`` command: bad usage is one line."""

import pytest
from click.testing import CliRunner

from ntkbench.cli import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "nowhere.yaml"], "File 'nowhere.yaml' does not exist"),
        (["check", "."], "File '.' is a directory"),
        (["chek", "x"], "No such command 'chek'. (Did you mean"),
        (["table"], "Missing argument 'SHARDS...'"),
        (["timings", "nowhere"], "Directory 'nowhere' does not exist"),
        (["measure", "--shard", "-1"], "-1 is not in the range x>=0"),
        (["compare"], "Missing argument 'BASE'"),
        (["compare", "no_such_commit"], "'no_such_commit' is no commit of"),
        (["compare", "HEAD", "--cases", "("], "'(' is no regular expression"),
        (["compare", "HEAD", "--cases", "no_such_case"], "found in the name of no case"),
    ],
)
def test_bad_usage_is_one_line(arguments, said):
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 2 and found.stdout == ""
    assert found.stderr.startswith("ntkbench: ") and said in found.stderr and found.stderr.count("\n") == 1


def test_help_is_no_error():
    assert CliRunner().invoke(main, ["--help"]).exit_code == 0
    assert "Commands:" in CliRunner().invoke(main, []).stderr
