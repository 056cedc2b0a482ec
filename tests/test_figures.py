"""Figures: from tables to files.

The results table is synthetic, from cost models; the tables of studies are the committed ones.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import multiprocessing.context
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import mostly_slow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ntkbench import figures, methods
from ntkbench.errors import BadInput
from ntkbench.figures import (
    exact_cost,
    hazelden_blog,
    hazelden_speedup,
    language_training,
    mohamadi_cost,
    mohamadi_drift,
    novak_flops,
)
from ntkbench.figures.plotting import base, canvas, claims, files, labels, report, sources, styles, tasks
from ntkbench.measure import laws
from ntkbench.paths import REFERENCE
from ntkbench.studies import mohamadi_drift as mohamadi_drift_study

BOTH, TORCH, JAX = ("torch", "jax"), ("torch",), ("jax",)
METRICS = ("trace", "norm", "effective_rank", "alignment")
METHODS = {  # title, kind, backends, metrics, passes (times n) or spread of the error at one pass
    "naive_jacobian": ("naive Jacobian", "exact", TORCH, METRICS, 1.0),
    "direct": ("direct", "exact", BOTH, METRICS, 0.3),
    "jacobian_contraction": ("Jacobian contraction", "exact", TORCH, METRICS, 0.05),
    "ntk_vector_products": ("NTK-vector products", "exact", TORCH, METRICS, 0.12),
    "nt_jacobian_contraction": ("neural-tangents Jacobian contraction", "exact", JAX, METRICS, 0.04),
    "nt_ntk_vector_products": ("neural-tangents NTK-vector products", "exact", JAX, METRICS, 0.15),
    "nt_structured_derivatives": ("neural-tangents structured derivatives", "exact", JAX, METRICS, 0.015),
    "sum_of_logits": ("pNTK (sum of logits)", "approximate", BOTH, METRICS, 0.005),
    "hutchinson": ("Hutchinson", "stochastic", BOTH, METRICS, 0.18),
    "hutchpp": ("Hutch++", "stochastic", BOTH, METRICS, 0.12),
    "one_sided_reverse": ("one-sided reverse", "stochastic", BOTH, ("trace",), 0.14),
    "one_sided_forward": ("one-sided forward", "stochastic", BOTH, ("trace",), 0.22),
    "shared_probe_alignment": ("shared-probe alignment", "stochastic", BOTH, ("alignment",), 0.16),
}
PROBLEMS = [  # family, sizes, N, O, P, slowness of a pass
    ("digits_mlp", "N=64", 64, 10, 85002, 1.0),
    ("digits_mlp", "N=512", 512, 10, 85002, 1.0),
    ("digits_conv", "N=64", 64, 10, 19658, 3.0),
    ("gru_hazelden", "N=15,T=8", 15, 512, 14592, 6.0),
]
LOST = {("nt_structured_derivatives", "gru_hazelden"): ("skipped", "structured derivatives unroll the scan")}
LOST |= {("nt_ntk_vector_products", "digits_conv"): ("out_of_memory", "more than 6 GiB")}
BUDGETS = (8, 32, 128, 512, 2048)
HARDER = {"trace": 1.0, "norm": 1.8, "effective_rank": 3.0, "alignment": 1.2}
FIGURES = [name for name in figures.names() if figures.study_of(name) is None]
"""Figures of the results table."""
MEASUREMENTS = ["seconds", "seconds_q25", "seconds_q75", "error", "error_q25", "error_q75", "memory_bytes"]


def synthetic(problems=PROBLEMS, methods=METHODS, metrics=METRICS) -> pd.DataFrame:
    """A table that looks like a measured one: seconds by passes, errors by the Monte Carlo rate, some cells lost."""
    rng, rows = np.random.default_rng(0), []
    for family, sizes, samples, outputs, parameters, slow in problems:
        for method, (title, kind, backends, gives, cost) in methods.items():
            for backend in BOTH:
                for metric in metrics:
                    for passes in BUDGETS if kind == "stochastic" else (np.nan,):
                        row = {"problem": f"{family}[{sizes}]", "family": family, "N": samples, "O": outputs}
                        row |= {"P": parameters, "n": samples * outputs, "method": method, "title": title}
                        row |= {"kind": kind, "backend": backend, "metric": metric, "passes": passes, "reason": ""}
                        row |= {"device": "cpu", "dtype": "float32", "threads": 2, "machine": "a laptop"}
                        row |= {"git_sha": "0123456789abcdef", "git_dirty": True, "value": 1.0, "reference": 1.0}
                        row |= {"effective_rank": samples * outputs / 10}
                        row |= {"seeds": 50 if kind == "stochastic" else 1, "first_call_seconds": 1.0}
                        if backend not in backends or metric not in gives:
                            row |= {"status": "skipped", "reason": "computes or runs on others only"}
                        else:
                            row |= _cell(rng, row, cost, slow)
                        rows.append(row)
    return pd.DataFrame(rows)


def _cell(rng: np.random.Generator, row: dict, cost: float, slow: float) -> dict:
    n, a_pass = row["n"], 2e-4 * slow * (row["n"] / 640) ** 0.8 * (0.6 if row["backend"] == "jax" else 1.0)
    if (row["method"], row["family"]) in LOST:
        return dict(zip(("status", "reason"), LOST[row["method"], row["family"]], strict=True))
    stochastic = row["kind"] == "stochastic"
    seconds = (1e-3 + a_pass * (row["passes"] if stochastic else cost * n)) * rng.lognormal(0, 0.05)
    if seconds > 30:
        return {"status": "timeout", "reason": "more than 30 s"}
    error = {"exact": rng.choice([0.0, 6e-8, 2e-7, 9e-7]), "approximate": rng.uniform(0.15, 0.8)}.get(row["kind"])
    if stochastic:
        error = cost * HARDER[row["metric"]] / row["passes"] ** (0.6 if row["method"] == "hutchpp" else 0.5)
        error *= rng.lognormal(0, 0.1)
        spent = {"passes_spent": row["passes"], "covered": rng.binomial(row["seeds"], 0.93) / row["seeds"]}
    else:
        spent = {"passes_spent": 2 * n if row["method"] in ("direct", "ntk_vector_products") else np.nan}
    memory = (64.0 if stochastic else n) * n * 8 + (0.5 * n * row["P"] if row["method"] == "naive_jacobian" else 0)
    numbers = (seconds, 0.96 * seconds, 1.07 * seconds, error, 0.45 * error, 1.75 * error, memory - 4e5)
    return {"status": "ok", **spent, **dict(zip(MEASUREMENTS, numbers, strict=True))}


@pytest.fixture(scope="module")
def table():
    return synthetic(PROBLEMS[::3], metrics=("trace", "norm"))


@pytest.fixture(scope="module")
def drawn(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    return {name: figures.draw(name, table, folder) for name in FIGURES}


@pytest.mark.slow
def test_every_figure_gives_four_files(drawn):
    assert {"error_against_passes", "exact_cost", "method_map"} <= set(drawn)
    for name, paths in drawn.items():
        assert [path.name for path in paths] == [f"{name}.{kind}" for kind in ("csv", "txt", "png", "pdf")]
        assert all(path.stat().st_size for path in paths)
        caption = paths[1].read_text()
        assert all(
            word in caption for word in ("cpu", "2 threads", "float32", "50 seeds", "0123456789 (dirty)", "laptop")
        )


@pytest.mark.slow
def test_plotted_numbers_are_those_of_the_table(drawn, table):
    keys = ["problem", "metric", "method", "backend", "passes"]
    passes = ["passes_spent", *MEASUREMENTS[3:6]]
    for name, columns in {
        "error_against_passes": passes,
        "exact_cost": MEASUREMENTS[:3],
    }.items():
        plotted = pd.read_csv(drawn[name][0])
        exact_only = table[table["kind"] == "exact"] if name == "exact_cost" else table
        both = plotted.merge(exact_only, on=[k for k in keys if k in plotted], suffixes=("", "_table"), validate="1:1")
        assert len(both) == len(plotted) > 0
        for column in columns:
            np.testing.assert_array_equal(both[column], both[f"{column}_table"])
    assert set(plotted["metric"]) == {"norm"}
    zeros = pd.read_csv(drawn["error_against_passes"][0]).query("error == 0")
    assert set(zeros["error_drawn"]) == {1e-8}, "an error of zero is not at the floor"
    assert "below 1e-08 are drawn there" in drawn["error_against_passes"][1].read_text()
    assert "timeout" in set(pd.read_csv(drawn["exact_cost"][0])["status"]), "a lost cell is out of sight"


def test_guide_lines_have_the_slopes_of_theory(table):
    rows = base.checked(table)
    panels = [panel for panel in drawn_from("error_against_passes", rows).figure.axes if panel.lines]
    assert len(panels) == 4
    for panel in panels:
        guides = [line for line in panel.lines if line.get_color() == canvas.PALE]
        ends = [np.log(line.get_xydata()) for line in guides]
        assert [round((y1 - y0) / (x1 - x0), 9) for (x0, y0), (x1, y1) in ends] == [-0.5, -1.0]


def test_coverage_pools_seeds_and_keeps_low_ranks_apart(table, tmp_path):
    """Two problems of effective ranks 400 and 4, and 90 % against 50 % of the intervals right."""
    rows = table[(table["method"] == "hutchpp") & (table["status"] == "ok") & (table["backend"] == "torch")]
    low = rows["problem"] == rows["problem"].iloc[0]
    rows = rows.assign(
        seeds=50,
        covered=np.where(low, 0.5, 0.9),
        effective_rank=np.where(low, 4, 400),
    )
    figures.draw("coverage", rows, tmp_path)
    plotted = pd.read_csv(tmp_path / "coverage.csv").set_index(["metric", "group"]).loc["trace"]
    cells = low[rows["metric"] == "trace"].value_counts()
    assert list(plotted.loc[["below", "other"], "covered"]) == [0.5, 0.9]
    assert list(plotted.loc[["below", "other"], "seeds"]) == [50 * cells[True], 50 * cells[False]]
    assert list(plotted.loc[["below", "other"], "in_target"]) == [False, True]
    n, p, z = 50 * cells[True], 0.5, 1.959963985
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert plotted.loc["below", "high"] - plotted.loc["below", "low"] == pytest.approx(2 * half)
    said = (tmp_path / "coverage.txt").read_text()  # of one method and two metrics
    assert "for 4 groups by method, metric and effective rank" in said and "2 groups are within the target" in said
    assert "within the target for 2 of 4 groups" in said
    figures.draw("coverage", rows.drop(columns="covered"), tmp_path)
    assert "no column 'covered'" in (tmp_path / "coverage.txt").read_text()


def test_coverage_is_not_pooled_over_settings_and_unknown_effective_ranks_are_said_to_be(table):
    rows = table[(table["method"] == "hutchpp") & (table["status"] == "ok")].assign(covered=0.9, seeds=50)
    rows = pd.concat([rows.assign(covered=share, device=name) for name, share in (("cpu", 0.9), ("cuda", 0.5))])
    drawing = drawn_from("coverage", rows.assign(effective_rank=np.nan))
    assert list(drawing.plotted["covered"]) == [0.9, 0.5] * 2 and set(drawing.plotted["group"]) == {"unknown"}
    assert list(drawing.plotted["setting"]) == ["cpu", "cuda"] * 2
    assert "effective rank unknown" in key_of(drawing) and "or more" not in key_of(drawing)
    assert "for 4 groups by method, metric, effective rank and setting" in drawing.caption
    assert {"cpu", "cuda"} <= set(said_in(drawing))


def test_only_problems_with_a_choice_between_error_and_time_get_panels(table, tmp_path):
    exact = table[table["kind"] == "exact"].assign(problem="exact[N=1]")
    lost = table.assign(problem="lost[N=1]", status="skipped", reason="no data", **dict.fromkeys(MEASUREMENTS, np.nan))
    figures.draw("error_against_passes", pd.concat([table, exact, lost]), tmp_path)
    assert set(pd.read_csv(tmp_path / "error_against_passes.csv")["problem"]) == set(table["problem"])
    assert "Problems without a measurement: 1." in (tmp_path / "error_against_passes.txt").read_text()


def test_slopes_over_n_are_those_of_the_costs_of_one_network(tmp_path):
    """Costs that are powers of n give these powers; networks with other parameters are not on the line."""
    grown = [(f"N={N}", N, 4, 1000, 1.0) for N in (16, 32, 64)] + [("N=16,width=512", 16, 4, 9000, 1.0)]
    rows = synthetic([("fc_relu", *sizes) for sizes in grown], {"direct": METHODS["direct"]}, ["norm"])
    rows = rows[rows["backend"] == "torch"].assign(status="ok")
    rows = rows.assign(seconds=1e-6 * rows["n"] ** 1.5, memory_bytes=1e3 * rows["n"] ** 2.0)
    figures.draw("exact_cost", rows, tmp_path)
    plotted = pd.read_csv(tmp_path / "exact_cost.csv")
    assert list(plotted["n"]) == [64, 128, 256] and set(plotted["P"]) == {1000}
    assert list(plotted["slope_seconds"].round(6)) == [1.5] * 3
    assert list(plotted["slope_memory"].round(6)) == [2.0] * 3
    assert "Seconds grow as n^1.5 to n^1.5" in (tmp_path / "exact_cost.txt").read_text()


@pytest.mark.parametrize(
    ("factor", "memory", "said"),
    [
        (1.05, 8e6, "No exact method is surely the fastest on any of 1 networks"),
        (3.0, 8e6, "a is surely fastest on 1 of 1 networks (undecided on 0) and takes the least memory on 1"),
        (3.0, 0.0, "a is surely fastest on 1 of 1 networks (undecided on 0) and takes the least memory on 0"),
    ],
)
def test_exact_methods_are_named_only_where_they_surely_cost_the_least(table, factor, memory, said):
    """Two methods that were timed once. Below the floor their memory is the same."""
    costs = {"a": (1.0, memory / 2), "b": (factor, memory)}
    rows = [taking(one_task(table, **{m: "direct"}), s).assign(memory_bytes=held) for m, (s, held) in costs.items()]
    drawing = drawn_from("exact_cost", pd.concat(rows).assign(calls=1))
    assert drawing.title.endswith(said)
    winner = "undecided" if factor < 2 else "a"
    assert f"Surely fastest at the largest n: {winner} on digits MLP." in drawing.caption


def test_a_method_without_a_measured_rival_does_not_win(table):
    """The rival has failed, or is of the same kind."""
    alone = taking(one_task(table, a="direct"), 1.0).assign(memory_bytes=8e6)
    lost = alone.assign(method="b", title="b", status="timeout", **dict.fromkeys(MEASUREMENTS, np.nan))
    rows = pd.concat([alone, lost]).assign(calls=20)
    assert drawn_from("exact_cost", rows).title == "No exact method is surely the fastest on any of 1 networks"
    assert set(exact_cost.winners(drawn_from("exact_cost", rows).plotted, "memory_mib_drawn").values()) == {""}
    assert (tasks.solutions(base.checked(rows))["fastest"] == 0).all()
    (choice,) = report.answer(base.checked(rows))[0]["rows"][0]["cells"][0]["best"]
    assert choice["method"] == "a" and not choice["sure"]
    drawing = drawn_from("method_map", rows)
    assert "# none in PyTorch is surely fastest" in [text.get_text() for text in drawing.figure.texts]
    kin = pd.concat([alone, taking(alone, 9.0).assign(method="b", title="b")]).assign(calls=20)
    won = tasks.winners(base.checked(kin))
    assert (won["fastest"] == 1).all() and (won["fastest_of_kind"] == 0).all()
    estimates = one_task(table, hutchinson="hutchinson")
    title = drawn_from("error_against_passes", estimates).title
    assert title == "Fewest passes to 1 %: undecided on 1 of 1 tasks"


def test_a_rival_that_just_misses_the_tolerance_is_in_the_contest(table):
    """A median error of 1.01 % at the largest budget is within 1 % in about half of the reruns."""
    fast = taking(one_task(table, hutchinson="hutchinson"), 1.0)
    error = 0.0101 * (fast["passes"].max() / fast["passes"]) ** 0.5
    fast = fast.assign(error=error, error_q25=0.47 * error, error_q75=1.7 * error)
    rows = base.checked(pd.concat([taking(one_task(table, direct="direct"), 99.0), fast]).assign(calls=20))
    (found,) = tasks.solutions(rows, {"1 %": 0.01}).to_dict("records")
    assert found["method"] == "direct" and 0.3 < found["fastest"] == found["fastest_of_kind"] < 0.8
    (won,) = tasks.winners(rows, {"1 %": 0.01}).to_dict("records")
    assert won["fastest_of_kind"] < tasks.SURE


def texts(drawing: base.Drawing) -> list[str]:
    """Texts beside the panels of a figure, on one line each."""
    return [" ".join(text.get_text().split()) for text in drawing.figure.texts]


def test_the_map_prints_calls_of_its_own_metrics():
    drawing = drawn_from("method_map", synthetic(PROBLEMS[:1], metrics=("alignment",)))
    of_alignment = texts(drawing)
    assert "ntkbench.alignment(model, other, x, rtol=0.01)" in of_alignment
    assert not [text for text in of_alignment if "trace" in text]
    ends = [text.get_window_extent().x1 for text in drawing.figure.texts]
    assert max(ends) <= drawing.figure.bbox.x1, "no line is cut off"
    of_kernel = synthetic(PROBLEMS[:1], metrics=("trace",)).assign(metric="largest_eigenvalue")
    assert not [text for text in texts(drawn_from("method_map", of_kernel)) if "ntkbench." in text], (
        "it takes no method"
    )


def test_the_map_prints_the_metric_on_which_the_method_is_the_fastest(table):
    """Of the trace ``a`` is the fastest, and of the norm ``b``, on more tasks."""
    a, b = (one_task(table, **{name: "direct"}) for name in "ab")
    rows = [taking(a, 1.0), taking(b, 9.0)]
    rows += [
        taking(own, seconds).assign(metric="norm", problem=f"p[N={i}]", n=640 * i)
        for i in (1, 2)
        for own, seconds in ((a, 9.0), (b, 1.0))
    ]
    assert 'ntkbench.norm(model, x, method="b")' in texts(drawn_from("method_map", pd.concat(rows).assign(calls=20)))


def test_the_map_prints_only_an_exact_method_that_is_surely_fastest(table):
    rows = [taking(one_task(table, **{name: "direct"}), seconds) for name, seconds in (("a", 1.0), ("b", 1.05))]
    drawing = drawn_from("method_map", pd.concat(rows).assign(calls=1))
    assert "# none in PyTorch is surely fastest" in [text.get_text() for text in drawing.figure.texts]


def test_a_methods_time_follows_its_error_law_and_not_a_lucky_budget(table):
    """A budget that is within a tolerance by luck, while the next two are not, does not give the time of the task."""
    one = table.query("problem == 'digits_mlp[N=64]' and metric == 'trace' and backend == 'torch'")
    line = one[one["method"] == "hutchinson"].assign(
        error=0.2 / one["passes"] ** 0.5, error_q25=0.09 / one["passes"] ** 0.5, error_q75=0.34 / one["passes"] ** 0.5
    )
    lucky = line.assign(error=line["error"].mask(line["passes"] == 32, 0.009))
    right, found = (tasks.solutions(base.checked(rows), {"1 %": 0.01}).iloc[0] for rows in (line, lucky))
    assert right["passes"] == pytest.approx(400) and right["seeds"] == 50 * len(BUDGETS)
    assert found["passes"] > 64 and line.loc[line["passes"] == 32, "seconds"].iloc[0] < found["seconds"]
    assert right["passes_low"] < 400 < right["passes_high"]


def test_neither_of_two_equal_methods_is_surely_the_fastest(table):
    one = table.query("problem == 'digits_mlp[N=64]' and metric == 'trace' and backend == 'torch'")
    line = one[one["method"] == "hutchinson"]
    both = pd.concat([line, line.assign(method="one_sided_reverse", title="one-sided reverse")])
    found = tasks.solutions(base.checked(both), {"1 %": 0.01})
    assert found["fastest"].sum() == pytest.approx(1) and found["fastest"].between(0.2, 0.8).all()


def one_task(table: pd.DataFrame, **named: str) -> pd.DataFrame:
    """The rows of methods of the table for one task, under other names."""
    here = table.query("problem == 'digits_mlp[N=64]' and metric == 'trace' and backend == 'torch'")
    return pd.concat([here[here["method"] == of].assign(method=name, title=name) for name, of in named.items()])


def taking(rows: pd.DataFrame, seconds: float | pd.Series) -> pd.DataFrame:
    """The rows with seconds that do not vary."""
    return rows.assign(**dict.fromkeys(MEASUREMENTS[:3], seconds))


@pytest.mark.parametrize(("factor", "sure"), [(1.05, False), (3.0, True)])
def test_methods_that_were_timed_once_are_distinguished_only_if_far_apart(table, factor, sure):
    rows = [taking(one_task(table, **{name: "direct"}), seconds) for name, seconds in (("a", 1.0), ("b", factor))]
    rows = base.checked(pd.concat(rows).assign(calls=1))
    solved, won = tasks.solutions(rows), tasks.winners(rows)
    assert (solved["seconds_low"] < solved["seconds"]).all() and (solved["seconds"] < solved["seconds_high"]).all()
    assert set(won["method"]) == {"a"} and len(won) == len(tasks.TOLERANCES)
    assert ((won["fastest"] >= tasks.SURE) == sure).all()


def bounded(table: pd.DataFrame, exact_seconds: float, easy: bool) -> pd.DataFrame:
    """An exact method and an estimate, whose errors are a hundredth at all budgets if the task is easy for it."""
    estimate = taking(one_task(table, hutchinson="hutchinson"), 1.0)
    errors = MEASUREMENTS[3:6]
    estimate[errors] = estimate[errors] * (0.01 if easy else 1.0)
    return pd.concat([taking(one_task(table, direct="direct"), exact_seconds), estimate]).assign(calls=20)


@pytest.mark.parametrize("easy", [False, True])
def test_no_method_surely_wins_over_a_time_that_is_an_upper_bound(table, easy):
    """Where even the smallest budget is far too large for an estimate, a smaller one may be faster than exact."""
    for seconds, winner in ((0.5, "direct"), (10.0, "hutchinson")):
        rows = base.checked(bounded(table, seconds, easy))
        solved = tasks.solutions(rows, {"1 %": 0.01}).set_index("method")
        assert list(solved.loc[["direct", "hutchinson"], "at_most"]) == [False, easy]
        (choice,) = report.answer(rows)[0]["rows"][0]["cells"][1]["best"]
        assert choice["method"] == winner and choice["sure"] == (winner == "hutchinson" or not easy)
        assert choice["seconds"].startswith("at most ") == (winner == "hutchinson" and easy)


@pytest.mark.parametrize(
    ("seconds", "title", "factor", "in_map"),
    [
        (0.5, "surely pays on 0 of 1 tasks, exact on 0, undecided on 1", "\N{LESS-THAN OR EQUAL TO}2×?", "2.0×?"),
        (
            10.0,
            "surely pays on 1 of 1 tasks (by up to 10× or more), exact on 0, undecided on 0",
            "\N{GREATER-THAN OR EQUAL TO}10×",
            "\N{GREATER-THAN OR EQUAL TO}10×",
        ),
    ],
)
def test_figures_mark_times_that_are_upper_bounds(table, seconds, title, factor, in_map):
    rows = bounded(table, seconds, easy=True)
    drawing = drawn_from("time_to_accuracy", rows)
    (panel,) = drawing.figure.axes
    assert [line.get_marker() for line in panel.lines].count("v") == 1
    assert title in drawing.figure.texts[0].get_text() and factor in said_in(drawing)
    assert "Triangles (1)" in drawing.caption and "at most, an upper bound: 1 tasks" in key_of(drawing)
    assert in_map in said_in(drawn_from("method_map", rows))


@pytest.mark.parametrize(("seconds", "said"), [(0.5, "undecided on 1"), (10.0, "estimates are surely fastest on 1")])
def test_only_sure_wins_count_in_the_map(table, seconds, said):
    """The same task, undecided because the other family's time is an upper bound, and surely won."""
    drawing, sure = drawn_from("method_map", bounded(table, seconds, easy=True)), seconds == 10.0
    assert said in drawing.title and drawing.title.endswith("of 1 tasks") and drawing.title.count(" on 1") == 1
    panel = drawing.figure.axes[1]
    (mark,) = [line for line in panel.lines if len(line.get_xdata()) == 1]
    assert (mark.get_markerfacecolor() == "white") == (not sure)
    (image,) = panel.images
    pixels = image.get_array()
    white, clear = (pixels == 1).all(-1), pixels[..., 3] == 0
    assert clear.any() and white.any() == (not sure), "what is beyond half a decade is hatched"
    assert (~white & ~clear).any() == sure, "a region is tinted where a family wins"
    advice = [text.get_text() for text in drawing.figure.texts]
    assert f"trace: {'estimate 1' if sure else 'undecided 1'}" in advice
    assert {"ntkbench.trace(model, x, rtol=0.01)", "ntkbench.trace(model, x, rtol=0.1)"} <= set(advice)
    assert 'ntkbench.trace(model, x,\n  method="direct")' in advice


