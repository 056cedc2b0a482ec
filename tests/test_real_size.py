"""The study of single calls on networks of real size, tested on small ones."""

from __future__ import annotations

import pytest
from conftest import mostly_slow
from live_bytes import LiveBytes

from ntkbench import ladder, metrics, problems
from ntkbench.options import Options, Target
from ntkbench.studies import base, real_size


@pytest.mark.slow
def test_a_call_has_its_interval_its_time_and_its_memory():
    cases = [
        {"problem": "transformer_tiny", "metric": "trace", "rtol": 0.2},
        {"problem": "transformer_tiny[head=tied]", "metric": "alignment", "rtol": 0.2},
        {"problem": "gpt2_small[L=1,T=2,V=12,d=64]", "metric": "alignment", "rtol": 0.2},
    ]
    table = real_size.run(real_size.Settings(cases=cases, threads=1))
    measured, untrained = table[table["status"] == "ok"], table[table["status"] != "ok"]
    assert len(measured) == 2 and (measured["relative_width"] <= 0.2).all()
    assert (measured["low"] <= measured["value"]).all() and (measured["value"] <= measured["high"]).all()
    assert (measured["seconds"] > 0).all()
    ends = measured["metric"].map({"trace": 1, "alignment": 2})
    assert (measured["weights_bytes"] == 4 * ends * measured["P"]).all()
    assert measured["within_allowed"].all() and measured["goal_met"].isna().all()
    assert untrained["reason"].str.contains("no trained weights").all()


@pytest.mark.parametrize(
    ("width", "seconds", "memory", "met"),
    [(0.05, 9, 90, True), (0.06, 9, 90, False), (0.05, 11, 90, False), (0.05, 9, 101, False), (0.05, 9, None, None)],
)
def test_a_goal_is_met_only_within_all_of_its_limits(width, seconds, memory, met):
    case = real_size.Case(problem="transformer_tiny", rtol=0.05, most_seconds=10, most_bytes=100)
    assert real_size._meets(case, width, seconds, memory) is met
    assert real_size._meets(real_size.Case(problem="transformer_tiny"), width, seconds, memory) is None


@pytest.mark.parametrize(("metric", "head"), mostly_slow([("trace", "tied"), ("alignment", "untied")], 1))
def test_a_call_holds_no_more_than_its_memory_and_the_weights(metric, head):
    problem = problems.load(f"transformer_tiny[N=2,T=8,V=100,d=24,head={head}]")
    target = Target("torch", "float32", "cpu", 2**21)
    call = lambda: ladder.estimates(problem, (metric,), target, Options(rtol=0.3), base.preparing(problem, target))  # noqa: E731
    call()  # prepares what all calls share
    with LiveBytes() as live:
        call()
    assert live.peak <= target.memory + 4 * problem.P * len(metrics.parameter_sets(metric))


def test_the_default_cases_are_valid():
    settings = real_size.Settings.model_validate(
        {"cases": [case.model_dump() for case in real_size.CASES], "threads": 1}
    )
    assert len(settings.cases) == len(real_size.CASES)
    with pytest.raises(ValueError, match="is not a size"):
        real_size.Settings.model_validate({"cases": [{"problem": "gpt2_small[X=1]"}]})
