"""Methods side by side on a user's network: values, errors, costs, and reasons where there is no value."""

import csv
import dataclasses
import io
import re

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import ntkbench
from ntkbench import BadInput, trials
from ntkbench.cli import main
from ntkbench.estimate import Estimate
from ntkbench.figures.plotting import comparison
from ntkbench.trials import Trial, Trials

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def test_methods_are_measured_side_by_side():
    found = ntkbench.compare(network(), X, metric="norm", passes=12, calls=3)
    by_name = {one.method: one for one in found}
    exact = ntkbench.norm(network(), X).value
    assert {"auto", "structured_derivatives", "hutchpp", "sum_of_logits"} <= set(by_name)
    right = by_name["structured_derivatives"]
    assert right.value == pytest.approx(exact) and right.low < exact < right.high and right.error < 1e-12
    rough = by_name["hutchinson"]
    assert rough.kind == "stochastic" and rough.calls == 3 and rough.passes <= 12 and rough.error > 1e-4
    assert rough.low < rough.value < rough.high and 0 < rough.seconds_q25 <= rough.seconds <= rough.seconds_q75
    biased = by_name["sum_of_logits"]
    assert biased.kind == "approximate" and biased.low is None
    assert biased.error == pytest.approx(abs(biased.value / exact - 1))
    assert by_name["auto"].by in by_name
    refused = by_name["hutchpp"]
    assert refused.value is None and "passes" in refused.reason  # three traces take more than these
    assert found[-1].reason and "hutchpp" in repr(found) and refused.reason in repr(found)


def test_errors_are_those_of_all_calls_and_calls_take_turns():
    asked = []

    def giving(name, values):
        def give(seed):
            asked.append((name, seed))
            return Estimate(values[seed], 0.1, 4, "hutchinson", (), "trace")

        return give

    ways = {"right": ("exact", giving("right", [2.0] * 3)), "rough": ("stochastic", giving("rough", [2.2, 1.6, 2.0]))}
    found = trials.run(ways, "trace", 2)
    untimed = [("right", 0), ("rough", 0), ("rough", 1), ("rough", 2)]  # an exact method takes no probes
    assert asked == [*untimed, *((name, seed) for seed in (1, 2) for name in ("right", "rough"))]
    errors = {one.method: one.error for one in found}
    assert errors["right"] == 0 and errors["rough"] == pytest.approx(((0.1**2 + 0.2**2) / 3) ** 0.5)
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert [row["metric"] for row in rows] == ["trace"] * 2 and {row["calls"] for row in rows} == {"2"}
    assert not any(one.error for one in trials.run({"rough": ways["rough"]}, "trace", 1)), "nothing to compare with"


@pytest.mark.parametrize("kind", ["stochastic", ""])
def test_programs_that_methods_share_are_traced_before_their_calls_are_timed(monkeypatch, kind):
    """Each seed takes another number of probes, whose program takes ten times as long as a call to trace."""
    clock, traced = [0.0], set()

    def ask(seed):
        clock[0] += 1 if seed in traced else 11
        traced.add(seed)
        return Estimate(2.0, 0.1, 4, "hutchinson", (), "trace")

    monkeypatch.setattr(trials.time, "perf_counter", lambda: clock[0])
    found = trials.run({"first": (kind, ask), "second": (kind, ask)}, "trace", 3)
    assert [(one.seconds, one.calls) for one in found] == [(1, 3), (1, 3)]


def test_stochastic_methods_have_one_budget_or_one_tolerance():
    names = ["hutchinson", "gram_reverse", "hutchpp"]
    budgets = ntkbench.compare(network(), X, metric="norm", methods=names, calls=1)
    assert all(one.passes <= trials.PASSES for one in budgets if not one.reason)
    told = {one.method: one for one in ntkbench.compare(network(), X, metric="norm", methods=names, rtol=0.3, calls=1)}
    assert "takes no rtol" in told["hutchpp"].reason and told["hutchinson"].value is not None


def test_a_method_that_fails_later_is_reported_and_the_others_are_kept():
    def failing(seed):
        if seed:
            raise ValueError("only once")
        return Estimate(1.0, 0.1, 4, "hutchinson", (), "trace")

    fine = ("exact", lambda seed: Estimate(1.0, None, 4, "direct", (), "trace"))
    found = trials.run({"failing": ("stochastic", failing), "fine": fine}, "trace", 2)
    assert [(one.method, one.calls) for one in found] == [("fine", 2), ("failing", 0)]
    assert "only once" in found[1].reason