def test_a_family_wins_surely_even_if_two_of_its_methods_tie(table):
    one = one_task(table, hutchinson="hutchinson")
    both = pd.concat([one, one.assign(method="one_sided_reverse"), taking(one_task(table, direct="direct"), 1e3)])
    won = tasks.winners(base.checked(both.assign(calls=20)), {"1 %": 0.01}).iloc[0]
    assert won["fastest"] < 0.9 and won["fastest_of_kind"] == pytest.approx(1)
    assert won["lead"] < 1.5 and won["lead_of_kind"] > 100


def test_times_at_budgets_that_are_not_too_large_are_no_upper_bounds(table):
    drawing = drawn_from("time_to_accuracy", bounded(table, 0.1, easy=False))
    assert "upper bound" not in key_of(drawing) and "Triangles" not in drawing.caption
    assert drawing.title.endswith("exact on 1 (by up to 10×), undecided on 0") and "10×" in said_in(drawing)


def test_a_task_that_only_an_approximation_solves_has_neither(table):
    """The error of the pNTK is small by chance, and no estimate reaches 1 %."""
    known = one_task(table, sum_of_logits="sum_of_logits").assign(**dict.fromkeys(MEASUREMENTS[3:6], 0.005))
    far = one_task(table, hutchinson="hutchinson").assign(**dict.fromkeys(MEASUREMENTS[3:6], 0.5))
    drawing = drawn_from("time_to_accuracy", pd.concat([known, far]))
    assert drawing.caption.endswith("0 of 1 tasks have both, 1 neither.")


