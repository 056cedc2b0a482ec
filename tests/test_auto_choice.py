"""The study of the time of ``auto`` compared with the fastest method to the same tolerance."""

from __future__ import annotations

import dataclasses
import math
import re

import pandas as pd
import pytest

from ntkbench import methods, paths, readme
from ntkbench.errors import Unavailable
from ntkbench.estimate import Estimate
from ntkbench.studies import auto_choice

CALLS = 2


@pytest.fixture(scope="module")
def table():
    settings = auto_choice.Settings(
        problems=["digits_mlp[N=4]", "gpt2_small[L=1,T=2,V=12,d=64]"],
        metrics=["trace", "alignment"],
        rtols=[0.3],
        calls=CALLS,
        threads=1,
        limits={"passes": 20},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto_choice, "SEEDS", auto_choice.SEEDS[:2])
        return auto_choice.run(settings)


@pytest.mark.slow
def test_auto_comes_first_and_names_its_method(table):
    for _, task in table.groupby(["problem", "metric"]):
        assert task["method"].iloc[0] == "auto"
    measured = table[(table["method"] == "auto") & (table["status"] == "ok")]
    assert len(measured) == 3 and set(measured["by"]) <= set(methods.names())


@pytest.mark.slow
def test_methods_without_a_standard_error_are_left_out(table):
    kinds = {methods.get(name).kind for name in table["method"].unique() if name != "auto"}
    assert kinds == {"exact", "stochastic"}
    assert "sum_of_logits" not in set(table["method"])


@pytest.mark.slow
def test_ratios_are_relative_to_auto(table):
    timed = table[table["ratio"].notna()]
    assert len(timed) and (timed["calls"] == CALLS).all() and (timed["method"] != "auto").all()
    for _, task in timed.groupby(["problem", "metric"]):
        (fastest,) = task[task["fastest"] == True].index  # noqa: E712 - an object column
        assert task.loc[fastest, "seconds"] == task["seconds"].min()


def test_ratios_pair_calls_of_the_same_round():
    rows = [{"method": name, "reached": True} for name in ("auto", "slow", "fast", "untimed")]
    auto_choice._add_ratios(rows, [[2.0, 4.0, 6.0], [4.0, 4.0, 4.0], [1.0, 2.0, 2.0], []])
    assert "ratio" not in rows[0] and "ratio" not in rows[3]
    assert [rows[1][key] for key in ("ratio", "ratio_q25", "ratio_q75")] == [1.0, 0.75, 1.25]
    assert [rows[2][key] for key in ("ratio", "ratio_q25", "ratio_q75")] == [2.0, 2.0, 2.5]
    assert (rows[1]["fastest"], rows[2]["fastest"]) == (False, True)


def test_an_auto_that_misses_the_tolerance_has_no_ratio_to_methods_that_reach_it():
    rows = [{"method": "auto", "reached": False}, *({"method": name, "reached": True} for name in ("slow", "fast"))]
    auto_choice._add_ratios(rows, [[1.0, 1.0], [4.0, 4.0], [2.0, 2.0]])
    assert not any("ratio" in row for row in rows) and [row.get("fastest") for row in rows] == [None, False, True]


def test_a_row_says_whether_the_tolerance_is_reached(monkeypatch):
    wide = Estimate(1.0, 1.0, 4, "hutchinson", (), "trace", degrees=9)
    monkeypatch.setattr(auto_choice.Prepared, "estimate", lambda self, name, seed: wide)
    task = {"problem": "digits_mlp[N=4]", "metric": "trace", "rtol": 0.3}
    found = auto_choice._alone(auto_choice.Settings(threads=1), task, "auto", math.inf)
    assert found["relative_width"] > 0.3 and found["reached"] is False


def test_preparations_are_freed_before_the_next_method_is_measured(monkeypatch):
    """Each fits in memory alone. Those of the methods that are timed in turn are made again for that."""
    held, most = [0], {"alone": 0, "in turn": 0}
    when = ["alone"]

    class Held:
        def __init__(self):
            held[0] += 1
            most[when[0]] = max(most[when[0]], held[0])

        def __del__(self):
            held[0] -= 1

    def estimates(problem, names, target, options, prepare):
        made = prepare(methods.get("hutchinson" if options.method == "auto" else options.method))
        assert isinstance(made, Held)
        return {names[0]: Estimate(1.0, None, 4, "hutchinson", (), names[0])}

    def in_turn(task, turns, calls):
        when[0] = "in turn"
        for turn in turns:
            turn.warm()
        return [[1.0] * calls for _ in turns]

    names = ["hutchinson", "structured_derivatives", "parameter_gram"]
    for name in names:
        monkeypatch.setattr(type(methods.get(name)), "prepare", lambda *_: Held())
        monkeypatch.setattr(type(methods.get(name)), "prepares", name)
    monkeypatch.setattr(auto_choice, "_rivals", lambda metric: names)
    monkeypatch.setattr(auto_choice, "_check", lambda *_: None)
    monkeypatch.setattr(auto_choice.ladder, "estimates", estimates)
    monkeypatch.setattr(auto_choice.base, "in_turn", in_turn)
    monkeypatch.setattr(auto_choice, "RIVAL", math.inf)
    auto_choice._rows(auto_choice.Settings(threads=1), "digits_mlp[N=4]", "trace", 0.1)
    assert most == {"alone": 1, "in turn": 3} and held == [0]


