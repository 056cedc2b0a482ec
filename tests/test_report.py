"""The report of a run: the answer, all cells, checks and provenance."""

from __future__ import annotations

import functools
import html
import re

import numpy as np
import pandas as pd
import pytest

from ntkbench import figures, paths
from ntkbench.estimators.spectrum import Spectrum
from ntkbench.figures.plotting import base, quality, report, tasks
from ntkbench.metrics import OF_KERNEL

SETTINGS = {"device": "cpu", "dtype": "float32", "threads": 2, "machine": "here", "git_sha": "a" * 40}
SETTINGS |= {"git_dirty": "False", "versions": "torch 2", "python": "3.11"}


def cell(**given):
    """A row of the results table."""
    row = {"problem": "small", "family": "small", "N": 4, "O": 2, "P": 20, "n": 8, "method": "naive_jacobian"}
    row |= {"title": "naive Jacobian", "kind": "exact", "backend": "torch", "metric": "trace", "passes": np.nan}
    row |= {"status": "ok", "reason": "", "seconds": 1.0, "seconds_q25": 0.9, "seconds_q75": 1.1, "calls": 5}
    row |= {"passes_spent": 8, "value": 10.0, "reference": 10.0, "error": 1e-7, "error_q25": 1e-7, "error_q75": 1e-7}
    row |= {"effective_rank": 3.0, "seeds": 1, "covered": np.nan, "memory_bytes": 2.0**20}
    return row | SETTINGS | given


def stochastic(passes: int, **given):
    estimate = {"method": "hutchinson", "title": "Hutchinson", "kind": "stochastic", "passes": passes, "seeds": 20}
    error = 0.3 * passes**-0.5
    errors = {"error": error, "error_q25": error / 2, "error_q75": 2 * error, "covered": 0.95}
    return cell(
        **{**estimate, **errors, "seconds": passes / 100, "seconds_q25": passes / 110, "seconds_q75": passes / 95}
        | given
    )


@pytest.fixture
def table():
    rows = [cell(), *(stochastic(passes) for passes in (16, 64, 256))]
    rows += [cell(problem="other", value=3.0, reference=3.0), cell(problem="large", n=800, N=400, status="timeout")]
    rows += [cell(method="xtrace", status="skipped", reason="gives <b>nothing</b>")]
    rows[-1] |= dict.fromkeys(("seconds", "error", "value"), np.nan)
    rows[-2] |= dict.fromkeys(("seconds", "error", "value"), np.nan) | {"reason": "took 60 s"}
    return base.checked(pd.DataFrame(rows))


def found(table, title):
    return next(check for check in quality.checks(table) if check.title.startswith(title))


def test_the_answer_has_every_problem_and_a_hole_where_nothing_is_reached(table):
    (trace,) = report.answer(table)
    assert [row["problem"] for row in trace["rows"]] == ["other", "small", "large"]
    small, large = trace["rows"][1], trace["rows"][2]
    best = [found for (found,) in (shown["best"] for shown in small["cells"])]
    assert [found["method"] for found in best] == ["hutchinson", *["naive_jacobian"] * 3]
    assert [(shown["best"], shown["hole"]) for shown in large["cells"]] == [([], "not measured")] * len(
        tasks.TOLERANCES
    )
    assert large["methods"] == "" and [shown["span"] for shown in large["cells"]] == [4, 0, 0, 0]
    assert [shown["span"] for shown in small["cells"]] == [1, 3, 0, 0], "neighbours with the same call are one cell"
    assert "took 60 s" in large["reason"] and small["reason"] == "" and small["sizes"] == "N 4, O 2, P 20"
    assert best[0]["call"].startswith('ntkbench.trace(model, x, method="hutchinson", passes=')
    assert best[1]["call"] == 'ntkbench.trace(model, x, method="naive_jacobian")'
    assert "60 seeds" in best[0]["facts"] and " (95 %)" in best[0]["facts"]


def test_the_memory_of_an_answer_is_that_of_its_budget(table):
    """Hutchinson reaches 5 % with 36 passes, and 2 % with 225: larger budgets do not count."""
    rows = table[table["method"] == "hutchinson"]
    rows = rows.assign(memory_bytes=rows["passes"].map({16: 2.0**20, 64: 3 * 2.0**20, 256: 2.0**30}))
    won = tasks.winners(base.checked(rows), {"5 %": 0.05, "2 %": 0.02}).set_index("tolerance")
    assert 16 < won.loc["5 %", "passes"] < 64 < won.loc["2 %", "passes"] < 256
    assert report._memory(won.loc["5 %"], rows) == 3 * 2**20 and report._memory(won.loc["2 %"], rows) == 2**30
    assert "3 MiB" in report._choice(won.loc["5 %"], rows)["facts"]