def test_titles_of_errors_use_error_laws_and_ignore_approximations(table):
    """Neither a lucky budget nor an approximation that is close by chance has the least cost."""
    name, kept = "error_against_passes", ("direct", "hutchinson", "sum_of_logits")
    rows = one_task(table, **dict(zip(kept, kept, strict=True))).reset_index(drop=True)
    cost = rows["passes"].fillna(50.0).mask(rows["method"] == "sum_of_logits", 1.0)
    error = (0.2 / rows["passes"] ** 0.5).mask(rows["passes"] == 32, 0.009).fillna(0.005)
    rows = rows.assign(passes_spent=cost, error=error, error_q25=0.45 * error, error_q75=1.75 * error)

    def title(some):
        return drawn_from(name, some).title

    assert title(rows) == "Fewest passes to 1 %: exact methods on 1, undecided on 0 of 1 tasks"
    one = rows[rows["method"] == "hutchinson"]
    assert (
        title(pd.concat([one, one.assign(method="equal", kind="exact")]))
        == "Fewest passes to 1 %: undecided on 1 of 1 tasks"
    )
    far = rows[(rows["kind"] != "exact") & ~rows["passes"].isin([32, 512, 2048])]
    assert title(far).endswith(": no exact method or estimate reaches a median error of 1 %")


