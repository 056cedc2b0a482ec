"""Variance removed with cross-sample terms: ratios computed from Theta, the study along training, and its figure."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from ntkbench import figures, methods, studies
from ntkbench.estimate import Estimate
from ntkbench.figures import cross_sample_share as figure
from ntkbench.networks import initialisation
from ntkbench.studies import cross_sample_share as study
from ntkbench.studies.base import digit_networks, pntk

NAME = "cross_sample_share"
TINY = {"networks": ["mlp", "transformer"], "inits": 2, "images": 3, "steps": [0, 2, 8], "rate": 0.05, "seeds": 200}
TINY |= {"passes": 2, "threads": 1, "device": "cpu"}
PROVENANCE = {"device": "cpu", "dtype": "float32", "threads": 1, "git_sha": "0123456789", "git_dirty": False}
PROVENANCE |= {"machine": "a laptop"}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return studies.run(NAME, studies.settings(NAME, TINY)).assign(**PROVENANCE)


def test_the_factor_is_one_for_orthogonal_samples_and_largest_for_equal_ones():
    block = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    apart = torch.einsum("ac,op->aocp", torch.eye(5).double(), block)
    found = study.shares(apart)
    assert (found["N"], found["O"], found["factor"], found["norm_ratio"]) == (5, 2, 1, 1)
    assert found["effective_rank"] == pytest.approx(5 * 25 / 15) and found["block_rank"] == pytest.approx(25 / 15)
    same = study.shares(torch.einsum("ac,op->aocp", torch.ones(5, 5).double(), block))
    assert same["norm_ratio"] == pytest.approx(5) and same["factor"] == pytest.approx((25 * 15 - 65) / (5 * 15 - 65))
    one = study.shares(torch.ones(5, 1, 5, 1).double())
    assert one["factor"] == math.inf and one["norm_ratio"] == pytest.approx(5)


def test_the_factor_is_the_ratio_of_variances_over_all_vectors_of_signs():
    root = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = root @ root.T
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 6)
    own = theta * torch.block_diag(*[torch.ones(2, 2)] * 3)
    pooled, per_sample = (torch.einsum("si,ij,sj->s", signs, part, signs).var(correction=0) for part in (theta, own))
    found = study.shares(theta.reshape(3, 2, 3, 2))
    assert found["factor"] == pytest.approx(float(pooled / per_sample))
    assert 1 < found["norm_ratio"] < found["factor"]


def test_intervals_of_ratios_of_variances_cover_for_several_distributions():
    rng = np.random.default_rng(0)
    for draw, variance in ((rng.standard_normal, 1.0), (rng.standard_exponential, 1.0), (rng.random, 1 / 12)):
        covered = 0
        for _ in range(300):
            _, low, high = study.ratio_of_variances(2 * draw(200), draw(200))
            covered += low <= 4 <= high
        assert 0.88 <= covered / 300 <= 0.99, variance
    ratio, low, high = study.ratio_of_variances(rng.standard_normal(10**5), 3 * rng.standard_normal(10**5))
    assert ratio == pytest.approx(1 / 9, rel=0.03) and high / low < 1.05


@pytest.mark.parametrize("equal", [np.full(9, 0.1), np.full(9, 0.1) * (1 + 1e-15 * np.arange(9))])
def test_the_ratio_to_estimates_that_do_not_vary_is_not_known(equal):
    varied = np.random.default_rng(0).standard_normal(9)
    for pair in ((varied, equal), (equal, varied), (equal, equal)):
        assert study.ratio_of_variances(*pair) == (None, None, None)


def test_a_row_without_a_ratio_of_variances_keeps_its_exact_shares(monkeypatch):
    """As that of a network whose outputs have orthogonal gradients: an estimate per sample has no variance."""
    method = type(methods.get(study.PER_SAMPLE))
    constant = Estimate(2.0, 0.0, 2, study.PER_SAMPLE, (), "trace")
    monkeypatch.setattr(method, "estimate", lambda *_: constant)
    given = TINY | {"networks": ["mlp"], "inits": 1, "seeds": 8, "steps": [0, 1]}
    rows = studies.run(NAME, studies.settings(NAME, given))
    assert (rows["status"] == "ok").all(), rows["reason"].tolist()
    assert rows["factor"].notna().all() and rows["measured"].isna().all()


@pytest.mark.parametrize("name", list(digit_networks.NETWORKS))
def test_networks_take_digits_and_samples_do_not_interact(name):
    network = initialisation.seeded(digit_networks.NETWORKS[name], 0)
    x = pntk.held_out_digits()[0][:4]
    with torch.no_grad():
        together, alone = network(x), torch.cat([network(x[i : i + 1]) for i in range(4)])
    assert together.shape == (4, 10)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_every_network_has_a_title():
    assert list(study.TITLES) == list(digit_networks.NETWORKS) == study.Settings().networks


@pytest.mark.slow
def test_one_row_for_each_network_run_and_step(table):
    assert (table["status"] == "ok").all(), table["reason"].unique()
    for _, line in table.groupby(["network", "init"]):
        assert line["step"].tolist() == [0, 2, 8]
    assert not table.duplicated(["network", "init", "step"]).any()
    assert (table["norm_ratio"] <= table["N"]).all() and (table["factor"] >= table["norm_ratio"]).all()
    measured = table["measured"].notna()
    assert set(table.loc[measured, ["init", "step"]].itertuples(index=False, name=None)) == {(0, 0), (0, 8)}
    assert set(table.loc[measured, "estimates"]) == {200} and set(table["seeds"]) == {1}
    for _, runs in table.groupby(["network", "step"]):
        assert runs["factor"].nunique() == 2, "two initialisations are one"


@pytest.mark.slow
def test_the_first_row_matches_theta_by_plain_autograd(table):
    network = initialisation.seeded(digit_networks.NETWORKS["mlp"], 1).double()
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(y, list(network.parameters()), retain_graph=True)])
        for y in network(pntk.held_out_digits()[0][:3].double()).reshape(-1)
    ]
    theta = torch.stack(rows) @ torch.stack(rows).T
    expected = study.shares(theta.reshape(3, 10, 3, 10))
    row = table.set_index(["network", "init", "step"]).loc[("mlp", 1, 0)]
    for column, value in expected.items():
        assert row[column] == pytest.approx(value, rel=1e-6), column


@pytest.mark.slow
def test_measured_variances_have_the_predicted_ratio(table):
    seen = table[table["measured"].notna()]
    assert len(seen) == 4
    assert (seen["measured"] / seen["factor"]).between(0.5, 2).all()


def test_a_network_that_diverges_is_a_row_with_the_reason():
    given = TINY | {"networks": ["mlp"], "inits": 1, "rate": 1e30, "seeds": 8}
    rows = studies.run(NAME, studies.settings(NAME, given)).set_index("step")
    assert list(rows["status"]) == ["ok", "failed", "failed"]
    assert rows.loc[[2, 8], "reason"].str.contains("training diverged").all()


@pytest.mark.parametrize("steps", [[1, 2], [0, 5, 3]])
def test_steps_that_do_not_rise_from_zero_are_refused(steps):
    with pytest.raises(ValidationError, match="must begin with 0 and rise"):
        studies.settings(NAME, TINY | {"steps": steps})


@pytest.mark.slow
def test_the_figure_states_the_numbers_of_the_table(table, tmp_path):
    known = table.assign(factor=np.where(table["step"] == 0, 20.0, np.where(table["step"] == 8, 5.0, 10.0)))
    made = figures.draw(NAME, known, tmp_path)
    caption = made[1].read_text()
    assert "Training multiplies it by (means of 2 runs): MLP 0.25, Vision Transformer 0.25" in caption
    assert "at least 5 in all 12 cases" in caption and "nan" not in caption
    plotted = pd.read_csv(made[0])
    np.testing.assert_allclose(plotted["norm_ratio"], known["norm_ratio"])
    from ntkbench.figures.plotting import base

    with base.style():
        drawing = figure.draw(base.checked_study(known, figure.COLUMNS))
    assert "20 times smaller before training, 5 after 8 steps, at an accuracy of " in drawing.title


@pytest.mark.slow
def test_the_figure_is_drawn_without_measured_variances_or_rows(table, tmp_path):
    few = table[(table["network"] == "mlp") & (table["init"] == 1)].drop(columns=["measured", "measured_low"])
    assert "ratio of variances is" not in figures.draw(NAME, few, tmp_path)[1].read_text()
    lost = table.assign(status="failed", reason="$x$ broke", factor=np.nan)
    for rows in (table.iloc[:0], lost):
        assert "Nothing to show" in figures.draw(NAME, rows, tmp_path)[1].read_text()