def test_where_no_exact_method_was_measured_a_hole_says_so(table):
    def holes(rows):
        (trace,) = report.answer(rows)
        return [shown["hole"] for row in trace["rows"] if row["problem"] == "small" for shown in row["cells"]]

    table = table[table["method"] != "xtrace"]
    assert holes(table) == [""] * 4
    lost = table["method"] == "naive_jacobian"
    within, one, tenth, exact = holes(table[~lost])
    assert within == "" and one == tenth == "not reached by estimates; no exact method measured"
    assert exact == "no exact method measured"
    skipped = table.assign(status=table["status"].mask(lost, "skipped"), reason=table["reason"].mask(lost, "too large"))
    assert holes(skipped)[3] == "no exact method measured (1 skipped: too large)"
    off = table.assign(error=table["error"].mask(lost, 0.5))
    assert holes(off)[3] == "not reached", "an exact method was measured, and is off"
    (trace,) = report.answer(table[~lost])
    assert trace["rows"][0]["methods"] == "1 method that states an error, none exact"


def test_every_backend_has_its_answer_and_that_of_torch_comes_first(table):
    faster = [cell(backend="jax", method="nt_jacobian_contraction", seconds=0.01, seconds_q25=0.01, seconds_q75=0.01)]
    faster += [faster[0] | {"problem": "only"}, cell(problem="only", error=0.5)]
    (trace,) = report.answer(base.checked(pd.concat([table, pd.DataFrame(faster)], ignore_index=True)))
    rows = {row["problem"]: row["cells"][1] for row in trace["rows"]}
    assert [found["backend"] for found in rows["small"]["best"]] == ["torch", "jax"] and rows["small"]["hole"] == ""
    assert rows["small"]["best"][0]["call"].startswith("ntkbench.trace(model, x")
    (found,) = rows["only"]["best"]
    assert found["title"].endswith(" in JAX") and rows["only"]["hole"] == "PyTorch: not reached"


@pytest.mark.parametrize(
    ("errors", "spans"),
    [
        ({64: 1e-6}, [3, 0, 0, 1]),  # the exact method has its own cell
        ({16: 5e-2, 64: 5e-3, 256: 5e-4}, [1, 1, 1, 1]),  # each tolerance has its own budget
    ],
)
def test_neighbours_share_a_cell_only_with_the_same_method_and_budget(errors, spans):
    """The call of this metric names neither a method nor a budget."""
    metric = {"metric": "largest_eigenvalue"}
    rows = [cell(**metric, **dict.fromkeys(("seconds", "seconds_q25", "seconds_q75"), 99.0))]
    rows += [
        stochastic(passes, **metric, method="block_lanczos", error=error, error_q25=error / 2, error_q75=2 * error)
        for passes, error in errors.items()
    ]
    (found,) = report.answer(base.checked(pd.DataFrame(rows)))
    (row,) = found["rows"]
    assert [shown["span"] for shown in row["cells"]] == spans
    best = [shown["best"][0] for shown in row["cells"]]
    assert [choice["method"] for choice in best] == [*["block_lanczos"] * 3, "naive_jacobian"]
    assert {choice["call"] for choice in best} == {"ntkbench.spectrum(model, x).largest  # ntkbench chooses the method"}


def test_methods_without_a_stated_error_are_not_in_the_answer(table):
    biased = table[table["method"] == "naive_jacobian"].assign(method="sum_of_logits", kind="approximate", seconds=1e-3)
    (trace,) = report.answer(pd.concat([table, biased], ignore_index=True))
    assert "sum_of_logits" not in str(trace)


def test_calls_are_valid_python():
    spectrum = report._call(
        pd.Series({"method": "m", "kind": "exact", "metric": "condition_number", "backend": "torch", "passes": np.nan})
    )
    assert spectrum == "ntkbench.spectrum(model, x).condition_number  # ntkbench chooses the method"
    for metric in OF_KERNEL:
        for backend in tasks.CALLS:
            line = tasks.call(metric, backend, 'method="m"')
            compile(line, "call", "eval")
            assert line.endswith("  # ntkbench chooses the method") and "method=" not in line
    for metric in tasks.OF_SPECTRUM.values():
        assert metric in dir(Spectrum) or metric in Spectrum.__dataclass_fields__
    for metric, backend in (("norm", "torch"), ("alignment", "torch"), ("trace", "jax"), ("alignment", "jax")):
        winner = pd.Series({"method": "m", "kind": "exact", "passes": np.nan, "metric": metric, "backend": backend})
        call = report._call(winner)
        compile(call, "call", "eval")
        assert call.startswith(f"ntkbench.{metric}(") and call.endswith('method="m")')


def test_missing_cells_are_an_error_only_if_they_failed(table):
    assert found(table, "Cells without").severity == "warning"
    assert found(table.assign(status=table["status"].replace("timeout", "failed")), "Cells without").severity == "error"
    assert found(table[table["status"] != "timeout"], "Cells without").severity == "note"
    assert found(table[table["status"] == "ok"], "Cells without").severity == "passed"
    assert any("took 60 s" in case for case in found(table, "Cells without").cases)


