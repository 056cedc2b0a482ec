"""When to be exact: prescribed kernels, variances against all sign vectors, the study, and its figure."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import ntkbench
from ntkbench import figures, methods, studies
from ntkbench.errors import BadInput
from ntkbench.figures import when_to_be_exact as figure
from ntkbench.figures.plotting import base as plotting
from ntkbench.measure import laws
from ntkbench.studies import when_to_be_exact as study
from ntkbench.studies.base.prescribed import Kernel, Sums

NAME = "when_to_be_exact"
TINY = {"N": 4, "width": 8, "depth": 1, "outputs": [2, 8], "ranks": [1.5, 3], "shares": [0, 0.6], "passes": [2, 4, 8]}
TINY |= {"seeds": 120, "calls": 1, "threads": 1, "device": "cpu", "dtype": "float64"}
PROVENANCE = {"device": "cpu", "dtype": "float64", "threads": 1, "git_sha": "0123456789", "git_dirty": False}
PROVENANCE |= {"machine": "a laptop"}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return studies.run(NAME, studies.settings(NAME, TINY)).assign(**PROVENANCE)


@pytest.fixture(scope="module")
def one_kernel() -> pd.DataFrame:
    sizes = TINY | {"outputs": [8], "ranks": [3], "shares": [0], "seeds": 12}
    return studies.run(NAME, studies.settings(NAME, sizes)).assign(**PROVENANCE)


def theta_of(kernel: Kernel) -> np.ndarray:
    """Theta of the network with this kernel, by the library."""
    problem = kernel.problem(8, 1)
    module = problem.network.double()
    module.load_state_dict({k: torch_of(v) for k, v in {**problem.theta_0, **problem.fixed_0}.items()})
    return ntkbench.ntk(module, torch_of(problem.x), dtype="float64", device="cpu").numpy()


def torch_of(array: np.ndarray):
    import torch

    return torch.from_numpy(array)


def signs(count: int) -> np.ndarray:
    """All vectors of signs, ``[2^count, count]``."""
    return np.array(list(itertools.product((-1.0, 1.0), repeat=count)))


# --- kernels


@pytest.mark.parametrize("kernel", [Kernel(4, 8, 3.0, 0.6), Kernel(2, 2, 1.0, 0.5), Kernel(3, 4, 3.9, 0)])
def test_networks_have_the_prescribed_kernels(kernel):
    theta = theta_of(kernel)
    blocks = theta.reshape(kernel.N, kernel.O, kernel.N, kernel.O)
    own = [blocks[b, :, b] for b in range(kernel.N)]
    for block in own:
        np.testing.assert_allclose(block, own[0], atol=1e-12)
        assert block.trace() ** 2 / (block**2).sum() == pytest.approx(kernel.rank)
        np.testing.assert_allclose(block.diagonal(), 1.0)
    share = 1 - sum((block**2).sum() for block in own) / (theta**2).sum()
    assert share == pytest.approx(kernel.share, abs=1e-12)
    np.testing.assert_allclose(theta, np.kron(kernel.between, own[0]), atol=1e-12)
    for written_out, known in ((own[0], kernel.block), (theta, kernel.theta)):
        np.testing.assert_allclose(list(vars(Sums.of(written_out)).values()), list(vars(known).values()))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((1, 4, 2, 0), "N must be at least 2; got 1"),
        ((4, 6, 2, 0), "O must be a power of two, at least 2; got 6"),
        ((4, 4, 4, 0), r"rank must be at least 1 and less than O \(4\); got 4"),
        ((4, 4, 0.5, 0), "rank must be at least 1"),
        ((4, 4, 2, 0.8), r"share must be from 0 to 1 - 1 / N \(0.75\); got 0.8"),
    ],
)
def test_impossible_kernels_are_refused(sizes, says):
    with pytest.raises(BadInput, match=says):
        Kernel(*sizes)


def test_a_network_too_narrow_for_its_kernel_is_refused():
    with pytest.raises(BadInput, match=r"width must be at least N and O \(8\); got 7"):
        Kernel(4, 8, 3, 0).problem(7, 0)


# --- variances


@given(st.lists(st.floats(-2, 2), min_size=6, max_size=6))
def test_the_variance_of_pairs_is_that_over_all_vectors_of_signs(entries):
    matrix = np.zeros((3, 3))
    matrix[np.tril_indices(3)] = entries
    matrix = matrix + matrix.T
    u = signs(3)
    y = (u @ matrix @ u.T) ** 2  # all u against all v
    interaction = y - y.mean(0) - y.mean(1)[:, None] + y.mean()
    assert Sums.of(matrix).pair_variance == pytest.approx((interaction**2).mean(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("family", figure.PREDICTED)
def test_errors_of_the_trace_are_those_over_all_vectors_of_signs(family, share):
    kernel = Kernel(2, 4, 2.2, share)
    theta = theta_of(kernel)
    kept = theta * np.kron(np.eye(2), np.ones((4, 4))) if family == "per-sample" else theta
    u = signs(8)
    found = ((u @ kept) * u).sum(1) / theta.trace() - 1
    assert found.mean() == pytest.approx(0, abs=1e-12)
    assert kernel.error("trace", family, 1) == pytest.approx(math.sqrt((found**2).mean()))
    assert kernel.error("trace", family, 9) == pytest.approx(kernel.error("trace", family, 1) / 3)
    if family == "per-sample":
        assert kernel.error("trace", family, 1) == pytest.approx(math.sqrt(2 * (1 / 2.2 - 1 / 4) / 2))
    else:
        assert kernel.error("trace", family, 1) == pytest.approx(math.sqrt(2 * (1 / (2.2 * (1 - share)) - 1 / 4) / 2))


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("family", figure.PREDICTED)
def test_errors_of_the_norm_are_those_over_all_pairs_of_probes(family, share):
    """Two probes: all 2^8 by 2^8 pairs of vectors, in the estimators' own formulas."""
    kernel = Kernel(2, 4, 2.2, share)
    theta = theta_of(kernel)
    u = signs(8)
    strata = [slice(0, 4), slice(4, 8)] if family == "per-sample" else [slice(0, 8)]
    square = np.zeros((len(u), len(u)))
    for b, c in itertools.product(strata, strata):
        y = (u[:, b] @ theta[b, c] @ u[:, c].T) ** 2  # probes k of b and l of c
        own = (y.diagonal()[:, None] + y.diagonal()) / 4
        square += (y + y.T) / 2 if b == c else own + (y + y.T) / 4
    found = (square / (theta**2).sum() - 1) / 2
    assert found.mean() == pytest.approx(0, abs=1e-12)
    assert kernel.error("norm", family, 2) == pytest.approx(math.sqrt((found**2).mean()))