def said_in(drawing: base.Drawing) -> list[str]:
    """Texts in the panels."""
    return [text.get_text() for panel in drawing.figure.axes for text in panel.texts]


def key_of(drawing: base.Drawing) -> str:
    return " ".join(text.get_text() for key in drawing.figure.legends for text in key.get_texts())


def blog_points(factor: float, seeds: int = 100) -> pd.DataFrame:
    """Shared probes, and three Hutch++ traces whose error at equal passes is larger by a factor."""
    rows = []
    for method, scale, budgets in (("shared_probe_alignment", 1.0, (8, 40, 400)), ("hutchpp", factor, (72, 360, 720))):
        for passes in budgets:
            error = scale * 0.3 / passes**0.5
            row = {"method": method, "metric": "alignment", "problem": "net[N=2]", "passes": passes, "seeds": seeds}
            row |= {"error": error, "error_q25": 0.47 * error, "error_q75": 1.7 * error}
            rows.append(row | {"seconds": 1.0, "seconds_q25": 1.0, "seconds_q75": 1.0})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("factor", "verdict"), [(8.0, claims.REPRODUCED), (0.1, claims.NOT), (1.0, claims.PARTLY)])
def test_the_blogs_claim_on_shared_probes_is_judged_at_equal_passes(factor, verdict):
    made = claims.shared_probes(blog_points(factor), "hutchpp")
    (claim,) = made
    assert claim.verdict == verdict and claim.measured[0] == pytest.approx(factor)
    assert "at equal passes (400)" in claim.sentence() and claim.runs == 600 and claim.here == "net, N = 2"
    apart = blog_points(factor).query("method == 'hutchpp' or passes < 50")
    assert claims.shared_probes(apart, "hutchpp") == (), "no budget was given to both"


def test_where_two_curves_cross_depends_on_what_counts_as_a_sample():
    rows = []
    for method, each, error in (
        ("shared_probe_alignment", 4, lambda p: p**-0.5),
        ("hutchpp", 36, lambda p: 120 / p),
    ):
        for m in (2, 8, 32, 128, 512, 2048, 8192):
            row = {"method": method, "m": m, "passes": each * m, "seeds": 9, "seconds": 1.0, "error": error(each * m)}
            row |= {"error_q25": row["error"], "error_q75": row["error"], "seconds_q25": 1.0, "seconds_q75": 1.0}
            rows.append(row)
    table = pd.DataFrame(rows)
    # 120 / p = p^(-1/2) at 14,400 passes, 3,600 probes; 120 / (36 m) = (4 m)^(-1/2) at m = (120 / 18)^2.
    found = hazelden_blog.crossings(table)
    assert found == {"samples": pytest.approx((120 / 18) ** 2, rel=0.02), "passes": pytest.approx(3600, rel=0.02)}
    fewer = hazelden_blog.crossings(table[table["m"] < 3000])
    assert fewer == {"samples": pytest.approx(found["samples"], rel=0.02)}
    assert hazelden_blog.crossings(table[table["m"] < 30]) == {}, "the budgets leave it open"
    assert hazelden_blog.crossings(table[table["method"] == "hutchpp"]) == {}
    assert hazelden_blog._open(found) == "it is not kept what the post counts"
    assert hazelden_blog._open(fewer) == "the budgets leave the crossing open, except at equal samples"
    assert hazelden_blog._open({}) == "the budgets leave the crossing open"


def speedup_table(scale: float) -> pd.DataFrame:
    """The study behind Hazelden's figure 1 with a one-sided estimator of a known law; a pass takes a millisecond."""
    common = {"problem": "mlp_hazelden", "network": "mlp", "n": 100, "P": 50, "status": "ok", "reason": ""}
    common |= {
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "machine": "m",
        "git_sha": "a" * 12,
        "git_dirty": False,
    }
    rows = [common | {"method": "direct_one_by_one", "title": "direct", "seconds": 100.0, "share": 1.0, "calls": 1}]
    for m in (8, 32, 128, 512, 2048, 8192):
        row = common | {
            "method": "one_sided_paper_reverse",
            "title": "one-sided",
            "m": m,
            "passes": m,
            "seeds": 60,
            "calls": 1,
        }
        quantiles = zip(("_q25", "", "_q75"), (0.47, 1.0, 1.7), strict=True)
        row |= {f"error{end}": factor * scale / m**0.5 for end, factor in quantiles}
        rows.append(row | dict.fromkeys(("seconds", "seconds_q25", "seconds_q75"), 1e-3 * m) | {"first_seed": 60 * m})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("scale", "verdict"), [(0.1, claims.NOT), (0.33, claims.REPRODUCED), (0.5, claims.PARTLY)])