def test_an_exact_method_off_the_reference_is_an_error(table):
    assert found(table, "Exact methods").severity == "passed"
    wrong = table.assign(value=table["value"].where(table["problem"] != "other", 3.01))
    check = found(wrong, "Exact methods")
    assert check.severity == "error" and check.cases == ("other, trace, naive_jacobian in torch",)


def test_the_control_notices_references_of_other_problems(table):
    check = found(table, "Control: references")
    assert check.severity == "passed" and check.text.startswith("2 of 2")
    same = table.assign(reference=10.0, value=table["value"].where(table["value"].isna(), 10.0))
    assert found(same, "Control: references").severity == "note", "references that cannot be told apart"
    blind = table.assign(value=table["value"].where(table["problem"] != "other", 10.0))
    assert found(blind, "Control: references").severity == "error", "a value that the check does not find off"
    assert found(table[table["problem"] == "small"], "Control: references").severity == "note"


def test_the_control_tells_a_shuffled_kernel_from_an_exact_one(table, monkeypatch):
    title = "Control: an exact kernel"
    check = found(table, title)
    assert check.severity == "passed" and check.text == (
        "Of 1 metrics, 1 agree with a known kernel in float32, and 1 disagree with it if its samples are shuffled on "
        "one side."
    )
    every = pd.concat([table, *(table.assign(metric=name) for name in ("norm", "effective_rank", "alignment"))])
    assert found(every, title).severity == "passed" and "4 agree" in found(every, title).text
    assert (
        "3 disagree" in found(every, title).text
        and "(not norm, the only metric of 0 problems)" in found(every, title).text
    )
    alone = found(table.assign(metric="norm"), title)
    assert alone.severity == "note" and alone.cases == ("other", "small"), "shuffled samples would not be noticed"
    of_kernel = found(table.assign(metric="largest_eigenvalue"), title)
    assert of_kernel.severity == "note" and "none of the metrics trace" in of_kernel.text
    monkeypatch.setattr(quality, "OFF", dict.fromkeys(quality.OFF, 10.0))
    assert found(table, title).severity == "error", "a check that finds nothing off"


def test_intervals_that_cover_too_often_are_a_warning(table):
    many = table.assign(seeds=table["seeds"].where(table["kind"] != "stochastic", 400))
    assert found(many, "Coverage").severity == "passed"
    wide = many.assign(covered=many["covered"].where(many["passes"] != 64, 1.0))
    check = found(wide, "Coverage")
    assert check.severity == "warning" and check.text.endswith("in 0 of 3 cells, and higher in 1.")
    assert "64 passes: 100 % of 400" in check.cases[0]
    exact = wide.assign(error=wide["error"].where(wide["passes"] != 64, 1e-7))
    assert found(exact, "Coverage").severity == "passed", "all intervals of an exact estimate hold"


def test_intervals_that_miss_too_often_are_a_warning(table):
    assert found(table, "Coverage").severity == "passed"
    low = found(table.assign(covered=table["covered"].where(table["passes"] != 64, 0.5)), "Coverage")
    assert low.severity == "warning" and len(low.cases) == 1 and "64 passes: 50 % of 20" in low.cases[0]
    assert found(table.drop(columns="covered"), "Coverage").severity == "note"
    assert found(table.assign(seeds=0, covered="?"), "Coverage").severity == "note"
    assert found(table.assign(value=np.nan), "Exact methods").severity == "note"


def test_noisy_timings_are_noted(table):
    assert found(table, "Noise").severity == "passed"
    assert found(table.assign(seconds_q75=2.0), "Noise").severity == "note"
    assert found(table.assign(seconds_q75=2.0, calls=1), "Noise").severity == "note"
    assert found(table.drop(columns="calls"), "Noise").severity == "note"


def test_uncommitted_changes_are_a_warning(table):
    assert found(table, "Where").severity == "passed"
    assert found(table.assign(git_dirty="True"), "Where").severity == "warning"
    assert found(table.assign(machine=["a", *["b"] * (len(table) - 1)]), "Where").severity == "note"


