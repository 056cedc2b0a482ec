"""The NTK of a transformer along its training and by layer: the study on a tiny network, its problem and its figure."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

import ntkbench
from ntkbench import figures, problems, studies
from ntkbench.data import tasks
from ntkbench.errors import Unavailable
from ntkbench.estimators import paired
from ntkbench.figures import language_training as figure
from ntkbench.figures.plotting import base, labels
from ntkbench.metrics import from_gram
from ntkbench.operators import torch as autodiff
from ntkbench.options import Target
from ntkbench.problem import Problem, split
from ntkbench.problems.base import training
from ntkbench.studies import language_training as study

NAME = "language_training"
TINY = {"problems": ["transformer_tiny[N=2,T=3,read=last]"], "steps": [0, 1, 3], "probes": 40}
TINY |= {"threads": 1, "device": "cpu", "dtype": "float64"}
PROVENANCE = {"device": "cpu", "dtype": "float64", "threads": 1, "git_sha": "0123456789", "git_dirty": False}
PROVENANCE |= {"machine": "a laptop"}
PARTS = ["embedding", "block 1, attention", "block 1, MLP", "block 2, attention", "block 2, MLP", "readout"]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return studies.run(NAME, studies.settings(NAME, TINY)).assign(**PROVENANCE)


def jacobian(module: torch.nn.Module, x: np.ndarray) -> dict[str, torch.Tensor]:
    """Columns of J by parameter, in float64."""
    theta = dict(module.double().named_parameters())
    rows = [
        torch.autograd.grad(f, list(theta.values()), retain_graph=True, materialize_grads=True, allow_unused=True)
        for f in module(torch.from_numpy(x)).reshape(-1)
    ]
    return {name: torch.stack([row[i].flatten() for row in rows]) for i, name in enumerate(theta)}


@pytest.mark.slow
def test_every_step_and_part_matches_the_explicit_theta(table):
    """Against an explicit Theta at the weights that the recipe reaches after as many steps."""
    assert (table["status"] == "ok").all(), table["reason"].unique()
    assert list(dict.fromkeys(table["part"])) == [study.WHOLE, *PARTS, *study.FACTORS]
    assert len(table) == 3 * 9 * 4 and not table.duplicated(["step", "part", "metric"]).any()
    definition = problems.define(TINY["problems"][0])
    at, part = {}, definition.part
    for step, loss in definition.training.course(definition.module):
        if step in TINY["steps"]:
            with torch.no_grad():
                for name, w in part.double().named_parameters():
                    w.copy_(definition.module.get_parameter(name))
            at[step] = loss, jacobian(part, definition.x)
    u = autodiff.linearise(problem_of(definition), "theta_0", Target("torch", "float64", "cpu")).rng(0).sign(40, 22)
    for name in (study.WHOLE, *PARTS):
        names = list(at[0][1]) if name == study.WHOLE else study.parts(at[0][1])[name]
        probes = paired.SharedProbes(u)
        for step, (loss, J) in at.items():
            rows = table[(table["step"] == step) & (table["part"] == name)].set_index("metric")
            assert set(rows["loss"]) == {loss} and set(rows["parameters"]) == {sum(J[key].shape[1] for key in names)}
            theta, first = (torch.cat([each[key] for key in names], 1) for each in (J, at[0][1]))
            theta, first = theta @ theta.T, first @ first.T
            for one in probes.compare(u @ theta):
                row = rows.loc[one.quantity]
                assert (row["value"], row["ratio"]) == pytest.approx((one.value, one.ratio), rel=1e-9)
                assert row["ratio_standard_error"] == pytest.approx(one.ratio_standard_error, rel=1e-6, abs=1e-9)
                exact = (from_gram(theta, first) if one.quantity == "alignment" else from_gram(theta)).metric(
                    one.quantity
                )
                assert abs(one.value - exact) < 5 * one.standard_error + 1e-9
                assert row["low"] <= row["value"] <= row["high"]


@pytest.mark.slow
def test_the_factors_are_those_of_the_network_at_each_step(table):
    """Against ``Kernel.factors`` at the weights of a step: K exactly, P P* within twice the width of its interval."""
    definition = problems.define(TINY["problems"][0])
    part, kernels = definition.part, {}
    for step, _ in definition.training.course(definition.module):
        if step in TINY["steps"]:
            with torch.no_grad():
                for name, w in part.double().named_parameters():
                    w.copy_(definition.module.get_parameter(name))
            kernels[step] = copy.deepcopy(part)
    x = torch.from_numpy(definition.x)
    for step, network in kernels.items():
        rows = table[table["step"] == step].set_index(["part", "metric"])
        found = ntkbench.Kernel(network, x, dtype="float64").factors(probes=definition.x.size * 100)
        for metric in ("trace", "norm", "effective_rank"):
            assert rows.loc[("K", metric), "value"] == pytest.approx(found.K[metric].value)
            row = rows.loc[("P", metric)]
            width = max(row["high"] - row["low"], 1e-9 * row["value"])
            assert abs(row["value"] - found.P[metric].value) < 2 * width
    ratio = table[(table["part"] == "K") & (table["step"] == 3)].set_index("metric")
    first = table[(table["part"] == "K") & (table["step"] == 0)].set_index("metric")
    np.testing.assert_allclose(ratio["ratio"], ratio["value"] / first["value"])
    assert (first["ratio"] == 1).all() and first.loc["alignment", "value"] == pytest.approx(1)
    assert 0 < ratio.loc["alignment", "value"] < 1


def test_the_ratios_at_the_first_step_are_known():
    """Estimates of P, too, are compared with themselves there."""
    course = study.Course(studies.settings(NAME, TINY | {"probes": 4}))
    rows = pd.DataFrame(course.look(0))
    factors = rows[rows["part"].isin(study.FACTORS)]
    assert len(factors) == 8 and (factors["ratio"] == 1).all() and (factors["ratio_standard_error"] == 0).all()
    later = pd.DataFrame(course.look(1))
    assert (later.loc[(later["part"] == "P") & (later["metric"] == "trace"), "ratio_standard_error"] > 0).all()


def problem_of(definition) -> Problem:
    network = definition.part
    weights = {name: w.detach().numpy() for name, w in network.named_parameters()}
    return Problem("tiny", network, definition.x, split(network, weights)[0])


@pytest.mark.slow
def test_parts_add_up_and_cover_all_parameters(table):
    traces = table[table["metric"] == "trace"].pivot(index="step", columns="part", values="value")
    np.testing.assert_allclose(traces[PARTS].sum(axis=1), traces[study.WHOLE], rtol=1e-10)
    names = [name for name, _ in problems.define("transformer_tiny").module.named_parameters()]
    assert sorted(itertools.chain(*study.parts(names).values())) == sorted(names)
    assert study.parts(["other.0.weight", "norm.bias"]) == {"other": ["other.0.weight"], "readout": ["norm.bias"]}


def test_steps_beyond_the_recipe_are_failed_rows_with_a_reason():
    given = TINY | {"problems": ["transformer_tiny[N=1,T=2,read=last]"]}
    recipe = problems.define(given["problems"][0]).training
    length = recipe.epochs * -(-len(recipe.x) // recipe.batch)
    given["steps"] = [0, length, length + 1]
    rows = studies.run(NAME, studies.settings(NAME, given)).set_index("step")
    assert set(rows.loc[[0, length], "status"]) == {"ok"}
    assert rows.loc[length + 1, "status"] == "failed"
    assert f"trained for fewer than {length + 1} steps" in rows.loc[length + 1, "reason"]


def test_the_first_problem_with_available_data_is_used(monkeypatch):
    def define(label):
        if label.startswith("transformer_small"):
            raise Unavailable("no text")
        return label

    monkeypatch.setattr(problems, "define", define)
    assert study._first_available(study.Settings().problems) == ("transformer_flipflop[N=16]",) * 2
    with pytest.raises(Unavailable, match="no text"):
        study._first_available(["transformer_small"])


@pytest.mark.parametrize("steps", [[1, 2], [0, 5, 3]])
def test_steps_that_do_not_rise_from_zero_are_refused(steps):
    with pytest.raises(ValidationError, match="must begin with 0 and rise"):
        studies.settings(NAME, TINY | {"steps": steps})


def test_a_problem_that_does_not_exist_is_refused():
    with pytest.raises(ValidationError, match="transformer_tinny"):
        studies.settings(NAME, TINY | {"problems": ["transformer_tinny"]})


def test_tokens_of_the_flipflop_are_its_pulses_and_bits():
    from ntkbench.problems import language

    definition = problems.define("transformer_flipflop[N=2,T=5]")
    trials = tasks.trials("flipflop", 2, 5)
    bits = np.stack([definition.x // 9, definition.x // 3 % 3, definition.x % 3], 2) - 1
    np.testing.assert_array_equal(bits, trials.inputs)
    assert language._as_tokens(trials.targets).max() < 27
    assert definition.module(torch.from_numpy(definition.x)).shape == (2, 5, 27)


def pairs(count):
    return [list(each) for each in itertools.combinations(range(count), 2)]


def test_the_course_of_a_recipe_follows_its_training():
    trained, other = (torch.nn.Linear(2, 1) for _ in range(2))
    other.load_state_dict(trained.state_dict())
    x, y = torch.randn(6, 2), torch.randn(6, 1).double()
    recipe = training.Adam(x, y, torch.nn.functional.mse_loss, batch=2, epochs=2)
    recipe.train(trained)
    seen = list(recipe.course(other))
    assert [step for step, _ in seen] == list(range(7)) and torch.equal(trained.weight, other.float().weight)
    assert seen[0][1] != seen[1][1]
    with torch.no_grad():
        losses = [float(torch.nn.functional.mse_loss(other.double()(x.double()[i]), y[i])) for i in pairs(6)]
    assert any(abs(seen[-1][1] - loss) < 1e-6 for loss in losses), "of the last batch, after the last step"


@pytest.mark.slow
def test_the_figure_shows_the_values_of_the_table(table, tmp_path):
    made = figures.draw(NAME, table, tmp_path)
    caption, plotted = made[1].read_text(), pd.read_csv(made[0])
    np.testing.assert_allclose(plotted["value"], table["value"])
    assert "nan" not in caption
    assert "from 40 probes" in caption
    with base.style():
        drawing = figure.draw(base.checked_study(table, figure.COLUMNS))
    rank = table[(table["step"] == 3) & (table["metric"] == "effective_rank")].set_index("part").loc[study.WHOLE]
    ends = [rank["ratio"] + sign * 1.96 * rank["ratio_standard_error"] for sign in (0, -1, 1)]
    assert drawing.figure.texts[0].get_text().endswith(f"rank {labels.interval_label(*ends)} times as large")
    lost = table.assign(status="failed", reason="$x$ broke", value=np.nan)
    for rows in (table.iloc[:0], lost):
        assert "Nothing to show" in figures.draw(NAME, rows, tmp_path)[1].read_text()