def test_the_claim_of_the_speed_up_has_the_tables_numbers_and_a_verdict_by_the_interval(scale, verdict):
    table = base.checked_study(speedup_table(scale), hazelden_speedup.COLUMNS)
    with base.style():
        drawing = hazelden_speedup.draw(table)
    row = drawing.plotted.iloc[0]
    assert row["speedup"] == pytest.approx(100 / (1e-3 * (scale / 0.01) ** 2), rel=1e-6)
    assert row["speedup_low"] < row["speedup"] < row["speedup_high"] and row["seeds"] == 360
    first, last = drawing.claims
    assert first.measured == (row["speedup"], row["speedup_low"], row["speedup_high"]) and first.runs == 360
    assert (first.published, first.same, first.verdict) == (93.3, False, verdict)
    assert "to 99 % is estimated 93.3 times faster" in first.sentence() and "360 estimates" in first.sentence()
    assert last.verdict == claims.UNADDRESSED and "99.999 %" in last.sentence(), "no budget reached it"
    assert "1 call on 100 % of its columns" in first.note and "theory" not in first.note


def test_a_speed_up_to_an_accuracy_that_may_not_be_reached_has_no_lower_end():
    """The error at the largest budget is 0.99 %: in many reruns it is above 1 %."""
    table = base.checked_study(speedup_table(0.0099 * 8192**0.5), hazelden_speedup.COLUMNS)
    row = hazelden_speedup.speedups(table).iloc[0]
    assert row["speedup"] < row["speedup_high"] < math.inf and math.isnan(row["speedup_low"])


def test_the_band_of_a_speed_up_includes_the_spread_of_the_baseline():
    def width(low, high, calls):
        table = speedup_table(0.33)
        exact = table["method"] == "direct_one_by_one"
        table.loc[exact, ["seconds_q25", "seconds_q75", "calls"]] = low, high, calls
        row = hazelden_speedup.speedups(base.checked_study(table, hazelden_speedup.COLUMNS)).iloc[0]
        assert row["baseline_calls"] == calls
        return row["speedup_high"] / row["speedup_low"]

    assert width(50, 200, 5) > 2 * width(99, 101, 5)
    assert width(50, 200, 500) < width(50, 200, 5), "more calls tell the median better"


def test_a_speed_up_by_theory_is_at_the_passes_that_the_variance_requires():
    share = 0.02
    table = base.checked_study(speedup_table(0.33).assign(off_diagonal=share, n=20_000), hazelden_speedup.COLUMNS)
    rows = hazelden_speedup.speedups(table)
    tried = np.arange(6, 30_000)
    basis = tried / 6
    error = 0.6745 * np.sqrt(2 * share * (1 - 2 * basis / 20_000) / (tried - basis))
    passes = np.interp(-rows["inaccuracy"], -error, tried)  # a pass takes a millisecond
    within = pd.Series(passes, rows.index).between(8, 8192)
    np.testing.assert_allclose(rows.loc[within, "theory"], 100 / (1e-3 * passes[within]), rtol=1e-3)
    assert within.any() and not within.all() and rows.loc[~within, "theory"].isna().all()
    with base.style():
        claim = hazelden_speedup.draw(table).claims[0]
    assert f"{labels.rounded(rows['theory'].iloc[0], 3)} times by theory" in claim.note


def test_only_tasks_with_several_families_are_choices(table):
    """A family measured alone wins nothing, and a task that no method solves is kept."""
    alone = table[table["kind"] == "exact"].assign(problem="alone[N=1]")
    lost = table.assign(problem="lost[N=1]", status="timeout", reason="slow", **dict.fromkeys(MEASUREMENTS, np.nan))
    drawing = drawn_from("method_map", pd.concat([table, alone, lost]))
    chosen = drawing.plotted
    contested = chosen[chosen["measured"].str.contains(",") & (chosen["tolerance"] == "1 %")]
    assert set(chosen.loc[chosen["problem"] == "alone[N=1]", "measured"]) == {"exact"}
    assert chosen.loc[chosen["problem"] == "lost[N=1]", "method"].isna().all()
    assert drawing.title.endswith(f" of {contested['method'].notna().sum()} tasks")


@pytest.mark.parametrize(("factor", "pays"), [(0.01, False), (100.0, True)])
def test_an_estimate_pays_where_the_exact_method_takes_longer(table, factor, pays):
    seconds = [c for c in MEASUREMENTS if c.startswith("seconds")]
    slow = table.copy()
    slow.loc[slow["kind"] == "exact", seconds] *= factor
    drawing = drawn_from("time_to_accuracy", slow)
    both = drawing.plotted.pivot_table("seconds", tasks.TASK, "kind").dropna(subset=["exact", "stochastic"])
    assert len(both) and ((both["stochastic"] < both["exact"]).any() == pays)
    sure, exact, undecided = map(int, re.findall(r"on (\d+)", drawing.title))
    assert sure + exact + undecided == len(both) and (sure > 0) == pays and (exact > 0) != pays


@pytest.mark.slow
def test_same_table_same_bytes(drawn, table, tmp_path):
    """Also after the table was written to a file, and in another process with another hash seed."""
    table.to_csv(tmp_path / "table.csv", index=False)
    names = ("exact_cost", "error_against_passes")
    code = "import sys; from pathlib import Path; from ntkbench import figures; "
    code += "from ntkbench.figures.plotting import files; source, folder, *names = sys.argv[1:]; "
    code += "[figures.draw(name, files.read(Path(source)), Path(folder)) for name in names]"
    subprocess.run([sys.executable, "-c", code, tmp_path / "table.csv", tmp_path / "figures", *names], check=True)
    for path in (path for name in names for path in drawn[name]):
        assert path.read_bytes() == (tmp_path / "figures" / path.name).read_bytes()
    again = figures.draw("method_map", table, tmp_path)
    assert [a.read_bytes() for a in again] == [b.read_bytes() for b in drawn["method_map"]]


def test_devices_do_not_share_panels(table):
    twice = pd.concat([table, table.assign(device="cuda")])
    assert set(base.checked(twice)["setting"]) == {"cpu", "cuda"}
    assert set(tasks.solutions(base.checked(twice)).groupby([*tasks.LINE, "tolerance"]).size()) == {1}


def linear(colour):
    """Linear sRGB components of a colour such as ``#CC8400``."""
    shares = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)