# --- the study


@pytest.mark.slow
def test_measured_errors_match_theory(table):
    """Chi-squared sums of 120 squared errors are within 30 % of their mean; kernels of low rank scatter more."""
    found = table[(table["status"] == "ok") & table["predicted"].gt(0) & table["passes"].ge(4)]
    ratios = found["rms"] / found["predicted"]
    assert len(found) > 20 and ratios.between(0.6, 1.6).all()
    assert ratios.median() == pytest.approx(1, abs=0.08)


@pytest.mark.slow
def test_one_row_for_each_kernel_method_and_budget(table):
    kernels = studies.settings(NAME, TINY).kernels()
    assert len(kernels) == 6 and len(table.drop_duplicates(["O", "rank", "share"])) == 6
    for (outputs, _, _, family), rows in table.groupby(["O", "rank", "share", "family"]):
        for _, line in rows.groupby("metric"):
            assert list(line["passes"]) == ([outputs] if family == "exact" else [2] if outputs == 2 else [2, 4, 8])
    exact = table[table["family"] == "exact"]
    assert (exact["rms"] < 1e-12).all() and (exact["calls"] == 1).all()
    lost = table[table["status"] != "ok"]
    assert set(lost["reason"]) <= {"the norm takes at least 4 passes", "the trace takes at least 4 passes"}
    assert set(table.loc[table["family"].isin(figure.PREDICTED) & (table["status"] == "ok"), "seeds"]) == {120}


