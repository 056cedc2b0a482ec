"""The study of the time of ``auto`` compared with the fastest method to the same tolerance."""

from __future__ import annotations

import dataclasses

import pytest

from ntkbench import methods
from ntkbench.errors import Unavailable
from ntkbench.studies import auto_choice


@pytest.fixture(scope="module")
def table():
    settings = auto_choice.Settings(
        problems=["digits_mlp[N=4]", "gpt2_small[L=1,T=2,V=12,d=64]"],
        metrics=["trace", "alignment"],
        rtols=[0.3],
        calls=3,
        threads=1,
        limits={"passes": 50},
    )
    return auto_choice.run(settings)


def test_auto_comes_first_and_stands_for_a_method(table):
    for _, task in table.groupby(["problem", "metric"]):
        assert task["method"].iloc[0] == "auto"
    measured = table[(table["method"] == "auto") & (table["status"] == "ok")]
    assert len(measured) == 3 and set(measured["by"]) <= set(methods.names())


def test_methods_that_state_no_error_take_no_part(table):
    kinds = {methods.get(name).kind for name in table["method"].unique() if name != "auto"}
    assert kinds == {"exact", "stochastic"}
    assert "sum_of_logits" not in set(table["method"])


def test_ratios_are_to_the_calls_of_auto(table):
    timed = table[table["ratio"].notna()]
    assert len(timed) and (timed["calls"] == 3).all() and (timed["method"] != "auto").all()
    for _, task in timed.groupby(["problem", "metric"]):
        (fastest,) = task[task["fastest"] == True].index  # noqa: E712 - an object column
        assert task.loc[fastest, "seconds"] == task["seconds"].min()


def test_what_takes_no_part_has_its_reason(table):
    left = table[table["status"] != "ok"]
    assert (left["reason"].str.len() > 0).all()
    untrained = table[(table["problem"].str.startswith("gpt2")) & (table["metric"] == "alignment")]
    assert set(untrained["reason"]) == {"the network stays untrained"}


def test_a_tolerance_is_reached(table):
    measured = table[(table["status"] == "ok") & (table["method"] != "auto")]
    assert (measured["relative_width"] <= 0.3).all()


def test_a_rival_reaches_the_tolerance_with_each_timed_seed(monkeypatch):
    settings, task = auto_choice.Settings(threads=1), {"problem": "digits_mlp[N=4]", "metric": "trace", "rtol": 0.3}
    found = auto_choice._alone(settings, task, "hutchinson")
    assert found["seeds"] == len(auto_choice.SEEDS) and found["relative_width"] <= 0.3
    estimate = auto_choice._estimate

    def last_is_wide(settings, task, name, seed):
        made = estimate(settings, task, name, seed)
        return dataclasses.replace(made, standard_error=made.value) if seed == auto_choice.SEEDS[-1] else made

    monkeypatch.setattr(auto_choice, "_estimate", last_is_wide)
    with pytest.raises(Unavailable, match="reaches"):
        auto_choice._alone(settings, task, "hutchinson")