def lab(light):
    """CIE L*a*b* of linear sRGB components, under D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ light / [0.95047, 1, 1.08883], 0))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


DEUTERANOPIA = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
"""Machado, Oliveira and Fernandes 2009, at full severity."""


@pytest.mark.parametrize("colour", [*styles.COLOURS, styles.GREY])
def test_lines_have_a_contrast_of_three_with_white_and_text_of_four_and_a_half(colour):
    contrast = 1.05 / (linear(colour) @ [0.2126, 0.7152, 0.0722] + 0.05)
    assert contrast >= (4.5 if colour == styles.GREY else 3)


@pytest.mark.parametrize("seen", [np.eye(3), DEUTERANOPIA], ids=["by all", "with deuteranopia"])
def test_colours_of_lines_can_be_told_apart(seen):
    shown = [lab(seen @ linear(colour)) for colour in styles.COLOURS]
    apart = [np.linalg.norm(one - other) for i, one in enumerate(shown) for other in shown[:i]]
    assert min(apart) > 15


def test_bad_input_is_named(table, tmp_path):
    with pytest.raises(BadInput, match="machine, seconds_q25"):
        figures.draw("coverage", table.drop(columns=["machine", "seconds_q25"]), tmp_path)
    with pytest.raises(BadInput, match="'error' of the table must hold numbers"):
        figures.draw("coverage", table.assign(error="much"), tmp_path)
    with pytest.raises(BadInput, match="did you mean 'coverage'"):
        figures.draw("coverages", table, tmp_path)


# --- degenerate tables

ALL = figures.names()
ODD = 'bad <script>alert(1)</script>, "q" $x_{$ \\alpha \N{CJK UNIFIED IDEOGRAPH-6F22}\nnew\x00line | "' + "very " * 40
"""A title or a reason as a plug-in may have it."""


@pytest.fixture(scope="module")
def source(table):
    """The table that a figure is drawn from, or part of it where it is long."""
    read = {None: table[table["problem"].isin(["digits_mlp[N=64]", "gru_hazelden[N=15,T=8]"])]}

    def of(name):
        study = figures.study_of(name)
        if study not in read:
            committed = sorted(REFERENCE.glob(f"*/studies/{study}.csv"))
            if not committed:
                pytest.skip(f"no table of the study {study} is committed")
            rows = pd.read_csv(committed[0], low_memory=False)
            read[study] = rows.iloc[:: 1 + len(rows) // 200].reset_index(drop=True)
        return read[study]

    return of


@pytest.fixture
def few_reruns(monkeypatch):
    """A short bootstrap, for tests of what can be drawn."""
    monkeypatch.setattr(laws, "RERUNS", 20)


def words(table):
    """Columns of text, other than those whose values figures interpret."""
    free = ("title", "reason", "notes", "machine", "problem", "family", "loss_title", "spectrum", "network", "task")
    return [c for c in free if c in table]


def drawn_from(name, table):
    """The figure of a table and its caption, laid out; as :func:`figures.draw` does it, without the files."""
    module = importlib.import_module(f"ntkbench.figures.{name}")
    with base.style():
        if why := base.nothing_measured(table):
            drawing = base.nothing(table, why)
        elif hasattr(module, "TABLE"):
            drawing = module.draw(base.checked_study(table, module.COLUMNS))
        else:
            drawing = module.draw(base.checked(table))
        drawing.figure.draw_without_rendering()
    return drawing


def degenerate(table):
    numbers = table.select_dtypes("number").columns
    ok = table[table["status"] == "ok"]
    odd = dict.fromkeys(words(table), ODD)
    failed = table.assign(status=np.where(table.index % 2, "failed", table["status"]), reason=ODD)
    return {
        "one row": ok.iloc[:1],
        "another row": ok.iloc[-1:],
        "not finite": ok.assign(**dict(zip(numbers, itertools.cycle((np.nan, np.inf, -np.inf)), strict=False))),
        "zero": ok.assign(**dict.fromkeys(numbers, 0)),
        "odd words": table.assign(**odd),
        "every other row failed, and further columns": failed.assign(calls=3, value_q25=np.nan, later=ODD),
    }


@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore:Glyph", "ignore:.*identical", "ignore:Attempt to set non-positive")
@pytest.mark.filterwarnings("ignore:Data has no positive values")
@pytest.mark.usefixtures("few_reruns")
@pytest.mark.slow
def test_every_figure_draws_degenerate_tables(name, source):
    """A table may be refused in one line, and no other error may be raised."""
    refused = []
    for what, rows in degenerate(source(name)).items():
        try:
            drawing = drawn_from(name, rows)
        except BadInput as error:
            refused.append((what, str(error)))
        else:
            assert drawing.caption and drawing.figure.get_size_inches().prod() < 11 * 120, what
            if not drawing.caption.startswith("Nothing to show"):
                assert len(drawing.caption.split()) <= labels.WORDS, (what, drawing.caption)
    assert {what for what, _ in refused} <= {"odd words"}, refused


def committed_table(name):
    """The committed table that a figure is drawn from, of the default profile if it has one."""
    profiles = sorted((path for path in REFERENCE.iterdir() if path.is_dir()), key=lambda path: path.name != "default")
    found = [figures.table_of(name, profile) for profile in profiles]
    path = next((path for path in found if path.exists()), None)
    if path is None:
        pytest.skip("no such table is committed")
    return pd.read_csv(path, low_memory=False)


@functools.cache
def of_committed_table(name):
    return drawn_from(name, committed_table(name))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.slow
def test_captions_have_at_most_sixty_words_and_titles_are_not_names(name):
    drawing = of_committed_table(name)
    assert len(drawing.caption.split()) <= labels.WORDS, drawing.caption
    assert "Claim (" not in drawing.caption
    if "seeds" in drawing.plotted and (drawing.plotted["seeds"] > 1).any():
        assert "seeds" in drawing.figure.texts[1].get_text(), "the subtitle says over how many"
    assert re.search(r"\d", drawing.title.split("(")[0]), "a finding has a number"


def test_captions_have_at_most_sixty_words_whatever_is_measured():
    """Four networks with different winners, lost cells, and a long reason."""
    names = ("naive_jacobian", "direct", "jacobian_contraction", "ntk_vector_products")
    sizes = [(name, f"N={N}", N, 10, 9000, 1.0) for name in ("a_b", "c_d", "e_f", "g_h") for N in (8, 64)]
    rows = synthetic(sizes, {name: METHODS[name] for name in names}, ["norm"]).query("backend == 'torch'")
    won = rows["family"].map(dict(zip(("a_b", "c_d", "e_f", "g_h"), names, strict=True))) == rows["method"]
    rows = taking(rows, rows["n"] * np.where(won, 0.01, 1.0)).assign(status="ok", memory_bytes=1e7 * rows["n"])
    rows = rows.assign(title="the exact method " + rows["title"], calls=20)
    lost = [rows.assign(title=rows["title"], status=status, N=1, n=10) for status in ("timeout", "out_of_memory")]
    caption = drawn_from("exact_cost", pd.concat([rows, *lost])).caption
    assert len(caption.split()) <= labels.WORDS and caption.count("the exact method ") == 4

    table = committed_table("novak_images")
    lost = table.index % 3 == 0
    reasons = table["reason"].astype(object).mask(lost, "a b " * 40)
    table = table.assign(status=table["status"].mask(lost, "skipped"), reason=reasons)
    caption = drawn_from("novak_images", table).caption
    assert len(caption.split()) <= labels.WORDS and "Not measured: " in caption


def test_the_first_sentences_of_a_caption_are_kept():
    long, short = "one two three " * 15 + "end.", "A short one."
    assert labels.fitted("First.", long, "", long, short) == f"First. {long} {short}"
    assert labels.fitted("word " * 60) == ("word " * 60).strip() and labels.fitted("word " * 61, short) == short
    assert labels.listed(["a", "b", "c"]) == "a and b and c" and labels.listed("abcd") == "a and b and 2 others"


DRIFTS = {"cross_entropy": 0.5, "cross_entropy_decay": 0.1, "mse": 0.9}
"""The pNTK's final difference from the last layer's kernel, by loss."""


def caption_of_drift(inits=3, **drifts):
    titles = mohamadi_drift_study.LOSSES
    rows = [
        {"loss": loss, "loss_title": titles[loss], "init": init, "step": step, "kernel": "sum_of_logits"}
        | {"title": "pNTK", "difference": 0.3, "sum_direction": 0.2, "pntk_to_last_layer": drift if step else 0.7}
        for loss, drift in drifts.items()
        for init in range(inits)
        for step in (0, 10)
    ]
    points = pd.DataFrame(rows)
    return mohamadi_drift._caption(mohamadi_drift._summary(points), pd.Series(titles))


def test_drifts_are_compared_only_with_other_losses_and_several_initialisations():
    found = "With cross-entropy, weight decay, the pNTK ends closest to it: 0.1 (0.1 to 0.1)"
    assert f"{found}, quartiles apart from all others." in caption_of_drift(**DRIFTS)
    for inits, drifts in ((1, DRIFTS), (2, DRIFTS), (3, {"mse": 0.9})):
        said = caption_of_drift(inits, **drifts)
        assert "apart" not in said and "overlap" not in said


def test_the_drift_is_explained_only_where_weight_decay_brings_it_about():
    assert "Cross-entropy's gradients" in caption_of_drift(**DRIFTS)
    for drifts in (DRIFTS | {"mse": 0.01}, {"mse": 0.9}, {"cross_entropy": 0.5, "mse": 0.9}):
        assert "Cross-entropy's gradients" not in caption_of_drift(**drifts)
    assert "ends at 0.9 (0.9 to 0.9) from it" in caption_of_drift(mse=0.9)


def test_the_published_ratio_is_that_of_the_depths_that_were_measured_alike():
    there = sources.values("mohamadi_figure1_tiny_imagenet")
    wide = there.pivot_table(index="resnet_depth", columns="kernel", values="seconds_per_pair")
    known = wide["eNTK"] / wide["pNTK"]
    rows = pd.DataFrame(
        {"depth": depth, "N": 6, "O": 200, "P": 1e6, "method": method, "seconds": seconds, "seconds_per_pair": seconds}
        for depth in (18, 34)
        for pair in mohamadi_cost.BEST.items()
        for method, seconds in zip(pair, (depth, 1.0), strict=True)
    )
    both = mohamadi_cost._claims(rows, rows, there)[0]
    assert both.published == pytest.approx(known[[18, 34]].median()) and (both.runs, both.measured[0]) == (2, 26)
    fewer = rows[(rows["method"] != mohamadi_cost.PUBLISHED["eNTK"]) | (rows["depth"] == 18)]
    (claim,) = mohamadi_cost._claims(rows, fewer, there)
    assert claim.published == pytest.approx(known[18]) and (claim.runs, claim.measured[0]) == (1, 18)
    assert claim.best[0] == 18, "of the same depths"


def test_operations_are_compared_with_the_cheaper_of_two_measured_rivals():
    points = base.measured(committed_table("novak_flops"), "flops_per_entry", "N", "O", "width")
    (before,) = novak_flops._claims(points)
    widest = points[(points["width"] == points["width"].max()) & points["method"].isin(novak_flops.OTHERS)]
    (after,) = novak_flops._claims(points.drop(widest["flops_per_entry"].idxmin()))
    assert after.runs == before.runs - 1 and before.note == ""
    assert after.note == "1 case without all three programs left out"


def test_the_loss_of_a_language_model_may_rise():
    shown = pd.DataFrame({"step": [0, 9], "loss": [1.0, 2.5], "probes": 8})
    assert "The loss goes from 1 to 2.5 nats per token." in language_training._caption(shown)


def test_the_subtitle_states_the_seeds_of_any_kind_of_method():
    rows = pd.DataFrame({"kind": ["exact", "projection"], "seeds": [1, 10]})
    place = {"status": "ok", "device": "cpu", "dtype": "float32", "threads": 1}
    place |= dict.fromkeys(("machine", "git_sha", "git_dirty"), "")
    assert "  10 seeds" in base.settings_line(rows.assign(**place))


def finding(name, table):
    """The numbers of a figure's title."""
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", drawn_from(name, table).title)]