def test_budgets_beyond_an_exact_method_are_measured_until_they_take_too_long():
    sizes = TINY | {"outputs": [4], "ranks": [2], "shares": [0], "passes": [2, 4, 8, 16, 32], "seeds": 2}
    found = studies.run(NAME, studies.settings(NAME, sizes | {"beyond": 4}))
    budgets = found.groupby(["metric", "family"])["passes"].max().to_dict()
    lawful = {(metric, family): 16 for metric in ("trace", "norm") for family in figure.PREDICTED}
    assert budgets == lawful | {("trace", "deflated"): 4, ("trace", "exact"): 4, ("norm", "exact"): 4}
    hurried = studies.run(NAME, studies.settings(NAME, sizes | {"beyond": 4, "limits": {"patience_s": 1e-9}}))
    lost = hurried[hurried["reason"].str.contains("patience_s")]
    first = hurried[(hurried["status"] == "ok") & (hurried["family"] != "exact")]
    assert len(first) == len(lawful) + 1 and len(lost) == len(found) - len(first) - 2 - (found["status"] != "ok").sum()
    assert len(hurried) == len(found) and set(lost["status"]) == {"skipped"}


def test_a_kernel_that_cannot_be_made_gives_a_reason_in_each_of_its_rows(monkeypatch):
    made = Kernel.problem

    def problem(self, width, depth):
        if self.share:
            raise MemoryError("too large")
        return made(self, width, depth)

    monkeypatch.setattr(Kernel, "problem", problem)
    found = studies.run(NAME, studies.settings(NAME, TINY | {"outputs": [4], "ranks": [2], "passes": [4], "seeds": 2}))
    lost = found[found["share"] > 0]
    assert set(lost["status"]) == {"out_of_memory"} and lost["reason"].str.contains("too large").all()
    assert set(found.loc[found["share"] == 0, "status"]) == {"ok"}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"ranks": [8]}, r"ranks: none is less than the largest of outputs \(8\)"),
        ({"width": 6}, r"width: must be at least N and O \(8\); got 6"),
        ({"outputs": [6]}, "O must be a power of two"),
        ({"shares": [0.9]}, r"share must be from 0 to 1 - 1 / N \(0.75\); got 0.9"),
        ({"passes": [1]}, "greater than or equal to 2"),
    ],
)
def test_impossible_settings_are_refused(wrong, says):
    with pytest.raises(ValidationError, match=says):
        studies.settings(NAME, TINY | wrong)


def test_every_method_supports_its_metric():
    for metric, families in study.METHODS.items():
        assert all(metric in methods.get(name).metrics for name in families.values())
        assert {*figure.PREDICTED, "exact"} <= set(families) <= set(figure.FAMILIES)


# --- the figure


def rows(errors, seconds, family="pooled", passes=(4, 16, 64)) -> pd.DataFrame:
    return pd.DataFrame({"family": family, "passes": passes, "rms": errors, "seconds": seconds})


def test_costs_follow_the_law_of_the_errors():
    law = rows([0.4, 0.2, 0.1], [1.0, 2.0, 6.0])
    assert figure.cost(law, 0.5) == (4, 1.0, True)
    for error in (0.3, 0.15, 0.11, 0.05):
        found = figure.cost(law, error)
        assert found.passes == pytest.approx((0.8 / error) ** 2) and found.tried == (error >= 0.1)
    assert figure.cost(law, 0.2).seconds == pytest.approx(2.0)
    assert figure.cost(law, 0.05).seconds == pytest.approx(6.0 * 256 / 64)
    middle = math.sqrt(0.4 * 0.5)  # errors that rise with passes do so by chance
    between = math.log(middle / 0.2) / math.log(middle / 0.1)
    found = figure.cost(rows([0.4, 0.5, 0.1], [1.0, 2.0, 6.0]), 0.2)
    assert found.passes == pytest.approx(16 * 4**between) and found.tried
    lucky = figure.cost(rows([0.4, 0.1, 0.2], [1.0, 2.0, 6.0]), 0.12)
    assert not lucky.tried and lucky.passes == pytest.approx(64 * 0.1 * 0.2 / 0.12**2)
    one = figure.cost(rows([0.4], [2.0], passes=(4,)), 0.2)
    assert (one.passes, one.seconds) == pytest.approx((16, 8))
    assert math.isnan(figure.cost(rows([0.4, 0.2, 0.1], [1.0, 2.0, 6.0], "deflated"), 0.05).passes)


