"""Budgets that reach an error, and methods measured in turn at these budgets."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from ntkbench import methods, operators, problems, studies
from ntkbench.cost.machine import Machine
from ntkbench.errors import DidNotTrain, Unavailable
from ntkbench.estimate import Estimate
from ntkbench.figures import time_to_error as figure
from ntkbench.figures.plotting import base as sheets
from ntkbench.measure.seeds import Reruns
from ntkbench.problems.base import reference
from ntkbench.studies import base, time_to_error
from ntkbench.studies.time_to_error import Entrant, Goal, Truth

LABEL = "mlp_hazelden[N=2]"
SOME = {"hutchinson", "hutchpp", "one_sided_paper_reverse", "one_sided_reverse", "per_sample_trace", "xtrace"}
SOME |= {"structured_block_u_statistics"}
LEFT_OUT = {"nt_jacobian_contraction", "nt_ntk_vector_products"}
NAMES = [name for name in methods.names() if methods.get(name).kind != "stochastic" or name in SOME]
NAMES = sorted({*NAMES} - LEFT_OUT)
"""Methods of all kinds, but few stochastic ones and one of neural-tangents: JAX compiles programs for each budget."""
GIVEN = {"threads": 1, "device": "cpu", "seeds": 9, "looks": 8, "calls": 3}


def run(*goals: dict, **changes: object) -> pd.DataFrame:
    return studies.run("time_to_error", studies.settings("time_to_error", GIVEN | {"goals": list(goals)} | changes))


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    goal = {"problem": LABEL, "metric": "trace", "error": 0.1, "patience_s": 30}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "names", lambda: NAMES)
        return run(goal, limits={"passes": 127}).set_index(["method", "backend"])


@pytest.mark.slow
def test_every_method_and_backend_is_a_row_with_a_budget_or_a_reason(table):
    able = [methods.get(name) for name in NAMES if "trace" in methods.get(name).metrics]
    assert list(table.index) == [(method.name, backend) for method in able for backend in method.backends]
    done = table[table["status"] == "ok"]
    assert (done["seconds"] > 0).all() and (done["calls"] == 3).all()
    stochastic = done["kind"] == "stochastic"
    budgets = done[stochastic]
    assert set(budgets["seeds"]) <= {9, 8} and set(done.loc[~stochastic, "seeds"]) == {1}
    assert (done.loc[~stochastic, "error"] <= 0.1).all() and (budgets["error"] <= 0.4).all()
    assert (budgets["passes_spent"] <= budgets["passes"]).all() and (budgets["law_seeds"] >= 17).all()
    assert ((budgets["passes_low"] <= budgets["passes"]) & ~(budgets["passes_high"] < budgets["passes"])).all()
    left = table[table["status"] != "ok"]
    assert set(left["status"]) == {"skipped"} and left["reason"].str.len().all() and left["seconds"].isna().all()
    assert pd.isna(table.loc[("structured_derivatives", "torch"), "passes"])
    assert table.loc[("direct", "torch"), "reason"] == "would take 256 passes, over limits.passes (127)"


@pytest.mark.slow
def test_a_kernel_for_logits_is_not_scored_on_states(table):
    kernels = {name for name in methods.names() if methods.get(name).kind == "approximate"}
    assert set(table.loc[[*kernels], "reason"]) == {"approximates Theta for logits only, and these outputs are states"}


@pytest.mark.slow
def test_other_backends_take_the_budget_of_the_first_and_its_band(table):
    both = table[(table["status"] == "ok") & (table["kind"] == "stochastic")].groupby("method")
    shared = [rows for _, rows in both if len(rows) == 2]
    taken = [rows for rows in shared if list(rows["seeds"]) == [9, 8]]
    assert len(shared) >= 5 and len(taken) >= 0.8 * len(shared), "a budget is contradicted by chance in 5 % of cases"
    assert all(rows[column].nunique() == 1 for rows in taken for column in ("passes", "passes_low"))


@pytest.mark.slow
def test_ratios_are_to_the_fastest_published_method_of_all_papers(table):
    published = table[table["published"] & table["seconds"].notna()]
    assert {"jax", "torch"} == set(published.index.get_level_values("backend"))
    assert "nt_structured_derivatives" in published.index
    rival = published["seconds"].idxmin()
    assert set(zip(table["rival"].dropna(), table["rival_backend"].dropna(), strict=True)) == {rival}
    assert tuple(table.loc[rival, ["ratio", "ratio_low", "ratio_high"]]) == (1, 1, 1)
    timed = table[table["ratio"].notna()]
    assert ((timed["ratio_low"] <= timed["ratio"]) & ~(timed["ratio_high"] < timed["ratio"])).all()


def test_all_methods_are_published_but_those_that_this_suite_proposes():
    """An implementation of a published method with the same products is not a method of this suite."""
    assert {name for name in methods.names() if methods.get(name).is_own} == {
        "block_u_statistics",
        "gram_forward",
        "gram_reverse",
        "group_u_statistics",
        "hutchpp_adaptive",
        "hutchpp_adaptive_forward",
        "hutchpp_one_sided",
        "nystrom_loo",
        "parameter_gram",
        "per_sample_trace",
        "per_sample_trace_forward",
        "recurrent_exact_trace",
        "sample_subset",
        "structured_block_u_statistics",
        "structured_derivatives",
        "structured_sum_of_logits",
        "wide_head",
        "wide_head_u_statistics",
    }


def a_row(name, published=True, low=None, high=None):
    passes = None if low is None else 100
    return {"method": name, "backend": "torch", "published": published, "seconds": 1.0, "passes": passes} | {
        "passes_low": low,
        "passes_high": high,
    }


def test_ratios_are_of_the_same_round():
    rows = [a_row("hutchpp"), a_row("ours", False), a_row("broken")]
    time_to_error._add_ratios(rows, [[1.0, 2.0, 30.0], [0.5, 1.0, 15.0], []])
    assert [row.get("ratio") for row in rows] == [1.0, 0.5, None]
    assert rows[1]["ratio_q75"] == 0.5 and rows[1]["rival"] == "hutchpp" and "rival" not in rows[2]
    assert rows[1]["ratio_low"] == rows[1]["ratio_high"] == 0.5, "neither budget nor times vary"


def test_a_ratio_is_as_uncertain_as_both_budgets():
    rows = [a_row("hutchpp", low=50, high=200), a_row("ours", False, low=80, high=100)]
    time_to_error._add_ratios(rows, [[1.0] * 3, [0.5] * 3])
    assert rows[1]["ratio_low"] == pytest.approx(0.5 * math.exp(-math.hypot(math.log(0.8), math.log(2))))
    assert rows[1]["ratio_high"] == pytest.approx(1.0)
    rows = [a_row("hutchpp", low=50, high=math.nan), a_row("ours", False, low=80, high=100)]
    time_to_error._add_ratios(rows, [[1.0] * 3, [0.5] * 3])
    assert rows[1]["ratio_low"] is None and rows[1]["ratio_high"] == pytest.approx(1.0), "the rival's may be any larger"


@pytest.mark.parametrize(("calls", "quantile"), [(3, 4.302653), (15, 2.144787)])
def test_a_ratio_is_as_uncertain_as_its_calls_by_students_t(calls, quantile):
    times = list(np.exp(np.linspace(-1, 1, calls)))
    rows = [a_row("hutchpp"), a_row("ours", False)]
    time_to_error._add_ratios(rows, [[1.0] * calls, times])
    half = quantile * np.log(times).std(ddof=1) * math.sqrt(math.pi / 2 / calls)
    assert (rows[1]["ratio_low"], rows[1]["ratio_high"]) == pytest.approx((math.exp(-half), math.exp(half)), rel=1e-5)


@pytest.mark.parametrize("calls", [1, 2])
def test_the_interval_of_a_ratio_is_not_known_from_one_or_two_calls(calls):
    rows = [a_row("hutchpp"), a_row("ours", False)]
    time_to_error._add_ratios(rows, [[1.0] * calls, [0.5] * calls])
    assert rows[1]["ratio"] == 0.5 and (rows[1]["ratio_low"], rows[1]["ratio_high"]) == (None, None)
    assert (rows[0]["ratio_low"], rows[0]["ratio_high"]) == (1, 1), "of the rival to itself"


@pytest.mark.parametrize("name", ["seeds", "looks"])
def test_too_few_estimates_to_contradict_a_budget_are_refused(name):
    goal = Goal(problem=LABEL, metric="trace", error=0.5)
    entrant = Entrant(time_to_error.Settings(threads=1), goal, None, "hutchinson")
    for count in (5, 6):
        tried = Reruns(1.0, "float64")
        tried.estimates = [Estimate(2.0, 0.1, 1, "hutchinson", (), "trace")] * count
        assert entrant._is_too_small(tried) == (count == 6)
    assert getattr(time_to_error.Settings.model_validate({name: 6, "threads": 1}), name) == 6
    with pytest.raises(ValidationError, match="greater than or equal to 6"):
        time_to_error.Settings.model_validate({name: 5, "threads": 1})


def test_preparations_are_freed_after_each_search(monkeypatch):
    """Each fits in memory alone. Those of the methods that reach the goal are made again for their turns."""
    held, most, when = [0], {"search": 0, "in turn": 0}, ["search"]

    class Held:
        def __init__(self):
            held[0] += 1
            most[when[0]] = max(most[when[0]], held[0])

        def __del__(self):
            held[0] -= 1

    def search(self):
        self._prepared()
        return {"passes": None}

    def in_turn(case, turns, calls):
        when[0] = "in turn"
        for turn in turns:
            turn.warm()
        return [[] for _ in turns]

    names = ["direct", "hutchinson", "structured_derivatives"]
    for name in names:
        monkeypatch.setattr(type(methods.get(name)), "prepare", lambda *_: Held())
        monkeypatch.setattr(type(methods.get(name)), "estimate", lambda *_: None)
        monkeypatch.setattr(type(methods.get(name)), "backends", ("torch",))
    monkeypatch.setattr(methods, "names", lambda: names)
    monkeypatch.setattr(Entrant, "search", search)
    monkeypatch.setattr(base, "in_turn", in_turn)
    goal = Goal(problem=LABEL, metric="trace", error=0.5)
    rows = time_to_error._rows(time_to_error.Settings(threads=1), goal)
    assert [row["status"] for row in rows] == ["ok"] * 3 and most == {"search": 1, "in turn": 3}


class Fake:
    """A method of a known law of errors, whose calls take a stated time on a clock of its own."""

    def __init__(self, monkeypatch, c=100.0, power=1.0, noise=False, seconds=lambda passes, call: 0.0):
        self.asked: list[int] = []
        self.seeds: list[int] = []
        self._c, self._power, self._noise = c, power, noise
        self._seconds, self._clock, self._rng = seconds, 0.0, np.random.default_rng(0)
        method = methods.get("hutchinson")
        monkeypatch.setattr(type(method), "estimate", lambda _, __, ___, passes, seed: self._estimate(passes, seed))
        monkeypatch.setattr("time.perf_counter", lambda: self._clock)

    def _estimate(self, passes, seed):
        self._clock += self._seconds(passes, len(self.asked))
        self.asked.append(passes)
        self.seeds.append(seed)
        drawn = self._rng.standard_normal() / 0.67449 if self._noise else 1.0
        return Estimate(1 + drawn * self._c / passes**self._power, 0.1, passes, "hutchinson", (), "trace")

    def entrant(self, error, patience=1.0, known=None, **given):
        settings = time_to_error.Settings(**{"seeds": 11, "looks": 8, "threads": 1} | given)
        goal = Goal(problem=LABEL, metric="trace", error=error, patience_s=patience)
        truth = Truth(settings, goal)
        truth._found = base.Once(lambda: (1.0, 0.0))
        return Entrant(settings, goal, truth, "hutchinson", "torch", known)


def test_the_budget_is_the_smallest_that_is_enough(monkeypatch):
    fake = Fake(monkeypatch)
    found = fake.entrant(0.5).search()
    assert found["passes"] in (200, 201) and found["error"] == pytest.approx(100 / found["passes"])
    assert found["seeds"] == 11 and 11 < found["law_seeds"] < len(fake.asked)
    assert len(set(fake.seeds)) == len(fake.seeds), "every estimate has a seed of its own"
    assert max(fake.asked) < 4 * 200


@pytest.mark.parametrize(("power", "c"), [(0.5, 0.1), (1.0, 1.0)])
def test_budgets_of_noisy_methods_are_right_and_their_bands_cover(monkeypatch, power, c):
    """The median budget of many searches is the true one; the first that is within the goal by luck would be less."""
    fake = Fake(monkeypatch, c, power, noise=True)
    found = [fake.entrant(0.01, seeds=51, looks=21).search() for _ in range(40)]
    budgets = np.array([row["passes"] for row in found])
    assert 92 < np.median(budgets) < 114 and budgets.min() > 50 and budgets.max() < 200
    held = [row["passes_low"] <= 100 and not row["passes_high"] < 100 for row in found]
    assert np.mean(held) >= 0.875


def test_a_budget_that_cannot_be_enough_is_given_up_before_all_seeds_are_drawn(monkeypatch):
    fake = Fake(monkeypatch)
    fake.entrant(0.5, seeds=51, looks=31).search()
    drawn = {passes: fake.asked.count(passes) for passes in set(fake.asked)}
    assert {count for passes, count in drawn.items() if 100 / passes > 0.5} == {1 + time_to_error.LOOK}


def test_a_budget_is_not_given_up_by_chance():
    entrant = Entrant(time_to_error.Settings(), Goal(problem=LABEL, metric="trace", error=0.5), None, "hutchinson")
    tried = Reruns(1.0, "float64")
    for value in [2.0] * 9 + [1.0] * 42:
        tried.estimates.append(Estimate(value, 0.1, 1, "hutchinson", (), "trace"))
        tried.seconds.append(0.0)
        assert len(tried.errors) > 30 or not entrant._is_clear(tried)


def test_the_smallest_budget_of_all_may_be_more_than_enough(monkeypatch):
    found = Fake(monkeypatch, c=0.1).entrant(0.5).search()
    assert found["passes"] == methods.get("hutchinson").least_passes(problems.load(LABEL), "trace")


@pytest.mark.parametrize("enough", [0.7, 1.05, 1.5])
def test_budgets_near_the_smallest_of_all_have_a_law_that_reaches_the_goal(monkeypatch, enough):
    """``enough`` is a multiple of the smallest budget: no row has a budget that its errors exclude."""
    least = methods.get("hutchinson").least_passes(problems.load(LABEL), "trace")
    fake = Fake(monkeypatch, 0.01 * enough * least, noise=True)
    found = [fake.entrant(0.01, seeds=51, looks=21).search() for _ in range(40)]
    assert all(math.isfinite(row["passes_low"]) for row in found)
    assert np.mean([row["passes_low"] <= max(least, enough * least) for row in found]) >= 0.875
    assert np.mean([not row["passes_high"] < enough * least for row in found]) >= 0.875
    assert np.median([row["passes"] for row in found]) < 2 * max(1, enough) * least


def test_limits_passes_is_for_deterministic_methods_and_most_passes_for_the_others(monkeypatch):
    fake = Fake(monkeypatch)
    assert fake.entrant(0.5, limits={"passes": 1}).search()["passes"] in (200, 201)
    with pytest.raises(Unavailable, match=r"takes at least \d+ passes, and no more than 1 are tried"):
        fake.entrant(0.5, most_passes=1).search()


def test_a_budget_that_another_backend_found_is_only_confirmed_if_it_is_enough(monkeypatch):
    band = {"passes_low": 150, "passes_high": 250, "law_seeds": 99}
    fake = Fake(monkeypatch, noise=True)
    found = fake.entrant(0.5, known=time_to_error.Known(200, band)).search()
    assert set(fake.asked) == {200} and len(fake.asked) == 8 == found["seeds"]
    assert found["passes"] == 200 and {key: found[key] for key in band} == band
    fake = Fake(monkeypatch)  # here 40 passes have an error of five times the goal
    found = fake.entrant(0.5, seeds=21, looks=21, known=time_to_error.Known(40, band)).search()
    assert found["passes"] in (200, 201) and found["law_seeds"] != 99


def test_a_search_that_begins_with_too_large_a_budget_goes_down(monkeypatch):
    found = Fake(monkeypatch).entrant(0.5, known=time_to_error.Known(3000, {})).search()
    assert found["passes"] in (200, 201)


def test_a_backend_that_lacks_the_device_gives_a_reason(monkeypatch):
    monkeypatch.setattr(operators, "device_name", lambda target: "cpu" if target.backend == "jax" else "a GPU")
    settings, goal = time_to_error.Settings(threads=1), Goal(problem=LABEL, metric="trace", error=0.5)
    row = base.row({}, Entrant(settings, goal, Truth(settings, goal), "hutchinson", "jax").search)
    assert row["status"] == "skipped" and row["reason"].startswith("jax has no GPU here, and PyTorch has one")


def test_a_budget_that_is_never_enough_says_what_was_tried(monkeypatch):
    row = base.row({}, Fake(monkeypatch).entrant(0.01, most_passes=512).search)
    assert (row["status"], row["reason"]) == ("skipped", "error 0.2 with 512 passes, and no more than 512 are tried")


def test_a_method_whose_calls_take_too_long_is_given_up_after_two(monkeypatch):
    fake = Fake(monkeypatch, seconds=lambda passes, call: 0.1 if passes < 50 else 6.0)
    row = base.row({}, fake.entrant(0.5).search)
    largest = max(fake.asked)
    assert row["reason"] == f"{largest} passes take 6 s, over 5 times patience_s (1)"
    assert fake.asked.count(largest) == 2


@pytest.mark.parametrize(("seconds", "asked"), [(24.0, True), (26.0, False)])
def test_other_backends_of_a_method_that_takes_far_too_long_are_not_called(monkeypatch, seconds, asked):
    fake = Fake(monkeypatch, seconds=lambda passes, call: seconds)
    first = fake.entrant(0.5)
    known = first.known(base.row({}, first.search))
    fake.asked.clear()
    row = base.row({}, fake.entrant(0.5, known=known).search)
    assert row["status"] == "skipped" and bool(fake.asked) == asked
    assert ("its first backend takes 26 s" in row["reason"]) != asked


def test_a_method_with_far_too_many_operations_is_not_called(monkeypatch):
    fake = Fake(monkeypatch)
    monkeypatch.setattr(type(methods.get("hutchinson")), "operations", lambda *_: 5e9)
    for speed, called in ((1e8, False), (1e9, True)):
        monkeypatch.setattr(time_to_error, "speeds", lambda target, speed=speed: Machine(speed, 1e9, 1e-5))
        row = base.row({}, fake.entrant(0.5).search)
        assert bool(fake.asked) == called and ("predicted to take at least 50 s" in row["reason"]) != called


def test_a_method_that_compiles_at_its_first_call_is_not_given_up(monkeypatch):
    fake = Fake(monkeypatch, seconds=lambda passes, call: 60.0 if call == 0 else 0.1)
    assert fake.entrant(0.5).search()["error"] <= 0.5


def test_a_method_that_takes_longer_than_the_patience_gets_no_larger_budget(monkeypatch):
    fake = Fake(monkeypatch, seconds=lambda passes, call: passes / 100)
    row = base.row({}, fake.entrant(0.5).search)
    assert "over patience_s (1)" in row["reason"] and row["status"] == "skipped"
    assert max(fake.asked) < 400


def test_an_estimate_replaces_an_unavailable_exact_value():
    label, error, settings = "mlp_hazelden[N=8]", 0.3, time_to_error.Settings()
    assert Truth(settings, Goal(problem=label, metric="norm", error=error)).columns()["reference_error"] == 0
    found = Truth(settings, Goal(problem=label, metric="norm", error=error, exact=False)).columns()
    assert 0 < 1.95 * found["reference_error"] <= error / 3
    exact = reference.exact(problems.load(label))["norm"]
    assert abs(found["reference"] / exact - 1) < 4 * found["reference_error"]


def test_an_imprecise_reference_gives_a_reason_in_each_row(monkeypatch):
    monkeypatch.setattr(time_to_error, "REFERENCE_PASSES", 4)
    table = run({"problem": LABEL, "metric": "alignment", "error": 1e-4, "exact": False})
    tried = table[table["status"] != "skipped"]
    assert len(tried) > 5 and tried["reason"].str.contains(r"no reference for mlp_hazelden\[N=2\]: 4 passes did").all()


def test_a_problem_that_does_not_train_gives_a_reason_in_each_row(monkeypatch):
    tried = []

    def load(label):
        tried.append(label)
        raise DidNotTrain("not there yet")

    monkeypatch.setattr(problems, "load", load)
    table = run({"problem": LABEL, "metric": "trace", "error": 0.1})
    assert set(table["reason"]) == {"DidNotTrain: not there yet"} and len(table) > 20 and tried == [LABEL]


def test_every_default_goal_is_valid_in_a_configuration():
    given = [goal.model_dump() for goal in time_to_error.GOALS]
    assert studies.settings("time_to_error", {"goals": given}).goals == time_to_error.GOALS


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"problem": "fc", "metric": "trace", "error": 1}, "unknown problem 'fc'"),
        ({"problem": LABEL, "metric": "tracer", "error": 1}, "did you mean 'trace'"),
        ({"problem": LABEL, "metric": "trace", "error": 0}, "greater than 0"),
        ({"problem": LABEL, "metric": "trace"}, "error"),
    ],
)
def test_impossible_goals_are_refused(wrong, says):
    with pytest.raises(ValidationError, match=says):
        run(wrong)


def figure_rows(**changes: object) -> pd.DataFrame:
    """A goal with methods of all kinds, among them two published ones."""
    kinds = {
        "hutchpp": ("stochastic", True, 0.1),
        "nystrompp": ("stochastic", True, 0.2),
        "sample_subset": ("stochastic", False, 0.02),
        "xtrace": ("stochastic", False, 0.05),
        "structured_derivatives": ("exact", False, 0.04),
        "sum_of_logits": ("approximate", True, 0.4),
        "trace_kernel": ("approximate", False, 0.01),
        "direct": ("exact", False, float("nan")),
    }
    shared = {"problem": "digits_mlp", "metric": "norm", "goal": 0.01, "backend": "torch", "seeds": 51, "calls": 15}
    shared |= {"passes": 9, "rival": "hutchpp", "device": "cpu", "dtype": "float32", "threads": 2}
    shared |= {"machine": "a laptop", "git_sha": "0123456789abcdef", "git_dirty": False}
    rows = [
        {
            **shared,
            "method": name,
            "title": methods.get(name).title,
            "kind": kind,
            "published": published,
            "seconds": seconds,
            "ratio": seconds / 0.1,
            "ratio_low": seconds / 0.12,
            "ratio_high": seconds / 0.08,
            "status": "ok" if seconds == seconds else "skipped",
            "reason": "" if seconds == seconds else "too many passes",
        }
        for name, (kind, published, seconds) in kinds.items()
    ]
    return pd.DataFrame(rows).assign(**changes)


def drawn(rows: pd.DataFrame) -> sheets.Drawing:
    with sheets.style():
        return figure.draw(sheets.checked_study(rows, figure.COLUMNS))


def test_the_figure_names_the_fastest_of_each_kind():
    drawing = drawn(figure_rows())
    plotted = drawing.plotted.set_index("method")["role"].to_dict()
    assert plotted == {
        "hutchpp": "published",
        "nystrompp": "",
        "sample_subset": "estimated",
        "xtrace": "",
        "structured_derivatives": "exact",
        "sum_of_logits": "",
        "trace_kernel": "biased",
    }
    said = [text.get_text() for text in drawing.figure.axes[0].texts]
    assert "sample subset, 20 ms" in said and "Hutch++, 100 ms" in said and "5×" in said and "4 to 6" in said
    assert drawing.title == (
        "To the same error, the best method here is 5 times as fast as the best published one: surely faster on 1 of 1 "
        "tasks, surely slower on 0"
    )
    assert "15 calls each" in drawing.figure.texts[1].get_text()


def test_the_figure_marks_ties_with_the_fastest_method():
    """Unknown ends of intervals exclude nothing."""
    rows = figure_rows()
    xtrace = rows["method"] == "xtrace"
    assert not any("tied" in text.get_text() for text in drawn(rows).figure.axes[0].texts)
    for end, value in (("ratio_low", 0.24), ("ratio_low", math.nan)):
        drawing = drawn(rows.assign(**{end: rows[end].mask(xtrace, value)}))
        assert "sample subset or tied, 20 ms" in [text.get_text() for text in drawing.figure.axes[0].texts]
        assert drawing.plotted.set_index("method")["tied"].to_dict()["sample_subset"]
    unknown = drawn(rows.assign(ratio_high=math.nan))
    assert "? to 6" in [text.get_text() for text in unknown.figure.axes[0].texts]
    assert "surely faster on 0 of 1 tasks, surely slower on 0" in unknown.title


def test_the_rival_of_the_figure_is_the_fastest_published_method_whatever_its_bias():
    rows = figure_rows()
    rows.loc[rows["method"] == "sum_of_logits", "seconds"] = 0.01
    rows["ratio"] = rows["seconds"] / 0.01
    rows[["ratio_low", "ratio_high"]] = rows[["ratio"]].to_numpy() * [0.9, 1.1]
    drawing = drawn(rows)
    assert drawing.plotted.set_index("method").loc["sum_of_logits", "role"] == "published"
    assert "is 0.5 times as fast as the best published one" in drawing.title
    assert drawing.title.endswith("surely faster on 0 of 1 tasks, surely slower on 1 (1 against a biased kernel)")


def test_the_figure_says_where_no_published_method_reaches_the_goal():
    rows = figure_rows()
    drawing = drawn(rows[~rows["published"]])
    assert "No published method reaches 1 of the goals" in drawing.caption
    assert drawing.title.startswith("No published method")
    none = drawn(rows[rows["status"] != "ok"])
    assert "too many passes" in none.caption
