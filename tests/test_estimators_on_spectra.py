"""The study of estimators on prescribed spectra, and its map."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from ntkbench import figures, methods, studies
from ntkbench.metrics import METRICS
from ntkbench.studies import estimators_on_spectra as study

NAME = "estimators_on_spectra"
SMALL = {"n": 40, "seeds": 6, "passes": [6, 36], "threads": 1, "device": "cpu"}


def settings(**given):
    return studies.settings(NAME, SMALL | given)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    made = study.run(settings(spectra=["linear", "0.7^i"], outputs_per_parameter=[0.5, 2], dtype="float64"))
    where = {"device": "cpu", "dtype": "float64", "threads": 1, "machine": "a laptop"}
    return made.assign(**where, git_sha="0123456789abcdef", git_dirty=False)


@pytest.mark.parametrize("name", study.SPECTRA)
@pytest.mark.parametrize(("n", "P"), [(40, 60), (60, 40)])
def test_jacobians_have_the_prescribed_spectrum(name, n, P):
    eigenvalues = study.SPECTRA[name](np.arange(1, 41))
    spectrum = study.Spectrum(eigenvalues, n, P, settings(dtype="float64"))
    (j,) = spectrum.jacobians("trace")
    assert (j.n, j.P) == (n, P)
    found = np.linalg.eigvalsh(j.ntk(j.basis(0, n)).numpy())[::-1]
    np.testing.assert_allclose(found[:40], np.sort(eigenvalues)[::-1], atol=1e-12)
    np.testing.assert_allclose(found[40:], 0, atol=1e-12)
    assert spectrum.truth["trace"] == pytest.approx(eigenvalues.sum())
    assert spectrum.truth["effective_rank"] == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())
    assert 0.1 < spectrum.truth["alignment"] < 1


def test_the_explicit_operator_keeps_the_contract():
    """Adjoint products, rows, per-sample products, and a counter of passes."""
    j, other = study.Spectrum(np.linspace(1, 2, 20), 20, 30, settings(dtype="float64")).jacobians("alignment")
    u, w = torch.randn(3, 20, dtype=torch.float64), torch.randn(3, 30, dtype=torch.float64)
    torch.testing.assert_close((u * j.jvp(w)).sum(1), (j.vjp(u) * w).sum(1))
    assert j.passes == 6
    torch.testing.assert_close(j.row(4), j.vjp(j.basis(4, 5))[0])
    torch.testing.assert_close(j.sample_vjp(slice(0, 20), u[..., None]).sum(1), j.vjp(u))
    torch.testing.assert_close(j.sample_squares(u[..., None]), (u**2) * torch.diagonal(j.ntk(j.basis(0, 20))))
    assert other.passes == 0 and j.fresh().passes == 0


def test_one_row_for_each_cell(table):
    expected = {(name, metric) for name in study.NAMES for metric in methods.get(name).metrics}
    assert set(table[["method", "metric"]].itertuples(index=False, name=None)) == expected
    assert len(table) == 2 * 2 * 2 * len(expected)
    assert not any(methods.get(name).needs_independent_samples for name in study.NAMES)
    assert set(table["status"]) == {"ok", "skipped"}
    ok = table[table["status"] == "ok"]
    assert (ok["passes_spent"] <= ok["passes"]).all()
    assert (ok["seeds"] == 6).all() and (ok["calls"] == 0).all()
    assert ok["covered"].between(0, 1).all()
    assert ((ok["error_q25"] <= ok["error"]) & (ok["error"] <= ok["error_q75"])).all()
    assert set(ok["metric"]) == set(METRICS)
    lost = table[table["status"] == "skipped"]
    least = lost["reason"].str.extract(r"^the [a-z ]+ takes at least (\d+) passes$")[0].astype(int)
    assert (least > lost["passes"]).all()


def test_estimates_are_close_and_exact_where_theory_says_so(table):
    """36 passes on a spectrum that falls by 0.7 per step: sketches are almost exact, and Hutchinson is not."""
    here = table.query("spectrum == '0.7^i' and passes == 36 and metric == 'trace'").set_index("method")
    assert (here.loc["xnystrace", "error"] < 0.02).all()
    assert (here.loc["hutchinson", "error"] > here.loc["xnystrace", "error_q75"].max()).all()
    assert (table["error"].dropna() < 2).all()


def test_a_spectrum_that_cannot_be_made_is_a_reason_in_each_of_its_rows(monkeypatch):
    made = study.Spectrum

    def spectrum(values, *rest):
        if values[1] == 0.5:
            raise MemoryError("too large")
        return made(values, *rest)

    monkeypatch.setattr(study, "Spectrum", spectrum)
    found = study.run(settings(spectra=["1/i", "0.9^i"], outputs_per_parameter=[1], passes=[6, 36], seeds=2))
    lost = found[(found["spectrum"] == "1/i") & (found["status"] != "skipped")]
    assert len(lost) and set(lost["status"]) == {"out_of_memory"} and lost["reason"].str.contains("too large").all()
    assert set(found.loc[found["spectrum"] == "0.9^i", "status"]) == {"ok", "skipped"}
    assert found.groupby("spectrum").size().nunique() == 1


def test_same_settings_same_numbers(table):
    again = study.run(settings(spectra=["0.7^i"], outputs_per_parameter=[2], passes=[36], dtype="float64"))
    before = table.query("spectrum == '0.7^i' and passes == 36 and outputs_per_parameter == 2")
    pd.testing.assert_series_equal(again["error"], before["error"], check_index=False)


@pytest.mark.parametrize(
    "wrong",
    [{"n": 3}, {"spectra": ["cubic"]}, {"passes": []}, {"outputs_per_parameter": [0]}, {"budget": 3}, {"seeds": 1}],
)
def test_invalid_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        settings(**wrong)


def test_the_map_shows_the_least_median_errors(table, tmp_path):
    figures.draw("estimator_map", table, tmp_path)
    plotted = pd.read_csv(tmp_path / "estimator_map.csv")
    place = ["metric", "outputs_per_parameter", "spectrum", "passes"]
    ok = table[table["status"] == "ok"]
    assert len(plotted[plotted["place"] == 1]) == len(ok[place].drop_duplicates())
    ties = set()
    for key, best in plotted.groupby(place):
        rows = ok.set_index(place).sort_index().loc[key].set_index("method")
        errors, first = rows["error"].clip(lower=1e-5), best.iloc[0]["method"]
        assert errors[first] == errors.min()
        # A test at 95 % of log medians over 6 seeds, with at least the deviation of a half-normal error.
        low, high = (rows[quartile].clip(lower=1e-9) for quartile in ("error_q25", "error_q75"))
        deviation = (np.log(high / low) / 1.349).clip(lower=0.9517) * np.sqrt(np.pi / 2 / 6)
        told_apart = np.log(errors / errors[first]) > 1.96 * np.hypot(deviation, deviation[first])
        tied = errors == 1e-5 if errors[first] == 1e-5 else ~told_apart
        assert tied[best["method"]].all() and len(best) == min(tied.sum(), 3)
        assert (best["tied"] == tied.sum()).all()
        ties.add(int(tied.sum()))
    assert len(ties) > 1
    said = (tmp_path / "estimator_map.txt").read_text()
    assert "float64" in said and "6 seeds" in said and f"Rows of the study {NAME}" in said


def test_the_map_is_drawn_of_few_or_no_rows(table, tmp_path):
    lost = table.assign(status="failed", reason="$x$ was not there", error=np.nan)
    for rows in (table.iloc[:0], table[table["status"] == "ok"][:1], lost):
        figures.draw("estimator_map", rows, tmp_path)
    assert "$x$ was not there" in (tmp_path / "estimator_map.txt").read_text()