@pytest.mark.slow
def test_titles_of_studies_have_the_tables_numbers():
    """Titles are findings: their numbers change with those of the table."""
    blog = committed_table("hazelden_blog")
    shared = (blog["method"] == claims.SHARED) & (blog["m"] == 50)
    known = blog.assign(error=blog["error"].mask(shared, 0.0123), seconds=blog["seconds"].mask(shared, 0.4))
    assert finding("hazelden_blog", known)[:3] == [50, 1.2, 400]
    assert "to a median error of 1.2 %" in drawn_from("hazelden_blog", known).title

    traces = committed_table("hazelden_trace")
    before, after = (finding("hazelden_trace", rows) for rows in (traces, traces.assign(error=3 * traces["error"])))
    assert after[:3] == pytest.approx([3 * number for number in before[:3]], rel=0.1)

    quality = committed_table("mohamadi_quality")
    steeper = quality.assign(difference=quality["difference"] / quality["width"])
    pairs = zip(finding("mohamadi_quality", steeper)[:2], finding("mohamadi_quality", quality)[:2], strict=True)
    assert all(new == pytest.approx(old - 1, abs=0.011) for new, old in pairs)

    training = committed_table("along_training")
    aligned = (training["operator"] == "Theta") & (training["quantity"] == "alignment")
    known = training.assign(value=training["value"].mask(aligned & (training["gain"] == 1), 0.25))
    known = known.assign(value=known["value"].mask(aligned & (training["gain"] == 0.5), 0.75))
    assert finding("along_training", known)[:2] == [0.75, 0.75] and finding("along_training", known).count(0.25) == 2


def test_the_map_of_estimators_names_the_one_with_most_places():
    table = committed_table("estimator_map")
    best = table["method"] == "hutchinson"
    drawing = drawn_from("estimator_map", table.assign(error=table["error"].mask(best, 1e-9), passes_spent=1))
    places = len(drawing.plotted.query("place == 1"))
    assert "Hutchinson has the least error at " in drawing.title and f"of {places} places" in drawing.title


@pytest.mark.parametrize("name", ALL)
@pytest.mark.slow
def test_no_text_is_cut_off_or_overlaps_the_title(name):
    figure = of_committed_table(name).figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    panels = [panel for panel in figure.axes if panel.get_visible()]
    texts = [*figure.texts[1:], *(text for key in figure.legends for text in key.get_texts())]
    texts += [text for panel in panels for text in (*panel.texts, panel.title, panel.xaxis.label, panel.yaxis.label)]
    title, width = figure.texts[0].get_window_extent(renderer), figure.bbox.x1
    assert title.x0 >= 0 and title.x1 <= width and title.y1 <= figure.bbox.y1
    for text in texts:
        box = text.get_window_extent(renderer)
        if text.get_text().strip():
            assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1, f"cut off: {text.get_text()}"
            assert box.y1 <= title.y0 + 1 or box.x0 > title.x1, f"beside the title: {text.get_text()}"


@pytest.mark.parametrize("name", mostly_slow(ALL, 8))
def test_tables_without_a_measured_row_say_why(name, source, tmp_path, monkeypatch):
    table = source(name)
    lost = table.assign(status="failed", reason="$x$ was not there")
    one = pd.DataFrame([{"status": "failed", "reason": "$x$ was not there", "device": "cpu"}])
    for rows, why in ((lost, "$x$ was not there"), (one, "$x$ was not there"), (table.iloc[:0], "no rows")):
        with monkeypatch.context() as patch:
            if rows is not lost:  # one picture is enough
                patch.setattr(files, "METADATA", {})
            caption = figures.draw(name, rows, tmp_path)[1].read_text(encoding="utf-8")
        assert caption.splitlines()[0].startswith(f"{labels.name_label(name)}. Nothing to show: ")
        assert why in caption.splitlines()[0]
        assert not len(pd.read_csv(tmp_path / f"{name}.csv"))


@settings(max_examples=3, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore:Glyph", "ignore:.*identical", "ignore:Attempt to set non-positive")
@pytest.mark.usefixtures("few_reruns")
@pytest.mark.slow
def test_every_figure_draws_any_part_of_its_table(name, source, data):
    table = source(name)
    seed, count = data.draw(st.integers(0, 2**16)), data.draw(st.sampled_from([1, 2, 5, 20, 100]))
    rows = table.sample(min(count, len(table)), random_state=seed).sort_index()
    numbers = [c for c in base.NUMBERS if c in rows]
    missing = data.draw(st.lists(st.sampled_from(numbers), max_size=4, unique=True))
    bad = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 0.0]))
    odd = data.draw(st.lists(st.sampled_from(words(rows)), max_size=2, unique=True))
    holes = np.random.default_rng(seed).random(len(rows)) < data.draw(st.sampled_from([0.3, 1.0]))
    for column in missing:
        rows[column] = rows[column].astype(float).mask(holes, bad)
    for column in odd:
        rows[column] = rows[column].astype(object).mask(holes, ODD)
    try:
        drawn_from(name, rows)
    except BadInput as error:
        assert "no panel to draw" in str(error)


# --- all figures in one process