def test_the_share_of_tasks_on_the_page_is_that_of_the_committed_table():
    """Counted here from seconds and widths alone, task by task."""
    table = pd.read_csv(paths.REFERENCE / f"{readme.AUTO_CHOICE}.csv")
    tasks = within = 0
    for (_, _, rtol), task in table.groupby(["problem", "metric", "rtol"]):
        if set(task["status"]) == {"skipped"}:
            continue
        tasks += 1
        auto, others = task[task["method"] == "auto"].iloc[0], task[task["ratio"].notna()]
        assert (others["relative_width"] <= rtol).all() and "auto" not in set(others["method"])
        reached = auto["status"] == "ok" and auto["relative_width"] <= rtol
        if not len(others):
            within += reached
            continue
        fastest = others.loc[others["seconds"].idxmin()]
        assert fastest["fastest"] == True and others["fastest"].eq(True).sum() == 1  # noqa: E712 - an object column
        assert fastest["ratio_q25"] <= fastest["ratio"] <= fastest["ratio_q75"]
        assert 1 / 2 < fastest["ratio"] * fastest["seconds"] / auto["seconds"] < 2, "calls take turns"
        within += reached and fastest["ratio"] <= readme.CLOSE
    page = (paths.ROOT / "docs" / "measured.md").read_text()
    stated = re.search(r"\| all \| (\d+) \| (\d+) \| \d+ \| \d+ \| [\d.]+ \| [\d.]+ \(", page)
    assert (tasks, within) == tuple(map(int, stated.groups()))


@pytest.mark.slow
def test_rows_without_a_result_have_a_reason(table):
    left = table[table["status"] != "ok"]
    assert (left["reason"].str.len() > 0).all()
    untrained = table[(table["problem"].str.startswith("gpt2")) & (table["metric"] == "alignment")]
    assert set(untrained["reason"]) == {"the network stays untrained"}


@pytest.mark.slow
def test_a_tolerance_is_reached(table):
    measured = table[(table["status"] == "ok") & (table["method"] != "auto")]
    assert (measured["relative_width"] <= 0.3).all()


def test_a_rival_reaches_the_tolerance_with_each_timed_seed(monkeypatch):
    settings, task = auto_choice.Settings(threads=1), {"problem": "digits_mlp[N=4]", "metric": "trace", "rtol": 0.3}
    found = auto_choice._alone(settings, task, "hutchinson", math.inf)
    assert found["seeds"] == len(auto_choice.SEEDS) and found["relative_width"] <= 0.3
    estimate = auto_choice.Prepared.estimate

    def last_is_wide(self, name, seed):
        made = estimate(self, name, seed)
        return dataclasses.replace(made, standard_error=made.value) if seed == auto_choice.SEEDS[-1] else made

    monkeypatch.setattr(auto_choice.Prepared, "estimate", last_is_wide)
    with pytest.raises(Unavailable, match="reaches"):
        auto_choice._alone(settings, task, "hutchinson", math.inf)


@pytest.mark.parametrize(("of_auto", "given_up"), [(0.1, True), (0.45, False)])
def test_a_rival_that_may_be_faster_than_auto_is_not_given_up(monkeypatch, of_auto, given_up):
    """However small ``patience_s`` is: the rival takes 0.5 s."""
    patience = []

    def alone(settings, task, name, limit):
        if name == auto_choice.AUTO:
            return {"alone_seconds": of_auto}
        patience.append(limit)
        raise Unavailable("not measured here")

    monkeypatch.setattr(auto_choice, "_alone", alone)
    monkeypatch.setattr(auto_choice.base, "in_turn", lambda task, turns, calls: [[] for _ in turns])
    auto_choice._rows(auto_choice.Settings(threads=1, limits={"patience_s": 0.2}), "digits_mlp[N=4]", "trace", 0.1)
    assert patience and all((limit < 0.5) == given_up for limit in patience)
