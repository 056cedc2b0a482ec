"""The study of the cost of certificates: estimates with and without one, timed alternately."""

from __future__ import annotations

import pandas as pd
import pytest
from pydantic import ValidationError

from ntkbench import methods, problems, studies
from ntkbench.operators.plain import PlainNetwork
from ntkbench.options import Target
from ntkbench.studies import certificate_cost

SMALL = "digits_conv[N=4]"
ESTIMATES = [
    {"problem": SMALL, "method": "one_sided_reverse", "passes": 6},
    {"problem": SMALL, "method": "structured_derivatives", "metric": "norm"},
    {"problem": SMALL, "method": "hutchpp", "metric": "alignment", "passes": 72},
    {"problem": SMALL, "method": "recurrent_exact_trace"},
]


def run(estimates: list[dict], **changes: object) -> pd.DataFrame:
    given = {"threads": 1, "device": "cpu", "calls": 3, "estimates": estimates}
    return studies.run("certificate_cost", studies.settings("certificate_cost", given | changes))


def test_a_row_has_both_times_and_the_cost_of_the_certificate():
    table = run(ESTIMATES)
    assert list(table["status"]) == ["ok", "ok", "ok", "skipped"], table["reason"].tolist()
    good = table[table["status"] == "ok"]
    assert (good["certificate"] < 1e-3).all() and (good["certificate"] > 0).all()
    assert set(good["calls"]) == {3} and good["passes_spent"].tolist()[0] == 6
    for name in ("seconds", "certified_seconds", "pass_seconds", "share", "cost_in_passes"):
        assert (good[f"{name}_q25"] <= good[name]).all() and (good[name] <= good[f"{name}_q75"]).all()


@pytest.mark.parametrize(
    ("method", "metric", "passes", "sets"),
    [
        ("one_sided_reverse", "trace", 6, 1),
        ("one_sided_forward", "trace", 6, 1),
        ("hutchpp", "trace", 12, 1),  # VJPs and JVPs share one plain gradient
        ("hutchpp", "alignment", 72, 2),
        ("structured_derivatives", "norm", None, 1),
        ("structured_derivatives", "alignment", None, 2),
        ("direct", "norm", None, 1),
    ],
)
def test_a_certificate_is_one_plain_pass_at_each_parameter_set(monkeypatch, method, metric, passes, sets):
    taken = []
    gradient = PlainNetwork.gradient
    monkeypatch.setattr(PlainNetwork, "gradient", lambda *given: taken.append(1) or gradient(*given))
    prepared = methods.get(method).prepare(problems.load(SMALL), Target("torch", "float64"))
    # Before the first budget of both JVPs and VJPs, one JVP determines their cost.
    for expected in (2 * sets if method == "hutchpp" else sets, sets):
        taken.clear()
        methods.get(method).estimate(prepared, metric, passes)
        assert len(taken) == expected
        methods.get(method).estimate(prepared, metric, passes)
        assert len(taken) == expected, "a second estimate was certified again"
        prepared.certify_again()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "nt_structured_derivatives"}, "does not run on torch"),
        ({"method": "hutchpp"}, "takes a number of passes"),
        ({"method": "direct", "passes": 3}, "takes no number of passes"),
        ({"method": "x"}, "unknown method 'x'"),
    ],
)
def test_invalid_estimates_are_refused_before_anything_runs(given, said):
    with pytest.raises(ValidationError, match=said):
        studies.settings("certificate_cost", {"threads": 1, "estimates": [{"problem": SMALL} | given]})


def test_the_default_estimates_are_valid():
    for each in certificate_cost.ESTIMATES:
        certificate_cost.Certified.model_validate(each.model_dump())
