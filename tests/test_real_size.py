"""The study of single calls on networks of real size, tested on small ones."""

from __future__ import annotations

import pytest

from ntkbench.studies import real_size


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
    assert (measured["seconds"] > 0).all() and (measured["weights_bytes"] == 4 * measured["P"]).all()
    assert untrained["reason"].str.contains("no trained weights").all()


def test_the_default_cases_are_problems():
    settings = real_size.Settings.model_validate(
        {"cases": [case.model_dump() for case in real_size.CASES], "threads": 1}
    )
    assert len(settings.cases) == len(real_size.CASES)
    with pytest.raises(ValueError, match="is not a size"):
        real_size.Settings.model_validate({"cases": [{"problem": "gpt2_small[X=1]"}]})