@pytest.fixture
def dropped_in(tmp_path, monkeypatch):
    """A function that adds a figure's file."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    monkeypatch.setattr(figures, "__path__", [*figures.__path__, str(folder)])
    added = []

    def add(name, text):
        (folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        added.append(name)

    yield add
    for name in added:
        sys.modules.pop(f"ntkbench.figures.{name}", None)
        figures.__dict__.pop(name, None)


def test_dropped_in_figure_is_found(table, tmp_path, dropped_in):
    dropped_in("own", "from ntkbench.figures.plotting import base\ndraw = lambda table: base.nothing(table, 'no')")
    dropped_in("of_a_study", "TABLE = 'novak_flops'\nCOLUMNS = ()\nimport nowhere\ndraw = len")
    assert {"own", "of_a_study"} <= set(figures.names())
    assert figures.draw("own", table, tmp_path)[0].name == "own.csv"
    assert figures.study_of("of_a_study") == "novak_flops" and figures.study_of("own") is None


@pytest.mark.slow
def test_a_figure_that_fails_is_drawn_as_such_and_the_others_are_drawn(table, tmp_path, dropped_in):
    bodies = {
        "exits": "import sys; sys.exit('bye')",
        "ends_its_process": "import os; os._exit(0)",
        "raises": "raise ValueError('<b> $x_ \\udcff\\nsecond line')",
        "returns_nothing": "return None",
        "breaks_when_rendered": "d = base.nothing(table, 'no'); d.figure.text(0, 0, '$x_$'); return d",
    }
    for name, body in bodies.items():
        dropped_in(name, f"from ntkbench.figures.plotting import base\ndef draw(table):\n    {body}\n")
    dropped_in("cannot_be_imported", "draw = len\nraise SystemExit(3)")
    dropped_in("needs_a_column", "TABLE = 'novak_flops'\nCOLUMNS = ('nowhere',)\ndef draw(table): pass")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00,\x80\n\x81")
    table.to_csv(tmp_path / "table.csv", index=False)
    tables = dict.fromkeys([*bodies, "cannot_be_imported", "needs_a_column", "coverage", "exact_cost"], "table.csv")
    tables |= {"time_to_error": "empty.csv", "method_map": "binary.csv", "time_to_accuracy": "nowhere.csv"}

    made = figures.draw_all({name: tmp_path / table for name, table in tables.items()}, tmp_path / "out")
    assert list(made) == list(tables)
    failed = {name: outcome.reason for name, outcome in made.items() if outcome.status == "failed"}
    assert set(made) - set(failed) == {"coverage", "exact_cost"}
    assert failed["ends_its_process"] == "the process that draws it died"
    assert failed["exits"] == "SystemExit: bye" and "cannot_be_imported.py:2" in failed["cannot_be_imported"]
    assert failed["raises"].startswith("ValueError: <b> $x_ ") and "AttributeError" in failed["returns_nothing"]
    assert "lacks columns that this figure needs: nowhere" in failed["needs_a_column"]
    assert "is empty" in failed["time_to_error"] and "nowhere.csv" in failed["time_to_accuracy"]
    for name, reason in failed.items():
        assert (tmp_path / "out" / f"{name}.txt").read_text(encoding="utf-8") == (
            f"{labels.name_label(name)}. Could not be drawn: {reason}\n"
        )
        assert list(pd.read_csv(tmp_path / "out" / f"{name}.csv")["reason"]) == [reason]
        assert all((tmp_path / "out" / f"{name}.{kind}").stat().st_size > 1000 for kind in ("png", "pdf"))

    page = report.page(sorted((tmp_path / "out").glob("*.png")), "All")
    assert page.count('class="failed"') == page.count("<em>could not be drawn</em>") == len(failed)
    assert "&lt;b&gt; $x_" in page and "<b>" not in page
    assert len(re.findall("<figure ", page)) == len(made)


def test_figures_are_drawn_on_systems_without_fork(table, tmp_path, monkeypatch):
    monkeypatch.delitem(multiprocessing.context._concrete_contexts, "fork")
    table.to_csv(tmp_path / "table.csv", index=False)
    made = figures.draw_all({"exact_cost": tmp_path / "table.csv"}, tmp_path / "out")
    assert made["exact_cost"].status == "ok"
    assert (tmp_path / "out" / "exact_cost.png").stat().st_size > 1000


def test_an_interrupt_ends_the_drawing(table, tmp_path, dropped_in):
    dropped_in("interrupted", "def draw(table):\n    raise KeyboardInterrupt\n")
    table.to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(KeyboardInterrupt):
        figures.draw_all({"interrupted": tmp_path / "table.csv"}, tmp_path)


@pytest.mark.filterwarnings("ignore:Glyph")  # matplotlib's font has no Chinese
def test_titles_from_outside_are_escaped_in_html(table, tmp_path):
    made = figures.draw("exact_cost", table.assign(**dict.fromkeys(words(table), ODD)), tmp_path)
    page = report.page([made[2]], ODD)
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_a_process_reads_a_table_once(table, tmp_path, monkeypatch, dropped_in):
    table.to_csv(tmp_path / "table.csv", index=False)
    for name in ("first", "second"):
        dropped_in(name, "from ntkbench.figures.plotting import base\ndraw = lambda table: base.nothing(table, 'no')")
    reads, read = [], pd.read_csv
    monkeypatch.setattr(pd, "read_csv", lambda path, **how: reads.append(path) or read(path, **how))
    made = figures._draw_some(dict.fromkeys(["first", "second"], tmp_path / "table.csv"), tmp_path)
    assert {outcome.status for outcome, _ in made.values()} == {"ok"}
    assert reads.count(tmp_path / "table.csv") == 1


# --- looks and words


def test_looks_do_not_change_as_methods_are_added():
    many = METHODS | {f"later_{i}": (f"later {i}", "stochastic", BOTH, METRICS, 0.1) for i in range(20)}
    few, all_of_them = (styles.looks(synthetic(PROBLEMS[:1], methods)) for methods in (METHODS, many))
    assert list(all_of_them)[: len(few)] == list(few)
    assert all(all_of_them[method] == look for method, look in few.items())
    assert len({(look.colour, look.marker) for look in all_of_them.values()}) == len(many)
    alone = styles.looks(synthetic(PROBLEMS[:1], {"later_0": many["later_0"]}))
    assert alone["later_0"] == all_of_them["later_0"]
    assert labels.name_label("gru_hazelden[N=15,T=50]") == "GRU hazelden, N = 15, T = 50"


def test_no_two_methods_look_alike():
    every = {name: (methods.get(name).title, methods.get(name).kind) for name in methods.names()}
    rows = pd.DataFrame([(name, *said) for name, said in every.items()], columns=["method", "title", "kind"])
    found = styles.looks(rows)
    assert len({(look.colour, look.marker) for look in found.values()}) == len(every)
    for name, (_, kind) in every.items():
        assert found[name].marker in styles.MARKERS[kind]


def test_figures_import_no_backend_and_listing_them_nothing_heavy():
    code = "import importlib, sys, ntkbench.figures as f; [f.study_of(name) for name in f.names()]; "
    code += "heavy = {'torch', 'jax', 'matplotlib', 'pandas', 'numpy'} & set(sys.modules); "
    code += "[importlib.import_module(f'ntkbench.figures.{name}') for name in f.names()]; "
    code += "sys.exit(', '.join(heavy | {'torch', 'jax'} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_figure_imports_no_other():
    code = "import sys, ntkbench.figures as f; from ntkbench.figures import exact_cost; "
    names = "{name.rpartition('.')[2] for name in sys.modules if name.startswith('ntkbench.figures.')} & {*f.names()}"
    done = subprocess.run([sys.executable, "-c", f"{code}print({names})"], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "{'exact_cost'}"


def test_numbers_in_sentences_have_no_exponents():
    said = {8794.0: "8800", 118.2: "120", 0.00432: "0.0043", 1.0: "1", 0.0994: "0.099"}
    assert {value: labels.rounded(value) for value in said} == said
    assert labels.rounded(8794, 3) == "8790" and labels.share_label(0.00131) == "0.13 %"


def test_large_counts_have_the_unit_in_which_they_round_to_at_least_one():
    said = {640: "640", 9999: "9999", 85_002: "85 k", 999_499: "999 k", 999_700: "1 M", 1_234_567: "1.23 M"}
    said |= {999_700_000: "1 G", 999_700_000_000: "1 T"}
    assert {count: labels.count_label(count) for count in said} == said


def test_long_reasons_lose_their_brackets():
    reason = "no data, " + "since it was not there " * 4 + "(URLError: <urlopen error (nested)>)"
    rows = pd.DataFrame({"status": ["skipped", "skipped"], "reason": [reason, "over the limit (6 GiB)"]})
    said = labels.why_not(rows)
    assert "URLError" not in said and "since it was not there\n" in said and "(6 GiB)" in said