def timed(table: pd.DataFrame) -> pd.DataFrame:
    """The rows with 50 seeds and many calls that all take the same time."""
    return table.assign(seconds_q25=table["seconds"], seconds_q75=table["seconds"], seeds=50, calls=100)


def test_costs_vary_with_errors_and_calls():
    """50 seeds: errors by 10 %, so passes by 20 %; seconds also by the drift of the machine."""
    found = figure.spreads(timed(rows([0.4, 0.2, 0.1], [1.0, 2.0, 6.0])), 0.05, typical=0.0)
    assert found == pytest.approx({"passes": 0.2, "seconds": math.hypot(0.2, laws.DRIFT)})
    exact = timed(rows([0.0], [1.0], "exact", (8,)))
    assert figure.spreads(exact, 0.05, typical=0.0) == pytest.approx({"passes": 0.0, "seconds": laws.DRIFT})


@pytest.mark.parametrize(("factor", "winner"), [(3.0, "exact"), (1.1, ""), (1 / 3, "per-sample")])
def test_a_family_wins_only_with_certainty(factor, winner):
    """An estimate to 10 % takes 8 passes, as many as exact, times the factor."""
    passes = np.array([2, 8, 32])
    both = [
        rows([0.0], [0.8], "exact", (8,)),
        rows(0.1 * np.sqrt(8 * factor / passes), 0.1 * passes, "per-sample", passes),
    ]
    points = timed(pd.concat(both)).assign(N=4, O=8, rank=3.0, share=0.6, metric="trace")
    row = figure._costs(points).query("family == 'exact' and error == 0.1").iloc[0]
    for by in figure.MARKERS:
        assert row[f"winner_in_{by}"] == winner
        assert (0.05 < row[f"chance_of_exact_in_{by}"] < 0.95) == (winner == "")
    alone = figure._costs(points[points["family"] == "exact"]).iloc[0]
    assert [alone[f"winner_in_{by}"] for by in figure.MARKERS] == [""] * 2, "without a rival"


@pytest.mark.parametrize("metric", ["trace", "norm"])
@pytest.mark.parametrize("family", figure.PREDICTED)
def test_predicted_passes_have_the_requested_error(metric, family):
    kernel = Kernel(8, 16, 4.0, 0.5)
    passes = figure.predicted_passes(kernel, metric, family, 0.01)
    assert kernel.error(metric, family, passes) == pytest.approx(0.01)
    assert figure.predicted_passes(kernel, metric, family, 2.0) == 2


def test_the_boundary_of_the_trace_is_where_the_rule_of_thumb_says():
    """N O rank = 2 / error^2 where the rank is far below O."""
    kernel = Kernel(16, 256, 4.0, 0.0)
    error = math.sqrt(2 / (16 * 256 * 4))
    assert figure.predicted_passes(kernel, "trace", "per-sample", error) == pytest.approx(256, rel=0.02)