def test_the_alignment_of_two_networks_and_groups_of_parameters():
    other = network()
    with torch.no_grad():
        other[0].weight.mul_(1.5)
    found = ntkbench.compare(network(), X, other, metric="alignment", methods=["auto"], calls=1)
    assert found[0].value == pytest.approx(ntkbench.alignment(network(), other, X).value)
    groups = ntkbench.compare(network(), X, methods=["auto"], calls=1, parameters={"first": "0.*"})
    assert groups["first"][0].value == pytest.approx(ntkbench.trace(network(), X, parameters="0.*").value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"metric": "rank"}, "unknown metric"),
        ({"metric": "alignment"}, "give other"),
        ({"methods": ["hutchqq"]}, "hutchqq"),
        ({"methods": "auto"}, "must be a list of names"),
        ({"methods": []}, "must be a list of names"),
        ({"calls": 0}, "calls must be a positive whole number"),
        ({"passes": 0}, "passes"),
        ({"speed": 1}, "speed"),
    ],
)
def test_bad_input_is_refused(more, said):
    with pytest.raises(BadInput, match=said):
        ntkbench.compare(network(), X, **more)


def test_the_command_prints_a_table_and_writes_all_numbers(tmp_path, monkeypatch):
    (tmp_path / "of_trials.py").write_text(
        "import torch\n\ndef make():\n    return torch.nn.Linear(3, 2), torch.ones(4, 3)\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    given = ["compare", "of_trials:make", "--method", "structured_derivatives", "--calls", "1", "--output", "out.csv"]
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 0, done.output
    assert "structured_derivatives" in done.output
    (row,) = csv.DictReader((tmp_path / "out.csv").open(encoding="utf-8"))
    assert float(row["value"]) == 32.0 and row["reason"] == ""
    lost = CliRunner().invoke(main, [*given[:-1], "of_trials.py/out.csv"])
    assert lost.exit_code == 2 and "structured_derivatives" not in lost.output, "nothing is measured for nothing"
    refused = CliRunner().invoke(main, ["compare", "of_trials:make", "--method", "hutchqq"])
    assert refused.exit_code == 1 and len(refused.output.splitlines()) == 1 and "hutchqq" in refused.output


def test_the_command_writes_a_page_that_needs_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "of_pages.py").write_text(
        "import torch\n\ndef make():\n    return torch.nn.Linear(3, 2), torch.ones(4, 3)\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    chosen = ("--method", "structured_derivatives", "--method", "hutchinson", "--method", "hutchpp", "--passes", "4")
    done = CliRunner().invoke(main, ["compare", "of_pages:make", *chosen, "--calls", "2", "--report", "page.html"])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "ntkbench: methods for the trace of of_pages:make" in page and "2 of 3 methods gave a value" in page
    assert 'src="data:image/png;base64,' in page and not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    for said in (
        "hutchinson",
        "takes at least 12 passes",
        "<td>32</td>",
        "Linear, 8 parameters",
        "at most 4 passes",
        "torch 2",
    ):
        assert said in page, said
    lost = CliRunner().invoke(main, ["compare", "of_pages:make", "--report", "of_pages.py/page.html"])
    assert lost.exit_code == 2 and "hutchinson" not in lost.output, "nothing is measured for nothing"


RIGHT = Trial("direct", "direct", "exact", 2.0, 2.0, 2.0, 8, 0.1, 0.1, 0.2, 3, 0.0)
ROUGH = Trial("hutchinson", "hutchinson", "stochastic", 2.1, 1.9, 2.3, 8, 0.01, 0.01, 0.02, 3, 0.05)
BIASED = Trial("kfac", "kfac", "approximate", 1.0, None, None, 8, 0.01, 0.01, 0.02, 3, 0.5)


@pytest.mark.parametrize(
    ("given", "label", "heights"),
    [
        ([RIGHT, ROUGH, BIASED], "relative error", [0.05, 0.5, comparison.LEAST]),
        ([dataclasses.replace(one, error=None) for one in (ROUGH, BIASED)], "half of the 95 % interval", [0.2 / 2.1]),
        ([Trial("<b>", reason="no & <i>")], "half of the 95 % interval", []),
    ],
)
def test_the_picture_has_a_dot_for_each_known_error(given, label, heights):
    figure = comparison.picture(Trials(given, "trace"))
    (panel,) = figure.axes
    dots = [line for line in panel.lines if line.get_marker() == "o"]
    assert [float(line.get_ydata()[0]) for line in dots] == pytest.approx(heights)
    assert panel.get_ylabel().startswith(label)
    assert {text.get_text() for text in panel.texts} >= {"hutchinson"} & {one.method for one in given}
    assert "<i>" not in comparison.page(Trials(given, "trace"), "title", {})


def test_the_page_names_the_method_of_the_lowest_median_time():
    page = comparison.page(Trials([RIGHT, ROUGH], "trace"), "title", {})
    assert "2 of 2 methods gave a value. hutchinson has the lowest median time, 10 ms with an error of 5 %." in page
