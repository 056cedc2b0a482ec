"""The ``ntkbench`` command: bad usage is one line, and networks of users are measured."""

import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from ntkbench import paths
from ntkbench.cli import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "nowhere.yaml"], "File 'nowhere.yaml' does not exist"),
        (["check", "."], "File '.' is a directory"),
        (["chek", "x"], "No such command 'chek'. (Did you mean"),
        (["table"], "Missing argument 'SHARDS...'"),
        (["timings", "nowhere"], "Directory 'nowhere' does not exist"),
        (["measure-shard", "--shard", "-1"], "-1 is not in the range x>=0"),
        (["compare-commits"], "Missing argument 'BASE'"),
        (["compare-commits", "no_such_commit"], "'no_such_commit' is not a commit of"),
        (["compare-commits", "HEAD", "--cases", "("], "'(' is not a regular expression"),
        (["compare-commits", "HEAD", "--cases", "no_such_case"], "no case has a name that matches"),
        (["recommend"], "Missing argument 'MODULE:FUNCTION'"),
        (["recommend", "a:b", "--metric", "rank"], "'rank' is not one of 'trace', 'norm'"),
        (["recommend", "a:b", "--memory", "0"], "0 is not in the range x>=1"),
        (["measure", "a:b", "--passes", "many"], "'many' is not a valid integer"),
    ],
)
def test_bad_usage_is_one_line(arguments, said):
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 2 and found.stdout == ""
    assert found.stderr.startswith("ntkbench: ") and said in found.stderr and found.stderr.count("\n") == 1


WRITE = {
    (name, option.opts[0])
    for name, command in main.commands.items()
    for option in command.params
    if isinstance(option, click.Option) and isinstance(option.type, click.Path) and not option.type.exists
} - {("pending", "--results")}
"""Commands, and their options for output files and folders."""


@pytest.mark.parametrize("where", ["new", "deeper/new"])
@pytest.mark.parametrize(("name", "option"), sorted(WRITE))
def test_a_path_that_cannot_be_written_is_refused_before_anything_else(tmp_path, name, option, where):
    assert {("compare", "--output"), ("draw", "--figures"), ("measure-shard", "--log"), ("study", "--output")} <= WRITE
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    path = tmp_path / "file" / where
    found = CliRunner().invoke(main, [name, option, str(path)])
    assert found.exit_code == 2 and found.stdout == ""
    assert found.stderr.startswith("ntkbench: ") and found.stderr.count("\n") == 1
    assert f"{path} cannot be written: Not a directory: {tmp_path / 'file'}" in found.stderr


def test_a_check_of_a_path_leaves_nothing_behind(tmp_path):
    paths.check_output(tmp_path / "deeper" / "new")
    paths.check_output(tmp_path / "deeper", folder=True)
    assert list(tmp_path.iterdir()) == []


def test_help_is_not_an_error():
    assert CliRunner().invoke(main, ["--help"]).exit_code == 0
    assert "Commands:" in CliRunner().invoke(main, []).stderr


def test_help_says_that_skipped_cells_are_predicted_again():
    said = " ".join(CliRunner().invoke(main, ["pending", "--help"]).stdout.split())
    assert "include cells that were skipped as too slow, which each run predicts again" in said


NETWORKS = """
import torch
from torch import nn

torch.manual_seed(0)
x = torch.randn(6, 3)
before, after = nn.Linear(3, 2), nn.Linear(3, 2)
def make(): return before, x
def trained(): return after, x
def called(): return before, {"x": x}, lambda model, batch: model(batch["x"])
def fails(): raise ZeroDivisionError("of a test")
def leaves(): raise SystemExit(3)
def stops(): raise BaseException("of a test")
async def later(): return before, x
def lazy(): yield before, x
def unknown_inputs(): return before, x * float("nan")
def talks():
    print("from a factory")
    return before, x
def alone(): return before
def four(): return before, x, None, None
def no_call(): return before, x, "call"
def no_model(): return "model", x
value = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a user's networks."""
    made = tmp_path_factory.mktemp("networks")
    (made / "their_networks.py").write_text(NETWORKS)
    (made / "broken_networks.py").write_text("import no_such_package_of_a_test\n")
    (made / "empty_networks.py").write_text("")
    (made / "failing_networks.py").write_text("1 / 0\n")
    return made


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["their_networks"], "a factory is named module:function, such as my_networks:make; got 'their_networks'"),
        (["their networks:make"], "a factory is named module:function"),
        (["nowhere_at_all:make"], "there is no module 'nowhere_at_all' in "),
        (["broken_networks:make"], "cannot be imported: ModuleNotFoundError: No module named 'no_such_package_of_a_"),
        (["failing_networks:make"], "failing_networks cannot be imported: ZeroDivisionError: division by zero"),
        (["their_networks:mak"], "unknown function of their_networks 'mak'"),
        (["empty_networks:make"], "unknown function of empty_networks 'make'; there is none"),
        (["their_networks:value"], "their_networks:value is of type int, not a function"),
        (["their_networks:fails"], "their_networks:fails failed: ZeroDivisionError: of a test"),
        (["their_networks:leaves"], "their_networks:leaves failed: SystemExit: 3"),
        (["their_networks:stops"], "their_networks:stops failed: BaseException: of a test"),
        (["their_networks:later"], "must return (model, inputs) or (model, inputs, call), got coroutine"),
        (["their_networks:lazy"], "must return (model, inputs) or (model, inputs, call), got generator"),
        (["their_networks:unknown_inputs"], "the model returns nan or infinite outputs for these inputs"),
        (["their_networks.py:make"], "by its module, not its file: their_networks:make; got 'their_networks.py:make'"),
        (["./their_networks.py"], "by its module, not its file: their_networks:make; got './their_networks.py'"),
        (["their_networks:alone"], "must return (model, inputs) or (model, inputs, call), got Linear"),
        (["their_networks:four"], "must return (model, inputs) or (model, inputs, call), got tuple of 4"),
        (["their_networks:no_call"], "but its call is of type str"),
        (["their_networks:no_model"], "model must be a torch.nn.Module"),
        (["their_networks:make", "--metric", "alignment"], "the alignment needs a second network: give --other"),
        (
            ["their_networks:make", "--other", "their_networks:trained"],
            "the trace is of one network: omit --other",
        ),
        (["their_networks:make", "--rtol", "2"], "rtol must be a number between 0 and 1"),
        (["their_networks:make", "--device", "cuda:77"], "cuda:77"),
        (["their_networks:make", "--dtype", "float8"], "float8"),
    ],
)
@pytest.mark.parametrize("command", ["recommend", "measure"])
def test_a_bad_factory_is_one_line(here, command, arguments, said):
    found = CliRunner().invoke(main, [command, *arguments])
    assert found.exit_code == 1, found.output
    assert found.output.startswith("ntkbench: ") and said in found.output and found.output.count("\n") == 1