def test_the_page_of_a_run_has_its_sections_in_order(table, tmp_path):
    (tmp_path / "studies").mkdir()
    table.to_csv(tmp_path / "table.csv", index=False)
    study = pd.DataFrame([{"status": "ok", "reason": "", "git_sha": "b" * 40, "git_dirty": True}])
    study.to_csv(tmp_path / "studies" / "some_study.csv", index=False)
    picture = figures.draw("coverage", pd.read_csv(tmp_path / "table.csv"), tmp_path / "figures")[2]
    page = report.page([picture], "A run", [tmp_path / "table.csv", tmp_path / "studies" / "some_study.csv"])
    order = [page.index(f'<h2 id="{name}">') for name in ("answer", "cells", "checks", "provenance", "appendix")]
    assert order == sorted(order) and 'id="papers"' not in page and 'id="figures"' not in page
    assert page.count('class="hole"') == 1 and page.count('<td class="hole" colspan="4">') == 1
    assert page.count("<tr><td data-key=") == len(table)
    assert "gives &lt;b&gt;nothing&lt;/b&gt;" in page
    text = re.sub(r"<[^>]+>", " ", html.unescape(page))
    assert "study some study" in text and "with uncommitted changes" in text and "bbbbbbbbbb" in text
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    named = re.findall(r'(?:href="#|aria-labelledby="|aria-describedby=")([^"]+)"', page)
    assert set(named) <= set(ids)
    assert not re.search(r'(?:src|href)="https?:', page), "no request leaves the page"


def test_a_run_without_results_has_a_page(tmp_path):
    pd.DataFrame([cell(status="failed", reason="no")]).to_csv(tmp_path / "table.csv", index=False)
    page = report.page([], "Nothing", [tmp_path / "table.csv"])
    assert page.count('class="hole"') == 1 and '<li class="error">' in page
    assert "<h2" not in report.page([], "No table")


@pytest.mark.slow
def test_signature_figures_come_before_the_cells_and_the_others_after(table, tmp_path):
    table.to_csv(tmp_path / "table.csv", index=False)
    names = ("coverage", "method_map", "time_to_accuracy")
    made = [figures.draw(name, pd.read_csv(tmp_path / "table.csv"), tmp_path / "figures")[2] for name in names]
    page = report.page(made, "A run", [tmp_path / "table.csv"], folder=tmp_path)
    places = ("answer", "figures", "method_map", "time_to_accuracy", "cells", "provenance", "appendix", "coverage")
    order = [re.search(rf'<(?:h2|figure) id="{name}"', page).start() for name in places]
    assert order == sorted(order)
    assert page.count('<a href="table.csv">table</a>') == len(names), "each figure has a link to its table"
    assert "../" not in "".join(re.findall('href="([^"]*)"', report.page(made, "x", folder=tmp_path / "elsewhere")))


def test_titles_of_figures_are_their_headings_and_alternative_texts(table, tmp_path):
    picture = figures.draw("coverage", table, tmp_path)[2]
    title = re.search("^Title: (.*)$", picture.with_suffix(".txt").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert title.startswith("95.0 % of the 95 % intervals contain the exact value")
    page = report.page([picture], "One")
    assert f'<h3 id="coverage-name">{title}</h3>' in page and f'alt="{title}"' in page
    nothing = figures.draw("coverage", table.drop(columns="covered"), tmp_path)[2]
    assert '<h3 id="coverage-name">coverage</h3>' in report.page([nothing], "One")


@functools.cache
def committed():
    """The committed table, and its answer."""
    table = base.checked(pd.read_csv(paths.REFERENCE / "default" / "table.csv", low_memory=False))
    return table, report.answer(table)


@pytest.mark.slow
def test_the_committed_table_has_no_errors():
    table, answer = committed()
    assert "error" not in {check.severity for check in quality.checks(table)}
    assert [part["metric"] for part in answer] == ["trace", "norm", "effective rank", "alignment"]


@pytest.mark.slow
def test_the_committed_report_is_of_the_committed_table():
    page = (paths.REFERENCE / "report.html").read_text(encoding="utf-8")
    table, answer = committed()
    assert page.count("<tr><td data-key=") == len(table) and len(page) < 5 * 2**20
    cells = [shown for part in answer for row in part["rows"] for shown in row["cells"]]
    calls = [found["call"] for shown in cells for found in shown["best"]]
    assert all(html.escape(call, quote=True).replace("&quot;", "&#34;") in page for call in calls)
    assert 'href="figures/' not in page, "no folder of figures is committed beside it"
    links = set(re.findall('href="([^"#][^"]*)"', page))
    assert links and all((paths.REFERENCE / link).exists() for link in links)


def test_the_committed_report_has_the_committed_verdicts():
    page = (paths.REFERENCE / "report.html").read_text(encoding="utf-8")
    verdicts = pd.read_csv(paths.REFERENCE / "claims.csv")["verdict"]
    said = re.findall(r'<td class="verdict [^"]*">([^<]*)</td>', page)
    assert sorted(said) == sorted(verdicts)
    assert "Verdicts are by these tables: " in page


def test_peaks_below_the_resolution_are_not_zero(table):
    few = table.assign(memory_bytes=0.0)
    found = [cell for answer in report.answer(base.checked(few)) for cell in answer["rows"]]
    assert found and " 0 KiB" not in str(found) and "below 100 KiB" in str(found)
