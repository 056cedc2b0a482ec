"""The studies of spectra, solutions and effective ranks, against numpy, and their figures."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from ntkbench import figures, operators, readme, studies, testing
from ntkbench.errors import Unavailable
from ntkbench.estimators import lanczos, solve
from ntkbench.figures import solves as solves_figure
from ntkbench.figures import spectra as spectra_figure
from ntkbench.figures.plotting import labels
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.studies import effective_ranks, solves, spectra
from ntkbench.studies.base import products, thetas
from ntkbench.testing import explicit_jacobian, smooth_problem
from ntkbench.units import percent_label

QUICK = {"threads": 1, "device": "cpu"}
PROVENANCE = {"device": "cpu", "dtype": "float32", "threads": 1, "git_sha": "0123456789", "git_dirty": False}
PROVENANCE |= {"machine": "a laptop"}
TARGET = Target("torch", "float64", "cpu")


def measured(name, **given):
    return studies.run(name, studies.settings(name, QUICK | given)).assign(**PROVENANCE)


def theta_of(problem):
    J = explicit_jacobian(problem)
    return J @ J.T


# --- shared parts


def test_theta_and_products_are_those_of_the_jacobian():
    problem = smooth_problem()
    theta = theta_of(problem)
    np.testing.assert_allclose(thetas.Theta(problem, TARGET)(), theta, rtol=1e-10)
    j = operators.linearise(problem, "theta_0", TARGET)
    columns = np.array([[1e-12], [0.0], [3.0], [-1.0], [2.0], [1e12]]) * np.array([1.0, -2.0, 0.0])
    np.testing.assert_allclose(products.apply(j, columns), theta @ columns, rtol=1e-9)
    assert j.passes == 6
    np.testing.assert_allclose(products.linear(j) @ columns, theta @ columns)
    np.testing.assert_allclose(solve.operator(j, 0.5) @ columns[:, 0], (theta + 0.5 * np.eye(6)) @ columns[:, 0])


# --- spectra


@pytest.fixture(scope="module")
def spectral():
    given = {"problems": ["digits_mlp[N=4]"], "passes": [128], "tolerances": [1e-2], "top": 3, "seeds": 3, "calls": 1}
    return measured("spectra", **given)


@pytest.mark.slow
def test_the_study_of_spectra_has_a_row_for_each_method_budget_and_quantity(spectral):
    assert set(spectral["status"]) == {"ok"}, spectral["reason"].unique()
    found = {m: set(rows["quantity"]) for m, rows in spectral.groupby("method")}
    assert found == {method: set(gives) for method, gives in spectra.GIVES.items()}
    assert (spectral.loc[spectral["method"] != "eigh", "seeds"] == 3).all()
    exact = spectral[spectral["method"] == "eigh"].set_index("quantity")
    assert (exact["error"] < 1e-3).all() and (exact["holds"] == 1).all()
    spent = spectral[spectral["method"].isin(["spectrum", "block_lanczos", "stochastic_lanczos", "matfree"])]
    assert (spent["passes_spent"] <= spent["passes"]).all()


def test_errors_are_those_of_the_quantities():
    values = np.sort(np.random.default_rng(0).exponential(size=30) ** 3)
    known = spectra.Truth(smooth_problem(), values, 1e-2, 4)
    ones = np.full((1, 30), 1 / 30)
    whole = lanczos.Density(values[None], ones, values[None], ones, np.array([True]), 30, 0, 0.0, 1e-12, whole=True)
    assert known.exact("log_determinant") == pytest.approx(np.log1p(values / 1e-2).sum())
    assert known.exact("condition") == pytest.approx((values[-1] + 1e-2) / (values[0] + 1e-2))
    shares = values / values.sum()
    assert known.exact("entropy_effective_rank") == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert max(answer.error for answer in known.spread(whole).values()) < 1e-9
    assert {answer.holds for answer in known.spread(whole).values()} == {None, 1.0}
    more = values[None] * 10 + 9e-2  # a decade more of lambda + ridge
    shifted = dataclasses.replace(whole, nodes=more, radau_nodes=more)
    assert known.spread(shifted)["density"].error == pytest.approx(1.0)
    assert known.spread(shifted)["density"].holds < 1 and known.spread(shifted)["log_determinant"].holds == 0
    largest = values[::-1][:4] * np.array([1, 1, 0.9, 1])
    off = np.array([0, 0, 0.2, 0]) * values[::-1][:4]
    said = known.largest_ones(largest, off + 1e-12)
    assert (said["largest"].error, said["largest"].holds) == (0, 1) and said["top"].error == pytest.approx(0.1)
    assert said["top"].holds == 1 and known.largest_ones(largest, 0 * off)["top"].holds == 0


def test_rivals_are_right_where_they_have_enough_passes():
    problem = smooth_problem("wide", 10, 6, 10, 2)
    values = np.linalg.eigvalsh(theta_of(problem))
    j = operators.linearise(problem, "theta_0", TARGET)
    np.testing.assert_allclose(spectra.arpack(j, 3, 1e-10, 0), values[::-1][:3], rtol=1e-8)
    assert j.passes > 0
    before = j.passes
    np.testing.assert_allclose(spectra.lobpcg(j, 3, 400, 1e-10, 0), values[::-1][:3], rtol=1e-5)
    assert j.passes - before <= 400 + 6
    with pytest.raises(Unavailable, match="at least 18 passes for 3 eigenvalues"):
        spectra.lobpcg(j, 3, 12, 1e-10, 0)
    found = spectra.Matfree(problem, "float64", 20)(0)
    np.testing.assert_allclose(found.nodes, np.tile(values, (spectra.PROBES, 1)), atol=1e-8 * values[-1])
    assert found.weights.sum() == pytest.approx(1)
    with pytest.raises(Unavailable, match="no network in JAX"):
        spectra.Matfree(dataclasses.replace(problem, jax_forward=None), "float64", 20)


@pytest.mark.slow
def test_the_figure_of_spectra_states_its_result(spectral, tmp_path):
    figures.draw("spectra", spectral, tmp_path)
    said = (tmp_path / "spectra.txt").read_text()
    rows = spectral[(spectral["method"] == "spectrum") & (spectral["passes"] == 128)].set_index("quantity")
    assert "Where Θ fits, decompose it" in said
    page = readme.spectra(SimpleNamespace(read=lambda _: spectral))
    (line,) = (line for line in page.splitlines() if "| ntkbench.spectrum |" in line)
    assert percent_label(rows.loc["log_determinant", "error"]) in line
    assert f"{rows.loc['density', 'error']:.2g} decades" in line
    assert len(pd.read_csv(tmp_path / "spectra.csv")) == len(spectral)


@pytest.mark.slow
def test_a_method_leads_only_where_that_is_certain(spectral):
    """In time and in accuracy, on every problem."""
    points = spectral.assign(calls=5, seconds_q25=spectral["seconds"], seconds_q75=spectral["seconds"])
    exact = points["method"] == "eigh"
    for ratio, faster in ((1.1, False), (3.0, True)):
        seconds = np.where(exact, 1.0, ratio)
        given = points.assign(seconds=seconds, seconds_q25=seconds, seconds_q75=seconds)
        assert spectra_figure.exact_is_faster(given) == {"digits_mlp[N=4]": faster}
        assert ("it is surely faster than" in spectra_figure._of_exact(given)) == faster
    best = points["method"] == "arpack"
    for factor, leads in ((1.1, False), (100.0, True)):
        error = np.where(best, 0.01, 0.01 * factor)
        given = points.assign(error=error, error_q25=0.5 * error, error_q75=2 * error)
        assert ("top" in spectra_figure.most_accurate(given)) == leads
    assert spectra_figure.most_accurate(given)["top"] == "ARPACK (SciPy)"
    other = pd.concat([given, given.assign(problem="other", error=0.01, error_q25=0.005, error_q75=0.02)])
    assert "top" not in spectra_figure.most_accurate(other), "not on the other problem"
    assert not spectra_figure.most_accurate(given[best]), "without a rival"


def spectral_rows(exact: list[str], problems: list[str], passes: int) -> pd.DataFrame:
    """Products with these passes that take ten times as long as decomposing, on problems of which some lack the latter.

    A different method has the smallest error of each quantity.
    """
    quantities = dict(zip(spectra_figure.QUANTITIES, [*spectra_figure.LOOKS][1:], strict=True))
    rows = []
    for problem in problems:
        for method in spectra_figure.LOOKS:
            for quantity, best in quantities.items():
                error = 0.001 if method == best else 0.5
                row = {"problem": problem, "method": method, "title": spectra.TITLES[method], "quantity": quantity}
                row |= {"passes_spent": passes, "calls": 50, "seeds": 50, "n": 10}
                row |= dict.fromkeys(("error", "error_q25", "error_q75"), error)
                seconds = 1.0 if method == "eigh" else 10.0
                row |= dict.fromkeys(("seconds", "seconds_q25", "seconds_q75"), seconds)
                rows += [row] if method != "eigh" or problem in exact else []
    return pd.DataFrame(rows)


def test_all_of_theta_takes_less_time_only_where_both_were_measured_on_every_problem():
    problems = ["digits_mlp[N=4]", "digits_mlp[N=8]"]
    both = spectral_rows(problems, problems, 100)
    assert spectra_figure._title(both).endswith("; all of Θ takes less time")
    assert spectra_figure._of_exact(both).endswith("surely faster than 100 passes.")
    one = pd.concat([spectral_rows(problems[:1], problems[:1], 100), spectral_rows([], problems[1:], 900)])
    assert "all of Θ takes less time" not in spectra_figure._title(one)
    assert spectra_figure._of_exact(one).endswith("surely faster than 100 passes on digits MLP, N = 4.")


def test_the_caption_of_spectra_has_at_most_sixty_words_with_many_problems_and_methods():
    problems = [f"digits_mlp[N={N},width=300]" for N in range(5)]
    rows = spectral_rows(problems[1:], problems, 4096)
    said = spectra_figure._caption(rows, list(spectra_figure.QUANTITIES))
    assert len(said.split()) <= labels.WORDS and "surely faster than 4096 passes on" in said and "and 2 others." in said


# --- solves


@pytest.fixture(scope="module")
def solved():
    given = {"problems": ["digits_mlp[N=4]"], "ridges": [1e-1, 1e-3], "rtols": [1e-2, 1e-6], "seeds": 2}
    return measured("solves", dtype="float64", **given)


def test_the_study_of_solutions_has_checked_residuals(solved):
    assert set(solved["status"]) == {"ok"}, solved["reason"].unique()
    assert set(solved["method"]) == set(solves.TITLES) and len(solved) == 16
    assert (solved["residual"] <= 1.01 * solved["rtol"]).all()
    by = solved.set_index(["method", "share", "rtol"])
    assert by.loc[("nystrom", 1e-3, 1e-6), "iterations"] < by.loc[("plain", 1e-3, 1e-6), "iterations"]
    assert (by.loc["cholesky", "residual"] < 1e-10).all() and (by.loc["scipy", "residual"] > 1e-10).all()
    assert (by["condition"] <= 1 + 1 / by.index.get_level_values("share")).all()


def test_what_does_not_converge_is_a_row_with_its_reason():
    given = {"problems": ["digits_mlp[N=4]"], "ridges": [1e-4], "rtols": [1e-8], "seeds": 2, "passes": 30}
    table = measured("solves", dtype="float64", **given).set_index("method")
    assert table.loc[["nystrom", "plain"], "reason"].str.contains("above rtol=1e-08: take more passes").all()
    assert table.loc["scipy", "residual"] > 1e-8, "SciPy's solution is measured as it is"


def test_the_figure_of_solutions_names_the_fastest(solved, tmp_path):
    seconds = {"cholesky": 1.0, "nystrom": 0.5, "plain": 2.0, "scipy": 4.0}
    slow = solved.assign(seconds=solved["method"].map(seconds))
    slow.loc[slow["share"] == 1e-3, "seconds"] *= slow["method"].map({"cholesky": 1}).fillna(4)
    found = solves_figure.fastest(slow)
    assert sorted(found["winner"]) == [*["factor"] * 2, *["products"] * 2]
    assert set(found.loc[found["winner"] == "products", "title"]) == {"CG, Nystrom preconditioner"}
    close = slow.assign(seconds=slow["seconds"].where(slow["method"] != "nystrom", 0.95), share=1e-1)
    assert set(solves_figure.fastest(close)["winner"]) == {""}, "not certain"
    figures.draw("solves", slow, tmp_path)
    said = (tmp_path / "solves.txt").read_text()
    assert "Products are faster with 95 % certainty in 2 of 4 cases, and the factor in 2." in said
    assert "Use products (CG, Nystrom preconditioner) for n of 40, condition numbers of" in said
    assert "residuals of 1e-06 to 0.01." in said
    page = readme.solves(SimpleNamespace(read=lambda _: slow))
    assert "| products |" in page and "| factor |" in page
    unreached = slow.assign(residual=slow["residual"].where(slow["method"] == "cholesky", 1.0))
    assert list(solves_figure.fastest(unreached)["winner"]) == ["factor"] * 4
    page = readme.solves(SimpleNamespace(read=lambda _: unreached))
    assert page.count("| not reached | not reached | not reached | factor |") == 2 and "undecided" not in page
    figures.draw("solves", unreached, tmp_path)
    assert (
        "Use the factor wherever Θ fits: it is faster with 95 % certainty in 4 of 4"
        in (tmp_path / "solves.txt").read_text()
    )
    for alone, title in (({"cholesky"}, {""}), ({"plain"}, {""}), ({"plain", "scipy"}, {"CG without preconditioner"})):
        found = solves_figure.fastest(slow[slow["method"].isin(alone)])
        assert set(found["winner"]) == {""} and set(found["title"]) == title, "the other was not measured"
    both = slow.assign(residual=1.0)
    assert not len(solves_figure.fastest(both)), "no case that any of them reached"
    lost = dict.fromkeys(("n", "condition", "seconds", "residual", "passes_spent"))
    skipped = slow.assign(problem="digits_mlp[N=8]", status="skipped", reason="too | large", **lost)
    page = readme.solves(SimpleNamespace(read=lambda _: pd.concat([both, skipped])))
    assert page.count("| none reaches it |") == 2
    assert r"| `digits_mlp[N=8]` |  | at most 11 | too \| large |  |  |  |  |" in page
    failed = slow["method"] == "plain"
    one = slow.assign(status=np.where(failed, "skipped", "ok"), reason=np.where(failed, "too many passes", ""))
    page = readme.solves(SimpleNamespace(read=lambda _: one))
    assert page.count("| too many passes |") == 2 and "| products |" in page and "| factor |" in page


def solutions(seconds) -> pd.DataFrame:
    """Solutions: the factor takes a second, the fastest products ``seconds(n, share, rtol)``, others four times it."""
    rows = []
    for n in (40, 640):
        for share in (1e-1, 1e-3):
            for rtol in (1e-2, 1e-6):
                for method, title in solves.TITLES.items():
                    products = seconds(n, share, rtol) * (1 if method == "nystrom" else 4)
                    row = {"problem": f"digits_mlp[N={n // 10}]", "method": method, "title": title, "share": share}
                    row |= {"rtol": rtol, "condition": 1 + 1 / share, "n": n, "P": 9, "O": 10, "iterations": 1}
                    row |= {"passes_spent": 10, "residual": rtol / 2, "seeds": 5, "calls": 50, "status": "ok"}
                    row |= dict.fromkeys(
                        ("seconds", "seconds_q25", "seconds_q75"), 1.0 if method == "cholesky" else products
                    )
                    rows.append(row | {"reason": ""} | PROVENANCE)
    return pd.DataFrame(rows)


def test_the_figure_of_solutions_says_where_nothing_is_certain():
    points = solutions(lambda n, share, rtol: 1.0)
    assert set(solves_figure.fastest(points)["winner"]) == {""}
    assert "Undecided in all 8 cases" in solves_figure._caption(points) and "Use" not in solves_figure._caption(points)


def test_products_are_for_the_residuals_at_which_they_win(tmp_path):
    points = solutions(lambda n, share, rtol: 0.1 if rtol == 1e-2 else 10.0)
    said = solves_figure._caption(points)
    assert "Products are faster with 95 % certainty in 4 of 8 cases, and the factor in 4." in said
    named = "Use products (CG, Nystrom preconditioner) for n of 40 to 640, condition numbers of 11 to 1000 and "
    assert f"{named}residuals of 0.01." in said and len(said.split()) <= labels.WORDS
    figures.draw("solves", points, tmp_path)
    assert "5 seeds" in (tmp_path / "solves.txt").read_text()


def test_no_sizes_are_named_for_products_if_the_factor_wins_among_them():
    points = solutions(lambda n, share, rtol: 0.1 if (n == 40) == (share == 1e-3) else 10.0)
    said = solves_figure._caption(points)
    assert said.endswith("in 4 of 8 cases, and the factor in 4.") and "Use products" not in said


# --- effective ranks


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.two(torch.tanh(self.norm(self.one(x))))


def normalised(**statistics):
    torch.manual_seed(0)
    module = Normalised().eval()
    weights = {name: w.detach().numpy().copy() for name, w in module.named_parameters()}
    return Problem("normalised", module, torch.randn(6, 4).numpy() + 2, weights, fixed_0=statistics)


def test_statistics_are_the_requested_ones():
    given = {"norm.running_mean": np.full(5, 0.5, np.float32), "norm.running_var": np.full(5, 2.0, np.float32)}
    problem = normalised(**given)
    x = torch.from_numpy(problem.x)
    of_layer = problem.module.one(x).detach()
    expected = {
        "stored": (given["norm.running_mean"], given["norm.running_var"]),
        "calibrated": (of_layer.mean(0), of_layer.var(0)),
        "uncalibrated": (np.zeros(5), np.ones(5)),
    }
    for statistics, (mean, variance) in expected.items():
        chosen = effective_ranks.with_statistics(problem, "theta_0", statistics)
        np.testing.assert_allclose(chosen.fixed_0["norm.running_mean"], mean, rtol=1e-5)
        np.testing.assert_allclose(chosen.fixed_0["norm.running_var"], variance, rtol=1e-5)
        np.testing.assert_allclose(thetas.Theta(chosen, TARGET)(), theta_of(chosen), rtol=1e-9)
    assert not problem.module.norm.training and not problem.module.norm.running_mean.any()
    with pytest.raises(Unavailable, match="means of 0 and variances of 1"):
        effective_ranks.with_statistics(normalised(), "theta_0", "stored")


def test_effective_ranks_are_those_of_kernels_in_float64_as_their_table_says(monkeypatch):
    made, kernels = [], effective_ranks.kernels
    monkeypatch.setattr(effective_ranks.problems, "load", lambda label: normalised())
    monkeypatch.setattr(effective_ranks, "kernels", lambda *given: made.append(given[0]) or kernels(*given))
    settings = studies.settings("effective_ranks", QUICK)
    table = studies.run("effective_ranks", settings)
    assert "ok" in set(table["status"]) and settings.dtype == "float64"
    assert made and all((theta != theta.astype(np.float32)).any() for theta in made), "rounded to float32"


def test_kernels_between_samples_are_those_of_the_outputs():
    problem = smooth_problem()
    J = explicit_jacobian(problem).reshape(3, 2, -1)
    made = effective_ranks.kernels(theta_of(problem), 2)
    pooled = J.sum(1) / np.sqrt(2)
    np.testing.assert_allclose(made["sum_of_logits"][0], pooled @ pooled.T)
    np.testing.assert_allclose(made["single_logit"][1], J[:, 1] @ J[:, 1].T)
    np.testing.assert_allclose(2 * made["trace"][0], sum(J[:, o] @ J[:, o].T for o in range(2)))
    rank, entropy, share = effective_ranks.effective_ranks(np.diag([2.0, 1.0, 1.0, 0.0]))
    assert (rank, share) == (pytest.approx(16 / 6), 0.5) and entropy == pytest.approx(2**1.5)


@pytest.fixture(scope="module")
def ranks():
    return measured("effective_ranks", problems=["resnet18[N=4,O=3,width=2]", "digits_mlp[N=4]"])


@pytest.mark.slow
def test_the_study_of_effective_ranks_names_the_kernel(ranks):
    reasons = ranks.groupby("problem")["reason"].unique()
    assert set(reasons["digits_mlp[N=4]"]) == {"digits_mlp[N=4] has no BatchNorm with statistics"}
    good = ranks[ranks["status"] == "ok"].set_index(["weights", "statistics", "kernel"])
    assert set(good.index.get_level_values("statistics")) == {"calibrated", "uncalibrated"}
    assert set(good["size"]) == {4, 12} and (good["effective_rank"] >= 1).all()
    rows = good["effective_rank"]
    assert rows["initial", "calibrated", "theta"] > rows["initial", "calibrated", "sum_of_logits"]
    for case in ("initial", "trained"):
        assert rows[case, "calibrated", "theta"] != pytest.approx(rows[case, "uncalibrated", "theta"], rel=0.1)


@pytest.mark.slow
def test_the_figure_of_effective_ranks_states_its_result(ranks, tmp_path):
    figures.draw("effective_ranks", ranks, tmp_path)
    good = ranks[ranks["status"] == "ok"]
    said = (tmp_path / "effective_ranks.txt").read_text()
    row = good[(good["weights"] == "initial") & (good["statistics"] == "calibrated")].set_index("kernel").loc["theta"]
    of_theta = good[good["kernel"] == "theta"]["effective_rank"]
    assert f"Θ, all outputs {labels.span(of_theta)}" in said
    page = readme.effective_ranks(SimpleNamespace(read=lambda _: ranks))
    assert any(f"| initial | of these images | {row['effective_rank']:.3g} |" in line for line in page.splitlines())
    assert len(pd.read_csv(tmp_path / "effective_ranks.csv")) == len(good)


@pytest.mark.slow
def test_the_figures_keep_their_contract(spectral, solved, ranks):
    for name, table in (("spectra", spectral), ("solves", solved), ("effective_ranks", ranks)):
        testing.check_figure(name, table)