def test_measure_prints_the_estimate_with_its_interval_and_notes(here):
    def run(*arguments):
        found = CliRunner().invoke(main, ["measure", *arguments])
        assert found.exit_code == 0, found.output
        return found.stdout

    exact = run("their_networks:make", "--metric", "norm")
    assert exact.startswith("norm = ") and "certified to" in exact
    assert run("their_networks:called", "--metric", "norm", "--memory", "64").startswith(exact.partition(" (")[0])
    drawn = run("their_networks:make", "--method", "one_sided_reverse", "--passes", "40", "--seed", "1")
    assert "95 % in [" in drawn and "one_sided_reverse, 40 passes" in drawn
    noted = run("their_networks:make", "--method", "hutchinson", "--passes", "20", "--rtol", "0.0001")
    assert "20 passes did not reach rtol=0.0001" in noted
    other = ("--metric", "alignment", "--other", "their_networks:trained", "--dtype", "float64")
    assert run("their_networks:make", *other).startswith("alignment = ")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")
def test_output_that_cannot_be_written_is_one_line(here):
    with open("/dev/full", "w", encoding="utf-8") as full:
        command = [sys.executable, "-m", "ntkbench", "list", "--kind", "approximate"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "ntkbench: OSError: [Errno 28] No space left on device\n"


def test_methods_are_listed_by_any_of_their_metrics():
    found = CliRunner().invoke(main, ["list", "--metric", "largest_eigenvalue"])
    assert found.exit_code == 0 and "block_lanczos" in found.stdout and "hutchinson" not in found.stdout


def test_output_of_a_factory_goes_to_stderr(here):
    found = CliRunner().invoke(main, ["measure", "their_networks:talks"])
    assert found.stdout.startswith("trace = ") and found.stderr == "from a factory\n"


def test_recommend_says_if_rounding_exceeds_the_tolerance(here):
    found = CliRunner().invoke(main, ["recommend", "their_networks:make", "--rtol", "1e-30", "--dtype", "float64"])
    assert "\nrounding may exceed rtol=1e-30: no precision is as accurate\n" in found.stdout
    found = CliRunner().invoke(main, ["recommend", "their_networks:make", "--rtol", "1e-9"])
    assert "\nrounding may exceed rtol=1e-09: choose dtype='float64'\n" in found.stdout


def test_recommend_prints_a_table_and_the_line_to_run(here):
    import their_networks

    import ntkbench

    more = ["--rtol", "0.2", "--dtype", "float64"]
    found = CliRunner().invoke(main, ["recommend", "their_networks:called", *more])
    assert found.exit_code == 0, found.output
    table, _, line = found.stdout.strip().rpartition("\n")
    assert table.startswith("method ") and "effective rank" in table
    assert "hutchinson" in table and "the network declares no recurrence" in table
    model, inputs, call = their_networks.called()
    value = eval(line, {"ntkbench": ntkbench, "model": model, "inputs": inputs, "call": call})
    assert abs(value - ntkbench.trace(model, inputs, call=call, dtype="float64")) < 0.4 * value


def commands(group, name):
    """A group and all its commands by name, those of nested groups included."""
    yield name, group
    for each, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{name} {each}")


@pytest.mark.parametrize("name", dict(commands(main, "ntkbench")))
def test_every_option_and_argument_has_a_help_text(name):
    command = dict(commands(main, "ntkbench"))[name]
    assert command.help
    shown = " ".join(command.help.split())
    for given in command.params:
        if isinstance(given, click.Option):
            assert given.help, given.opts
        else:  # Click documents arguments only in the help of the command
            said = (given.metavar or given.name.upper()).strip("[].")
            assert said in shown, f"the help of {name} does not say what {said} is"


def test_help_has_examples_with_networks():
    for name in ("recommend", "measure", "compare"):
        assert f"ntkbench {name} my_networks:make" in CliRunner().invoke(main, [name, "--help"]).stdout
    shown = CliRunner().invoke(main, ["--help"]).stdout
    assert "ntkbench recommend my_networks:make" in shown and "study-rows" not in shown
