"""The NTK along training: two operators compared by shared probes, and the study and its figure on a tiny network."""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from ntkbench import figures, studies
from ntkbench.data import tasks
from ntkbench.errors import BadInput
from ntkbench.estimators import paired
from ntkbench.metrics import METRICS, from_gram
from ntkbench.networks import recurrent
from ntkbench.operators import torch as autodiff
from ntkbench.options import Target
from ntkbench.problem import Problem, split
from ntkbench.problems.base import training

TINY = {"task": "match_to_sample", "N": 3, "T": 5, "H": 8, "gains": [1.0], "ranks": [8, 2], "networks": 1}
TINY |= {"loss": 0.4, "probes": 40, "threads": 1, "device": "cpu", "dtype": "float64"}
PROVENANCE = {"device": "cpu", "dtype": "float64", "threads": 1, "git_sha": "0123456789", "git_dirty": False}
PROVENANCE |= {"machine": "a laptop"}


def spectrum(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A positive semi-definite matrix, and one as it may be after training: larger and slightly rotated."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((n, n)) * np.arange(1, n + 1) ** -0.7
    b = 1.2 * a + 0.05 * rng.standard_normal((n, n))
    return a @ a.T, b @ b.T


def said(matrices, probes: int, seed: int) -> list[dict[str, paired.Comparison]]:
    u = np.random.default_rng(seed).choice([-1.0, 1.0], (probes, len(matrices[0])))
    common = paired.SharedProbes(u)
    return [{one.quantity: one for one in common.compare(u @ matrix)} for matrix in matrices]


@functools.cache
def draws() -> list[list[dict[str, paired.Comparison]]]:
    """What 200 sets of 60 probes say of the two matrices of size 60."""
    return [said(spectrum(60, 0), 60, seed) for seed in range(200)]


@pytest.mark.parametrize("quantity", METRICS)
def test_ratios_of_shared_probes_are_right_with_calibrated_errors(quantity):
    matrices = spectrum(60, 0)
    first = {"alignment": matrices[:1]}.get(quantity, ())
    exact = [from_gram(*first, m).metric(quantity) for m in matrices]
    values, errors = ([getattr(d[1][quantity], name) for d in draws()] for name in ("value", "standard_error"))
    ratios, ratio_errors = (
        [getattr(d[1][quantity], name) for d in draws()] for name in ("ratio", "ratio_standard_error")
    )
    assert np.mean(values) == pytest.approx(exact[1], rel=0.05)
    assert np.mean(ratios) == pytest.approx(exact[1] / exact[0], rel=0.02)
    for found, error in ((values, errors), (ratios, ratio_errors)):
        assert np.mean(error) == pytest.approx(np.std(found), rel=0.25)
    if quantity != "alignment":  # whose first value is 1 without error
        apart = [np.hypot(*(d[i][quantity].standard_error / exact[i] for i in range(2))) for d in draws()]
        assert np.mean(ratio_errors) < 0.3 * np.mean(apart) * exact[1] / exact[0], "nothing gained by common probes"


def test_an_unchanged_operator_has_a_ratio_of_one_without_error():
    matrix, _ = spectrum(20, 1)
    for one in said((matrix, matrix), 10, 0)[1].values():
        assert one.ratio == pytest.approx(1, abs=1e-12)
        assert one.ratio_standard_error < 1e-12


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return studies.run("training", studies.settings("training", TINY)).assign(**PROVENANCE)


def test_the_study_has_a_row_for_each_step_operator_and_quantity(table):
    assert (table["status"] == "ok").all()
    assert set(table["init"]) == {"gain 1, full rank", "gain 1, rank 2"}
    steps = table.groupby("init")["step"].unique()
    assert all(at[0] == 0 and len(at) > 3 for at in steps)
    assert len(table) == sum(map(len, steps)) * 3 * 4
    assert not table.duplicated(["init", "network", "step", "operator", "quantity"]).any()
    ends = table.groupby("init")["loss"].agg(["first", "last"])
    assert (ends["last"] <= TINY["loss"]).all()
    assert (ends["first"] > TINY["loss"]).all()
    start = table[table["step"] == 0]
    np.testing.assert_allclose(start["ratio"], 1, atol=1e-12)
    np.testing.assert_allclose(start["ratio_standard_error"], 0, atol=1e-12)
    assert set(table["seeds"]) == {1} and set(table["calls"]) == {0}


def test_the_study_is_right_at_both_ends(table):
    """Against an explicit Theta at both ends of the training of the first network, by plain autodiff."""
    module = recurrent.initialised("rnn", tasks.channels(TINY["task"]), 8, gain=1.0, rank=8)
    course = training.course(
        module,
        tasks.trials(TINY["task"], training.TRIALS, 5, seed=1),
        loss=0.4,
        optimizer="sgd",
        learning_rate=0.05,
    )
    part, seen = recurrent.part(module, "state", "all"), tasks.trials(TINY["task"], 3, 5)
    target = Target("torch", "float64", "cpu")

    def rows_of_j() -> np.ndarray:
        weights = {key: w.detach().float().numpy().copy() for key, w in module.named_parameters()}
        j = autodiff.linearise(Problem("end", part, seen.inputs, split(part, weights)[0]), "theta_0", target)
        return np.asarray(j.vjp(j.basis(0, j.n)))

    at_start = rows_of_j()
    *_, (last, _) = course
    at_end = rows_of_j()
    rows = table[(table["init"] == "gain 1, full rank") & (table["operator"] == "Theta")]
    for step, J in ((0, at_start), (last, at_end)):
        exact = from_gram(at_start @ at_start.T, J @ J.T), from_gram(J @ J.T)
        assert (rows["step"] == step).sum() == 4
        for _, row in rows[rows["step"] == step].iterrows():
            truth = exact[row["quantity"] != "alignment"].metric(row["quantity"])
            assert abs(row["value"] - truth) < 5 * row["standard_error"] + 1e-9


def test_a_network_that_does_not_train_is_a_failed_row():
    given = TINY | {"ranks": [8], "loss": 1e-9, "steps": 2}
    (row,) = studies.run("training", studies.settings("training", given)).to_dict("records")
    assert row["status"] == "failed"
    assert "DidNotTrain: training did not reach a loss of 1e-09" in row["reason"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"ranks": [9]}, r"ranks: 9 is more than H \(8\)"),
        ({"T": 4}, "T of at least 5"),
        ({"parameters": "readout"}, "needs read: outputs"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused_before_training(wrong, says):
    with pytest.raises(ValidationError, match=says):
        studies.settings("training", TINY | wrong)


def test_networks_that_cannot_be_made_or_trained_are_rows_and_the_others_are_measured(monkeypatch):
    """One network cannot be made, one ends the process while it trains, one is fine."""
    make, train = recurrent.initialised, training.course

    def network(*args, rank, **kwargs):
        if rank == 1:
            raise BadInput("no such network")
        return make(*args, rank=rank, **kwargs)

    def course(module, *args, **kwargs):
        if np.linalg.matrix_rank(module.weight_hh.detach().numpy()) == 2:
            raise SystemExit(3)
        return train(module, *args, **kwargs)

    monkeypatch.setattr(recurrent, "initialised", network)
    monkeypatch.setattr(training, "course", course)
    table = studies.run("training", studies.settings("training", TINY | {"ranks": [1, 2, 8]}))
    lost = table[table["status"] != "ok"].set_index("init")
    assert lost["status"].to_dict() == {"gain 1, rank 1": "failed", "gain 1, rank 2": "failed"}
    assert lost["reason"].tolist() == ["BadInput: no such network", "SystemExit: 3"]
    assert set(table.loc[table["status"] == "ok", "init"]) == {"gain 1, full rank"}


def test_the_figure_shows_the_values_of_the_study(table, tmp_path):
    made = figures.draw("along_training", table, tmp_path)
    assert [path.suffix for path in made] == [".csv", ".txt", ".png", ".pdf"]
    plotted = pd.read_csv(made[0])
    shown = table[table["quantity"] != "trace"].reset_index(drop=True)
    np.testing.assert_allclose(plotted["value"], shown["value"], rtol=1e-12)
    np.testing.assert_allclose(
        plotted["bar"] / plotted["value"], shown["ratio_standard_error"] / shown["ratio"], rtol=1e-9, atol=1e-15
    )
    assert "along training" in made[1].read_text()
    untrained = table.head(1).assign(status="failed", reason="DidNotTrain: no", value=np.nan)
    assert (
        "Nothing to show: 1 failed: DidNotTrain: no"
        in figures.draw("along_training", untrained, tmp_path / "none")[1].read_text()
    )