@pytest.mark.slow
def test_the_figure_names_the_winners(table, tmp_path):
    made = figures.draw(NAME, table, tmp_path)
    plotted = pd.read_csv(made[0])
    assert len(plotted.drop_duplicates(["O", "rank", "share", "metric", "error"])) == 6 * 2 * 3
    for _, case in plotted.groupby(["O", "rank", "share", "metric", "error"]):
        winner = case[case["family"] == case["winner_in_passes"].iloc[0]]
        assert not len(winner) or winner["passes"].iloc[0] == case["passes"].min()
    known = plotted[plotted["error"] == 0.001]
    assert set(known["winner_in_theory"]) == {"exact"}
    wins = plotted[(plotted["family"] == "exact") & (plotted["winner_in_seconds"] == "exact")]
    caption = made[1].read_text()
    assert f"Exact surely takes the least seconds in {len(wins)} of 36 cases (" in caption and "nan" not in caption


@pytest.mark.slow
def test_extrapolated_points_are_hollow_and_the_measured_ones_counted(table):
    with plotting.style():
        drawing = figure.draw(plotting.checked_study(table.assign(rms=table["rms"] / 4), figure.COLUMNS))
    estimates = drawing.plotted[drawing.plotted["family"].isin(figure.PREDICTED)]
    below = [panel for panel in drawing.figure.axes if panel.get_xlabel() == "predicted passes / O"]
    marks = [line for panel in below for line in panel.lines if line.get_marker() in figure.MARKERS.values()]
    for tried in (True, False):
        shown = [len(line.get_xdata()) for line in marks if (line.get_markerfacecolor() != "none") == tried]
        assert sum(shown) == 2 * (estimates["tried"] == tried).sum() > 0, "passes and seconds of each"
    count = estimates["tried"].sum()
    assert f"{count} of {len(estimates)} estimates are measured" in drawing.caption
    assert len(drawing.caption.split()) <= 60
    assert "hollow" in " ".join(text.get_text() for key in drawing.figure.legends for text in key.get_texts())
    kernels = drawing.plotted[drawing.plotted["family"] == "exact"]
    for error, words in figure.TOLERANCES.items():
        wins = ((kernels["error"] == error) & (kernels["winner_in_passes"] == "exact")).sum()
        assert re.search(rf"^Of 12 cases, exact surely takes the fewest passes .*to {words} in {wins}\b", drawing.title)
    sure = figure.tasks.SURE
    undecided = kernels["chance_of_exact_in_passes"].between(1 - sure, sure, inclusive="neither")
    assert drawing.title.endswith(f"; {undecided.sum()} of all 36 are undecided")
    decided = kernels[~undecided]
    below = decided["N"] * decided["O"] * decided["rank"] < 2 / decided["error"] ** 2
    right = below == (decided["winner_in_passes"] == "exact")
    assert f"predicts {100 * right.mean():.0f} % of cases decided in passes" in drawing.caption
    assert "median" not in drawing.figure.texts[1].get_text(), "errors are root mean squares"


@pytest.mark.parametrize(("factor", "extrapolated"), [(1e-9, 0), (1e3, 3)])
@pytest.mark.slow
def test_the_title_marks_errors_to_which_costs_are_extrapolated(table, factor, extrapolated):
    with plotting.style():
        drawing = figure.draw(plotting.checked_study(table.assign(rms=table["rms"] * factor), figure.COLUMNS))
    assert drawing.title.count(" (0 of ") == drawing.title.count(" estimates measured)") == extrapolated


@pytest.mark.parametrize("metric", ["trace", "norm"])
def test_one_metric_and_one_kernel_are_drawn_too(one_kernel, metric):
    few = one_kernel[one_kernel["metric"] == metric]
    with plotting.style():
        drawing = figure.draw(plotting.checked_study(few, figure.COLUMNS))
    assert set(drawing.plotted["metric"]) == {metric} and len(drawing.plotted) >= 9


@pytest.mark.slow
def test_a_figure_without_values_says_so(table, tmp_path):
    numbers = ["rms", "seconds"]
    lost = table.assign(status="failed", reason="$x$ was not there", **dict.fromkeys(numbers, np.nan))
    for few in (table.iloc[:0], lost, table[table["family"] != "exact"]):
        assert "Nothing to show" in figures.draw(NAME, few, tmp_path)[1].read_text()
